"""Names and settings of every topic: the one place that knows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

DAY_MS: Final = 86_400_000
SOURCE_RETENTION_DAYS: Final = 28
"""Of what events and controls are counted from."""


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as `personas init` creates it. `per_user` topics share one partition count and are keyed by user_id."""

    name: str
    per_user: bool
    compacted: bool = False
    retention_ms: int = 7 * DAY_MS
    maximum_message_bytes: int = 1_048_588


WATCH_EVENTS: Final = "watch-events"
USER_CONTROLS: Final = "user-controls"
WATCH_POSITIONS: Final = "watch-positions"
"""Where each control and registry version took effect in its watch partition; recorded before it is applied."""
REFRESH_REQUESTS: Final = "persona-refresh-requests"
UPGRADE_REQUESTS: Final = "persona-upgrade-requests"
PERSONAS: Final = "personas"
UNKNOWN_VIDEOS: Final = "unknown-videos"
ERASURE_RECEIPTS: Final = "erasure-receipts"
BOOTSTRAP_HEADER: Final = ("personas-bootstrap", b"1")
"""On watch events of a history being loaded: counted, but no request until the end marker."""
BOOTSTRAP_END_HEADER: Final = ("personas-marker", b"bootstrap_end")
"""On a record of each `user-controls` partition: the history is loaded, request one persona per eligible viewer."""
WATCH_APP: Final = "persona-watch"
PERSONA_APP: Final = "persona-writer"
INTERESTS_CHANGELOG: Final = f"{WATCH_APP}-interests-changelog"


def dead_letters_of(topic: str) -> str:
    """Name of the dead-letter topic of `topic`."""
    return f"{topic}.dead-letters"


TOPICS: Final = (
    Topic(WATCH_EVENTS, per_user=True, retention_ms=SOURCE_RETENTION_DAYS * DAY_MS),
    Topic(USER_CONTROLS, per_user=True, retention_ms=SOURCE_RETENTION_DAYS * DAY_MS),
    Topic(WATCH_POSITIONS, per_user=True, retention_ms=SOURCE_RETENTION_DAYS * DAY_MS),
    Topic(REFRESH_REQUESTS, per_user=True),
    Topic(UPGRADE_REQUESTS, per_user=True),
    Topic(PERSONAS, per_user=True, compacted=True),
    Topic(INTERESTS_CHANGELOG, per_user=True, compacted=True),
    Topic(UNKNOWN_VIDEOS, per_user=False, compacted=True),
    Topic(ERASURE_RECEIPTS, per_user=False, retention_ms=-1),
    *(
        Topic(dead_letters_of(name), per_user=False, retention_ms=SOURCE_RETENTION_DAYS * DAY_MS)
        for name in (WATCH_EVENTS, USER_CONTROLS, REFRESH_REQUESTS)
    ),
)
"""Compacted topics keep tombstones for 7 days (`delete.retention.ms`), longer than a consumer is usually away."""
