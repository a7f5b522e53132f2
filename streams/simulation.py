"""Simulated viewers with known tastes: seeded, pure. Thresholds are calibrated on their null streams.

The default viewer: 3 to 10 liked clusters of 64 with weights 1/rank^a, a uniform in .5 to 1.3, times Gamma(4, 1/4)
noise, over a uniform background of 8%; exponential gaps; with probability .4 an event repeats the previous cluster,
but never where the taste just jumped; at a shift the taste becomes (1 - m) old + m new, the new one drawn the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from streams.counting import SESSION_GAP_MS
from streams.mixture import Floats
from streams.topics import DAY_MS

START_TS: Final = 1_767_225_600_000
"""Simulated time begins at 2026-01-01 00:00 UTC."""
BACKGROUND: Final = 0.08
RATES: Final = {"light": 0.7, "medium": 4.0, "heavy": 30.0}
"""Events a day by class of viewer."""
SHIFT_MIX: Final = ((0.0, 280), (0.3, 40), (0.5, 40), (0.8, 40))
"""Of 400 viewers of one class: (share of the taste that changes, viewers)."""
EARLIEST_SHIFT, LATEST_SHIFT = 150, 350
"""The event of a shift is uniform between these, both included."""
ANCHOR_RENEWAL, ANCHOR_SHARE = 0.125, 0.4
BINGE_EVENTS, BINGE_SHARE = 15, 0.8
WEEKEND_SHARE: Final = 2 / 7
PERSON_SHARE: Final = 0.5

Flags = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


class SecondTaste(StrEnum):
    """When a viewer's second taste shows.

    shift: from event `shift_at` on, in the share `shift_mass`; binge: for 15 events from `shift_at` four in five are of
    one cluster; weekend: on Saturdays and Sundays (UTC); person: two people share the profile, and a fair coin decides
    whose each session is (a gap of more than 30 minutes starts a session).
    """

    SHIFT = "shift"
    BINGE = "binge"
    WEEKEND = "weekend"
    PERSON = "person"


@dataclass(frozen=True, slots=True)
class Viewer:
    """How a simulated viewer behaves.

    rate: events a day; stickiness: probability that an event repeats the previous cluster; shift_at: event at which the
    second taste comes in (None: never); shift_mass: share of the taste that is new, 0..1; shift_over: events that the
    change takes, linearly (1: at once); anchored: instead of sticking to the previous cluster, two in five events are
    of an anchor cluster, which is drawn anew with probability 1/8; likes: fewest and most liked clusters; background:
    share of the uniform background; common: tastes are Dirichlet draws around popular shares, 1/rank^.8, with
    this concentration, as where viewers are much alike; None: each has likes of their own.
    """

    rate: float
    events: int = 600
    clusters: int = 64
    stickiness: float = 0.4
    shift_at: int | None = None
    shift_mass: float = 0.5
    shift_over: int = 1
    second_taste: SecondTaste = SecondTaste.SHIFT
    anchored: bool = False
    likes: tuple[int, int] = (3, 10)
    background: float = BACKGROUND
    common: float | None = None

    @property
    def rate_class(self) -> str:
        """The class of RATES with the nearest rate, by ratio."""
        return min(RATES, key=lambda name: abs(np.log(self.rate / RATES[name])))


@dataclass(frozen=True, slots=True)
class Stream:
    """One viewer's watches: (events,) times in ms and cluster ids 0..clusters-1."""

    ts: Sequence[int]
    cluster: Sequence[int]


@dataclass(frozen=True, slots=True)
class SimulatedStream(Stream):
    """Watches with what is true of them.

    tastes: (2, clusters), each row sums to 1; second_share: (events,), how much of the true taste at each event is the
    second. The truth is what a persona should say: a binge leaves it alone, and of two alternating tastes it is the
    average over the calendar or over both people.
    """

    viewer: Viewer
    tastes: Floats
    second_share: Floats

    def truth(self) -> Floats:
        """The taste in force at each event, (events, clusters), rows sum to 1."""
        second = self.second_share[:, None]
        truth: Floats = (1.0 - second) * self.tastes[0] + second * self.tastes[1]
        return truth


