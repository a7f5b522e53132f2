"""The changelog of one watch partition: states written in transactions by its owner alone, and read back whole.

Each partition has a transactional producer of its own, so that opening a changelog fences whoever owned the partition
before: what that worker left open is aborted, and what it writes later is refused. Readers see committed records only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    KafkaError,
    MessageSizeTooLargeError,
    OffsetOutOfRangeError,
    ProducerFenced,
    RecordListTooLargeError,
)

from agents.kafka_admin import aiokafka_options, prefixed
from agents.kafka_clients import TopicMissingError, partitions_of
from agents.settings import Settings
from streams import topics
from streams.state_table import Changes

BATCH_BYTES: Final = 1_000_000
"""A record batch, uncompressed. The changelog topic takes at least so much (`max.message.bytes`)."""
TRANSACTION_BYTES: Final = 32 * 1024 * 1024
"""A larger flush is split into several transactions."""
FLUSH_SECONDS: Final = 60.0
"""Limit of one transaction. The brokers abort an open one after the same time."""
OPEN_SECONDS: Final = 90.0
"""Limit of taking a partition over: the brokers may still have to end the last owner's transaction."""
STOP_SECONDS: Final = 10.0
STALLED_SECONDS: Final = 90.0
"""Recovery without progress gives up after this: longer than a transaction can stay open."""
FETCH_BYTES: Final = 8 * 1024 * 1024
POLL_MS: Final = 200
NOBODY: Final = b""
"""Key of records that are about no viewer."""
LOST: Final = -1
"""Base offset of an acknowledgement whose offset the broker no longer knows."""

Apply = Callable[[Sequence[bytes], Sequence[bytes | None], int], None]
"""Takes keys, stored values (None: removed) and the changelog offset up to which they are complete."""

logger = logging.getLogger(__name__)


class ChangelogError(RuntimeError):
    """The changelog could not be read or written; the message says what to do. What is not confirmed is not written."""


class StaleOwnerError(ChangelogError):
    """Another worker owns the partition now: this one must not write it any more."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Offsets that the log has: beginning <= offset < end, with gaps."""

    beginning: int
    end: int


def changelog_consumer(settings: Settings) -> AIOKafkaConsumer:
    """A consumer of committed records that joins no group; to be started."""
    return AIOKafkaConsumer(
        **aiokafka_options(settings),
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="none",
        max_partition_fetch_bytes=FETCH_BYTES,
        fetch_max_wait_ms=POLL_MS,
    )


async def bounds_of(consumer: AIOKafkaConsumer, partition: TopicPartition) -> Bounds:
    """The log's present bounds. An open transaction hides what follows it."""
    beginnings = await consumer.beginning_offsets([partition])
    ends = await consumer.end_offsets([partition])
    return Bounds(int(beginnings[partition]), int(ends[partition]))


