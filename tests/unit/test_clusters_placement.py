from __future__ import annotations

import numpy as np
import pytest

from agents.clusters import placement
from agents.clusters.build import build
from agents.clusters.catalogue import catalogue_of
from agents.clusters.embedding import Vectors, unit_length
from agents.clusters.extend import extend
from agents.clusters.placement import WANTED_REJECTED, calibrate, place
from streams.records import UNASSIGNED
from tests.cluster_samples import WordVectors, catalogue

TOPICS = 30


def blobs(seed: int, per_topic: int, *, centres: int = 0) -> tuple[Vectors, np.ndarray[tuple[int], np.dtype[np.int32]]]:
    """Noisy videos around 30 directions; `centres` chooses which directions."""
    directions = unit_length(np.random.default_rng(centres).normal(size=(TOPICS, 48)))
    noise = np.random.default_rng(1000 + seed).normal(size=(TOPICS * per_topic, 48)) * 0.12
    members = np.repeat(np.arange(TOPICS, dtype=np.int32), per_topic)
    return unit_length(directions[members] + noise), members


def centroids_of(vectors: Vectors, members: np.ndarray[tuple[int], np.dtype[np.int32]]) -> Vectors:
    return unit_length(np.stack([vectors[members == topic].mean(axis=0) for topic in range(TOPICS)]))


def test_a_video_between_clusters_scores_less_than_one_inside() -> None:
    centroids = np.eye(3, 48, dtype=np.float32)
    inside = np.eye(1, 48, dtype=np.float32)
    between = unit_length(centroids.sum(axis=0, keepdims=True))
    rows, scores = place(np.concatenate([inside, between]), centroids)
    assert rows[0] == 0
    assert scores.tolist() == pytest.approx([2.0, 3**-0.5])  # cosine 1, leads by 1; cosine .58, leads by 0


def test_the_wanted_share_of_videos_that_come_later_is_rejected() -> None:
    vectors, members = blobs(1, 40)
    found = calibrate(vectors, members, TOPICS)
    later, truth = blobs(2, 200)
    rows, scores = place(later, centroids_of(vectors, members))
    assert np.mean(scores < found.threshold) == pytest.approx(WANTED_REJECTED, abs=0.015)
    assert found.rejected == pytest.approx(WANTED_REJECTED, abs=0.02)
    assert found.same_cluster == pytest.approx(np.mean(rows == truth), abs=0.02)
    assert found.held_out == len(vectors)


def test_unseen_topics_are_mostly_rejected_as_the_calibration_says() -> None:
    vectors, members = blobs(1, 40)
    found = calibrate(vectors, members, TOPICS)
    unseen, _ = blobs(3, 40, centres=7)
    accepted = np.mean(place(unseen, centroids_of(vectors, members))[1] >= found.threshold)
    assert accepted < 0.25
    assert found.accepted_elsewhere == pytest.approx(accepted, abs=0.1)


def test_steps_and_samples_change_little(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, members = blobs(1, 40)
    whole = calibrate(vectors, members, TOPICS)
    placed = place(vectors, centroids_of(vectors, members))
    monkeypatch.setattr(placement, "_ROWS_AT_ONCE", 7)
    stepwise = calibrate(vectors, members, TOPICS)
    assert stepwise.threshold == pytest.approx(whole.threshold, abs=1e-3)
    assert np.array_equal(place(vectors, centroids_of(vectors, members))[0], placed[0])
    monkeypatch.setattr(placement, "_HELD_OUT", 400)
    sampled = calibrate(vectors, members, TOPICS)
    assert sampled.held_out == 400
    assert sampled.threshold == pytest.approx(whole.threshold, abs=0.1)


def test_videos_alone_in_their_cluster_set_no_threshold() -> None:
    vectors, _ = blobs(1, 1)
    alone = calibrate(vectors, np.arange(TOPICS, dtype=np.int32), TOPICS)
    assert (alone.held_out, alone.threshold) == (0, 1.0)
    single = place(vectors, vectors[:1])
    assert single[1].tolist() == pytest.approx((vectors @ vectors[0]).tolist(), abs=1e-6)


def test_a_registry_records_its_calibration_and_would_take_its_own_videos_again() -> None:
    snapshot = build(catalogue(), WordVectors(), clusters=4)
    recorded = snapshot.history[0]["placement"]
    assert recorded["threshold"] == snapshot.threshold
    assert recorded["wanted_rejected"] == WANTED_REJECTED
    again = [{"video_id": f"again-{v.video_id}", "title": v.title, "tags": list(v.tags)} for v in catalogue().videos]
    after = extend(snapshot, catalogue_of("again", again), WordVectors()).snapshot.registry()
    clusters = after.clusters_of([str(row["video_id"]) for row in again])
    assert np.mean(clusters != UNASSIGNED) >= 0.9
