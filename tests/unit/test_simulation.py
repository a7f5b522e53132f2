"""Simulated viewers: what is drawn follows the taste that the stream says is true, and seeds are kept apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytest

from streams.counting import SESSION_GAP_MS
from streams.mixture import Floats
from streams.simulation import (
    BINGE_EVENTS,
    BINGE_SHARE,
    EARLIEST_SHIFT,
    LATEST_SHIFT,
    PERSON_SHARE,
    RATES,
    SHIFT_MIX,
    WEEKEND_SHARE,
    Integers,
    Kind,
    Purpose,
    SecondTaste,
    Viewer,
    draw_taste,
    population,
    simulate,
)
from streams.topics import DAY_MS

MANY = 20_000


def shares(clusters: Sequence[int] | Integers) -> Floats:
    return np.bincount(clusters, minlength=64) / len(clusters)


def total_variation(p: Floats, q: Floats) -> float:
    return float(np.abs(p - q).sum() / 2)


def test_a_taste_is_a_distribution_over_a_few_clusters() -> None:
    for seed in range(50):
        taste = draw_taste(np.random.default_rng(seed), 64)
        assert taste.sum() == pytest.approx(1)
        assert 3 <= (taste > 0.08 / 64 + 1e-12).sum() <= 10
        broad = draw_taste(np.random.default_rng(seed), 64, likes=(15, 30), background=0.15)
        assert 15 <= (broad > 0.15 / 64 + 1e-12).sum() <= 30
        assert broad.min() == pytest.approx(0.15 / 64)


@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
def test_events_come_at_the_rate(rate: float) -> None:
    stream = simulate(Viewer(rate, events=MANY), np.random.default_rng(1))
    days = np.diff(stream.ts) / DAY_MS
    assert (days >= 0).all()
    assert days.mean() == pytest.approx(1 / rate, rel=0.03)
    assert days.std() == pytest.approx(days.mean(), rel=0.05)  # exponential gaps


@pytest.mark.parametrize("stickiness", [0.0, 0.4, 0.7])
def test_stickiness_repeats_and_leaves_the_shares_alone(stickiness: float) -> None:
    stream = simulate(Viewer(4.0, events=MANY, stickiness=stickiness), np.random.default_rng(2))
    truth = stream.truth()[0]
    repeats = float(np.mean(np.diff(stream.cluster) == 0))
    assert repeats == pytest.approx(stickiness + (1 - stickiness) * (truth**2).sum(), abs=0.02)
    assert total_variation(shares(stream.cluster), truth) < 0.05


def test_a_repeat_never_crosses_a_shift() -> None:
    """With stickiness 1 every event repeats the first, until the one at the shift is drawn from the new taste."""
    changed = 0
    for seed in range(20):
        viewer = Viewer(4.0, events=100, stickiness=1.0, shift_at=50, shift_mass=1.0)
        stream = simulate(viewer, np.random.default_rng(seed))
        assert len(set(stream.cluster[:50])) == len(set(stream.cluster[50:])) == 1
        changed += stream.cluster[49] != stream.cluster[50]
    assert changed > 10


def test_a_shift_mixes_the_new_taste_in_at_its_event() -> None:
    viewer = Viewer(4.0, events=MANY, stickiness=0.0, shift_at=MANY // 2, shift_mass=0.3)
    stream = simulate(viewer, np.random.default_rng(3))
    truth = stream.truth()
    old, new = stream.tastes
    assert truth.sum(axis=1) == pytest.approx(np.ones(MANY))
    assert (truth[: MANY // 2] == old).all()
    assert truth[MANY // 2 :] == pytest.approx(np.tile(0.7 * old + 0.3 * new, (MANY // 2, 1)))
    assert total_variation(shares(stream.cluster[MANY // 2 :]), truth[-1]) < 0.05


def test_gradual_drift_moves_in_equal_steps() -> None:
    viewer = Viewer(4.0, events=100, shift_at=40, shift_mass=1.0, shift_over=20)
    second = simulate(viewer, np.random.default_rng(4)).second_share
    assert second[:40].max() == 0
    assert np.diff(second[39:60]) == pytest.approx(np.full(20, 1 / 20))
    assert (second[59:] == 1).all()


def test_gradual_drift_keeps_its_stickiness() -> None:
    viewer = Viewer(4.0, events=MANY, stickiness=0.7, shift_at=0, shift_mass=1.0, shift_over=MANY)
    assert np.mean(np.diff(simulate(viewer, np.random.default_rng(5)).cluster) == 0) > 0.7


def test_a_binge_passes_and_is_not_the_truth() -> None:
    most = []
    for seed in range(60):
        viewer = Viewer(4.0, shift_at=200, second_taste=SecondTaste.BINGE, stickiness=0.0)
        stream = simulate(viewer, np.random.default_rng(seed))
        binge = Counter(stream.cluster[200 : 200 + BINGE_EVENTS]).most_common(1)[0]
        most.append(binge[1])
        assert (stream.truth() == stream.tastes[0]).all()
    assert np.mean(most) == pytest.approx(BINGE_SHARE * BINGE_EVENTS, abs=1)


def test_weekends_have_a_taste_of_their_own() -> None:
    viewer = Viewer(30.0, events=MANY, stickiness=0.0, second_taste=SecondTaste.WEEKEND)
    stream = simulate(viewer, np.random.default_rng(6))
    # A watch at 2026-01-03 00:00 UTC was on a Saturday.
    weekend = ((np.array(stream.ts) - 1_767_398_400_000) // DAY_MS) % 7 < 2
    clusters = np.array(stream.cluster)
    assert weekend.mean() == pytest.approx(WEEKEND_SHARE, abs=0.02)
    assert total_variation(shares(clusters[weekend]), stream.tastes[1]) < 0.06
    assert total_variation(shares(clusters[~weekend]), stream.tastes[0]) < 0.05
    assert total_variation(shares(clusters), stream.truth()[0]) < 0.05


def test_two_people_take_turns_by_session() -> None:
    viewer = Viewer(100.0, events=MANY, stickiness=0.0, second_taste=SecondTaste.PERSON, background=0.0, likes=(3, 3))
    stream = next(s for s in (simulate(viewer, np.random.default_rng(i)) for i in range(100)) if disjoint(s.tastes))
    first_only = stream.tastes[0][np.array(stream.cluster)] > 0
    sessions = np.cumsum(np.diff(stream.ts, prepend=stream.ts[0]) > SESSION_GAP_MS)
    of_session = np.bincount(sessions, weights=first_only) / np.bincount(sessions)
    assert set(of_session) == {0.0, 1.0}
    assert of_session.mean() == pytest.approx(PERSON_SHARE, abs=0.03)
    assert stream.truth()[0] == pytest.approx(stream.tastes.mean(axis=0))


def disjoint(tastes: Floats) -> bool:
    return not ((tastes[0] > 0) & (tastes[1] > 0)).any()


def test_an_anchor_returns_within_a_session_more_than_the_taste_alone() -> None:
    stream = simulate(Viewer(4.0, events=MANY, anchored=True), np.random.default_rng(7))
    clusters, truth = np.array(stream.cluster), stream.truth()[0]
    by_chance = float((truth**2).sum())
    assert np.mean(clusters[2:] == clusters[:-2]) > by_chance + 0.05
    assert np.mean(clusters[60:] == clusters[:-60]) == pytest.approx(by_chance, abs=0.02)
    assert total_variation(shares(clusters), truth) < 0.06


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_has_labelled_viewers_of_every_class(kind: Kind) -> None:
    streams = list(population(kind, Purpose.REPORTING, 1, 0.025))
    assert {s.viewer.rate_class for s in streams} == set(RATES)
    for stream in streams:
        assert len(stream.ts) == len(stream.cluster) == 600
        assert RATES[stream.viewer.rate_class] == stream.viewer.rate
        assert (stream.viewer.shift_at is None) == (stream.viewer.shift_mass == 0)
        if stream.viewer.shift_at is not None:
            assert EARLIEST_SHIFT <= stream.viewer.shift_at <= LATEST_SHIFT


def test_the_default_population_has_its_mix() -> None:
    labels = Counter((s.viewer.rate_class, s.viewer.shift_mass) for s in population(Kind.DEFAULT, Purpose.REPORTING, 1))
    assert labels == {(name, mass): viewers for name in RATES for mass, viewers in SHIFT_MIX}


def test_the_same_seed_gives_the_same_viewers_at_any_scale() -> None:
    few = list(population(Kind.DEFAULT, Purpose.REPORTING, 5, 0.01))
    more = list(population(Kind.DEFAULT, Purpose.REPORTING, 5, 0.02))
    assert {tuple(s.cluster) for s in few} <= {tuple(s.cluster) for s in more}
    assert len(more) > len(few)


def test_no_reporting_seed_draws_a_viewer_of_calibration() -> None:
    def viewers(purpose: Purpose, seed: int) -> set[tuple[int, ...]]:
        return {tuple(s.ts) for s in islice(population(Kind.DEFAULT, purpose, seed, 0.01), 5)}

    seeds = [0, 1, 2, Purpose.CALIBRATION, Purpose.REPORTING, 2**32, 2**32 + 1, 2**64 + 1]
    drawn = [viewers(purpose, seed) for purpose in Purpose for seed in dict.fromkeys(map(int, seeds))]
    assert len(set().union(*drawn)) == sum(map(len, drawn))


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        next(population(Kind.DEFAULT, Purpose.REPORTING, -1))


def test_a_rate_between_two_classes_belongs_to_the_nearer() -> None:
    assert [Viewer(rate).rate_class for rate in (0.1, 1.6, 1.8, 10.0, 12.0, 90.0)] == [
        "light",
        "light",
        "medium",
        "medium",
        "heavy",
        "heavy",
    ]
