"""A registry snapshot in memory: what `build` makes, `extend` grows, `rebuild` renews and `files` stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from typing import Any, BinaryIO, Final, Protocol, cast

import numpy as np
import numpy.typing as npt
import orjson

from streams.identifiers import video_keys
from streams.records import UNASSIGNED
from streams.registry import ClusterCard, Neighbours, ParentCard, Registry, TextColumn, VideoTable, bucket_offsets
from streams.transitions import Transitions

LEAST_VIEWERS: Final = 50
"""Viewers that must stand behind text learned from viewing before it is shown, by default."""
FEWEST_VIEWERS: Final = 20
"""No setting goes below this."""
_ROWS_AT_ONCE: Final = 262_144


class RegistryError(Exception):
    """A registry that cannot be made or used; the message names what is wrong, where, and the remedy."""


@dataclass(frozen=True, slots=True)
class RegistrySnapshot:
    """One version of a registry.

    cards: one per cluster, ids ascending. parents: one per group of clusters. centroids: (K, dimensions) float32, unit
    length. threshold: least score (`agents.clusters.placement`) at which a new video is placed. embedding: name of
    the model of the centroids. history: the build and every extension and rebuild since, oldest first, as JSON objects.
    lineage, successors, transitions and safe (ascending): see `streams.registry.Registry`.
    """

    version: int
    cards: tuple[ClusterCard, ...]
    centroids: npt.NDArray[np.float32]
    neighbours: Neighbours
    videos: VideoTable
    threshold: float
    embedding: str
    history: tuple[dict[str, Any], ...]
    lineage: str
    successors: Mapping[int, int] = field(default_factory=dict)
    parents: tuple[ParentCard, ...] = ()
    transitions: Transitions | None = None
    safe: tuple[int, ...] = ()

    def contents(self) -> dict[str, npt.NDArray[Any] | bytes]:
        """Everything stored, by file name without suffix: arrays, and bytes of JSON.

        A registry without transitions, or without safe clusters, has no files of them.
        """
        stored: dict[str, npt.NDArray[Any] | bytes] = {
            "clusters": self._clusters_json(),
            "centroids": self.centroids,
            "neighbours": self.neighbours.ids,
            "neighbour_cosines": self.neighbours.cosines,
            "video_keys": self.videos.keys,
            "video_clusters": self.videos.clusters,
            "video_buckets": self.videos.buckets,
            "id_text": self.videos.ids.blob,
            "id_offsets": self.videos.ids.offsets,
            "title_text": self.videos.titles.blob,
            "title_offsets": self.videos.titles.offsets,
        }
        if self.transitions is not None:
            for each in fields(self.transitions):
                stored[f"transition_{each.name}"] = getattr(self.transitions, each.name)
        if self.safe:
            stored["safe_clusters"] = np.array(self.safe, np.int32)
        return stored

    def registry(self) -> Registry:
        """The read-only view of this snapshot."""
        return view(self, registry_checksum(self.version, {n: checksum(c) for n, c in self.contents().items()}))

    def _clusters_json(self) -> bytes:
        content = {
            "embedding": self.embedding,
            "threshold": self.threshold,
            "lineage": self.lineage,
            "successors": {str(retired): live for retired, live in sorted(self.successors.items())},
            "clusters": self.cards,
            "parents": self.parents,
        }
        return orjson.dumps(content, option=orjson.OPT_INDENT_2)


def view(snapshot: RegistrySnapshot, content_checksum: str) -> Registry:
    """The read-only view of a snapshot whose checksum is already known."""
    return Registry(
        version=snapshot.version,
        checksum=content_checksum,
        lineage=snapshot.lineage,
        cards=snapshot.cards,
        neighbours=snapshot.neighbours,
        videos=snapshot.videos,
        successors=snapshot.successors,
        parents=snapshot.parents,
        transitions=snapshot.transitions,
        safe=snapshot.safe,
    )


class _Sink(Protocol):
    def write(self, data: bytes, /) -> object: ...


def write_content(sink: _Sink, content: npt.NDArray[Any] | bytes) -> None:
    """Write what a stored file holds, without a copy of it: JSON as it is, an array in numpy's .npy format."""
    if isinstance(content, bytes):
        sink.write(content)
    else:
        np.save(cast(BinaryIO, sink), np.ascontiguousarray(content), allow_pickle=False)


