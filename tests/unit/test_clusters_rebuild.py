from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agents.artefacts import registry_versions
from agents.clusters.build import build
from agents.clusters.catalogue import Catalogue, catalogue_of
from agents.clusters.files import load_registry, load_snapshot, write_snapshot
from agents.clusters.rebuild import _continued, _staying, rebuild
from agents.clusters.snapshot import RegistryError, RegistrySnapshot
from agents.settings import Settings, SettingsError
from streams.records import UNASSIGNED
from tests.cluster_samples import WordVectors, catalogue, rows, topic_of

Row = dict[str, object]
LATE_TOPICS = {"whitewater kayaking": "rapids eddy paddle roll", "darkroom printing": "enlarger fixer fibre dodge"}


def late(topic: str, count: int = 12) -> list[Row]:
    words = LATE_TOPICS[topic].split()
    return [
        {"video_id": f"{topic.replace(' ', '-')}-{n}", "title": f"{words[n % 4]} part {n}", "tags": [topic]}
        for n in range(count)
    ]


def of_topics(*topics: str, per_topic: int = 12) -> list[Row]:
    return [row for row in rows(per_topic) if topic_of(str(row["video_id"])) in topics]


def made(offered: Sequence[Row]) -> Catalogue:
    return catalogue_of("catalogue", offered)


@pytest.fixture(scope="module")
def base() -> RegistrySnapshot:
    return build(catalogue(), WordVectors(), clusters=4)


def clusters_by_topic(snapshot: RegistrySnapshot) -> dict[str, int]:
    """The cluster that holds most videos of each topic."""
    videos = snapshot.videos
    found: dict[str, list[int]] = {}
    for row in range(len(videos.keys)):
        found.setdefault(topic_of(videos.ids[row]), []).append(int(videos.clusters[row]))
    return {topic: max(set(clusters), key=clusters.count) for topic, clusters in found.items()}


def test_the_same_catalogue_keeps_everything_but_the_version(base: RegistrySnapshot) -> None:
    result = rebuild(base, catalogue(), WordVectors())
    before, after = base.registry(), result.snapshot.registry()
    ids = [str(row["video_id"]) for row in rows()]
    assert result.persisted == tuple(before.cards)
    assert (result.retired, result.added, result.relabelled, result.stayed) == ((), (), (), 1.0)
    assert after.clusters_of(ids).tolist() == before.clusters_of(ids).tolist()
    assert (after.version, after.lineage) == (before.version + 1, before.lineage)
    assert after.successors == {}
    assert [step["step"] for step in result.snapshot.history] == ["build", "rebuild"]


def test_a_new_topic_becomes_a_cluster_with_an_id_of_its_own(base: RegistrySnapshot) -> None:
    result = rebuild(base, made(rows() + late("darkroom printing")), WordVectors())
    before, after = clusters_by_topic(base), clusters_by_topic(result.snapshot)
    assert (len(result.persisted), result.retired, result.added) == (4, (), (4,))
    assert after == before | {"darkroom printing": 4}
    assert result.snapshot.registry().cards[4].label == "darkroom printing"
    labels = {card.cluster_id: card.label for card in result.snapshot.cards}
    assert all(labels[card.cluster_id] == card.label for card in base.cards)


def test_a_topic_that_left_is_retired_and_its_id_never_used_again(base: RegistrySnapshot) -> None:
    before = clusters_by_topic(base)
    gone = before["jazz guitar"]
    rest = of_topics("sourdough baking", "trail running", "chess endgames")
    without = rebuild(base, made(rest), WordVectors())
    assert (without.retired, without.added) == ((gone,), ())
    registry = without.snapshot.registry()
    assert registry.successor_of(gone) == UNASSIGNED
    assert registry.cluster_of("jazz-guitar-1") == UNASSIGNED
    assert without.prior_mapped == pytest.approx(1 - base.registry().cards[gone].prior, abs=1e-3)

    replaced = rebuild(without.snapshot, made(rest + late("whitewater kayaking")), WordVectors(), clusters=4)
    assert replaced.added == (4,)
    back = rebuild(replaced.snapshot, made(rows() + late("whitewater kayaking")), WordVectors(), clusters=5)
    assert back.added == (5,)
    last = back.snapshot.registry()
    assert last.successors == {gone: UNASSIGNED}
    assert clusters_by_topic(back.snapshot)["jazz guitar"] == 5
    assert last.lineage == base.lineage


def merged_topics(snapshot: RegistrySnapshot, one: str, other: str) -> RegistrySnapshot:
    """`snapshot` rebuilt with videos that make two topics one."""
    topics = [one, other]
    blended = [row | {"tags": topics * 3, "title": f"{one} {other}"} for row in of_topics(*topics)]
    rest = [row for row in rows() if topic_of(str(row["video_id"])) not in topics]
    return rebuild(snapshot, made(rest + blended), WordVectors(), clusters=len(snapshot.cards) - 1).snapshot


def test_merged_clusters_follow_the_majority_through_every_later_version(base: RegistrySnapshot) -> None:
    before = clusters_by_topic(base)
    once = merged_topics(base, "jazz guitar", "trail running")
    pair = {before["jazz guitar"], before["trail running"]}
    assert len(once.successors) == 1
    ((retired, live),) = once.successors.items()
    assert {retired, live} == pair
    assert once.registry().successor_of(retired) == live == once.registry().successor_of(live)

    # The survivor's topics leave too: what pointed at it must not point at a retired id.
    rest = of_topics("sourdough baking", "chess endgames")
    twice = rebuild(once, made(rest), WordVectors(), clusters=2)
    assert twice.retired == (live,)
    registry = twice.snapshot.registry()
    assert registry.successors == {retired: UNASSIGNED, live: UNASSIGNED}
    for cluster in before.values():
        successor = registry.successor_of(cluster)
        assert successor == UNASSIGNED or successor in registry.cards
    assert registry.successor_of(99) == UNASSIGNED


