"""The viewers of a partition whose history was being loaded, found little by little: it may hold millions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Final

from streams.state import BOOTSTRAPPED, from_values
from streams.state_table import StateTable

EXAMINED: Final = 2000
"""Stored values looked at in one step."""
ENDED: Final = 1000
"""Viewers given in one step, whose requests are in memory together."""


def loaded_viewers(table: StateTable, stored: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[int, list[bytes]]]:
    """Steps of (time of the partition's newest event, keys): no keys while values are searched, then all in order.

    stored: viewers whom the table's memory does not hold. Between two steps the table may unpack viewers, and what is
    done with those that were given.
    """
    newest, found = 0, set[bytes]()
    values: list[tuple[bytes, bytes]] = []
    for item in chain(stored, table.packed(), [None]):
        if item is not None:
            values.append(item)
        if len(values) == EXAMINED or (item is None and values):
            states = from_values([value for _, value in values])
            newest = max(newest, int(states["last_ts"].max()))
            found.update(values[i][0] for i in (states["flags"] & BOOTSTRAPPED).nonzero()[0].tolist())
            values = []
            yield newest, []
    # Rows come last and in one step: a viewer who was unpacked meanwhile is among them.
    newest = max(newest, int(table.states["last_ts"].max(initial=0)))
    found.update(table.keys_of((table.states["flags"] & BOOTSTRAPPED).nonzero()[0].tolist()))
    keys = sorted(found)
    for start in range(0, len(keys), ENDED):
        yield newest, keys[start : start + ENDED]
