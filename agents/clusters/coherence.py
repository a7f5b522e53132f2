"""Tells clusters that hold together from grab-bags: what k-means makes of videos that belong nowhere.

k-means cuts any cloud of points into pieces, so a cluster shows a topic only if its videos are closer to each other
than chance alone would bring them. Chance is measured on a surrogate: as many points from one normal distribution with
the mean and covariance of the videos' vectors, a cloud as wide in each direction and without any group (a reference
distribution as in the gap statistic, Tibshirani et al. 2001), cut by k-means into as many pieces. The bar
adapts to the catalogue; its form was chosen on three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from agents.clusters.embedding import Vectors, unit_length

QUANTILE: Final = 0.95
"""A cluster below this quantile of the surrogate's clusters is not told from them."""
_SAMPLE: Final = 20_000
_VIDEOS_PER_CLUSTER: Final = 20
"""The sample grows with the number of clusters, so that the surrogate's clusters are not a handful of videos."""
_ITERATIONS: Final = 10
_ROWS_AT_ONCE: Final = 8_192


@dataclass(frozen=True, slots=True)
class Coherence:
    """Mean cosine of two different videos of each cluster, (K,), -1..1; `level`: what chance reaches.

    A cluster of one video shows no topic, so its value is -1.
    """

    values: npt.NDArray[np.float64]
    level: float

    @property
    def coherent(self) -> npt.NDArray[np.bool_]:
        """Which clusters hold together better than chance, (K,)."""
        return self.values >= self.level


def coherence(vectors: Vectors, members: npt.NDArray[np.int32], count: int, seed: int = 0) -> Coherence:
    """Measure the clusters 0 .. count - 1; `members` (N,) holds each video's, `vectors` (N, dimensions) are unit."""
    values = pair_cosines(vectors, members, count)
    random = np.random.default_rng(seed)
    size = min(len(vectors), max(_SAMPLE, _VIDEOS_PER_CLUSTER * count))
    sample = np.sort(random.choice(len(vectors), size, replace=False))
    cloud = surrogate(np.asarray(vectors[sample]), random)
    with threadpool_limits(1):
        groups = KMeans(count, init="random", n_init=1, max_iter=_ITERATIONS, random_state=seed).fit(cloud).labels_
    by_chance = pair_cosines(cloud, groups, count)
    # The smallest pieces are close by luck; a registry dissolves its like. Pieces of one video are none.
    found = by_chance[np.bincount(groups, minlength=count) >= max(2, size / count / 2)]
    level = float(np.quantile(found, QUANTILE)) if len(found) else 1.0
    return Coherence(values, round(level, 4))


def pair_cosines(vectors: Vectors, members: npt.NDArray[np.int32], count: int) -> npt.NDArray[np.float64]:
    """Mean cosine over the pairs of different rows of each cluster, (count,); -1 for fewer than two rows.

    Other than the mean cosine to the centroid it does not rise for small clusters.
    """
    sums = np.zeros((count, vectors.shape[1]))
    for begin in range(0, len(vectors), _ROWS_AT_ONCE):
        rows = vectors[begin : begin + _ROWS_AT_ONCE].astype(np.float64)
        of_row = members[begin : begin + _ROWS_AT_ONCE]
        sums += csr_array((np.ones(len(rows)), (of_row, np.arange(len(rows)))), shape=(count, len(rows))) @ rows
    sizes = np.bincount(members, minlength=count).astype(np.float64)
    ordered_pairs = sizes * (sizes - 1)
    cosines: npt.NDArray[np.float64] = (np.einsum("ij,ij->i", sums, sums) - sizes) / np.maximum(ordered_pairs, 1)
    return np.where(ordered_pairs > 0, cosines, -1.0)


def surrogate(vectors: Vectors, random: np.random.Generator) -> Vectors:
    """Unit vectors, as many as the rows, in the directions of normal draws with the rows' mean and covariance."""
    with threadpool_limits(1):
        mean = vectors.mean(axis=0)
        centred = vectors - mean
        variances, components = np.linalg.eigh(centred.T @ centred / len(vectors))
        draws = random.standard_normal(vectors.shape, np.float32) * np.sqrt(np.maximum(variances, 0))
        return unit_length(draws @ components.T + mean)
