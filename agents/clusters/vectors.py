"""Keeps vectors in a folder, so that embedding goes on where it was stopped and does not fill the memory.

The folder holds vectors.json (which model) and part-00000.npy onwards: arrays of (key, vector) records, where the key
is a hash of the text. Each part appears whole or not at all. A text is looked up by its key, so the vectors serve
again when the catalogue grows.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count as count_from
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from agents.clusters.embedding import MODEL_NAME, Embedder, Progress, Vectors
from agents.clusters.snapshot import RegistryError

MODEL_FILE: Final = "vectors.json"
_PART: Final = 1_024
"""Texts embedded between two writes: what a stopped build does again, at most."""
_IN_MEMORY: Final = 64 * 2**20
"""Larger results are mapped from a file, so that the system can page them out."""


@dataclass(frozen=True, slots=True)
class _Part:
    """keys (rows,) in memory, vectors (rows, dimensions) on disk."""

    keys: npt.NDArray[np.uint64]
    vectors: Vectors


class StoredVectors:
    """An embedder that stores what another one computes.

    Its vectors are those of `embedder`, bit for bit, if that one gives a text the same vector whatever it is embedded
    with. One process at a time may use the folder. Raises RegistryError if it is in use, cannot be written, is damaged
    or holds another model's vectors.
    """

    def __init__(self, folder: Path, embedder: Embedder) -> None:
        self._folder = folder
        self._embedder = embedder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()) and not (folder / MODEL_FILE).exists():
                raise RegistryError(f"{folder} holds something else than vectors; give another --work")
            self._model_file = (folder / MODEL_FILE).open("a+b")
            fcntl.flock(self._model_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RegistryError(f"{folder} is in use by another build; wait for it or give another --work") from error
        except OSError as error:
            raise RegistryError(f"cannot write into {folder}: {error.strerror}; give another --work") from error
        self._same_model()
        self._parts: list[_Part] = []
        for path in sorted(folder.glob("part-*.npy")):
            self._open(path)

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """Vectors of the texts, (len(texts), dimensions) float32, as a mapped file if they are many.

        `progress` counts distinct texts, beginning at the number already stored.
        """
        keys = np.fromiter(map(_key, texts), np.uint64, len(texts))
        distinct, first = np.unique(keys, return_index=True)
        missing = np.sort(first[~np.isin(distinct, self._keys())])
        done = len(distinct) - len(missing)
        if progress is not None and done:
            progress(done, len(distinct))
        for begin in range(0, len(missing), _PART):
            rows = missing[begin : begin + _PART]
            vectors = self._embedder.embed([texts[row] for row in rows], _shifted(progress, done, len(distinct)))
            self._store(keys[rows], vectors)
            done += len(rows)
        return self._gathered(keys) if texts else self._embedder.embed([])

    def _keys(self) -> npt.NDArray[np.uint64]:
        return np.concatenate([np.zeros(0, np.uint64), *(part.keys for part in self._parts)])

    def _gathered(self, keys: npt.NDArray[np.uint64]) -> Vectors:
        stored = self._keys()
        order = np.argsort(stored)
        places = order[np.searchsorted(stored, keys, sorter=order)]  # as if all parts were one array
        result = self._empty((len(keys), self._parts[0].vectors.shape[1]))
        by_place = np.argsort(places)
        begins = np.cumsum([0, *(len(part.keys) for part in self._parts)])
        ends = np.searchsorted(places, begins, sorter=by_place)
        for part, begin, (start, end) in zip(self._parts, begins.tolist(), pairwise(ends.tolist()), strict=False):
            rows = by_place[start:end]
            result[rows] = part.vectors[places[rows] - begin]
        return result

    def _empty(self, shape: tuple[int, int]) -> Vectors:
        if shape[0] * shape[1] * np.dtype(np.float32).itemsize <= _IN_MEMORY:
            return np.empty(shape, np.float32)
        path = self._folder / "result.tmp"
        try:
            mapped: Vectors = np.lib.format.open_memmap(path, "w+", np.float32, shape)  # type: ignore[no-untyped-call]
        except OSError as error:
            raise RegistryError(f"cannot write {path}: {error.strerror}; free space or give another --work") from error
        path.unlink()  # it lives as long as the array does
        return mapped.view(np.ndarray)

    def _store(self, keys: npt.NDArray[np.uint64], vectors: Vectors) -> None:
        part = np.empty(len(keys), [("key", np.uint64), ("vector", np.float32, (vectors.shape[1],))])
        part["key"], part["vector"] = keys, vectors
        path = next(path for path in map(self._part_path, count_from(len(self._parts))) if not path.exists())
        draft = path.with_suffix(".tmp")
        try:
            with draft.open("wb") as stream:
                np.save(stream, part, allow_pickle=False)
                stream.flush()
                os.fsync(stream.fileno())
            draft.rename(path)
        except OSError as error:
            raise RegistryError(f"cannot write {path}: {error.strerror}; free space or give another --work") from error
        self._open(path)

    def _part_path(self, number: int) -> Path:
        return self._folder / f"part-{number:05}.npy"

    def _open(self, path: Path) -> None:
        try:
            part: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
            keys, vectors = part["key"].copy(), part["vector"].view(np.ndarray)
        except (OSError, ValueError, IndexError) as error:
            raise RegistryError(f"cannot read {path}: {error}; remove it: its texts are embedded again") from error
        self._parts.append(_Part(keys, vectors))

    def _same_model(self) -> None:
        self._model_file.seek(0)
        content = self._model_file.read()
        if not content:
            self._model_file.write(orjson.dumps({"embedding": MODEL_NAME}))
            self._model_file.flush()
            return
        try:
            stored = orjson.loads(content)["embedding"]
        except (ValueError, KeyError, TypeError) as error:
            raise RegistryError(f"{self._model_file.name} is damaged; remove it or give another --work") from error
        if stored != MODEL_NAME:
            raise RegistryError(
                f"{self._folder} holds vectors of {stored}, not of {MODEL_NAME}; remove it or give another --work"
            )


def _key(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _shifted(progress: Progress | None, done: int, total: int) -> Progress | None:
    return None if progress is None else lambda more, _: progress(done + more, total)
