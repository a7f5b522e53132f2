"""The packaged contexts: simulated viewers of held-out catalogues, run through the real watch handlers.

Each catalogue becomes a registry; its viewers watch by `streams.simulation`, half of them with one sudden change of
taste. Every viewer has a video of their own, whose title of invented words no card holds: it must never be repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

import triton_models
from agents.artefacts import load_configuration
from agents.clusters.embedding import Embedder
from agents.evaluation.cases import COLD_WATCHES, Case, Cases, Slice, Truth, Watch, topics_only, worded
from agents.replay import Event, ReplayDriver
from agents.settings import Settings
from streams import topics
from streams.decoding import Rejected, decode_request
from streams.identifiers import video_key
from streams.records import RefreshRequest
from streams.registry import ClusterCard, Neighbours, Registry, TextColumn, VideoTable, bucket_offsets
from streams.simulation import RATES, SimulatedStream, Viewer, simulate
from streams.watch import Kernel, WatchConfiguration

HELD_OUT: Final = Path(triton_models.__file__).parent / "distillation" / "catalogues" / "held_out"
NEIGHBOURS: Final = 12
BACKGROUND: Final = 0.03
TOTAL_SHIFT: Final = 1.0
"""Share of the taste that a shift changes: all of it."""
_SHAPES: Final = {
    Slice.COLD: Viewer(RATES["medium"], events=60, background=BACKGROUND),
    Slice.LIGHT: Viewer(RATES["light"], events=115, background=BACKGROUND),
    Slice.HEAVY: Viewer(RATES["heavy"], events=360, background=BACKGROUND),
    Slice.TAIL: Viewer(RATES["medium"], events=280, background=BACKGROUND),
}
_SHIFTS: Final = {Slice.LIGHT: 45, Slice.HEAVY: 160, Slice.TAIL: 120}
_SYLLABLES: Final = (
    "vor", "quax", "blin", "tep", "zum", "drel", "jix", "phor", "gwen", "skol", "yarb", "nusk",
    "fim", "grob", "hask", "klue", "lorp", "mav", "oox", "prin", "rux", "snee", "twil", "wog",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Platform:
    """One catalogue. cards: label, titles and whether it is delicate, most popular first."""

    name: str
    labels: tuple[str, ...]
    titles: tuple[tuple[str, ...], ...]
    sensitive: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class _Life:
    """A viewer and all they watch. tastes: before and after the shift."""

    user_id: str
    slice: Slice
    stream: SimulatedStream
    tastes: tuple[tuple[float, ...], tuple[float, ...]]
    watches: tuple[Watch, ...]
    own: Watch


def held_out_platforms(folder: Path = HELD_OUT) -> list[Platform]:
    """The held-out catalogues, by name."""
    return [_platform(path.stem, path.read_bytes()) for path in sorted(folder.glob("*.jsonl"))]


def joined(platforms: Sequence[Platform]) -> Platform:
    """One platform with the clusters of all; of equal labels only the first stays. Popularity is interleaved."""
    rows: dict[str, tuple[tuple[str, ...], bool]] = {}
    for place in range(max(map(len, platforms))):
        for platform in platforms:
            if place < len(platform):
                rows.setdefault(platform.labels[place], (platform.titles[place], platform.sensitive[place]))
    return Platform("joined", tuple(rows), tuple(t for t, _ in rows.values()), tuple(s for _, s in rows.values()))


def packaged_cases(
    settings: Settings,
    platforms: Sequence[Platform],
    embedder: Embedder,
    viewers: int,
    seed: int,
    shift_mass: float = TOTAL_SHIFT,
) -> Cases:
    """What the viewers' watches lead to: every request that asks the student for words, by catalogue, viewer, time.

    shift_mass: share of the taste that changes where it does, 0..1.
    """
    cases: list[Case] = []
    left_out = 0
    for number, platform in enumerate(platforms):
        lives = [_live(platform, number, viewer, seed, shift_mass) for viewer in range(viewers)]
        registry = registry_of(platform, embedder, [life.own for life in lives])
        configuration = configuration_of(settings, registry)
        watches = [(life.user_id, watch) for life in lives for watch in life.watches]
        requests = requests_of(configuration, registry, watches)
        statable = frozenset(card.cluster_id for card in registry.cards.values() if card.statable)
        by_user: dict[str, list[RefreshRequest]] = {}
        for request in requests:
            by_user.setdefault(request.user_id, []).append(request)
        for life in lives:
            own = _cases_of(platform, life, by_user.get(life.user_id, []), statable)
            cases += [case for case in own if worded(case.request)]
            left_out += sum(topics_only(case.request) for case in own)
    return Cases(cases, left_out)


def stream_requests(
    settings: Settings, platform: Platform, embedder: Embedder, viewers: int, seed: int, kernel: Kernel | None = None
) -> list[RefreshRequest]:
    """Requests of a whole platform's viewers in the order of time, for the wording cache: 90 watches each."""
    registry = registry_of(platform, embedder, [])
    configuration = configuration_of(settings, registry)
    configuration = configuration if kernel is None else replace(configuration, kernel=kernel)
    watches = []
    for number in range(viewers):
        random = np.random.default_rng([seed, 17, number])
        shape = Viewer(RATES["medium"], events=90, clusters=len(platform), background=BACKGROUND, shift_at=60)
        stream = simulate(shape, random)
        start = int(random.integers(60)) * topics.DAY_MS
        watches += [
            (f"viewer-{number}", Watch(_video_id(platform, c, int(random.integers(5))), int(c), "", int(ts) + start))
            for ts, c in zip(stream.ts, stream.cluster, strict=True)
        ]
    return [request for request in requests_of(configuration, registry, watches) if worded(request)]


