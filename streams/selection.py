"""What a persona states, in words: the chosen interests, the novel candidates, and why it was asked for.

streams/choosing.py chooses by number; here the registry's labels, queries and titles are put to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from struct import Struct
from typing import Final, NamedTuple

from streams.choosing import NONE, Catalogue, catalogue
from streams.identifiers import interest_id
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
from streams.requesting import ASKED, RULES, Requests
from streams.state import EVIDENCE
from streams.trigger import Policy

CONFIDENCE_HALF: Final = 4.0
"""Decayed watches at which confidence is one half."""
MATURE_AFTER: Final = 80
"""Qualifying watches after which a persona is called mature."""
REMEMBERED_VIDEOS: Final = 500_000


class Chosen(NamedTuple):
    """One request as Python values; the fields of `streams.requesting.ASKED`, in its order."""

    place: int
    rule: int
    template_only: bool
    value: float
    threshold: float
    epoch: int
    sequence: int
    events: int
    qualifying: int
    since_request: int
    described: bool
    audience: int
    first_ts: int
    last_ts: int
    n_eff: float
    divergence: float
    null_quantile: float
    risen: tuple[int, ...]
    risen_from: tuple[float, ...]
    risen_to: tuple[float, ...]
    fallen: tuple[int, ...]
    fallen_from: tuple[float, ...]
    fallen_to: tuple[float, ...]
    interest: tuple[int, ...]
    share: tuple[float, ...]
    short: tuple[float, ...]
    long: tuple[float, ...]
    mass: tuple[float, ...]
    since: tuple[int, ...]
    pinned: tuple[int, ...]
    evidence_video: tuple[int, ...]
    evidence_ts: tuple[int, ...]
    novel: tuple[int, ...]
    via: tuple[int, ...]
    score: tuple[float, ...]
    mean: float
    avoid: tuple[int, ...]
    avoided: int


def chosen(requests: Requests) -> list[Chosen]:
    """What each of the requests holds."""
    return [
        Chosen._make([values[start:end] if end else values[start] for start, end in _PLACES])
        for values in _VALUES.iter_unpack(requests.tobytes())
    ]


_FORMATS: Final = {"<i8": "q", "<u8": "Q", "<f8": "d", "|u1": "B", "|b1": "?"}


def _layout() -> tuple[Struct, list[tuple[int, int]]]:
    """How the bytes of a request unpack into numbers, and where each field's begin and end; end 0: it is one number."""
    formats, places, start = "<", [], 0
    for name in Chosen._fields:
        field = ASKED[name]
        count = math.prod(field.shape)
        formats += f"{count}{_FORMATS[field.base.str]}"
        places.append((start, start + count if field.shape else 0))
        start += count
    return Struct(formats), places


_VALUES, _PLACES = _layout()


def build_context(user_id: str, chosen: Chosen, registry: Registry, policy: Policy) -> Context:
    """Say what the persona will state, and why it was asked for."""
    interests = _interests(user_id, chosen, registry)
    return Context(
        maturity=_maturity(chosen.qualifying, policy),
        basis=Basis(
            events=chosen.events,
            n_eff=round(chosen.n_eff, 2),
            first_ts=chosen.first_ts,
            last_ts=chosen.last_ts,
        ),
        interests=interests,
        novel=_novel(interests, _prepared(registry).cards, chosen),
        avoid=tuple(sorted(set(chosen.avoid[: chosen.avoided]))) if chosen.avoided else (),
        explanation=_explanation(chosen, registry),
        language="en",
        audience=_AUDIENCES[chosen.audience],
    )


def _explanation(chosen: Chosen, registry: Registry) -> Explanation:
    """The rule's value against its threshold, and what moved since the last request."""
    rule, value, threshold = RULES[chosen.rule], round(chosen.value, 4), round(chosen.threshold, 4)
    if not chosen.described:
        return Explanation(rule, value, threshold, chosen.since_request)
    return Explanation(
        rule=rule,
        value=value,
        threshold=threshold,
        watches_since=chosen.since_request,
        divergence=round(chosen.divergence, 4),
        divergence_null=round(chosen.null_quantile, 4),
        risen=_moved(chosen.risen, chosen.risen_from, chosen.risen_to, registry),
        fallen=_moved(chosen.fallen, chosen.fallen_from, chosen.fallen_to, registry),
    )


