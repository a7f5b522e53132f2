"""What a persona states: the chosen interests, the novel candidates, and why it was asked for.

Selection is statistics; the model only words it. The set is stable: an interest enters at 3 watches and 3% of the
viewer's watches, and stays until it falls below two thirds of either.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from streams.identifiers import interest_id
from streams.interests import Distribution
from streams.mixture import Model
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
from streams.state import EMPTY, EVIDENCE, SLOTS, STATED, State, members
from streams.trigger import Fired, Policy, Thresholds, distance

MAXIMUM_INTERESTS: Final = STATED
MAXIMUM_NOVEL: Final = 3
ENTER_COUNT, ENTER_SHARE = 3.0, 0.03
STAY_FACTOR: Final = 2.0 / 3.0
INCUMBENT_BONUS: Final = 1.25
"""An interest already stated gives its place only to one a quarter stronger."""
DISLIKED: Final = 1.5
"""Negative mass from which a cluster that is disliked more than it is watched is avoided."""
CONFIDENCE_HALF: Final = 4.0
"""Decayed watches at which confidence is one half."""
MATURE_AFTER: Final = 80
"""Qualifying watches after which a persona is called mature."""
MINIMUM_SIMILARITY: Final = 0.15
PINNED_SHARE: Final = 0.05
"""A pinned interest leads to novel topics as if it had at least this share."""
MOVED: Final = 0.03
"""Change of share from which an interest is named as risen or fallen."""


def build_context(
    user_id: str,
    state: State,
    shares: Distribution,
    registry: Registry,
    fired: Fired,
    policy: Policy,
    model: Model,
    thresholds: Thresholds,
) -> Context:
    """Choose what the persona will state and explain why it was asked for. Marks the chosen slots in the state."""
    avoid = _avoided(state)
    explanation = explain(state, shares, registry, fired, model, thresholds, avoid)
    interests = _interests(user_id, state, shares, registry, avoid)
    return Context(
        maturity=_maturity(state, policy),
        basis=Basis(
            events=int(state["events"]),
            n_eff=round(shares.n_eff, 2),
            first_ts=int(state["first_ts"]),
            last_ts=int(state["last_ts"]),
        ),
        interests=interests,
        novel=_novel(state, interests, registry, avoid),
        avoid=tuple(sorted(avoid)),
        explanation=explanation,
        language="en",
        audience=list(Audience)[int(state["audience"]) - 1] if state["audience"] else None,
    )


def explain(
    state: State,
    shares: Distribution,
    registry: Registry,
    fired: Fired,
    model: Model,
    thresholds: Thresholds,
    avoid: frozenset[int],
) -> Explanation:
    """The rule's value against its threshold, and what moved since the last request. Call before `adopt`.

    What a persona may not state is not named here either: the explanation is published with it.
    """
    value, threshold, since = round(fired.value, 4), round(fired.threshold, 4), int(state["since_request"])
    if not state["student_sequence"]:
        return Explanation(fired.rule, value, threshold, since)
    before, now = state["reference"].astype(np.float64), shares.share
    moved = now - before
    order = sorted(
        np.nonzero(np.abs(moved) >= MOVED)[0],
        key=lambda slot: (-abs(moved[slot]), int(state["cluster"][slot])),
    )
    rows = [
        _moved(registry.cards[cluster], before[slot], now[slot])
        for slot in order
        if (cluster := int(state["cluster"][slot])) in registry.cards
        and cluster not in avoid
        and registry.cards[cluster].statable
    ]
    found = distance(state, shares, model, thresholds)
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


def _moved(card: ClusterCard, before: float, now: float) -> tuple[int, str, float, float]:
    return card.cluster_id, card.label, round(float(before), 4), round(float(now), 4)


def _maturity(state: State, policy: Policy) -> Maturity:
    watches = int(state["qualifying"])
    if watches < policy.first_persona_after:
        return Maturity.COLD
    return Maturity.MATURE if watches >= MATURE_AFTER else Maturity.FORMING


def _avoided(state: State) -> frozenset[int]:
    disliked = (state["negative"] >= DISLIKED) & (state["negative"] > state["long"])
    return members(state["hidden"]) | members(state["cluster"][disliked])


def _interests(
    user_id: str, state: State, shares: Distribution, registry: Registry, avoid: frozenset[int]
) -> tuple[Interest, ...]:
    pinned, stated = members(state["pinned"]), _stated(state)
    ranked: list[tuple[float, int, int]] = []
    for slot in range(SLOTS):
        cluster = int(state["cluster"][slot])
        card = registry.cards.get(cluster)
        if cluster < 0 or card is None or not card.statable or cluster in avoid:
            continue
        bar = STAY_FACTOR if cluster in stated else 1.0
        count, share = float(state["long"][slot]) - float(state["negative"][slot]), float(shares.share[slot])
        if cluster not in pinned and (count < ENTER_COUNT * bar or share < ENTER_SHARE * bar):
            continue
        strength = math.inf if cluster in pinned else share * (INCUMBENT_BONUS if cluster in stated else 1.0)
        ranked.append((-strength, cluster, slot))
    chosen = _one_per_label(state, registry, [slot for _, _, slot in sorted(ranked)])[:MAXIMUM_INTERESTS]
    chosen.sort(key=lambda slot: (-round(float(shares.share[slot]), 6), int(state["cluster"][slot])))
    clusters = [int(state["cluster"][slot]) for slot in chosen]
    since = [stated.get(cluster, int(state["last_ts"])) for cluster in clusters]
    state["stated"] = clusters + [EMPTY] * (STATED - len(clusters))
    state["stated_from"] = since + [0] * (STATED - len(since))
    return tuple(
        _interest(user_id, state, slot, shares, registry, pinned, valid_from)
        for slot, valid_from in zip(chosen, since, strict=True)
    )


def _one_per_label(state: State, registry: Registry, slots: list[int]) -> list[int]:
    """The first slot of each label: clusters that speak in their parent's words share one."""
    first: dict[str, int] = {}
    for slot in slots:
        first.setdefault(registry.cards[int(state["cluster"][slot])].label, slot)
    return list(first.values())


