"""How much personas change: little where the taste did not, much where it did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from agents.evaluation.answers import Worded
from agents.evaluation.cases import consecutive
from agents.evaluation.text import words


@dataclass(frozen=True, slots=True)
class Change:
    """From one persona of a viewer to a later one. shifted: the taste changed in between.

    interests: 1 - Jaccard index of the interest sets; texts: 1 - share of words that stay, over all texts; both 0..1.
    """

    shifted: bool
    interests: float
    texts: float


def changes(worded: Sequence[Worded]) -> list[Change]:
    """Stable viewers from each persona to the next; shifted ones from the last before the shift to the first after it.

    First personas of 20 watches are left out: what changes after them is that they grow up.
    """
    by_request = {one.case.request.request_id: one for one in worded}
    found = []
    for before, after in consecutive([one.case for one in worded]):
        if before.truth is None or after.truth is None or before.context.basis.events < 30:
            continue
        if before.truth.before is not None:
            continue
        shifted = after.truth.before is not None
        pair = by_request[before.request.request_id], by_request[after.request.request_id]
        found.append(Change(shifted, _set_change(*pair), _text_change(*pair)))
    return found


def separation(found: Sequence[Change], measure: Callable[[Change], float]) -> float | None:
    """Area under the ROC curve of `measure` for telling shifted from stable: chance that a shifted one is above.

    Ties count half (Mann-Whitney). None if there is only one sort.
    """
    shifted = [measure(change) for change in found if change.shifted]
    stable = [measure(change) for change in found if not change.shifted]
    if not shifted or not stable:
        return None
    above = sum((a > b) + 0.5 * (a == b) for a in shifted for b in stable)
    return above / (len(shifted) * len(stable))


def _set_change(before: Worded, after: Worded) -> float:
    old = {interest.cluster_id for interest in before.persona.interests}
    new = {interest.cluster_id for interest in after.persona.interests}
    return 1.0 - len(old & new) / len(old | new) if old | new else 0.0


def _text_change(before: Worded, after: Worded) -> float:
    old, new = (words(" ".join(t.text for t in one.texts if t.part != "novel")) for one in (before, after))
    return 1.0 - SequenceMatcher(None, old, new, autojunk=False).ratio()
