"""Text that was learned from viewing is said only where enough viewers stand behind it."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents.clusters.build import build
from agents.clusters.catalogue import catalogue_of
from agents.clusters.events import WatchCounts
from agents.clusters.files import load_snapshot, write_snapshot
from agents.clusters.rebuild import rebuild
from agents.clusters.snapshot import RegistryError, RegistrySnapshot
from streams.registry import ClusterCard, Wording
from tests.cluster_samples import WordVectors, catalogue, rows

POPULAR = ("sourdough-baking", "trail-running", "chess-endgames")


def watched(viewers: dict[str, int]) -> WatchCounts:
    """So many viewers of each video whose id begins so; viewers of one topic watch all of its videos."""
    counts: dict[tuple[int, str], int] = {}
    for row in rows():
        video_id = str(row["video_id"])
        for prefix, number in viewers.items():
            if video_id.startswith(prefix):
                counts |= {(viewer, video_id): 1 for viewer in range(number)}
    return WatchCounts("log", counts, max(viewers.values()), 0)


def built(viewers: dict[str, int], least: int | None = 20, clusters: int = 4) -> RegistrySnapshot:
    return build(catalogue(), WordVectors(), clusters=clusters, watches=watched(viewers), least_viewers=least)


def card_of(snapshot: RegistrySnapshot, video_id: str) -> ClusterCard:
    registry = snapshot.registry()
    return registry.cards[registry.cluster_of(video_id)]


def said(card: ClusterCard) -> str:
    return " ".join((card.label, card.query, *card.titles, *card.terms))


def test_public_text_needs_no_viewers() -> None:
    card = card_of(built({"jazz-guitar": 1}, least=None), "jazz-guitar-0")
    assert (card.label, card.wording, card.viewers) == ("jazz guitar", Wording.OWN, 1)
    assert card.titles


def test_a_rare_cluster_speaks_in_its_parents_words_without_titles() -> None:
    snapshot = built({"jazz-guitar": 19} | dict.fromkeys(POPULAR, 20))
    rare = card_of(snapshot, "jazz-guitar-0")
    parent = snapshot.registry().parents[rare.parent]
    siblings = [card for card in snapshot.cards if card.parent == rare.parent and card is not rare]
    assert rare.wording is (Wording.PARENT if siblings else Wording.NONE)
    assert siblings, "the sample's rare topic shares a parent with another one"
    assert (rare.label, rare.query, rare.titles, rare.terms) == (parent.label, parent.query, (), ())
    assert rare.statable
    assert not rare.suggestible
    assert rare.support == 12
    assert "jazz" not in " ".join(map(said, snapshot.cards))
    assert "jazz" not in " ".join((*parent.titles, *parent.terms))
    for prefix in POPULAR:
        assert card_of(snapshot, f"{prefix}-0").wording is Wording.OWN


def test_one_more_viewer_and_it_speaks_for_itself() -> None:
    card = card_of(built({"jazz-guitar": 20} | dict.fromkeys(POPULAR, 20)), "jazz-guitar-0")
    assert (card.label, card.wording) == ("jazz guitar", Wording.OWN)
    assert card.titles


def test_without_viewers_anywhere_nothing_is_said() -> None:
    snapshot = built(dict.fromkeys(("jazz-guitar", *POPULAR), 19))
    for card in snapshot.cards:
        assert card.wording is Wording.NONE
        assert not card.statable
        assert (card.titles, card.terms) == ((), ())
        assert not {"jazz", "sourdough", "chess", "trail"} & set(said(card).split())
    assert all(not (parent.label or parent.query or parent.titles or parent.terms) for parent in snapshot.parents)


def test_a_title_needs_viewers_of_its_own() -> None:
    watches = watched(dict.fromkeys(("jazz-guitar", *POPULAR), 30))
    alone = {key: value for key, value in watches.counts.items() if key[1] != "jazz-guitar-3" or key[0] < 19}
    snapshot = build(
        catalogue(),
        WordVectors(),
        clusters=4,
        watches=WatchCounts("log", alone, 30, 0),
        least_viewers=20,
    )
    title = next(str(row["title"]) for row in rows() if row["video_id"] == "jazz-guitar-3")
    assert all(title not in each.titles for each in snapshot.cards)
    assert all(title not in each.titles for each in snapshot.parents)
    assert card_of(snapshot, "jazz-guitar-0").label == "jazz guitar"


def test_a_word_of_few_viewers_is_not_said_though_its_cluster_has_many() -> None:
    private = [{**row, "tags": ["aunt mildred"]} if row["video_id"] == "jazz-guitar-3" else row for row in rows()]
    watches = watched(dict.fromkeys(("jazz-guitar", *POPULAR), 30))
    counts = {key: value for key, value in watches.counts.items() if key[1] != "jazz-guitar-3" or key[0] < 5}
    made = catalogue_of("sample", private)
    hidden = build(made, WordVectors(), clusters=4, watches=WatchCounts("log", counts, 30, 0), least_viewers=20)
    assert "mildred" not in " ".join(" ".join(card.terms) for card in hidden.cards)
    assert "mildred" not in " ".join(" ".join(parent.terms) for parent in hidden.parents)
    public = build(made, WordVectors(), clusters=12, watches=WatchCounts("log", counts, 30, 0))
    assert "mildred" in " ".join(" ".join(card.terms) for card in public.cards)


@pytest.mark.parametrize(("least", "message"), [(19, "at least 20"), (0, "at least 20")])
def test_fewer_viewers_than_the_floor_are_refused(least: int, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        built({"jazz-guitar": 5}, least=least)


def test_text_from_viewing_needs_the_events() -> None:
    with pytest.raises(RegistryError, match="--events"):
        build(catalogue(), WordVectors(), clusters=4, least_viewers=50)


def test_what_may_be_said_is_stored_and_noted(tmp_path: Path) -> None:
    snapshot = built({"jazz-guitar": 19} | dict.fromkeys(POPULAR, 20))
    write_snapshot(snapshot, tmp_path / "registry")
    stored = load_snapshot(tmp_path / "registry")
    assert stored.cards == snapshot.cards
    assert stored.parents == snapshot.parents
    assert stored.history[0]["least_viewers"] == 20


def test_a_rebuild_keeps_no_label_that_may_not_be_said_any_more() -> None:
    everywhere = dict.fromkeys(("jazz-guitar", *POPULAR), 20)
    before = built(everywhere)
    jazz = card_of(before, "jazz-guitar-0")
    assert jazz.label == "jazz guitar"
    fewer = watched(everywhere | {"jazz-guitar": 19})
    after = rebuild(before, catalogue(), WordVectors(), clusters=4, watches=fewer, least_viewers=20)
    again = card_of(after.snapshot, "jazz-guitar-0")
    assert again.cluster_id == jazz.cluster_id
    assert again.wording is not Wording.OWN
    assert "jazz" not in said(again)


def test_a_rebuild_of_text_from_viewing_must_say_so_again() -> None:
    before = built(dict.fromkeys(("jazz-guitar", *POPULAR), 20))
    with pytest.raises(RegistryError, match="--text-from-viewing"):
        rebuild(before, catalogue(), WordVectors(), clusters=4)
