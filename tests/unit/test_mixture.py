"""The estimate: always a distribution, quick after a change of taste, and not fooled by one evening."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.artefacts import load_thresholds
from agents.compiled import empty_states
from agents.replay import ReplayDriver
from agents.settings import Settings
from streams.identifiers import video_key
from streams.mixture import (
    POPULATION,
    Constants,
    Floats,
    Model,
    Record,
    accumulate,
    describe,
    divergence_from_reference,
    estimate,
    fresh_draws,
    observe,
    seat,
    start,
    withdraw,
)
from streams.prequential import share_of, watch
from streams.state import COUNTS, EMPTY, EXPERTS, SLOTS, STATE, UNIT, from_bytes, slot_of
from streams.trigger import LEAST, MOST
from tests.builders import START, control, make_configuration, make_registry, watches

CONSTANTS = load_thresholds(Settings().thresholds).constants
SHARES = ("discount", "population_share", "forget")


def new_record() -> Record:
    return empty_states(1)[0]


def even(clusters: int, constants: Constants = CONSTANTS) -> Model:
    return Model(constants, np.full(clusters, 1 / clusters))


def watched(clusters: Iterable[int], model: Model, record: Record | None = None) -> Record:
    """A state after one full watch of each of these clusters."""
    record = new_record() if record is None else record
    for cluster in clusters:
        watch(record, cluster, model)
    return record


def share(record: Record, cluster: int, model: Model) -> float:
    shares, rest = estimate(record, model)
    return float(share_of(record, cluster, shares, rest, model.priors))


# A distribution, whatever happens


def popularity(clusters: int, skew: float) -> Floats:
    shares = (np.arange(clusters) + 1.0) ** -skew
    normalised: Floats = shares / shares.sum()
    return normalised


@st.composite
def any_constants(draw: st.DrawFn) -> Constants:
    """Constants that the artefact may hold, the bounds among them."""
    positive = st.sampled_from((LEAST, 1.0, MOST)) | st.floats(0.1, 100.0)
    values = {name: draw(positive) for name in Constants._fields}
    values |= {name: draw(st.sampled_from((0.0, 1.0)) | st.floats(0.0, 1.0)) for name in SHARES}
    values |= {name: draw(st.sampled_from((0.0, MOST)) | st.floats(0.0, 20.0)) for name in ("repeat", "session")}
    values["hazard"] = draw(st.sampled_from((0.0, 0.001, 0.5))) / values["restart_every"]
    return Constants(**values)


@dataclass(frozen=True)
class Step:
    """A watch of a cluster (taken modulo their number), or, with `back`, a watch taken back."""

    cluster: int
    size: float
    minutes: int
    back: bool


STEPS = st.lists(
    st.builds(Step, st.integers(0, 70) | st.integers(0, 2), st.sampled_from((0.0, 0.5, 1.0)), st.integers(0, 2000),
              st.sampled_from((False,) * 5 + (True,))),
    min_size=1, max_size=60,
)  # fmt: skip


@given(
    steps=STEPS, constants=any_constants(), clusters=st.sampled_from((1, 2, 30, 5000)), skew=st.sampled_from((0.0, 3.0))
)
@settings(max_examples=40, deadline=None)
def test_the_estimate_is_a_distribution_after_anything(
    steps: list[Step], constants: Constants, clusters: int, skew: float
) -> None:
    model = Model(constants, popularity(clusters, skew))
    record, done = new_record(), list[tuple[int, float, int]]()
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        for step in steps:
            cluster = step.cluster * 71 % clusters
            record["last_ts"] += step.minutes * 60_000
            if not step.back or not int(record["experts"]):
                slot = seat(record, cluster, model)
                record["long"][slot] += 1.0
                restarts = int(record["restarts"]) % 256
                likelihood, drawn = observe(record, slot, step.size, model)
                assert 0.0 < likelihood <= 1.001
                assert 0.0 <= drawn <= step.size
                done.append((cluster, drawn, restarts))
            elif done and slot_of(record, done[-1][0]) >= 0:
                cluster, drawn, restarts = done.pop()
                withdraw(record, slot_of(record, cluster), drawn, restarts, constants)
            accumulate(record, 4, 0.9, model)
        shares, rest = estimate(record, model)
    held = [int(cluster) for cluster in record["cluster"] if cluster != EMPTY]
    assert shares.sum() + rest * (1.0 - model.priors[held].sum()) == pytest.approx(1.0, abs=1e-4)
    assert shares.min() >= 0.0
    assert rest >= 0.0
    assert fresh_draws(record) >= 0.0
    assert float(record["expert_weight"].sum()) == pytest.approx(1.0, abs=1e-4)
    for name in STATE.names or ():
        if record[name].dtype.kind == "f":
            assert np.isfinite(record[name]).all(), name
            assert (record[name] >= 0.0).all(), name


def test_before_any_watch_a_viewer_is_the_population() -> None:
    model = Model(CONSTANTS, popularity(30, 1.0))
    record = new_record()
    start(record, CONSTANTS)
    for cluster in (0, 7, 29):
        assert share(record, cluster, model) == pytest.approx(model.priors[cluster], rel=1e-6)


def test_a_cluster_that_makes_room_keeps_its_viewer_s_weight_in_the_rest() -> None:
    """One more cluster than slots: the weakest goes, and what was counted of it goes on weighing."""
    model = even(64)
    record = watched([cluster for cluster in range(SLOTS) for _ in range(3)], model)
    before, draws = share(record, SLOTS, model), fresh_draws(record)
    watch(record, SLOTS, model)
    assert slot_of(record, 0) == EMPTY
    assert sorted(record["cluster"].tolist()) == list(range(1, SLOTS + 1))
    assert fresh_draws(record) > draws
    assert share(record, SLOTS, model) > before
    assert share(record, 0, model) < share(record, 1, model)
    assert share(record, 0, model) == pytest.approx(share(record, 63, model))


# What it is for


def test_the_share_of_what_is_watched_approaches_how_often_it_is() -> None:
    random = np.random.default_rng(1)
    taste = np.array([0.5, 0.3, 0.2])
    record = watched(random.choice(3, size=600, p=taste), model := even(40))
    assert [share(record, cluster, model) for cluster in range(3)] == pytest.approx(taste, abs=0.08)
    assert share(record, 20, model) < 0.005


def test_restarts_follow_a_change_of_taste() -> None:
    """After 30 watches of something else most of the estimate is about that; without restarts it is not."""
    random = np.random.default_rng(2)
    before, after = random.choice([0, 1, 2], size=200), random.choice([3, 4, 5], size=30)
    new_taste = []
    for hazard in (CONSTANTS.hazard, 0.0):
        model = even(64, CONSTANTS._replace(hazard=hazard))
        record = watched([*before, *after], model)
        new_taste.append(sum(share(record, cluster, model) for cluster in (3, 4, 5)))
        assert int(record["experts"]) == EXPERTS
    assert new_taste[0] > 0.7
    assert new_taste[0] > 2 * new_taste[1]


def test_a_viewer_like_the_others_is_kept_near_them() -> None:
    """Watches drawn from the population: the expert that says so gains weight, and the estimate stays close."""
    model = Model(CONSTANTS, popularity(40, 0.8))
    drawn = np.random.default_rng(3).choice(40, size=60, p=model.priors)
    like = watched(drawn, model)
    own_taste = watched(np.random.default_rng(3).choice([31, 35, 39], size=60), model)
    assert float(like["expert_weight"][POPULATION]) > CONSTANTS.population_share
    assert float(own_taste["expert_weight"][POPULATION]) < 0.01
    counts = np.bincount(drawn, minlength=40) / 60
    estimated = np.array([share(like, cluster, model) for cluster in range(40)])
    assert np.abs(estimated - model.priors).sum() < 0.5 * np.abs(counts - model.priors).sum()


def test_a_repeat_is_less_of_a_draw_than_a_change() -> None:
    model = even(64)
    drawn = []
    for cluster in (3, 0):  # the last one watched, and the one longest ago
        record = watched([0, 1, 2, 3] * 5, model)
        drawn.append(observe(record, slot_of(record, cluster), 1.0, model)[1])
    assert drawn[0] < 0.85 * drawn[1]
    assert drawn[1] < 1.0


def test_the_more_a_viewer_repeats_the_less_a_repeat_says() -> None:
    """Each viewer's own habit is learned: two watch the same five clusters, one of them in runs of four."""
    model = even(64)
    in_turn = watched([0, 1, 2, 3, 4] * 24, model)
    in_runs = watched([cluster for cluster in (0, 1, 2, 3, 4) * 6 for _ in range(4)], model)
    assert fresh_draws(in_runs) < 0.7 * fresh_draws(in_turn)
    kinds = in_runs["kinds"] / in_runs["kinds"].sum()
    assert float(kinds[0]) < 0.6


