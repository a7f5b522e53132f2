"""Transitions and the safe list in a registry: stored, checked, shown, and made by their commands."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from click.testing import CliRunner, Result

from agents.cli.clusters import clusters
from agents.clusters.build import build
from agents.clusters.catalogue import CatalogueError
from agents.clusters.events import read_log
from agents.clusters.extend import extend
from agents.clusters.files import load_registry, load_snapshot, write_snapshot
from agents.clusters.graph import named_clusters
from agents.clusters.rebuild import rebuild
from agents.clusters.snapshot import RegistryError, RegistrySnapshot
from tests.cluster_samples import WordVectors, catalogue

VIEWERS = 60
TOPICS = ("sourdough-baking", "jazz-guitar", "trail-running", "chess-endgames")


@pytest.fixture(scope="module")
def snapshot() -> RegistrySnapshot:
    return build(catalogue(), WordVectors(), clusters=4)


@pytest.fixture
def folder(tmp_path: Path, snapshot: RegistrySnapshot) -> Path:
    write_snapshot(snapshot, tmp_path / "registry-v1")
    return tmp_path / "registry-v1"


def watches() -> list[dict[str, Any]]:
    """Everybody bakes; half of them play the guitar afterwards, the others run."""
    return [
        {"user_id": f"u{viewer}", "video_id": f"{topic}-{watch}", "ts": 1_767_225_600_000 + 1000 * place + watch}
        for viewer in range(2 * VIEWERS)
        for place, topic in enumerate(("sourdough-baking", TOPICS[1 + viewer % 2]))
        for watch in range(2)
    ]


@pytest.fixture
def events(tmp_path: Path) -> Path:
    lines = [orjson.dumps(row) for row in [*watches(), {"user_id": "u1", "video_id": "unheard-of", "ts": 1}]]
    path = tmp_path / "watches.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join([*lines, b"{not json", b'{"user_id": "u1", "video_id": "x"}'])))
    return path


def run(*arguments: str | int | Path) -> Result:
    return CliRunner().invoke(clusters, [str(argument) for argument in arguments])


def cluster_of(folder: Path, topic: str) -> int:
    return load_registry(folder).cluster_of(f"{topic}-0")


def learned(folder: Path, events: Path, *more: str) -> Path:
    result = run("transitions", events, folder, *more)
    assert result.exit_code == 0, result.output
    return folder.with_name("registry-v2")


def test_learning_writes_the_next_version_and_leaves_the_old_one(folder: Path, events: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = run("transitions", events, folder, "--json")
    assert result.exit_code == 0, result.output
    summary = orjson.loads(result.stdout)
    assert (summary["version"], summary["edges"], summary["unplaced"], summary["bad_lines"]) == (2, 2, 1, 2)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    registry = load_registry(Path(summary["registry"]))
    assert registry.checksum == summary["checksum"]
    baking, guitar, running = (cluster_of(folder, topic) for topic in TOPICS[:3])
    assert {other for other, _ in registry.leads_to(baking)} == {guitar, running}
    assert registry.transitions is not None
    assert registry.transitions.viewers.tolist() == [VIEWERS, VIEWERS]
    assert registry.leads_to(guitar) == []


def test_a_registry_without_them_keeps_its_bytes(folder: Path, snapshot: RegistrySnapshot) -> None:
    names = {path.stem for path in folder.iterdir()}
    assert not {name for name in names if name.startswith(("transition", "safe"))}
    registry = load_registry(folder)
    assert registry.transitions is None
    assert registry.safe == frozenset()
    assert registry.leads_to(next(iter(registry.cards))) == []


def test_what_is_stored_is_what_was_learned(tmp_path: Path, folder: Path, events: Path) -> None:
    second = learned(folder, events)
    again = load_snapshot(second)
    write_snapshot(again, tmp_path / "copy")
    for path in second.iterdir():
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()
    assert again.registry().checksum == load_registry(second).checksum


def test_too_few_viewers_are_told_and_nothing_is_written(folder: Path, events: Path) -> None:
    result = run("transitions", events, folder, "--least-viewers", VIEWERS + 1)
    assert result.exit_code == 1
    assert f"no transition with {VIEWERS + 1} viewers" in result.stderr
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["registry-v1"]
    assert run("transitions", events, folder, "--least-viewers", "19").exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read the events"), (b"", "no watch of a video"), (b"\x1f\x8bnot gzip", "cannot read the events")],
)
def test_a_log_that_cannot_be_used_is_one_line(
    tmp_path: Path, folder: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "bad.jsonl.gz"
    if content is not None:
        path.write_bytes(content if content else gzip.compress(b""))
    result = run("transitions", path, folder)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_an_existing_folder_is_refused_before_reading(folder: Path, events: Path) -> None:
    result = run("transitions", "no such file", folder, "--out", folder)
    assert result.exit_code == 1
    assert "exists" in result.stderr


def test_the_log_is_read_as_workers_read_it(tmp_path: Path, folder: Path) -> None:
    registry = load_registry(folder)
    baking, guitar = (cluster_of(folder, topic) for topic in TOPICS[:2])
    play = {"user_id": "ann", "video_id": "sourdough-baking-0", "ts": 5}
    kept = [play, play | {"cluster_id": guitar, "ts": 6}, play | {"video_id": "new", "cluster_id": guitar, "ts": 7}]
    left_out = [play | {"action": "skip"}, play | {"traffic": "bot"}, play | {"ts": "soon"}, play | {"ts": 2.5}]
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\n".join(orjson.dumps(row) for row in [*kept, *left_out]))
    log = read_log(path, registry)
    assert log.clusters.tolist() == [baking, guitar, guitar]
    assert (log.times.tolist(), log.bad_lines, log.unplaced) == ([5, 6, 7], 2, 0)
    table = tmp_path / "log.tsv"
    table.write_text("ts\tuser_id\tvideo_id\n5\tann\tsourdough-baking-0\n-1\tann\tsourdough-baking-0\n")
    assert read_log(table, registry).times.tolist() == [5]
    path.write_bytes(orjson.dumps(play | {"video_id": "unheard-of"}))
    with pytest.raises(CatalogueError, match="1 watches of videos that the registry does not hold"):
        read_log(path, registry)


@pytest.mark.parametrize("name", ["transition_rates.npy", "transition_targets.npy"])
def test_a_damaged_graph_is_refused(folder: Path, events: Path, name: str) -> None:
    second = learned(folder, events)
    content = bytearray((second / name).read_bytes())
    content[-1] ^= 1
    (second / name).write_bytes(content)
    with pytest.raises(RegistryError, match=rf"{name} was changed or damaged"):
        load_registry(second)


def test_a_graph_that_makes_no_sense_is_refused(tmp_path: Path, folder: Path, events: Path) -> None:
    """Rightly stored, wrongly made: checksums agree."""
    again = load_snapshot(learned(folder, events))
    assert again.transitions is not None
    odd = replace(again.transitions, targets=np.array([77, 78], np.int32))
    write_snapshot(replace(again, transitions=odd), tmp_path / "odd")
    with pytest.raises(RegistryError, match="an edge to a cluster that is not there"):
        load_registry(tmp_path / "odd")
    write_snapshot(replace(again, safe=(1, 1)), tmp_path / "twice")
    with pytest.raises(RegistryError, match="not there, or twice"):
        load_registry(tmp_path / "twice")


def test_half_a_graph_is_refused(folder: Path, events: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = RegistrySnapshot.contents
    monkeypatch.setattr(
        RegistrySnapshot, "contents", lambda self: {n: c for n, c in whole(self).items() if n != "transition_lifts"}
    )
    second = learned(folder, events)
    with pytest.raises(RegistryError, match="does not agree with itself"):
        load_registry(second)


def test_show_names_them(folder: Path, events: Path) -> None:
    second = learned(folder, events)
    baking, guitar = (cluster_of(folder, topic) for topic in TOPICS[:2])
    assert "2 transitions" in run("show", second).stdout
    assert "transitions" not in run("show", folder).stdout
    one = run("show", second, "--cluster", baking).stdout
    assert "leads to" in one
    assert "lift" in one
    shown = orjson.loads(run("show", second, "--cluster", baking, "--json").stdout)
    assert shown["transitions"] == 2
    assert [edge["viewers"] for edge in shown["clusters"][0]["leads_to"]] == [VIEWERS, VIEWERS]
    assert shown["clusters"][0]["safe"] is False
    assert shown["history"][-1]["least_viewers_of_an_edge"] == 50
    assert "nothing with enough viewers" in run("show", second, "--cluster", guitar).stdout


# The safe list


def test_no_cluster_is_safe_until_it_is_said(folder: Path) -> None:
    shown = orjson.loads(run("safe", folder, "--json").stdout)
    assert (shown["safe"], shown["written"], shown["version"]) == ([], False, 1)


def test_clusters_go_on_the_list_and_off_by_id_or_label(folder: Path, tmp_path: Path) -> None:
    baking, guitar = (cluster_of(folder, topic) for topic in TOPICS[:2])
    label = load_registry(folder).cards[guitar].label
    result = run("safe", folder, "--add", baking, "--add", label.upper(), "--json")
    assert result.exit_code == 0, result.output
    assert [each["cluster_id"] for each in orjson.loads(result.stdout)["safe"]] == sorted([baking, guitar])
    second = tmp_path / "registry-v2"
    assert load_registry(second).safe == {baking, guitar}
    assert "2 safe for all ages" in run("show", second).stdout
    assert load_registry(folder).safe == frozenset()
    result = run("safe", second, "--remove", baking, "--out", tmp_path / "other")
    assert result.exit_code == 0, result.output
    assert load_registry(tmp_path / "other").safe == {guitar}
    assert load_snapshot(tmp_path / "other").history[-1] == {"step": "safe", "added": [], "removed": [baking]}


def test_a_list_that_does_not_change_is_no_version(folder: Path, tmp_path: Path) -> None:
    result = run("safe", folder, "--remove", cluster_of(folder, "jazz-guitar"))
    assert result.exit_code == 0
    assert not (tmp_path / "registry-v2").exists()


def test_wrong_names_are_told(folder: Path, snapshot: RegistrySnapshot) -> None:
    result = run("safe", folder, "--add", "underwater hockey")
    assert result.exit_code == 1
    assert "no cluster has the id or label 'underwater hockey'" in result.stderr
    assert run("safe", folder, "--add", "0", "--remove", "0").exit_code == 2
    twins = [replace(card, label="music") for card in snapshot.cards[:2]]
    with pytest.raises(RegistryError, match="label of clusters"):
        named_clusters(twins, ["music"])


def test_a_cluster_that_is_proposed_to_nobody_is_refused(tmp_path: Path, snapshot: RegistrySnapshot) -> None:
    cards = tuple(replace(card, sensitive=card.cluster_id == 0) for card in snapshot.cards)
    write_snapshot(replace(snapshot, cards=cards), tmp_path / "registry-v1")
    result = run("safe", tmp_path / "registry-v1", "--add", "0")
    assert result.exit_code == 1
    assert "it is sensitive" in result.stderr


def test_an_extension_keeps_both_and_a_rebuild_neither(folder: Path, events: Path) -> None:
    second = learned(folder, events)
    assert run("safe", second, "--add", cluster_of(folder, "jazz-guitar")).exit_code == 0
    third = load_snapshot(second.with_name("registry-v3"))
    more = catalogue(per_topic=14)
    extended = extend(third, more, WordVectors()).snapshot
    assert extended.transitions is not None
    assert len(extended.transitions) == 2
    assert extended.safe == third.safe != ()
    rebuilt = rebuild(third, more, WordVectors()).snapshot
    assert rebuilt.transitions is None
    assert rebuilt.safe == ()
