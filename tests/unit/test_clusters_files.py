from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest

from agents.clusters import files
from agents.clusters.build import build
from agents.clusters.files import load_registry, load_snapshot, packaged_registry, verify, write_snapshot
from agents.clusters.snapshot import RegistryError, RegistrySnapshot
from streams.registry import Registry, TextColumn, VideoTable, bucket_offsets
from tests.cluster_samples import WordVectors, catalogue, rows


@pytest.fixture(scope="module")
def snapshot() -> RegistrySnapshot:
    return build(catalogue(), WordVectors(), clusters=4)


@pytest.fixture
def folder(tmp_path: Path, snapshot: RegistrySnapshot) -> Path:
    write_snapshot(snapshot, tmp_path / "registry-v1")
    return tmp_path / "registry-v1"


def test_a_stored_registry_answers_like_the_one_in_memory(folder: Path, snapshot: RegistrySnapshot) -> None:
    stored, held = load_registry(folder), snapshot.registry()
    assert (stored.version, stored.checksum, stored.lineage) == (held.version, held.checksum, held.lineage)
    assert stored.cards == held.cards
    assert stored.prior.tolist() == held.prior.tolist()
    for row in rows():
        video_id = str(row["video_id"])
        assert stored.cluster_of(video_id) == held.cluster_of(video_id) >= 0
        assert stored.title_of(video_id) == held.title_of(video_id)
    assert [stored.similar(c) for c in stored.cards] == [held.similar(c) for c in held.cards]


def test_writing_twice_gives_the_same_bytes(tmp_path: Path, folder: Path, snapshot: RegistrySnapshot) -> None:
    write_snapshot(load_snapshot(folder), tmp_path / "copy")
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "copy").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "copy" / name).read_bytes(), name


def test_a_snapshot_is_never_overwritten(folder: Path, snapshot: RegistrySnapshot) -> None:
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(RegistryError, match="never changes"):
        write_snapshot(replace(snapshot, version=2), folder)
    assert (folder / "manifest.json").read_bytes() == before


def test_a_failed_write_leaves_nothing(
    tmp_path: Path, snapshot: RegistrySnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def fails_at_the_fifth(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails_at_the_fifth)
    with pytest.raises(RegistryError, match="No space left"):
        write_snapshot(snapshot, tmp_path / "registry")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_named(tmp_path: Path, snapshot: RegistrySnapshot) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RegistryError, match="file"):
        write_snapshot(snapshot, tmp_path / "file" / "registry")


@pytest.mark.parametrize("name", ["clusters.json", "centroids.npy", "video_clusters.npy", "title_text.npy"])
def test_a_changed_byte_is_found(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(RegistryError, match=rf"{name} was changed or damaged"):
        load_registry(folder)


def test_large_files_are_checked_by_size_at_opening_and_whole_by_verify(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CHECKED_BYTES", 200)
    path = folder / "title_text.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    load_registry(folder)
    for check in (verify, load_snapshot):
        with pytest.raises(RegistryError, match=r"title_text\.npy was changed"):
            check(folder)
    path.write_bytes(content[:-1])
    with pytest.raises(RegistryError, match="bytes instead of"):
        load_registry(folder)


@pytest.mark.parametrize("name", ["manifest.json", "clusters.json", "video_keys.npy"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(RegistryError, match=name):
        load_registry(folder)


def test_a_missing_folder_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="personas clusters build"):
        load_registry(tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "not of format 2"),
        ({"version": 7}, "does not agree with itself"),
        ({"files": {}}, "does not agree with itself"),
        ({"files": 3}, "lacks"),
    ],
)
def test_a_manifest_that_was_edited_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "manifest.json"
    path.write_bytes(orjson.dumps({**orjson.loads(path.read_bytes()), **change}))
    with pytest.raises(RegistryError, match=message):
        load_registry(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b""])
def test_a_damaged_manifest_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(RegistryError, match=r"manifest\.json"):
        load_registry(folder)


def test_many_videos_open_at_once_and_stay_on_disk(tmp_path: Path, snapshot: RegistrySnapshot) -> None:
    count = 400_000
    keys = np.sort(np.random.default_rng(0).integers(0, 2**64, count, np.uint64))
    text = TextColumn(np.full(count * 8, ord("x"), np.uint8), np.arange(count + 1, dtype=np.int64) * 8)
    videos = VideoTable(keys, np.zeros(count, np.int32), text, text, bucket_offsets(keys))
    write_snapshot(replace(snapshot, videos=videos), tmp_path / "large")
    started = time.perf_counter()
    registry = load_registry(tmp_path / "large")
    seconds = time.perf_counter() - started
    assert len(registry) == count
    assert seconds < 2
    assert registry.clusters_of_keys(keys).tolist() == [0] * count
    held = load_snapshot(tmp_path / "large").videos
    for array in (held.keys, held.clusters, held.ids.blob, held.ids.offsets, held.titles.blob):
        assert isinstance(array.base, np.memmap)


def test_the_packaged_registry_opens_and_is_whole() -> None:
    verify(files.PACKAGED)
    registry = packaged_registry()
    assert isinstance(registry, Registry)
    assert registry is packaged_registry()
    assert len(registry.cards) >= 80
    assert registry.prior.sum() == pytest.approx(1)


def test_opening_a_registry_needs_no_machine_learning() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from agents.clusters.files import packaged_registry; packaged_registry();"
        "print([n for n in ('sklearn', 'onnxruntime', 'tokenizers', 'scipy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
