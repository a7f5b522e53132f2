"""The drift benchmark's own arithmetic: policies, staleness and figures against hand-made cases and plain loops."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import orjson
import pytest

from benchmarks.drift import ours
from benchmarks.drift.__main__ import main
from benchmarks.drift.figures import Outcome, delays, figures, interval, outcome, staleness, within
from benchmarks.drift.policies import (
    COOL_DOWN,
    POLICIES,
    Policy,
    Timing,
    at_a_visit,
    detected,
    divergence_above,
    every_days,
    every_events,
    maturity,
    multiples,
    timed,
)
from benchmarks.drift.report import bars, beats_every_80
from benchmarks.drift.traces import DECAYED, FIRST, Trace, decayed, divergence, trace
from streams import prequential
from streams.simulation import SimulatedStream, Viewer, simulate
from streams.topics import DAY_MS


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel as plain Python: nothing waits for a compiler."""
    plain = SimpleNamespace(**{name: getattr(prequential, name) for name in ("distributions", "trace_history")})
    monkeypatch.setattr(ours, "kernel", lambda: plain)


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """The command installs handlers for its process; here they end with the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def a_stream(seed: int = 1, **changes: object) -> SimulatedStream:
    viewer = replace(Viewer(4.0, events=120, clusters=16, shift_at=70), **changes)  # type: ignore[arg-type]
    return simulate(viewer, np.random.default_rng(seed))


def a_trace(seed: int = 1, **changes: object) -> Trace:
    return trace(a_stream(seed, **changes))


def times(timing: Timing, of: Trace) -> list[int]:
    return list(timing(of, of.estimates[DECAYED]))


def test_divergence_is_jensen_shannon_in_bits() -> None:
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.5, 0.5])
    assert divergence(p, p) == 0
    assert divergence(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(1)
    assert divergence(p, q) == pytest.approx(0.5)  # half of the mass is apart
    assert divergence(np.stack([p, q]), q) == pytest.approx([0.5, 0])


def test_decayed_counts_are_what_a_loop_counts() -> None:
    of = a_trace()
    seen = np.eye(16)[of.cluster]
    shares, n_eff = decayed(seen, of.days, 12.0, 3.0)
    counts, squares, before = np.zeros(16), 0.0, 0.0
    for i, cluster in enumerate(of.cluster):
        keep = 2.0 ** (-1 / 12 - (of.days[i] - before) / 3)
        counts, squares, before = counts * keep, squares * keep * keep + 1, of.days[i]
        counts[cluster] += 1
        assert shares[i] == pytest.approx(counts / counts.sum())
        assert n_eff[i] == pytest.approx(counts.sum() ** 2 / squares)


def test_a_stream_too_long_for_the_closed_form_is_refused() -> None:
    with pytest.raises(FloatingPointError):
        decayed(np.ones((2, 1)), np.array([0.0, 5000.0]), 12.0, 3.0)


def test_schedules() -> None:
    of = a_trace()
    assert times(every_events(40), of) == [19, 59, 99]
    assert times(multiples(40), of) == [19, 39, 79, 119]
    assert times(maturity(), of) == [19, 79]
    assert times(every_events(10**9), of) == [19]


def test_a_persona_is_renewed_at_the_first_event_once_it_is_old() -> None:
    of = a_trace()
    refreshes = times(every_days(3), of)
    assert len(refreshes) > 3
    for last, due in pairwise(refreshes):
        assert of.days[due] - of.days[last] >= 3 > of.days[due - 1] - of.days[last]


def test_at_a_visit_only_the_start_of_a_session_counts() -> None:
    of = a_trace(rate=60.0)
    refreshes = times(at_a_visit(days=0.5, events=30), of)
    assert len(refreshes) > 2
    for last, due in pairwise(refreshes):
        gap_ms = of.stream.ts[due] - of.stream.ts[due - 1]
        assert gap_ms > 30 * 60_000
        assert of.days[due] - of.days[last] >= 0.5 or due - last >= 30


def test_raw_divergence_is_checked_at_every_event_after_the_cool_down() -> None:
    of = a_trace(shift_mass=1.0)
    snapshots, recent = of.estimates[DECAYED], of.recent
    expected = [FIRST]
    for i in range(FIRST + 1, len(recent)):
        apart = float(divergence(recent[i], snapshots[expected[-1]]))
        if i - expected[-1] >= COOL_DOWN and apart > 0.3:
            expected.append(i)
    assert len(expected) > 2
    assert times(divergence_above(0.3, lambda t: t.recent), of) == expected


class EveryThird:
    def __init__(self) -> None:
        self.values: list[float] = []

    @property
    def drift_detected(self) -> bool:
        return len(self.values) == 3

    def update(self, x: float) -> None:
        self.values.append(x)


def test_a_detector_sees_runs_and_begins_anew_at_each_refresh() -> None:
    of = a_trace(stickiness=0.6)
    made: list[EveryThird] = []

    def make() -> EveryThird:
        made.append(EveryThird())
        return made[-1]

    refreshes = times(detected(make, with_maturity=False), of)
    starts = [i for i in range(FIRST + 1, 120) if of.cluster[i] != of.cluster[i - 1]]
    assert refreshes == [FIRST, *starts[2::3]]
    estimate, first_run = of.estimates[DECAYED], starts[0]
    assert made[0].values[0] == pytest.approx(-np.log(estimate[FIRST, of.cluster[first_run]]))
    after = starts[3]
    assert made[1].values[0] == pytest.approx(-np.log(estimate[refreshes[1], of.cluster[after]]))


def test_every_policy_starts_with_the_first_persona_and_stores_distributions() -> None:
    of = a_trace(events=300, shift_at=200, clusters=64)
    for policy in POLICIES:
        refreshes, snapshots = policy.run(of)
        assert refreshes[0] == FIRST, policy.name
        assert (np.diff(refreshes) > 0).all(), policy.name
        assert snapshots.sum(axis=1) == pytest.approx(np.ones(len(refreshes))), policy.name
        assert snapshots.min() >= 0, policy.name


def test_ours_is_the_product_step_by_step() -> None:
    """The snapshot and the regret worked out here from the estimates give the kernel's refreshes."""
    stream = a_stream(events=400, shift_at=200, shift_mass=0.8, clusters=20)
    _, rule = ours.product(20)
    estimates, expected, regret = ours.estimates(stream), [FIRST], 0.0
    assert estimates.sum(axis=1) == pytest.approx(np.ones(400), abs=1e-5)
    for i in range(FIRST + 1, 400):
        if (i + 1) % rule.stride == 0:
            apart = float(divergence(estimates[i], estimates[expected[-1]]))
            regret = rule.memory * regret + rule.stride * apart**2
        if regret > rule.threshold and i - expected[-1] >= rule.cool_down:
            expected.append(i)
            regret = 0.0
    assert len(expected) > 2
    assert ours.refreshes(stream).tolist() == expected
    assert len(ours.refreshes(stream, threshold_factor=0.1)) > len(expected)
    aged = ours.refreshes(stream, maximum_age_days=2)
    assert len(aged) > len(expected)
    assert max(np.diff(np.array(stream.ts)[aged])) < 4 * DAY_MS


