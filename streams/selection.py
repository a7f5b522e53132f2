"""What a persona states, in words: the chosen interests, the novel candidates, and why it was asked for.

streams/choosing.py chooses by number; here the registry's labels, queries and titles are put to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np

from streams.choosing import DISLIKED, NONE, Catalogue, Choice, catalogue, choose
from streams.identifiers import interest_id
from streams.interests import Distribution
from streams.mixture import Floats
from streams.records import (
    Audience,
    Basis,
    Context,
    Evidence,
    Explanation,
    Horizon,
    Interest,
    Maturity,
    NovelCandidate,
)
from streams.registry import ClusterCard, Registry
from streams.state import State, members
from streams.trigger import Fired, Policy, Thresholds, distance

CONFIDENCE_HALF: Final = 4.0
"""Decayed watches at which confidence is one half."""
MATURE_AFTER: Final = 80
"""Qualifying watches after which a persona is called mature."""
REMEMBERED_VIDEOS: Final = 500_000
MOVED: Final = 0.03
"""Change of share from which an interest is named as risen or fallen."""

Choose = Callable[[Any, Floats, Catalogue], Choice]
"""`streams.choosing.choose`, plain or compiled."""


def build_context(
    user_id: str,
    state: State,
    shares: Distribution,
    registry: Registry,
    fired: Fired,
    policy: Policy,
    thresholds: Thresholds,
    choose: Choose = choose,
) -> Context:
    """Choose what the persona will state and explain why it was asked for. Marks the chosen slots in the state."""
    avoid = _avoided(state)
    explanation = explain(state, shares, registry, fired, thresholds, avoid)
    prepared = _prepared(registry)
    choice = choose(state, np.array(shares.share), prepared.catalogue)
    interests = _interests(user_id, state, shares, registry, choice)
    return Context(
        maturity=_maturity(state, policy),
        basis=Basis(
            events=int(state["events"]),
            n_eff=round(shares.n_eff, 2),
            first_ts=int(state["first_ts"]),
            last_ts=int(state["last_ts"]),
        ),
        interests=interests,
        novel=_novel(interests, prepared.cards, choice),
        avoid=tuple(sorted(avoid)),
        explanation=explanation,
        language="en",
        audience=_AUDIENCES[int(state["audience"])],
    )


def explain(
    state: State,
    shares: Distribution,
    registry: Registry,
    fired: Fired,
    thresholds: Thresholds,
    avoid: frozenset[int],
) -> Explanation:
    """The rule's value against its threshold, and what moved since the last request. Call before `adopt`.

    What a persona may not state is not named here either: the explanation is published with it.
    """
    value, threshold, since = round(fired.value, 4), round(fired.threshold, 4), int(state["since_request"])
    if not state["student_sequence"]:
        return Explanation(fired.rule, value, threshold, since)
    moved = [
        (now - before, now, before, cluster)
        for now, before, cluster in zip(
            shares.share, state["reference"].tolist(), state["cluster"].tolist(), strict=True
        )
    ]
    statable = _prepared(registry).statable
    rows = [
        (cluster, registry.cards[cluster].label, round(before, 4), round(now, 4))
        for change, now, before, cluster in sorted(moved, key=lambda row: (-abs(row[0]), row[3]))
        if abs(change) >= MOVED and cluster in statable and cluster not in avoid
    ]
    found = distance(state, shares, thresholds)
    return Explanation(
        rule=fired.rule,
        value=value,
        threshold=threshold,
        watches_since=since,
        divergence=round(found.divergence, 4),
        divergence_null=round(found.null_quantile, 4),
        risen=tuple(row for row in rows if row[3] > row[2])[:3],
        fallen=tuple(row for row in rows if row[3] < row[2])[:3],
    )


def _maturity(state: State, policy: Policy) -> Maturity:
    watches = int(state["qualifying"])
    if watches < policy.first_persona_after:
        return Maturity.COLD
    return Maturity.MATURE if watches >= MATURE_AFTER else Maturity.FORMING


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What selection asks of a registry version again and again.

    cards: by row of the catalogue; statable: clusters that a persona may state; videos: ids by key, filled as they are
    asked for.
    """

    catalogue: Catalogue
    cards: Sequence[ClusterCard]
    statable: frozenset[int]
    videos: dict[int, str | None]


