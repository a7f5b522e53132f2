"""When each policy refreshes, and what it then snapshots.

The first persona is written after event FIRST under every policy. A policy's refresh at event i stores its estimator's
distribution after event i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import numpy as np
from river.drift import ADWIN, KSWIN, PageHinkley

from benchmarks.drift import ours
from benchmarks.drift.traces import DECAYED, FIRST, MIXTURE, PRIOR_WEIGHT, SHORT_BLEND, Floats, Trace, divergence
from streams.counting import LONG_DAYS, LONG_EVENTS, SHORT_DAYS, SHORT_EVENTS

COOL_DOWN: Final = 6
"""Fewest events between two refreshes of the divergence policy."""
CHUNK: Final = 64
MATURITY_FACTOR: Final = 4
NEVER: Final = 10**9

Run = Callable[[Trace], tuple[Sequence[int], Floats]]
"""Refreshes, ascending, the first persona's included; and the (refreshes, K) distributions stored at each."""
Timing = Callable[[Trace, Floats], Sequence[int]]
"""Refreshes, given a trace and one of its estimates."""


class Detector(Protocol):
    """What `river`'s drift detectors share."""

    @property
    def drift_detected(self) -> bool: ...
    def update(self, x: float) -> object: ...


@dataclass(frozen=True)
class Policy:
    """A policy under comparison. every_viewer: measured on every n-th viewer only (slow ones)."""

    name: str
    run: Run
    every_viewer: int = 1


def timed(estimator: str, timing: Timing) -> Run:
    """Snapshots of one estimator at the times that `timing` gives."""

    def run(trace: Trace) -> tuple[Sequence[int], Floats]:
        estimate = trace.estimates[estimator]
        refreshes = timing(trace, estimate)
        return refreshes, estimate[refreshes]

    return run


def every_events(count: int) -> Timing:
    """Whenever the persona is this many events old."""
    return lambda trace, estimate: range(FIRST, len(estimate), count)


def multiples(count: int) -> Timing:
    """After events count, 2 count, 3 count, ...: the second persona comes sooner."""
    return _whenever(lambda trace: lambda i, last: (i + 1) % count == 0)


def every_days(days: float) -> Timing:
    """At the next event once the persona is this old: also the maximum-age rule alone."""
    return _whenever(lambda trace: lambda i, last: bool(trace.days[i] - trace.days[last] >= days))


def at_a_visit(days: float = math.inf, events: float = math.inf) -> Timing:
    """At the start of a session, if the persona is older than this (the policy of arXiv 2606.12198)."""

    def due(trace: Trace) -> Callable[[int, int], bool]:
        return lambda i, last: bool(
            trace.visits[i] and (trace.days[i] - trace.days[last] >= days or i - last >= events)
        )

    return _whenever(due)


def maturity() -> Timing:
    """When the evidence has grown fourfold: after events 20, 80, 320."""
    return _whenever(lambda trace: lambda i, last: i + 1 >= MATURITY_FACTOR * (last + 1))


def _whenever(due_in: Callable[[Trace], Callable[[int, int], bool]]) -> Timing:
    def timing(trace: Trace, estimate: Floats) -> list[int]:
        due, refreshes = due_in(trace), [FIRST]
        for i in range(FIRST + 1, len(estimate)):
            if due(i, refreshes[-1]):
                refreshes.append(i)
        return refreshes

    return timing


def divergence_above(threshold: float, recent_of: Callable[[Trace], Floats]) -> Timing:
    """When a decayed recent window differs from the snapshot by more than `threshold` bits."""

    def timing(trace: Trace, estimate: Floats) -> list[int]:
        recent, refreshes, start = recent_of(trace), [FIRST], FIRST + COOL_DOWN
        while start < len(recent):
            beyond = divergence(recent[start : start + CHUNK], estimate[refreshes[-1]]) > threshold
            if not beyond.any():
                start += CHUNK
                continue
            refreshes.append(start + int(beyond.argmax()))
            start = refreshes[-1] + COOL_DOWN
        return refreshes

    return timing


def detected(detector: Callable[[], Detector], *, with_maturity: bool) -> Timing:
    """When a detector finds a change in the surprise, -ln p, of events under the snapshot; begun anew at each refresh.

    Consecutive repeats of a cluster are one run: without that every detector fires on stickiness. with_maturity: also
    after events 80 and 320, whatever the detector did.
    """

    def timing(trace: Trace, estimate: Floats) -> list[int]:
        refreshes, running = [FIRST], detector()
        cluster, mature_at = trace.cluster, FIRST + 1
        for i in range(FIRST + 1, len(cluster)):
            found = False
            if cluster[i] != cluster[i - 1]:
                running.update(-math.log(estimate[refreshes[-1], cluster[i]]))
                found = running.drift_detected
            grown = with_maturity and i + 1 >= MATURITY_FACTOR * mature_at
            if grown:
                mature_at = i + 1
            if found or grown:
                refreshes.append(i)
                running = detector()
        return refreshes

    return timing


