"""Simulated viewers with known tastes: seeded, pure. Thresholds are calibrated on their null streams.

The default viewer: 3 to 10 liked clusters of 64 with weights 1/rank^a, a uniform in .5 to 1.3, times Gamma(4, 1/4)
noise, over a uniform background of 8%; exponential gaps; with probability .4 an event repeats the previous cluster; at
a shift the taste becomes (1 - m) old + m new, the new one drawn the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from streams.interests import DAY_MS, Floats, advance, count_watch, distribution, enter_session
from streams.records import Rule
from streams.state import State, new_state
from streams.trigger import Fired, Policy, Thresholds, adopt, divergence, fired, observe, react

START_TS: Final = 1_767_225_600_000
"""Simulated time begins at 2026-01-01 00:00 UTC."""
BACKGROUND: Final = 0.08
RATES: Final = {"light": 0.7, "medium": 4.0, "heavy": 30.0}
"""Events a day by class of viewer."""


@dataclass(frozen=True, slots=True)
class Viewer:
    """How a simulated viewer behaves. rate: events a day; stickiness: probability that an event repeats the previous
    cluster; shift_at: event at which the taste changes (None: never); shift_mass: share of the taste that is new, 0..1.
    """

    rate: float
    events: int = 600
    clusters: int = 64
    stickiness: float = 0.4
    shift_at: int | None = None
    shift_mass: float = 0.5


@dataclass(frozen=True, slots=True)
class Stream:
    """One viewer's simulated watches: (events,) times in ms and cluster ids 0..clusters-1."""

    ts: Sequence[int]
    cluster: Sequence[int]


def draw_taste(random: np.random.Generator, clusters: int) -> Floats:
    """A taste, (clusters,), sums to 1."""
    liked = random.choice(clusters, size=int(random.integers(3, 11)), replace=False)
    weights = 1.0 / np.arange(1, len(liked) + 1) ** random.uniform(0.5, 1.3)
    weights *= random.gamma(4.0, 0.25, size=len(liked))
    taste = np.full(clusters, BACKGROUND / clusters)
    taste[liked] += (1.0 - BACKGROUND) * weights / weights.sum()
    return taste


def simulate(viewer: Viewer, random: np.random.Generator) -> Stream:
    """Draw one viewer's watches."""
    taste = draw_taste(random, viewer.clusters)
    gaps = random.exponential(DAY_MS / viewer.rate, size=viewer.events)
    times = START_TS + np.cumsum(gaps).astype(np.int64)
    clusters: list[int] = []
    for i in range(viewer.events):
        if i == viewer.shift_at:
            new = draw_taste(random, viewer.clusters)
            taste = (1.0 - viewer.shift_mass) * taste + viewer.shift_mass * new
        elif clusters and random.random() < viewer.stickiness:
            clusters.append(clusters[-1])
            continue
        clusters.append(int(random.choice(viewer.clusters, p=taste)))
    return Stream(times.tolist(), clusters)


@dataclass(frozen=True, slots=True)
class Refresh:
    """A refresh that the rule asked for: which event (from 0), and why."""

    event: int
    rule: Rule


def run_rule(stream: Stream, clusters: int, policy: Policy, thresholds: Thresholds) -> list[Refresh]:
    """The refreshes of one stream, by the same functions that the watch handler calls, under a uniform prior."""
    state, refreshes = new_state(), list[Refresh]()
    prior = 1.0 / clusters
    for i, (ts, cluster) in enumerate(zip(stream.ts, stream.cluster, strict=True)):
        advance(state, ts)
        enter_session(state, ts, 0)
        slot, _ = count_watch(state, cluster, 1.0, ts, i + 1, evidence=False)
        state["qualifying"] = int(state["qualifying"]) + 1
        observe(state, slot, cluster, prior, clusters, thresholds)
        reason = fired(state, ts, policy, thresholds)
        if reason is not None:
            _adopt(state, reason, prior, thresholds)
            refreshes.append(Refresh(i, reason.rule))
    return refreshes


def _adopt(state: State, reason: Fired, prior: float, thresholds: Thresholds) -> None:
    react(state, reason)
    now = distribution(state, np.where(state["cluster"] >= 0, prior, 0.0))
    adopt(state, now, reason.rule, thresholds, template_only=reason.template_only)


def false_alarms(refreshes: Sequence[Refresh], after: int) -> int:
    """Refreshes from event `after` on that claim a change: drift alarms and their follow-ups."""
    return sum(r.event >= after and r.rule in (Rule.DRIFT, Rule.FOLLOW_UP) for r in refreshes)


def divergence_null(
    sizes: Sequence[int], random: np.random.Generator, draws: int = 2000, quantile: float = 0.99
) -> list[tuple[float, float]]:
    """(size, quantile) of the divergence in bits between two samples of one unchanged taste, each of that size."""
    table = []
    for size in sizes:
        values = []
        for _ in range(draws):
            taste = draw_taste(random, 64)
            first, second = random.multinomial(size, taste, size=2) / size
            values.append(divergence(first, second))
        table.append((float(size), round(float(np.quantile(values, quantile)), 3)))
    return table
