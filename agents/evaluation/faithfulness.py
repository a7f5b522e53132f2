"""Whether personas say what the viewer's events and the context hold, and nothing else.

Apart from the gate in every rule: evidence is looked up in the watches themselves, names are what no editor ever wrote
in lower case, and numbers count when spelled out too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from agents.clusters.embedding import Vectors
from agents.evaluation.answers import Text, Worded
from agents.evaluation.cases import Case
from agents.evaluation.text import common_words, content_roots, sentences, words

LEAST_WATCHES: Final = 3
"""Watches behind an interest."""
_SPELLED_TEXT: Final = """
three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred hundreds thousand
thousands million millions dozen dozens percent half third quarter twice thrice
"""
_SPELLED: Final = frozenset(_SPELLED_TEXT.split())
_TIMES: Final = re.compile(
    r"\b(?:mondays?|tuesdays?|wednesdays?|thursdays?|fridays?|saturdays?|sundays?|weekends?|weekdays?|mornings?|"
    r"evenings?|january|february|april|june|july|august|september|october|november|december|"
    r"for (?:years|months|weeks|decades)|since childhood|lifelong)\b"
)
_RISING: Final = re.compile(
    r"\b(?:more and more|more than before|growing|increasingly|ever more|picking up|on the rise)\b"
)
_FALLING: Final = re.compile(
    r"\b(?:less and less|less than before|less often|fading|waning|losing interest|cooling off)\b"
)


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement of a persona and what is wrong with it: an interest, a novel topic or the summary."""

    part: str
    place: int
    faults: tuple[str, ...]


def statements(worded: Worded) -> list[Statement]:
    """Every statement of a persona with its faults: none means that it holds."""
    found = []
    for text in worded.texts:
        own = facts_of(worded.case, text)
        faults = [*text_faults(text.text, own), *_claims(worded.case, text)]
        if text.part == "interest":
            faults += evidence_faults(worded, text.place)
        if text.part == "novel":
            faults += _topic_faults(worded, text.place)
        if text.part != "summary" and own and not content_roots(text.text) & content_roots(" . ".join(own)):
            faults.append("speaks of nothing that its facts hold")
        found.append(Statement(text.part, text.place, tuple(dict.fromkeys(faults))))
    return found


def faithfulness(worded: Iterable[Worded]) -> float | None:
    """Share of all statements without a fault, 0..1; None without statements."""
    found = [statement for one in worded for statement in statements(one)]
    return sum(not statement.faults for statement in found) / len(found) if found else None


def facts_of(case: Case, text: Text) -> list[str]:
    """What a text may speak of: its own label, titles and ways there; a summary of all interests."""
    interests, novel = case.context.interests, case.context.novel
    if text.part == "summary":
        return [fact for i in interests for fact in (i.label, *i.titles, str(i.share_bucket))]
    if text.part == "interest":
        return [fact for i in interests if i.label == text.label for fact in (i.label, *i.titles)]
    return [fact for n in novel if n.label == text.label for fact in (n.label, *n.titles, *n.via_labels)]


def text_faults(text: str, facts: Iterable[str]) -> list[str]:
    """Numbers, names and times in a text that the facts lack."""
    known = {part for fact in facts for word in words(fact) for part in (word, word.removesuffix("'s"))}
    faults = []
    for sentence in sentences(text):
        for place, token in enumerate(re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)?", sentence)):
            word = words(token)[0] if words(token) else ""
            bare = word.removesuffix("'s")
            if not word or word in known or bare in known:
                continue
            if any(c.isdigit() for c in word) or (bare in _SPELLED and bare not in known):
                faults.append(f"number {word!r}")
            elif token[0].isupper() and (place > 0 or word not in common_words()):
                faults.append(f"name {token!r}")
    flat = " ".join(words(text))
    given = " ".join(sorted(known))
    faults += [f"time {match!r}" for match in _TIMES.findall(flat) if match not in given]
    return faults


def evidence_faults(worded: Worded, place: int) -> list[str]:
    """What an interest lacks: evidence, and with it enough watches, in the viewer's own events."""
    interest, case = worded.persona.interests[place], worded.case
    if not interest.evidence:
        return ["no evidence"]
    if interest.cluster_id not in {i.cluster_id for i in case.context.interests}:
        return ["an interest that was not asked for"]
    if not case.past:
        return [f"evidence after {worded.persona.as_of}" for e in interest.evidence if e.ts > worded.persona.as_of]
    watched = {(w.video_id, w.ts) for w in case.past if w.cluster_id == interest.cluster_id}
    faults = [f"evidence {e.video_id} was not watched" for e in interest.evidence if (e.video_id, e.ts) not in watched]
    if len(watched) < LEAST_WATCHES:
        faults.append(f"only {len(watched)} watches")
    return faults


def mismatched_cosine(vectors: Vectors, cards: Vectors, own: list[int]) -> tuple[float, float]:
    """(tau, share): tau is the cosine that 95% of texts stay below with a card that is not theirs.

    vectors: (texts, dimensions); cards: (cards, dimensions); own: each text's card. share: of texts at or above tau
    with their own card. Needs two cards.
    """
    cosines = vectors @ cards.T
    rows = np.arange(len(own))
    mine = cosines[rows, own]
    others = cosines[np.arange(cosines.shape[1])[None, :] != np.asarray(own)[:, None]]
    tau = float(np.quantile(others, 0.95))
    return tau, float((mine >= tau).mean())


def _topic_faults(worded: Worded, place: int) -> list[str]:
    topic = worded.persona.novel[place]
    asked = {(n.cluster_id, n.label) for n in worded.case.context.novel}
    return [] if (topic.cluster_id, topic.label) in asked else ["a topic that was not asked for"]


def _claims(case: Case, text: Text) -> list[str]:
    """A trend that is claimed against the context's."""
    if text.part != "interest":
        return []
    trend = next((i.trend for i in case.context.interests if i.label == text.label), 0)
    flat = " ".join(words(text.text))
    rises, falls = bool(_RISING.search(flat)), bool(_FALLING.search(flat))
    return ["claims a rise"] * (rises and trend < 0) + ["claims a fall"] * (falls and trend > 0)
