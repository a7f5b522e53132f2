"""The four failure modes of personas (missed main interest, sporadic, outdated, repetitive), and consumed novelty.

Judged against the simulated truth and the viewer's own watches, not against what the core counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from agents.evaluation.answers import Worded
from agents.evaluation.faithfulness import LEAST_WATCHES, facts_of
from agents.evaluation.text import content_roots, ngrams, words

RECENT: Final = 60
"""Watches that tell the taste of a viewer of whom nothing else is known."""
GRACE_WATCHES: Final = 60
"""Watches after a shift from which what ended with it is outdated."""
GONE: Final = 0.01
"""True share below which a cluster is no taste of the viewer."""
LIKED: Final = 0.05
SAME: Final = 0.5
SAME_RUNS: Final = 3
"""Two texts say the same if they share so many runs of three words that are not of their facts, and more than SAME of
the shorter one's: a stock phrase alone, such as "more and more", is no repetition.
"""


@dataclass(frozen=True, slots=True)
class Rate:
    """How many of how many."""

    count: int
    of: int

    @property
    def share(self) -> float | None:
        """0..1; None of nothing."""
        return self.count / self.of if self.of else None


def main_interest(worded: Worded, *, occasions: bool = True) -> int | None:
    """The cluster of the largest true share among those that a persona may name; None without one.

    Before it was watched on 3 occasions (runs without other watches) in the taste in force, nobody can know it; without
    `occasions` 3 watches do, in one run or not. Of a real viewer the shares are those of the last RECENT watches, and
    two clusters of the same share are no main interest.
    """
    case, truth = worded.case, worded.case.truth
    recent = RECENT if truth is None else truth.watches_since_shift
    clusters = [watch.cluster_id for watch in case.past[-recent:]] if recent else []
    watched = Counter(clusters)
    share = dict(enumerate(truth.taste)) if truth else {c: count / len(clusters) for c, count in watched.items()}
    counts = _runs(clusters) if occasions else watched
    known = [c for c in case.statable if counts[c] >= LEAST_WATCHES and share[c] >= LIKED]
    shares = sorted((share[c] for c in known), reverse=True)
    if not shares or (truth is None and shares[1:2] == shares[:1]):
        return None
    return min(c for c in known if share[c] == shares[0])


def main_missed(worded: Iterable[Worded], *, occasions: bool = True) -> Rate:
    """Personas that do not state the viewer's main interest, or whose words for it speak of something else.

    occasions: see `main_interest`.
    """
    missed, of = 0, 0
    for one in worded:
        main = main_interest(one, occasions=occasions)
        if main is None:
            continue
        of += 1
        missed += not any(i.cluster_id == main and _speaks_of(one, n) for n, i in enumerate(one.persona.interests))
    return Rate(missed, of)


def sporadic(worded: Iterable[Worded]) -> Rate:
    """Stated interests that were watched fewer than 3 times; not those that the viewer pinned."""
    stated = ((one, i) for one in worded if one.case.past for i in one.persona.interests if not i.pinned)
    watched = [_watches(one, interest.cluster_id) for one, interest in stated]
    return Rate(sum(count < LEAST_WATCHES for count in watched), len(watched))


def one_occasion(worded: Iterable[Worded]) -> Rate:
    """Stated interests that are no true taste and were watched on one occasion only: a run without other watches."""
    count, of = 0, 0
    for one in worded:
        truth = one.case.truth
        if truth is None:
            continue
        runs = _runs([watch.cluster_id for watch in one.case.past])
        for interest in one.persona.interests:
            liked = max(truth.taste[interest.cluster_id], truth.before[interest.cluster_id] if truth.before else 0.0)
            of += 1
            count += liked < GONE and runs[interest.cluster_id] <= 1
    return Rate(count, of)


def outdated(worded: Iterable[Worded], grace: int = GRACE_WATCHES) -> Rate:
    """Stated interests that ended with a shift of taste, `grace` watches or more ago.

    Of real viewers those that none of their last RECENT watches is of, pinned ones apart.
    """
    count, of = 0, 0
    for one in worded:
        truth = one.case.truth
        if truth is None:
            if one.case.past:
                recent = {watch.cluster_id for watch in one.case.past[-RECENT:]}
                of += len(one.persona.interests)
                count += sum(i.cluster_id not in recent and not i.pinned for i in one.persona.interests)
            continue
        of += len(one.persona.interests)
        if truth.before is None or truth.watches_since_shift < grace:
            continue
        count += sum(
            truth.before[i.cluster_id] >= LIKED and truth.taste[i.cluster_id] < GONE for i in one.persona.interests
        )
    return Rate(count, of)


def outdated_where_possible(worded: Iterable[Worded]) -> Rate:
    """As `outdated`, of the interests of those personas alone that come GRACE_WATCHES or more after a shift."""
    late = [
        one
        for one in worded
        if one.case.truth is not None
        and one.case.truth.before is not None
        and one.case.truth.watches_since_shift >= GRACE_WATCHES
    ]
    return outdated(late)


def repeated(worded: Sequence[Worded]) -> Rate:
    """Personas that say something twice: a cluster, a label, or two texts that are the same but for their facts."""
    return Rate(sum(repeats_itself(one) for one in worded), len(worded))


def repeats_itself(worded: Worded) -> bool:
    """Whether an item comes twice, two item texts say the same, or one text repeats a run of three words."""
    items: list[tuple[int, str]] = [(i.cluster_id, i.label) for i in worded.persona.interests]
    items += [(n.cluster_id, n.label) for n in worded.persona.novel]
    if len({cluster for cluster, _ in items}) < len(items) or len({label for _, label in items}) < len(items):
        return True
    texts = worded.texts
    if any(count > 1 for text in texts for count in Counter(ngrams(words(text.text), 3)).values()):
        return True
    runs = [_own_runs(worded, n) for n, text in enumerate(texts) if text.part != "summary"]
    plain = [text.text for text in texts if text.part != "summary"]
    same_runs = any(
        len(a & b) >= SAME_RUNS and len(a & b) > SAME * min(len(a), len(b)) for a, b in combinations(runs, 2)
    )
    return same_runs or len(set(plain)) < len(plain)


def novel_consumed(worded: Iterable[Worded]) -> Rate:
    """Novel topics that the viewer had watched before."""
    topics = [(one, topic) for one in worded if one.case.past for topic in one.persona.novel]
    return Rate(sum(_watches(one, topic.cluster_id) > 0 for one, topic in topics), len(topics))


def novel_hits(worded: Iterable[Worded]) -> tuple[Rate, Rate]:
    """Novel topics watched after the persona; beside them, all clusters that had not been watched before."""
    hit, of, other_hit, others = 0, 0, 0, 0
    for one in worded:
        if not one.case.past or not one.case.future:
            continue
        past = {watch.cluster_id for watch in one.case.past}
        later = {watch.cluster_id for watch in one.case.future}
        proposed = [topic.cluster_id for topic in one.persona.novel]
        fresh = [cluster for cluster in one.case.clusters if cluster not in past]
        hit, of = hit + sum(cluster in later for cluster in proposed), of + len(proposed)
        other_hit, others = other_hit + sum(cluster in later for cluster in fresh), others + len(fresh)
    return Rate(hit, of), Rate(other_hit, others)


def _runs(clusters: Sequence[int]) -> Counter[int]:
    """How many runs of watches each cluster has."""
    return Counter(c for c, before in zip(clusters, [None, *clusters], strict=False) if c != before)


def _watches(worded: Worded, cluster: int) -> int:
    return sum(watch.cluster_id == cluster for watch in worded.case.past)


def _speaks_of(worded: Worded, place: int) -> bool:
    text = next(t for t in worded.texts if t.part == "interest" and t.place == place)
    return bool(content_roots(text.text) & content_roots(" . ".join(facts_of(worded.case, text))))


def _own_runs(worded: Worded, number: int) -> set[tuple[str, ...]]:
    """Runs of three words of a text that hold no word of its facts."""
    text = worded.texts[number]
    given = content_roots(" . ".join(facts_of(worded.case, text)))
    return {run for run in ngrams(words(text.text), 3) if not any(content_roots(word) & given for word in run)}
