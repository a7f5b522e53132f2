"""Clusters a catalogue anew for a registry in use: clusters that persist keep their ids.

k-means starts from the registry's centroids, and from Ward clusters of videos that those do not cover. Starting
without them and matching afterwards loses more than half of the ids where topics blend (benchmarks/clusters_time.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import count as count_from
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from agents.clusters.build import SMALLEST, Starts, build, default_cluster_count, is_sensitive
from agents.clusters.catalogue import Catalogue
from agents.clusters.embedding import MODEL_NAME, Embedder, Progress, Vectors, unit_length
from agents.clusters.events import WatchCounts
from agents.clusters.placement import place
from agents.clusters.snapshot import RegistryError, RegistrySnapshot, unassigned_count, view
from streams.records import UNASSIGNED
from streams.registry import ClusterCard, Neighbours, Wording

PERSISTS: Final = 1 / 3
"""Least overlap (intersection over union) of a cluster that keeps its id: two of one size share half their videos."""
_KEEPS_LABEL: Final = 1 / 2
"""Least overlap, new videos counted too, at which a cluster keeps its label."""
_FOLLOWED: Final = 0.1
"""Least share of a retired cluster's videos in its successor: a few stray ones do not speak for those that left."""
_LABEL_WORDS: Final = 5


Counts = npt.NDArray[np.float64]
"""Videos by (row of the old cluster, row of the new one)."""


@dataclass(frozen=True, slots=True)
class Rebuild:
    """The next version, and what became of the clusters: ids that persisted, were retired and were added.

    relabelled: ids that persisted under another label. common: videos in a cluster before and after; stayed: share of
    them whose cluster id is the same. prior_mapped: share of the old prior on clusters that live on or have a
    successor.
    """

    snapshot: RegistrySnapshot
    persisted: tuple[int, ...]
    retired: tuple[int, ...]
    added: tuple[int, ...]
    relabelled: tuple[int, ...]
    common: int
    stayed: float
    prior_mapped: float


@dataclass(frozen=True, slots=True)
class _Flow:
    """Where the videos of the old clusters are now.

    common: those still in the catalogue. left: those that left it, at the new cluster that took their cluster's place.
    nowhere (K,): those that left with nothing in their place.
    """

    common: Counts
    left: Counts
    nowhere: Counts

    @property
    def all(self) -> Counts:
        return self.common + self.left

    @property
    def old_sizes(self) -> Counts:
        sizes: Counts = self.all.sum(axis=1) + self.nowhere
        return sizes


def rebuild(
    previous: RegistrySnapshot,
    catalogue: Catalogue,
    embedder: Embedder,
    *,
    clusters: int | None = None,
    watches: WatchCounts | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    least_viewers: int | None = None,
) -> Rebuild:
    """Cluster `catalogue` as `build` does, as the next version of `previous`; it holds the catalogue's videos only.

    By default the number of clusters grows with the catalogue. Old and new clusters are matched one to one, so that
    the overlaps of all pairs sum to the most; a pair below PERSISTS does not count. A matched cluster keeps its id, and
    its label unless half of its content changed; a new one gets an id above all ever given; a retired one gets the
    successor that most of its videos went to. A registry of another embedding model is followed by its videos
    alone. Raises RegistryError as `build` does, and if the registry's text was from viewing and the catalogue's is said
    to be public.
    """
    if least_viewers is None and any("least_viewers" in step for step in previous.history):
        raise RegistryError(
            "the registry's text was learned from viewing; say so again with --text-from-viewing, or make a registry of"
            " its own with `personas clusters build`"
        )
    same_model = previous.embedding == MODEL_NAME
    staying = _staying(previous, catalogue)
    if not staying.any():
        raise RegistryError(
            f"{catalogue.name} and the registry have no video in common; make a registry of its own with"
            " `personas clusters build`"
        )
    made = build(
        catalogue,
        embedder,
        clusters=clusters,
        watches=watches,
        seed=seed,
        version=previous.version + 1,
        progress=progress,
        starts=_continued(previous, staying, exact=clusters is not None) if same_model else None,
        least_viewers=least_viewers,
    )
    flow = _flow(previous, made, same_model=same_model)
    ids = _ids(previous, _matched(flow), len(made.cards))
    renewed = _renewed(previous, made, ids, flow, from_viewing=least_viewers is not None)
    return _report(previous, renewed, ids, flow.common)


def _renewed(
    previous: RegistrySnapshot, made: RegistrySnapshot, ids: npt.NDArray[np.int32], flow: _Flow, *, from_viewing: bool
) -> RegistrySnapshot:
    """`made`, whose clusters are numbered by row, as the next version of `previous`."""
    cards = _labelled(previous, made, ids, flow, from_viewing=from_viewing)
    order = np.argsort(ids)
    return replace(
        made,
        cards=tuple(cards[row] for row in order.tolist()),
        centroids=made.centroids[order],
        neighbours=Neighbours(ids[made.neighbours.ids][order], made.neighbours.cosines[order]),
        # Row -1, no cluster, is the last.
        videos=replace(made.videos, clusters=np.append(ids, np.int32(UNASSIGNED))[made.videos.clusters]),
        history=(*previous.history, made.history[0] | {"step": "rebuild"}),
        lineage=previous.lineage,
        successors=_successors(previous, flow, ids),
    )