def test_an_evening_of_one_series_is_not_a_taste() -> None:
    """Of 60 watches the last ten are of one new cluster: in a row for a viewer who repeats, or apart for one who does
    not.
    """
    model = even(64)
    habits = [cluster for cluster in (0, 1, 2, 3) * 3 for _ in range(4)]
    evening = watched([*habits, *[9] * 10], model)
    spread = watched([*[0, 1, 2, 3] * 12, *[9, 0, 9, 1, 9, 2, 9, 3] * 2, 9, 9], model)
    assert share(evening, 9, model) < 10 / 58
    assert share(evening, 9, model) < 0.8 * share(spread, 9, model)


def test_a_watch_beyond_the_cap_enters_the_session_and_leaves_the_taste() -> None:
    model = even(64)
    record = watched([0, 1] * 10, model)
    before = estimate(record, model)
    likelihood, drawn = observe(record, seat(record, 1, model), 0.0, model)
    after = estimate(record, model)
    assert likelihood > 0.3
    assert drawn == 0.0
    assert np.array_equal(before[0], after[0])
    assert record["recent"][0] == 1


def test_half_a_watch_moves_the_estimate_half_as_far() -> None:
    model = even(64)
    moved = []
    for size in (1.0, 0.5):
        record = watched([0, 1] * 10, model)
        _, drawn = observe(record, seat(record, 2, model), size, model)
        moved.append(drawn)
    assert moved[1] == pytest.approx(moved[0] / 2)


