"""Makes a registry's next version: the same clusters, holding more videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from agents.clusters.catalogue import Catalogue, Video
from agents.clusters.embedding import MODEL_NAME, Embedder, Progress, video_text
from agents.clusters.placement import place
from agents.clusters.snapshot import RegistryError, RegistrySnapshot, merged, replace_support, video_table
from streams.records import UNASSIGNED


@dataclass(frozen=True, slots=True)
class Extension:
    """The next version, and what became of the videos offered: known already, placed, held unassigned."""

    snapshot: RegistrySnapshot
    known: int
    placed: int
    unassigned: int


def extend(
    snapshot: RegistrySnapshot, offered: Catalogue, embedder: Embedder, progress: Progress | None = None
) -> Extension:
    """Add videos: each goes to the nearest centroid of its text if its score reaches the registry's threshold.

    Otherwise it is held unassigned, and tried again when it is offered again. Cluster ids, centroids, names and prior
    stay; support is counted anew; the version grows by one. The same input gives the same output. Raises RegistryError
    if the registry's centroids come from another model, or two ids share a key.
    """
    if snapshot.embedding != MODEL_NAME:
        raise RegistryError(
            f"the registry was built with {snapshot.embedding}, this version has {MODEL_NAME}; build it again"
        )
    videos = _to_place(snapshot, offered.videos)
    clusters = _place(snapshot, videos, embedder, progress)
    table = merged(snapshot.videos, video_table([v.video_id for v in videos], [v.title for v in videos], clusters))
    unassigned = int(np.count_nonzero(clusters == UNASSIGNED))
    placed = len(videos) - unassigned
    step = {
        "step": "extend",
        "source": offered.name,
        "source_sha256": offered.checksum,
        "placed": placed,
        "unassigned": unassigned,
    }
    following = replace(
        snapshot,
        version=snapshot.version + 1,
        cards=replace_support(snapshot.cards, table),
        videos=table,
        history=(*snapshot.history, step),
    )
    return Extension(following, len(offered.videos) - len(videos), placed, unassigned)


def _to_place(snapshot: RegistrySnapshot, videos: Sequence[Video]) -> list[Video]:
    """The videos that the registry does not hold, and those held unassigned that come with text."""
    registry = snapshot.registry()
    clusters = registry.clusters_of([video.video_id for video in videos]).tolist()
    unassigned = [video for video, cluster in zip(videos, clusters, strict=True) if cluster == UNASSIGNED]
    return [video for video in unassigned if _text(video) or not registry.knows(video.video_id)]


def _text(video: Video) -> str:
    return video_text(video.title, video.tags, video.category)


def _place(
    snapshot: RegistrySnapshot, videos: Sequence[Video], embedder: Embedder, progress: Progress | None
) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Cluster ids of the videos, (len(videos),) int32; UNASSIGNED for no text or too far from every centroid."""
    texts = [_text(video) for video in videos]
    with_text = np.array([row for row, text in enumerate(texts) if text], np.intp)
    clusters = np.full(len(videos), UNASSIGNED, np.int32)
    if len(with_text) == 0:
        return clusters
    vectors = embedder.embed([texts[row] for row in with_text], progress)
    rows, scores = place(vectors, snapshot.centroids)
    ids = np.array([card.cluster_id for card in snapshot.cards], np.int32)
    clusters[with_text] = np.where(scores >= snapshot.threshold, ids[rows], np.int32(UNASSIGNED))
    return clusters
