"""Measures how well clusters agree with a field of the catalogue that they were not shown.

The product's own clustering stands beside two plain ones, all on the same text and with the same number of clusters:
k-means on MiniLM vectors, and k-means on TF-IDF reduced by SVD (latent semantic analysis).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import adjusted_mutual_info_score
from threadpoolctl import threadpool_limits

from agents.clusters.build import centroids_of, means, nearest
from agents.clusters.catalogue import Catalogue, CatalogueError, Video
from agents.clusters.embedding import Embedder, Progress, Vectors, unit_length, video_text

DEFAULT_CLUSTERS: Final = 64
_SVD_DIMENSIONS: Final = 100
"""What scikit-learn's documentation recommends for latent semantic analysis."""

Labels = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Adjusted mutual information of one method's clusters with the reference, by seed: 1 the same, 0 chance.

    first_value: each video counts once, under the first value of its field. all_values: once for every value.
    """

    first_value: tuple[float, ...]
    all_values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """videos: those with text and a reference value; values: distinct first values. `methods` by name."""

    videos: int
    values: int
    clusters: int
    seeds: tuple[int, ...]
    methods: Mapping[str, Agreement]


def evaluate(
    catalogue: Catalogue,
    reference: Mapping[str, Sequence[str]],
    field: str,
    embedder: Embedder,
    *,
    clusters: int = DEFAULT_CLUSTERS,
    seeds: Sequence[int] = (0, 1, 2),
    progress: Progress | None = None,
    step: Callable[[str], None] = lambda name: None,
) -> Evaluation:
    """Cluster the catalogue without `field` and compare with `reference`, the field's values by video id.

    Videos without a value or without other text are left out. `clusters` is lowered to the number of videos;
    `progress` follows the embedding, `step` is told each clustering as it begins. Raises CatalogueError if fewer than
    two values are left.
    """
    held_back = [(video_text(*_without(video, field)), reference.get(video.video_id, ())) for video in catalogue.videos]
    usable = [(text, values) for text, values in held_back if text and values]
    first = [values[0] for _, values in usable]
    if len(set(first)) < 2:
        raise CatalogueError(
            f"{catalogue.name}: the videos have {len(set(first))} different values of {field!r} to compare with; at"
            " least 2 are needed"
        )
    texts = [text for text, _ in usable]
    count = min(clusters, len(texts))
    vectors = embedder.embed(texts, progress)
    methods: dict[str, Callable[[int], Labels]] = {
        "registry": lambda seed: nearest(vectors, centroids_of(vectors, count, 0.0, seed, means))[0],
        "minilm_kmeans": lambda seed: _kmeans(vectors, count, seed),
        "tfidf_svd_kmeans": lambda seed: _kmeans(tfidf_svd(texts, seed), count, seed),
    }
    every = [value for _, values in usable for value in values]
    repeats = [len(values) for _, values in usable]
    found = {}
    for name, method in methods.items():
        single, multiple = [], []
        for seed in seeds:
            step(f"{name}, seed {seed}")
            labels = method(seed)
            single.append(_agreement(first, labels))
            multiple.append(_agreement(every, np.repeat(labels, repeats)))
        found[name] = Agreement(tuple(single), tuple(multiple))
    return Evaluation(len(texts), len(set(first)), count, tuple(seeds), found)


def tfidf_svd(texts: Sequence[str], seed: int = 0) -> Vectors:
    """TF-IDF of the texts' words, reduced by SVD to at most 100 dimensions, unit length: (len(texts), dimensions)."""
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, stop_words="english")
    try:
        weights = vectorizer.fit_transform(texts)
    except ValueError:  # no word is in two texts
        return np.zeros((len(texts), 1), np.float32)
    dimensions = min(_SVD_DIMENSIONS, *(side - 1 for side in weights.shape))
    if dimensions < 1:
        return unit_length(weights.toarray())
    with threadpool_limits(1):
        return unit_length(TruncatedSVD(dimensions, random_state=seed).fit_transform(weights))


def _without(video: Video, field: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    return (
        "" if field == "title" else video.title,
        () if field == "tags" else video.tags,
        () if field == "category" else video.category,
    )


def _kmeans(vectors: Vectors, count: int, seed: int) -> Labels:
    with threadpool_limits(1):
        labels: Labels = KMeans(count, n_init=1, random_state=seed).fit(vectors).labels_
    return labels


def _agreement(reference: Sequence[str], labels: Labels) -> float:
    return round(float(adjusted_mutual_info_score(reference, labels)), 4)
