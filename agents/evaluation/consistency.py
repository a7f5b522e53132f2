"""How much personas change: little where the taste did not, much where it did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Final

from agents.evaluation.answers import Worded
from agents.evaluation.text import words

GROWN: Final = 30
"""Watches from which a persona is compared with later ones."""
SEEN: Final = 20
"""Watches after a shift from which a persona can know of it."""


@dataclass(frozen=True, slots=True)
class Change:
    """From one persona of a viewer to a later one. shifted: the taste changed in between.

    interests: 1 - Jaccard index of the interest sets; texts: 1 - share of words that stay, over all texts; both 0..1.
    """

    shifted: bool
    interests: float
    texts: float


def changes(worded: Sequence[Worded]) -> list[Change]:
    """Pairs of personas of one viewer, over a stable taste and across a shift.

    Stable: from each to the next. Shifted: from the last one before to the first that had SEEN watches to go
    by. First personas of 20 watches are left out: what changes after them is that they grow up.
    """
    by_user: dict[str, list[Worded]] = {}
    for one in sorted(worded, key=lambda one: one.case.request.sequence):
        if one.case.truth is not None and one.case.context.basis.events >= GROWN:
            by_user.setdefault(one.case.user_id, []).append(one)
    found = []
    for own in by_user.values():
        stable = [one for one in own if _shift_of(one) is None]
        found += [Change(False, _set_change(a, b), _text_change(a, b)) for a, b in pairwise(stable)]
        after = next((one for one in own if (_shift_of(one) or 0) >= SEEN), None)
        if stable and after is not None:
            found.append(Change(True, _set_change(stable[-1], after), _text_change(stable[-1], after)))
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


def _shift_of(worded: Worded) -> int | None:
    """Watches since the shift; None before it."""
    truth = worded.case.truth
    return None if truth is None or truth.before is None else truth.watches_since_shift


def _set_change(before: Worded, after: Worded) -> float:
    old = {interest.cluster_id for interest in before.persona.interests}
    new = {interest.cluster_id for interest in after.persona.interests}
    return 1.0 - len(old & new) / len(old | new) if old | new else 0.0


def _text_change(before: Worded, after: Worded) -> float:
    old, new = (words(" ".join(t.text for t in one.texts if t.part != "novel")) for one in (before, after))
    return 1.0 - SequenceMatcher(None, old, new, autojunk=False).ratio()
