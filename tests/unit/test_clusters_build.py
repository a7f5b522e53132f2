from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from agents.clusters import build as build_module
from agents.clusters.build import build, default_cluster_count, is_sensitive
from agents.clusters.catalogue import Catalogue, Video, catalogue_of
from agents.clusters.events import WatchCounts
from agents.clusters.naming import terms_of
from agents.clusters.snapshot import RegistryError, RegistrySnapshot
from streams.records import UNASSIGNED
from tests.cluster_samples import WORDS, WordVectors, catalogue, rows, topic_of


def built(
    source: Catalogue | None = None, clusters: int | None = 4, watches: WatchCounts | None = None
) -> RegistrySnapshot:
    return build(source or catalogue(), WordVectors(), clusters=clusters, watches=watches)


def test_clear_topics_become_clusters_with_their_names() -> None:
    registry = built().registry()
    for row in rows():
        video_id = str(row["video_id"])
        assert registry.cards[registry.cluster_of(video_id)].label == topic_of(video_id)


def test_every_card_is_fit_to_be_shown() -> None:
    snapshot = built(clusters=8)
    labels = [card.label for card in snapshot.cards]
    assert len(set(labels)) == len(labels)
    for card in snapshot.cards:
        assert 1 <= len(card.label.split()) <= 5
        assert card.label == card.label.lower()
        assert 3 <= len(card.query.split()) <= 8
        assert 1 <= len(card.titles) <= 5
        assert len(set(card.titles)) == len(card.titles)
        assert -1 <= card.cohesion <= 1
        assert card.terms
        assert card.viewers is None
    assert sum(card.prior for card in snapshot.cards) == pytest.approx(1, abs=1e-6)
    assert sum(card.support for card in snapshot.cards) == len(catalogue().videos)


def test_neighbours_are_the_others_by_falling_cosine() -> None:
    snapshot = built(clusters=6)
    registry = snapshot.registry()
    for cluster in registry.cluster_ids.tolist():
        similar = registry.similar(cluster)
        cosines = [cosine for _, cosine in similar]
        assert sorted({other for other, _ in similar} | {cluster}) == registry.cluster_ids.tolist()
        assert cosines == sorted(cosines, reverse=True)
        expected = [float(snapshot.centroids[cluster] @ snapshot.centroids[other]) for other, _ in similar]
        assert cosines == pytest.approx(expected, abs=1e-6)


def test_the_same_videos_in_any_order_give_the_same_bytes() -> None:
    shuffled = rows()
    random.Random(5).shuffle(shuffled)
    first, second = built(), built(catalogue_of("sample", shuffled))
    assert first.registry().checksum == second.registry().checksum


def test_what_must_not_be_used_changes_nothing() -> None:
    with_truth = [{**row, "topic": f"truth {number}", "views": number} for number, row in enumerate(rows())]
    assert built(catalogue_of("sample", with_truth)).registry().checksum == built().registry().checksum


def test_large_catalogues_start_from_a_seeded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "_STARTED_FROM", 20)
    monkeypatch.setattr(build_module, "_FITTED_ON", 40)
    monkeypatch.setattr(build_module, "_ROWS_AT_ONCE", 7)
    first, second = built(), built()
    assert first.registry().checksum == second.registry().checksum
    registry = first.registry()
    for topic in WORDS:
        clusters = registry.clusters_of([str(row["video_id"]) for row in rows() if row["tags"] == [topic]])
        assert np.bincount(clusters).max() >= 10


def test_small_clusters_are_dissolved_unless_their_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "default_cluster_count", lambda videos: 5)
    odd: list[dict[str, object]] = [{"video_id": "odd", "title": "unrelated words entirely", "tags": ["nothing else"]}]
    assert len(built(catalogue_of("sample", rows() + odd), clusters=5).cards) == 5
    snapshot = built(catalogue_of("sample", rows() + odd), clusters=None)
    assert len(snapshot.cards) == 4
    assert snapshot.registry().cluster_of("odd") != UNASSIGNED


def test_videos_without_text_are_known_but_unassigned() -> None:
    silent: list[dict[str, object]] = [{"video_id": "silent"}, {"video_id": "blank", "title": " "}]
    snapshot = built(catalogue_of("sample", rows() + silent))
    registry = snapshot.registry()
    assert registry.knows("silent")
    assert registry.cluster_of("silent") == UNASSIGNED
    assert registry.cluster_of("blank") == UNASSIGNED
    assert sum(card.support for card in snapshot.cards) == len(rows())


