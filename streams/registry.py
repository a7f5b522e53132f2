"""Read-only view of a registry snapshot: interest clusters, and the cluster of every known video.

The arrays are handed in (`agents.clusters.files.load_registry` memory-maps them), so that nothing here
touches a disk and opening a snapshot of ten million videos costs no loop over them. Looking up is a binary
search over sorted 64-bit keys, within the few rows whose keys begin with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from streams.identifiers import video_key, video_keys
from streams.records import UNASSIGNED
from streams.transitions import Transitions

_ROWS_PER_BUCKET: Final = 8
_LEAST_PRIOR: Final = 1e-12
"""No cluster is impossible: what a viewer watched is compared with it."""


class Wording(StrEnum):
    """Whose words a card holds: the cluster's own, its parent's (too few viewers for its own), or none at all."""

    OWN = "own"
    PARENT = "parent"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class ClusterCard:
    """What is known about one interest cluster. All its text may be shown: what may not was left out at the build.

    label: at most 5 words, lower case, unique among cards in their own words. query: 3 to 8 words for retrieval.
    titles: up to 5 distinct titles nearest to the centroid. terms: the most distinctive terms, best first. support:
    videos in the cluster. prior: smoothed global share, 0..1. cohesion: mean cosine of the members to the
    centroid, -1..1. sensitive: touches health, religion, politics and the like. viewers: distinct viewers
    in the event log the registry was built with; None without one. parent: id of its parent card. coherent: its
    videos are closer to each other than chance brings them; otherwise it is a grab-bag. wording: whose label and query
    these are; titles and terms are empty unless they are its own.
    """

    cluster_id: int
    label: str
    query: str
    titles: tuple[str, ...]
    terms: tuple[str, ...]
    support: int
    prior: float
    cohesion: float
    sensitive: bool
    viewers: int | None = None
    parent: int = 0
    coherent: bool = True
    wording: Wording = Wording.OWN

    @property
    def statable(self) -> bool:
        """Whether a persona may name it. It is counted all the same."""
        return self.coherent and not self.sensitive and self.wording is not Wording.NONE

    @property
    def suggestible(self) -> bool:
        """Whether a persona may propose it as a new topic: only in its own words, a parent's may be old news."""
        return self.statable and self.wording is Wording.OWN


@dataclass(frozen=True, slots=True)
class ParentCard:
    """What is known about a group of close clusters; label, query, titles and terms as on a ClusterCard.

    All are empty if too few viewers stand behind them.
    """

    parent_id: int
    label: str
    query: str
    titles: tuple[str, ...]
    terms: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TextColumn:
    """Strings as one UTF-8 blob, (bytes,) uint8; string i is blob[offsets[i]:offsets[i + 1]], (rows + 1,) int64."""

    blob: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> str:
        return self.blob[self.offsets[row] : self.offsets[row + 1]].tobytes().decode("utf-8")


@dataclass(frozen=True, slots=True)
class Neighbours:
    """For each cluster the others by centroid cosine, best first: ids (K, M) int32 and cosines (K, M) float32."""

    ids: npt.NDArray[np.int32]
    cosines: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class VideoTable:
    """Every known video, by ascending key: keys (V,) uint64, clusters (V,) int32, and the rows' ids and titles.

    buckets: `bucket_offsets` of the keys.
    """

    keys: npt.NDArray[np.uint64]
    clusters: npt.NDArray[np.int32]
    ids: TextColumn
    titles: TextColumn
    buckets: npt.NDArray[np.uint32]


