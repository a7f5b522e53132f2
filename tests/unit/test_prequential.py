"""Whole histories: compiled and plain alike, and refreshed exactly where the workers refresh them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import orjson
import pytest

from agents.calibration import COOL_DOWN, FIRST_AFTER, MEMORY, STRIDE, Histories, simulated
from agents.compiled import empty_states, kernel
from agents.replay import ReplayDriver
from streams import mixture, prequential, topics
from streams.mixture import Constants, Floats, Model, estimate
from streams.prequential import Rule, share_of, watch
from streams.simulation import RATES, Stream, Viewer, simulate
from streams.state import SLOTS, from_bytes
from streams.topics import DAY_MS
from tests.builders import event, make_configuration, make_model, make_registry

REGISTRY = make_registry(clusters=64)
THRESHOLDS = make_configuration(REGISTRY).thresholds
MODEL = make_model(REGISTRY)
OTHERS = (
    Constants(0.0, 80.0, 4.0, 10.0, 0.9, 1.0, 0.02, 1.0, 1.0, 32.0, 12.0, 0.0, 0.0, 1.0),
    Constants(0.8, 1280.0, 0.25, 160.0, 0.0, 16.0, 0.0, 0.05, 16.0, 4.0, 1.0, 7.0, 3.0, 4.0),
)


def rule(maximum_age_days: int = 0) -> Rule:
    """As the packaged thresholds and the policy have it."""
    age = maximum_age_days * DAY_MS
    return Rule(THRESHOLDS.regret, THRESHOLDS.stride, THRESHOLDS.memory, 20, THRESHOLDS.cool_down, age)


def viewers(events: int = 200) -> Histories:
    """Histories that overflow the slots, shift, repeat much, and one that is a single watch."""
    kinds = [
        Viewer(30.0, events=events, shift_at=events // 2),
        Viewer(4.0, events=events, likes=(15, 30), background=0.15),
        Viewer(0.7, events=events, clusters=4, likes=(2, 4), stickiness=0.7),
        Viewer(0.7, events=1),
    ]
    return simulated([simulate(kind, np.random.default_rng([70, i])) for i, kind in enumerate(kinds)])


def outcome(functions: Any, histories: Histories, model: Model) -> tuple[bytes, bytes, Floats, Floats]:
    """States, trace, losses, and the last history's distributions."""
    states, trace = empty_states(len(histories)), np.zeros((len(histories.clusters), 3))
    functions.refreshes(states, histories.ts, histories.clusters, histories.begins, model, rule(30), trace)
    losses = np.zeros((len(histories), 2))
    functions.log_losses(empty_states(len(histories)), histories.clusters, histories.begins, model, losses)
    shares = np.zeros((50, 64))
    functions.distributions(empty_states(1)[0], histories.clusters[:50], model, shares)
    return states.tobytes(), trace.tobytes(), losses, shares


@pytest.mark.parametrize("constants", [THRESHOLDS.constants, *OTHERS], ids=["packaged", "one extreme", "the other"])
def test_compiled_and_plain_functions_give_the_same_bytes(constants: Constants) -> None:
    model = Model(constants, MODEL.priors)
    plain: ModuleType = prequential
    ours, theirs = (outcome(functions, viewers(), model) for functions in (plain, kernel()))
    assert ours[0] == theirs[0]
    assert ours[1] == theirs[1]
    assert np.array_equal(ours[2], theirs[2])
    assert np.array_equal(ours[3], theirs[3])


def test_every_function_of_both_modules_is_compiled() -> None:
    for module in (mixture, prequential):
        for name, value in vars(module).items():
            if getattr(value, "__module__", "") == module.__name__ and callable(value) and not isinstance(value, type):
                assert hasattr(getattr(kernel(), name), "py_func"), name


def test_the_trace_says_where_the_divergence_was_checked_and_what_fired() -> None:
    histories = viewers()
    trace = np.zeros((len(histories.clusters), 3))
    states = empty_states(len(histories))
    kernel().refreshes(states, histories.ts, histories.clusters, histories.begins, MODEL, rule(30), trace)
    part = trace[histories.part(0)]
    checked = np.nonzero(part[:, 1] >= 0)[0]
    assert (checked + 1).tolist() == [n for n in range(21, len(part) + 1) if n % THRESHOLDS.stride == 0]
    refreshed = np.nonzero(part[:, 0])[0]
    assert refreshed[0] == 19
    assert np.diff(refreshed).min() >= THRESHOLDS.cool_down
    assert set(part[:, 0]) == {0.0, 1.0}
    assert 2.0 in trace[histories.part(2), 0]  # a light viewer, by age
    assert not trace[histories.part(3), 0].any()


