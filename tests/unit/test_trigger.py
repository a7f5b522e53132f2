"""The refresh rule on simulated viewers, with the thresholds that ship."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.artefacts import load_thresholds
from agents.settings import Settings
from streams.records import Rule
from streams.simulation import RATES, Viewer, divergence_null, draw_taste, false_alarms, run_rule, simulate
from streams.trigger import Policy, ThresholdsError, divergence, read_thresholds

THRESHOLDS = load_thresholds(Settings().thresholds)
POLICY = Policy(template_after=0, maximum_age_days=0)


@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
def test_stable_viewers_are_left_alone(rate: float) -> None:
    """Seeds that calibration never saw. Calibrated to 2 per 1,000 on average; a class may lie somewhat above it."""
    alarms = events = 0
    for seed in range(25):
        stream = simulate(Viewer(rate), np.random.default_rng([90, seed]))
        alarms += false_alarms(run_rule(stream, 64, POLICY, THRESHOLDS), 200)
        events += len(stream.ts) - 200
    assert 1000 * alarms / events < 6


def test_a_shift_of_half_the_taste_is_found() -> None:
    found = 0
    for seed in range(40):
        viewer = Viewer(4.0, shift_at=300, shift_mass=0.5)
        refreshes = run_rule(simulate(viewer, np.random.default_rng([91, seed])), 64, POLICY, THRESHOLDS)
        found += any(300 <= r.event < 360 and r.rule is Rule.DRIFT for r in refreshes)
    assert found >= 28


def test_rules_follow_each_other_as_documented() -> None:
    stream = simulate(Viewer(4.0, shift_at=200, shift_mass=0.9), np.random.default_rng([92, 1]))
    refreshes = run_rule(stream, 64, POLICY, THRESHOLDS)
    assert refreshes[0] == replace(refreshes[0], event=19, rule=Rule.COLD_START)
    drifts = [r.event for r in refreshes if r.rule is Rule.DRIFT]
    follow_ups = [r.event for r in refreshes if r.rule is Rule.FOLLOW_UP]
    assert drifts
    assert [
        drift + THRESHOLDS.follow_up_after for drift in drifts if drift + THRESHOLDS.follow_up_after < 600
    ] == follow_ups
    gaps = np.diff([r.event for r in refreshes])
    assert gaps.min() >= THRESHOLDS.cool_down


def test_evidence_that_grew_fourfold_asks_for_a_refresh() -> None:
    taste = [0, 1, 2, 3] * 100
    stream = replace(simulate(Viewer(4.0, events=400), np.random.default_rng(1)), cluster=taste)
    rules = Counter(r.rule for r in run_rule(stream, 64, POLICY, THRESHOLDS))
    assert rules == {Rule.COLD_START: 1, Rule.MATURITY: 2}  # at 20, 80 and 320 watches


def test_the_null_quantile_falls_with_the_sample_and_matches_a_new_simulation() -> None:
    sizes = [5, 20, 80]
    quantiles = [THRESHOLDS.null_quantile(size) for size in sizes]
    assert quantiles == sorted(quantiles, reverse=True)
    fresh = divergence_null(sizes, np.random.default_rng(93), draws=500)
    assert [value for _, value in fresh] == pytest.approx(quantiles, abs=0.06)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_divergence_is_symmetric_bounded_and_zero_for_itself(first: int, second: int) -> None:
    p, q = (draw_taste(np.random.default_rng(seed), 24) for seed in (first, second))
    assert divergence(p, q) == pytest.approx(divergence(q, p))
    assert 0 <= divergence(p, q) <= 1
    assert divergence(p, p) == 0


def test_divergence_of_disjoint_tastes_is_one_bit() -> None:
    assert divergence(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"page_hinkley": "many"}, "page_hinkley|could not convert"),
        ({"page_hinkley": -1}, "above 0"),
        ({"divergence_null": []}, "not empty"),
        ({"divergence_null": [[20, 0.4], [5, 0.6]]}, "ascending"),
    ],
)
def test_a_broken_artefact_is_refused(change: dict[str, object], message: str) -> None:
    from importlib import resources

    document = orjson.loads(resources.files("agents.data").joinpath("thresholds.json").read_bytes())
    with pytest.raises(ThresholdsError, match=message):
        read_thresholds({**document, **change})
