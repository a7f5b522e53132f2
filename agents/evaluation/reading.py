"""How texts read: their variety, length and ease, whoever wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Final

from agents.evaluation.answers import Worded
from agents.evaluation.faithfulness import facts_of
from agents.evaluation.text import content_roots, distinct, entropy, flesch, ngrams, words

RUN: Final = 5
_LEADING_TEXT: Final = """
a an and as at but by for from how if in into is its my nor of on or our than that the their this to with without your
"""
_LEADING: Final = frozenset(_LEADING_TEXT.split())


@dataclass(frozen=True, slots=True)
class Reading:
    """Figures over the texts of some personas.

    distinct_2, distinct_3: different runs of words as a share of all; first_word_bits: entropy of first words; words:
    mean length; ease: mean Flesch reading ease; broken_off: share of texts that end in a word that something
    must follow, such as "and"; shared_frames: share of texts that hold a run of 5 words, none of them
    from the facts, that a text of another viewer holds too.
    """

    texts: int
    distinct_2: float
    distinct_3: float
    first_word_bits: float
    words: float
    ease: float
    broken_off: float
    shared_frames: float


def reading(worded: Sequence[Worded]) -> Reading | None:
    """The figures; None without texts."""
    texts = [text.text for one in worded for text in one.texts]
    if not texts:
        return None
    return Reading(
        texts=len(texts),
        distinct_2=distinct(texts, 2),
        distinct_3=distinct(texts, 3),
        first_word_bits=entropy(found[0] for text in texts if (found := words(text))),
        words=mean(len(words(text)) for text in texts),
        ease=mean(map(flesch, texts)),
        broken_off=mean(map(breaks_off, texts)),
        shared_frames=shared_frames(worded),
    )


def breaks_off(text: str) -> bool:
    """Whether a text ends in a word that something must follow."""
    return (words(text) or [""])[-1] in _LEADING


def shared_frames(worded: Sequence[Worded]) -> float:
    """Share of texts with a run of 5 words of their own that another viewer's text has too, 0..1."""
    viewers: dict[tuple[str, ...], set[str]] = {}
    runs = []
    for one in worded:
        for text in one.texts:
            given = content_roots(" . ".join(facts_of(one.case, text)))
            own = {run for run in ngrams(words(text.text), RUN) if not any(content_roots(word) & given for word in run)}
            runs.append(own)
            for run in own:
                viewers.setdefault(run, set()).add(one.case.user_id)
    return sum(any(len(viewers[run]) > 1 for run in own) for own in runs) / len(runs) if runs else 0.0