def _moved(
    clusters: Sequence[int], before: Sequence[float], now: Sequence[float], registry: Registry
) -> tuple[tuple[int, str, float, float], ...]:
    return tuple(
        [
            (cluster, registry.cards[cluster].label, round(share_before, 4), round(share, 4))
            for cluster, share_before, share in zip(clusters, before, now, strict=True)
            if cluster != NONE
        ]
    )


def _maturity(watches: int, policy: Policy) -> Maturity:
    if watches < policy.first_persona_after:
        return Maturity.COLD
    return Maturity.MATURE if watches >= MATURE_AFTER else Maturity.FORMING


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What selection asks of a registry version again and again.

    catalogue: what the kernel takes; cards: by its rows; videos: ids by key, filled as they are asked for.
    """

    catalogue: Catalogue
    cards: Sequence[ClusterCard]
    videos: dict[int, str | None]


def catalogue_of(registry: Registry) -> Catalogue:
    """The registry as the kernel takes it."""
    return _prepared(registry).catalogue


@lru_cache(maxsize=8)
def _prepared(registry: Registry) -> _Prepared:
    return _Prepared(
        catalogue=catalogue(registry),
        cards=[registry.cards[cluster] for cluster in sorted(registry.cards)],
        videos={},
    )


def _interests(user_id: str, chosen: Chosen, registry: Registry) -> tuple[Interest, ...]:
    found = []
    for place, cluster in enumerate(chosen.interest):
        if cluster == NONE:
            break
        card, share, mass = registry.cards[cluster], chosen.share[place], chosen.mass[place]
        short, long = chosen.short[place], chosen.long[place]
        found.append(
            Interest(
                interest_id=interest_id(user_id, chosen.epoch, cluster),
                cluster_id=cluster,
                label=card.label,
                share=round(share, 4),
                share_bucket=max(5, 5 * math.floor(share * 20 + 0.5)),
                horizon=Horizon.SHORT if short > 2 * long else Horizon.LONG,
                trend=_trend(short, long),
                confidence=round(mass / (mass + CONFIDENCE_HALF), 2),
                valid_from=chosen.since[place],
                query=card.query,
                pinned=bool(chosen.pinned[place]),
                titles=card.titles,
                evidence=_evidence(chosen, place, registry),
            )
        )
    return tuple(found)


def _trend(short: float, long: float) -> int:
    """+1 where the short horizon holds clearly more of the watches than the long one, -1 where clearly less."""
    margin = 0.03 + 0.25 * long
    return (short > long + margin) - (short < long - margin)


def _evidence(chosen: Chosen, place: int, registry: Registry) -> tuple[Evidence, ...]:
    videos, found = _prepared(registry).videos, []
    for i in range(place * EVIDENCE, (place + 1) * EVIDENCE):
        key, ts = chosen.evidence_video[i], chosen.evidence_ts[i]
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


def _novel(interests: Sequence[Interest], cards: Sequence[ClusterCard], chosen: Chosen) -> tuple[NovelCandidate, ...]:
    found = []
    for row, place, score in zip(chosen.novel, chosen.via, chosen.score, strict=True):
        if row == NONE:
            break
        card, via = cards[row], () if place == NONE else (interests[place],)
        found.append(
            NovelCandidate(
                cluster_id=card.cluster_id,
                label=card.label,
                query=card.query,
                lift=round(score / chosen.mean, 3) if via else 1.0,
                confidence=round(min(1.0, score), 3),
                via=tuple([interest.cluster_id for interest in via]),
                via_labels=tuple([interest.label for interest in via]),
                titles=card.titles,
            )
        )
    return tuple(found)


_AUDIENCES: Final = (None, *Audience)
"""By their place in a state."""