def requests_of(
    configuration: WatchConfiguration, registry: Registry, watches: Sequence[tuple[str, Watch]]
) -> list[RefreshRequest]:
    """The refresh requests that (viewer, watch) pairs lead to, by the handlers; in the order of their making."""
    driver = ReplayDriver(configuration, registry, batch_records=5000)
    events = [_event(user_id, watch) for user_id, watch in sorted(watches, key=lambda pair: pair[1].ts)]
    # Nothing in the driver waits for anything: its coroutine runs through.
    _run_through(driver.run(events))
    decoded = [decode_request(output.value) for output in driver.outputs(topics.REFRESH_REQUESTS)]
    requests = [request for request in decoded if not isinstance(request, Rejected)]
    assert len(requests) == len(decoded)  # noqa: S101 - our own records
    return requests


def configuration_of(settings: Settings, registry: Registry) -> WatchConfiguration:
    """The packaged thresholds and default policy, whatever the settings say: a case is the same everywhere."""
    names = {name: name for name in (topics.WATCH_EVENTS, topics.WATCH_POSITIONS)}
    plain = Settings(data_folder=settings.data_folder)
    return load_configuration(plain, names, registry)[0]


def registry_of(platform: Platform, embedder: Embedder, own: Sequence[Watch]) -> Registry:
    """The platform's clusters and videos, and the videos of single viewers, which no card shows.

    Shares follow 1/rank^.8; clusters are as close as their labels and titles are to each other.
    """
    clusters = len(platform)
    prior = 1.0 / np.arange(1, clusters + 1) ** 0.8
    prior /= prior.sum()
    cards = [_card(platform, cluster, float(prior[cluster])) for cluster in range(clusters)]
    vectors = embedder.embed([f"{card.label}. {'. '.join(card.titles)}" for card in cards])
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2.0)
    count = min(NEIGHBOURS, clusters - 1)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    near = Neighbours(order.astype(np.int32), np.take_along_axis(cosines, order, 1).astype(np.float32))
    checksum = blake2b(repr((platform, own)).encode(), digest_size=16).hexdigest()
    return Registry(
        version=1,
        checksum=checksum,
        lineage=platform.name,
        cards=cards,
        neighbours=near,
        videos=_videos(platform, own),
    )


def invented_words(*content: object, words: int = 3) -> tuple[str, ...]:
    """Words that no language has, the same for the same content: canaries."""
    digest = blake2b(repr(content).encode(), digest_size=4 * words).digest()
    return tuple(
        "".join(_SYLLABLES[byte % len(_SYLLABLES)] for byte in digest[4 * i : 4 * i + 3]) + "xo" for i in range(words)
    )


def _platform(name: str, content: bytes) -> Platform:
    rows = [orjson.loads(line) for line in content.splitlines()]
    return Platform(
        name,
        tuple(row["label"] for row in rows),
        tuple(tuple(row["titles"]) for row in rows),
        tuple(bool(row["sensitive"]) for row in rows),
    )


def _card(platform: Platform, cluster: int, prior: float) -> ClusterCard:
    label, titles = platform.labels[cluster], platform.titles[cluster]
    return ClusterCard(
        cluster_id=cluster,
        label=label,
        query=" ".join(f"{label} videos to watch".split()[:8]),
        titles=titles,
        terms=tuple(label.split()),
        support=len(titles),
        prior=prior,
        cohesion=0.6,
        sensitive=platform.sensitive[cluster],
    )


