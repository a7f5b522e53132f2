"""Builds a registry from a catalogue: embed, cluster, name, count.

The same catalogue, settings and package versions give the same snapshot: videos are ordered by id, nothing
depends on the clock or on the number of cores, and random choices (only in catalogues too large to start
from whole) are seeded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson
from sklearn.cluster import AgglomerativeClustering, KMeans
from threadpoolctl import threadpool_limits

from agents.clusters.catalogue import Catalogue, Video
from agents.clusters.coherence import Coherence, coherence
from agents.clusters.embedding import MODEL_NAME, Embedder, Progress, Vectors, unit_length, video_text
from agents.clusters.events import WatchCounts
from agents.clusters.hierarchy import parent_centroids, parent_count, parents_of
from agents.clusters.naming import Name, Support, name_clusters
from agents.clusters.placement import Calibration, calibrate
from agents.clusters.snapshot import FEWEST_VIEWERS, RegistryError, RegistrySnapshot, checksum, video_table
from streams.records import UNASSIGNED
from streams.registry import ClusterCard, Neighbours, ParentCard, Wording

_DATA: Final = Path(__file__).parent.parent / "data"
_VIDEOS_PER_CLUSTER: Final = 22
_FEWEST: Final = 8
_MOST: Final = 1024
SMALLEST: Final = 1 / 2
"""A cluster below this share of the average size is dissolved: more a handful of odd titles than a topic."""
_SMALLEST_CONTINUED: Final = 1 / 4
"""The same where clusters go on from an earlier registry: one near the edge should not come and go."""
_STARTED_FROM: Final = 6_000
"""Ward's clustering looks at all pairs, so in a larger catalogue it starts from a random sample of this size."""
_FITTED_ON: Final = 200_000
_NEIGHBOURS: Final = 64
_TITLES: Final = 5
_SENSITIVE_SHARE: Final = 0.1
_ROWS_AT_ONCE: Final = 8_192

Starts = Callable[[Vectors, npt.NDArray[np.intp]], Vectors]
"""The points that k-means starts from, (K, dimensions), given a sample of the vectors and its Ward clusters."""


def default_cluster_count(videos: int) -> int:
    """One cluster per 22 videos, within 8 .. 1024, and never more clusters than videos."""
    return min(videos, max(_FEWEST, min(_MOST, round(videos / _VIDEOS_PER_CLUSTER))))


def build(
    catalogue: Catalogue,
    embedder: Embedder,
    *,
    clusters: int | None = None,
    watches: WatchCounts | None = None,
    seed: int = 0,
    version: int = 1,
    progress: Progress | None = None,
    starts: Starts | None = None,
    least_viewers: int | None = None,
) -> RegistrySnapshot:
    """Cluster a catalogue. Videos without any text are known but unassigned.

    `clusters` is their number; fewer come out if some stay empty. By default it is `default_cluster_count`,
    and clusters of less than half the average size are dissolved. `watches` adds each cluster's viewers and
    makes the prior the mean viewer's shares instead of the catalogue's. `progress` follows the embedding,
    which takes nearly all the time. `starts` are by default the means of the Ward clusters.

    `least_viewers` says that the catalogue's text is not public but was learned from viewing: no term enters a label
    and no title a card unless so many viewers watched the videos it comes from. A cluster left without a label speaks
    in its parent's words, and without a title. Raises RegistryError if the catalogue has too few videos, or
    `least_viewers` is below FEWEST_VIEWERS or comes without `watches`.
    """
    _check_least(least_viewers, watches)
    texts = [video_text(video.title, video.tags, video.category) for video in catalogue.videos]
    with_text = [row for row, text in enumerate(texts) if text]
    count = default_cluster_count(len(with_text)) if clusters is None else clusters
    if not 2 <= count <= len(with_text):
        raise RegistryError(
            f"{catalogue.name} has {len(with_text)} videos with title, tags or category, too few for {count}"
            " clusters (at least 2, each with a video); use a larger catalogue or another -k"
        )
    videos = [catalogue.videos[row] for row in with_text]
    vectors = embedder.embed([texts[row] for row in with_text], progress)
    smallest = SMALLEST if starts is None else _SMALLEST_CONTINUED
    centroids = centroids_of(vectors, count, 0.0 if clusters is not None else smallest, seed, starts or means)
    members, _ = nearest(vectors, centroids)
    placement = calibrate(vectors, members, len(centroids), seed)
    support = (
        Support(watches.by_video([v.video_id for v in videos]), least_viewers) if watches and least_viewers else None
    )
    names = name_clusters(videos, members, centroids, embedder, support)
    groups = _groups(members, len(centroids))
    parent_of = parents_of(centroids, parent_count(len(centroids)))
    sizes = np.bincount(members, minlength=len(centroids))
    roots = parent_centroids(centroids, sizes, parent_of)
    parents = _parents(videos, vectors, parent_of[members], roots, embedder, support)
    held = coherence(vectors, members, len(centroids), seed)
    assigned = np.full(len(catalogue.videos), UNASSIGNED, np.int32)
    assigned[with_text] = members
    prior, viewers = _popularity(catalogue.videos, assigned, len(centroids), watches)
    ids = [video.video_id for video in catalogue.videos]
    titles = [video.title for video in catalogue.videos]
    cards = []
    for cluster, (name, rows) in enumerate(zip(names, groups, strict=True)):
        cosines = vectors[rows] @ centroids[cluster]
        own = [videos[row] for row in rows]
        parent = parents[parent_of[cluster]]
        wording = _wording(name, parent, support)
        speaks = parent if wording is Wording.PARENT else name
        cards.append(
            ClusterCard(
                cluster_id=cluster,
                label=speaks.label,
                query=speaks.query,
                titles=_representatives(videos, rows, cosines, support) if wording is Wording.OWN else (),
                terms=name.terms,
                support=len(rows),
                prior=round(float(prior[cluster]), 9),
                cohesion=round(float(cosines.mean()), 4),
                sensitive=is_sensitive([speaks.label, *speaks.terms[:3]], own),
                viewers=None if viewers is None else int(viewers[cluster]),
                parent=parent.parent_id,
                coherent=bool(held.coherent[cluster]),
                wording=wording,
            )
        )
    return RegistrySnapshot(
        version=version,
        cards=tuple(cards),
        centroids=centroids,
        neighbours=_neighbours(centroids),
        videos=video_table(ids, titles, assigned),
        threshold=placement.threshold,
        embedding=MODEL_NAME,
        history=(_built_from(catalogue, watches, seed, placement, held, least_viewers),),
        lineage=checksum(centroids),
        parents=parents,
    )


