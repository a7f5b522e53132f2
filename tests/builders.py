"""Small registries, events and configurations for tests of the core."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from agents.artefacts import load_thresholds
from agents.replay import Control, Event
from agents.settings import Settings
from streams.decoding import decode_event
from streams.identifiers import video_key
from streams.mixture import Model
from streams.registry import ClusterCard, Neighbours, Registry, TextColumn, VideoTable, bucket_offsets
from streams.trigger import Policy
from streams.watch import WatchConfiguration

START = 1_767_225_600_000
MINUTE = 60_000
LABELS = ("sourdough baking", "trail running", "jazz guitar", "urban sketching", "chess endgames", "beekeeping")


def column(texts: list[str]) -> TextColumn:
    blob = "".join(texts).encode()
    ends = np.cumsum([0, *(len(text.encode()) for text in texts)])
    return TextColumn(np.frombuffer(blob, dtype=np.uint8), ends.astype(np.int64))


def make_registry(
    clusters: int = 6,
    videos: int = 10,
    version: int = 1,
    extra: dict[str, int] | None = None,
    successors: dict[int, int] | None = None,
) -> Registry:
    """Clusters 0..n-1 with videos `c{cluster}v{i}`; every cluster neighbours every other, nearer ids nearer.

    successors: clusters of an earlier version that are gone, each with the one its videos went to (-1: none).
    """
    gone = successors or {}
    live = [c for c in range(clusters) if c not in gone]
    cards = [
        ClusterCard(
            cluster_id=c,
            label=LABELS[c] if c < len(LABELS) else f"topic {c}",
            query=f"{LABELS[c % len(LABELS)]} videos {c}",
            titles=tuple(f"{LABELS[c % len(LABELS)]} number {'abcde'[i]}" for i in range(5)),
            terms=(LABELS[c % len(LABELS)].split()[0],),
            support=videos,
            prior=1.0 / len(live),
            cohesion=0.6,
            sensitive=False,
        )
        for c in live
    ]
    placed = {f"c{c}v{i}": gone.get(c, c) for c in range(clusters) for i in range(videos)} | (extra or {})
    rows = sorted(placed.items(), key=lambda item: video_key(item[0]))
    ids = np.array([[o for o in live if o != c] for c in live], dtype=np.int32)
    cosines = np.array(
        [[0.9 - 0.1 * abs(o - c) for o in row] for c, row in zip(live, ids.tolist(), strict=True)], np.float32
    )
    order = np.argsort(-cosines, axis=1, kind="stable")
    keys = np.array([video_key(v) for v, _ in rows], dtype=np.uint64)
    return Registry(
        version=version,
        checksum=f"test-{version}",
        lineage="test",
        cards=cards,
        neighbours=Neighbours(np.take_along_axis(ids, order, 1), np.take_along_axis(cosines, order, 1)),
        videos=VideoTable(
            keys=keys,
            clusters=np.array([c for _, c in rows], dtype=np.int32),
            ids=column([v for v, _ in rows]),
            titles=column([f"title of {v}" for v, _ in rows]),
            buckets=bucket_offsets(keys),
        ),
        successors=gone,
    )


def make_model(registry: Registry) -> Model:
    """The packaged constants and the registry's shares."""
    return Model(load_thresholds(Settings().thresholds).constants, registry.prior_by_id)


def make_configuration(registry: Registry, *others: Registry, **policy: Any) -> WatchConfiguration:
    versions = {r.version: r for r in (registry, *others)}
    return WatchConfiguration(
        topic="watch-events",
        topic_id="watch-events",
        positions_id="watch-positions",
        thresholds=load_thresholds(Settings().thresholds),
        policy=Policy(**{"template_after": 0, **policy}),
        decode=lambda value, key, append_time: decode_event(value, key, append_time=append_time),
        parse=orjson.loads,
        registry_of=versions.__getitem__,
    )


def event(user: str, video: str, ts: int, *, append: int | None = None, **fields: Any) -> Event:
    value = orjson.dumps({"user_id": user, "video_id": video, "ts": ts, **fields})
    return Event(value, user.encode(), ts if append is None else append)


def control(user: str, kind: str, ts: int = START, **fields: Any) -> Control:
    value = {"control_id": f"{kind}-{ts}", "user_id": user, "kind": kind, "ts": ts, **fields}
    return Control(orjson.dumps(value), user.encode(), ts)


def watches(user: str, clusters: list[int], start: int = START, gap: int = 40 * MINUTE) -> list[Event]:
    """One play for each cluster in turn, `gap` ms apart, of that cluster's videos in turn."""
    return [event(user, f"c{c}v{i % 10}", start + i * gap) for i, c in enumerate(clusters)]
