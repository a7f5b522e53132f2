"""An independent recount: the watch log read from Kafka and counted by other code than the workers'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from agents.kafka_admin import prefixed
from agents.settings import Settings
from agents.topic_reader import TopicReader
from streams import topics
from streams.state import from_bytes


@dataclass(frozen=True, slots=True)
class Recount:
    """The log against the table. over/under: events that the table has too many or too few, summed over viewers;
    unaccounted: records of the log that are neither counted, nor a repeat, nor a dead letter.
    """

    records: int
    counted: int
    repeats: int
    dead_letters: int
    over: int
    under: int

    @property
    def unaccounted(self) -> int:
        """Records that cannot be explained."""
        return self.records - self.counted - self.repeats - self.dead_letters


def recount(settings: Settings) -> Recount:
    """Count the log by (viewer, event id), and compare with the latest state of every viewer in the changelog."""
    with TopicReader(settings) as reader:
        log = [message.value() for message in reader.read(prefixed(settings, topics.WATCH_EVENTS))]
        letters = reader.read(prefixed(settings, topics.dead_letters_of(topics.WATCH_EVENTS)))
        places = {message.key() for message in letters}
        table = {m.key() or b"": m.value() for m in reader.read(prefixed(settings, topics.INTERESTS_CHANGELOG))}
    expected, repeats = _expected(log)
    found = Counter({key.decode(): int(from_bytes(value)["events"]) for key, value in table.items() if value})
    return Recount(
        records=len(log),
        counted=sum(found.values()),
        repeats=repeats,
        dead_letters=len(places),
        over=sum((found - expected).values()),
        under=sum((expected - found).values()),
    )


def _expected(log: Iterable[bytes | None]) -> tuple[Counter[str], int]:
    seen: set[tuple[str, str]] = set()
    expected: Counter[str] = Counter()
    repeats = 0
    for value in log:
        event = _usable(value)
        if event is None:
            continue
        identity = (event["user_id"], event["event_id"])
        if identity in seen:
            repeats += 1
            continue
        seen.add(identity)
        expected[event["user_id"]] += 1
    return expected, repeats


def _usable(value: bytes | None) -> dict[str, Any] | None:
    """The demo's own events are well-formed or plainly broken, so a look is enough here."""
    try:
        event = orjson.loads(value or b"")
    except orjson.JSONDecodeError:
        return None
    if not isinstance(event, dict) or not {"user_id", "video_id", "ts", "event_id"} <= event.keys():
        return None
    return event
