"""Whether a worker gets on: events that wait while nothing is applied mean that it should be restarted.

Waiting by design is not held against it. State being read back counts as getting on while it moves. Time in which the
lag cannot be measured does not count: Kafka does not answer then, or the whole process stood still. Partitions that
are being moved belong to nobody.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from aiokafka.errors import KafkaError

MEASUREMENTS: Final = 6
"""The lag is measured this many times while patience lasts, but at least every LONGEST_PAUSE seconds."""
LONGEST_PAUSE: Final = 5.0
ANSWER_SECONDS: Final = 5.0

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Partition:
    """waited: seconds of measured waiting since something moved; measured: time of the last measurement."""

    measured: float
    waited: float = 0.0
    position: int = -1
    reading: bool = False


class Progress:
    """What is known of one topic's partitions that this worker owns: what waits, and since when nothing moved."""

    def __init__(self, topic: str, stalled_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`topic` for the message; `stalled_seconds`: patience, 0 for ever; `clock`: monotonic seconds."""
        self._topic = topic
        self._patience = stalled_seconds
        self._clock = clock
        self._partitions: dict[int, _Partition] = {}

    @property
    def partitions(self) -> list[int]:
        """The partitions that are watched."""
        return sorted(self._partitions)

    @property
    def pause(self) -> float:
        """Seconds from one measurement of the lag to the next."""
        return min(self._patience / MEASUREMENTS, LONGEST_PAUSE) if self._patience > 0 else LONGEST_PAUSE

    def assigned(self, partitions: Iterable[int]) -> None:
        """Watch these partitions from now on, and no others. Every one of them starts with full patience."""
        now = self._clock()
        self._partitions = {partition: _Partition(now) for partition in partitions}

    def applied(self, partition: int, count: int) -> None:
        """So many records of the partition were handled."""
        found = self._partitions.get(partition)
        if found is not None and count > 0:
            found.waited, found.reading = 0.0, False

    def recovering(self, partition: int, position: int) -> None:
        """The partition's state is being read back and has come to `position`; only movement counts."""
        found = self._partitions.get(partition)
        if found is None:
            return
        found.reading = True
        if position != found.position:
            found.position, found.waited = position, 0.0

    def lag(self, partition: int, count: int | None) -> None:
        """A measurement: so many records wait. None: the partition is not open yet, so it waits itself."""
        found = self._partitions.get(partition)
        if found is None:
            return
        now = self._clock()
        # A long gap between measurements was no waiting: nobody could have looked, or nothing ran.
        elapsed = min(now - found.measured, 2 * self.pause)
        found.measured = now
        found.reading = found.reading and count is None
        found.waited = 0.0 if count == 0 else found.waited + elapsed

    def waits_long(self, partition: int) -> bool:
        """Whether more than half of the patience is used up."""
        found = self._partitions.get(partition)
        return found is not None and self._patience > 0 and found.waited > self._patience / 2

    def stalled(self) -> str | None:
        """What stands still and for how long; None while the worker gets on."""
        if self._patience <= 0:
            return None
        for number, found in sorted(self._partitions.items()):
            if found.waited >= self._patience:
                what = "its state was being read back" if found.reading else "events wait"
                return (
                    f"{self._topic} partition {number}: {what} and nothing moved for {found.waited:.0f} s "
                    f"(PERSONAS_STALLED_SECONDS={self._patience:g})"
                )
        return None


class Log(Protocol):
    """What is asked of the log. Topic names are unprefixed."""

    async def end(self, topic: str, partition: int) -> int:
        """Offset that the next record of the partition will get."""

    async def is_empty(self, topic: str, partition: int, start: int, end: int) -> bool:
        """Whether no record stands at offsets start <= offset < end."""


async def measure(progress: Progress, log: Log, topic: str, next_offset: Callable[[int], int | None]) -> None:
    """Measure the lag of every partition once. `next_offset`: first offset not yet handled, None: not open yet.

    What the brokers do not answer in time is left out.
    """
    for partition in progress.partitions:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                progress.lag(partition, await _lag(progress, log, topic, partition, next_offset))
        except (KafkaError, TimeoutError, OSError) as error:
            logger.debug("lag of %s partition %d is not known: %r", topic, partition, error)


async def _lag(
    progress: Progress, log: Log, topic: str, partition: int, next_offset: Callable[[int], int | None]
) -> int | None:
    end = await log.end(topic, partition)
    reached = next_offset(partition)
    if reached is None:
        return None
    lag = max(0, end - reached)
    # Behind the last record there may be offsets without one, such as a transaction's marker.
    if lag and progress.waits_long(partition) and await log.is_empty(topic, partition, reached, end):
        return 0
    return lag
