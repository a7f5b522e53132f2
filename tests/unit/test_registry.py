from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.clusters.snapshot import text_column, video_table
from streams.identifiers import video_key
from streams.records import UNASSIGNED
from streams.registry import ClusterCard, Neighbours, Registry, VideoTable, bucket_offsets

NONE = Neighbours(np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32))


def card(cluster_id: int, prior: float) -> ClusterCard:
    return ClusterCard(cluster_id, f"label {cluster_id}", "some query words", ("t",), ("t",), 1, prior, 0.5, False)


def make(videos: dict[str, tuple[int, str]]) -> Registry:
    ids = list(videos)
    clusters = np.array([cluster for cluster, _ in videos.values()], np.int32)
    neighbours = Neighbours(
        np.array([[7, 9], [3, 9], [7, 3]], np.int32), np.array([[0.5, 0.1], [0.5, 0.2], [0.2, 0.1]], np.float32)
    )
    return Registry(
        version=4,
        checksum="c",
        lineage="l",
        cards=[card(9, 0.6), card(3, 0.3), card(7, 0.3)],
        neighbours=neighbours,
        videos=video_table(ids, [title for _, title in videos.values()], clusters),
    )


KNOWN = {"a": (3, "Title of a"), "b": (UNASSIGNED, "größer 漢字"), "": (7, ""), "d" * 500: (9, "long id")}


def test_looks_up_what_it_holds() -> None:
    registry = make(KNOWN)
    assert len(registry) == 4
    for video_id, (cluster, title) in KNOWN.items():
        assert registry.cluster_of(video_id) == cluster
        assert registry.knows(video_id)
        assert registry.title_of(video_id) == (title or None)
        assert registry.video_of(video_key(video_id)) == video_id


def test_unknown_videos_are_unassigned_and_not_known() -> None:
    registry = make(KNOWN)
    assert registry.cluster_of("nobody") == UNASSIGNED
    assert not registry.knows("nobody")
    assert registry.title_of("nobody") is None
    assert registry.video_of(video_key("nobody")) is None
    assert registry.video_of(2**64 - 1) is None
    assert registry.clusters_of(["nobody", "a", "b", "a"]).tolist() == [UNASSIGNED, 3, UNASSIGNED, 3]


def test_a_registry_without_videos_answers() -> None:
    registry = make({})
    assert registry.cluster_of("a") == UNASSIGNED
    assert registry.clusters_of(["a", "b"]).tolist() == [UNASSIGNED, UNASSIGNED]
    assert registry.clusters_of([]).tolist() == []
    assert registry.video_of(0) is None


def test_clusters_are_ordered_by_id_and_the_prior_follows_them() -> None:
    registry = make(KNOWN)
    assert registry.cluster_ids.tolist() == [3, 7, 9]
    assert list(registry.cards) == [3, 7, 9]
    assert registry.prior.tolist() == pytest.approx([0.25, 0.25, 0.5])
    assert registry.prior.dtype == np.float64


def test_similar_clusters_are_those_of_the_right_row() -> None:
    registry = make(KNOWN)
    assert [cluster for cluster, _ in registry.similar(3)] == [7, 9]
    assert [cosine for _, cosine in registry.similar(3)] == pytest.approx([0.5, 0.1])
    assert [cluster for cluster, _ in registry.similar(9)] == [7, 3]
    with pytest.raises(KeyError):
        registry.similar(4)


@given(
    st.dictionaries(st.text(max_size=8), st.tuples(st.sampled_from([-1, 3, 7, 9]), st.text(max_size=20))),
    st.lists(st.text(max_size=8)),
)
def test_agrees_with_a_dictionary(videos: dict[str, tuple[int, str]], asked: list[str]) -> None:
    registry = make(videos)
    asked = asked + list(videos)
    expected = [videos[video_id][0] if video_id in videos else UNASSIGNED for video_id in asked]
    assert registry.clusters_of(asked).tolist() == expected
    assert [registry.cluster_of(video_id) for video_id in asked] == expected
    assert [registry.knows(video_id) for video_id in asked] == [video_id in videos for video_id in asked]
    assert [registry.title_of(video_id) for video_id in videos] == [title or None for _, title in videos.values()]


def test_lookup_by_keys_keeps_the_shape_and_all_64_bits() -> None:
    registry = make({f"v{i}": (3, "") for i in range(200)})
    keys = np.array([[video_key("v1"), video_key("v1") ^ 1], [video_key("v199"), 2**64 - 1]], np.uint64)
    assert registry.clusters_of_keys(keys).tolist() == [[3, UNASSIGNED], [3, UNASSIGNED]]
    # Neighbouring keys differ in bits that a float64 does not hold.
    assert all(registry.video_of(video_key(f"v{i}") ^ 1) is None for i in range(200))


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=200), st.integers(0, 63))
def test_keys_that_crowd_together_are_found(numbers: list[int], shift: int) -> None:
    """However the keys' first bits fall, as many alike as there can be."""
    keys = np.unique(np.array([number >> shift for number in numbers], np.uint64))
    text = text_column([""] * len(keys))
    clusters = np.arange(len(keys), dtype=np.int32)
    table = VideoTable(keys, clusters, text, text, bucket_offsets(keys))
    registry = Registry(version=1, checksum="", lineage="", cards=[card(0, 1)], neighbours=NONE, videos=table)
    assert registry.clusters_of_keys(keys).tolist() == clusters.tolist()
    near = np.concatenate([keys + np.uint64(1), keys - np.uint64(1), np.array([0, 2**64 - 1], np.uint64)])
    expected = {int(key): cluster for key, cluster in zip(keys.tolist(), clusters.tolist(), strict=True)}
    assert registry.clusters_of_keys(near).tolist() == [expected.get(key, UNASSIGNED) for key in near.tolist()]
    assert [registry.video_of(key) for key in near.tolist()] == [
        "" if key in expected else None for key in near.tolist()
    ]


def test_successors_answer_for_retired_clusters() -> None:
    table = video_table([], [], np.zeros(0, np.int32))
    registry = Registry(
        version=3,
        checksum="",
        lineage="",
        cards=[card(4, 0.5), card(6, 0.5)],
        neighbours=NONE,
        videos=table,
        successors={1: 6, 2: UNASSIGNED},
    )
    assert [registry.successor_of(cluster) for cluster in (4, 6, 1, 2, 3, UNASSIGNED)] == [4, 6, 6, -1, -1, -1]
    assert make(KNOWN).successor_of(9) == 9


def test_text_columns_hold_any_text() -> None:
    texts = ["", "plain", "größer", "", "漢字", "🎬"]
    column = text_column(texts)
    assert len(column) == len(texts)
    assert [column[row] for row in range(len(column))] == texts