def is_sensitive(names: Sequence[str], videos: Sequence[Video]) -> bool:
    """Whether a cluster is about a sensitive topic: by its names, or by a tenth (and two) of its videos."""
    pattern = _sensitive_pattern()
    if any(pattern.search(name) for name in names):
        return True
    hits = sum(bool(pattern.search(" . ".join((v.title, *v.tags, *v.category)).lower())) for v in videos)
    return hits >= max(2, _SENSITIVE_SHARE * len(videos))


def nearest(vectors: Vectors, centroids: Vectors) -> tuple[npt.NDArray[np.int32], Vectors]:
    """For each row of `vectors` the row of the centroid with the largest cosine, and that cosine; both (N,)."""
    rows = np.empty(len(vectors), np.int32)
    cosines = np.empty(len(vectors), np.float32)
    with threadpool_limits(1):
        for begin in range(0, len(vectors), _ROWS_AT_ONCE):
            part = slice(begin, begin + _ROWS_AT_ONCE)
            similarity = vectors[part] @ centroids.T
            rows[part] = similarity.argmax(axis=1)
            cosines[part] = similarity.max(axis=1)
    return rows, cosines


def centroids_of(vectors: Vectors, count: int, smallest: float, seed: int, starts: Starts) -> Vectors:
    """Centroids of k-means, (K, dimensions), unit length; each nearest to `smallest` of the mean size, and one video.

    By default k-means starts from Ward's clusters: closer to topics than random starts, and without their luck. On
    the demo catalogue that raised the agreement with its topics (adjusted mutual information) from .90 to .94.
    """
    random = np.random.default_rng(seed)
    started_from = _sample(random, len(vectors), max(_STARTED_FROM, 4 * count))
    fitted_on = _sample(random, len(vectors), _FITTED_ON)
    with threadpool_limits(1):
        ward = AgglomerativeClustering(count).fit(vectors[started_from]).labels_
        start = starts(vectors[started_from], ward)[: len(fitted_on)]
        fitted = KMeans(len(start), init=start, n_init=1, random_state=seed).fit(vectors[fitted_on])
    centroids = unit_length(fitted.cluster_centers_)
    least = max(1.0, smallest * len(vectors) / len(start))
    while True:
        sizes = np.bincount(nearest(vectors, centroids)[0], minlength=len(centroids))
        kept = sizes >= least
        kept[sizes.argmax()] = True
        if kept.all():
            return centroids
        centroids = centroids[kept]


def means(vectors: Vectors, labels: npt.NDArray[np.intp]) -> Vectors:
    """Mean of each label's rows, by label."""
    return np.stack([vectors[labels == label].mean(axis=0) for label in range(labels.max() + 1)])


def _sample(random: np.random.Generator, rows: int, size: int) -> npt.NDArray[np.intp]:
    if rows <= size:
        return np.arange(rows)
    return np.sort(random.choice(rows, size, replace=False))


