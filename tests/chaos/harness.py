"""One run of a case: its own topics, workers that are started again when they end, a producer that never waits."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exports without saying so
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from agents.kafka_admin import (
    KafkaRefused,
    KafkaUnavailable,
    confluent_options,
    create_topics,
    prefixed,
    topic_ids,
)
from agents.kafka_log import KafkaLog
from agents.localstack.stack import LocalStack
from agents.settings import Settings
from streams import topics
from tests.chaos.events import Message, closing, ghosts
from tests.chaos.reference import (
    Differences,
    Log,
    Result,
    behind,
    compare,
    expect_controls,
    left_behind,
    read_log,
    reference,
)
from tests.workers import WorkerProcess, Workers, committed, finished, until

DRAIN_SECONDS = 180.0
SETTLE_SECONDS = 20
"""Differences that are still there so long after everything was committed are real."""
SESSION_SECONDS = 10.0
"""A frozen or killed worker's partitions move after this long."""
CHUNKS_PER_SECOND = 10
REFUSING = "120"
"""max.message.bytes below any record batch of ours, above a transaction marker."""
REQUEST_MS = 120_000
"""A broker may be away for long; what it did not acknowledge is sent again."""


class Fleet:
    """Watch workers in numbered places. One that ends unasked is started again, as a supervisor would.

    Each place has a state folder of its own that outlives its workers.
    """

    def __init__(self, workers: Workers, folder: Path) -> None:
        self.workers = workers
        self.restarts = 0
        self._folder = folder
        self._places: dict[int, WorkerProcess] = {}
        self._supervised = True

    def start(self, place: int = 0, role: str = "watch") -> WorkerProcess:
        """Start the worker of a place."""
        environment = {"PERSONAS_STATE_FOLDER": str(self.state_folder(place))}
        self._places[place] = self.workers.start(role, environment=environment)
        return self._places[place]

    def state_folder(self, place: int) -> Path:
        """Where the disk store of a place is."""
        return self._folder / f"state-{place}"

    def state_folders(self) -> list[Path]:
        """The folders of all places that ever had a worker with a disk store."""
        return sorted(self._folder.glob("state-*"))

    def lines(self, text: str) -> list[str]:
        """Lines with this text in the logs of all workers."""
        return [line for worker in self.workers.all for line in worker.text().splitlines() if text in line]

    def worker(self, place: int = 0) -> WorkerProcess:
        """The latest worker of a place."""
        return self._places[place]

    def kill(self, place: int = 0) -> None:
        """SIGKILL; it stays away until it is started."""
        self._places.pop(place).kill()

    async def stop(self, place: int = 0) -> int:
        """SIGTERM; it stays away until it is started. Returns the exit status."""
        return await asyncio.to_thread(self._places.pop(place).stop)

    async def stop_all(self) -> list[int]:
        """SIGTERM to all at once; the exit statuses."""
        return await asyncio.gather(*(self.stop(place) for place in list(self._places)))

    def signal(self, number: signal.Signals, place: int = 0) -> None:
        """Send a signal to the worker of a place."""
        self._places[place].process.send_signal(number)

    @asynccontextmanager
    async def unsupervised(self) -> AsyncIterator[None]:
        """Let what ends stay down inside the block."""
        self._supervised = False
        try:
            yield
        finally:
            self._supervised = True

    async def supervise(self) -> None:
        """Start again what ends, until cancelled."""
        while True:
            await asyncio.sleep(0.5)
            for place, worker in list(self._places.items()):
                if self._supervised and not worker.running:
                    self.restarts += 1
                    self.start(place, worker.role)