def test_a_lower_threshold_never_refreshes_later_for_the_first_time() -> None:
    histories = viewers()
    first = []
    for threshold in (0.01, 0.03, 0.3, 30.0):
        trace = np.zeros((len(histories.clusters), 3))
        kernel().refreshes(
            empty_states(len(histories)), histories.ts, histories.clusters, histories.begins, MODEL,
            rule()._replace(threshold=threshold), trace,
        )  # fmt: skip
        late = np.nonzero(trace[histories.part(0), 0])[0][1:]
        first.append(int(late[0]) if len(late) else 10_000)
    assert first == sorted(first)
    assert first[0] < first[-1] == 10_000


def test_each_watch_is_predicted_before_it_is_counted() -> None:
    """The first watch costs what the population says; a shuffled copy of the future changes no past loss."""
    histories = viewers()
    head = histories.clusters[:60]
    losses = np.zeros((2, 2))
    both, begins = np.concatenate([head, head[:30]]), np.array([0, 60, 90])
    kernel().log_losses(empty_states(2), both, begins, MODEL, losses)
    first = np.zeros((1, 2))
    kernel().log_losses(empty_states(1), head[:1], np.array([0, 1]), MODEL, first)
    assert first[0] == pytest.approx(6.0)  # of 64 clusters
    record, bits = empty_states(1)[0], 0.0
    for i, cluster in enumerate(head.tolist()):
        shares, rest = estimate(record, MODEL) if i else (np.zeros(SLOTS), 1.0)
        bits -= np.log2(share_of(record, cluster, shares, rest, MODEL.priors))
        watch(record, cluster, MODEL)
        if i == 29:
            assert bits == pytest.approx(losses[1, 1], rel=1e-6)
    assert bits == pytest.approx(losses[0, 1], rel=1e-6)


def test_decayed_counts_predict_as_their_formula_says() -> None:
    clusters, priors = np.array([1, 1, 2]), np.array([0.2, 0.3, 0.5])
    bits = kernel().decayed_log_loss(clusters, np.array([0, 3]), 1.0, 2.0, priors)
    # After each watch the counts halve: (c + 2 g) / (sum c + 2).
    expected = -np.log2([0.3, (1.0 + 0.6) / 3.0, 1.0 / 3.5]).sum()
    assert bits == pytest.approx(expected)


# The product


async def requested(stream: Stream, maximum_age_days: int) -> tuple[list[int], list[str], Any]:
    """Watches at which the watch handler requested a refresh, the rules, and the state; each watch its own session."""
    driver = ReplayDriver(make_configuration(REGISTRY, maximum_age_days=maximum_age_days), REGISTRY)
    pairs = enumerate(zip(stream.ts, stream.cluster, strict=True))
    await driver.run([event("ann", f"c{c}v{i % 10}", ts, session_id=f"s{i}") for i, (ts, c) in pairs])
    place = {ts: i for i, ts in enumerate(stream.ts)}
    requests = [orjson.loads(output.value or b"") for output in driver.outputs(topics.REFRESH_REQUESTS)]
    return [place[r["as_of"]] for r in requests], [r["rule"] for r in requests], from_bytes(driver.states["ann"])


@pytest.mark.parametrize("maximum_age_days", [0, 30])
@pytest.mark.parametrize("name", RATES)
async def test_workers_refresh_exactly_where_the_benchmarked_rule_does(name: str, maximum_age_days: int) -> None:
    """And they count the same, where the viewer's clusters all have slots: the weakest is chosen by other counts."""
    stream = simulate(Viewer(RATES[name], events=400, clusters=SLOTS, shift_at=250), np.random.default_rng([71, 1]))
    state, trace = empty_states(1), np.zeros((400, 3))
    ts, clusters = np.array(stream.ts), np.array(stream.cluster)
    kernel().refreshes(state, ts, clusters, np.array([0, 400]), MODEL, rule(maximum_age_days), trace)
    watches, rules, stored = await requested(stream, maximum_age_days)
    assert watches == np.nonzero(trace[:, 0])[0].tolist()
    assert len(watches) >= 3
    assert [r == "age" for r in rules] == (trace[trace[:, 0] > 0, 0] == 2).tolist()
    assert "age" not in rules or maximum_age_days > 0
    assert "age" in rules or maximum_age_days == 0 or name != "light"
    for field in ("cluster", "count", "total", "spread", "expert_weight", "kinds", "recent", "reference", "regret"):
        assert stored[field].tobytes() == state[0][field].tobytes(), field


def test_calibration_runs_the_rule_that_the_packaged_thresholds_run() -> None:
    assert (THRESHOLDS.stride, THRESHOLDS.memory, THRESHOLDS.cool_down) == (STRIDE, MEMORY, COOL_DOWN)
    assert make_configuration(REGISTRY).policy.first_persona_after == FIRST_AFTER
