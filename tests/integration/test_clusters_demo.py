"""The real encoder on the demo catalogue, and the commands end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
from sklearn.metrics import adjusted_mutual_info_score

from agents.clusters.build import build
from agents.clusters.catalogue import catalogue_of, read_catalogue
from agents.clusters.embedding import MiniLM
from agents.clusters.extend import extend
from agents.clusters.files import PACKAGED, load_registry, load_snapshot, packaged_registry
from agents.localstack.assets import tokenizer_path
from streams.records import UNASSIGNED
from streams.registry import Registry
from tests.conftest import Stack

CATALOGUE = PACKAGED.parent / "demo_catalogue.jsonl"


@pytest.fixture(scope="module")
def embedder(unstarted_stack: Stack) -> MiniLM:
    return MiniLM(tokenizer_path(unstarted_stack.settings))


@pytest.fixture(scope="module")
def topics() -> dict[str, str]:
    """The topic each title was written for: the truth that building never sees."""
    rows = [orjson.loads(line) for line in CATALOGUE.read_bytes().splitlines()]
    return {row["video_id"]: row["topic"] for row in rows}


def agreement(registry: Registry, topics: dict[str, str]) -> float:
    """Adjusted mutual information of clusters and topics: 1 the same, 0 chance."""
    return float(adjusted_mutual_info_score(list(topics.values()), registry.clusters_of(list(topics))))


def test_the_packaged_registry_is_what_the_packaged_catalogue_gives(
    embedder: MiniLM, topics: dict[str, str], record_property: Callable[[str, object], None]
) -> None:
    packaged = packaged_registry()
    rebuilt = build(read_catalogue(CATALOGUE), embedder).registry()
    ids = list(topics)
    # Other processors round differently, which can move a few videos and number clusters otherwise.
    same = adjusted_mutual_info_score(packaged.clusters_of(ids), rebuilt.clusters_of(ids))
    record_property("agreement_with_packaged", same)
    assert same >= 0.98
    labels = {card.label for card in packaged.cards.values()}
    assert len(labels & {card.label for card in rebuilt.cards.values()}) >= 0.9 * len(labels)


def test_clusters_agree_with_the_topics(topics: dict[str, str], record_property: Callable[[str, object], None]) -> None:
    packaged = packaged_registry()
    found = agreement(packaged, topics)
    record_property("adjusted_mutual_information", found)
    assert found >= 0.85
    assert len(set(topics.values())) >= 80
    assert UNASSIGNED not in packaged.clusters_of(list(topics))


def test_the_packaged_labels_can_be_shown(topics: dict[str, str]) -> None:
    cards = packaged_registry().cards.values()
    assert len({card.label for card in cards}) == len(cards)
    for card in cards:
        assert 1 <= len(card.label.split()) <= 5
        assert 3 <= len(card.query.split()) <= 8
        assert len(card.titles) == 5
        assert not any(character.isdigit() for character in card.label.split()[-1]), card.label
        assert not card.sensitive, f"{card.label}: the demo catalogue holds no sensitive topic"


def test_a_text_has_one_vector_whatever_it_is_embedded_with(embedder: MiniLM, unstarted_stack: Stack) -> None:
    titles = [card.titles[0] for card in list(packaged_registry().cards.values())[:40]]
    together = embedder.embed(titles)
    alone = np.concatenate([embedder.embed([title]) for title in titles])
    assert np.array_equal(together, alone)
    one_worker = MiniLM(tokenizer_path(unstarted_stack.settings), workers=1).embed(titles[::-1])
    assert np.array_equal(one_worker[::-1], together)
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)
    assert together.dtype == np.float32


def test_meaning_decides_nearness(embedder: MiniLM) -> None:
    bread, loaf, chess = embedder.embed(["baking sourdough bread", "how to make a crusty loaf", "rook endgames"])
    assert bread @ loaf > bread @ chess + 0.2


def test_progress_ends_at_the_number_of_distinct_texts(embedder: MiniLM) -> None:
    seen: list[tuple[int, int]] = []
    vectors = embedder.embed(["a title", "another", "a title"] * 20, lambda done, total: seen.append((done, total)))
    assert vectors.shape == (60, 384)
    assert seen[-1] == (2, 2)
    assert embedder.embed([]).shape == (0, 384)


def test_plain_titles_find_their_topic_and_foreign_ones_none(embedder: MiniLM, topics: dict[str, str]) -> None:
    titles = {
        "How to bake sourdough bread at home": "Sourdough baking",
        "Jazz guitar chords for beginners": "Jazz guitar",
        "Morning yoga in ten minutes": "Yoga practice",
        "Deep sky imaging with a small telescope": "Astrophotography",
        "Trail running in the Alps": "Trail running",
        "Election debate highlights": None,
        "Filing taxes as a freelancer": None,
        "Best laptops reviewed": None,
    }
    offered = catalogue_of("titles", [{"video_id": title, "title": title} for title in titles])
    registry = extend(load_snapshot(PACKAGED), offered, embedder).snapshot.registry()
    for title, topic in titles.items():
        cluster = registry.cluster_of(title)
        if topic is None:
            assert cluster == UNASSIGNED, title
            continue
        members = [topics[video_id] for video_id in topics if registry.cluster_of(video_id) == cluster]
        assert max(set(members), key=members.count) == topic, title


def personas(*arguments: str, assets: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from agents.cli import main; main()", *arguments]
    environment = {"PERSONAS_DATA_FOLDER": str(assets), "PATH": "/usr/bin:/bin", "COLUMNS": "160"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six topics of the demo catalogue, with lines that cannot be used."""
    folder = tmp_path_factory.mktemp("clusters")
    rows = [orjson.loads(line) for line in CATALOGUE.read_bytes().splitlines()]
    wanted = sorted({row["topic"] for row in rows})[::20]
    lines = [orjson.dumps(row) for row in rows if row["topic"] in wanted]
    (folder / "videos.jsonl").write_bytes(b"\n".join([*lines, b"broken", b"{}", lines[0]]))
    return folder