# Taking back


def test_a_watch_taken_back_leaves_the_shares_as_they_were() -> None:
    model = even(64)
    record = watched([0, 1, 2] * 10, model)
    before = share(record, 5, model), fresh_draws(record)
    slot = seat(record, 5, model)
    restarts = int(record["restarts"])
    _, drawn = observe(record, slot, 1.0, model)
    assert share(record, 5, model) > 2 * before[0]
    withdraw(record, slot, drawn, restarts % 256, model.constants)
    assert share(record, 5, model) == pytest.approx(before[0], rel=0.5)
    assert fresh_draws(record) == pytest.approx(before[1], rel=0.15)


def test_taking_back_leaves_experts_alone_that_started_later() -> None:
    """The watch that starts an expert, and every one before, is not among what that expert counted."""
    model = even(64, CONSTANTS._replace(restart_every=2.0))
    record = new_record()
    for _ in range(300):
        slot = seat(record, 0, model)
        restarts, born = int(record["restarts"]), record["born"].copy()
        counted = int(record["experts"]) - 1
        _, drawn = observe(record, slot, 1.0, model)
        after = record.copy()
        withdraw(after, slot, drawn, restarts % 256, model.constants)
        taken = record["count"][:, slot] - after["count"][:, slot]
        for i in range(COUNTS):
            started_now = int(record["born"][i]) != int(born[i])
            expected = 0.0 if started_now or i >= counted else min(drawn, float(record["count"][i, slot]))
            assert float(taken[i]) == pytest.approx(expected, abs=1e-4)
    assert int(record["restarts"]) > 256 / 4