@pytest.mark.parametrize("over", [1, 30])
def test_staleness_is_that_of_each_event(over: int) -> None:
    of = a_trace(shift_over=over)
    refreshes = np.array([FIRST, 40, 90])
    snapshots = of.estimates[DECAYED][refreshes]
    values = staleness(of.stream, of.truth, refreshes, snapshots)
    for i in range(FIRST + 1, 120):
        stored = snapshots[(refreshes <= i).sum() - 1]
        assert values[i - FIRST - 1] == pytest.approx(float(divergence(stored, of.truth[i])))


def test_an_outcome_averages_from_the_shift_on() -> None:
    of = a_trace()
    result = outcome(Policy("every 40", timed(DECAYED, every_events(40))), of)
    values = staleness(of.stream, of.truth, np.array([19, 59, 99]), of.estimates[DECAYED][[19, 59, 99]])
    assert result.refreshes.tolist() == [59, 99]
    assert result.staleness == pytest.approx(values.mean())
    assert result.after_shift == pytest.approx(values[70 - 20 :].mean())


def an_outcome(refreshes: list[int], shift_at: int | None = None, rate: float = 4.0, mass: float = 0.5) -> Outcome:
    viewer = Viewer(rate, shift_at=shift_at, shift_mass=mass if shift_at else 0.0)
    after = 0.2 if shift_at else float("nan")
    return Outcome(viewer, np.array(refreshes, np.int64), 0.1 if shift_at else 0.05, after)