@pytest.mark.parametrize(("videos", "clusters"), [(1, 1), (10, 8), (200, 9), (2_200, 100), (10_000_000, 1024)])
def test_default_number_of_clusters(videos: int, clusters: int) -> None:
    assert default_cluster_count(videos) == clusters


@pytest.mark.parametrize("clusters", [1, 49])
def test_impossible_numbers_of_clusters_are_refused(clusters: int) -> None:
    with pytest.raises(RegistryError, match="sample has 48 videos"):
        built(clusters=clusters)


def test_a_catalogue_of_one_video_is_refused() -> None:
    with pytest.raises(RegistryError, match="larger catalogue"):
        built(catalogue_of("one", [{"video_id": "a", "title": "alone"}]), clusters=None)


def test_watches_give_viewers_and_a_prior_in_which_every_viewer_weighs_the_same() -> None:
    counts = {(0, "jazz-guitar-1"): 900, (0, "jazz-guitar-2"): 100, (1, "trail-running-0"): 1, (1, "elsewhere"): 5}
    snapshot = built(watches=WatchCounts("log", counts, viewers=2, bad_lines=0))
    by_label = {card.label: card for card in snapshot.cards}
    assert {label: card.viewers for label, card in by_label.items()} == {
        "jazz guitar": 1,
        "trail running": 1,
        "sourdough baking": 0,
        "chess endgames": 0,
    }
    assert by_label["jazz guitar"].prior == pytest.approx(2 / 6)
    assert by_label["trail running"].prior == pytest.approx(2 / 6)
    assert by_label["chess endgames"].prior == pytest.approx(1 / 6)
    assert snapshot.history[0]["watches"] == 1006


def test_labels_are_words_whatever_the_catalogue_holds() -> None:
    hostile = [
        "<script>alert(1)</script>",
        "[bold]x[/bold]",
        "{0.__class__}",
        "'; DROP TABLE personas; --",
        "the of and",
        "z" * 900,
    ]
    made: list[dict[str, object]] = [
        {"video_id": f"h{number}", "title": f"{hostile[number % 6]} {number}", "tags": [hostile[(number + 1) % 6]]}
        for number in range(40)
    ]
    snapshot = built(catalogue_of("hostile", made), clusters=5)
    for card in snapshot.cards:
        for text in (card.label, card.query, *card.terms):
            assert not set(text) & set('<>[]{}();%$`\\"\n')
        assert card.label not in {"the", "of", "and"}
        assert all(len(word) <= 30 for word in (*card.label.split(), *card.query.split()))


def test_clusters_without_any_word_still_have_distinct_labels() -> None:
    made: list[dict[str, object]] = [{"video_id": f"n{number}", "title": "the of and"} for number in range(12)]
    made += [{"video_id": f"m{number}", "title": "!!! ???"} for number in range(12)]
    snapshot = built(catalogue_of("empty words", made), clusters=2)
    labels = [card.label for card in snapshot.cards]
    assert len(set(labels)) == len(labels)
    assert all(3 <= len(card.query.split()) <= 8 for card in snapshot.cards)


def test_terms_skip_stop_words_and_do_not_cross_punctuation() -> None:
    video = Video(
        "v",
        "How to bake: rye bread, don\N{RIGHT SINGLE QUOTATION MARK}t panic",
        ("Bread Baking", "one two three four"),
        ("Food & Drink",),
    )
    assert terms_of(video) == {"bake", "rye", "bread", "rye bread", "panic", "bread baking", "food drink"}


@pytest.mark.parametrize(
    ("names", "titles", "sensitive"),
    [
        (["cancer stories"], [], True),
        (["sourdough"], ["Bread"] * 20, False),
        (["talks"], ["Living with diabetes", "My diabetes diary"] + ["Bread"] * 18, True),
        (["talks"], ["Living with diabetes"] + ["Bread"] * 19, False),
        (["sussex walks"], ["Essex countryside", "Gayle's garden"] * 5, False),
        (["choir"], ["Sunday sermons", "Sermon on hope"] * 5, True),
    ],
)
def test_sensitive_topics(names: list[str], titles: list[str], sensitive: bool) -> None:
    assert is_sensitive(names, [Video(str(number), title) for number, title in enumerate(titles)]) is sensitive


def test_the_version_is_part_of_the_checksum() -> None:
    assert replace(built(), version=2).registry().checksum != built().registry().checksum