def _report(
    previous: RegistrySnapshot, snapshot: RegistrySnapshot, ids: npt.NDArray[np.int32], common: Counts
) -> Rebuild:
    before = {card.cluster_id: card for card in previous.cards}
    after = {card.cluster_id: card for card in snapshot.cards}
    persisted = sorted(before.keys() & after.keys())
    stayed = common[np.equal.outer(_cluster_ids(previous), ids)].sum()
    lost = sum(card.prior for card in previous.cards if snapshot.successors.get(card.cluster_id) == UNASSIGNED)
    return Rebuild(
        snapshot=snapshot,
        persisted=tuple(persisted),
        retired=tuple(sorted(before.keys() - after.keys())),
        added=tuple(sorted(after.keys() - before.keys())),
        relabelled=tuple(cluster for cluster in persisted if before[cluster].label != after[cluster].label),
        common=int(common.sum()),
        stayed=round(float(stayed / max(1, common.sum())), 4),
        prior_mapped=round(1 - lost / sum(card.prior for card in previous.cards), 4),
    )


def _cluster_ids(snapshot: RegistrySnapshot) -> npt.NDArray[np.int32]:
    return np.array([card.cluster_id for card in snapshot.cards], np.int32)


def _staying(previous: RegistrySnapshot, catalogue: Catalogue) -> npt.NDArray[np.intp]:
    """How many videos of each old cluster the catalogue still holds, by row."""
    clusters = view(previous, "").clusters_of([video.video_id for video in catalogue.videos])
    rows = np.searchsorted(_cluster_ids(previous), clusters[clusters != UNASSIGNED])
    return np.bincount(rows, minlength=len(previous.cards))


def _continued(previous: RegistrySnapshot, staying: npt.NDArray[np.intp], *, exact: bool) -> Starts:
    """Starts from the old centroids that still have videos, then from the Ward clusters farthest from them.

    Of these there are as many as the catalogue grew, or as there are Ward clusters, large enough to last, whose videos
    the old registry would mostly turn away. `exact`: as many in all as there are Ward clusters, leaving the smallest
    old ones out.
    """
    old = np.asarray(previous.centroids)
    videos = len(previous.videos.keys) - unassigned_count(previous.videos)

    def starts(vectors: Vectors, labels: npt.NDArray[np.intp]) -> Vectors:
        count = int(labels.max()) + 1
        rows, scores = place(vectors, old)
        sizes = np.bincount(labels, minlength=count)
        means = np.zeros((count, vectors.shape[1]))
        np.add.at(means, labels, vectors)
        held = staying + np.bincount(rows, minlength=len(old))
        largest = np.argsort(-held, kind="stable")[: np.count_nonzero(held)]
        kept = old[np.sort(largest[:count] if exact else largest)]
        if exact:
            more = count - len(kept)
        else:
            turned_away = np.bincount(labels, scores < previous.threshold, minlength=count)
            large = sizes >= SMALLEST * sizes.mean()
            means = means[large]
            grown = round(len(old) * count / default_cluster_count(videos)) - len(old)
            more = max(grown, int(np.count_nonzero(turned_away[large] > sizes[large] / 2)), 0)
        ward = unit_length(means)
        farthest = np.argsort((ward @ kept.T).max(axis=1), kind="stable")[:more]
        return np.concatenate([kept, ward[farthest]])

    return starts


def _flow(previous: RegistrySnapshot, made: RegistrySnapshot, *, same_model: bool) -> _Flow:
    """Where the old clusters' videos went; those in no cluster before or after are left out.

    The new cluster that took an old one's place is that of the nearest centroid, if its cosine is nearer to 1 than to
    that of the nearest other old centroid.
    """
    before, after = previous.videos, made.videos
    old_ids = _cluster_ids(previous)
    _, old_rows, new_rows = np.intersect1d(before.keys, after.keys, assume_unique=True, return_indices=True)
    old, new = before.clusters[old_rows], after.clusters[new_rows]
    both = (old != UNASSIGNED) & (new != UNASSIGNED)
    common = np.zeros((len(old_ids), len(made.cards)))
    np.add.at(common, (np.searchsorted(old_ids, old[both]), new[both]), 1)
    gone = ~np.isin(before.keys, after.keys) & (before.clusters != UNASSIGNED)
    sizes = np.bincount(np.searchsorted(old_ids, before.clusters[gone]), minlength=len(old_ids)).astype(np.float64)
    left = np.zeros_like(common)
    if not same_model:
        return _Flow(common, left, sizes)
    cosines = previous.centroids @ made.centroids.T
    rows, nearest = np.arange(len(old_ids)), cosines.argmax(axis=1)
    replaced = cosines[rows, nearest] > (1 + previous.neighbours.cosines.max(axis=1, initial=-1)) / 2
    left[rows, nearest] = np.where(replaced, sizes, 0)
    return _Flow(common, left, np.where(replaced, 0, sizes))


