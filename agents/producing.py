"""Sends an event file to Kafka, line by line as it is, keyed as Kafka's own clients would key it.

Lines that are no events are sent too: judging them is the worker's, which writes a dead letter for each. They have no
key that the worker would accept; a hash of the line picks their partition, so that two runs place them alike.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import orjson
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from agents.kafka_admin import aiokafka_options
from agents.kafka_clients import TopicMissingError
from agents.settings import Settings
from streams.identifiers import murmur2_partition
from streams.mapping import FieldMapping
from streams.topics import BOOTSTRAP_END_HEADER, BOOTSTRAP_HEADER

MARKER_VALUE: Final = b"{}"
LINGER_MS: Final = 20
BATCH_BYTES: Final = 256 * 1024
REQUEST_TIMEOUT_MS: Final = 60_000
METADATA_SECONDS: Final = 5.0
PIPE_BYTES: Final = 64 * 1024
LINES_PER_TURN: Final = 200
"""After so many lines the event loop gets a turn: for acknowledgements, signals and the progress bar."""
KEPT_LINE_NUMBERS: Final = 100


class Sender(Protocol):
    """The part of aiokafka's producer that is used here."""

    async def send(
        self,
        topic: str,
        value: bytes | None = None,
        key: bytes | None = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
        headers: Sequence[tuple[str, bytes]] | None = None,
    ) -> asyncio.Future[Any]:
        """Enqueue a record; the future resolves when every in-sync replica has it."""


@dataclass(frozen=True, slots=True)
class ProducePlan:
    """What to send and how fast.

    rate: lines a second, speed: event time against real time (60: an hour a minute); at most one of them, none is as
    fast as the brokers take it. from_line: first line to send, from 1. mapping: where the lines' user_id and ts are.
    """

    topic: str
    partitions: int
    rate: float | None = None
    speed: float | None = None
    bootstrap: bool = False
    from_line: int = 1
    mapping: FieldMapping | None = None


@dataclass(slots=True)
class ProduceSummary:
    """What became of the lines: lines = skipped + blank + too_large + acknowledged + failed.

    next_line is where to go on after an interruption; error is why sending stopped, if it was not the file's end.
    """

    lines: int = 0
    skipped: int = 0
    blank: int = 0
    too_large: int = 0
    too_large_lines: list[int] = field(default_factory=list)
    without_key: int = 0
    acknowledged: int = 0
    failed: int = 0
    next_line: int = 1
    interrupted: bool = False
    error: str | None = None

    @property
    def complete(self) -> bool:
        """Whether the whole file was read and every record that was sent is in Kafka."""
        return not self.interrupted and self.error is None and self.failed == 0


def key_and_time(line: bytes, mapping: FieldMapping | None = None) -> tuple[bytes | None, float | None]:
    """A line's record key (the UTF-8 of its user_id) and ts; None for what it does not have."""
    try:
        data = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None, None
    if not isinstance(data, dict):
        return None, None
    if mapping is not None:
        data = mapping.apply(data)
    user_id, ts = data.get("user_id"), data.get("ts")
    key = user_id.encode() if isinstance(user_id, str) else None
    return key, ts if isinstance(ts, int | float) and not isinstance(ts, bool) else None


async def produce_lines(
    lines: AsyncIterable[bytes],
    sender: Sender,
    plan: ProducePlan,
    stop: asyncio.Event,
    on_turn: Callable[[ProduceSummary], None] = lambda summary: None,
) -> ProduceSummary:
    """Send the lines in their order, then await every acknowledgement.

    Ends early, with counts, when `stop` is set or a record cannot be delivered. Lines beyond the client's record limit
    are counted and left out. `on_turn` is called now and then with the counts so far.
    """
    summary = ProduceSummary()
    delivery = _Delivery(summary)
    pace = _Pace(plan, stop)
    number = 0
    async for raw in lines:
        number += 1
        if stop.is_set() or summary.error is not None:
            break
        if number % LINES_PER_TURN == 0:
            on_turn(summary)
            await asyncio.sleep(0)
        line = raw.rstrip(b"\r\n")
        if number < plan.from_line:
            summary.skipped += 1
        elif not line.strip():
            summary.blank += 1
        elif not await _send(line, number, sender, plan, pace, delivery):
            break
        summary.lines += 1
        summary.next_line = number + 1
    summary.interrupted = stop.is_set()
    await delivery.settled()
    on_turn(summary)
    return summary


async def file_lines(content: Iterable[bytes]) -> AsyncIterator[bytes]:
    """The lines of a file. Reading a disk does not wait long enough to need more."""
    for line in content:
        yield line