class _Digest:
    def __init__(self) -> None:
        self.sha256 = sha256()

    def write(self, data: bytes, /) -> None:
        self.sha256.update(data)


def checksum(content: npt.NDArray[Any] | bytes) -> str:
    """SHA-256 of a stored file, hexadecimal."""
    digest = _Digest()
    write_content(digest, content)
    return digest.sha256.hexdigest()


def registry_checksum(version: int, checksums: dict[str, str]) -> str:
    """SHA-256 over the version and the checksum of every stored file."""
    return sha256(orjson.dumps({"version": version, **checksums}, option=orjson.OPT_SORT_KEYS)).hexdigest()


def text_column(texts: Sequence[str]) -> TextColumn:
    """Store strings as one column."""
    pieces = [text.encode() for text in texts]
    offsets = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
    return TextColumn(np.frombuffer(b"".join(pieces), np.uint8), offsets)


def video_table(ids: Sequence[str], titles: Sequence[str], clusters: npt.NDArray[np.int32]) -> VideoTable:
    """Table of videos in any order. Raises RegistryError if two ids have the same 64-bit key."""
    keys = np.frombuffer(video_keys(ids), "<u8").astype(np.uint64)
    return _sorted(keys, clusters.astype(np.int32), text_column(ids), text_column(titles))


def merged(old: VideoTable, new: VideoTable) -> VideoTable:
    """Both tables as one; a video of `new` replaces the same video of `old`.

    Raises RegistryError if two different ids have the same key.
    """
    kept = np.flatnonzero(~np.isin(old.keys, new.keys))
    for row in np.flatnonzero(np.isin(old.keys, new.keys)).tolist():
        _refuse_collision(old.ids[row], new.ids[int(np.searchsorted(new.keys, old.keys[row]))])
    return _sorted(
        np.concatenate([old.keys[kept], new.keys]),
        np.concatenate([old.clusters[kept], new.clusters]),
        _joined(_taken(old.ids, kept), new.ids),
        _joined(_taken(old.titles, kept), new.titles),
    )


def unassigned_count(videos: VideoTable) -> int:
    """How many videos of the table are in no cluster."""
    return int(np.count_nonzero(videos.clusters == UNASSIGNED))


def replace_support(cards: Sequence[ClusterCard], videos: VideoTable) -> tuple[ClusterCard, ...]:
    """The cards with their support counted anew over `videos`."""
    placed = videos.clusters[videos.clusters != UNASSIGNED]
    counts = np.bincount(placed, minlength=max(card.cluster_id for card in cards) + 1)
    return tuple(replace(card, support=int(counts[card.cluster_id])) for card in cards)


def _sorted(
    keys: npt.NDArray[np.uint64], clusters: npt.NDArray[np.int32], ids: TextColumn, titles: TextColumn
) -> VideoTable:
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    for row in np.flatnonzero(keys[1:] == keys[:-1]).tolist():
        _refuse_collision(ids[int(order[row])], ids[int(order[row + 1])])
    return VideoTable(keys, clusters[order], _taken(ids, order), _taken(titles, order), bucket_offsets(keys))


def _refuse_collision(first: str, second: str) -> None:
    if first != second:
        raise RegistryError(f"videos {first!r} and {second!r} have the same 64-bit key; leave one out of the catalogue")


def _taken(column: TextColumn, rows: npt.NDArray[np.intp]) -> TextColumn:
    """The strings of these rows, in this order, without a Python loop over them."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    starts = column.offsets[:-1][rows]
    lengths = column.offsets[1:][rows] - starts
    np.cumsum(lengths, out=offsets[1:])
    blob = np.empty(int(offsets[-1]), np.uint8)
    for begin in range(0, len(rows), _ROWS_AT_ONCE):  # bounds the index array, eight bytes per byte of text
        part = slice(begin, begin + _ROWS_AT_ONCE)
        here = slice(int(offsets[begin]), int(offsets[min(begin + _ROWS_AT_ONCE, len(rows))]))
        source = np.arange(here.start, here.stop) + np.repeat(starts[part] - offsets[:-1][part], lengths[part])
        blob[here] = column.blob[source]
    return TextColumn(blob, offsets)


def _joined(first: TextColumn, second: TextColumn) -> TextColumn:
    offsets = np.concatenate([first.offsets, second.offsets[1:] + first.offsets[-1]])
    return TextColumn(np.concatenate([first.blob, second.blob]), offsets)