def test_commands_build_show_and_extend(sample: Path, unstarted_stack: Stack) -> None:
    assets = unstarted_stack.settings.data_folder
    built = personas("clusters", "build", "videos.jsonl", "--json", assets=assets, cwd=sample)
    assert built.returncode == 0, built.stderr
    summary = json.loads(built.stdout)
    assert summary["registry"] == "registry-v1"
    assert [line["number"] for line in summary["bad_lines"]] == [summary["videos"] + 1, summary["videos"] + 2]
    assert summary["duplicates"] == [1]
    assert "left out: not JSON" in built.stderr
    registry = load_registry(sample / "registry-v1")
    assert registry.checksum == summary["checksum"]

    again = personas("clusters", "build", "videos.jsonl", assets=assets, cwd=sample)
    assert again.returncode == 1
    assert "registry-v1 exists" in again.stderr

    label = registry.cards[0].label
    shown = personas("clusters", "show", "registry-v1", "--verify", assets=assets, cwd=sample)
    assert shown.returncode == 0
    assert label in shown.stdout
    one = personas("clusters", "show", "registry-v1", "--cluster", "0", "--json", assets=assets, cwd=sample)
    (card,) = json.loads(one.stdout)["clusters"]
    assert card["label"] == label
    assert len(card["similar"]) == min(5, summary["clusters"] - 1)
    absent = personas("clusters", "show", "registry-v1", "--cluster", "999", assets=assets, cwd=sample)
    assert absent.returncode == 2

    new = {"video_id": "new", "title": registry.cards[0].titles[0], "tags": list(registry.cards[0].terms[:2])}
    (sample / "new.jsonl").write_bytes(orjson.dumps(new))
    extended = personas(
        "clusters", "extend", "registry-v1", "--videos", "new.jsonl", "--json", assets=assets, cwd=sample
    )
    assert extended.returncode == 0, extended.stderr
    result = json.loads(extended.stdout)
    assert (result["registry"], result["version"], result["placed"]) == ("registry-v2", 2, 1)
    assert load_registry(sample / "registry-v2").cluster_of("new") == 0
    assert load_registry(sample / "registry-v2").lineage == registry.lineage

    repeated = personas("clusters", "extend", "registry-v2", "--videos", "new.jsonl", assets=assets, cwd=sample)
    assert repeated.returncode == 0
    assert "nothing to add" in repeated.stdout
    assert not (sample / "registry-v3").exists()