def _groups(members: npt.NDArray[np.int32], count: int) -> list[npt.NDArray[np.intp]]:
    """Rows of each cluster, ascending."""
    order = np.argsort(members, kind="stable")
    return np.split(order, np.cumsum(np.bincount(members, minlength=count))[:-1])


def _check_least(least_viewers: int | None, watches: WatchCounts | None) -> None:
    if least_viewers is None:
        return
    if least_viewers < FEWEST_VIEWERS:
        raise RegistryError(
            f"text from viewing needs at least {FEWEST_VIEWERS} viewers behind it, not {least_viewers}; give a larger"
            " number"
        )
    if watches is None:
        raise RegistryError("text from viewing needs the events that tell who watched what; give --events")


def _wording(name: Name, parent: ParentCard, support: Support | None) -> Wording:
    if support is None or name.terms:
        return Wording.OWN
    return Wording.PARENT if parent.terms else Wording.NONE


def _parents(
    videos: Sequence[Video],
    vectors: Vectors,
    members: npt.NDArray[np.int32],
    centroids: Vectors,
    embedder: Embedder,
    support: Support | None,
) -> tuple[ParentCard, ...]:
    """Cards of the parents; `members` (N,) holds each video's."""
    names = name_clusters(videos, members, centroids, embedder, support)
    cards = []
    for parent, (name, rows) in enumerate(zip(names, _groups(members, len(centroids)), strict=True)):
        if support is not None and not name.terms:
            cards.append(ParentCard(parent, "", "", (), ()))
            continue
        titles = _representatives(videos, rows, vectors[rows] @ centroids[parent], support)
        cards.append(ParentCard(parent, name.label, name.query, titles, name.terms))
    return tuple(cards)


def _representatives(
    videos: Sequence[Video], rows: npt.NDArray[np.intp], cosines: Vectors, support: Support | None
) -> tuple[str, ...]:
    """The distinct titles of the videos `rows` nearest to the centroid, `cosines` (len(rows),) to it."""
    near = sorted(zip((-cosines).tolist(), rows.tolist(), strict=True), key=lambda pair: (pair[0], pair[1]))
    allowed = None if support is None else support.of_videos()
    distinct: dict[str, str] = {}
    for row in (row for _, row in near if allowed is None or allowed[row]):
        title = videos[row].title
        if title:
            distinct.setdefault(title.casefold(), title)
        if len(distinct) == _TITLES:
            break
    return tuple(distinct.values())


def _popularity(
    videos: Sequence[Video], assigned: npt.NDArray[np.int32], count: int, watches: WatchCounts | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64] | None]:
    """Prior (count,), and distinct viewers (count,) if there are watches.

    Add-one smoothing. With watches every viewer weighs 1, so that no heavy viewer shapes everybody's prior.
    """
    if watches is None:
        shares = np.bincount(assigned[assigned != UNASSIGNED], minlength=count).astype(np.float64)
        return (shares + 1) / (shares.sum() + count), None
    cluster_of = {video.video_id: cluster for video, cluster in zip(videos, assigned.tolist(), strict=True)}
    shares, viewers = watches.by_cluster(cluster_of, count)
    return (shares + 1) / (shares.sum() + count), viewers


def _neighbours(centroids: Vectors) -> Neighbours:
    with threadpool_limits(1):
        cosines = centroids @ centroids.T
    np.fill_diagonal(cosines, -np.inf)  # never its own neighbour
    ids = np.argsort(-cosines, axis=1, kind="stable")[:, : min(_NEIGHBOURS, len(centroids) - 1)].astype(np.int32)
    return Neighbours(ids, np.take_along_axis(cosines, ids.astype(np.intp), axis=1))


def _built_from(
    catalogue: Catalogue,
    watches: WatchCounts | None,
    seed: int,
    placement: Calibration,
    held: Coherence,
    least_viewers: int | None,
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "step": "build",
        "catalogue": catalogue.name,
        "catalogue_sha256": catalogue.checksum,
        "videos": len(catalogue.videos),
        "bad_lines": len(catalogue.bad_lines),
        "duplicates": len(catalogue.duplicates),
        "seed": seed,
        "placement": asdict(placement),
        "coherence_by_chance": held.level,
    }
    if least_viewers is not None:
        facts["least_viewers"] = least_viewers
    if watches is not None:
        facts |= {"events": watches.name, "viewers": watches.viewers, "watches": watches.total}
    return facts


@cache
def _sensitive_pattern() -> re.Pattern[str]:
    content = orjson.loads((_DATA / "sensitive_terms.json").read_bytes())
    terms = sorted(term for topic, values in content.items() if topic != "about" for term in values)
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, terms))})s?(?![\w-])")
