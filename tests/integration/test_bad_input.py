"""Every class of bad input over real Kafka: each has its documented result, and stops nothing.

The results are those of the table in streams/decoding.py.
"""

from __future__ import annotations

import time
from base64 import b64decode
from collections import Counter
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import MessageSizeTooLargeError

from agents.kafka_admin import prefixed
from agents.settings import Settings
from streams import topics
from streams.decoding import RejectReason, decode_record
from streams.identifiers import murmur2_partition
from streams.records import DeadLetter, Tier, UnknownVideo
from streams.state import State, from_bytes
from tests.command_line import run
from tests.conftest import Stack
from tests.workers import Workers, by_key, read, send, table_of, until, until_counted, with_topics_and_schema

pytestmark = pytest.mark.stack

PARTITIONS = 2
DAY = 86_400_000
NOW = time.time_ns() // 1_000_000
BROKER_LIMIT = 1_048_588
"""`max.message.bytes` of the topics: a record with its batch header must fit."""
ENVELOPE = 120
"""More than the batch and record headers around a short key and a value."""


@dataclass(frozen=True)
class Case:
    """A record and its documented result.

    counted: how many events it adds to its viewer; reason: why it is a dead letter instead.
    """

    name: str
    key: bytes | None
    value: bytes | None
    counted: int = 0
    reason: RejectReason | None = None


def event(user: str, video: str = "v0001", ts: object = NOW - DAY, **fields: object) -> bytes:
    return orjson.dumps({"user_id": user, "video_id": video, "ts": ts, **fields})


def bad(name: str, value: bytes | None, reason: RejectReason, key: bytes | None = b"") -> Case:
    return Case(name, name.encode() if key == b"" else key, value, reason=reason)


def good(name: str, *values: bytes, user: str | None = None) -> list[Case]:
    return [Case(f"{name} {number}", (user or name).encode(), value, 1) for number, value in enumerate(values)]


def padded(user: str) -> bytes:
    """An event just under the broker's limit, most of it a field that nobody knows."""
    return event(user, padding="x" * (BROKER_LIMIT - ENVELOPE - len(user) - len(event(user, padding=""))))


