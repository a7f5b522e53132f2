"""What the watch app does with the records that Faust hands over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from agents.watch_app import WatchApp
from streams.watch import InputRecord


class Log:
    """A partition whose offset 6 is a transaction marker."""

    async def read(self, topic: str, partition: int, start: int, end: int) -> AsyncIterator[Any]:
        for offset in range(start, end):
            if offset != 6:
                yield SimpleNamespace(offset=offset, key=b"k", value=b"log", timestamp=offset, headers=(("h", None),))


async def complete(offsets: list[int], expected: int) -> list[tuple[int, bytes | None]]:
    app = object.__new__(WatchApp)
    app._log, app._next_offsets = Log(), {0: expected}  # type: ignore[assignment]
    records = [InputRecord(offset, b"k", b"faust", offset) for offset in offsets]
    return [(record.offset, record.value) for record in await app._without_gaps(0, records)]


async def test_records_that_the_consumer_left_out_are_read_from_the_log() -> None:
    assert await complete([4, 7, 8], 3) == [(3, b"log"), (4, b"faust"), (5, b"log"), (7, b"faust"), (8, b"faust")]


async def test_repeats_and_unbroken_runs_need_no_reading() -> None:
    assert await complete([1, 2, 3, 4], 3) == [(n, b"faust") for n in (1, 2, 3, 4)]