def draw_taste(
    random: np.random.Generator, clusters: int, likes: tuple[int, int] = (3, 10), background: float = BACKGROUND
) -> Floats:
    """A taste, (clusters,), sums to 1."""
    liked = random.choice(clusters, size=int(random.integers(likes[0], likes[1] + 1)), replace=False)
    weights = 1.0 / np.arange(1, len(liked) + 1) ** random.uniform(0.5, 1.3)
    weights *= random.gamma(4.0, 0.25, size=len(liked))
    taste = np.full(clusters, background / clusters)
    taste[liked] += (1.0 - background) * weights / weights.sum()
    return taste


def _draw_taste_of(viewer: Viewer, random: np.random.Generator) -> Floats:
    if viewer.common is None:
        return draw_taste(random, viewer.clusters, viewer.likes, viewer.background)
    popular = 1.0 / np.arange(1, viewer.clusters + 1) ** 0.8
    return random.dirichlet(viewer.common * popular / popular.sum())


def simulate(viewer: Viewer, random: np.random.Generator) -> SimulatedStream:
    """Draw one viewer's watches."""
    gaps = random.exponential(DAY_MS / viewer.rate, size=viewer.events)
    ts = START_TS + np.cumsum(gaps).astype(np.int64)
    first, second = (_draw_taste_of(viewer, random) for _ in range(2))
    if viewer.second_taste is SecondTaste.BINGE:
        second = np.eye(viewer.clusters)[random.integers(viewer.clusters)]
    tastes = np.stack([first, second])
    drawn, true = _second_shares(viewer, ts, random)
    jumps = np.diff(drawn, prepend=np.nan) != 0  # the first event counts as one
    if viewer.shift_over > 1:
        jumps[1:] = False
    clusters = _draw(tastes, drawn, random)
    if viewer.anchored:
        renewed = jumps | (random.random(viewer.events) < ANCHOR_RENEWAL)
        anchors = _hold(_draw(tastes, drawn, random), renewed)
        clusters = np.where(random.random(viewer.events) < ANCHOR_SHARE, anchors, clusters)
    else:
        clusters = _hold(clusters, jumps | (random.random(viewer.events) >= viewer.stickiness))
    return SimulatedStream(ts.tolist(), clusters.tolist(), viewer, tastes, true)


