"""The demo's viewers: scripted tastes over the demo catalogue's topics, drawn with a fixed seed. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

STICKINESS: Final = 0.4
"""Probability that a watch stays with the previous topic."""
BACKGROUND: Final = 0.06
"""Share of watches of anything at all."""
SHIFT_AT: Final = 60
"""Watch (from 0) at which a drifting viewer's taste changes."""
SESSION_WATCHES: Final = 4
MINUTE_MS: Final = 60_000
BEHIND_MS: Final = 90 * 86_400_000
"""The viewers' own calendar starts this far in the past and is well behind the present."""

Taste = Mapping[str, float]
"""Topic of the catalogue -> share, sums to 1."""

MAYA_BEFORE: Final[Taste] = {"Sourdough baking": 0.45, "Houseplants": 0.3, "Jazz guitar": 0.25}
MAYA_AFTER: Final[Taste] = {"Bouldering": 0.4, "Trail running": 0.3, "Camper vans": 0.2, "Jazz guitar": 0.1}
NOAH: Final[Taste] = {"Chess endgames": 0.4, "Vinyl collecting": 0.35, "Ramen cooking": 0.25}


@dataclass(frozen=True, slots=True)
class DemoViewer:
    """A viewer and their script. after: the taste from watch SHIFT_AT on, None for a stable viewer; casual viewers stay
    below the first persona's gate.
    """

    user_id: str
    before: Taste
    after: Taste | None = None
    casual: bool = False

    @property
    def stable(self) -> bool:
        """Whether the taste never changes."""
        return self.after is None and not self.casual


def demo_viewers(topics: Sequence[str], regulars: int, casuals: int, seed: int) -> list[DemoViewer]:
    """Maya, whose taste shifts; Noah, whose taste does not; `regulars` more, each kind in turn; casual viewers."""
    random = np.random.default_rng([seed, 1])
    viewers = [DemoViewer("maya", MAYA_BEFORE, MAYA_AFTER), DemoViewer("noah", NOAH)]
    for i in range(regulars):
        before = _draw_taste(topics, random)
        if i % 2:
            viewers.append(DemoViewer(f"stable-{i // 2 + 1:02}", before))
        else:
            viewers.append(DemoViewer(f"drifter-{i // 2 + 1:02}", before, _draw_taste(topics, random)))
    viewers += [DemoViewer(f"casual-{i + 1:03}", _draw_taste(topics, random), casual=True) for i in range(casuals)]
    return viewers


def _draw_taste(topics: Sequence[str], random: np.random.Generator) -> Taste:
    size = int(random.integers(2, 5))
    liked = random.choice(len(topics), size=size, replace=False)
    weights = 1.0 / np.arange(1, size + 1) ** 0.7
    return {topics[i]: float(weight) for i, weight in zip(liked, weights / weights.sum(), strict=True)}


def watches(
    viewer: DemoViewer, videos: Mapping[str, Sequence[Mapping[str, Any]]], now_ms: int, seed: int
) -> Iterator[dict[str, Any]]:
    """The viewer's watch events without end (casual ones: a few), as JSON-like dicts in the order of their time.

    `videos`: catalogue rows by topic. The viewer's calendar runs faster than the clock and starts three months before
    `now_ms`.
    """
    random = np.random.default_rng([seed, 2, *viewer.user_id.encode()])
    ts = now_ms - BEHIND_MS + int(random.integers(0, 60)) * MINUTE_MS
    topic = ""
    limit = int(random.integers(3, 15)) if viewer.casual else None
    number = 0
    while limit is None or number < limit:
        taste = viewer.after if viewer.after is not None and number >= SHIFT_AT else viewer.before
        if number == SHIFT_AT or not topic or random.random() >= STICKINESS:
            topic = _draw_topic(taste, list(videos), random)
        row = videos[topic][int(random.integers(len(videos[topic])))]
        ts += int(random.integers(*(2, 12) if (number + 1) % SESSION_WATCHES else (40, 90))) * MINUTE_MS
        yield {
            "user_id": viewer.user_id,
            "video_id": row["video_id"],
            "ts": ts,
            "event_id": f"{viewer.user_id}-{number}",
            "action": "play",
            "watch_fraction": round(float(random.uniform(0.55, 1.0)), 2),
            "session_id": f"{viewer.user_id}-s{number // SESSION_WATCHES}",
            "title": row["title"],
        }
        number += 1


def _draw_topic(taste: Taste, topics: Sequence[str], random: np.random.Generator) -> str:
    if random.random() < BACKGROUND:
        return topics[int(random.integers(len(topics)))]
    names = list(taste)
    return names[int(random.choice(len(names), p=[taste[name] for name in names]))]
