from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from agents.clusters import vectors as vectors_module
from agents.clusters.build import build
from agents.clusters.catalogue import catalogue_of
from agents.clusters.embedding import Progress, Vectors
from agents.clusters.snapshot import RegistryError
from agents.clusters.vectors import StoredVectors
from tests.cluster_samples import WordVectors, catalogue

TEXTS = [f"crumb number {number % 90}" for number in range(100)]


class Counting(WordVectors):
    """Notes every text, and dies like a killed process at the text `dies_at`."""

    def __init__(self, dies_at: str = "") -> None:
        self.seen: list[str] = []
        self._dies_at = dies_at

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        if self._dies_at in texts and self._dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += texts
        return super().embed(texts, progress)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors_module, "_PART", 16)


def test_vectors_are_those_of_the_embedder_and_computed_once(tmp_path: Path) -> None:
    counting = Counting()
    stored = StoredVectors(tmp_path / "work", counting)
    assert np.array_equal(stored.embed(TEXTS), WordVectors().embed(TEXTS))
    assert sorted(counting.seen) == sorted(set(TEXTS))
    assert np.array_equal(stored.embed(TEXTS[::-1]), WordVectors().embed(TEXTS[::-1]))
    assert len(counting.seen) == 90
    assert stored.embed(TEXTS[:1]).shape == (1, 48)


def test_a_killed_build_goes_on_where_it_was(tmp_path: Path) -> None:
    def killed() -> None:
        StoredVectors(tmp_path / "work", Counting(dies_at=TEXTS[50])).embed(TEXTS)

    process = get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    counting, seen = Counting(), []
    resumed = StoredVectors(tmp_path / "work", counting)
    found = resumed.embed(TEXTS, lambda done, total: seen.append((done, total)))
    assert sorted(counting.seen) == sorted(TEXTS[48:90])  # the first three parts of 16 were whole
    assert seen[0] == (48, 90)
    assert seen[-1] == (90, 90)
    assert np.array_equal(found, WordVectors().embed(TEXTS))


def test_a_build_with_stored_vectors_is_the_same_build(tmp_path: Path) -> None:
    stored = StoredVectors(tmp_path / "work", WordVectors())
    assert build(catalogue(), stored).registry().checksum == build(catalogue(), WordVectors()).registry().checksum


def test_a_grown_catalogue_embeds_its_new_videos_only(tmp_path: Path) -> None:
    old = catalogue()
    build(old, StoredVectors(tmp_path / "work", WordVectors()), clusters=4)
    counting = Counting()
    new = {"video_id": "z", "title": "rook and pawn once more", "tags": ["chess endgames"]}
    grown = catalogue_of("grown", [*(asdict(video) for video in old.videos), new])
    build(grown, StoredVectors(tmp_path / "work", counting), clusters=4)
    assert [text for text in counting.seen if "number" in text or "once more" in text] == [
        "rook and pawn once more. chess endgames"
    ]


def test_large_results_are_mapped_and_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors_module, "_IN_MEMORY", 1000)
    found = StoredVectors(tmp_path / "work", WordVectors()).embed(TEXTS)
    assert isinstance(found.base, np.memmap)
    assert np.array_equal(found, WordVectors().embed(TEXTS))
    names = {path.name for path in (tmp_path / "work").iterdir()}
    assert names == {"vectors.json", *(f"part-0000{number}.npy" for number in range(6))}


def test_a_part_that_was_removed_is_embedded_again(tmp_path: Path) -> None:
    StoredVectors(tmp_path / "work", WordVectors()).embed(TEXTS)
    (tmp_path / "work" / "part-00002.npy").unlink()
    counting = Counting()
    found = StoredVectors(tmp_path / "work", counting).embed(TEXTS)
    assert counting.seen == TEXTS[32:48]
    assert np.array_equal(found, WordVectors().embed(TEXTS))


def test_one_build_at_a_time_may_use_a_folder(tmp_path: Path) -> None:
    first = StoredVectors(tmp_path / "work", WordVectors())
    with pytest.raises(RegistryError, match="in use by another build"):
        StoredVectors(tmp_path / "work", WordVectors())
    del first
    StoredVectors(tmp_path / "work", WordVectors())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vectors.json", b'{"embedding":"other-model"}', "holds vectors of other-model"),
        ("vectors.json", b"{", "is damaged"),
        ("part-00000.npy", b"no array", r"cannot read .*part-00000\.npy"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    StoredVectors(tmp_path / "work", WordVectors()).embed(TEXTS)
    (tmp_path / "work" / name).write_bytes(content)
    with pytest.raises(RegistryError, match=message):
        StoredVectors(tmp_path / "work", WordVectors())


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(RegistryError, match="holds something else"):
        StoredVectors(tmp_path, WordVectors())
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    with pytest.raises(RegistryError, match="cannot write into"):
        StoredVectors(tmp_path / "letter.txt" / "work", WordVectors())
