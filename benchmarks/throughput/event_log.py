"""The event log that every runner reads: JSON lines of watch events, the same bytes for the same shape.

Viewers differ in activity by a log-normal factor; none has more than 0.01% of the events, or three times the mean where
that is more (among 10,000 viewers the mean alone is 0.01%). A viewer watches in sessions, mostly favourites, popular
videos of a cluster more than others; all videos are of the packaged registry, so look-ups hit. A viewer has about one
event an hour, and the log holds as many hours as its events need, in order of time over all viewers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import orjson
from numpy.random import Generator

from agents.clusters.files import packaged_registry
from streams.records import UNASSIGNED

VERSION: Final = 1
"""Of the generator: part of the cached file's name."""
ACTIVITY_SIGMA: Final = 1.0
LARGEST_SHARE: Final = 1e-4
LARGEST_TIMES_MEAN: Final = 3.0
SESSION_EVENTS: Final = 5.0
FAVOURITES: Final = (0.40, 0.25, 0.15, 0.12, 0.08)
STICKY: Final = 0.4
"""Probability that an event stays with the cluster its session began with."""
EXPLORING: Final = 0.1
"""Probability of a cluster by its popularity instead of a favourite."""
PAUSE_MS: Final = 20_000
HOUR_MS: Final = 3_600_000
START_MS: Final = 1_750_000_000_000
ACTIONS: Final = ("play", "skip", "thumbs_up", "thumbs_down", "share", "bookmark")
ACTION_SHARES: Final = (0.93, 0.03, 0.02, 0.005, 0.005, 0.01)
SURFACES: Final = ("home", "search", "up_next", "shelf")
LOCALES: Final = ("en-GB", "de-DE", "fr-FR", "pt-BR", "ja-JP")

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides a log's bytes."""

    users: int
    events: int
    seed: int = 1

    @property
    def most_events(self) -> int:
        """Events that one viewer may have."""
        return int(max(1.0, self.events * max(LARGEST_SHARE, LARGEST_TIMES_MEAN / self.users)))


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The registry's videos: ids by cluster, popular ones first; cluster k has ids[first[k] : first[k] + size[k]]."""

    ids: list[str]
    first: Integers
    size: Integers


def cluster_of_video() -> dict[str, int]:
    """Cluster id of every assigned video of the packaged registry."""
    catalogue = resources.files("agents.data").joinpath("demo_catalogue.jsonl").read_bytes()
    videos = sorted(orjson.loads(line)["video_id"] for line in catalogue.splitlines())
    clusters = packaged_registry().clusters_of(videos).tolist()
    return {video: cluster for video, cluster in zip(videos, clusters, strict=True) if cluster != UNASSIGNED}


def cached_log(shape: Shape, folder: Path) -> Path:
    """The log's file below `folder`, written on first use."""
    path = folder / f"watch-{shape.users}-{shape.events}-seed{shape.seed}-v{VERSION}.jsonl"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        for line in lines(shape):
            file.write(line + b"\n")
    partial.replace(path)
    return path


def lines(shape: Shape) -> Iterator[bytes]:
    """The log's events as JSON, in order of time."""
    events = columns(shape)
    names = ("number", "viewer", "video", "ts", "action", "watch_ms", "duration_ms", "session", "surface")
    catalogue = _catalogue()
    rows = zip(*(events[name].tolist() for name in names), strict=True)
    for number, viewer, video, ts, action, watch_ms, duration_ms, session, surface in rows:
        yield (
            f'{{"schema_version":1,"event_id":"e{number:010d}","user_id":"u{viewer:07d}",'
            f'"video_id":"{catalogue.ids[video]}","ts":{ts},"action":"{ACTIONS[action]}","watch_ms":{watch_ms},'
            f'"duration_ms":{duration_ms},"session_id":"s{session:08d}","surface":"{SURFACES[surface]}",'
            f'"autoplay":{"true" if surface == 2 else "false"},"locale":"{LOCALES[viewer % len(LOCALES)]}"}}'
        ).encode()


