"""How much personas change: little where the taste did not, much where it did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise
from statistics import median
from typing import Final

import numpy as np

from agents.evaluation.answers import Worded
from agents.evaluation.text import words
from streams.records import PersonaInterest

GROWN: Final = 30
"""Watches from which a persona is compared with later ones."""
SEEN: Final = 20
"""Watches after a shift from which a persona can know of it."""
RESAMPLES: Final = 2_000

Lives = list[list[Worded]]
"""Grown personas of each viewer, in order."""


@dataclass(frozen=True, slots=True)
class Change:
    """From one persona of a viewer to a later one. shifted: the taste changed in between; apart: watches in between.

    shares: 1 - weighted Jaccard index (Ruzicka 1958) of the interests by their stated shares; interests: 1 - Jaccard
    index of their sets; texts: 1 - share of words that stay, over all texts; all three 0..1.
    """

    user_id: str
    shifted: bool
    apart: int
    shares: float
    interests: float
    texts: float


Measure = Callable[[Change], float]


def changes(worded: Sequence[Worded]) -> list[Change]:
    """Pairs of personas of one viewer, over a stable taste and across a shift.

    Stable: from each to the next. Shifted: from the last one before to the first that had SEEN watches to go
    by. First personas of 20 watches are left out: what changes after them is that they grow up.
    """
    lives = _lives(worded)
    return [_change(a, b) for own in lives for a, b in pairwise(_stable(own))] + _across_shifts(lives)


def far_changes(worded: Sequence[Worded]) -> list[Change]:
    """As `changes`, but stable pairs are at least as many watches apart as the median pair across a shift.

    Each stable persona is set beside the first later one that is so far away. Without this, personas across a shift
    would differ for being farther apart too. Nothing without a shift.
    """
    lives = _lives(worded)
    shifted = _across_shifts(lives)
    if not shifted:
        return []
    least = median(change.apart for change in shifted)
    pairs = [
        (before, later)
        for own in map(_stable, lives)
        for place, before in enumerate(own)
        if (later := next((o for o in own[place + 1 :] if _apart(before, o) >= least), None)) is not None
    ]
    return [_change(a, b) for a, b in pairs] + shifted


def separation(found: Sequence[Change], measure: Measure) -> float | None:
    """Area under the ROC curve of `measure` for telling shifted from stable: chance that a shifted one is above.

    Ties count half (Mann-Whitney). None if there is only one sort.
    """
    above, _, _ = _comparisons(found, measure)
    return float(above.mean()) if above.size else None


def interval(found: Sequence[Change], measure: Measure, seed: int) -> tuple[float, float] | None:
    """95% interval of `separation`: percentiles of resamples of whole viewers, as one's pairs are not independent.

    None where there is no separation.
    """
    above, shifted, stable = _comparisons(found, measure)
    if not above.size:
        return None
    users = {user: place for place, user in enumerate(dict.fromkeys([*shifted, *stable]))}
    random = np.random.default_rng(seed)
    drawn = random.multinomial(len(users), [1.0 / len(users)] * len(users), size=RESAMPLES)
    by_shifted, by_stable = (drawn[:, [users[user] for user in sort]].astype(float) for sort in (shifted, stable))
    pairs = by_shifted.sum(axis=1) * by_stable.sum(axis=1)
    areas = np.einsum("ri,ij,rj->r", by_shifted, above, by_stable, optimize=True)[pairs > 0] / pairs[pairs > 0]
    low, high = np.quantile(areas, (0.025, 0.975))
    return float(low), float(high)


def _comparisons(
    found: Sequence[Change], measure: Measure
) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.float64]], list[str], list[str]]:
    """(shifted, stable) pairs of changes, 1 where the shifted one is above, .5 where equal; the viewers of both."""
    shifted, stable = ([one for one in found if one.shifted is sort] for sort in (True, False))
    a, b = (np.array([measure(one) for one in sort], dtype=np.float64) for sort in (shifted, stable))
    above = (a[:, None] > b[None, :]) + 0.5 * (a[:, None] == b[None, :])
    return above, [one.user_id for one in shifted], [one.user_id for one in stable]


def _lives(worded: Sequence[Worded]) -> Lives:
    by_user: dict[str, list[Worded]] = {}
    for one in sorted(worded, key=lambda one: one.case.request.sequence):
        if one.case.truth is not None and one.case.context.basis.events >= GROWN:
            by_user.setdefault(one.case.user_id, []).append(one)
    return list(by_user.values())


def _stable(own: Sequence[Worded]) -> list[Worded]:
    return [one for one in own if _shift_of(one) is None]


def _across_shifts(lives: Lives) -> list[Change]:
    found = []
    for own in lives:
        stable = _stable(own)
        after = next((one for one in own if (_shift_of(one) or 0) >= SEEN), None)
        if stable and after is not None:
            found.append(_change(stable[-1], after))
    return found


def _change(before: Worded, after: Worded) -> Change:
    return Change(
        user_id=before.case.user_id,
        shifted=_shift_of(after) is not None,
        apart=_apart(before, after),
        shares=_share_change(before.persona.interests, after.persona.interests),
        interests=_set_change(before.persona.interests, after.persona.interests),
        texts=_text_change(before, after),
    )


def _shift_of(worded: Worded) -> int | None:
    """Watches since the shift; None before it."""
    truth = worded.case.truth
    return None if truth is None or truth.before is None else truth.watches_since_shift


def _apart(before: Worded, after: Worded) -> int:
    return len(after.case.past) - len(before.case.past)


def _share_change(before: Sequence[PersonaInterest], after: Sequence[PersonaInterest]) -> float:
    old, new = ({interest.cluster_id: interest.share for interest in side} for side in (before, after))
    pairs = [(old.get(cluster, 0.0), new.get(cluster, 0.0)) for cluster in old.keys() | new.keys()]
    most = sum(map(max, pairs))
    return 1.0 - sum(map(min, pairs)) / most if most else 0.0


def _set_change(before: Sequence[PersonaInterest], after: Sequence[PersonaInterest]) -> float:
    old, new = ({interest.cluster_id for interest in side} for side in (before, after))
    return 1.0 - len(old & new) / len(old | new) if old | new else 0.0


def _text_change(before: Worded, after: Worded) -> float:
    old, new = (words(" ".join(t.text for t in one.texts if t.part != "novel")) for one in (before, after))
    return 1.0 - SequenceMatcher(None, old, new, autojunk=False).ratio()
