"""What a persona states: the chosen interests, the novel candidates, and why it was asked for.

Selection is statistics; the model only words it. The set is stable: an interest enters at 3 watches and 3% of the
viewer's watches, and stays until it falls below two thirds of either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt

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
from streams.state import EMPTY, STATED, State, members
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
REMEMBERED_VIDEOS: Final = 500_000
MOVED: Final = 0.03
"""Change of share from which an interest is named as risen or fallen."""


def build_context(
    user_id: str,
    state: State,
    shares: Distribution,
    registry: Registry,
    fired: Fired,
    policy: Policy,
    thresholds: Thresholds,
) -> Context:
    """Choose what the persona will state and explain why it was asked for. Marks the chosen slots in the state."""
    avoid = _avoided(state)
    explanation = explain(state, shares, registry, fired, thresholds, avoid)
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

    cards: by row, ascending by cluster id; row_of: rows by cluster id; near, cosine: (rows, neighbours), rows of the
    suggestible clusters near each one, those too far away or not suggestible as one row more, with cosine 0; statable:
    clusters that a persona may state; labelled: suggestible clusters by label; popular: suggestible cards, most watched
    first; videos: ids by key, filled as they are asked for.
    """

    cards: Sequence[ClusterCard]
    row_of: Mapping[int, int]
    near: npt.NDArray[np.int64]
    cosine: Floats
    statable: frozenset[int]
    labelled: Mapping[str, Sequence[int]]
    popular: Sequence[ClusterCard]
    videos: dict[int, str | None]


@lru_cache(maxsize=8)
def _prepared(registry: Registry) -> _Prepared:
    cards = [registry.cards[cluster] for cluster in sorted(registry.cards)]
    row_of = {card.cluster_id: row for row, card in enumerate(cards)}
    suggestible = [card for card in cards if card.suggestible]
    labelled: dict[str, list[int]] = {}
    for card in suggestible:
        labelled.setdefault(card.label, []).append(card.cluster_id)
    similar = [registry.similar(card.cluster_id) for card in cards]
    near = np.full((len(cards), max(map(len, similar), default=0)), len(cards))
    cosine = np.zeros(near.shape)
    allowed = {card.cluster_id for card in suggestible}
    for row, others in enumerate(similar):
        for place, (other, similarity) in enumerate(others):
            if similarity >= MINIMUM_SIMILARITY and other in allowed:
                near[row, place], cosine[row, place] = row_of[other], similarity
    return _Prepared(
        cards=cards,
        row_of=row_of,
        near=near,
        cosine=cosine,
        statable=frozenset(card.cluster_id for card in cards if card.statable),
        labelled=labelled,
        popular=sorted(suggestible, key=lambda card: (-card.prior, card.cluster_id)),
        videos={},
    )


def _avoided(state: State) -> frozenset[int]:
    masses = zip(state["cluster"].tolist(), state["negative"].tolist(), state["long"].tolist(), strict=True)
    disliked = [cluster for cluster, negative, long in masses if negative >= DISLIKED and negative > long]
    return members(state["hidden"]) | members(disliked)


def _interests(
    user_id: str, state: State, shares: Distribution, registry: Registry, avoid: frozenset[int]
) -> tuple[Interest, ...]:
    pinned, stated, statable = members(state["pinned"]), _stated(state), _prepared(registry).statable
    held, share = state["cluster"].tolist(), shares.share
    long, negative = state["long"].tolist(), state["negative"].tolist()
    ranked: list[tuple[float, int, int]] = []
    for slot, cluster in enumerate(held):
        if cluster not in statable or cluster in avoid:
            continue
        bar = STAY_FACTOR if cluster in stated else 1.0
        if cluster in pinned:
            ranked.append((-math.inf, cluster, slot))
        elif long[slot] - negative[slot] >= ENTER_COUNT * bar and share[slot] >= ENTER_SHARE * bar:
            ranked.append((-share[slot] * (INCUMBENT_BONUS if cluster in stated else 1.0), cluster, slot))
    # The first of each label: clusters that speak in their parent's words share one.
    first: dict[str, int] = {}
    for _, cluster, slot in sorted(ranked):
        first.setdefault(registry.cards[cluster].label, slot)
    chosen = list(first.values())[:MAXIMUM_INTERESTS]
    chosen.sort(key=lambda slot: (-round(share[slot], 6), held[slot]))
    clusters = [held[slot] for slot in chosen]
    since = [stated.get(cluster, int(state["last_ts"])) for cluster in clusters]
    state["stated"] = clusters + [EMPTY] * (STATED - len(clusters))
    state["stated_from"] = since + [0] * (STATED - len(since))
    return tuple(
        [
            _interest(user_id, state, slot, shares, registry, pinned, valid_from)
            for slot, valid_from in zip(chosen, since, strict=True)
        ]
    )


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
    videos, found = _prepared(registry).videos, []
    for key, ts in zip(state["evidence_video"][slot].tolist(), state["evidence_ts"][slot].tolist(), strict=True):
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


def _novel(
    state: State, interests: tuple[Interest, ...], registry: Registry, avoid: frozenset[int]
) -> tuple[NovelCandidate, ...]:
    """Clusters near what the viewer likes and never watched, best first, spread over the interests they come from."""
    prepared = _prepared(registry)
    excluded = {*avoid, *state["cluster"].tolist()}
    for interest in interests:
        excluded.update(prepared.labelled.get(interest.label, ()))
    if not interests:
        return _popular(registry, excluded)
    weights = [max(interest.share, PINNED_SHARE if interest.pinned else 0.0) for interest in interests]
    rows = [prepared.row_of[interest.cluster_id] for interest in interests]
    near = prepared.near[rows]
    gains = prepared.cosine[rows] * np.array(weights)[:, None]
    scores = np.bincount(near.ravel(), gains.ravel(), len(prepared.row_of) + 1)
    scores[[prepared.row_of[cluster] for cluster in excluded if cluster in prepared.row_of]] = 0.0
    candidates = np.flatnonzero(scores)
    if not len(candidates):
        return ()
    mean = float(scores[candidates].mean())
    chosen: list[NovelCandidate] = []
    used: set[int] = set()
    # Ties, such as rounding makes of sums in another order, go to the smaller id: rows are in its order.
    for row in candidates[np.argsort(-np.round(scores[candidates], 9), kind="stable")].tolist():
        source = int(np.where(near == row, gains, 0.0).max(axis=1).argmax())
        if source in used and len(interests) >= MAXIMUM_NOVEL:
            continue
        used.add(source)
        card, via, score = prepared.cards[row], interests[source], float(scores[row])
        chosen.append(
            NovelCandidate(
                cluster_id=card.cluster_id,
                label=card.label,
                query=card.query,
                lift=round(score / mean, 3),
                confidence=round(min(1.0, score), 3),
                via=(via.cluster_id,),
                via_labels=(via.label,),
                titles=card.titles,
            )
        )
        if len(chosen) == MAXIMUM_NOVEL:
            break
    return tuple(chosen)


def _popular(registry: Registry, excluded: Set[int]) -> tuple[NovelCandidate, ...]:
    """What many viewers watch, for one of whom too little is known to go by."""
    open_to = (card for card in _prepared(registry).popular if card.cluster_id not in excluded)
    return tuple(
        NovelCandidate(card.cluster_id, card.label, card.query, lift=1.0, confidence=0.0, via=(), titles=card.titles)
        for card in islice(open_to, MAXIMUM_NOVEL)
    )
