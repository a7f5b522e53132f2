"""A limit on dead letters: a worker that cannot use what it reads should stop, not fill a topic with it."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Final

WINDOW_SECONDS: Final = 60.0
STEP_SECONDS: Final = 1.0
"""Letters of one second are counted together, so that the window holds at most this many entries for each second."""
NAMED_REASONS: Final = 3


class FuseBlown(RuntimeError):  # noqa: N818 - a state of the input
    """More dead letters came from a topic within a minute than are allowed; the message says what to do."""


class DeadLetterFuse:
    """Counts one topic's dead letters over the last 60 seconds, and blows when they are too many."""

    def __init__(self, topic: str, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`topic` as in Kafka, for the message; `per_minute`: how many are allowed, 0 any number; `clock`: seconds."""
        self._topic = topic
        self._per_minute = per_minute
        self._clock = clock
        self._window: deque[tuple[float, Counter[str]]] = deque()
        self._counts: Counter[str] = Counter()

    def add(self, reasons: Mapping[str, int], partition: int, offset: int) -> None:
        """Count the dead letters, by reason, of a batch that begins at this place of the topic.

        Call it before anything of the batch is written or committed: then what blew the fuse is read again after a
        restart. Raises FuseBlown past the limit, and again at every call while the minute is not over.
        """
        if self._per_minute <= 0 or not any(reasons.values()):
            return
        now = self._clock()
        self._forget(now - WINDOW_SECONDS)
        if not self._window or now - self._window[-1][0] >= STEP_SECONDS:
            self._window.append((now, Counter()))
        self._window[-1][1].update(reasons)
        self._counts.update(reasons)
        if self._counts.total() > self._per_minute:
            raise FuseBlown(self._message(partition, offset))

    def _forget(self, before: float) -> None:
        while self._window and self._window[0][0] <= before:
            self._counts.subtract(self._window.popleft()[1])

    def _message(self, partition: int, offset: int) -> str:
        total = self._counts.total()
        most = ", ".join(f"{reason} {count}" for reason, count in self._counts.most_common(NAMED_REASONS))
        return (
            f"{total} records of {self._topic} could not be used in the last minute, at most {self._per_minute} may be "
            f"({most}; some are in the batch from partition {partition}, offset {offset} on). The worker stops before "
            "it commits past them. See `personas dlq list` and `personas doctor`; mend the producer, the field mapping "
            "or the decoder, or raise PERSONAS_DEAD_LETTERS_PER_MINUTE (0: no limit) to let them become dead letters"
        )
