"""What personas tell about what is watched next, beside plain predictors of the same watches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from agents.clusters.embedding import Embedder
from agents.evaluation.answers import Worded
from agents.evaluation.cases import Case, Watch

FUTURE: Final = 20
"""Watches after the persona that its words are compared with."""
PAST_TITLES: Final = 10
"""Latest titles that stand for the history."""
SMOOTHING: Final = 0.1


@dataclass(frozen=True, slots=True)
class Ranked:
    """How well a predictor ranks the next distinct cluster: hit rates at 1 and 5, mean reciprocal rank; 0..1."""

    hit_1: float
    hit_5: float
    mrr: float
    cases: int


@dataclass(frozen=True, slots=True)
class Similarity:
    """Mean cosines to the titles watched after the persona, and how often the persona is the closer one, 0..1."""

    persona: float
    past: float
    shuffled: float
    above_past: float
    above_shuffled: float
    cases: int


Scores = Callable[[Worded], Mapping[int, float]]


def next_distinct(case: Case) -> int | None:
    """The first cluster watched after the persona that is not the one watched last."""
    last = case.past[-1].cluster_id if case.past else None
    return next((watch.cluster_id for watch in case.future if watch.cluster_id != last), None)


def by_persona(worded: Worded) -> dict[int, float]:
    """Interests by share, then novel topics by confidence."""
    scores = {topic.cluster_id: 1e-3 * topic.confidence for topic in worded.persona.novel}
    return scores | {interest.cluster_id: 1.0 + interest.share for interest in worded.persona.interests}


def by_recency(worded: Worded) -> dict[int, float]:
    """Clusters by when they were last watched."""
    return {watch.cluster_id: float(place) for place, watch in enumerate(worded.case.past, 1)}


def by_frequency(worded: Worded) -> dict[int, float]:
    """Clusters by how often they were watched."""
    return {cluster: float(count) for cluster, count in Counter(w.cluster_id for w in worded.case.past).items()}


def by_transitions(worded: Worded) -> dict[int, float]:
    """The viewer's own transitions from the last cluster (Markov, order 1, add .1), frequency as a tie-break."""
    distinct = [w.cluster_id for w, b in zip(worded.case.past, [None, *worded.case.past], strict=False)
                if b is None or b.cluster_id != w.cluster_id]  # fmt: skip
    if not distinct:
        return {}
    after = Counter(b for a, b in pairwise(distinct) if a == distinct[-1])
    frequency = by_frequency(worded)
    return {cluster: after[cluster] + SMOOTHING * count / len(distinct) for cluster, count in frequency.items()}


PREDICTORS: Final[Mapping[str, Scores]] = {
    "persona": by_persona,
    "recency": by_recency,
    "frequency": by_frequency,
    "Markov": by_transitions,
}


def ranked(worded: Sequence[Worded], scores: Scores) -> Ranked | None:
    """Rank of the next distinct cluster among all but the last one; what has no score shares the ranks after."""
    places = [place for one in worded if (place := _place(one, scores(one))) is not None]
    if not places:
        return None
    return Ranked(
        hit_1=float(np.mean([place <= 1 for place in places])),
        hit_5=float(np.mean([place <= 5 for place in places])),
        mrr=float(np.mean([1.0 / place for place in places])),
        cases=len(places),
    )


def similarity(worded: Sequence[Worded], embedder: Embedder) -> Similarity | None:
    """Cosine of the persona's words, of its last titles, and of another viewer's persona, to what was watched after.

    The other viewer is the next one of the same catalogue.
    """
    usable = [one for one in worded if _titles(one.case.future[:FUTURE]) and _titles(one.case.past) and one.texts]
    others = [_another(one, usable) for one in usable]
    rows = [(one, other) for one, other in zip(usable, others, strict=True) if other is not None]
    if not rows:
        return None
    future = np.stack([_mean(embedder, _titles(one.case.future[:FUTURE])) for one, _ in rows])
    persona = embedder.embed([said(one) for one, _ in rows])
    shuffled = embedder.embed([said(other) for _, other in rows])
    past = embedder.embed([". ".join(_titles(one.case.past)[-PAST_TITLES:]) for one, _ in rows])
    own, before, foreign = ((vectors * future).sum(axis=1) for vectors in (persona, past, shuffled))
    return Similarity(
        persona=float(own.mean()),
        past=float(before.mean()),
        shuffled=float(foreign.mean()),
        above_past=float((own > before).mean()),
        above_shuffled=float((own > foreign).mean()),
        cases=len(rows),
    )


def said(worded: Worded) -> str:
    """The words of a persona about what is liked: the summary and the descriptions."""
    return " ".join(text.text for text in worded.texts if text.part != "novel")


def _titles(watches: Sequence[Watch]) -> list[str]:
    return [watch.title for watch in watches if watch.title]


def _place(worded: Worded, scores: Mapping[int, float]) -> float | None:
    case = worded.case
    target = next_distinct(case)
    if target is None or not case.past:
        return None
    others = [cluster for cluster in case.clusters if cluster != case.past[-1].cluster_id]
    own = scores.get(target, 0.0)
    above = sum(scores.get(cluster, 0.0) > own for cluster in others)
    equal = sum(scores.get(cluster, 0.0) == own for cluster in others if cluster != target)
    return 1 + above + equal / 2


def _another(worded: Worded, all_of_them: Sequence[Worded]) -> Worded | None:
    same = [one for one in all_of_them if one.case.catalogue == worded.case.catalogue]
    place = next(n for n, one in enumerate(same) if one is worded)
    turned = [*same[place + 1 :], *same[:place]]
    return next((one for one in turned if one.case.user_id != worded.case.user_id), None)


def _mean(embedder: Embedder, texts: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    vector = np.asarray(embedder.embed(texts), dtype=np.float64).mean(axis=0)
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), np.float64)