def _videos(platform: Platform, own: Sequence[Watch]) -> VideoTable:
    placed = [
        (_video_id(platform, cluster, i), cluster, title)
        for cluster, titles in enumerate(platform.titles)
        for i, title in enumerate(titles)
    ]
    placed += [(watch.video_id, watch.cluster_id, watch.title) for watch in own]
    rows = sorted(placed, key=lambda row: video_key(row[0]))
    keys = np.array([video_key(video) for video, _, _ in rows], dtype=np.uint64)
    return VideoTable(
        keys=keys,
        clusters=np.array([cluster for _, cluster, _ in rows], dtype=np.int32),
        ids=_column([video for video, _, _ in rows]),
        titles=_column([title for _, _, title in rows]),
        buckets=bucket_offsets(keys),
    )


def _column(texts: Sequence[str]) -> TextColumn:
    blobs = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, blobs)])
    return TextColumn(np.frombuffer(b"".join(blobs), dtype=np.uint8), ends.astype(np.int64))


def _video_id(platform: Platform, cluster: int, number: int) -> str:
    return f"{platform.name}-{cluster}-{number % len(platform.titles[cluster])}"


def _live(platform: Platform, platform_number: int, number: int, seed: int, shift_mass: float) -> _Life:
    """Viewer `number`: slices in turn, stable and shifted ones in turn; platforms begin with different ones."""
    place = number + platform_number
    sort = list(Slice)[place % len(Slice)]
    random = np.random.default_rng([seed, platform_number, number])
    tail = len(platform) // 2 if sort is Slice.TAIL else 0
    shifted = sort in _SHIFTS and (place // len(Slice) + platform_number) % 2 == 1
    shape = replace(
        _SHAPES[sort],
        clusters=len(platform) - tail,
        shift_at=_SHIFTS[sort] + int(random.integers(20)) if shifted else None,
        shift_mass=shift_mass,
    )
    stream = simulate(shape, random)
    clusters = [int(cluster) + tail for cluster in stream.cluster]
    user_id = f"{platform.name}-{sort}-{number}"
    favourite = int(np.argmax(stream.tastes[0])) + tail
    own = Watch(f"{user_id}-own", favourite, f"{' '.join(invented_words(user_id, seed)).capitalize()} uncut", 0)
    watches = []
    for i, (ts, cluster) in enumerate(zip(stream.ts, clusters, strict=True)):
        if cluster == favourite and i % 5 == 0:
            watches.append(replace(own, ts=int(ts)))
            continue
        video = int(random.integers(len(platform.titles[cluster])))
        title = platform.titles[cluster][video]
        watches.append(Watch(_video_id(platform, cluster, video), cluster, title, int(ts)))
    before, new = stream.tastes
    after = (1.0 - shift_mass) * before + shift_mass * new
    tastes = (tuple([0.0] * tail + before.tolist()), tuple([0.0] * tail + after.tolist()))
    return _Life(user_id, sort, stream, tastes, tuple(watches), own)


def _cases_of(
    platform: Platform, life: _Life, requests: Sequence[RefreshRequest], statable: frozenset[int]
) -> list[Case]:
    shift_at = life.stream.viewer.shift_at
    cases = []
    for request in requests:
        watched = sum(watch.ts <= request.as_of for watch in life.watches)
        if life.slice is Slice.COLD and watched > COLD_WATCHES:
            continue
        shifted = shift_at is not None and watched > shift_at
        truth = Truth(
            taste=life.tastes[1] if shifted else life.tastes[0],
            before=life.tastes[0] if shifted else None,
            watches_since_shift=watched - (shift_at or 0) if shifted else watched,
        )
        past, future = life.watches[:watched], life.watches[watched:]
        own = (life.own.title,)
        clusters = range(len(platform))
        cases.append(Case(request, platform.name, past, future, own, truth, clusters, statable, life.slice))
    return cases


def _event(user_id: str, watch: Watch) -> Event:
    fields: dict[str, Any] = {"user_id": user_id, "video_id": watch.video_id, "ts": watch.ts}
    if watch.title:
        fields["title"] = watch.title
    return Event(orjson.dumps(fields), user_id.encode(), watch.ts)


def _run_through(coroutine: Any) -> None:  # noqa: ANN401
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("the replay waited")  # pragma: no cover
