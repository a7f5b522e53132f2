"""Plain reads of Kafka logs beside a consumer group: ends, committed offsets, one partition to its end.

Of transactions only committed ones are seen, and nothing behind one that is open.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    NotCoordinatorForGroupError,
)

from agents.kafka_admin import aiokafka_options
from agents.settings import Settings

COORDINATOR_ATTEMPTS: Final = 20
POLL_MS: Final = 500
STALLED_SECONDS: Final = 60.0


class LogStalledError(RuntimeError):
    """A log could not be read to its end; the message says where. Starting again is the remedy."""


class KafkaLog:
    """Reads topics without joining a group. Connects on first use; `close` when done. Topic names are unprefixed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._consumer: AIOKafkaConsumer | None = None
        self._connecting = asyncio.Lock()
        self._reading = asyncio.Lock()  # the one consumer reads one partition at a time

    async def end(self, topic: str, partition: int) -> int:
        """Offset that the next record of the partition will get."""
        tp = self._partition(topic, partition)
        return int((await (await self._connected()).end_offsets([tp]))[tp])

    async def beginning(self, topic: str, partition: int) -> int:
        """Offset of the first record that the partition still has."""
        tp = self._partition(topic, partition)
        return int((await (await self._connected()).beginning_offsets([tp]))[tp])

    async def committed(self, group: str, topic: str, partition: int) -> int:
        """First offset the group has not committed, or the log's beginning. `group` is the full name."""
        tp = self._partition(topic, partition)
        return max(await self._group_offset(group, tp), await self.beginning(topic, partition))

    async def lag(self, group: str, topic: str) -> int:
        """Records of the topic that the group has not committed, over all partitions. `group` is the full name."""
        left = 0
        for partition in range(self._settings.partitions):
            left += await self.end(topic, partition) - await self.committed(group, topic, partition)
        return left

    async def _group_offset(self, group: str, tp: TopicPartition) -> int:
        """The committed offset, -1 without one. A new cluster has no coordinator at once, so it is asked again."""
        admin = AIOKafkaAdminClient(**aiokafka_options(self._settings))
        await admin.start()
        try:
            for left in reversed(range(COORDINATOR_ATTEMPTS)):
                try:
                    offsets = await admin.list_consumer_group_offsets(group, partitions=[tp])
                    return int(offsets[tp].offset) if tp in offsets else -1
                except (GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError, GroupLoadInProgressError):
                    if not left:
                        raise
                    await asyncio.sleep(0.5)
        finally:
            await admin.close()
        raise AssertionError("the last attempt returns or raises")

    async def read(
        self, topic: str, partition: int, start: int | None = None, end: int | None = None
    ) -> AsyncIterator[Any]:
        """Every record at offsets start <= offset < end; None: from the beginning, to the end that the log has now."""
        tp = self._partition(topic, partition)
        consumer = await self._connected()
        async with self._reading:
            if end is None:
                end = int((await consumer.end_offsets([tp]))[tp])
            consumer.assign([tp])
            try:
                if start is None:
                    await consumer.seek_to_beginning(tp)
                else:
                    consumer.seek(tp, start)
                async for records in fetches(consumer, tp, end):
                    for record in records:
                        if record.offset < end:
                            yield record
            finally:
                consumer.unsubscribe()

    async def is_empty(self, topic: str, partition: int, start: int, end: int) -> bool:
        """Whether no record stands at offsets start <= offset < end: only gaps, as transaction markers leave them."""
        tp = self._partition(topic, partition)
        consumer = await self._connected()
        async with self._reading:
            consumer.assign([tp])
            try:
                consumer.seek(tp, start)
                async for records in fetches(consumer, tp, end):
                    for record in records:
                        return bool(record.offset >= end)
                return True
            finally:
                consumer.unsubscribe()

    async def close(self) -> None:
        """Disconnect."""
        if self._consumer is not None:
            await self._consumer.stop()

    async def _connected(self) -> AIOKafkaConsumer:
        async with self._connecting:
            if self._consumer is None:
                consumer = AIOKafkaConsumer(
                    **aiokafka_options(self._settings),
                    enable_auto_commit=False,
                    isolation_level="read_committed",
                    # Where what was asked for is deleted by now, what is left is read, not skipped.
                    auto_offset_reset="earliest",
                )
                await consumer.start()
                self._consumer = consumer
            return self._consumer

    def _partition(self, topic: str, partition: int) -> TopicPartition:
        return TopicPartition(self._settings.topic_prefix + topic, partition)


async def fetches(consumer: AIOKafkaConsumer, tp: TopicPartition, end: int) -> AsyncIterator[list[Any]]:
    """What the consumer fetches until its position is `end`. Raises LogStalledError where it does not get on."""
    position, moved = await consumer.position(tp), time.monotonic()
    while position < end:
        yield (await consumer.getmany(tp, timeout_ms=POLL_MS)).get(tp, [])
        reached = await consumer.position(tp)
        if reached > position:
            position, moved = reached, time.monotonic()
        elif time.monotonic() - moved > STALLED_SECONDS:
            raise LogStalledError(
                f"{tp.topic} partition {tp.partition}: the brokers gave nothing for {STALLED_SECONDS:.0f} s at offset "
                f"{position} of {end}"
            )