def _overlap(shared: Counts, old: Counts, new: Counts) -> Counts:
    """Intersection over union of old (K,) and new (L,) clusters by their sizes and shared videos (K, L)."""
    union = old[:, None] + new[None, :] - shared
    overlap: Counts = shared / np.maximum(union, 1)
    return overlap


def _matched(flow: _Flow) -> dict[int, int]:
    """Row of the old cluster by row of the new one that continues it."""
    overlap = _overlap(flow.all, flow.old_sizes, flow.all.sum(axis=0))
    overlap[overlap < PERSISTS] = 0
    pairs = zip(*(rows.tolist() for rows in linear_sum_assignment(overlap, maximize=True)), strict=True)
    return {new: old for old, new in pairs if overlap[old, new] > 0}


def _ids(previous: RegistrySnapshot, matched: Mapping[int, int], count: int) -> npt.NDArray[np.int32]:
    """Ids of the new clusters, by row."""
    ever = [card.cluster_id for card in previous.cards] + list(previous.successors)
    fresh = count_from(max(ever) + 1)
    ids = [previous.cards[matched[row]].cluster_id if row in matched else next(fresh) for row in range(count)]
    return np.array(ids, np.int32)


def _successors(previous: RegistrySnapshot, flow: _Flow, ids: npt.NDArray[np.int32]) -> dict[int, int]:
    """For every id retired so far the live id that most of its videos went to; UNASSIGNED if hardly any did."""
    live = set(ids.tolist())
    now = {
        card.cluster_id: int(ids[row.argmax()]) if row.max() >= max(1, _FOLLOWED * size) else UNASSIGNED
        for card, row, size in zip(previous.cards, flow.all, flow.old_sizes.tolist(), strict=True)
        if card.cluster_id not in live
    }
    before = {retired: now.get(successor, successor) for retired, successor in previous.successors.items()}
    return before | now


def _labelled(
    previous: RegistrySnapshot, made: RegistrySnapshot, ids: npt.NDArray[np.int32], flow: _Flow, *, from_viewing: bool
) -> list[ClusterCard]:
    """The new cards with their ids, by row; those of little changed clusters under the old label.

    from_viewing: an old label stays only if enough viewers support its words now.
    """
    rows = {card.cluster_id: row for row, card in enumerate(previous.cards)}
    sizes = np.array([card.support for card in made.cards], np.float64) + flow.left.sum(axis=0)
    overlap = _overlap(flow.all, flow.old_sizes, sizes)
    kept = {
        row: previous.cards[rows[cluster]]
        for row, cluster in enumerate(ids.tolist())
        if cluster in rows
        and overlap[rows[cluster], row] >= _KEEPS_LABEL
        and previous.cards[rows[cluster]].wording is made.cards[row].wording is Wording.OWN
        and (not from_viewing or _says_no_more(previous.cards[rows[cluster]], made.cards[row]))
    }
    taken = {card.label for card in kept.values()}
    cards = []
    for row, (card, cluster) in enumerate(zip(made.cards, ids.tolist(), strict=True)):
        if row in kept:
            old = kept[row]
            named = replace(card, label=old.label, query=old.query, sensitive=card.sensitive or old.sensitive)
        elif card.wording is not Wording.OWN:
            named = card
        else:
            label = _free_label(card, taken)
            named = replace(card, label=label, sensitive=card.sensitive or is_sensitive([label], []))
            taken.add(named.label)
        cards.append(replace(named, cluster_id=cluster))
    return cards


def _says_no_more(old: ClusterCard, new: ClusterCard) -> bool:
    """Whether every word of the old label and query is among those that the new card may say."""
    said = " ".join((old.label, old.query)).split()
    return set(said) <= {"and", *" ".join((new.label, new.query, *new.terms)).split()}


def _free_label(card: ClusterCard, taken: Iterable[str]) -> str:
    """The card's label, or else one that says more, that no other cluster has."""
    joined = (f"{card.label} and {term}" for term in card.terms if term not in card.label)
    numbered = (f"{' '.join(card.label.split()[: _LABEL_WORDS - 1])} {number}" for number in count_from(2))
    fitting = [label for label in joined if len(label.split()) <= _LABEL_WORDS]
    free = (label for label in (card.label, *fitting) if label not in taken)
    return next(free, None) or next(label for label in numbered if label not in taken)