CASES = [
    bad("null", None, RejectReason.NULL_VALUE),
    bad("empty", b"", RejectReason.NOT_JSON),
    bad("text", b"not JSON", RejectReason.NOT_JSON),
    bad("nan", b'{"user_id": "nan", "video_id": "v1", "ts": NaN}', RejectReason.NOT_JSON),
    bad("utf-8", b'{"user_id": "utf-8", "video_id": "\xff", "ts": 1}', RejectReason.NOT_JSON),
    bad("nested", b"[" * 100_000, RejectReason.NOT_JSON),
    bad("list", b"[1, 2]", RejectReason.NOT_AN_OBJECT),
    bad("version", event("version", schema_version=7), RejectReason.UNKNOWN_SCHEMA_VERSION),
    bad("no-video", b'{"user_id": "no-video", "ts": 1790000000000}', RejectReason.MISSING_FIELD),
    bad("no-ts", event("no-ts", ts=None), RejectReason.MISSING_FIELD),
    bad("no-user", b'{"video_id": "v1", "ts": 1790000000000}', RejectReason.MISSING_FIELD),
    bad("text-ts", event("text-ts", ts="1790000000000"), RejectReason.WRONG_TYPE),
    bad("flag", event("flag", watch_ms=True), RejectReason.WRONG_TYPE),
    bad("tags", event("tags", tags="one, two"), RejectReason.WRONG_TYPE),
    bad("number", event("number", video_id=17), RejectReason.WRONG_TYPE),
    bad("no-id", event(""), RejectReason.EMPTY_ID, key=b"\x00"),
    bad("long", event("l" * 10_240), RejectReason.TOO_LONG, key=b"l" * 10_240),
    bad("control", event("control", video_id="v\n1"), RejectReason.UNPRINTABLE_ID),
    bad("other-key", event("someone"), RejectReason.KEY_MISMATCH),
    bad("no-key", event("no-key"), RejectReason.KEY_MISMATCH, key=None),
    bad("seconds", event("seconds", ts=NOW // 1000), RejectReason.TS_NOT_MILLISECONDS),
    bad("micro", event("micro", ts=NOW * 1000), RejectReason.TS_NOT_MILLISECONDS),
    bad("negative", event("negative", ts=-5), RejectReason.TS_NOT_MILLISECONDS),
    bad("watch", event("watch", watch_ms=-1), RejectReason.OUT_OF_RANGE),
    bad("duration", event("duration", duration_ms=-1), RejectReason.OUT_OF_RANGE),
    bad("fraction", event("fraction", watch_fraction=-0.5), RejectReason.OUT_OF_RANGE),
    bad("action", event("action", action="devour"), RejectReason.UNKNOWN_VALUE),
    bad("huge", b"\xfe" * (BROKER_LIMIT - ENVELOPE), RejectReason.NOT_JSON),
    *good("huge-event", padded("huge-event")),
    *good("future", event("future", ts=NOW + 365 * DAY)),
    *good("absurd", event("absurd", watch_ms=10 * DAY, duration_ms=4_000 * DAY)),
    *good("fraction-1e9", event("fraction-1e9", watch_fraction=1e9)),
    *good("title", event("title", title="t\x00" * 5_000, tags=["x" * 500] * 90)),
    *good("unknown", event("unknown", "never-seen"), event("unknown", "never-seen", ts=NOW - DAY + 60_000)),
    *good("field", event("field", of_tomorrow={"nested": [1]})),
    *good("out-of-order", *(event("out-of-order", f"v000{i}", ts=NOW - DAY - i * 60_000) for i in range(1, 5))),
    *good("late", event("late"), event("late", "v0002", ts=NOW - 3 * DAY)),
    *good("too-late", event("too-late")),
    Case("too late", b"too-late", event("too-late", "v0002", ts=NOW - 40 * DAY), reason=RejectReason.TOO_LATE),
    *good("twice", event("twice", event_id="e1")),
    Case("a duplicate", b"twice", event("twice", event_id="e1")),
    Case("a bot", b"bot", event("bot", traffic="bot")),
]
CONTROLS = [
    bad("null", None, RejectReason.NULL_VALUE),
    bad("text", b"{", RejectReason.NOT_JSON),
    bad("kind", orjson.dumps({"control_id": "c", "user_id": "kind", "kind": "explode", "ts": NOW}),
        RejectReason.UNKNOWN_VALUE),
    bad("bare", orjson.dumps({"control_id": "c", "user_id": "bare", "kind": "hide", "ts": NOW}),
        RejectReason.MISSING_FIELD),
    bad("range", orjson.dumps({"control_id": "c", "user_id": "range", "kind": "hide", "ts": NOW, "cluster_id": -4}),
        RejectReason.OUT_OF_RANGE),
    bad("stolen", orjson.dumps({"control_id": "c", "user_id": "someone", "kind": "erase", "ts": NOW}),
        RejectReason.KEY_MISMATCH),
    bad("old", orjson.dumps({"control_id": "c", "user_id": "old", "kind": "erase", "ts": NOW // 1000}),
        RejectReason.TS_NOT_MILLISECONDS),
]  # fmt: skip
REQUESTS = [
    bad("null", None, RejectReason.NULL_VALUE),
    bad("text", b"\x00\x01", RejectReason.NOT_JSON),
    bad("fields", b'{"user_id": "fields"}', RejectReason.MISSING_FIELD),
    bad("version", b'{"schema_version": 99}', RejectReason.UNKNOWN_SCHEMA_VERSION),
]
VIEWERS = ("ann", "bob", "cat", "dan")
"""They behave, on the same partitions, after everything else."""


@pytest.fixture(scope="module")
def settings(kafka: Stack, cassandra: Stack, topic_prefix: str, keyspace: str) -> Settings:
    made = replace(
        kafka.settings,
        topic_prefix=topic_prefix,
        cassandra_keyspace=keyspace,
        partitions=PARTITIONS,
        template_after=3,
        first_persona_after=1_000,  # templates only: no student is needed here
    )
    return with_topics_and_schema(made)


@pytest.fixture(scope="module")
async def states(settings: Settings, workers: Workers) -> dict[str, State]:
    """The table after one worker has read everything."""
    workers.start("all")
    for intake in (topics.REFRESH_REQUESTS, topics.UPGRADE_REQUESTS):
        await send(settings, intake, records(REQUESTS))
    await send(settings, topics.USER_CONTROLS, records(CONTROLS))
    await send(settings, topics.WATCH_EVENTS, records(CASES))
    watches = [
        (user.encode(), event(user, f"v{i:04}", ts=NOW - DAY + i * 60_000)) for user in VIEWERS for i in (1, 2, 3)
    ]
    await send(settings, topics.WATCH_EVENTS, watches)
    await until(lambda: set(VIEWERS) <= by_key(read(settings, topics.PERSONAS)).keys(), workers)
    await until(lambda: len(letters(settings, topics.USER_CONTROLS)) == len(CONTROLS), workers)
    await until_counted(settings, workers)
    return {user: from_bytes(value) for user, value in table_of(settings).items()}


def records(cases: list[Case]) -> list[tuple[bytes | None, bytes | None]]:
    return [(case.key, case.value) for case in cases]


def letters(settings: Settings, topic: str) -> list[DeadLetter]:
    return [decode_record(DeadLetter, m.value()) for m in read(settings, topics.dead_letters_of(topic))]


def positions(settings: Settings, topic: str) -> dict[tuple[str, int, int], Any]:
    return {(m.topic(), m.partition(), m.offset()): m for m in read(settings, topic)}


def assert_letters(settings: Settings, topic: str, cases: list[Case], *sources: str) -> None:
    """Exactly the cases with a reason are dead letters, each with the record it came from."""
    records = {where: m for source in sources for where, m in positions(settings, source).items()}
    expected = Counter((case.key, case.value, str(case.reason)) for case in cases if case.reason)
    found = Counter[tuple[bytes | None, bytes | None, str]]()
    for letter in letters(settings, topic):
        source = records[letter.source_topic, letter.source_partition, letter.source_offset]
        found[source.key(), source.value(), letter.reason] += 1
        value = source.value() or b""
        assert (letter.length, letter.sha256) == (len(value), sha256(value).hexdigest())
        assert b64decode(letter.payload or "") == value[: 64 * 1024]
        assert letter.detail.isprintable()
    assert found == expected


async def test_each_bad_event_is_one_dead_letter_with_its_reason(settings: Settings, states: dict[str, State]) -> None:
    assert_letters(settings, topics.WATCH_EVENTS, CASES, topics.WATCH_EVENTS)


async def test_every_event_is_accounted_for(settings: Settings, states: dict[str, State]) -> None:
    counted = {user: int(state["events"]) for user, state in states.items() if int(state["events"])}
    expected = Counter[str]()
    for case in CASES:
        expected[(case.key or b"").decode()] += case.counted
    expected.update(dict.fromkeys(VIEWERS, 3))
    assert counted == {user: number for user, number in expected.items() if number}
    others = [case.name for case in CASES if not case.counted and not case.reason]
    assert others == ["a duplicate", "a bot"]
    total = sum(counted.values()) + len(letters(settings, topics.WATCH_EVENTS)) + len(others)
    assert total == len(read(settings, topics.WATCH_EVENTS)) == len(CASES) + 3 * len(VIEWERS)


async def test_values_out_of_range_are_clamped(states: dict[str, State]) -> None:
    # The far future becomes the append time, to which a clock of this test is close.
    assert abs(int(states["future"]["last_ts"]) - time.time() * 1000) < 10 * 60_000
    for user in ("absurd", "fraction-1e9"):
        mass = float(states[user]["long"].sum())
        assert 0 < mass <= 10, user


async def test_late_events_are_counted_at_their_own_time(states: dict[str, State]) -> None:
    assert int(states["late"]["last_ts"]) == NOW - DAY
    assert int(states["late"]["first_ts"]) == NOW - 3 * DAY
    assert int(states["out-of-order"]["last_ts"]) == NOW - DAY - 60_000
    assert int(states["too-late"]["first_ts"]) == NOW - DAY


async def test_an_unknown_video_is_noted_once_and_not_assigned(settings: Settings, states: dict[str, State]) -> None:
    assert float(states["unknown"]["unassigned"]) == 2.0
    noted = by_key(read(settings, topics.UNKNOWN_VIDEOS))
    assert [decode_record(UnknownVideo, value or b"") for value in noted["never-seen"]] == [
        UnknownVideo("never-seen", None)
    ]


async def test_bad_controls_change_nobody(settings: Settings, states: dict[str, State]) -> None:
    assert_letters(settings, topics.USER_CONTROLS, CONTROLS, topics.USER_CONTROLS)
    assert not {case.name for case in CONTROLS} & states.keys()
    assert read(settings, topics.ERASURE_RECEIPTS) == []


async def test_requests_that_cannot_be_decoded_are_dead_letters(settings: Settings, states: dict[str, State]) -> None:
    sources = (topics.REFRESH_REQUESTS, topics.UPGRADE_REQUESTS)
    assert_letters(settings, topics.REFRESH_REQUESTS, [*REQUESTS, *REQUESTS], *sources)


async def test_every_partition_goes_on(settings: Settings, states: dict[str, State], workers: Workers) -> None:
    assert {murmur2_partition(user.encode(), PARTITIONS) for user in VIEWERS} == set(range(PARTITIONS))
    personas = by_key(read(settings, topics.PERSONAS))
    for user in VIEWERS:
        assert [orjson.loads(value or b"")["tier"] for value in personas[user]] == [Tier.TEMPLATE]
    assert [worker.stop() for worker in workers.running("all")] == [0], workers.logs()


async def test_dlq_list_shows_them(settings: Settings, states: dict[str, State]) -> None:
    document = orjson.loads(run(settings, "dlq", "list", "--json").stdout)
    expected = {
        topic: dict(Counter(str(case.reason) for case in cases if case.reason))
        for topic, cases in (
            (topics.WATCH_EVENTS, CASES),
            (topics.USER_CONTROLS, CONTROLS),
            (topics.REFRESH_REQUESTS, [*REQUESTS, *REQUESTS]),
        )
    }
    assert document["topics"] == {
        prefixed(settings, topics.dead_letters_of(topic)): reasons for topic, reasons in expected.items()
    }


async def test_the_broker_refuses_what_is_larger(settings: Settings) -> None:
    limit = 2 * BROKER_LIMIT
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap, max_request_size=limit) as client:
        with pytest.raises(MessageSizeTooLargeError):
            await client.send_and_wait(prefixed(settings, topics.WATCH_EVENTS), b"x" * BROKER_LIMIT, key=b"k")