class PartitionChangelog:
    """The changelog of one watch partition, for its owner: `open`, `recover`, then `flush` as often as needed.

    After an error of `flush` nothing more can be written: the worker starts over from what is committed.
    """

    def __init__(self, settings: Settings, partition: int) -> None:
        self._settings = settings
        self._partition = TopicPartition(prefixed(settings, topics.INTERESTS_CHANGELOG), partition)
        self._producer: AIOKafkaProducer | None = None
        self._in_transaction = False
        self._one_writer = asyncio.Lock()
        self._failure: BaseException | None = None
        self._end = 0
        self._bounds = Bounds(0, 0)

    async def open(self) -> Bounds:
        """Take the partition over from any other owner; returns the bounds of what is committed.

        Raises ChangelogError, and TopicMissingError.
        """
        try:
            async with changelog_consumer(self._settings) as consumer:
                if self._partition not in await partitions_of(consumer, [self._partition.topic]):
                    raise TopicMissingError(
                        f"{self._shown} does not exist; compare PERSONAS_PARTITIONS with the topic's"
                    )
                await self._take_over()
                beginning = (await bounds_of(consumer, self._partition)).beginning
            self._bounds = Bounds(beginning, await self._barrier())
        except (KafkaError, AssertionError) as error:  # aiokafka asserts that brokers are known
            await self.close()
            raise ChangelogError(f"{self._shown} cannot be opened: {error!r}; check that the brokers run") from error
        except BaseException:
            await self.close()
            raise
        self._end = self._bounds.end
        return self._bounds

    async def recover(self, apply: Apply, start: int | None = None) -> int:
        """Hand every committed record from `start` (None: the beginning) to the end at `open` to `apply`, in log order.

        Returns the offset up to which all is read. Raises ChangelogError.
        """
        first = self._bounds.beginning if start is None else start
        if first >= self._bounds.end:
            return self._bounds.end
        async with changelog_consumer(self._settings) as consumer:
            consumer.assign([self._partition])
            consumer.seek(self._partition, first)
            await self._read(consumer, apply)
        return self._bounds.end

    async def confirm(self) -> None:
        """Show that nobody has taken the partition over since `open`: what was read since then is this owner's to use.

        Raises StaleOwnerError, and ChangelogError as `flush` does.
        """
        self._advance(await self._barrier() - 1, 1)

    async def flush(self, changes: Changes) -> int:
        """Write changed states, all or none of each transaction; returns the offset up to which the log is complete.

        Up to TRANSACTION_BYTES make one transaction. Raises StaleOwnerError, and ChangelogError where the outcome is
        not known to be a success.
        """
        async with self._writing():
            start = 0
            while start < len(changes):
                async with asyncio.timeout(FLUSH_SECONDS):
                    start = await self._write(changes, start)
        return self._end

    async def record(self, topic: str, value: bytes) -> int:
        """Write one record without key to this partition of another topic, by its full name; returns its offset.

        In a transaction of its own, so that a stale owner cannot. Raises as `flush` does.
        """
        async with self._writing(), asyncio.timeout(FLUSH_SECONDS):
            producer = self._opened()
            await producer.begin_transaction()
            self._in_transaction = True
            sent = await producer.send(topic, value, partition=self._partition.partition)
            try:
                written = await sent
            except BaseException:
                _ignore([sent])
                raise
            await producer.commit_transaction()
            self._in_transaction = False
            if written.offset == LOST:
                raise ChangelogError(f"{topic} took a record but the broker no longer knows where: restart the worker")
        return int(written.offset)

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[None]:
        """One transaction after the other; none after one that failed."""
        async with self._one_writer:
            if self._failure is not None:
                raise ChangelogError(f"{self._shown}: nothing is written after a flush that failed") from self._failure
            try:
                yield
            except BaseException as error:
                self._failure = error
                if not isinstance(error, KafkaError | TimeoutError | AssertionError):
                    raise
                if not isinstance(error, ProducerFenced):
                    await self._abort()
                raise self._explained(error) from error

    @property
    def failed(self) -> bool:
        """Whether a flush failed or was cancelled: what it was given may not be written."""
        return self._failure is not None

    async def close(self) -> None:
        """Disconnect; aborts what a cancelled flush left open."""
        if self._producer is None:
            return
        producer, self._producer = self._producer, None
        if self._in_transaction and not isinstance(self._failure, ProducerFenced):
            await self._abort(producer)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await producer.stop()
        except (TimeoutError, KafkaError) as error:
            logger.warning("%s: the producer did not stop: %r", self._shown, error)
        _ignore_errors(producer)

    # Reading

    async def _read(self, consumer: AIOKafkaConsumer, apply: Apply) -> None:
        partition, end = self._partition, self._bounds.end
        position, progress = await consumer.position(partition), time.monotonic()
        while position < end:
            records = await self._fetched(consumer)
            # What is not handed out moves the position too: markers, aborted transactions, what compaction left out.
            reached = await consumer.position(partition)
            if records:
                apply(*columns(records), reached)
            if reached > position:
                position, progress = reached, time.monotonic()
            elif time.monotonic() - progress > STALLED_SECONDS:
                raise ChangelogError(
                    f"{self._shown}: the brokers gave nothing for {STALLED_SECONDS:.0f} s at offset {position} of {end}"
                )

    async def _fetched(self, consumer: AIOKafkaConsumer) -> list[Any]:
        try:
            found: list[Any] = (await consumer.getmany(timeout_ms=POLL_MS)).get(self._partition, [])
        except OffsetOutOfRangeError as error:
            raise ChangelogError(f"{self._shown}: the log was cut while it was read; start again") from error
        except KafkaError as error:
            raise ChangelogError(f"{self._shown} cannot be read: {error!r}") from error
        return found

    # Writing

    async def _take_over(self) -> None:
        self._producer = AIOKafkaProducer(
            **aiokafka_options(self._settings),
            transactional_id=prefixed(self._settings, f"{topics.WATCH_APP}-{self._partition.partition}"),
            transaction_timeout_ms=round(FLUSH_SECONDS * 1000),
            max_batch_size=BATCH_BYTES,
        )
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                await self._producer.start()
        except TimeoutError as error:
            raise ChangelogError(
                f"{self._shown}: not taken over within {OPEN_SECONDS:.0f} s: the brokers did not end the last owner's "
                "transaction; look at their transaction coordinator"
            ) from error

    async def _barrier(self) -> int:
        """Commit a tombstone of nobody; returns the offset behind it. All that was ever committed is before it.

        The end that the brokers tell is not enough: after an outage it can be behind the last committed transaction.
        """
        async with self._writing(), asyncio.timeout(OPEN_SECONDS):
            producer, written = self._opened(), LOST
            while written == LOST:
                await producer.begin_transaction()
                self._in_transaction = True
                sent = await producer.send(self._partition.topic, None, NOBODY, partition=self._partition.partition)
                written = int((await sent).offset)
                await producer.commit_transaction()
                self._in_transaction = False
        return written + 1

    async def _write(self, changes: Changes, start: int) -> int:
        """One transaction of the changes from index `start` on; returns the index after its last."""
        producer = self._opened()
        topic, partition = self._partition
        now, size = round(time.time() * 1000), 0
        await producer.begin_transaction()
        self._in_transaction = True
        sent: list[asyncio.Future[Any]] = []
        batch = producer.create_batch()
        after = start
        try:
            for key, value in zip(changes.keys[start:], changes.values[start:], strict=True):
                if batch.append(timestamp=now, key=key, value=value) is None:
                    size += batch.size()
                    if size > TRANSACTION_BYTES:
                        break
                    sent.append(await producer.send_batch(batch, topic, partition=partition))
                    batch = producer.create_batch()
                    batch.append(timestamp=now, key=key, value=value)
                after += 1
            sent.append(await producer.send_batch(batch, topic, partition=partition))
            acknowledged = await asyncio.gather(*sent)
        except BaseException:
            _ignore(sent)
            raise
        # Returns only when the brokers confirmed the commit; it repeats a request that was not answered.
        await producer.commit_transaction()
        self._in_transaction = False
        self._advance(acknowledged[-1].offset, batch.record_count())
        return after

    def _advance(self, base: int, records: int) -> None:
        if base == LOST:
            return
        if base < self._end:
            raise ChangelogError(
                f"{self._shown} went back from offset {self._end} to {base}: the topic was made anew. "
                "Restart the workers, which recover from what it holds"
            )
        self._end = base + records

    async def _abort(self, producer: AIOKafkaProducer | None = None) -> None:
        """Spare readers the wait for the brokers' own time-out. If it fails, still nothing is committed."""
        if not self._in_transaction:
            return
        self._in_transaction = False
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await (producer or self._opened()).abort_transaction()
        except (TimeoutError, KafkaError, AssertionError) as error:
            logger.warning("%s: the brokers will abort the open transaction themselves: %r", self._shown, error)

    def _explained(self, error: BaseException) -> ChangelogError:
        if isinstance(error, ProducerFenced):
            return StaleOwnerError(
                f"{self._shown} is owned by another worker, which took it over while this one was away (or the brokers "
                f"ended a transaction older than {FLUSH_SECONDS:.0f} s); this worker writes nothing more to it"
            )
        if isinstance(error, MessageSizeTooLargeError | RecordListTooLargeError):
            return ChangelogError(
                f"topic {self._partition.topic} refuses a batch of up to {BATCH_BYTES} bytes: its setting "
                "max.message.bytes is too small; `personas doctor` says how to raise it"
            )
        if isinstance(error, TimeoutError):
            return ChangelogError(
                f"{self._shown}: not confirmed within {FLUSH_SECONDS:.0f} s, so it may or may not be written; "
                "check that the brokers run and that the topic exists"
            )
        return ChangelogError(f"{self._shown} refuses to be written: {error!r}")

    def _opened(self) -> AIOKafkaProducer:
        if self._producer is None:
            raise ChangelogError(f"{self._shown} is not open")
        return self._producer

    @property
    def _shown(self) -> str:
        return f"topic {self._partition.topic} partition {self._partition.partition}"


def _ignore_errors(producer: AIOKafkaProducer) -> None:
    """Look at the errors that aiokafka leaves in futures nobody awaits, now or later: a sender may outlive its stop."""
    batches = [batch for waiting in producer._message_accumulator._batches.values() for batch in waiting]
    ended = producer._txn_manager.wait_for_transaction_end()
    _ignore([batch._drain_waiter for batch in batches] + ([] if ended is None else [ended]))


def _ignore(futures: Iterable[asyncio.Future[Any]]) -> None:
    """Have asyncio not report those that end in an error."""
    for future in futures:
        future.add_done_callback(lambda done: done.cancelled() or done.exception())


def columns(records: Sequence[Any]) -> tuple[list[bytes], list[bytes | None]]:
    """Keys and values of consumed records, those of nobody left out."""
    about = [record for record in records if record.key != NOBODY]
    return [record.key for record in about], [record.value for record in about]