def test_figures_of_hand_made_outcomes() -> None:
    outcomes = [
        an_outcome([80, 199]),  # stable: both before event 200
        an_outcome([200, 400]),
        an_outcome([100], shift_at=200),  # missed
        an_outcome([259], shift_at=200),  # the 60th event
        an_outcome([260], shift_at=200, rate=30.0),  # one too late
        an_outcome([200], shift_at=200, rate=30.0),
    ]
    found = figures(outcomes)
    assert found.viewers == 6
    assert found.refreshes_per_1k == pytest.approx(1000 * 8 / (6 * 580))
    assert found.refreshes_per_1k_of == pytest.approx({"medium": 1000 * 6 / (4 * 580), "heavy": 1000 * 2 / (2 * 580)})
    assert found.false_per_1k == pytest.approx({"medium": 1000 * 2 / (2 * 400)})
    assert found.detected_50_within_60 == {"medium": 0.5, "heavy": 0.5}
    assert found.detected_30_within_60 == {}
    assert found.delay_p50 == {"50%": 61.0}
    assert found.delay_p90 == {"50%": None}
    assert found.staleness_mean == pytest.approx((2 * 0.05 + 4 * 0.1) / 6)
    assert found.staleness_stable == pytest.approx(0.05)
    assert found.staleness_shifted == pytest.approx(0.1)
    assert found.staleness_after_shift == pytest.approx(0.2)


def test_staleness_after_a_shift_is_averaged_over_events_not_viewers() -> None:
    early = replace(an_outcome([], shift_at=200), after_shift=0.1)
    late = replace(an_outcome([], shift_at=500), after_shift=0.5)
    assert figures([early, late]).staleness_after_shift == pytest.approx((400 * 0.1 + 100 * 0.5) / 500)


def test_delays_count_the_event_of_the_shift_as_the_first() -> None:
    assert delays([an_outcome([150, 200, 300], shift_at=200), an_outcome([100], shift_at=200)]).tolist() == [1, np.inf]


def test_chance_is_the_share_of_windows_with_a_refresh() -> None:
    stable = [an_outcome([30, 210, 230, 500]), an_outcome([])]
    refreshed = [any(start <= r < start + 60 for r in (210, 230, 500)) for start in range(200, 541)]
    assert within(stable, 60) == pytest.approx(np.mean(refreshed) / 2)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = interval(random.exponential(2.0, size=100))
        covered += low <= 2.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_bars_take_the_worst_class() -> None:
    stable = [an_outcome([250, 300, 350, 450], rate=rate) for rate in (0.7, 4.0)] + [an_outcome([], rate=30.0)]
    shifted = [an_outcome([210], 200), an_outcome([], 200, rate=30.0)]
    met = {bar.name: (bar.value, bar.met) for bar in bars(figures(stable + shifted))}
    assert met["false refreshes per 1,000 events, worst class"] == (10.0, False)
    assert met["50% shifts refreshed within 60 events, worst class"] == (0.0, False)
    assert met["refreshes per 1,000 events"][1] is True


def test_every_80_is_beaten_only_on_both_figures_and_at_less_cost() -> None:
    every = figures([an_outcome([80, 160, 240, 320, 400], shift_at=200), an_outcome([80, 160, 240, 320, 400])])
    better = replace(every, refreshes_per_1k=0.7 * every.refreshes_per_1k, staleness_mean=0.01)
    assert not beats_every_80(better, every)  # after the shift it is the same
    better = replace(better, staleness_after_shift=0.1)
    assert beats_every_80(better, every)
    assert not beats_every_80(replace(better, refreshes_per_1k=0.71 * every.refreshes_per_1k), every)


def test_a_run_ends_with_its_figures_as_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--seed", "4", "--viewers-scale", "0.001", "--kinds", "binge", "--processes", "1"])
    captured = capsys.readouterr().out
    result = orjson.loads(captured.splitlines()[-1])
    assert result["seed"] == 4
    assert set(result["other_simulators"]) == {"binge"}
    assert result["other_simulators"]["binge"]["ours"]["viewers"] == 3
    assert "| binge |" in captured


@pytest.mark.parametrize(
    "arguments", [["--seed", "-1"], ["--viewers-scale", "0"], ["--kinds", "odd"], ["--write", "--kinds", "binge"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
