"""Dead letters as read from their topics; sending the original records back to where they came from; deleting."""

from __future__ import annotations

from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from confluent_kafka import KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from agents.kafka_admin import REQUEST_SECONDS, KafkaRefused, confluent_options, prefixed
from agents.settings import Settings
from streams.dead_letters import MAXIMUM_KEY, original_value
from streams.decoding import UnreadableRecordError, decode_record
from streams.identifiers import murmur2_partition
from streams.records import DeadLetter
from streams.topics import REFRESH_REQUESTS, TOPICS, UPGRADE_REQUESTS, dead_letters_of

REPLAY_HEADER: Final = "replayed-from"
"""Header of a replayed record: topic/partition/offset of its dead letter."""
SUFFIX: Final = dead_letters_of("")


@dataclass(frozen=True, slots=True)
class Entry:
    """A record of a dead-letter topic. `letter` is None, and `unreadable` says why, if it is not one of ours.

    `timestamp` is the append time in milliseconds.
    """

    topic: str
    partition: int
    offset: int
    timestamp: int
    letter: DeadLetter | None
    unreadable: str = ""

    @property
    def position(self) -> str:
        """topic/partition/offset."""
        return f"{self.topic}/{self.partition}/{self.offset}"


@dataclass(frozen=True, slots=True)
class Replayable:
    """The original record behind a dead letter, whole."""

    entry: Entry
    topic: str
    partition: int
    key: bytes | None
    value: bytes


class NotReplayableError(ValueError):
    """A dead letter does not hold all of its record; the message says what is missing."""


def dead_letter_topics(settings: Settings) -> list[str]:
    """Names in Kafka of all dead-letter topics."""
    return [prefixed(settings, topic.name) for topic in TOPICS if topic.name.endswith(SUFFIX)]


def entry_of(message: Message) -> Entry:
    """The entry that a record of a dead-letter topic is."""
    letter, unreadable = None, ""
    try:
        letter = decode_record(DeadLetter, message.value() or b"")
    except UnreadableRecordError as error:
        unreadable = str(error)
    return Entry(
        topic=str(message.topic()),
        partition=int(message.partition() or 0),  # typed as optional, though a consumed record has them
        offset=int(message.offset() or 0),
        timestamp=message.timestamp()[1],
        letter=letter,
        unreadable=unreadable,
    )


def replayable(entry: Entry) -> Replayable:
    """The original record of a dead letter. Raises NotReplayableError if the letter does not hold all of it."""
    letter = entry.letter
    if letter is None:
        raise NotReplayableError(f"not a dead letter: {entry.unreadable}")
    # The letter's own text must not decide which topic is written to.
    if letter.source_topic not in _sources(entry.topic):
        raise NotReplayableError(f"a letter of {entry.topic} cannot come from topic {letter.source_topic!a}")
    try:
        value = original_value(letter)
        key = None if letter.key is None else b64decode(letter.key, validate=True)
    except ValueError as error:
        raise NotReplayableError(str(error)) from None
    if value is None:
        raise NotReplayableError("the record had no value")
    if key is not None and len(key) >= MAXIMUM_KEY:
        raise NotReplayableError(f"its key may be cut: dead letters keep {MAXIMUM_KEY} bytes of it")
    return Replayable(entry, letter.source_topic, letter.source_partition, key, value)


@dataclass(slots=True)
class Cut:
    """The beginning of a dead-letter topic up to the last letter that is meant.

    chosen: letters meant; others: letters before the last one of their partition that are not, by reason; ends: offset
    behind the last one meant, by partition.
    """

    topic: str
    chosen: int = 0
    others: Counter[str] = field(default_factory=Counter)
    ends: dict[int, int] = field(default_factory=dict)


def cut_for(
    topic: str, entries: Iterable[Entry], meant: Callable[[Entry], bool], reason_of: Callable[[Entry], str]
) -> Cut:
    """What must be deleted of `topic` so that the letters meant are gone. `entries`: all, in order of offsets."""
    cut = Cut(topic)
    since_last: dict[int, Counter[str]] = {}
    for entry in entries:
        passed = since_last.setdefault(entry.partition, Counter())
        if not meant(entry):
            passed[reason_of(entry)] += 1
            continue
        cut.chosen += 1
        cut.others.update(passed)
        passed.clear()
        cut.ends[entry.partition] = entry.offset + 1
    return cut


def delete_before(settings: Settings, cuts: Sequence[Cut]) -> None:
    """Delete every letter of the cuts. Raises KafkaRefused, which names the topic and the cause."""
    positions = [TopicPartition(cut.topic, partition, end) for cut in cuts for partition, end in cut.ends.items()]
    admin = AdminClient(confluent_options(settings))
    for position, future in admin.delete_records(positions, request_timeout=REQUEST_SECONDS).items():
        try:
            future.result()
        except KafkaException as error:
            cause = error.args[0].str()
            raise KafkaRefused(f"letters of {position.topic} at {settings.kafka_bootstrap}: {cause}") from error


def _sources(topic: str) -> tuple[str, ...]:
    """Topics whose unusable records go to this dead-letter topic; requests of both kinds share one."""
    source = topic.removesuffix(SUFFIX)
    if source.endswith(REFRESH_REQUESTS):
        return source, source.removesuffix(REFRESH_REQUESTS) + UPGRADE_REQUESTS
    return (source,)


class Replayer:
    """Sends records back to the partitions they came from; `failed` holds position and cause of what did not arrive."""

    def __init__(self, settings: Settings, partitions: Callable[[str], int] | None = None) -> None:
        """`partitions`: how many a topic has; with it, a record with a key goes to the partition of its key now."""
        self._partitions = partitions
        self._producer = Producer(
            {
                **confluent_options(settings),
                "enable.idempotence": True,
                "delivery.timeout.ms": 30_000,
                "message.max.bytes": 2_000_000,
            }
        )
        self.failed: list[tuple[str, str]] = []

    def send(self, record: Replayable) -> None:
        """Hand a record to the producer, waiting while its queue is full."""
        position = record.entry.position

        def delivered(error: Any, _: object) -> None:  # noqa: ANN401
            if error is not None:
                self.failed.append((position, error.str()))

        while True:
            try:
                self._producer.produce(
                    record.topic,
                    record.value,
                    record.key,
                    self._partition(record),
                    headers=[(REPLAY_HEADER, position.encode())],
                    on_delivery=delivered,
                )
            except BufferError:
                self._producer.poll(0.5)
            except KafkaException as error:  # such as a partition that the topic no longer has
                self.failed.append((position, error.args[0].str()))
                return
            else:
                self._producer.poll(0)
                return

    def _partition(self, record: Replayable) -> int:
        if self._partitions is None or record.key is None:
            return record.partition
        return murmur2_partition(record.key, self._partitions(record.topic))

    def finish(self) -> None:
        """Wait until every record has arrived or failed (at most 30 seconds after the last)."""
        self._producer.flush(35.0)
