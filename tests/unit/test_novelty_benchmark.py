"""The arithmetic of the benchmark of novel topics."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import novelty
from benchmarks.novelty import Case, Watches, by_chance, by_neighbours, by_popularity, hits, learn_graph, measured
from streams.choosing import NONE
from tests.builders import make_registry


def watches(*history: tuple[int, list[int]]) -> Watches:
    viewers = np.concatenate([np.full(len(clusters), viewer) for viewer, clusters in history])
    clusters = np.concatenate([clusters for _, clusters in history])
    return Watches(viewers, clusters, np.arange(len(clusters)))


def case() -> Case:
    learned = watches(*[(viewer, [0, 0, 1, 1]) for viewer in range(30)], *[(v, [2, 2, 3, 3, 4]) for v in range(30, 50)])
    before, after = watches((100, [0, 0]), (101, [2, 2, 2, 0])), watches((100, [0, 1]), (101, [2, 5]))
    return Case(make_registry(clusters=6), learned, before, after, least_viewers=20)


def test_a_hit_is_a_first_watch_of_a_proposed_cluster() -> None:
    assert hits(case(), np.array([[1, 2, 3], [1, 3, 4]])).tolist() == [True, False]
    # What was watched before is no hit, and no proposal hits nothing.
    assert hits(case(), np.array([[0, 2, 3], [2, 0, NONE]])).tolist() == [False, False]
    assert hits(case(), np.array([[NONE] * 3, [4, 5, 3]])).tolist() == [False, True]


def test_nobody_is_proposed_what_they_watched() -> None:
    for propose in (by_popularity, by_neighbours, by_chance):
        proposed = propose(case())
        assert 0 not in proposed[0]
        assert not {0, 2} & set(proposed[1].tolist())
        assert (proposed != NONE).all()


def test_the_others_rank_by_what_they_say() -> None:
    assert by_popularity(case())[0].tolist() == [1, 2, 3]
    assert by_neighbours(case())[0][0] == 1
    # Whoever watches 2 most is led to what its viewers watched, which fewer did.
    assert by_popularity(case())[1][0] == 1
    assert set(by_neighbours(case())[1].tolist()[:2]) == {3, 4}


def test_the_graph_is_learned_from_others() -> None:
    assert len(learn_graph(case())) == 2


def test_differences_are_of_the_same_viewers() -> None:
    always, never = (lambda _: np.array([[1, 2, 3], [5, 3, 4]])), (lambda _: np.full((2, 3), NONE))
    found = measured([case()], {novelty.OURS: always, "never": never})
    assert found[novelty.OURS]["hit_rate"] == 1.0
    assert found["never"] == {"hit_rate": 0.0, "error": 0.0, "ours_minus_it": 1.0, "error_of_difference": 0.0}


def test_a_seed_gives_one_world_and_training_viewers_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(novelty, "TRAINING", 20)
    monkeypatch.setattr(novelty, "TESTED", 10)
    first, again, other = (novelty.simulated(seed, structure=True) for seed in (1, 1, 2))
    assert first.before.clusters.tolist() == again.before.clusters.tolist()
    assert first.before.clusters.tolist() != other.before.clusters.tolist()
    assert not set(first.learned.viewers.tolist()) & set(first.before.viewers.tolist())
    assert set(first.before.viewers.tolist()) == set(first.after.viewers.tolist())
    assert max(np.bincount(first.after.viewers)) == novelty.FOLLOWING