async def test_forgetting_a_video_takes_its_draws_back() -> None:
    """As the workers do it: two watches of the video, which between them were two draws at most."""
    registry = make_registry()
    driver = ReplayDriver(make_configuration(registry), registry)
    await driver.run(watches("ann", [0, 1] * 6))
    before = from_bytes(driver.states["ann"])
    slot = slot_of(before, 0)
    video = before["ring_video"] == video_key("c0v0")
    drawn = float(before["ring_draw"][video].sum()) * UNIT
    assert (video.sum(), 0.0 < drawn < 2.0) == (2, True)
    await driver.run([control("ann", "forget_video", video_id="c0v0")])
    after = from_bytes(driver.states["ann"])
    assert float(after["count"][0, slot]) == pytest.approx(float(before["count"][0, slot]) - drawn, abs=UNIT)
    assert float(after["total"][0]) == pytest.approx(float(before["total"][0]) - drawn, abs=1e-5)
    assert not after["ring_draw"][video].any()
    await driver.run([control("ann", "forget_video", START + 1, video_id="c0v0")])
    assert from_bytes(driver.states["ann"])["count"].tobytes() == after["count"].tobytes()


# The regret


def test_the_regret_starts_anew_when_the_estimate_is_described() -> None:
    model = even(64)
    record = watched([0, 1, 2] * 10, model)
    first = accumulate(record, 4, 0.9, model)
    assert first > 0.3
    assert float(record["regret"]) == pytest.approx(4 * first**2)
    accumulate(record, 4, 0.9, model)
    assert float(record["regret"]) == pytest.approx(4 * first**2 * 1.9)
    describe(record, *estimate(record, model))
    assert float(record["regret"]) == 0.0
    assert accumulate(record, 4, 0.9, model) == pytest.approx(0.0, abs=1e-6)


def test_the_divergence_is_one_bit_between_tastes_without_a_common_cluster() -> None:
    model = even(64)
    record = watched([0, 1, 2, 3], model)
    record["reference"] = np.where(record["cluster"] == 0, 1.0, 0.0)
    record["reference_rest"] = 0.0
    other = np.where(record["cluster"] == 1, 1.0, 0.0)
    same = np.where(record["cluster"] == 0, 1.0, 0.0)
    half = (same + other) / 2
    assert divergence_from_reference(record, other, 0.0, model.priors) == pytest.approx(1.0)
    assert divergence_from_reference(record, same, 0.0, model.priors) == 0.0
    assert divergence_from_reference(record, half, 0.0, model.priors) == pytest.approx(0.3113, abs=1e-4)


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_the_divergence_is_that_of_the_whole_distributions(seed: int) -> None:
    """Summed over slots and the rest it is what the formula gives over every cluster, in bits, 0..1."""
    random = np.random.default_rng(seed)
    model = Model(CONSTANTS, popularity(int(random.integers(2, 60)), 0.8))
    clusters = len(model.priors)
    record = watched(random.integers(0, min(clusters, 15), size=40), model)
    describe(record, *estimate(record, model))
    p = np.array([share(record, cluster, model) for cluster in range(clusters)])
    watched(random.integers(0, min(clusters, 15), size=40), model, record)
    q = np.array([share(record, cluster, model) for cluster in range(clusters)])
    middle = (p + q) / 2
    expected = (np.sum(p * np.log2(p / middle)) + np.sum(q * np.log2(q / middle))) / 2
    found = divergence_from_reference(record, *estimate(record, model), model.priors)
    assert found == pytest.approx(expected, abs=1e-5)
    assert 0.0 <= found <= 1.0
