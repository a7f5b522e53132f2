"""What real viewers watched, from the log of events that led to the requests."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace

from agents.evaluation.cases import Cases, Watch
from agents.replay import Event
from streams.counting import QUALIFYING_WEIGHT
from streams.decoding import Rejected
from streams.identifiers import event_text, playback_text
from streams.interests import watch_weight
from streams.records import UNASSIGNED, Action, Traffic
from streams.registry import Registry
from streams.watch import WatchConfiguration


def watches_of(
    events: Sequence[Event], configuration: WatchConfiguration, registry: Registry
) -> dict[str, list[Watch]]:
    """Qualifying watches of each viewer in order of time; a playback counts once, however often it is reported."""
    watches: dict[str, list[Watch]] = {}
    seen: set[tuple[str, str]] = set()
    for record in events:
        decoded = configuration.decode(record.value, record.key, record.timestamp)
        if isinstance(decoded, Rejected):
            continue
        event = decoded.record
        if event.traffic is not Traffic.ORGANIC or watch_weight(event) < QUALIFYING_WEIGHT:
            continue
        cluster = UNASSIGNED if event.cluster_id is None else registry.successor_of(event.cluster_id)
        if cluster not in registry.cards:
            cluster = registry.cluster_of(event.video_id)
        key = (event.user_id, (playback_text(event) if event.action is Action.PLAY else None) or event_text(event))
        if cluster not in registry.cards or key in seen:
            continue
        seen.add(key)
        title = event.title or registry.title_of(event.video_id) or ""
        watches.setdefault(event.user_id, []).append(Watch(event.video_id, cluster, title, event.ts))
    return {user_id: sorted(own, key=lambda watch: watch.ts) for user_id, own in watches.items()}


def with_watches(cases: Cases, watches: Mapping[str, Sequence[Watch]], registry: Registry) -> Cases:
    """The cases with what their viewers watched up to each request, and after it."""
    clusters = tuple(sorted(registry.cards))
    found = []
    for case in cases.cases:
        own = watches.get(case.user_id, ())
        place = bisect_right(own, case.request.as_of, key=lambda watch: watch.ts)
        found.append(replace(case, past=tuple(own[:place]), future=tuple(own[place:]), clusters=clusters))
    return replace(cases, cases=found)