def test_successors_lead_on_when_a_successor_is_retired_too(base: RegistrySnapshot) -> None:
    before = clusters_by_topic(base)
    earlier = replace(base, successors={7: before["jazz guitar"], 8: before["chess endgames"], 9: UNASSIGNED})
    result = rebuild(earlier, made(of_topics("sourdough baking", "trail running", "chess endgames")), WordVectors())
    assert result.snapshot.successors == {
        7: UNASSIGNED,
        8: before["chess endgames"],
        9: UNASSIGNED,
        before["jazz guitar"]: UNASSIGNED,
    }
    following = rebuild(result.snapshot, made(rows()), WordVectors(), clusters=4)
    assert following.added == (10,)


def test_a_cluster_whose_content_changed_a_lot_is_named_anew(base: RegistrySnapshot) -> None:
    jazz = clusters_by_topic(base)["jazz guitar"]
    named = replace(base, cards=tuple(replace(card, label=f"{card.cluster_id} kept") for card in base.cards))
    more: list[Row] = [
        {"video_id": f"jazz-guitar-late-{n}", "title": f"chords in gypsy {n}", "tags": ["jazz guitar"]}
        for n in range(16)
    ]
    grown = rebuild(named, made(rows() + more), WordVectors(), clusters=4)
    assert grown.relabelled == (jazz,)
    labels = [card.label for card in grown.snapshot.cards]
    assert [label for label in labels if "kept" not in label] == [labels[jazz]]
    few = rebuild(named, made(rows() + more[:3]), WordVectors(), clusters=4)
    assert few.relabelled == ()


def test_a_kept_label_is_not_given_twice(base: RegistrySnapshot) -> None:
    named = replace(base, cards=tuple(replace(card, label=f"{card.cluster_id} kept") for card in base.cards))
    named = replace(named, cards=(replace(named.cards[0], label="darkroom printing"), *named.cards[1:]))
    result = rebuild(named, made(rows() + late("darkroom printing")), WordVectors())
    labels = [card.label for card in result.snapshot.cards]
    assert labels[:4] == ["darkroom printing", "1 kept", "2 kept", "3 kept"]
    assert labels[4] != "darkroom printing"
    assert 1 <= len(labels[4].split()) <= 5


def test_the_order_of_the_catalogue_changes_nothing(base: RegistrySnapshot) -> None:
    offered = rows() + late("darkroom printing")
    first = rebuild(base, made(offered), WordVectors())
    second = rebuild(base, made(offered[::-1]), WordVectors())
    assert first.snapshot.registry().checksum == second.snapshot.registry().checksum
    assert (first.stayed, first.added) == (second.stayed, second.added)


def test_a_wanted_number_of_clusters_is_kept_to(base: RegistrySnapshot) -> None:
    assert len(rebuild(base, catalogue(), WordVectors(), clusters=3).snapshot.cards) == 3
    six = rebuild(base, catalogue(), WordVectors(), clusters=6)
    assert len(six.snapshot.cards) == 6
    assert six.added == (4, 5)


def test_a_registry_of_another_model_is_followed_by_its_videos(base: RegistrySnapshot) -> None:
    other = replace(base, embedding="other-model", centroids=np.ones((4, 3), np.float32))
    result = rebuild(other, catalogue(), WordVectors(), clusters=4)
    assert len(result.persisted) == 4
    assert result.stayed == 1
    assert clusters_by_topic(result.snapshot) == clusters_by_topic(base)


def test_clusters_that_the_sample_of_a_large_catalogue_misses_are_started_from(base: RegistrySnapshot) -> None:
    sample = WordVectors().embed([f"jazz guitar chords number {number}" for number in range(6)])
    labels = np.array([0, 0, 0, 1, 1, 1])
    starts = _continued(base, _staying(base, catalogue()), exact=False)(sample, labels)
    assert np.array_equal(starts[:4], base.centroids)
    jazz = clusters_by_topic(base)["jazz guitar"]
    alone = _continued(base, _staying(base, made(of_topics("jazz guitar"))), exact=False)(sample, labels)
    assert np.array_equal(alone[0], base.centroids[jazz])
    assert len(alone) < 4


def test_an_unrelated_catalogue_is_refused(base: RegistrySnapshot) -> None:
    with pytest.raises(RegistryError, match=r"no video in common.*clusters build"):
        rebuild(base, made(late("darkroom printing") + late("whitewater kayaking")), WordVectors())


def test_a_rebuilt_registry_is_stored_and_found_beside_the_older_ones(tmp_path: Path, base: RegistrySnapshot) -> None:
    without = rebuild(base, made(of_topics("jazz guitar", "trail running", "chess endgames")), WordVectors()).snapshot
    stranger = build(made(late("darkroom printing") + late("whitewater kayaking")), WordVectors(), clusters=2)
    write_snapshot(base, tmp_path / "registry-v1")
    write_snapshot(without, tmp_path / "registry-v2")
    write_snapshot(replace(stranger, version=3), tmp_path / "stranger-v3")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    stored = load_registry(tmp_path / "registry-v2")
    assert dict(stored.successors) == without.successors != {}
    assert load_snapshot(tmp_path / "registry-v2").registry().checksum == stored.checksum
    version = registry_versions(Settings(registry=tmp_path / "registry-v2"), stored)
    assert version(2) is stored
    assert version(1).checksum == base.registry().checksum
    with pytest.raises(SettingsError, match="registry version 3 is in force"):
        version(3)  # that folder is of another lineage
