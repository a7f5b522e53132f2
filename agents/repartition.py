"""More partitions for the per-user topics, with every viewer's state and persona moved to where the key belongs then.

Kafka only adds partitions, and a key's partition depends on their number. So states and personas are copied to their
new partition and then removed from the old one, and each step can be repeated: after a kill the same command goes on.

The order of raising the counts keeps workers away meanwhile. The changelog is first and the watch topic last, and a
worker does not start while the per-user topics differ in their counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, NewPartitions  # type: ignore[attr-defined]  # see kafka_admin

from agents.compiled import worker_kernel
from agents.kafka_admin import REQUEST_SECONDS, KafkaRefused, confluent_options, prefixed, topic_ids
from agents.settings import Settings
from agents.topic_reader import TopicReader
from streams import topics
from streams.ageing import KEPT
from streams.identifiers import murmur2_partition
from streams.positions import Position, PositionError, PositionKind, decode_position, encode_position
from streams.state import BOOTSTRAPPED, STATE, STUB_BYTES, WORD, WORDS, StateError, from_values, pack
from streams.topics import TOPICS

READ_BY: Final = {
    topics.WATCH_APP: (topics.WATCH_EVENTS, topics.USER_CONTROLS),
    topics.PERSONA_APP: (topics.REFRESH_REQUESTS, topics.UPGRADE_REQUESTS),
}
"""What each consumer group reads."""
FIRST: Final = (topics.INTERESTS_CHANGELOG, topics.PERSONAS)
"""Their counts are raised before anything moves, that of the watch topic when all else is done."""
Headers: TypeAlias = dict[str, str | bytes | None] | list[tuple[str, str | bytes | None]] | None
MOVED: Final[Headers] = [("reason", b"moved")]
"""Headers of the tombstone that a record leaves behind where it was."""
STUB: Final = np.dtype(
    {
        "names": list(KEPT),
        "formats": [STATE[name] for name in KEPT],
        "offsets": [STATE.fields[name][1] for name in KEPT if STATE.fields is not None],
        "itemsize": STUB_BYTES,
    }
)
"""The first fields of a state."""
_NO_COORDINATOR_YET: Final = (
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
)
"""For a moment after a cluster or a coordinator was started."""
QUIET_SECONDS: Final = 2.0
ARRIVE_SECONDS: Final = 120.0

COMPILE_FROM: Final = 20_000
"""States to move from which compiling what packs them pays."""
AT_ONCE: Final = 1_000
"""Records that are decoded together."""

Say: TypeAlias = Callable[[str], None]
Placed: TypeAlias = Callable[[list[bytes], list[int]], list[bytes]]
"""(values, new partitions) -> values there."""


class RepartitionRefused(Exception):  # noqa: N818 - the verdict of a check
    """The change cannot be made now; the message says why and what to do."""


@dataclass(slots=True)
class Outcome:
    """What was found and done. Topic names are those in Kafka.

    before: partition counts found; viewers: states in the changelog; misplaced: those on another partition than their
    key's under the new count; resumed: an earlier run had begun. States and personas moved; events that arrived
    meanwhile and were placed anew.
    """

    partitions: int
    before: dict[str, int]
    resumed: bool = False
    viewers: int = 0
    misplaced: int = 0
    states: int = 0
    personas: int = 0
    events: int = 0


def repartition(
    settings: Settings, partitions: int, say: Say, *, dry_run: bool = False, overwrite: bool = False
) -> Outcome:
    """Bring every per-user topic to this many partitions, and what is kept per viewer with it. Blocking.

    `say` is told of each step. `overwrite`: for counts that were raised without this command; see `_refuse_raised`.
    Raises RepartitionRefused, KafkaUnavailable, KafkaRefused.
    """
    with TopicReader(settings) as log:
        work = _Repartition(settings, partitions, log, say)
        outcome = work.check()
        if outcome.misplaced and work.complete and not overwrite:
            _refuse_raised(outcome)
        if not dry_run:
            work.move()
        return outcome


def partition_counts(settings: Settings, log: TopicReader) -> dict[str, int]:
    """How many partitions each per-user topic has, by its name in Kafka. Raises KafkaUnavailable, KafkaRefused."""
    names = [prefixed(settings, topic.name) for topic in TOPICS if topic.per_user]
    return {name: len(log.partitions(name)) for name in names}


def stored_states(
    log: TopicReader, changelog: str, partition: int, ranges: Sequence[tuple[int, int]] | None = None
) -> tuple[list[bytes], npt.NDArray[np.void]]:
    """Keys in a changelog partition and the first fields (n,) STUB of their states. Raises StateError.

    `ranges`: look only at offsets start <= offset < end of each.
    """
    newest: dict[bytes, bytes] = {}
    looked_at = [log.ends(changelog, partition)] if ranges is None else ranges
    messages = chain.from_iterable(log.read_range(changelog, partition, start, end) for start, end in looked_at)
    while some := list(islice(messages, AT_ONCE)):  # a whole state is many times as large as its first fields
        values = from_values([_bytes(message.value()) for message in some if message.value() is not None])
        stubs = iter(values.view(np.uint8).reshape(len(values), STATE.itemsize)[:, :STUB_BYTES])
        for message in some:
            key = _bytes(message.key())
            if message.value() is None:
                newest.pop(key, None)
            else:
                newest[key] = next(stubs).tobytes()
    return list(newest), np.frombuffer(b"".join(newest.values()), STUB)


def commit_offsets(admin: AdminClient, group: str, positions: list[TopicPartition]) -> None:
    """Commit offsets of a group that has no members. Raises KafkaRefused."""
    deadline = time.monotonic() + REQUEST_SECONDS
    while (error := _commit_error(admin, group, positions)) is not None:
        if error.code() not in _NO_COORDINATOR_YET or time.monotonic() >= deadline:
            raise KafkaRefused(f"committing offsets of {group}: {error.str()}; run the command again")
        time.sleep(0.2)


def _commit_error(admin: AdminClient, group: str, positions: list[TopicPartition]) -> KafkaError | None:
    wanted = [ConsumerGroupTopicPartitions(group, positions)]
    try:
        found = admin.alter_consumer_group_offsets(wanted, request_timeout=REQUEST_SECONDS)[group].result()
    except KafkaException as error:
        cause: KafkaError = error.args[0]
        return cause
    return next((tp.error for tp in found.topic_partitions if tp.error is not None), None)


def _refuse_raised(outcome: Outcome) -> None:
    raise RepartitionRefused(
        f"the topics have {outcome.partitions} partitions already, but {outcome.misplaced} of {outcome.viewers} states "
        "are not on the partition of their key: the counts were raised without moving them, and workers may have "
        "counted those viewers anew since. --overwrite takes the states of before and drops what was counted since"
    )


class _Repartition:
    """One run of the procedure. `complete`: every topic had the new count before."""

    def __init__(self, settings: Settings, partitions: int, log: TopicReader, say: Say) -> None:
        self._settings = settings
        self._partitions = partitions
        self._log = log
        self._say = say
        self._admin = AdminClient(confluent_options(settings))
        self._watch_topic = topic_ids(settings, [topics.WATCH_EVENTS])[topics.WATCH_EVENTS]
        self._outcome = Outcome(partitions, partition_counts(settings, log))
        self.complete = set(self._outcome.before.values()) == {partitions}
        self._fresh = self._count(FIRST[0]) != partitions

    def check(self) -> Outcome:
        """Look at everything, change nothing. Raises RepartitionRefused."""
        self._check_counts()
        self._check_groups()
        self._outcome.resumed = not self._fresh and not self.complete
        if self._fresh:
            self._check_lag()
        self._look_at_states()
        return self._outcome

    def move(self) -> None:
        """Do it, after `check`."""
        outcome = self._outcome
        self._fence_writers()
        self._raise_counts(FIRST)
        self._check_groups()  # a worker may have looked at the counts before they were raised
        outcome.states = self._move(topics.INTERESTS_CHANGELOG, self._placed_states())
        outcome.personas = self._move(topics.PERSONAS, lambda values, _: values)
        if not self.complete:
            self._raise_counts(topic.name for topic in TOPICS if topic.per_user and topic.name != topics.WATCH_EVENTS)
            self._renew_positions()
            self._raise_counts([topics.WATCH_EVENTS])
        outcome.events = sum(self._place_late(name) for name in READ_BY[topics.WATCH_APP])

    # Checks

    def _check_counts(self) -> None:
        before = self._outcome.before
        most = max(before, key=lambda name: before[name])
        if before[most] > self._partitions:
            raise RepartitionRefused(
                f"{most} has {before[most]} partitions, and Kafka cannot take any away; name at least that many"
            )
        if len(set(before.values()) - {self._partitions}) > 1:
            counts = ", ".join(f"{name} {count}" for name, count in before.items())
            raise RepartitionRefused(
                f"the per-user topics have different partition counts ({counts}), but no run towards "
                f"{self._partitions} leaves these behind; name the count that the earlier run was given"
            )

    def _check_groups(self) -> None:
        for group in READ_BY:
            name = prefixed(self._settings, group)
            members = self._members(name)
            if members:
                raise RepartitionRefused(
                    f"consumer group {name} has {members} members: stop every worker first (one that was killed stays "
                    "a member for 10 s)"
                )

    def _members(self, group: str) -> int:
        deadline = time.monotonic() + REQUEST_SECONDS
        while True:
            asked = self._admin.describe_consumer_groups([group], request_timeout=REQUEST_SECONDS)
            try:
                return len(asked[group].result().members)
            except KafkaException as error:
                code = error.args[0].code()
                if code == KafkaError.GROUP_ID_NOT_FOUND:  # no worker ever ran
                    return 0
                if code not in _NO_COORDINATOR_YET or time.monotonic() >= deadline:
                    raise self._refused(f"consumer group {group}", error) from error
            time.sleep(0.2)

    def _check_lag(self) -> None:
        ends = self._input_ends()
        for group, names in READ_BY.items():
            for name in names:
                for partition, start in self._committed(group, name).items():
                    self._check_read(group, name, partition, start)
        time.sleep(QUIET_SECONDS)
        if self._input_ends() != ends:
            raise RepartitionRefused(
                "records arrive on the watch or control topic: stop the producers until the command is done, so that "
                "none places records by the old count"
            )

    def _check_read(self, group: str, name: str, partition: int, start: int) -> None:
        topic = self._name(name)
        # Counted one by one: the end can be a transaction's marker, which nobody reads.
        lag = sum(1 for _ in self._log.read_range(topic, partition, start, self._log.ends(topic, partition)[1]))
        if lag:
            raise RepartitionRefused(
                f"{lag} records of {topic} partition {partition} wait for {prefixed(self._settings, group)}: let the "
                "workers finish (upgrades need the student and a budget that lets them on), then stop them"
            )

    def _input_ends(self) -> list[int]:
        names = READ_BY[topics.WATCH_APP]
        return [self._log.ends(self._name(name), p)[1] for name in names for p in range(self._count(name))]

    def _committed(self, group: str, name: str) -> dict[int, int]:
        """First offset that a group has not read, by partition; the log's beginning where it has committed none."""
        consumer = Consumer({**confluent_options(self._settings), "group.id": prefixed(self._settings, group)})
        wanted = [TopicPartition(self._name(name), partition) for partition in range(self._count(name))]
        try:
            found = consumer.committed(wanted, timeout=REQUEST_SECONDS)
        except KafkaException as error:
            raise self._refused(f"offsets of {prefixed(self._settings, group)}", error) from error
        finally:
            consumer.close()
        for tp in found:
            if tp.error is not None:
                raise KafkaRefused(f"offsets of {prefixed(self._settings, group)}: {tp.error.str()}; try again")
        return {tp.partition: max(tp.offset, self._log.ends(tp.topic, tp.partition)[0]) for tp in found}

    def _look_at_states(self) -> None:
        """Count states. Refuse what a first run would lose: controls not applied, and a load that has not ended."""
        outcome, changelog = self._outcome, self._name(topics.INTERESTS_CHANGELOG)
        count = self._count(topics.INTERESTS_CHANGELOG)
        committed = self._committed(topics.WATCH_APP, topics.WATCH_EVENTS) if self._fresh else {}
        for partition in range(count):
            try:
                keys, states = stored_states(self._log, changelog, partition)
            except StateError as error:
                raise RepartitionRefused(f"{changelog} partition {partition}: {error}") from error
            outcome.viewers += len(keys)
            outcome.misplaced += sum(murmur2_partition(key, self._partitions) != partition for key in keys)
            if self._fresh:
                self._check_placed(partition, count, keys)
                self._check_load(partition, states)
                self._check_controls(partition, committed[partition], keys, states)
            self._say(f"{changelog} partition {partition}: {len(keys)} states")

    def _check_placed(self, partition: int, count: int, keys: list[bytes]) -> None:
        wrong = [key for key in keys if murmur2_partition(key, count) != partition]
        if wrong:
            raise RepartitionRefused(
                f"{len(wrong)} states on partition {partition}, such as that of {wrong[0].decode(errors='replace')!a}, "
                "are not where Kafka's default partitioner puts their key: the producers use another one. "
                "`personas doctor` says what to set"
            )

    def _check_load(self, partition: int, states: npt.NDArray[np.void]) -> None:
        loading = int(np.count_nonzero(states["flags"] & BOOTSTRAPPED))
        if loading:
            raise RepartitionRefused(
                f"a history is being loaded: {loading} viewers of partition {partition} wait for the end marker. "
                "Finish `personas produce --bootstrap`, let the workers apply it, then stop them"
            )

    def _check_controls(self, partition: int, committed: int, keys: list[bytes], states: npt.NDArray[np.void]) -> None:
        """Positions before the committed offset have taken effect; those just there may not have."""
        row_of = {key: row for row, key in enumerate(keys)}
        here = ("", self._watch_topic)  # positions in a watch topic that was deleted are past
        for offset, item in self._positions(partition):
            if item.control is None or item.position < committed or item.watch_topic not in here:
                continue
            row = row_of.get(item.control.user_id.encode())
            if row is None or int(states["control_offset"][row]) < offset:
                raise RepartitionRefused(
                    f"a control of {item.control.user_id!a} is recorded on partition {partition} but not applied yet: "
                    "start the watch workers, wait until their lag is 0 and some seconds more, stop them"
                )

    def _positions(self, partition: int) -> Iterator[tuple[int, Position]]:
        topic = self._name(topics.WATCH_POSITIONS)
        for message in self._log.read_range(topic, partition, *self._log.ends(topic, partition)):
            try:
                yield int(message.offset() or 0), decode_position(_bytes(message.value()))
            except PositionError as error:
                raise RepartitionRefused(f"{topic} partition {partition} offset {message.offset()}: {error}") from error

    # Steps

    def _fence_writers(self) -> None:
        """End what a worker that hangs may have left open: it could still commit old states over moved ones."""
        for partition in range(self._partitions):
            name = prefixed(self._settings, f"{topics.WATCH_APP}-{partition}")
            producer = Producer({**confluent_options(self._settings), "transactional.id": name})
            try:
                producer.init_transactions(REQUEST_SECONDS)
            except KafkaException as error:
                raise self._refused(f"ending open transactions of {name}", error) from error

    def _raise_counts(self, names: Iterable[str]) -> None:
        for name in names:
            topic = self._name(name)
            if len(self._log.partitions(topic)) >= self._partitions:
                continue
            wanted = [NewPartitions(topic, self._partitions)]
            try:
                self._admin.create_partitions(wanted, request_timeout=REQUEST_SECONDS)[topic].result()
            except KafkaException as error:
                raise self._refused(f"adding partitions to {topic}", error) from error
            deadline = time.monotonic() + REQUEST_SECONDS
            while len(self._log.partitions(topic)) < self._partitions:  # brokers learn of them a moment later
                if time.monotonic() >= deadline:
                    raise KafkaRefused(f"{topic} does not show its new partitions; run the command again")
                time.sleep(0.1)
            self._say(f"{topic}: {self._partitions} partitions")

    def _move(self, name: str, placed: Placed) -> int:
        """Move every key's newest record to the key's partition; `placed` gives values there. How many moved."""
        topic, moved = self._name(name), 0
        for partition in range(len(self._log.partitions(topic))):
            newest = self._misplaced(topic, partition)
            if newest:
                self._move_from(topic, partition, newest, placed)
                self._say(f"{topic} partition {partition}: {len(newest)} moved")
                moved += len(newest)
        return moved

    def _placed_states(self) -> Placed:
        """States on their new partitions: their markers were offsets of the old ones, all of which are applied."""
        many = self._outcome.misplaced >= COMPILE_FROM
        pack_all = worker_kernel(self._settings.data_folder / "kernel").pack if many else pack

        def placed(values: list[bytes], partitions: list[int]) -> list[bytes]:
            states = from_values(values)
            states["watch_partition"] = partitions
            states["watch_offset"] = -1
            states["control_offset"] = -1
            return pack_all(states.view(WORD).reshape(len(states), WORDS))

        return placed

    def _misplaced(self, topic: str, partition: int) -> dict[bytes, int]:
        """Offset of the newest record of each key that belongs elsewhere. Values are read again when they are moved."""
        newest: dict[bytes, int] = {}
        for message in self._log.read_range(topic, partition, *self._log.ends(topic, partition)):
            key = message.key()
            if key is None or murmur2_partition(_bytes(key), self._partitions) == partition:
                continue
            if message.value() is None:
                newest.pop(_bytes(key), None)
            else:
                newest[_bytes(key)] = int(message.offset() or 0)
        return newest

    def _move_from(self, topic: str, partition: int, newest: dict[bytes, int], placed: Placed) -> None:
        """Copies first, acknowledged, then tombstones: a kill between leaves both, and the next run repeats it."""
        sender = _Sender(self._settings)
        first, last = min(newest.values()), max(newest.values())
        messages = (
            message
            for message in self._log.read_range(topic, partition, first, last + 1)
            if newest.get(_bytes(message.key())) == message.offset()
        )
        while some := list(islice(messages, AT_ONCE)):
            targets = [murmur2_partition(_bytes(message.key()), self._partitions) for message in some]
            values = placed([_bytes(message.value()) for message in some], targets)
            for message, target, value in zip(some, targets, values, strict=True):
                sender.send(topic, target, message.key(), value, message.headers())
        sender.finish()
        for key in newest:
            sender.send(topic, partition, key, None, MOVED)
        sender.finish()

    def _renew_positions(self) -> None:
        """Leave on each partition the registry version in force there, and no position that has taken effect.

        A position just at the committed offset is applied again when the partition is opened, and the viewer would be
        missing there. New partitions begin with the version that the others have.
        """
        topic = self._name(topics.WATCH_POSITIONS)
        own: dict[int, Position] = {}
        for partition in range(self._partitions):
            for _, item in self._positions(partition):
                if item.kind is PositionKind.REGISTRY:
                    own[partition] = item
        if not own:  # no worker ever ran
            return
        latest = max(own.values(), key=lambda item: item.registry_version or 0)
        ends = {partition: self._log.ends(topic, partition)[1] for partition in range(self._partitions)}
        sender = _Sender(self._settings)
        for partition in range(self._partitions):
            sender.send(topic, partition, None, encode_position(own.get(partition, replace(latest, position=0))), None)
        sender.finish()
        before = [TopicPartition(topic, partition, end) for partition, end in ends.items() if end]
        for position, future in self._admin.delete_records(before, request_timeout=REQUEST_SECONDS).items():
            try:
                future.result()
            except KafkaException as error:
                raise self._refused(f"deleting positions of partition {position.partition}", error) from error
        self._say(f"{topic}: renewed")

    def _place_late(self, name: str) -> int:
        """Send what arrived meanwhile to the partition of its key, in order, and commit past it. How many records."""
        topic, placed = self._name(name), 0
        starts = self._committed(topics.WATCH_APP, name)
        ends = {partition: self._log.ends(topic, partition)[1] for partition in starts}
        for partition, start in starts.items():
            end = ends[partition]
            late = list(self._log.read_range(topic, partition, start, end))
            if all(murmur2_partition(_bytes(m.key()), self._partitions) == partition for m in late if m.key()):
                continue
            sender = _Sender(self._settings)
            for message in late:
                key = message.key()
                target = partition if key is None else murmur2_partition(_bytes(key), self._partitions)
                sender.send(topic, target, key, message.value(), message.headers())
            sender.finish()
            group = prefixed(self._settings, topics.WATCH_APP)
            commit_offsets(self._admin, group, [TopicPartition(topic, partition, end)])
            placed += len(late)
        return placed

    def _name(self, name: str) -> str:
        return prefixed(self._settings, name)

    def _count(self, name: str) -> int:
        return self._outcome.before[self._name(name)]

    def _refused(self, doing: str, error: KafkaException) -> KafkaRefused:
        return KafkaRefused(f"{doing} at {self._settings.kafka_bootstrap}: {error.args[0].str()}")


