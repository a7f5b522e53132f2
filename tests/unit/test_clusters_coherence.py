from __future__ import annotations

import numpy as np
import pytest

from agents.clusters.build import build
from agents.clusters.catalogue import catalogue_of
from agents.clusters.coherence import coherence, pair_cosines, surrogate
from agents.clusters.embedding import Vectors, unit_length
from tests.cluster_samples import WORDS, WordVectors, catalogue, rows


def groups(count: int, size: int, spread: float) -> tuple[Vectors, np.ndarray[tuple[int], np.dtype[np.int32]]]:
    """Points around random centres, nearer to them the smaller `spread` is."""
    random = np.random.default_rng(3)
    centres = np.repeat(random.normal(size=(count, 32)), size, axis=0)
    return unit_length(centres + spread * random.normal(size=centres.shape)), np.repeat(
        np.arange(count, dtype=np.int32), size
    )


def test_pair_cosines_are_the_mean_over_all_pairs_of_a_cluster() -> None:
    vectors, members = groups(3, 5, 1.0)
    found = pair_cosines(vectors, members, 4)
    for cluster in range(3):
        own = vectors[members == cluster]
        pairs = [float(own[i] @ own[j]) for i in range(5) for j in range(i)]
        assert found[cluster] == pytest.approx(np.mean(pairs), abs=1e-5)
    assert found[3] == -1


def test_a_video_alone_shows_no_topic() -> None:
    vectors, members = groups(3, 6, 0.2)
    members[0] = 3
    assert not coherence(vectors, members, 4).coherent[3]


def test_tight_groups_hold_together_and_a_mixture_of_them_does_not() -> None:
    vectors, members = groups(12, 30, 0.3)
    mixed = members.copy()
    mixed[:: 30 // 3] = 12  # three of every group
    found = coherence(vectors, mixed, 13)
    assert found.coherent[:12].all()
    assert not found.coherent[12]


def test_pieces_of_one_cloud_are_no_topics() -> None:
    cloud = unit_length(np.random.default_rng(4).normal(size=(400, 32)))
    pieces = np.argmax(cloud[:, :10], axis=1).astype(np.int32)
    assert coherence(cloud, pieces, 10).coherent.mean() <= 0.2


def test_the_surrogate_is_as_wide_as_the_vectors_and_has_no_groups() -> None:
    vectors, members = groups(4, 100, 0.1)
    made = surrogate(vectors, np.random.default_rng(5))
    assert made.shape == vectors.shape
    assert np.linalg.norm(made, axis=1) == pytest.approx(1, abs=1e-5)
    assert np.abs(made.mean(axis=0) - vectors.mean(axis=0)).max() < 0.1
    assert pair_cosines(made, members, 4).max() < pair_cosines(vectors, members, 4).min() - 0.3


def test_a_built_registry_names_topics_and_holds_the_grab_bag_back() -> None:
    odd: list[dict[str, object]] = [
        {"video_id": f"odd-{number}", "title": " ".join(f"word{number}x{place}" for place in range(5))}
        for number in range(12)
    ]
    snapshot = build(catalogue_of("sample", rows() + odd), WordVectors(), clusters=5)
    statable = {card.label for card in snapshot.cards if card.statable}
    assert statable == set(WORDS)
    (grab_bag,) = (card for card in snapshot.cards if not card.coherent)
    assert set(grab_bag.titles) <= {str(video["title"]) for video in odd}


def test_the_same_build_marks_the_same_clusters() -> None:
    first, second = (build(catalogue(), WordVectors(), clusters=6) for _ in range(2))
    assert [card.coherent for card in first.cards] == [card.coherent for card in second.cards]
