"""From refreshes and snapshots to the figures that the policies are compared by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from benchmarks.drift.policies import Policy
from benchmarks.drift.traces import FIRST, Floats, Integers, Trace, divergence
from streams.simulation import RATES, SHIFT_MIX, SimulatedStream, Viewer

SETTLED: Final = 200
"""From this event on every refresh of a stable viewer is false."""
WINDOW: Final = 60
"""A shift counts as found if a refresh comes within this many events."""
MASSES: Final = tuple(mass for mass, _ in SHIFT_MIX if mass)
BOOTSTRAP_DRAWS: Final = 1000


@dataclass(frozen=True)
class Outcome:
    """One viewer under one policy. refreshes: without the first persona; staleness: mean over the events after it, in
    bits; after_shift: the same from the shift on, nan for a stable viewer.
    """

    viewer: Viewer
    refreshes: Integers
    staleness: float
    after_shift: float


def outcome(policy: Policy, trace: Trace) -> Outcome:
    refreshes, snapshots = policy.run(trace)
    at = np.asarray(refreshes, np.int64)
    stale = staleness(trace.stream, trace.truth, at, snapshots)
    shift_at = trace.stream.viewer.shift_at
    after = math.nan if shift_at is None else float(stale[shift_at - FIRST - 1 :].mean())
    return Outcome(trace.stream.viewer, at[1:], float(stale.mean()), after)


def staleness(stream: SimulatedStream, truth: Floats, refreshes: Integers, snapshots: Floats) -> Floats:
    """Divergence in bits between the stored snapshot and the true taste, at each event after FIRST.

    Worked out only where either changed.
    """
    events = np.arange(FIRST + 1, len(truth))
    stored = np.searchsorted(refreshes, events, side="right") - 1
    changed = (np.diff(stored, prepend=-1) != 0) | (np.diff(stream.second_share[events], prepend=-1.0) != 0)
    where = np.flatnonzero(changed)
    values: Floats = divergence(snapshots[stored[where]], truth[events[where]])[np.cumsum(changed) - 1]
    return values


@dataclass(frozen=True)
class Figures:
    """What a policy costs and buys.

    refreshes_per_1k: refreshes after the first persona per 1,000 events after it; _of: by class. staleness: means over
    events, in bits, of all, stable and shifted viewers, and after the shift. false_per_1k: refreshes of stable viewers
    from event 200 on, per 1,000 of those events, by class; false_interval: its 95% bootstrap interval over viewers.
    detected_M_within_60: share of shifts of M% with a refresh within 60 events, by class. stable_any_60: share of
    windows of 60 events, from event 200 on, in which a stable viewer has a refresh. delay: median and 90% quantile,
    over shifts of M%, of the events until the first refresh, that event included; None where the quantile has none.
    """

    viewers: int
    refreshes_per_1k: float
    refreshes_per_1k_of: dict[str, float]
    staleness_mean: float
    staleness_stable: float | None
    staleness_shifted: float | None
    staleness_after_shift: float | None
    false_per_1k: dict[str, float]
    false_interval: dict[str, tuple[float, float]]
    detected_30_within_60: dict[str, float]
    detected_50_within_60: dict[str, float]
    detected_80_within_60: dict[str, float]
    stable_any_60: dict[str, float]
    delay_p50: dict[str, float | None]
    delay_p90: dict[str, float | None]

    def detected_within_60(self, mass: float) -> dict[str, float]:
        return {
            0.3: self.detected_30_within_60,
            0.5: self.detected_50_within_60,
            0.8: self.detected_80_within_60,
        }[mass]

    def document(self) -> dict[str, Any]:
        return {key: _rounded(value) for key, value in asdict(self).items()}


def figures(outcomes: Sequence[Outcome]) -> Figures:
    stable = [o for o in outcomes if o.viewer.shift_at is None]
    shifted = [o for o in outcomes if o.viewer.shift_at is not None]
    classes = {name: [o for o in outcomes if o.viewer.rate_class == name] for name in RATES}
    stable_of = {name: [o for o in stable if o.viewer.rate_class == name] for name in RATES}
    stable_of = {name: group for name, group in stable_of.items() if group}
    after = [(o.after_shift, o.viewer.events - o.viewer.shift_at) for o in shifted if o.viewer.shift_at is not None]
    found = {mass: _detected(shifted, mass) for mass in MASSES}
    return Figures(
        viewers=len(outcomes),
        refreshes_per_1k=refreshes_per_1k(outcomes),
        refreshes_per_1k_of={name: refreshes_per_1k(group) for name, group in classes.items() if group},
        staleness_mean=float(np.mean([o.staleness for o in outcomes])),
        staleness_stable=float(np.mean([o.staleness for o in stable])) if stable else None,
        staleness_shifted=float(np.mean([o.staleness for o in shifted])) if shifted else None,
        staleness_after_shift=weighted_mean(after),
        false_per_1k={name: float(false_rates(group).mean()) for name, group in stable_of.items()},
        false_interval={name: interval(false_rates(group)) for name, group in stable_of.items()},
        detected_30_within_60=found[0.3],
        detected_50_within_60=found[0.5],
        detected_80_within_60=found[0.8],
        stable_any_60={name: within(group, WINDOW) for name, group in stable_of.items()},
        delay_p50=_delay_quantiles(shifted, 0.5),
        delay_p90=_delay_quantiles(shifted, 0.9),
    )


def weighted_mean(values_weights: Sequence[tuple[float, int]]) -> float | None:
    if not values_weights:
        return None
    values, weights = np.array(values_weights).T
    return float(np.average(values, weights=weights))


def refreshes_per_1k(outcomes: Sequence[Outcome]) -> float:
    events = sum(o.viewer.events - FIRST - 1 for o in outcomes)
    return 1000 * sum(len(o.refreshes) for o in outcomes) / events


def false_rates(stable: Sequence[Outcome]) -> Floats:
    """(viewers,) false refreshes per 1,000 events."""
    return np.array([1000 * (o.refreshes >= SETTLED).sum() / (o.viewer.events - SETTLED) for o in stable])


def interval(values: Floats) -> tuple[float, float]:
    """95% interval of the mean: percentile bootstrap over viewers."""
    random = np.random.default_rng(0)
    means = values[random.integers(len(values), size=(BOOTSTRAP_DRAWS, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def delays(shifted: Sequence[Outcome]) -> Floats:
    """(viewers,) events from the shift to the first refresh, the event itself included; inf: none."""
    return np.array(
        [
            next((float(r - o.viewer.shift_at + 1) for r in o.refreshes if r >= o.viewer.shift_at), np.inf)
            for o in shifted
            if o.viewer.shift_at is not None
        ]
    )


def within(stable: Sequence[Outcome], window: int) -> float:
    """Share of all windows of this many settled events that hold a refresh: what chance finds."""
    shares = []
    for o in stable:
        starts = np.arange(SETTLED, o.viewer.events - window + 1)
        shares.append(np.mean(np.diff(np.searchsorted(o.refreshes, [starts, starts + window]), axis=0) > 0))
    return float(np.mean(shares))


def of_mass(outcomes: Sequence[Outcome], mass: float) -> list[Outcome]:
    return [o for o in outcomes if o.viewer.shift_at is not None and o.viewer.shift_mass == mass]


def _detected(shifted: Sequence[Outcome], mass: float) -> dict[str, float]:
    group = of_mass(shifted, mass)
    classes = {name: [o for o in group if o.viewer.rate_class == name] for name in RATES}
    return {name: float((delays(of_class) <= WINDOW).mean()) for name, of_class in classes.items() if of_class}


def _delay_quantiles(shifted: Sequence[Outcome], quantile: float) -> dict[str, float | None]:
    quantiles: dict[str, float | None] = {}
    for mass in MASSES:
        group = of_mass(shifted, mass)
        if group:
            value = float(np.quantile(delays(group), quantile, method="higher"))
            quantiles[f"{mass:.0%}"] = value if np.isfinite(value) else None
    return quantiles


def _rounded(value: Any) -> Any:  # noqa: ANN401 - any JSON
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, tuple):
        return [_rounded(v) for v in value]
    return value
