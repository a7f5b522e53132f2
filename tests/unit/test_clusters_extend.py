from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from agents.clusters import snapshot as snapshot_module
from agents.clusters.build import build
from agents.clusters.catalogue import catalogue_of
from agents.clusters.extend import extend
from agents.clusters.snapshot import RegistryError, RegistrySnapshot, merged, text_column, video_table
from streams.records import UNASSIGNED
from tests.cluster_samples import WordVectors, catalogue, rows

NEW: list[dict[str, object]] = [
    {"video_id": "new-1", "title": "crumb and crust number 1", "tags": ["sourdough baking"]},
    {"video_id": "new-2", "title": "rook and pawn number 1", "tags": ["chess endgames"]},
    {"video_id": "far", "title": "entirely different subject"},
    {"video_id": "silent"},
    {"video_id": "jazz-guitar-3", "title": "rook and pawn", "tags": ["chess endgames"]},
]


@pytest.fixture(scope="module")
def base() -> RegistrySnapshot:
    return build(catalogue(), WordVectors(), clusters=4)


def test_new_videos_join_their_nearest_cluster_or_none(base: RegistrySnapshot) -> None:
    result = extend(base, catalogue_of("new", NEW), WordVectors())
    before, after = base.registry(), result.snapshot.registry()
    assert (result.placed, result.unassigned, result.known) == (2, 2, 1)
    assert after.cluster_of("new-1") == before.cluster_of("sourdough-baking-0")
    assert after.cluster_of("new-2") == before.cluster_of("chess-endgames-0")
    for video_id in ("far", "silent"):
        assert after.cluster_of(video_id) == UNASSIGNED
        assert after.knows(video_id)
        assert not before.knows(video_id)
    assert after.title_of("new-2") == "rook and pawn number 1"
    assert after.title_of("silent") is None


def test_what_was_there_stays(base: RegistrySnapshot) -> None:
    result = extend(base, catalogue_of("new", NEW), WordVectors())
    before, after = base.registry(), result.snapshot.registry()
    ids = [str(row["video_id"]) for row in rows()]
    assert after.clusters_of(ids).tolist() == before.clusters_of(ids).tolist()
    assert [after.title_of(video_id) for video_id in ids] == [before.title_of(video_id) for video_id in ids]
    assert np.array_equal(result.snapshot.centroids, base.centroids)
    assert after.lineage == before.lineage
    assert after.checksum != before.checksum
    assert after.version == before.version + 1
    assert after.prior.tolist() == before.prior.tolist()
    assert [card.label for card in after.cards.values()] == [card.label for card in before.cards.values()]


def test_an_extended_rebuild_still_names_the_successors(base: RegistrySnapshot) -> None:
    rebuilt = replace(base, successors={9: 2}, lineage="first")
    after = extend(rebuilt, catalogue_of("new", NEW), WordVectors()).snapshot.registry()
    assert (after.successor_of(9), after.lineage) == (2, "first")


def test_support_counts_the_new_videos(base: RegistrySnapshot) -> None:
    result = extend(base, catalogue_of("new", NEW), WordVectors())
    gained = {a.label: a.support - b.support for a, b in zip(result.snapshot.cards, base.cards, strict=True)}
    assert gained == {"sourdough baking": 1, "chess endgames": 1, "jazz guitar": 0, "trail running": 0}


def test_the_same_offer_gives_the_same_version(base: RegistrySnapshot) -> None:
    first = extend(base, catalogue_of("new", NEW), WordVectors())
    second = extend(base, catalogue_of("new", NEW[::-1]), WordVectors())
    assert first.snapshot.registry().checksum == second.snapshot.registry().checksum


def test_an_unassigned_video_is_tried_again_when_it_comes_with_text(base: RegistrySnapshot) -> None:
    once = extend(base, catalogue_of("new", NEW), WordVectors()).snapshot
    nothing = extend(once, catalogue_of("again", [{"video_id": "far"}]), WordVectors())
    assert (nothing.placed, nothing.unassigned, nothing.known) == (0, 0, 1)
    assert nothing.snapshot.registry().title_of("far") == "entirely different subject"
    better = [{"video_id": "far", "title": "chords and bebop", "tags": ["jazz guitar"]}]
    again = extend(once, catalogue_of("again", better), WordVectors())
    assert again.placed == 1
    assert again.snapshot.registry().title_of("far") == "chords and bebop"
    assert len(again.snapshot.registry()) == len(once.registry())


def test_an_empty_offer_is_a_version_too(base: RegistrySnapshot) -> None:
    result = extend(base, catalogue_of("nothing", []), WordVectors())
    assert result.snapshot.version == 2
    assert len(result.snapshot.registry()) == len(base.registry())
    assert [step["step"] for step in result.snapshot.history] == ["build", "extend"]


def test_centroids_of_another_model_are_refused(base: RegistrySnapshot) -> None:
    with pytest.raises(RegistryError, match="other-model"):
        extend(replace(base, embedding="other-model"), catalogue_of("new", NEW), WordVectors())


def test_ids_with_the_same_key_are_refused(base: RegistrySnapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_module, "video_keys", lambda ids: b"".join(len(i).to_bytes(8, "little") for i in ids))
    first = video_table(["a", "bb"], ["", ""], np.zeros(2, np.int32))
    with pytest.raises(RegistryError, match="'bb' and 'cc' have the same 64-bit key"):
        video_table(["a", "bb", "cc"], ["", "", ""], np.zeros(3, np.int32))
    with pytest.raises(RegistryError, match="'bb' and 'cc'"):
        merged(first, video_table(["cc"], [""], np.zeros(1, np.int32)))


def test_merging_in_small_steps_keeps_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_module, "_ROWS_AT_ONCE", 3)
    ids = [f"видео-{number}" for number in range(50)]
    titles = ["🎬" * (number % 4) for number in range(50)]
    clusters = np.arange(50, dtype=np.int32)
    old = video_table(ids[:30], titles[:30], clusters[:30])
    table = merged(old, video_table(ids[20:], titles[20:], clusters[20:]))
    found = {table.ids[row]: (table.titles[row], int(table.clusters[row])) for row in range(len(table.keys))}
    assert found == {video_id: (titles[n], n) for n, video_id in enumerate(ids)}
    assert np.all(table.keys[:-1] < table.keys[1:])
    assert len(text_column([])) == 0
