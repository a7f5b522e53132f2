"""What a viewer's events weigh, and the distribution over clusters that they describe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from streams.counting import AUTOPLAY_FACTOR
from streams.mixture import Floats, Model, survey
from streams.records import Action, WatchEvent
from streams.state import State

MINIMUM_FRACTION: Final = 0.1
"""A play shorter than this share of the video says nothing."""

_FIXED_WEIGHTS: Final = {
    Action.THUMBS_UP: 1.0,
    Action.SHARE: 1.0,
    Action.BOOKMARK: 1.0,
    Action.SKIP: -0.25,
    Action.THUMBS_DOWN: -1.0,
    Action.NOT_INTERESTED: -2.0,
}


def watch_weight(event: WatchEvent) -> float:
    """Weight of an event, -2..1: what share was watched, or what the viewer said. Unknown shares count in full."""
    if event.action is not Action.PLAY:
        return _FIXED_WEIGHTS[event.action]
    return play_weight(event.watch_ms, event.duration_ms, event.watch_fraction, autoplay=event.autoplay)


def play_weight(watched: int | None, duration: int | None, fraction: float | None, *, autoplay: bool) -> float:
    """Weight of a play, 0..1. watched, duration: ms; where both are known they say the fraction."""
    if watched is not None and duration:
        fraction = watched / duration
    if fraction is None:
        fraction = 1.0
    if fraction < MINIMUM_FRACTION:
        return 0.0
    return min(fraction, 1.0) * (AUTOPLAY_FACTOR if autoplay else 1.0)


@dataclass(frozen=True, slots=True)
class Distribution:
    """The viewer's distribution over clusters at one moment, slot by slot.

    share: (SLOTS,) posterior mean, 0 where empty; rest: of every other cluster, per unit of the population's share, so
    that all of it sums to 1; short, long: (SLOTS,) each horizon's counts, as shares; n_eff: independent draws behind
    it; divergence: Jensen-Shannon, from the reference, in bits.
    """

    share: Sequence[float]
    rest: float
    short: Sequence[float]
    long: Sequence[float]
    n_eff: float
    divergence: float


Survey = Callable[[Any, Model], tuple[Floats, float, float, float]]
"""`streams.mixture.survey`, plain or compiled."""


def distribution(state: State, model: Model, survey: Survey = survey) -> Distribution:
    """What the viewer's watches say now."""
    share, rest, n_eff, divergence = survey(state, model)
    short, long = _normalised(state["short"].tolist()), _normalised(state["long"].tolist())
    return Distribution(share.tolist(), float(rest), short, long, float(n_eff), float(divergence))


def _normalised(counts: list[float]) -> list[float]:
    total = sum(counts)
    return [count / total for count in counts] if total > 1e-9 else [0.0] * len(counts)
