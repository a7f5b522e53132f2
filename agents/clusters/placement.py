"""Decides which cluster a video joins, and how near it must be.

A video's score is its cosine to the nearest centroid plus that cosine's lead over the mean of the next ones: a video of
no known topic lies between clusters, about as far from many. (The second term is cross-domain similarity local
scaling, Conneau et al. 2018, taken on the video's side alone.) The least score at which a video is placed is
calibrated on held-out videos.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from threadpoolctl import threadpool_limits

from agents.clusters.embedding import Vectors, unit_length

WANTED_REJECTED: Final = 0.05
_OTHERS: Final = 10
_FOLDS: Final = 5
_HELD_OUT: Final = 50_000
"""Enough videos for the quantile; more would only take longer."""
_ROWS_AT_ONCE: Final = 8_192


@dataclass(frozen=True, slots=True)
class Calibration:
    """A threshold and what it does to held-out videos, shares in 0..1.

    rejected: of videos that the threshold's calibration did not see, turned away; wanted_rejected is the share aimed
    at. same_cluster: nearest to the cluster they are in when they are part of it. accepted_elsewhere: would be placed
    in another cluster if theirs did not exist.
    """

    threshold: float
    held_out: int
    folds: int
    wanted_rejected: float
    rejected: float
    same_cluster: float
    accepted_elsewhere: float


def place(vectors: Vectors, centroids: Vectors) -> tuple[npt.NDArray[np.int32], Vectors]:
    """For each row of `vectors` the row of the nearest centroid, and its score -1..3; both (N,)."""
    rows, scores = np.empty(len(vectors), np.int32), np.empty(len(vectors), np.float32)
    with threadpool_limits(1):
        for begin in range(0, len(vectors), _ROWS_AT_ONCE):
            part = slice(begin, begin + _ROWS_AT_ONCE)
            cosines = vectors[part] @ centroids.T
            rows[part] = cosines.argmax(axis=1)
            scores[part] = _scores(cosines)
    return rows, scores


def calibrate(vectors: Vectors, members: npt.NDArray[np.int32], count: int, seed: int = 0) -> Calibration:
    """The score that all but WANTED_REJECTED of held-out videos reach.

    The videos are split into folds. Those of a fold are placed among centroids computed without them, which is how a
    video that comes later meets the registry. `members` (N,) holds each video's cluster, 0 .. count - 1.
    """
    random = np.random.default_rng(seed)
    folds = random.permutation(len(vectors)) % _FOLDS
    alone = np.bincount(members, minlength=count)[members] < 2  # without it there is no cluster to find
    candidates = np.flatnonzero(~alone)
    if len(candidates) == 0:
        return Calibration(1.0, 0, _FOLDS, WANTED_REJECTED, 0.0, 0.0, 0.0)
    held_out = np.sort(random.choice(candidates, min(_HELD_OUT, len(candidates)), replace=False))
    sums = _sums(vectors, folds * count + members, _FOLDS * count).reshape(_FOLDS, count, -1)
    whole = sums.sum(axis=0)
    scores, elsewhere = np.empty(len(held_out), np.float32), np.empty(len(held_out), np.float32)
    same = np.empty(len(held_out), np.bool_)
    with threadpool_limits(1):
        for fold in range(_FOLDS):
            centroids = unit_length(whole - sums[fold])
            places = np.flatnonzero(folds[held_out] == fold)
            for part in np.array_split(places, -(-len(places) // _ROWS_AT_ONCE) or 1):
                rows = held_out[part]
                cosines = vectors[rows] @ centroids.T
                scores[part] = _scores(cosines)
                same[part] = cosines.argmax(axis=1) == members[rows]
                cosines[np.arange(len(rows)), members[rows]] = -1
                elsewhere[part] = _scores(cosines)
    threshold = round(float(np.quantile(scores, WANTED_REJECTED)), 4)
    return Calibration(
        threshold=threshold,
        held_out=len(held_out),
        folds=_FOLDS,
        wanted_rejected=WANTED_REJECTED,
        rejected=_rejected(scores, folds[held_out]),
        same_cluster=_share(same),
        accepted_elsewhere=_share(elsewhere >= threshold),
    )


def _scores(cosines: Vectors) -> Vectors:
    """Scores of rows of cosines (N, K); the cosine itself if there is one cluster only."""
    others = min(_OTHERS, cosines.shape[1] - 1)
    best = -np.partition(-cosines, (0, others), axis=1)[:, : others + 1]
    scores: Vectors = 2 * best[:, 0] - best[:, 1:].mean(axis=1) if others else best[:, 0]
    return scores


def _sums(vectors: Vectors, groups: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.float64]:
    """Sum of the rows of each group, (count, dimensions)."""
    sums = np.zeros((count, vectors.shape[1]))
    for begin in range(0, len(vectors), _ROWS_AT_ONCE):
        rows = vectors[begin : begin + _ROWS_AT_ONCE].astype(np.float64)
        of_row = groups[begin : begin + _ROWS_AT_ONCE]
        sums += csr_array((np.ones(len(rows)), (of_row, np.arange(len(rows)))), shape=(count, len(rows))) @ rows
    return sums


def _rejected(scores: Vectors, folds: npt.NDArray[np.int64]) -> float:
    """Share below the threshold that the other folds would have set."""
    rejected = np.zeros(len(scores), np.bool_)
    for fold in range(_FOLDS):
        inside = folds == fold
        if inside.any() and not inside.all():
            rejected[inside] = scores[inside] < np.quantile(scores[~inside], WANTED_REJECTED)
    return _share(rejected)


def _share(flags: npt.NDArray[np.bool_]) -> float:
    return round(float(flags.mean()), 4)
