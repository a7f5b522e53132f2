from __future__ import annotations

import numpy as np
import pytest

from agents.clusters.build import build
from agents.clusters.embedding import unit_length
from agents.clusters.hierarchy import parent_centroids, parent_count, parents_of
from tests.cluster_samples import WordVectors, catalogue


@pytest.mark.parametrize(("clusters", "parents"), [(1, 1), (2, 1), (8, 4), (64, 16), (118, 22), (1024, 64)])
def test_number_of_parents(clusters: int, parents: int) -> None:
    assert parent_count(clusters) == parents


def test_close_centroids_share_a_parent() -> None:
    random = np.random.default_rng(1)
    roots = random.normal(size=(3, 16))
    order = random.permutation(12)
    centroids = unit_length(np.repeat(roots, 4, axis=0) + 0.1 * random.normal(size=(12, 16)))[order]
    found = parents_of(centroids, 3)
    truth = np.repeat(np.arange(3), 4)[order]
    assert len({(parent, root) for parent, root in zip(found.tolist(), truth.tolist(), strict=True)}) == 3
    first = [found.tolist().index(parent) for parent in range(3)]
    assert first == sorted(first)


def test_one_parent_is_over_everything() -> None:
    assert parents_of(unit_length(np.eye(3)), 1).tolist() == [0, 0, 0]


def test_a_parents_centroid_weighs_clusters_by_their_videos() -> None:
    centroids = unit_length(np.eye(3))
    found = parent_centroids(centroids, np.array([3, 4, 9]), np.array([0, 0, 1], np.int32))
    assert found == pytest.approx(np.array([[0.6, 0.8, 0], [0, 0, 1]]), abs=1e-6)


def test_every_cluster_of_a_registry_has_a_parent_with_a_name() -> None:
    snapshot = build(catalogue(), WordVectors(), clusters=12)
    registry = snapshot.registry()
    assert {card.parent for card in snapshot.cards} == set(registry.parents)
    labels = [parent.label for parent in snapshot.parents]
    assert len(set(labels)) == len(labels) == parent_count(12)
    for parent in snapshot.parents:
        assert 3 <= len(parent.query.split()) <= 8
        assert parent.titles
        assert parent.terms