@lru_cache(maxsize=8)
def _prepared(registry: Registry) -> _Prepared:
    return _Prepared(
        catalogue=catalogue(registry),
        cards=[registry.cards[cluster] for cluster in sorted(registry.cards)],
        statable=frozenset(cluster for cluster, card in registry.cards.items() if card.statable),
        videos={},
    )


def _avoided(state: State) -> frozenset[int]:
    masses = zip(state["cluster"].tolist(), state["negative"].tolist(), state["long"].tolist(), strict=True)
    disliked = [cluster for cluster, negative, long in masses if negative >= DISLIKED and negative > long]
    return members(state["hidden"]) | members(disliked)


def _interests(
    user_id: str, state: State, shares: Distribution, registry: Registry, choice: Choice
) -> tuple[Interest, ...]:
    slots = [slot for slot in choice.slots.tolist() if slot != NONE]
    if not slots:
        return ()
    held, masses, epoch = state["cluster"].tolist(), state["long"].tolist(), int(state["epoch"])
    pinned, since = members(state["pinned"]), state["stated_from"].tolist()
    videos, times = state["evidence_video"].tolist(), state["evidence_ts"].tolist()
    found = []
    for slot, valid_from in zip(slots, since, strict=False):
        cluster, share, mass = held[slot], shares.share[slot], masses[slot]
        short, long = shares.short[slot], shares.long[slot]
        card = registry.cards[cluster]
        found.append(
            Interest(
                interest_id=interest_id(user_id, epoch, cluster),
                cluster_id=cluster,
                label=card.label,
                share=round(share, 4),
                share_bucket=max(5, 5 * math.floor(share * 20 + 0.5)),
                horizon=Horizon.SHORT if short > 2 * long else Horizon.LONG,
                trend=_trend(short, long),
                confidence=round(mass / (mass + CONFIDENCE_HALF), 2),
                valid_from=valid_from,
                query=card.query,
                pinned=cluster in pinned,
                titles=card.titles,
                evidence=_evidence(videos[slot], times[slot], registry),
            )
        )
    return tuple(found)


def _trend(short: float, long: float) -> int:
    """+1 where the short horizon holds clearly more of the watches than the long one, -1 where clearly less."""
    margin = 0.03 + 0.25 * long
    return (short > long + margin) - (short < long - margin)


def _evidence(keys: Sequence[int], times: Sequence[int], registry: Registry) -> tuple[Evidence, ...]:
    videos, found = _prepared(registry).videos, []
    for key, ts in zip(keys, times, strict=True):
        if not ts:
            continue
        if key not in videos:
            if len(videos) >= REMEMBERED_VIDEOS:
                videos.clear()
            videos[key] = registry.video_of(key)
        video = videos[key]
        if video is not None:
            found.append(Evidence(video, ts))
    return tuple(found)


def _novel(interests: Sequence[Interest], cards: Sequence[ClusterCard], choice: Choice) -> tuple[NovelCandidate, ...]:
    found = []
    for row, place, score in zip(choice.novel.tolist(), choice.via.tolist(), choice.score.tolist(), strict=True):
        if row == NONE:
            break
        card, via = cards[row], interests[place : place + 1] if place != NONE else ()
        found.append(
            NovelCandidate(
                cluster_id=card.cluster_id,
                label=card.label,
                query=card.query,
                lift=round(score / float(choice.mean), 3) if via else 1.0,
                confidence=round(min(1.0, score), 3),
                via=tuple([interest.cluster_id for interest in via]),
                via_labels=tuple([interest.label for interest in via]),
                titles=card.titles,
            )
        )
    return tuple(found)


_AUDIENCES: Final = (None, *Audience)
"""By their place in a state."""
