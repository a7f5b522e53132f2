from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pytest

from agents.clusters.catalogue import CatalogueError, catalogue_of, read_field
from agents.clusters.evaluate import evaluate, tfidf_svd
from tests.cluster_samples import WordVectors, rows, topic_of

REFERENCE = {str(row["video_id"]): (topic_of(str(row["video_id"])),) for row in rows()}


def test_every_method_finds_clear_topics_on_the_same_text() -> None:
    found = evaluate(catalogue_of("sample", rows()), REFERENCE, "topic", WordVectors(), clusters=4)
    assert (found.videos, found.values, found.clusters) == (48, 4, 4)
    assert set(found.methods) == {"registry", "minilm_kmeans", "tfidf_svd_kmeans"}
    assert all(len(each.first_value) == 3 for each in found.methods.values())
    assert found.methods["registry"].first_value == (1.0, 1.0, 1.0)


def test_the_field_is_held_back_from_the_text() -> None:
    numbered = [{**row, "title": "a video", "category": [f"kind {n % 4}"]} for n, row in enumerate(rows())]
    given = catalogue_of("sample", numbered)
    reference = {video.video_id: video.category for video in given.videos}
    hidden = evaluate(given, reference, "category", WordVectors(), clusters=4, seeds=[0])
    shown = evaluate(given, reference, "other", WordVectors(), clusters=16, seeds=[0])
    assert abs(hidden.methods["registry"].first_value[0]) < 0.1
    assert shown.methods["registry"].first_value[0] > 0.5


def test_several_values_count_first_or_all() -> None:
    both = {video_id: (*topics, "shared by all") for video_id, topics in REFERENCE.items()}
    found = evaluate(catalogue_of("sample", rows()), both, "topic", WordVectors(), clusters=4, seeds=[0])
    assert found.values == 4
    assert found.methods["registry"].first_value == (1.0,)
    assert 0.2 < found.methods["registry"].all_values[0] < 0.8


def test_videos_without_a_value_or_text_are_left_out() -> None:
    more: list[dict[str, object]] = [
        *rows(),
        {"video_id": "silent"},
        {"video_id": "unlabelled", "title": "jazz chords"},
    ]
    reference = REFERENCE | {"silent": ("chess endgames",)}
    found = evaluate(catalogue_of("sample", more), reference, "topic", WordVectors(), clusters=4, seeds=[0])
    assert found.videos == 48


def test_one_value_is_nothing_to_compare_with() -> None:
    with pytest.raises(CatalogueError, match="1 different values of 'topic'"):
        evaluate(catalogue_of("sample", rows()), dict.fromkeys(REFERENCE, ("one",)), "topic", WordVectors())


def test_texts_without_a_common_word_still_have_features() -> None:
    assert tfidf_svd(["alpha", "beta", "gamma"]).shape == (3, 1)
    assert tfidf_svd(["alpha alpha", "alpha", "gamma"]).shape[0] == 3
    texts = ["rook pawn", "rook king", "jazz chords", "jazz swing"] * 3
    vectors = tfidf_svd(texts)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3


@pytest.mark.parametrize("name", ["videos.jsonl", "videos.csv"])
def test_any_field_can_be_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("csv"):
        path.write_text("video_id,title,genre,year\na,A,jazz|blues,1999\nb,B,,2000\n")
    else:
        lines: list[dict[str, object]] = [
            {"video_id": "a", "title": "A", "genre": ["jazz", "blues"], "year": 1999},
            {"video_id": "b", "title": "B", "year": 2000},
            {"video_id": 7, "genre": ["lost"]},
        ]
        path.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    assert read_field(path, "genre") == {"a": ("jazz", "blues")}
    assert read_field(path, "year") == {"a": ("1999",), "b": ("2000",)}
    with pytest.raises(CatalogueError, match=r"no video of .* has a field 'topic'"):
        read_field(path, "topic")
