"""Whether personas say what the viewer's events and the context hold, and nothing else.

Apart from the gate in every rule: evidence is looked up in the watches themselves, names are what no editor ever wrote
in lower case, and numbers count when spelled out too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Final

import numpy as np

from agents.clusters.embedding import Vectors
from agents.evaluation.answers import Text, Worded
from agents.evaluation.cases import Case
from agents.evaluation.text import common_words, content_roots, root, sentences, words
from triton_models.distillation.pairs import PAIRS, Pair, read_pairs

INVENTED: Final = 2
"""Words of a text that nothing explains from which it counts as an invention."""
FRAME_CATALOGUES: Final = 3
"""Catalogues in whose edited texts a word stands that is of no facts, but of how one writes."""
LEAST_WATCHES: Final = 3
"""Watches behind an interest."""
_UNITS: Final = ("three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_SPELLED: Final = {
    word: str(number)
    for number, word in [
        *enumerate(_UNITS, 3),
        *((20, "twenty"), (30, "thirty"), (40, "forty"), (50, "fifty"), (60, "sixty"), (70, "seventy")),
        *((80, "eighty"), (90, "ninety"), (12, "dozen"), (100, "hundred"), (1000, "thousand"), (1000000, "million")),
    ]
}
_FRACTIONS: Final = {"half": 50, "third": 33, "quarter": 25, "fifth": 20, "tenth": 10}
_PARTS: Final = re.compile(r"\b(?:three quarters|two thirds|\w+ parts in ten)\b", re.IGNORECASE)
_PART_OF_ALL: Final = {"three quarters": 75, "two thirds": 67, "nine parts in ten": 90, "eight parts in ten": 80}
_NEAR: Final = 10
"""Points by which a fraction in words may miss a share."""
_GROUPED: Final = re.compile(r"(?<=\d)[,.'\u2019 \u00a0\u202f](?=\d{3}(?!\d))")
"""What parts the thousands of a number."""
_TIMES: Final = re.compile(
    r"\b(?:mondays?|tuesdays?|wednesdays?|thursdays?|fridays?|saturdays?|sundays?|weekends?|weekdays?|"
    r"(?:every|(?<!with )each) (?:morning|evening|night|day)|january|february|april|june|july|august|september|"
    r"october|november|december|for (?:years|months|weeks|decades)|since childhood|lifelong)\b"
)
_RISING: Final = re.compile(
    r"\b(?:more and more|more than (?:before|ever)|more often|more time|more lately|gets more|growing interest|"
    r"increasingly|ever more|turn(?:ing|ed) to|has taken to|picking up|on the rise)\b"
)
_FALLING: Final = re.compile(
    r"\b(?:less and less|less than before|less often|less time|watches less|fading|waning|losing interest|"
    r"cooling off)\b"
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
        said = _PARTS.sub(" ", text.text) if text.part == "summary" else text.text
        faults = [*text_faults(said, own), *_claims(worded.case, text), *invented(said, own)]
        if text.part != "summary":
            faults += part_faults(said, own)
        if text.part == "summary":
            faults += fraction_faults(text.text, [i.share_bucket for i in worded.case.context.interests])
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
    """Numbers, names and times in a text that the facts lack. A number may be in digits or spelled out in either."""
    known = {part for fact in _forms(facts) for word in words(fact) for part in (word, word.removesuffix("'s"))}
    faults = []
    for sentence in sentences(text):
        for place, token in enumerate(re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)?", sentence)):
            word = words(token)[0] if words(token) else ""
            bare = word.removesuffix("'s")
            if not word or word in known or bare in known:
                continue
            if _SPELLED.get(bare) in known:
                continue
            if any(c.isdigit() for c in word) or bare in _SPELLED:
                faults.append(f"number {word!r}")
            elif token[0].isupper() and (place > 0 or word not in common_words()):
                faults.append(f"name {token!r}")
    flat = " ".join(words(text))
    sayable = " ".join(sorted(known))
    faults += [f"time {match!r}" for match in _TIMES.findall(flat) if match.removesuffix("s") not in sayable]
    return faults


def _forms(facts: Iterable[str]) -> list[str]:
    """The facts, and once more without what parts the thousands of their numbers."""
    return [form for fact in facts for form in (fact, _GROUPED.sub("", fact))]


def invented(text: str, facts: Iterable[str], catalogue: str = "") -> list[str]:
    """Two or more words about something that neither the facts nor the frames of edited texts explain.

    One may be a paraphrase: no rule over words tells that from an invention. catalogue: one whose edited texts are no
    frames, for an edited text of it.
    """
    counted = {root(word) for word in (*_FRACTIONS, *_SPELLED)}
    unknown = content_roots(text) - content_roots(" . ".join(_forms(facts))) - counted
    frames = _frame_catalogues()
    own = sorted(said for said in unknown if len(frames.get(said, frozenset()) - {catalogue}) < FRAME_CATALOGUES)
    return [f"invented {' '.join(own)!r}"] * (len(own) >= INVENTED)


@cache
def _frame_catalogues() -> Mapping[str, frozenset[str]]:
    """The catalogues of the edited texts that hold a root without having it from their facts."""
    used: dict[str, set[str]] = {}
    for pair, facts, _ in _edited():
        for said in content_roots(pair.text or "") - content_roots(" . ".join(facts)):
            used.setdefault(said, set()).add(pair.catalogue)
    return {said: frozenset(catalogues) for said, catalogues in used.items()}


def part_faults(text: str, facts: Iterable[str]) -> list[str]:
    """Fractions in words that the facts lack, in a text that has no share to go by."""
    said, given = words(text), {word for fact in facts for word in words(fact)}
    return [f"number {word!r}" for word in _FRACTIONS if word in said and word not in given]


def trend_faults(text: str, trend: int, facts: Iterable[str]) -> list[str]:
    """A rise that is claimed of what does not rise, and a fall of what does not fall. trend: -1, 0 or +1.

    Words of the facts claim nothing.
    """
    flat, given = " ".join(words(text)), " . ".join(" ".join(words(fact)) for fact in facts)
    rises = _RISING.search(flat) is not None and _RISING.search(given) is None
    falls = _FALLING.search(flat) is not None and _FALLING.search(given) is None
    return ["claims a rise"] * (rises and trend <= 0) + ["claims a fall"] * (falls and trend >= 0)


def fraction_faults(text: str, shares: Sequence[int]) -> list[str]:
    """Fractions in words that no share, nor a sum of the largest, comes near. shares: percent, largest first."""
    flat = " ".join(words(text))
    found = words(_PARTS.sub(" ", flat))
    near = [*shares, *accumulate(shares)]
    more = not {"more", "over", "most"}.isdisjoint(found)
    claims = [(word, value) for word, value in _FRACTIONS.items() if word in found]
    claims += [(part, _PART_OF_ALL.get(part, -100)) for part in _PARTS.findall(flat)]
    return [
        f"number {word!r}"
        for word, value in claims
        if not any(abs(share - value) <= _NEAR or (more and share > value) for share in near)
    ]


def alarm_rate() -> float:
    """Share of the packaged edited texts, each written for its facts, in which these rules find a fault, 0..1.

    None of them is explained by the other texts of its own catalogue.
    """
    found = [
        bool(
            text_faults(_PARTS.sub(" ", text) if shares else text, facts)
            or invented(text, facts, pair.catalogue)
            or (fraction_faults(text, shares) if shares else part_faults(text, facts))
            or (pair.task.interests and trend_faults(text, pair.task.interests[0].trend, facts))
        )
        for pair, facts, shares in _edited()
        for text in (pair.text or "",)
    ]
    return sum(found) / len(found)


def _edited() -> Iterator[tuple[Pair, list[str], list[int]]]:
    """Pairs, their facts and, for summaries, the shares."""
    for pair in read_pairs([PAIRS]):
        task = pair.task
        if task.overview:
            labels, shares = [label for label, _ in task.overview], [share for _, share in task.overview]
            yield pair, [*labels, *map(str, shares)], shares
        elif task.interests:
            yield pair, [task.interests[0].label, *task.interests[0].titles], []
        else:
            yield pair, [task.novel[0].label, *task.novel[0].titles, *task.novel[0].via_labels], []


def evidence_faults(worded: Worded, place: int) -> list[str]:
    """What an interest lacks: evidence, and with it enough watches, in the viewer's own events."""
    interest, case = worded.persona.interests[place], worded.case
    if interest.pinned:
        return []  # the viewer said so
    if not interest.evidence:
        return ["no evidence"]
    if interest.cluster_id not in {i.cluster_id for i in case.context.interests}:
        return ["an interest that was not asked for"]
    if not case.past:
        return [f"evidence after {worded.persona.as_of}" for e in interest.evidence if e.ts > worded.persona.as_of]
    watched = {(w.video_id, w.ts) for w in case.past if w.cluster_id == interest.cluster_id}
    # A real log reports a playback more than once: there only the video of a watch is sure.
    at_all = {video_id for video_id, _ in watched} if case.truth is None else set()
    lacking = [e for e in interest.evidence if (e.video_id, e.ts) not in watched and e.video_id not in at_all]
    faults = [f"evidence {e.video_id} was not watched" for e in lacking]
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
    return trend_faults(text.text, trend, facts_of(case, text))
