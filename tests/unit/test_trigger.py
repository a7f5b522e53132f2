"""The refresh rule: which one fires when, and how seldom and how soon with the thresholds that ship."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from agents.artefacts import load_thresholds
from agents.calibration import SETTLED, false_per_1k, run, simulated
from agents.settings import Settings, SettingsError
from streams.ageing import IDLE_DAYS
from streams.counting import notice
from streams.interests import Distribution, distribution
from streams.mixture import Constants, Model
from streams.prequential import watch
from streams.records import Rule
from streams.simulation import Kind, Purpose, SimulatedStream, population
from streams.state import SLOTS, State, new_state
from streams.topics import DAY_MS
from streams.trigger import (
    MOST,
    SETTLING,
    Fired,
    Policy,
    ThresholdsError,
    adopt,
    distance,
    fired,
    gates,
    read_thresholds,
)

THRESHOLDS = load_thresholds(Settings().thresholds)
MODEL = Model(THRESHOLDS.constants, np.full(64, 1 / 64))
POLICY = Policy()
START = 1_767_225_600_000


# With the thresholds that ship, on viewers that calibration never saw


def viewers(shift_mass: float, scale: float) -> dict[str, list[SimulatedStream]]:
    """Default viewers by class, of two seeds."""
    found: dict[str, list[SimulatedStream]] = {}
    for seed in (31, 32):
        for stream in population(Kind.DEFAULT, Purpose.REPORTING, seed, scale):
            if stream.viewer.shift_mass == shift_mass:
                found.setdefault(stream.viewer.rate_class, []).append(stream)
    return found


def test_stable_viewers_are_left_alone() -> None:
    for name, streams in viewers(0.0, 0.1).items():
        histories = simulated(streams)
        assert len(histories) == 56
        assert false_per_1k(histories, run(histories, MODEL, THRESHOLDS.regret), SETTLED) < 3, name


def test_a_shift_of_half_the_taste_is_followed_within_60_watches() -> None:
    streams = [stream for group in viewers(0.5, 0.5).values() for stream in group]
    histories = simulated(streams)
    refreshed = run(histories, MODEL, THRESHOLDS.regret)[:, 0] > 0
    found = 0
    for user, stream in enumerate(streams):
        assert stream.viewer.shift_at is not None
        at = int(histories.begins[user]) + stream.viewer.shift_at
        found += bool(refreshed[at : at + 60].any())
    assert len(streams) == 120
    assert found >= 0.8 * len(streams)


def test_stable_viewers_seldom_pass_the_null_quantile() -> None:
    """It is that of 99 in 100 checks, at the sample size of each."""
    trace = run(simulated(viewers(0.0, 0.1)["medium"]), MODEL, THRESHOLDS.regret)
    checks = trace[trace[:, 1] >= 0]
    passed = [row[1] > THRESHOLDS.null_quantile(row[2]) for row in checks]
    assert len(checks) > 5_000
    assert 0.0 < np.mean(passed) < 0.03


# Which rule, when


GATES = gates(POLICY, THRESHOLDS, IDLE_DAYS * DAY_MS)
NOBODY = Distribution([0.0] * SLOTS, 1.0, [0.0] * SLOTS, [0.0] * SLOTS, 0.0, 0.0)


def described(rule: Rule = Rule.COLD_START, clusters: tuple[int, ...] = (0, 1, 2)) -> State:
    """A viewer of 60 watches of these clusters in turn, whose persona was just asked for by this rule."""
    state = new_state()
    for i in range(60):
        watch(state, clusters[i % len(clusters)], MODEL)
    state["qualifying"], state["last_ts"] = 60, START
    adopt(state, distribution(state, MODEL), rule, template_only=False)
    return state


def later(state: State, watches: int, clusters: tuple[int, ...] = (0, 1, 2)) -> State:
    """The same viewer after as many more watches of these."""
    for i in range(watches):
        watch(state, clusters[i % len(clusters)], MODEL)
        state["qualifying"] = int(state["qualifying"]) + 1
        notice(state, MODEL, GATES)
    return state


def which(state: State, ts: int = START, policy: Policy = POLICY) -> Rule | None:
    found = which_exactly(state, ts, policy)
    return None if found is None else found.rule


def which_exactly(state: State, ts: int = START, policy: Policy = POLICY) -> Fired | None:
    # A viewer without any watch has no estimate.
    now = distribution(state, MODEL) if state["experts"] else NOBODY
    return fired(state, now, ts, gates(policy, THRESHOLDS, IDLE_DAYS * DAY_MS), THRESHOLDS)


def test_a_template_is_asked_for_once_and_the_first_persona_at_the_gate() -> None:
    state = new_state()
    state["qualifying"] = 4
    assert which(state) is None
    state["qualifying"] = 5
    assert which_exactly(state) == Fired(Rule.COLD_START, 5.0, 5.0, template_only=True)
    assert which(state, policy=Policy(template_after=0)) is None
    state["request_ts"] = START
    state["qualifying"] = 19
    assert which(state) is None
    state["qualifying"] = 20
    assert which_exactly(state) == Fired(Rule.COLD_START, 20.0, 20.0)


def test_regret_adds_up_every_few_watches_once_there_is_a_persona() -> None:
    state = described()
    stride = THRESHOLDS.stride
    regret = []
    for _ in range(3 * stride):
        later(state, 1, (3,))
        regret.append(float(state["regret"]))
    assert int(state["since_request"]) == 3 * stride
    checked = [i for i in range(1, 3 * stride) if regret[i] != regret[i - 1]]
    assert [(61 + i) % stride for i in checked] == [0] * len(checked)
    assert len(checked) >= 2
    assert regret == sorted(regret)
    young = new_state()
    watch(young, 0, MODEL)
    later(young, 3 * stride)
    assert float(young["regret"]) == 0.0


@pytest.mark.parametrize("since", [THRESHOLDS.cool_down - 1, THRESHOLDS.cool_down])
def test_nothing_fires_while_cooling_down(since: int) -> None:
    state = described()
    state["regret"], state["since_request"] = 100.0, since
    aged = START + 400 * DAY_MS
    assert (which(state, aged) is not None) == (since >= THRESHOLDS.cool_down)


def test_regret_at_its_threshold_does_not_fire_and_above_it_does() -> None:
    state = described()
    state["since_request"] = THRESHOLDS.cool_down
    state["regret"] = THRESHOLDS.regret
    assert which(state) is None
    state["regret"] = np.nextafter(THRESHOLDS.regret, 1)
    found = which_exactly(state)
    assert found is not None
    assert (found.value, found.threshold) == (float(state["regret"]), THRESHOLDS.regret)


def test_the_name_says_whether_chance_alone_goes_that_far() -> None:
    elsewhere = later(described(), 30, (10, 11, 12))
    assert which(elsewhere) is Rule.DRIFT
    now = distribution(elsewhere, MODEL)
    found = distance(elsewhere, now, THRESHOLDS)
    assert found.divergence > found.null_quantile
    assert found.null_quantile == THRESHOLDS.null_quantile(min(now.n_eff, float(elsewhere["reference_n_eff"])))
    same = later(described(), 12)
    assert distance(same, distribution(same, MODEL), THRESHOLDS).divergence < found.null_quantile
    same["regret"] = 1.0
    assert which(same) is Rule.MATURITY


@pytest.mark.parametrize("before", [Rule.DRIFT, Rule.FOLLOW_UP])
def test_what_comes_soon_after_a_drift_follows_it_up(before: Rule) -> None:
    state = described(before)
    state["regret"] = 1.0
    state["since_request"] = SETTLING
    assert which(state) is Rule.FOLLOW_UP
    state["since_request"] = SETTLING + 1
    assert which(state) is Rule.MATURITY


@pytest.mark.parametrize("before", set(Rule) - {Rule.DRIFT, Rule.FOLLOW_UP}, ids=str)
def test_nothing_else_is_followed_up(before: Rule) -> None:
    state = described(before)
    state["regret"], state["since_request"] = 1.0, SETTLING
    assert which(state) is Rule.MATURITY


def test_age_fires_after_the_days_it_is_given_unless_it_is_off() -> None:
    state = described()
    state["since_request"] = THRESHOLDS.cool_down
    due = START + 30 * DAY_MS
    assert which(state, due - 1) is None
    assert which_exactly(state, due) == Fired(Rule.AGE, 30.0, 30.0)
    assert which(state, due, Policy(maximum_age_days=31)) is None
    assert which(state, START + 4_000 * DAY_MS, Policy(maximum_age_days=0)) is None
    state["regret"] = 1.0
    assert which(state, due) is Rule.MATURITY


def test_a_request_is_what_the_next_are_compared_with() -> None:
    state = later(described(), 30, (10, 11, 12))
    now = distribution(state, MODEL)
    assert adopt(state, now, Rule.DRIFT, template_only=False) == 2
    assert which(state) is None
    assert distance(state, distribution(state, MODEL), THRESHOLDS).divergence == pytest.approx(0.0, abs=1e-6)
    assert (float(state["regret"]), int(state["since_request"]), int(state["request_ts"])) == (0.0, 0, START)
    assert int(state["student_sequence"]) == 1


def test_a_template_leaves_the_first_persona_to_come() -> None:
    state = new_state()
    watch(state, 0, MODEL)
    assert adopt(state, distribution(state, MODEL), Rule.COLD_START, template_only=True) == 1
    assert int(state["student_sequence"]) == 0
    assert adopt(state, distribution(state, MODEL), Rule.COLD_START, template_only=False) == 2
    assert int(state["student_sequence"]) == 2


# The artefact


def test_the_null_quantile_falls_with_the_sample_and_is_held_at_the_ends() -> None:
    sizes = [0.0, 1.0, 10.0, 20.0, 80.0, 1e6]
    quantiles = [THRESHOLDS.null_quantile(size) for size in sizes]
    assert quantiles == sorted(quantiles, reverse=True)
    assert quantiles[0] == THRESHOLDS.divergence_null[0][1]
    assert quantiles[-1] == THRESHOLDS.divergence_null[-1][1]
    (first, high), (second, low) = THRESHOLDS.divergence_null[:2]
    assert THRESHOLDS.null_quantile((first * second) ** 0.5) == pytest.approx((high + low) / 2)


def document() -> dict[str, Any]:
    packaged: dict[str, Any] = orjson.loads(resources.files("agents.data").joinpath("thresholds.json").read_bytes())
    return packaged


def test_the_packaged_artefact_says_what_it_was_calibrated_on() -> None:
    packaged = document()
    assert THRESHOLDS.name.startswith(packaged["name"])
    assert packaged["calibrated_on"]["source"] == "simulation"
    assert max(packaged["calibrated_on"]["false_per_1k"].values()) < 3
    assert THRESHOLDS.constants._asdict() == packaged["constants"]


@pytest.mark.parametrize("name", ["name", "regret", "stride", "memory", "cool_down", "constants", "divergence_null"])
def test_an_artefact_without_a_field_is_refused_by_its_name(name: str) -> None:
    broken = document()
    del broken[name]
    with pytest.raises(ThresholdsError, match=name):
        read_thresholds(broken)


@pytest.mark.parametrize("name", Constants._fields)
@pytest.mark.parametrize("value", [-0.001, MOST * 1.01, float("nan"), None, "many"], ids=str)
def test_an_artefact_with_a_constant_that_cannot_be_is_refused(name: str, value: object) -> None:
    broken = document()
    broken["constants"][name] = value
    with pytest.raises(ThresholdsError):
        read_thresholds(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "format 1.*personas calibrate"),
        ({"format": None}, "format None"),
        ({"regret": "many"}, "could not convert"),
        ({"regret": 0}, "above 0"),
        ({"regret": float("nan")}, "above 0"),
        ({"stride": 0}, "at least 1"),
        ({"cool_down": 0}, "at least 1"),
        ({"memory": 1.1}, "share"),
        ({"memory": -0.1}, "share"),
        ({"constants": []}, "TypeError"),
        ({"divergence_null": []}, "not empty"),
        ({"divergence_null": [[20, 0.4], [5, 0.6]]}, "ascending"),
        ({"divergence_null": [[0, 0.4], [5, 0.3]]}, "ascending"),
        ({"divergence_null": [[5, 0.4, 1]]}, "too many values"),
        ({"divergence_null": 7}, "not iterable"),
    ],
)
def test_a_broken_artefact_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ThresholdsError, match=message):
        read_thresholds({**document(), **change})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"own_weight": 0.0}, "own_weight is 0.0, it must be between 0.001"),
        ({"fresh": 0.0}, "fresh"),
        ({"discount": 1.1}, "shares"),
        ({"forget": 1.1}, "shares"),
        ({"population_share": 1.1}, "shares"),
        ({"hazard": 0.3, "restart_every": 2.0}, "hazard times restart_every"),
    ],
)
def test_constants_that_no_estimate_can_have_are_refused(changes: dict[str, float], message: str) -> None:
    broken = document()
    broken["constants"] |= changes
    with pytest.raises(ThresholdsError, match=message):
        read_thresholds(broken)


@pytest.mark.parametrize("content", [b"", b"no json", b"[]", b"null", b"7", b'{"format": 2}', b"\xff"])
def test_a_file_that_is_no_artefact_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "thresholds.json"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"thresholds\.json"):
        load_thresholds(path)