def _stated(state: State) -> dict[int, int]:
    """What the last persona stated: cluster id -> since when."""
    pairs = zip(state["stated"].tolist(), state["stated_from"].tolist(), strict=True)
    return {cluster: since for cluster, since in pairs if cluster != EMPTY}


def _interest(
    user_id: str,
    state: State,
    slot: int,
    shares: Distribution,
    registry: Registry,
    pinned: frozenset[int],
    valid_from: int,
) -> Interest:
    cluster = int(state["cluster"][slot])
    card = registry.cards[cluster]
    share, short, long = float(shares.share[slot]), float(shares.short[slot]), float(shares.long[slot])
    count = float(state["long"][slot])
    return Interest(
        interest_id=interest_id(user_id, int(state["epoch"]), cluster),
        cluster_id=cluster,
        label=card.label,
        share=round(share, 4),
        share_bucket=max(5, 5 * math.floor(share * 20 + 0.5)),
        horizon=Horizon.SHORT if short > 2 * long else Horizon.LONG,
        trend=_trend(short, long),
        confidence=round(count / (count + CONFIDENCE_HALF), 2),
        valid_from=valid_from,
        query=card.query,
        pinned=cluster in pinned,
        titles=card.titles,
        evidence=_evidence(state, slot, registry),
    )


def _trend(short: float, long: float) -> int:
    """+1 where the short horizon holds clearly more of the watches than the long one, -1 where clearly less."""
    margin = 0.03 + 0.25 * long
    return (short > long + margin) - (short < long - margin)


def _evidence(state: State, slot: int, registry: Registry) -> tuple[Evidence, ...]:
    found = []
    for i in range(EVIDENCE):
        ts = int(state["evidence_ts"][slot][i])
        video = registry.video_of(int(state["evidence_video"][slot][i])) if ts else None
        if video is not None:
            found.append(Evidence(video, ts))
    return tuple(found)


def _novel(
    state: State, interests: tuple[Interest, ...], registry: Registry, avoid: frozenset[int]
) -> tuple[NovelCandidate, ...]:
    """Clusters near what the viewer likes and never watched, best first, spread over the interests they come from."""
    consumed = members(state["cluster"])
    said = {interest.label for interest in interests}
    scores: dict[int, float] = {}
    via: dict[int, tuple[float, int, str]] = {}
    for interest in interests:
        for cluster, similarity in registry.similar(interest.cluster_id):
            card = registry.cards.get(cluster)
            if (
                similarity < MINIMUM_SIMILARITY
                or card is None
                or not card.suggestible
                or card.label in said
                or cluster in consumed
                or cluster in avoid
            ):
                continue
            gain = max(interest.share, PINNED_SHARE if interest.pinned else 0.0) * similarity
            scores[cluster] = scores.get(cluster, 0.0) + gain
            via[cluster] = max(via.get(cluster, (0.0, 0, "")), (gain, interest.cluster_id, interest.label))
    if not interests:
        return _popular(registry, consumed | avoid)
    mean = sum(scores.values()) / len(scores) if scores else 0.0
    if mean <= 0:
        return ()
    ranked = sorted(scores, key=lambda cluster: (-round(scores[cluster], 9), cluster))
    chosen: list[int] = []
    used: dict[int, int] = {}
    for cluster in ranked:
        source = via[cluster][1]
        if used.get(source, 0) < 1 or len(interests) < MAXIMUM_NOVEL:
            used[source] = used.get(source, 0) + 1
            chosen.append(cluster)
        if len(chosen) == MAXIMUM_NOVEL:
            break
    return tuple(
        NovelCandidate(
            cluster_id=cluster,
            label=registry.cards[cluster].label,
            query=registry.cards[cluster].query,
            lift=round(scores[cluster] / mean, 3),
            confidence=round(min(1.0, scores[cluster]), 3),
            via=(via[cluster][1],),
            via_labels=(via[cluster][2],),
            titles=registry.cards[cluster].titles,
        )
        for cluster in chosen
    )


def _popular(registry: Registry, excluded: frozenset[int]) -> tuple[NovelCandidate, ...]:
    """What many viewers watch, for one of whom too little is known to go by."""
    cards = [card for card in registry.cards.values() if card.suggestible and card.cluster_id not in excluded]
    cards.sort(key=lambda card: (-card.prior, card.cluster_id))
    return tuple(
        NovelCandidate(card.cluster_id, card.label, card.query, lift=1.0, confidence=0.0, via=(), titles=card.titles)
        for card in cards[:MAXIMUM_NOVEL]
    )
