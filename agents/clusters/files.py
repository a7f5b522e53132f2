"""Registry snapshots on disk: one folder per version, written whole or not at all, memory-mapped when read.

A folder holds manifest.json (format, version, checksums, counts, history), clusters.json (cards, embedding model,
placement threshold, lineage, successors) and .npy arrays: centroids, neighbours, and the videos by ascending
64-bit key. Where there are any, also the transitions between clusters and the clusters that are safe for all ages.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from hashlib import file_digest
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from agents.clusters.snapshot import (
    RegistryError as RegistryError,
)
from agents.clusters.snapshot import (
    RegistrySnapshot,
    registry_checksum,
    unassigned_count,
    view,
    write_content,
)
from streams.registry import ClusterCard, Neighbours, ParentCard, Registry, TextColumn, VideoTable, Wording
from streams.transitions import Transitions

FORMAT: Final = 2
MANIFEST: Final = "manifest.json"
PACKAGED: Final = Path(__file__).parent.parent / "data" / "demo_registry"
_CHECKED_BYTES: Final = 64 * 2**20
"""Larger files are checked for their size alone when opened, so that opening stays fast; `verify` reads them."""
_ARRAYS: Final[dict[str, tuple[str, int]]] = {
    "centroids": ("float32", 2),
    "neighbours": ("int32", 2),
    "neighbour_cosines": ("float32", 2),
    "video_keys": ("uint64", 1),
    "video_clusters": ("int32", 1),
    "video_buckets": ("uint32", 1),
    "id_text": ("uint8", 1),
    "id_offsets": ("int64", 1),
    "title_text": ("uint8", 1),
    "title_offsets": ("int64", 1),
}
_TRANSITIONS: Final[dict[str, tuple[str, int]]] = {
    "transition_offsets": ("int64", 1),
    "transition_targets": ("int32", 1),
    "transition_viewers": ("int32", 1),
    "transition_rates": ("float32", 1),
    "transition_lifts": ("float32", 1),
}
"""All of them or none are there."""
_SAFE: Final = "safe_clusters"


def write_snapshot(snapshot: RegistrySnapshot, folder: Path) -> str:
    """Write a snapshot as `folder`, which must not exist; returns its checksum.

    The folder appears complete or not at all. Raises RegistryError if it exists or cannot be written.
    """
    if folder.exists():
        raise RegistryError(f"{folder} exists; a snapshot never changes, so choose another folder or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise RegistryError(f"cannot write into {folder.parent}: {error.strerror}; choose another --out") from error
    try:
        result = _write_into(draft, snapshot)
        draft.chmod(0o755)
        draft.rename(folder)
        _flush_folder(folder.parent)
    except OSError as error:
        raise RegistryError(f"cannot write {folder}: {error.strerror}; free space or choose another --out") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return result


def load_registry(folder: Path) -> Registry:
    """Open a snapshot for looking up; its arrays stay on disk and are mapped into memory. Raises RegistryError."""
    manifest = read_manifest(folder)
    return view(_snapshot(folder, manifest), manifest["checksum"])


def load_snapshot(folder: Path) -> RegistrySnapshot:
    """Open a snapshot for extending it, checking every byte first. Raises RegistryError."""
    verify(folder)
    return _snapshot(folder, read_manifest(folder))


@cache
def packaged_registry() -> Registry:
    """The demo registry that is part of this package."""
    return load_registry(PACKAGED)


def verify(folder: Path) -> None:
    """Read every file of a snapshot and compare its checksum. Raises RegistryError at the first that differs."""
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        _check(folder / name, entry, maximum_bytes=None)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a snapshot. Raises RegistryError if it is missing, damaged or of an unknown format."""
    path = folder / MANIFEST
    try:
        manifest = orjson.loads(path.read_bytes())
    except OSError as error:
        hint = "build one with `personas clusters build`"
        raise RegistryError(f"{folder} is no registry, {MANIFEST}: {error.strerror}; {hint}") from error
    except orjson.JSONDecodeError as error:
        raise RegistryError(f"{path} is damaged ({error}); build or copy the registry again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RegistryError(f"{path} is not of format {FORMAT}; build the registry again with this version")
    try:
        checksums = {Path(name).stem: entry["sha256"] for name, entry in manifest["files"].items()}
        expected = registry_checksum(manifest["version"], checksums)
    except (KeyError, TypeError, AttributeError) as error:
        raise RegistryError(f"{path} lacks {error}; build or copy the registry again") from error
    wanted = {"clusters", *_ARRAYS} | (set(_TRANSITIONS) if set(_TRANSITIONS) & set(checksums) else set())
    if wanted - set(checksums) or manifest.get("checksum") != expected:
        raise RegistryError(f"{path} does not agree with itself; build or copy the registry again")
    return manifest


def _write_into(draft: Path, snapshot: RegistrySnapshot) -> str:
    files: dict[str, dict[str, Any]] = {}
    checksums: dict[str, str] = {}
    for name, content in snapshot.contents().items():
        file_name = f"{name}.json" if isinstance(content, bytes) else f"{name}.npy"
        _write(draft / file_name, content)
        checksums[name] = _file_checksum(draft / file_name)
        files[file_name] = {"bytes": (draft / file_name).stat().st_size, "sha256": checksums[name]}
    result = registry_checksum(snapshot.version, checksums)
    manifest = {
        "format": FORMAT,
        "version": snapshot.version,
        "checksum": result,
        "lineage": snapshot.lineage,
        "counts": {
            "clusters": len(snapshot.cards),
            "videos": len(snapshot.videos.keys),
            "unassigned": unassigned_count(snapshot.videos),
        },
        "history": snapshot.history,
        "files": files,
    }
    _write(draft / MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    _flush_folder(draft)
    return result


def _write(path: Path, content: npt.NDArray[Any] | bytes) -> None:
    with path.open("wb") as stream:
        write_content(stream, content)
        stream.flush()
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _snapshot(folder: Path, manifest: dict[str, Any]) -> RegistrySnapshot:
    for name, entry in manifest["files"].items():
        _check(folder / name, entry, maximum_bytes=_CHECKED_BYTES)
    clusters = orjson.loads((folder / "clusters.json").read_bytes())
    arrays = {name: _mapped(folder / f"{name}.npy", *kind) for name, kind in _ARRAYS.items()}
    videos = VideoTable(
        arrays["video_keys"],
        arrays["video_clusters"],
        TextColumn(arrays["id_text"], arrays["id_offsets"]),
        TextColumn(arrays["title_text"], arrays["title_offsets"]),
        arrays["video_buckets"],
    )
    rows = len(videos.keys)
    if not rows == len(videos.clusters) == len(videos.ids) == len(videos.titles) == videos.buckets[-1]:
        raise RegistryError(f"the video files of {folder} differ in length; build or copy the registry again")
    cards = tuple(_card(card) for card in clusters["clusters"])
    cluster_ids = np.array([card.cluster_id for card in cards], np.int32)
    return RegistrySnapshot(
        version=manifest["version"],
        cards=cards,
        centroids=arrays["centroids"],
        neighbours=Neighbours(arrays["neighbours"], arrays["neighbour_cosines"]),
        videos=videos,
        threshold=clusters["threshold"],
        embedding=clusters["embedding"],
        history=tuple(manifest["history"]),
        lineage=clusters["lineage"],
        successors={int(retired): live for retired, live in clusters["successors"].items()},
        parents=tuple(ParentCard(**_with_tuples(parent)) for parent in clusters["parents"]),
        transitions=_transitions(folder, manifest, cluster_ids),
        safe=_safe(folder, manifest, cluster_ids),
    )


def _transitions(folder: Path, manifest: dict[str, Any], cluster_ids: npt.NDArray[np.int32]) -> Transitions | None:
    if "transition_offsets.npy" not in manifest["files"]:
        return None
    found = Transitions(*[_mapped(folder / f"{name}.npy", *kind) for name, kind in _TRANSITIONS.items()])
    fault = found.fault(cluster_ids)
    if fault is not None:
        raise RegistryError(f"the transitions of {folder} have {fault}; learn them again or copy the registry again")
    return found


def _safe(folder: Path, manifest: dict[str, Any], cluster_ids: npt.NDArray[np.int32]) -> tuple[int, ...]:
    if f"{_SAFE}.npy" not in manifest["files"]:
        return ()
    found = _mapped(folder / f"{_SAFE}.npy", "int32", 1)
    if not np.isin(found, cluster_ids).all() or (np.diff(found) <= 0).any():
        raise RegistryError(
            f"{folder / _SAFE}.npy names clusters that are not there, or twice; copy the registry again"
        )
    return tuple(found.tolist())


def _card(card: dict[str, Any]) -> ClusterCard:
    return ClusterCard(**{**_with_tuples(card), "wording": Wording(card["wording"])})


def _with_tuples(card: dict[str, Any]) -> dict[str, Any]:
    return {**card, "titles": tuple(card["titles"]), "terms": tuple(card["terms"])}


def _mapped(path: Path, dtype: str, dimensions: int) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RegistryError(f"cannot read {path}: {error}; build or copy the registry again") from error
    if array.dtype != np.dtype(dtype) or array.ndim != dimensions:
        raise RegistryError(f"{path} holds {array.dtype} instead of {dtype}; build or copy the registry again")
    # A plain view: the memory stays mapped, without numpy.memmap's slow path on every small slice.
    return array.view(np.ndarray)


def _check(path: Path, entry: dict[str, Any], *, maximum_bytes: int | None) -> None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise RegistryError(
                f"{path} has {size} bytes instead of {entry['bytes']}; build or copy the registry again"
            )
        if (maximum_bytes is None or size <= maximum_bytes) and _file_checksum(path) != entry["sha256"]:
            raise RegistryError(f"{path} was changed or damaged (checksum); build or copy the registry again")
    except OSError as error:
        raise RegistryError(f"cannot read {path}: {error.strerror}; build or copy the registry again") from error


def _file_checksum(path: Path) -> str:
    with path.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()
