"""Names clusters by the terms that set their videos apart from all others.

A term is a tag or category as a whole, or one or two neighbouring words of a title. Its score in a cluster
is the share of the cluster's videos that use it, times the log of how much more often they do than other
videos (class-based TF-IDF in its log-ratio form, counted over videos so that a repetitive title weighs no
more than another), times how close its embedding is to the centroid.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count as count_from
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import orjson
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

from agents.clusters.catalogue import Video
from agents.clusters.embedding import Embedder, Vectors

_DATA: Final = Path(__file__).parent.parent / "data"
_WORD: Final = re.compile(r"\w[\w'+#&-]*\w|\w")
_BREAK: Final = re.compile(r"[^\w\s'+#&-]+|\s-+\s")
_LABEL_WORDS: Final = 5
_WORD_LETTERS: Final = 30
_QUERY_WORDS: Final = (3, 4, 8)
_TERMS: Final = 8
_CANDIDATES: Final = 60
_COVERS: Final = 0.5
"""A term that this share of a cluster's videos use may name it alone; a rarer one is joined by a second."""
_COMMON: Final = 0.15
"""Terms of at least this share come before all rarer ones: a name that few videos bear names no cluster."""
_SPEAKS: Final = 0.7
"""A single word less close to the centroid than this says too little alone ("endgame", "spanish")."""
_SYNONYMS: Final = 0.65
"""Two terms used together and closer than this say the same: they count as one, and are not joined."""
_PARTNER: Final = 0.35
"""A joined term scores at least this share of the best one, if there is such a term."""
_PHRASE_BONUS: Final = 1.25
"""Two words say more than either alone, but are always rarer."""
_BROAD: Final = 0.4
"""Factor for terms that many clusters share: they should name one only if nothing else does."""
_SHARED_BY: Final = 4
"""A term in as many videos as this number of average clusters hold is shared by many, as categories are."""
_FILLERS: Final = ("videos", "highlights", "stories")


