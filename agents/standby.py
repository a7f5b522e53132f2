"""A standby: keeps the disk stores of partitions that another worker owns as warm as the changelog allows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from agents.changelog import ChangelogError, bounds_of, changelog_consumer, columns
from agents.disk_store import DiskStore
from agents.kafka_admin import prefixed
from agents.settings import Settings
from streams import topics

POLL_MS: Final = 200
CHUNK_RECORDS: Final = 1000
"""Records written at a time, so that other tasks of the worker get their turn."""

HighestWatchOffset = Callable[[Sequence[bytes | None]], int]
"""Highest offset of the present watch topic by which any of these stored values was changed; -1: none."""

logger = logging.getLogger(__name__)


class Standby:
    """Follows the changelog partitions that this worker shadows, each into its own disk store.

    `run` does the work until `close`; an error ends it and must end the worker. All else may be called meanwhile.
    """

    def __init__(
        self,
        settings: Settings,
        folder_of: Callable[[int], Path],
        changelog_id: str,
        watch_id: str,
        highest_watch_offset: HighestWatchOffset,
    ) -> None:
        """`folder_of` gives a partition's store folder; the ids are Kafka's of the changelog and of the watch topic."""
        self._consumer: AIOKafkaConsumer = changelog_consumer(settings)
        self._topic = prefixed(settings, topics.INTERESTS_CHANGELOG)
        self._folder_of = folder_of
        self._changelog_id = changelog_id
        self._watch_id = watch_id
        self._highest_watch_offset = highest_watch_offset
        self._stores: dict[int, DiskStore] = {}
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._stopping = False

    @property
    def partitions(self) -> frozenset[int]:
        """Partitions that are followed."""
        return frozenset(self._stores)

    async def start(self) -> None:
        """Connect. Raises ChangelogError."""
        try:
            await self._consumer.start()
        except KafkaError as error:
            raise self._unreadable(error) from error
        await asyncio.sleep(0)  # aiokafka cannot stop before a task that it has just created has run once

    async def assign(self, partitions: Iterable[int]) -> None:
        """Follow exactly these from now on; the stores of others are closed. Raises ChangelogError and StoreError."""
        wanted = set(partitions)
        async with self._lock:
            if wanted == self._stores.keys():
                return  # to assign anew would throw away what was fetched
            for partition in self._stores.keys() - wanted:
                self._stores.pop(partition).close()
            for partition in sorted(wanted - self._stores.keys()):
                await self._follow(partition)
            self._subscribe()

    async def release(self, partition: int) -> None:
        """Follow a partition no more; its store is closed, so that the owner can open it."""
        async with self._lock:
            store = self._stores.pop(partition, None)
            if store is not None:
                store.close()
                self._subscribe()

    async def lag(self) -> dict[int, int]:
        """Committed changelog offsets that each followed store does not have yet. Raises ChangelogError."""
        async with self._lock:
            followed = [self._partition(number) for number in self._stores]
            if not followed:
                return {}
            try:
                ends = await self._consumer.end_offsets(followed)
                # Not the stores' own offsets: those do not count the markers that end transactions.
                return {tp.partition: int(ends[tp]) - int(await self._consumer.position(tp)) for tp in followed}
            except KafkaError as error:
                raise self._unreadable(error) from error

    async def run(self) -> None:
        """Copy what is committed until `close`. Raises ChangelogError and StoreError."""
        while not self._stopping:
            if not self._stores:
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._copy()

    async def close(self) -> None:
        """End `run`, close the stores and disconnect."""
        self._stopping = True
        self._wake.set()
        async with self._lock:
            for store in self._stores.values():
                store.close()
            self._stores.clear()
            await self._consumer.stop()

    async def _copy(self) -> None:
        # Short polls under the lock: a store is never written while it is released.
        async with self._lock:
            if self._stopping or not self._stores:
                return
            try:
                found = await self._consumer.getmany(timeout_ms=POLL_MS, max_records=CHUNK_RECORDS)
                for tp, records in found.items():
                    self._write(tp, records, await self._consumer.position(tp))
            except KafkaError as error:
                raise self._unreadable(error) from error
        await asyncio.sleep(0)

    def _write(self, tp: TopicPartition, records: Sequence[Any], next_offset: int) -> None:
        keys, values = columns(records)
        self._stores[tp.partition].write(keys, values, next_offset, self._highest_watch_offset(values))

    async def _follow(self, partition: int) -> None:
        try:
            bounds = await bounds_of(self._consumer, self._partition(partition))
        except KafkaError as error:
            raise self._unreadable(error) from error
        store = DiskStore.open(self._folder_of(partition), self._changelog_id, self._watch_id, bounds)
        if store.offset is None:
            store.write([], [], bounds.beginning, -1)
        self._stores[partition] = store
        logger.info("standby of partition %d from changelog offset %d of %d", partition, store.offset, bounds.end)

    def _subscribe(self) -> None:
        """Read each followed partition from where its store ends."""
        if not self._stores:
            self._consumer.unsubscribe()
            return
        self._consumer.assign([self._partition(partition) for partition in self._stores])
        for partition, store in self._stores.items():
            self._consumer.seek(self._partition(partition), store.offset or 0)
        self._wake.set()

    def _partition(self, number: int) -> TopicPartition:
        return TopicPartition(self._topic, number)

    def _unreadable(self, error: KafkaError) -> ChangelogError:
        return ChangelogError(f"the standby cannot read topic {self._topic}: {error!r}")
