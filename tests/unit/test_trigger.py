"""The refresh rule: which one fires when, and how seldom and how soon with the thresholds that ship."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pytest

from agents.artefacts import load_thresholds
from agents.calibration import SETTLED, false_per_1k, run, simulated
from agents.settings import Settings, SettingsError
from streams.ageing import IDLE_DAYS
from streams.choosing import catalogue
from streams.counting import notice
from streams.mixture import Constants, Model, fresh_draws
from streams.prequential import watch
from streams.records import Rule
from streams.requesting import ASKED, NOTHING, RULES, SETTLING, Reason, ask, ask_due, due
from streams.simulation import Kind, Purpose, SimulatedStream, population
from streams.state import State, new_state
from streams.topics import DAY_MS
from streams.trigger import MOST, Policy, ThresholdsError, gates, read_thresholds
from tests.builders import make_registry

THRESHOLDS = load_thresholds(Settings().thresholds)
MODEL = Model(THRESHOLDS.constants, np.full(64, 1 / 64))
POLICY = Policy()
START = 1_767_225_600_000


# With the thresholds that ship, on viewers that calibration never saw


class Fired(NamedTuple):
    """A rule fired: its value against its threshold."""

    rule: Rule
    value: float
    threshold: float
    template_only: bool = False


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
CATALOGUE = catalogue(make_registry(clusters=64))


def asked(state: State, rule: Rule, *, template_only: bool = False) -> Any:
    """The numbers of a request that is made now."""
    requests = np.zeros(1, ASKED)
    reason = Reason(RULES.index(rule), 1.0, 1.0, template_only)
    ask(state.reshape(1), reason, MODEL, GATES, CATALOGUE, requests)
    return requests[0]


def measured(state: State) -> tuple[float, float]:
    """The divergence from the reference now, and its quantile."""
    request = asked(state.copy(), Rule.CONTROL)
    return float(request["divergence"]), float(request["null_quantile"])


def described(rule: Rule = Rule.COLD_START, clusters: tuple[int, ...] = (0, 1, 2)) -> State:
    """A viewer of 60 watches of these clusters in turn, whose persona was just asked for by this rule."""
    state = new_state()
    for i in range(60):
        watch(state, clusters[i % len(clusters)], MODEL)
    state["qualifying"], state["last_ts"] = 60, START
    asked(state, rule)
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
    limits = gates(policy, THRESHOLDS, IDLE_DAYS * DAY_MS)
    found = due(state, ts, limits)
    if found == NOTHING:
        return None
    (request,) = requests = np.zeros(1, ASKED)
    ask_due(state.copy(), found, ts, MODEL, limits, CATALOGUE, request)
    rule, value, threshold, template_only = requests[0][["rule", "value", "threshold", "template_only"]].item()
    return Fired(RULES[rule], value, threshold, template_only)


def test_a_template_is_asked_for_once_and_the_first_persona_at_the_gate() -> None:
    state = new_state()
    watch(state, 0, MODEL)
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
    divergence, null_quantile = measured(elsewhere)
    assert divergence > null_quantile
    n_eff = min(fresh_draws(elsewhere), float(elsewhere["reference_n_eff"]))
    assert null_quantile == THRESHOLDS.null_quantile(n_eff)
    same = later(described(), 12)
    assert measured(same)[0] < null_quantile
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
    day = START + 30 * DAY_MS
    assert which(state, day - 1) is None
    assert which_exactly(state, day) == Fired(Rule.AGE, 30.0, 30.0)
    assert which(state, day, Policy(maximum_age_days=31)) is None
    assert which(state, START + 4_000 * DAY_MS, Policy(maximum_age_days=0)) is None
    state["regret"] = 1.0
    assert which(state, day) is Rule.MATURITY


def test_a_request_is_what_the_next_are_compared_with() -> None:
    state = later(described(), 30, (10, 11, 12))
    assert asked(state, Rule.DRIFT)["sequence"] == 2
    assert which(state) is None
    assert measured(state)[0] == pytest.approx(0.0, abs=1e-6)
    assert (float(state["regret"]), int(state["since_request"]), int(state["request_ts"])) == (0.0, 0, START)
    assert int(state["student_sequence"]) == 1


def test_a_template_leaves_the_first_persona_to_come() -> None:
    state = new_state()
    watch(state, 0, MODEL)
    assert asked(state, Rule.COLD_START, template_only=True)["sequence"] == 1
    assert int(state["student_sequence"]) == 0
    assert asked(state, Rule.COLD_START)["sequence"] == 2
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