def columns(shape: Shape) -> dict[str, Integers]:
    """The events as columns of equal length, in order of time. number: place before sorting, unique."""
    random = np.random.default_rng([shape.seed, shape.users, shape.events])
    catalogue = _catalogue()
    viewer = _viewers(shape, random)
    opens = np.diff(viewer, prepend=-1) != 0
    opens |= random.random(shape.events) < 1 / SESSION_EVENTS
    session = np.cumsum(opens) - 1
    video = _videos(shape, viewer, session, opens, catalogue, random)
    durations = random.lognormal(np.log(8 * 60_000), 0.8, len(catalogue.ids)).astype(np.int64) + 15_000
    duration_ms = durations[video]
    action = random.choice(len(ACTIONS), shape.events, p=ACTION_SHARES)
    fraction = np.where(action == ACTIONS.index("skip"), 0.05, random.beta(2.0, 1.0, shape.events))
    watch_ms = (duration_ms * fraction).astype(np.int64)
    hours = max(1.0, shape.events / shape.users)
    starts = random.uniform(0.0, hours * HOUR_MS, int(session[-1]) + 1)
    spent = watch_ms + random.exponential(PAUSE_MS, shape.events)
    ts = START_MS + (starts[session] + _since_opening(spent, opens, session)).astype(np.int64)
    order = np.argsort(ts, kind="stable")
    found = {
        "number": np.arange(shape.events),
        "viewer": viewer,
        "video": video,
        "ts": ts,
        "action": action,
        "watch_ms": watch_ms,
        "duration_ms": duration_ms,
        "session": session,
        "surface": random.choice(len(SURFACES), shape.events, p=(0.5, 0.15, 0.25, 0.1)),
    }
    return {name: column[order] for name, column in found.items()}


def _viewers(shape: Shape, random: Generator) -> Integers:
    """Whose each event is, ascending; none has more than its share."""
    weights = random.lognormal(0.0, ACTIVITY_SIGMA, shape.users)
    limit = max(LARGEST_SHARE, LARGEST_TIMES_MEAN / shape.users)
    for _ in range(50):  # to cut one raises the shares of the others
        weights = np.minimum(weights / weights.sum(), limit)
    counts = np.minimum(random.poisson(weights / weights.sum() * shape.events), shape.most_events)
    while (excess := int(counts.sum()) - shape.events) != 0:
        open_to_change = counts > 0 if excess > 0 else counts < shape.most_events
        chosen = random.permutation(np.flatnonzero(open_to_change))[: abs(excess)]
        counts[chosen] -= np.sign(excess)
    return np.repeat(np.arange(shape.users), counts)


def _videos(
    shape: Shape,
    viewer: Integers,
    session: Integers,
    opens: npt.NDArray[np.bool_],
    catalogue: Catalogue,
    random: Generator,
) -> Integers:
    """Place of each event's video in the catalogue."""
    clusters = len(catalogue.size)
    popularity = 1.0 / np.arange(1, clusters + 1) ** 0.7
    popularity = random.permutation(popularity / popularity.sum())
    favourites = random.choice(clusters, (shape.users, len(FAVOURITES)), p=popularity)
    chosen = favourites[viewer, random.choice(len(FAVOURITES), shape.events, p=FAVOURITES)]
    exploring = random.random(shape.events) < EXPLORING
    chosen = np.where(exploring, random.choice(clusters, shape.events, p=popularity), chosen)
    anchor = chosen[opens][session]
    chosen = np.where(random.random(shape.events) < STICKY, anchor, chosen)
    places: Integers = catalogue.first[chosen] + (catalogue.size[chosen] * random.random(shape.events) ** 2).astype(
        np.int64
    )
    return places


def _since_opening(spent: Floats, opens: npt.NDArray[np.bool_], session: Integers) -> Floats:
    """Time from the session's opening to each event, given the time spent from it to the next."""
    before = np.cumsum(spent) - spent
    since: Floats = before - before[opens][session]
    return since


def _catalogue() -> Catalogue:
    cluster_of = cluster_of_video()
    ids = sorted(cluster_of, key=lambda video: (cluster_of[video], video))
    _, first, size = np.unique([cluster_of[video] for video in ids], return_index=True, return_counts=True)
    return Catalogue(ids, first, size)
