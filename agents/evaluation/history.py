"""What real viewers watched, from the log of events that led to the requests."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Final

from agents.evaluation.cases import COLD_WATCHES, Cases, Slice, Watch
from agents.event_log import EventLog
from streams.registry import Registry
from streams.words import NEUTRAL, tokens_of

DAY_MS: Final = 86_400_000
HEAVY_WATCHES_A_DAY: Final = 5


def with_watches(cases: Cases, log: EventLog) -> Cases:
    """The cases with what their viewers watched up to each request, and after it, each in order of time."""
    watches = watches_of(log)
    cards = log.registry.cards
    clusters = tuple(sorted(cards))
    statable = frozenset(cluster for cluster in clusters if cards[cluster].statable)
    private, tail = private_words(watches, log.registry), less_popular_half(watches)
    found = []
    for case in cases.cases:
        own = watches.get(case.user_id, ())
        place = bisect_right(own, case.request.as_of, key=lambda watch: watch.ts)
        past = tuple(own[:place])
        found.append(
            replace(
                case,
                past=past,
                future=tuple(own[place:]),
                private=private.get(case.user_id, ()),
                clusters=clusters,
                statable=statable,
                slice=slice_of(past, tail),
            )
        )
    return replace(cases, cases=found)


def slice_of(past: Sequence[Watch], tail: Set[int]) -> Slice | None:
    """A real viewer's slice by their watches so far, None without any. tail: the less popular half of the clusters."""
    if not past:
        return None
    if len(past) <= COLD_WATCHES:
        return Slice.COLD
    if 2 * sum(watch.cluster_id in tail for watch in past) > len(past):
        return Slice.TAIL
    days = max(1.0, (past[-1].ts - past[0].ts) / DAY_MS)
    return Slice.HEAVY if len(past) >= HEAVY_WATCHES_A_DAY * days else Slice.LIGHT


def less_popular_half(watches: Mapping[str, Sequence[Watch]]) -> frozenset[int]:
    """The clusters that make up the half of all watched ones with the fewest watches."""
    counts = Counter(watch.cluster_id for own in watches.values() for watch in own)
    ordered = [cluster for cluster, _ in counts.most_common()]
    return frozenset(ordered[(len(ordered) + 1) // 2 :])


def private_words(watches: Mapping[str, Sequence[Watch]], registry: Registry) -> dict[str, tuple[str, ...]]:
    """By viewer, topical words of titles that they alone watched, which no card and no other viewer's title has."""
    viewers: dict[str, set[str]] = {}
    for user_id, own in watches.items():
        for word in {word for watch in own for word in tokens_of(watch.title)}:
            viewers.setdefault(word, set()).add(user_id)
    shown = (text for card in registry.cards.values() for text in (card.label, *card.titles))
    public = {word for text in shown for word in tokens_of(text)}
    private: dict[str, list[str]] = {}
    for word, holders in sorted(viewers.items()):
        if len(holders) == 1 and word not in public and word not in NEUTRAL and not word.isdecimal():
            private.setdefault(next(iter(holders)), []).append(word)
    return {user_id: tuple(words) for user_id, words in private.items()}


def watches_of(log: EventLog) -> dict[str, list[Watch]]:
    """Qualifying watches of each viewer in order of time."""
    watches: dict[str, list[Watch]] = {}
    for event, cluster in log.watches():
        title = event.title or log.registry.title_of(event.video_id) or ""
        watches.setdefault(event.user_id, []).append(Watch(event.video_id, cluster, title, event.ts))
    return {user_id: sorted(own, key=lambda watch: watch.ts) for user_id, own in watches.items()}
