"""The second level of a registry: parents, each over several clusters that are close to each other."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from sklearn.cluster import AgglomerativeClustering
from threadpoolctl import threadpool_limits

from agents.clusters.embedding import Vectors, unit_length


def parent_count(clusters: int) -> int:
    """Twice the root of the number of clusters: as many clusters under a parent as half the parents there are."""
    return max(1, min(clusters // 2, round(2 * math.sqrt(clusters))))


def parents_of(centroids: Vectors, count: int) -> npt.NDArray[np.int32]:
    """Parent 0 .. count - 1 of each cluster, (K,): Ward's tree over the centroids (K, dimensions), cut at `count`.

    Parents are numbered in the order of their first cluster. benchmarks/clusters_quality.md compares this cut with
    residual quantisation of the centroids.
    """
    if count < 2:
        return np.zeros(len(centroids), np.int32)
    with threadpool_limits(1):
        labels = AgglomerativeClustering(count).fit(centroids).labels_
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    numbers = np.empty(len(first), np.int32)
    numbers[np.argsort(first)] = np.arange(len(first))
    return numbers[inverse]


def parent_centroids(centroids: Vectors, sizes: npt.NDArray[np.int64], parents: npt.NDArray[np.int32]) -> Vectors:
    """Unit centroids of the parents, (parents, dimensions); a cluster weighs as its number of videos, `sizes` (K,)."""
    sums = np.zeros((int(parents.max()) + 1, centroids.shape[1]))
    np.add.at(sums, parents, centroids * sizes[:, None])
    return unit_length(sums)