@dataclass
class Run:
    """What a case's script works with. kills: how many SIGKILLs the script is to spread over its events."""

    settings: Settings
    local: LocalStack
    fleet: Fleet
    random: Random
    messages: Sequence[Message]
    kills: int
    say: Callable[[str], None]
    killed: int = 0
    earlier: list[Log] = field(default_factory=list)
    """Watch topics that were deleted, as they stood."""
    past_controls: Result = field(default_factory=Result)
    """What deleted topics of controls should have changed."""
    remarks: list[str] = field(default_factory=list)
    """What was wrong beside the figures."""
    _reference: tuple[list[Log], Result] | None = None
    _sent: int = 0
    _chunks: int = 0
    _producer: AIOKafkaProducer | None = None

    @property
    def log(self) -> KafkaLog:
        """A reader of its own; close it."""
        return KafkaLog(self.settings)

    # Events

    async def feed(self, share: float = 1.0, seconds: float = 0.0, *, transactions: bool = True) -> None:
        """Send the next share (of all) of the messages, evenly over this time, some in transactions, some aborted."""
        until_number = (
            len(self.messages)
            if share >= 1
            else min(len(self.messages), self._sent + round(share * len(self.messages)))
        )
        steps = max(1, round(seconds * CHUNKS_PER_SECOND))
        size = max(1, -(-(until_number - self._sent) // steps))
        while self._sent < until_number:
            chunk = list(self.messages[self._sent : min(self._sent + size, until_number)])
            await self._send(chunk, transactions=transactions)
            self._sent += len(chunk)
            await asyncio.sleep(seconds / steps)

    async def close_log(self) -> None:
        """Send a last watch to every partition, so that the log ends with a record and not with a marker."""
        self._chunks += 1
        await self._send(closing(self.settings.partitions, self._chunks), transactions=False)

    async def send(self, messages: Sequence[Message]) -> None:
        """Send records of the script's own."""
        await self._send(messages, transactions=False)

    async def close(self) -> None:
        """End the producer."""
        if self._producer is not None:
            producer, self._producer = self._producer, None
            with suppress(KafkaError):
                await producer.stop()

    async def _send(self, chunk: Sequence[Message], *, transactions: bool) -> None:
        self._chunks += 1
        if transactions and self._chunks % 8 == 0:
            await self._transaction(ghosts(list(chunk), self._chunks), commit=False)
        if transactions and self._chunks % 8 == 4 and await self._transaction(chunk, commit=True):
            return
        while True:
            if self._producer is None:
                self._producer = await _started(self.settings)
            try:
                await _send_all(self._producer, self.settings, chunk)
                return
            except KafkaError as error:
                self.say(f"producer starts again: {error!r}")
                await self.close()

    async def _transaction(self, chunk: Sequence[Message], *, commit: bool) -> bool:
        """Whether the chunk went through; one that did not is sent again, so that it may be in the log twice."""
        identity = f"{self.settings.topic_prefix}source"
        producer = AIOKafkaProducer(
            bootstrap_servers=self.settings.kafka_bootstrap, transactional_id=identity, transaction_timeout_ms=15_000
        )
        try:
            await producer.start()
            await producer.begin_transaction()
            await _send_all(producer, self.settings, chunk)
            if commit:
                await producer.commit_transaction()
            else:
                await producer.abort_transaction()
        except KafkaError as error:
            self.say(f"a transaction failed: {error!r}")
            return False
        finally:
            with suppress(KafkaError):
                await producer.stop()
        return True

    # Workers

    async def kill(self, place: int = 0, *, again: bool = True) -> None:
        """SIGKILL the worker of a place, and start another there unless told otherwise."""
        role = self.fleet.worker(place).role
        self.fleet.kill(place)
        self.killed += 1
        if again:
            self.fleet.start(place, role)

    async def until_active(self, seconds: float = 180) -> None:
        """Wait until workers have done something that can be seen in Kafka, from now on."""
        log = self.log
        try:
            before = await self._activity(log)

            async def changed() -> bool:
                return await self._activity(log) != before

            await until(changed, self.fleet.workers, seconds, 0.2)
        finally:
            await log.close()

    async def _activity(self, log: KafkaLog) -> list[int]:
        names = (topics.INTERESTS_CHANGELOG, topics.REFRESH_REQUESTS)
        ends = [await log.end(name, p) for name in names for p in range(self.settings.partitions)]
        return ends + await committed(self.settings, log, topics.WATCH_APP, topics.WATCH_EVENTS)

    async def drain(self, seconds: float = DRAIN_SECONDS) -> None:
        """Close the log, and wait until every watch event and control is committed."""
        await self.close_log()
        for name in (topics.USER_CONTROLS, topics.WATCH_EVENTS):
            await until(partial(self._finished, name), self.fleet.workers, seconds, 0.5)

    async def _finished(self, topic: str) -> bool:
        # A reader per look: one that a paused or restarted broker has thrown off would not recover in time.
        log = self.log
        try:
            return await finished(self.settings, log, topics.WATCH_APP, topic)
        except KafkaError:
            return False
        finally:
            await log.close()

    # Looking

    def logs(self) -> list[Log]:
        """The watch topics as they stand, deleted ones first."""
        return [*self.earlier, read_log(self.settings, self.earlier)]

    def differences(self) -> Differences:
        """What is in Kafka now against the reference."""
        logs = self.logs()
        if self._reference is None or self._reference[0] != logs:
            self._reference = logs, reference(self.settings, logs, past=self.past_controls)
        return compare(self._reference[1], left_behind(self.settings))

    async def settled(self) -> Differences:
        """The differences once everything is committed and flushed; those that stay are returned."""
        await self.drain()
        for _ in range(SETTLE_SECONDS):
            if not (found := await asyncio.to_thread(self.differences)):
                break
            await asyncio.sleep(1.0)
        return found

    async def uncommitted_is_all_that_is_missing(self) -> None:
        """Remark on viewers whose committed events are not in the changelog."""
        log = self.log
        try:
            offsets = await committed(self.settings, log, topics.WATCH_APP, topics.WATCH_EVENTS)
        finally:
            await log.close()
        limits = dict(enumerate(offsets))
        expected = await asyncio.to_thread(reference, self.settings, self.logs(), limits)
        if lost := behind(expected, await asyncio.to_thread(left_behind, self.settings)):
            self.remarks.append(f"offsets of {len(lost)} viewers were committed past the changelog: {lost[:5]}")

    # The broker's side

    def alter_topic(self, name: str, **values: str) -> None:
        """Set settings of a topic, dots in their names written as underscores; an empty value takes one back."""
        alter(self.settings, ResourceType.TOPIC, prefixed(self.settings, name), values)

    def delete_topics(self, names: Sequence[str] | None = None) -> None:
        """Delete topics by their names without prefix; all of the case's if none are given."""
        admin = AdminClient(confluent_options(self.settings))
        chosen = [topic.name for topic in topics.TOPICS] if names is None else names
        for future in admin.delete_topics([prefixed(self.settings, name) for name in chosen]).values():
            future.result()

    async def renew_topic(self, name: str) -> None:
        """Delete the topic of watch events or of controls and make it anew, once all that it holds was handled."""
        if found := await asyncio.to_thread(self.differences):
            self.remarks.append(f"before the topic was deleted: {found.figures()}")
        before = topic_ids(self.settings, [name])[name]
        if name == topics.WATCH_EVENTS:
            self.earlier.append(await asyncio.to_thread(read_log, self.settings, self.earlier))
        else:
            await asyncio.to_thread(expect_controls, self.settings, self.past_controls)
        await asyncio.to_thread(self.delete_topics, [name])
        await self.close()  # its metadata knows the old topic
        await until(lambda: self._renewed(name, before), self.fleet.workers, 30, 0.5)

    def _renewed(self, name: str, before: str) -> bool:
        create_topics(self.settings)
        try:
            return topic_ids(self.settings, [name])[name] != before
        except (KafkaRefused, KafkaUnavailable):
            return False


def limit_of(topic: str) -> str:
    """The topic's max.message.bytes, by its name without prefix."""
    return str(next(known.maximum_message_bytes for known in topics.TOPICS if known.name == topic))


def alter(settings: Settings, kind: ResourceType, name: str, values: Mapping[str, str]) -> None:
    """Set dynamic settings of a topic or broker; see `Run.alter_topic`."""
    entries = [
        ConfigEntry(
            key.replace("_", "."),
            value or None,
            incremental_operation=AlterConfigOpType.SET if value else AlterConfigOpType.DELETE,
        )
        for key, value in values.items()
    ]
    admin = AdminClient(confluent_options(settings))
    for future in admin.incremental_alter_configs([ConfigResource(kind, name, incremental_configs=entries)]).values():
        future.result()


async def _started(settings: Settings) -> AIOKafkaProducer:
    """A producer, however long the broker is away."""
    while True:
        producer = AIOKafkaProducer(
            bootstrap_servers=settings.kafka_bootstrap, enable_idempotence=True, request_timeout_ms=REQUEST_MS
        )
        try:
            await producer.start()
        except KafkaError:
            await producer.stop()
            await asyncio.sleep(0.5)
            continue
        return producer


async def _send_all(producer: AIOKafkaProducer, settings: Settings, chunk: Sequence[Message]) -> None:
    waiting: list[Awaitable[Any]] = [
        await producer.send(
            prefixed(settings, m.topic), m.value, m.key, partition=m.partition, headers=list(m.headers) or None
        )
        for m in chunk
    ]
    await asyncio.gather(*waiting)


def quiet_clients() -> None:
    """Kafka clients report every attempt to reach a broker that was stopped on purpose."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    logging.getLogger("cassandra").setLevel(logging.CRITICAL)
