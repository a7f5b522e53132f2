"""What a viewer's events weigh, and the distribution over clusters that they describe."""

from __future__ import annotations

from typing import Final

from streams.counting import AUTOPLAY_FACTOR
from streams.records import Action, WatchEvent

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
