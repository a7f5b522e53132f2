"""Read-only view of a registry snapshot: interest clusters, and the cluster of every known video.

The arrays are handed in (`agents.clusters.files.load_registry` memory-maps them), so that nothing here
touches a disk and opening a snapshot of ten million videos costs no loop over them. Looking up is a binary
search over sorted 64-bit keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streams.identifiers import video_key
from streams.records import UNASSIGNED


@dataclass(frozen=True, slots=True)
class ClusterCard:
    """What is known about one interest cluster.

    label: at most 5 words, lower case, unique in its registry. query: 3 to 8 words for retrieval. titles:
    up to 5 distinct titles nearest to the centroid. terms: the most distinctive terms, best first. support:
    videos in the cluster. prior: smoothed global share, 0..1. cohesion: mean cosine of the members to the
    centroid, -1..1. sensitive: touches health, religion, politics and the like. viewers: distinct viewers
    in the event log the registry was built with; None without one.
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
    """Every known video, by ascending key: keys (V,) uint64, clusters (V,) int32, and the rows' ids and titles."""

    keys: npt.NDArray[np.uint64]
    clusters: npt.NDArray[np.int32]
    ids: TextColumn
    titles: TextColumn


class Registry:
    """One version of the clusters and of the videos in them.

    version: grows by one with every extension. checksum: of all content, so equal checksums mean equal
    answers. lineage: checksum of the clusters alone; cluster ids of two registries mean the same only if it
    is equal. cards: by cluster id. cluster_ids (K,) int32 ascending is the index into `prior` (K,) float64,
    which sums to 1.
    """

    __slots__ = (
        "_neighbours",
        "_row_of_cluster",
        "_videos",
        "cards",
        "checksum",
        "cluster_ids",
        "lineage",
        "prior",
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
    ) -> None:
        ordered = sorted(cards, key=lambda card: card.cluster_id)
        prior = np.array([card.prior for card in ordered], dtype=np.float64)
        self.version = version
        self.checksum = checksum
        self.lineage = lineage
        self.cards: Mapping[int, ClusterCard] = {card.cluster_id: card for card in ordered}
        self.cluster_ids: npt.NDArray[np.int32] = np.array([card.cluster_id for card in ordered], dtype=np.int32)
        self.prior: npt.NDArray[np.float64] = prior / prior.sum()
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
        return self.clusters_of_keys(np.fromiter(map(video_key, video_ids), np.uint64, len(video_ids)))

    def clusters_of_keys(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
        """As `clusters_of`, for keys already computed by `streams.identifiers.video_key`, any shape."""
        known = self._videos.keys
        if len(known) == 0:
            return np.full(keys.shape, UNASSIGNED, np.int32)
        rows = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        found: npt.NDArray[np.int32] = np.where(known[rows] == keys, self._videos.clusters[rows], np.int32(UNASSIGNED))
        return found

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

    def _row_of_key(self, key: int) -> int | None:
        keys = self._videos.keys
        # A Python int would make numpy compare as float64 and lose the low bits.
        row = int(np.searchsorted(keys, np.uint64(key)))
        return row if row < len(keys) and int(keys[row]) == key else None