def bucket_offsets(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """Where to look for a key: those whose first b bits are i are in rows [offsets[i], offsets[i + 1]) of `keys`.

    (2**b + 1,), with b such that a bucket holds 4 to 8 keys on average. `keys` ascend; there are less than 2**32.
    """
    bits = max(1, (len(keys) // _ROWS_PER_BUCKET).bit_length())
    first = np.arange(2**bits, dtype=np.uint64) << np.uint64(64 - bits)
    return np.append(np.searchsorted(keys, first), len(keys)).astype(np.uint32)


class Registry:
    """One version of the clusters and of the videos in them.

    version: grows by one with every extension or rebuild. checksum: of all content, so equal checksums mean equal
    answers. lineage: names the id space: cluster ids of two registries mean the same only if it is equal, and an
    id is never given twice in it. successors: for every id retired in the lineage so far, the live cluster that
    most of its videos went to, UNASSIGNED (-1) if none. cards: by cluster id. cluster_ids (K,) int32 ascending is the
    index into `prior` (K,) float64, which sums to 1; `prior_by_id` is the same indexed by cluster id, 0 where retired.
    parents: cards of the groups that the clusters form, by parent id, which says nothing about other versions.
    transitions: what viewers take up after what, None where it was not learned. safe: ids of the clusters that may be
    proposed to teens and kids.
    """

    __slots__ = (
        "_neighbours",
        "_row_of_cluster",
        "_videos",
        "cards",
        "checksum",
        "cluster_ids",
        "lineage",
        "parents",
        "prior",
        "prior_by_id",
        "safe",
        "successors",
        "transitions",
        "version",
    )

    def __init__(
        self,
        *,
        version: int,
        checksum: str,
        lineage: str,
        cards: Sequence[ClusterCard],
        neighbours: Neighbours,
        videos: VideoTable,
        successors: Mapping[int, int] = MappingProxyType({}),
        parents: Sequence[ParentCard] = (),
        transitions: Transitions | None = None,
        safe: Iterable[int] = (),
    ) -> None:
        ordered = sorted(cards, key=lambda card: card.cluster_id)
        prior = np.array([max(card.prior, _LEAST_PRIOR) for card in ordered], dtype=np.float64)
        self.version = version
        self.checksum = checksum
        self.lineage = lineage
        self.successors = successors
        self.transitions = transitions
        self.safe: frozenset[int] = frozenset(safe)
        self.parents: Mapping[int, ParentCard] = {parent.parent_id: parent for parent in parents}
        self.cards: Mapping[int, ClusterCard] = {card.cluster_id: card for card in ordered}
        self.cluster_ids: npt.NDArray[np.int32] = np.array([card.cluster_id for card in ordered], dtype=np.int32)
        self.prior: npt.NDArray[np.float64] = prior / prior.sum()
        self.prior_by_id: npt.NDArray[np.float64] = np.zeros(int(self.cluster_ids.max(initial=-1)) + 1)
        self.prior_by_id[self.cluster_ids] = self.prior
        self._row_of_cluster = {card.cluster_id: row for row, card in enumerate(ordered)}
        self._neighbours = neighbours
        self._videos = videos

    def __len__(self) -> int:
        """Number of known videos."""
        return len(self._videos.keys)

    def cluster_of(self, video_id: str) -> int:
        """Cluster of a video; UNASSIGNED (-1) if the video is unknown or close to no cluster."""
        row = self._row_of_key(video_key(video_id))
        return UNASSIGNED if row is None else int(self._videos.clusters[row])

    def clusters_of(self, video_ids: Sequence[str]) -> npt.NDArray[np.int32]:
        """Clusters of many videos, (len(video_ids),); UNASSIGNED (-1) where `cluster_of` gives it."""
        return self.clusters_of_keys(np.frombuffer(video_keys(video_ids), "<u8"))

    def clusters_of_keys(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
        """As `clusters_of`, for keys already computed by `streams.identifiers.video_key`, any shape."""
        known = self._videos.keys
        if len(known) == 0:
            return np.full(keys.shape, UNASSIGNED, np.int32)
        rows = np.minimum(self._rows_of_keys(keys), len(known) - 1)
        found: npt.NDArray[np.int32] = np.where(known[rows] == keys, self._videos.clusters[rows], np.int32(UNASSIGNED))
        return found

    def successor_of(self, cluster_id: int) -> int:
        """The live cluster that stands for one of any version of this lineage: itself while it lives.

        UNASSIGNED (-1) for a retired cluster whose videos are gone, and for an id never given.
        """
        return cluster_id if cluster_id in self.cards else self.successors.get(cluster_id, UNASSIGNED)

    def knows(self, video_id: str) -> bool:
        """Whether the registry holds the video, be it in a cluster or not."""
        return self._row_of_key(video_key(video_id)) is not None

    def video_of(self, key: int) -> str | None:
        """Video id with this key (`streams.identifiers.video_key`), None if unknown."""
        row = self._row_of_key(key)
        return None if row is None else self._videos.ids[row]

    def title_of(self, video_id: str) -> str | None:
        """Title of a video, None if the video is unknown or has none."""
        row = self._row_of_key(video_key(video_id))
        return None if row is None else self._videos.titles[row] or None

    def similar(self, cluster_id: int) -> Sequence[tuple[int, float]]:
        """Other clusters as (cluster id, centroid cosine), best first; at most as many as the snapshot stores.

        Raises KeyError for a cluster that the registry does not hold.
        """
        row = self._row_of_cluster[cluster_id]
        return list(zip(self._neighbours.ids[row].tolist(), self._neighbours.cosines[row].tolist(), strict=True))

    def leads_to(self, cluster_id: int) -> Sequence[tuple[int, float]]:
        """Clusters taken up after this one as (cluster id, `Transitions.pulls`), best first; none without a graph.

        Raises KeyError for a cluster that the registry does not hold.
        """
        row = self._row_of_cluster[cluster_id]
        if self.transitions is None:
            return []
        edges = self.transitions.of(row)
        return list(zip(edges.targets.tolist(), edges.pulls().tolist(), strict=True))

    def _rows_of_keys(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
        """`numpy.searchsorted` for random keys in a large table: an order of magnitude fewer cache misses."""
        known, offsets = self._videos.keys, self._videos.buckets
        buckets = (keys >> np.uint64(64 - _bucket_bits(offsets))).astype(np.intp)
        low, high = offsets[buckets].astype(np.intp), offsets[buckets + 1].astype(np.intp)
        for _ in range(int((high - low).max(initial=0)).bit_length()):
            middle = (low + high) >> 1
            below = (known[np.minimum(middle, len(known) - 1)] < keys) & (low < high)
            low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
        return low

    def _row_of_key(self, key: int) -> int | None:
        keys, offsets = self._videos.keys, self._videos.buckets
        bucket = key >> (64 - _bucket_bits(offsets))
        first = int(offsets[bucket])
        # A Python int would make numpy compare as float64 and lose the low bits.
        row = first + int(np.searchsorted(keys[first : int(offsets[bucket + 1])], np.uint64(key)))
        return row if row < len(keys) and int(keys[row]) == key else None


def _bucket_bits(offsets: npt.NDArray[np.uint32]) -> int:
    return len(offsets).bit_length() - 1