def _second_shares(viewer: Viewer, ts: Integers, random: np.random.Generator) -> tuple[Floats, Floats]:
    """The second taste's share at each event: in what is drawn, and in what is true of the viewer."""
    index = np.arange(viewer.events)
    never = np.zeros(viewer.events)
    if viewer.second_taste is SecondTaste.WEEKEND:
        weekday = (ts // DAY_MS + 3) % 7  # 1970-01-01 was a Thursday
        return (weekday >= 5).astype(np.float64), np.full(viewer.events, WEEKEND_SHARE)
    if viewer.second_taste is SecondTaste.PERSON:
        session = np.cumsum(np.diff(ts, prepend=ts[:1]) > SESSION_GAP_MS)
        coins = random.random(viewer.events) < PERSON_SHARE
        return coins[session].astype(np.float64), np.full(viewer.events, PERSON_SHARE)
    if viewer.shift_at is None:
        return never, never
    if viewer.second_taste is SecondTaste.BINGE:
        during = (index >= viewer.shift_at) & (index < viewer.shift_at + BINGE_EVENTS)
        return BINGE_SHARE * during, never
    shifted = viewer.shift_mass * np.clip((index - viewer.shift_at + 1) / viewer.shift_over, 0.0, 1.0)
    return shifted, shifted


def _draw(tastes: Floats, second_share: Floats, random: np.random.Generator) -> Integers:
    """One cluster per event, from one of two tastes, by inverse distribution function."""
    events = len(second_share)
    edges = np.cumsum(tastes, axis=1)
    edges[:, -1] = 1.0
    level = random.random(events)
    first, second = (np.searchsorted(row, level, side="right") for row in edges)
    return np.where(random.random(events) < second_share, second, first)


def _hold(values: Integers, taken: Flags) -> Integers:
    """Each event gets the value of the latest event that was taken; the first must be."""
    held: Integers = values[np.maximum.accumulate(np.where(taken, np.arange(len(values)), 0))]
    return held


class Purpose(IntEnum):
    """What a population is for. It is part of every seed, so no seed of one purpose meets the other's viewers."""

    CALIBRATION = 1
    REPORTING = 2


class Kind(StrEnum):
    """The simulators. Members are only ever appended: their order is part of the seeds."""

    DEFAULT = "default"
    STICKINESS_0 = "stickiness-0"
    STICKINESS_7 = "stickiness-.7"
    ANCHORED = "anchored"
    BROAD = "broad"
    GRADUAL = "gradual"
    BINGE = "binge"
    WEEKEND = "weekend"
    TWO_PEOPLE = "two-people"
    COMMON = "common"


_MEDIUM: Final = Viewer(RATES["medium"])
_VIEWERS: Final[Mapping[Kind, Viewer]] = {
    Kind.DEFAULT: _MEDIUM,
    Kind.STICKINESS_0: replace(_MEDIUM, stickiness=0.0),
    Kind.STICKINESS_7: replace(_MEDIUM, stickiness=0.7),
    Kind.ANCHORED: replace(_MEDIUM, anchored=True),
    Kind.BROAD: replace(_MEDIUM, likes=(15, 30), background=0.15),
    Kind.GRADUAL: replace(_MEDIUM, shift_mass=1.0, shift_over=250),
    Kind.BINGE: replace(_MEDIUM, second_taste=SecondTaste.BINGE, shift_mass=BINGE_SHARE),
    Kind.WEEKEND: replace(_MEDIUM, second_taste=SecondTaste.WEEKEND, shift_mass=0.0),
    Kind.TWO_PEOPLE: replace(_MEDIUM, second_taste=SecondTaste.PERSON, shift_mass=0.0),
    Kind.COMMON: replace(_MEDIUM, common=40.0, stickiness=0.1),
}
_MIXED: Final = frozenset({Kind.DEFAULT, Kind.STICKINESS_0, Kind.STICKINESS_7, Kind.ANCHORED, Kind.BROAD, Kind.COMMON})
"""Kinds of which 70% never shift. Of the others every viewer drifts, binges or, without a shift, alternates."""


def population(kind: Kind, purpose: Purpose, seed: int, scale: float = 1.0) -> Iterator[SimulatedStream]:
    """400 viewers of each class of RATES, class by class, times `scale` (at least one of each sort).

    A stream's labels are in its `viewer`: rate_class; shift_at, None for a stable viewer; shift_mass. The same
    arguments give the same streams, and no viewer depends on those before. Raises ValueError for a negative seed.
    """
    template = _VIEWERS[kind]
    mix = SHIFT_MIX if kind in _MIXED else ((template.shift_mass, sum(viewers for _, viewers in SHIFT_MIX)),)
    for class_number, rate in enumerate(RATES.values()):
        for mass_number, (mass, viewers) in enumerate(mix):
            for number in range(max(1, round(viewers * scale))):
                random = np.random.default_rng(
                    [purpose, list(Kind).index(kind), class_number, mass_number, number, seed]
                )
                shift_at = int(random.integers(EARLIEST_SHIFT, LATEST_SHIFT + 1)) if mass else None
                yield simulate(replace(template, rate=rate, shift_at=shift_at, shift_mass=mass), random)