@dataclass(frozen=True)
class PageHinkleyBlend:
    """Page-Hinkley on surprise, fourfold maturity and a follow-up after an alarm, over the decayed blend, whose old
    long counts lose nine tenths of their say at an alarm. threshold: 2 alarms and follow-ups per 1,000 events.
    """

    threshold: float = 2.605
    delta: float = 0.02
    minimum_runs: int = 10
    follow_up: int = 16
    cool_down: int = 8
    alarm_keeps: float = 0.1

    def __call__(self, trace: Trace) -> tuple[Sequence[int], Floats]:
        clusters = trace.truth.shape[1]
        short, long, squares = np.zeros(clusters), np.zeros(clusters), 0.0
        refreshes: list[int] = []
        snapshots: list[Floats] = []
        alarm_at, mature_at = NEVER, FIRST + 1
        runs, mean, total = 0, 0.0, 0.0
        gaps = np.diff(trace.days, prepend=0.0)
        for i, x in enumerate(trace.cluster):
            keep = 2.0 ** (-1.0 / LONG_EVENTS - gaps[i] / LONG_DAYS)
            short *= 2.0 ** (-1.0 / SHORT_EVENTS - gaps[i] / SHORT_DAYS)
            long *= keep
            squares = squares * keep * keep + 1.0
            short[x] += 1.0
            long[x] += 1.0
            if i < FIRST:
                continue
            alarm = due = False
            if i > FIRST:
                if x != trace.cluster[i - 1]:
                    value = min(1.0, -math.log(snapshots[-1][x]) / math.log(40.0 * clusters))
                    runs += 1
                    mean += (value - mean) / runs
                    total = max(0.0, total + value - mean - self.delta)
                if i - refreshes[-1] < self.cool_down:
                    continue
                alarm = total > self.threshold and runs >= self.minimum_runs
                due = i == alarm_at + self.follow_up or i + 1 >= MATURITY_FACTOR * mature_at
            if alarm:
                alarm_at = i
                long *= self.alarm_keeps
                squares *= self.alarm_keeps**2
            if alarm or due or i == FIRST:
                refreshes.append(i)
                mature_at = i + 1 if i + 1 >= MATURITY_FACTOR * mature_at else mature_at
                snapshots.append(self._blend(short, long, squares))
                runs, mean, total = 0, 0.0, 0.0
        return refreshes, np.array(snapshots)

    @staticmethod
    def _blend(short: Floats, long: Floats, squares: float) -> Floats:
        n_eff = long.sum() ** 2 / squares
        share = (1.0 - SHORT_BLEND) * long / long.sum() + SHORT_BLEND * short / short.sum()
        blend: Floats = (n_eff * share + PRIOR_WEIGHT / len(long)) / (n_eff + PRIOR_WEIGHT)
        return blend


def squared_regret(threshold_factor: float = 1.0, maximum_age_days: float = 0.0) -> Timing:
    """The product's rule, by its own code."""
    return lambda trace, estimate: ours.refreshes(trace.stream, threshold_factor, maximum_age_days).tolist()


OURS: Final = "ours"
OURS_WITH_AGE: Final = "ours, at most 30 days old"
FIRST_FORM: Final = "decayed blend, Page-Hinkley + x4 + follow-up"
EVERY: Final = (20, 40, 80, 160, 320)
FACTORS: Final = (0.25, 0.5, 2.0, 4.0)
"""Of the threshold that ships: for the curve alone."""
KSWIN_SAMPLE: Final = 10

_DETECTORS: Final[dict[str, Callable[[], Detector]]] = {
    "ADWIN": ADWIN,
    "ADWIN, delta .2, clock 1": partial(ADWIN, delta=0.2, clock=1),
    "KSWIN": partial(KSWIN, seed=1),
    "Page-Hinkley": PageHinkley,
    "Page-Hinkley, delta .15, threshold 20": partial(PageHinkley, min_instances=10, delta=0.15, threshold=20, alpha=1),
}
"""With the defaults of `river`, and two that are more sensitive."""
BLIND: Final[dict[str, Timing]] = {
    **{f"every {n} events": every_events(n) for n in EVERY},
    "events 80, 160, 240 ...": multiples(80),
    "daily": every_days(1),
    "weekly": every_days(7),
    "every 30 days": every_days(30),
    "visit, 1 day old": at_a_visit(days=1),
    "visit, 7 days old": at_a_visit(days=7),
    "visit, 30 days old": at_a_visit(days=30),
    "visit, 80 events old": at_a_visit(events=80),
    "maturity": maturity(),
    "never": every_events(NEVER),
}
"""Policies that look at neither estimate nor events: their times do not depend on the estimator."""
_WATCHING: Final[dict[str, Timing]] = {
    "JSD > .3, half-life 3 days": divergence_above(0.3, lambda trace: trace.recent_days),
    "JSD > .3": divergence_above(0.3, lambda trace: trace.recent),
    "JSD > .4": divergence_above(0.4, lambda trace: trace.recent),
    "JSD > .5": divergence_above(0.5, lambda trace: trace.recent),
    **{
        f"{name}{' + x4' * with_maturity}": detected(detector, with_maturity=with_maturity)
        for name, detector in _DETECTORS.items()
        for with_maturity in (False, True)
    },
}


def ours_times(factor: float) -> str:
    return f"ours, threshold x {factor:g}"


def every_80(estimator: str) -> str:
    return f"{estimator}, every 80 events"


POLICIES: Final = (
    Policy(OURS, timed(MIXTURE, squared_regret())),
    *(Policy(ours_times(factor), timed(MIXTURE, squared_regret(factor))) for factor in FACTORS),
    Policy(OURS_WITH_AGE, timed(MIXTURE, squared_regret(maximum_age_days=30))),
    Policy(FIRST_FORM, PageHinkleyBlend()),
    *(
        Policy(f"{estimator}, {name}", timed(estimator, timing), KSWIN_SAMPLE if "KSWIN" in name else 1)
        for estimator in (MIXTURE, DECAYED)
        for name, timing in (BLIND | _WATCHING).items()
    ),
)
SAME_ESTIMATOR: Final = tuple(p for p in POLICIES if p.name in (OURS, every_80(MIXTURE)))
"""The pair that is compared on the other simulators."""