@dataclass(frozen=True, slots=True)
class Support:
    """What text that comes from viewing needs before it may be shown.

    viewers (videos, viewers): 1 where one watched the other. least: viewers that must stand behind a term or title.
    """

    viewers: csr_array
    least: int

    def of_videos(self) -> npt.NDArray[np.bool_]:
        """Which videos enough viewers watched, (videos,)."""
        enough: npt.NDArray[np.bool_] = np.diff(self.viewers.indptr) >= self.least
        return enough

    def of_terms(self, rows: npt.NDArray[np.intp], users: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which terms enough viewers met: `users` (len(rows), terms) tells which of the videos `rows` use them."""
        met = csr_array(users.T.astype(np.int32)) @ self.viewers[rows]
        enough: npt.NDArray[np.bool_] = np.diff(met.indptr) >= self.least
        return enough


@dataclass(frozen=True, slots=True)
class Name:
    """label: at most 5 words, unique; query: 3 to 8 words; terms: best first, none if nothing may be said."""

    label: str
    query: str
    terms: tuple[str, ...]


def name_clusters(
    videos: Sequence[Video],
    clusters: npt.NDArray[np.int32],
    centroids: Vectors,
    embedder: Embedder,
    support: Support | None = None,
) -> list[Name]:
    """Names of clusters 0 .. len(centroids) - 1; `clusters` (len(videos),) holds each video's, none negative.

    With `support` a term counts only in clusters where it has that; without, the videos' text is public.
    """
    count = len(centroids)
    plain = [_varied(terms)[:_TERMS] for terms in _ranked(videos, clusters, count, support)]
    vectors = _embedded([[term.text for term in terms] for terms in plain], embedder, centroids.shape[1])
    ranked = [_reranked(*each) for each in zip(plain, vectors, centroids, strict=True)]
    pairs = [[_joined(terms[0], other) for other in terms[1:]] for terms in ranked]
    closeness = [v @ c for v, c in zip(_embedded(pairs, embedder, centroids.shape[1]), centroids, strict=True)]
    options = [
        _labels(terms, dict(zip(pair, close.tolist(), strict=True)))
        for terms, pair, close in zip(ranked, pairs, closeness, strict=True)
    ]
    # The cluster a term fits best chooses first, so that the clearest cluster gets the plainest label.
    order = sorted(range(count), key=lambda cluster: (-ranked[cluster][0].score if ranked[cluster] else 0.0, cluster))
    taken: set[str] = set()
    names: dict[int, Name] = {}
    for cluster in order:
        label = next(label for label in options[cluster] if label not in taken)
        taken.add(label)
        terms = tuple(term.text for term in ranked[cluster])
        names[cluster] = Name(label, _query(label, terms), terms)
    return [names[cluster] for cluster in range(count)]


@dataclass(frozen=True, slots=True, eq=False)
class _Term:
    """A term in a cluster. broad: shared by many clusters; users: which of the cluster's videos use it."""

    text: str
    score: float
    broad: bool
    users: npt.NDArray[np.bool_]
    vector: Vectors
    closeness: float = 0.0

    @property
    def share(self) -> float:
        """Share of the cluster's videos that use it, 0..1."""
        return float(self.users.mean())

    @property
    def stems(self) -> frozenset[str]:
        """Beginnings of its words: enough to see that skateboard and skateboarding say the same."""
        return frozenset(word[:5] for word in self.text.split())


def terms_of(video: Video) -> set[str]:
    """Every term of a video, lower case."""
    terms = {term for phrase in _BREAK.split(_straight(video.title)) for term in _title_terms(phrase)}
    terms.update(map(_label_term, (*video.tags, *video.category)))
    terms.discard("")
    return terms


def _label_term(label: str) -> str:
    """A tag or category as a term; empty if it is too long or says nothing."""
    words = _words(label)
    fits = len(words) <= 3 and all(len(word) <= _WORD_LETTERS for word in words)
    return " ".join(words) if fits and any(map(_meaningful, words)) else ""


def _title_terms(phrase: str) -> Iterator[str]:
    words = _words(phrase)
    yield from filter(_meaningful, words)
    for first, second in pairwise(words):
        if _meaningful(first) and _meaningful(second):
            yield f"{first} {second}"


def _words(text: str) -> list[str]:
    return [word.removesuffix("'s") for word in _WORD.findall(_straight(text).lower())]


def _straight(text: str) -> str:
    return text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def _meaningful(word: str) -> bool:
    return 1 < len(word) <= _WORD_LETTERS and not word.isdecimal() and word not in _stop_words()


@cache
def _stop_words() -> frozenset[str]:
    """English function words, and words that say "this is a video" rather than what it shows."""
    own: list[str] = orjson.loads((_DATA / "stop_words.json").read_bytes())["words"]
    return frozenset(ENGLISH_STOP_WORDS).union(own)


def _ranked(
    videos: Sequence[Video], clusters: npt.NDArray[np.int32], count: int, support: Support | None
) -> list[list[_Term]]:
    """Each cluster's best terms by score, best first, ties by the alphabet; with `support` only those that have it."""
    # Words of one video alone say nothing about its cluster, but a handful of videos may share no word.
    minimum = 2 if len(videos) > 10 * count else 1
    vectorizer = CountVectorizer(analyzer=terms_of, binary=True, min_df=minimum)
    try:
        used = vectorizer.fit_transform(videos)
    except ValueError:  # no term is left
        return [[] for _ in range(count)]
    vocabulary = vectorizer.get_feature_names_out()
    total = np.asarray(used.sum(axis=0), dtype=np.float64).ravel()
    broad = _categories(videos).union(vocabulary[total > _SHARED_BY * len(videos) / count].tolist())
    ranked = []
    for cluster in range(count):
        rows = np.flatnonzero(clusters == cluster)
        own = used[rows]
        inside = np.asarray(own.sum(axis=0), dtype=np.float64).ravel()
        scores = _scores(inside, total, own.shape[0], len(videos))
        best = np.argsort(-scores, kind="stable")[:_CANDIDATES]  # columns are in alphabetical order
        users = own[:, best].toarray().astype(bool)
        supported = np.ones(len(best), np.bool_) if support is None else support.of_terms(rows, users)
        terms = [
            _Term(
                text=str(vocabulary[column]),
                score=float(scores[column]) * _weight(str(vocabulary[column]), broad),
                broad=str(vocabulary[column]) in broad,
                users=users[:, place],
                vector=np.zeros(0, np.float32),
            )
            for place, column in enumerate(best.tolist())
            if scores[column] > 0 and supported[place]
        ]
        ranked.append(sorted(terms, key=lambda term: (-term.score, term.text)))
    return ranked


def _scores(
    inside: npt.NDArray[np.float64], total: npt.NDArray[np.float64], size: int, videos: int
) -> npt.NDArray[np.float64]:
    """Share of the cluster's videos with each term x log of its lift over the other videos, floored at 0."""
    lift = np.log((inside + 0.5) / (size + 1)) - np.log((total - inside + 0.5) / (videos - size + 1))
    scores: npt.NDArray[np.float64] = inside / size * np.maximum(lift, 0.0)
    return scores


def _categories(videos: Sequence[Video]) -> frozenset[str]:
    """Terms that are a category more often than a tag."""
    tags = Counter(_label_term(tag) for video in videos for tag in video.tags)
    categories = Counter(_label_term(category) for video in videos for category in video.category)
    return frozenset(term for term, uses in categories.items() if uses > tags[term])


def _weight(term: str, broad: frozenset[str]) -> float:
    return (_PHRASE_BONUS if " " in term else 1.0) * (_BROAD if term in broad else 1.0)


def _varied(terms: Sequence[_Term]) -> list[_Term]:
    """The terms without those that repeat the words of better ones."""
    kept: list[_Term] = []
    for term in terms:
        if not any(term.stems <= other.stems or other.stems <= term.stems for other in kept):
            kept.append(term)
    return kept


def _embedded(groups: Sequence[Sequence[str]], embedder: Embedder, dimensions: int) -> list[Vectors]:
    """Vectors of each group's texts, in one call; (0, dimensions) for an empty group."""
    sizes = [len(group) for group in groups]
    if sum(sizes) == 0:
        return [np.zeros((0, dimensions), np.float32) for _ in groups]
    return np.split(embedder.embed([text for group in groups for text in group]), np.cumsum(sizes)[:-1])


def _reranked(terms: Sequence[_Term], vectors: Vectors, centroid: Vectors) -> list[_Term]:
    """Best first by score times closeness; common terms before rare ones, particular before broad ones."""
    cosines = [float(vector @ centroid) for vector in vectors]
    close = [
        replace(term, vector=vector, closeness=cosine, score=term.score * max(0.0, cosine))
        for term, vector, cosine in zip(terms, vectors, cosines, strict=True)
    ]
    return sorted(close, key=lambda term: (term.share < _COMMON, term.broad, -term.score, term.text))


def _labels(terms: Sequence[_Term], closeness: Mapping[str, float]) -> Iterator[str]:
    """Labels from best to worst; endless, so that a free one is always found. `closeness`: of joined labels."""
    if terms:
        best, *others = terms
        synonyms = [term for term in others if _say_the_same(best, term)]
        covered = np.any([term.users for term in (best, *synonyms)], axis=0).mean()
        speaks = " " in best.text or best.closeness >= _SPEAKS
        if not others or (covered >= _COVERS and speaks):
            yield best.text
        partners = [term for term in others if term.score >= _PARTNER * best.score and term.broad <= best.broad]
        joined = [_joined(best, term) for term in partners if term not in synonyms]
        yield from _fitting(sorted(joined, key=lambda label: -closeness[label]))
        yield from _fitting([_joined(best, term) for term in others])
    base = terms[0].text if terms else "mixed videos"
    if not terms:
        yield base
    yield from (f"{' '.join(base.split()[: _LABEL_WORDS - 1])} {number}" for number in count_from(2))


def _say_the_same(first: _Term, second: _Term) -> bool:
    """Whether two terms are close in meaning and used together; those of two merged topics never are."""
    together = float((first.users & second.users).mean())
    return float(first.vector @ second.vector) >= _SYNONYMS and together >= first.share * second.share / 2


def _fitting(labels: Sequence[str]) -> Iterator[str]:
    return (label for label in labels if len(label.split()) <= _LABEL_WORDS)


def _joined(first: _Term, second: _Term) -> str:
    return f"{first.text} and {second.text}"


def _query(label: str, terms: Sequence[str]) -> str:
    """Words of the label, then of the next terms, without repeats: 3 to 8 of them."""
    at_least, aim, at_most = _QUERY_WORDS
    words = dict.fromkeys(word for word in label.split() if word != "and")
    for term in terms:
        if len(words) >= aim:
            break
        words.update(dict.fromkeys(term.split()))
    for filler in _FILLERS:
        if len(words) >= at_least:
            break
        words[filler] = None
    return " ".join(list(words)[:at_most])
