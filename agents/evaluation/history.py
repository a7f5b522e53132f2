"""What real viewers watched, from the log of events that led to the requests."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace

from agents.evaluation.cases import Cases, Watch
from agents.event_log import EventLog


def with_watches(cases: Cases, log: EventLog) -> Cases:
    """The cases with what their viewers watched up to each request, and after it, each in order of time."""
    watches = watches_of(log)
    clusters = tuple(sorted(log.registry.cards))
    found = []
    for case in cases.cases:
        own = watches.get(case.user_id, ())
        place = bisect_right(own, case.request.as_of, key=lambda watch: watch.ts)
        found.append(replace(case, past=tuple(own[:place]), future=tuple(own[place:]), clusters=clusters))
    return replace(cases, cases=found)


def watches_of(log: EventLog) -> dict[str, list[Watch]]:
    """Qualifying watches of each viewer in order of time."""
    watches: dict[str, list[Watch]] = {}
    for event, cluster in log.watches():
        title = event.title or log.registry.title_of(event.video_id) or ""
        watches.setdefault(event.user_id, []).append(Watch(event.video_id, cluster, title, event.ts))
    return {user_id: sorted(own, key=lambda watch: watch.ts) for user_id, own in watches.items()}
