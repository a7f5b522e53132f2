"""The states of one owned watch partition: recovered when it is assigned, written as they change, freed as they age."""

from __future__ import annotations

import asyncio
import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

from agents.changelog import PartitionChangelog
from agents.disk_store import DiskStore, MemoryStore, StateStore
from agents.settings import Settings
from streams import topics
from streams.ageing import free, sweep
from streams.state import LONGEST_STUB, from_values
from streams.state_table import Changes, StateTable
from streams.watch import Output, WatchConfiguration, highest_marker_among

EXAMINED: Final = 2000
"""Stored states looked at together when those that aged are searched."""
UNPACKED: Final = 256
"""Viewers unpacked together: events wait for about 3 ms."""
GIVEN_BACK: Final = 10_000
"""After so many, the memory of the values that were unpacked goes back to the system."""
EXPIRED: Final = (("reason", b"expired"),)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """What tells one life of a partition's topics from another, and where its disk store is. Ids are Kafka's."""

    partition: int
    watch_id: str
    changelog_id: str
    folder: Path | None  # None: in memory alone


@dataclass(frozen=True, slots=True)
class Kept:
    """The states of a partition that was given up, complete to a changelog offset: for the case that it comes back.

    highest_watch_offset: of the states, -1: none.
    """

    table: StateTable
    offset: int
    highest_watch_offset: int


class PartitionStates:
    """The states of one owned partition, and how they are made durable. `open` it, `close` it when it moves away."""

    def __init__(self, settings: Settings, place: Place, configuration: WatchConfiguration) -> None:
        self._place = place
        self._pack = configuration.kernel.pack
        self._topic_id = configuration.topic_id
        self._changelog = PartitionChangelog(settings, place.partition)
        self._store: StateStore = MemoryStore()
        self._forget_days = configuration.policy.forget_days
        self._closed = False
        self._recovered: list[bytes] = []  # not unpacked yet, the next one last
        self.table = StateTable(self._store.get, self._pack)

    async def open(self, kept: Kept | None, recovering: Callable[[int], None]) -> None:
        """Fence the last owner and bring the states up to date. `recovering` is told each changelog offset reached.

        Raises ChangelogError and StoreError.
        """
        bounds = await self._changelog.open()
        if self._place.folder is not None:
            self._store = DiskStore.open(self._place.folder, self._place.changelog_id, self._place.watch_id, bounds)
        self.table = StateTable(self._store.get, self._pack)
        start = self._store.offset
        in_memory = self._place.folder is None
        if kept is not None and in_memory and bounds.beginning <= kept.offset <= bounds.end:
            self.table, start = kept.table, kept.offset
            self._store.write([], [], start, kept.highest_watch_offset)

        def apply(keys: Sequence[bytes], values: Sequence[bytes | None], next_offset: int) -> None:
            if in_memory:
                self.table.put(keys, values)
            highest = highest_marker_among(values, self._topic_id, self._place.partition)
            self._store.write(keys, values, next_offset, highest)
            recovering(next_offset)

        end = await self._changelog.recover(apply, start)
        self._store.write([], [], end, -1)
        self._recovered = [key for key, value in self.table.packed() if len(value) > LONGEST_STUB][::-1]
        _give_back_memory()

    def unpack_some(self) -> bool:
        """Unpack a few of the viewers recovered, stubs apart; returns whether there were any.

        In the order in which they came: their events would leave holes between the others' values, which no one can
        use. It takes a state three times as long as recovery does, most of it for memory that was not in use yet.
        """
        left = self._recovered
        if not left:
            return False
        some = left[-UNPACKED:]
        del left[-UNPACKED:]
        self.table.rows([key for key in some if key in self.table])
        if len(left) % GIVEN_BACK < UNPACKED:
            _give_back_memory()
        if not left:
            logger.info("watch partition %d: all viewers recovered are unpacked", self._place.partition)
        return True

    async def confirm(self) -> None:
        """Show that nobody has opened the partition since `open`. Raises StaleOwnerError, ChangelogError."""
        await self._changelog.confirm()

    @property
    def highest_watch_offset(self) -> int:
        """Highest offset of the watch partition that is in a state; -1: none."""
        return self._store.highest_watch_offset

    def stored(self) -> Iterator[tuple[bytes, bytes]]:
        """Viewers, as stored, whom memory does not hold."""
        return filter(lambda item: item[0] not in self.table, self._store.items())

    async def write(self, changes: Changes, next_offset: int) -> None:
        """The changelog, and after its transaction the store. next_offset: first one of the input that is not in them.

        Raises ChangelogError, StoreError.
        """
        end = await self._changelog.flush(changes)
        await asyncio.to_thread(self._store.write, changes.keys, changes.values, end, next_offset - 1)

    async def record(self, topic: str, value: bytes) -> int:
        """Write to the partition's place in another topic as its owner; returns the offset. Raises ChangelogError."""
        return await self._changelog.record(topic, value)

    async def close(self) -> Kept | None:
        """Let go of the partition; gives what memory holds, if all of it is written."""
        self._closed = True
        await self._changelog.close()
        self._store.close()
        unwritten = self._changelog.failed or self.table.changed > 0
        if unwritten or self._place.folder is not None or self._store.offset is None:
            return None
        return Kept(self.table, self._store.offset, self._store.highest_watch_offset)

    # Ageing

    def newest_event(self) -> int:
        """Time of the newest event of any viewer who is unpacked, ms; 0: none."""
        return int(self.table.states["last_ts"].max(initial=0))

    async def find_aged(self, clock: int, settled_offset: int) -> None:
        """Unpack stored viewers of whom something can be freed, for `free_aged`; events go on meanwhile.

        clock: newest event time of the partition, ms; settled_offset: see `streams.ageing.sweep`.
        """
        batch: list[tuple[bytes, bytes]] = []
        for item in chain(self.table.packed(), self.stored()):
            batch.append(item)
            if len(batch) == EXAMINED:
                self._take_aged(batch, clock, settled_offset)
                batch = []
                await asyncio.sleep(0)
                if self._closed:
                    return
        self._take_aged(batch, clock, settled_offset)

    def _take_aged(self, items: Sequence[tuple[bytes, bytes]], clock: int, settled_offset: int) -> None:
        found = sweep(from_values([value for _, value in items]), clock, settled_offset, self._forget_days)
        self.table.rows([items[i][0] for i in (*found.stubs.tolist(), *found.gone.tolist())])

    def free_aged(self, clock: int, settled_offset: int) -> list[Output]:
        """Prune the viewers in memory who were away for long, remove those who stayed away; returns what to tell."""
        told = free(self.table, clock, settled_offset, self._forget_days)
        # The topic keeps a persona for ever, unlike the store, where it expires.
        return [Output(topics.PERSONAS, key, None, EXPIRED, partition=self._place.partition) for key in told]


def _give_back_memory() -> None:
    """Return to the system what fetching and unpacking used: glibc keeps it, some hundred bytes a viewer."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