def test_evaluate_compares_with_a_field_held_back(sample: Path, unstarted_stack: Stack) -> None:
    arguments = ("clusters", "evaluate", "videos.jsonl", "--against", "topic", "--k", "6", "--seeds", "2")
    assets = unstarted_stack.settings.data_folder
    done = personas(*arguments, "--json", assets=assets, cwd=sample)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["values"], found["clusters"], found["seeds"]) == (6, 6, [0, 1])
    assert found["ami"]["registry"]["mean"] > 0.8
    assert found["ami"]["registry"]["least"] <= found["ami"]["registry"]["most"]
    assert "clustering: tfidf_svd_kmeans, seed 1" in done.stderr
    table = personas(*arguments, assets=assets, cwd=sample)
    assert "minilm_kmeans" in table.stdout
    assert not any("vectors" in path.name for path in sample.iterdir())


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["build", "absent.jsonl", "--out", "other"], 1, "absent.jsonl"),
        (["show", "nowhere"], 1, "nowhere is no registry"),
        (["extend"], 2, "either --videos FILE or --topic"),
        (["build"], 2, "CATALOGUE"),
        (["build", "videos.jsonl", "--text-from-viewing", "--out", "other"], 1, "give --events"),
        (["evaluate", "videos.jsonl", "--against", "nothing"], 1, "no video of videos.jsonl has a field 'nothing'"),
    ],
)
def test_mistakes_are_named(
    sample: Path, unstarted_stack: Stack, arguments: list[str], status: int, message: str
) -> None:
    done = personas("clusters", *arguments, assets=unstarted_stack.settings.data_folder, cwd=sample)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_rebuild_continues_ids_and_uses_stored_vectors(sample: Path, unstarted_stack: Stack) -> None:
    assets = unstarted_stack.settings.data_folder
    lines = (sample / "videos.jsonl").read_bytes().splitlines()[:-3]
    (sample / "fewer.jsonl").write_bytes(b"\n".join(lines[: len(lines) * 2 // 3]))
    (sample / "all.jsonl").write_bytes(b"\n".join(lines))
    work = ["--work", "vectors", "--json"]
    personas("clusters", "build", "fewer.jsonl", "--out", "grown/registry-v1", *work, assets=assets, cwd=sample)
    done = personas("clusters", "rebuild", "grown/registry-v1", "all.jsonl", *work, assets=assets, cwd=sample)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    before, after = load_registry(sample / "grown/registry-v1"), load_registry(sample / "grown/registry-v2")
    assert (summary["registry"], summary["version"]) == ("grown/registry-v2", 2)
    assert after.lineage == before.lineage
    assert summary["persisted"] + len(summary["retired"]) == len(before.cards)
    assert summary["persisted"] > len(before.cards) / 2
    assert all(after.successor_of(cluster) in after.cards for cluster in before.cards)
    assert min(summary["added"]) == max(before.cards) + 1
    assert (sample / "vectors" / "part-00000.npy").exists()

    (sample / "other.jsonl").write_bytes(b'{"video_id":"x","title":"one"}\n{"video_id":"y","title":"two"}\n')
    refused = personas(
        "clusters", "rebuild", "grown/registry-v1", "other.jsonl", "--out", "no", assets=assets, cwd=sample
    )
    assert refused.returncode == 1
    assert "no video in common" in refused.stderr
    assert "Traceback" not in refused.stderr