class _Sender:
    """Sends records to given partitions; `finish` returns when the brokers have acknowledged all."""

    def __init__(self, settings: Settings) -> None:
        self._producer = Producer(
            {
                **confluent_options(settings),
                "enable.idempotence": True,
                "delivery.timeout.ms": int(ARRIVE_SECONDS * 1_000),
                "message.max.bytes": 2_000_000,
                "linger.ms": 20,
            }
        )
        self._failed: list[str] = []

    def send(
        self,
        topic: str,
        partition: int,
        key: bytes | str | None,
        value: bytes | str | None,
        headers: Headers,
    ) -> None:
        """Hand a record over, waiting while the queue is full."""
        while True:
            try:
                self._producer.produce(topic, value, key, partition, headers=headers or [], on_delivery=self._delivered)
            except BufferError:
                self._producer.poll(0.5)
            else:
                self._producer.poll(0)
                return

    def finish(self) -> None:
        """Raises KafkaRefused if a record did not arrive."""
        left = self._producer.flush(ARRIVE_SECONDS)
        if left or self._failed:
            cause = self._failed[0] if self._failed else "no acknowledgement"
            raise KafkaRefused(f"{left + len(self._failed)} records were not written ({cause}); run the command again")

    def _delivered(self, error: KafkaError | None, _: Message) -> None:
        if error is not None:
            self._failed.append(error.str())


def _bytes(content: bytes | str | None) -> bytes:
    """What the client types as text too."""
    return content.encode() if isinstance(content, str) else content or b""