async def piped_lines(descriptor: int, stop: asyncio.Event) -> AsyncIterator[bytes]:
    """The lines of a pipe or terminal, as they come; ends at the end of the input or when `stop` is set.

    Waiting for input leaves the event loop free, so what was sent is delivered meanwhile.
    """
    rest = b""
    while await _readable(descriptor, stop):
        chunk = os.read(descriptor, PIPE_BYTES)
        if not chunk:
            break
        *complete, rest = (rest + chunk).split(b"\n")
        for line in complete:
            yield line
    if rest:
        yield rest


async def _readable(descriptor: int, stop: asyncio.Event) -> bool:
    """Wait for input; False if `stop` came first."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    waits = [asyncio.create_task(event.wait()) for event in (ready, stop)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        loop.remove_reader(descriptor)
        for wait in waits:
            wait.cancel()
    return ready.is_set() and not stop.is_set()


async def send_bootstrap_end(sender: Sender, topic: str, partitions: int) -> None:
    """One marker to each partition of the control topic: from here the worker asks for the loaded viewers' personas.

    Send it after every record of the load is acknowledged. Raises KafkaError.
    """
    sent: list[Awaitable[Any]] = [
        await sender.send(topic, value=MARKER_VALUE, partition=partition, headers=[BOOTSTRAP_END_HEADER])
        for partition in range(partitions)
    ]
    await asyncio.gather(*sent)


def create_producer(settings: Settings) -> AIOKafkaProducer:
    """An idempotent producer, to be started inside the running event loop. Raises SettingsError."""
    return AIOKafkaProducer(
        **aiokafka_options(settings),
        acks="all",
        enable_idempotence=True,
        linger_ms=LINGER_MS,
        max_batch_size=BATCH_BYTES,
        request_timeout_ms=REQUEST_TIMEOUT_MS,
    )


async def partition_count(producer: AIOKafkaProducer, topic: str) -> int:
    """How many partitions a topic has. Raises TopicMissingError if the brokers do not know it."""
    try:
        return len(await asyncio.wait_for(producer.partitions_for(topic), METADATA_SECONDS))
    except TimeoutError:
        raise TopicMissingError(f"topic {topic} does not exist; run `personas init`") from None


async def _send(line: bytes, number: int, sender: Sender, plan: ProducePlan, pace: _Pace, delivery: _Delivery) -> bool:
    """Send one line at its time; False if that time never came because of a stop, or sending failed."""
    key, ts = key_and_time(line, plan.mapping)
    if not await pace.until(ts):
        return False
    partition = murmur2_partition(line, plan.partitions) if key is None else None
    headers = [BOOTSTRAP_HEADER] if plan.bootstrap else None
    try:
        future = await sender.send(plan.topic, value=line, key=key, partition=partition, headers=headers)
    except MessageSizeTooLargeError:
        delivery.too_large(number)
        return True
    except KafkaError as error:
        delivery.summary.error = _described(error)
        return False
    delivery.summary.without_key += key is None
    delivery.expect(future)
    return True


class _Delivery:
    """Counts acknowledgements as they come."""

    def __init__(self, summary: ProduceSummary) -> None:
        self.summary = summary
        self._pending: set[asyncio.Future[Any]] = set()

    def expect(self, future: asyncio.Future[Any]) -> None:
        self._pending.add(future)
        future.add_done_callback(self._done)

    def too_large(self, number: int) -> None:
        self.summary.too_large += 1
        if len(self.summary.too_large_lines) < KEPT_LINE_NUMBERS:
            self.summary.too_large_lines.append(number)

    async def settled(self) -> None:
        """Return when every expected record is acknowledged or has failed."""
        if self._pending:
            await asyncio.wait(self._pending)
            await asyncio.sleep(0)  # the callbacks of the last ones

    def _done(self, future: asyncio.Future[Any]) -> None:
        self._pending.discard(future)
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        if error is None:
            self.summary.acknowledged += 1
            return
        self.summary.failed += 1
        self.summary.error = self.summary.error or _described(error)


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class _Pace:
    """Says when a line is due: by count for a rate, by event time for a speed."""

    def __init__(self, plan: ProducePlan, stop: asyncio.Event) -> None:
        self._plan = plan
        self._stop = stop
        self._count = 0
        self._started: float | None = None
        self._first_ts: float | None = None

    async def until(self, ts: float | None) -> bool:
        """Wait for the line's time; False if `stop` came first. A line without ts is due at once."""
        delay = self._due(ts) - asyncio.get_running_loop().time()
        if delay <= 0:
            return True
        try:
            await asyncio.wait_for(self._stop.wait(), delay)
        except TimeoutError:
            return True
        return False

    def _due(self, ts: float | None) -> float:
        if self._started is None:
            self._started = asyncio.get_running_loop().time()
        if self._plan.rate is not None:
            self._count += 1
            return self._started + (self._count - 1) / self._plan.rate
        if self._plan.speed is None or ts is None:
            return 0.0
        if self._first_ts is None:
            self._first_ts = ts
        return self._started + (ts - self._first_ts) / 1_000 / self._plan.speed
