"""The states of one partition's viewers: rows of one contiguous array, and an index from key to row.

The handler changes rows in place and marks them; `take_changed` hands over copies for the changelog. Viewers who were
recovered and not asked for yet, or were away for long, are held as their stored values. What memory does not hold at
all is asked of `load`, a store on disk for example.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from streams.packing import Pack
from streams.state import EMPTY_WORDS, STATE, WORD, WORDS, State, from_values, pack

FIRST_ROWS: Final = 1024
GROWTH: Final = 1.25
AT_ONCE: Final = 64
"""States packed or unpacked together: few enough to stay in the processor's cache."""

Load = Callable[[bytes], bytes | None]
"""Stored value of a key, None if there is none."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Copies of changed states, in the order in which their viewers were first changed.

    keys: UTF-8 of user ids; values: their stored values; None: the viewer was removed.
    """

    keys: Sequence[bytes]
    values: Sequence[bytes | None]

    def __len__(self) -> int:
        return len(self.keys)


def nothing(key: bytes) -> bytes | None:
    """A store that holds nothing."""
    return None


class StateTable:
    """Rows by key. `states`, (capacity,) STATE, is replaced when the table grows: hold no view of it across a call."""

    def __init__(self, load: Load = nothing, pack: Pack = pack) -> None:
        """`load` gives stored values of keys that are not in memory; `pack` makes them, plain or compiled."""
        self._load = load
        self._pack = pack
        # Pages of private memory are there once they are written to, and grow without a copy.
        self._memory = mmap.mmap(-1, FIRST_ROWS * STATE.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map()
        self._rows: dict[bytes, int] = {}
        self._free: list[int] = []
        self._packed: dict[bytes, bytes] = {}
        self._changed: dict[bytes, None] = {}

    def __len__(self) -> int:
        """Viewers in memory."""
        return len(self._rows) + len(self._packed)

    def __contains__(self, key: bytes) -> bool:
        """Whether the viewer is in memory."""
        return key in self._rows or key in self._packed

    def keys(self) -> Sequence[bytes]:
        """Keys of the viewers in memory."""
        return [*self._rows, *self._packed]

    def keys_of(self, rows: Iterable[int]) -> list[bytes]:
        """Keys of the viewers in these rows."""
        wanted = set(rows)
        return [key for key, row in self._rows.items() if row in wanted] if wanted else []

    def rows(self, keys: Sequence[bytes]) -> list[int]:
        """Rows of viewers, loaded where memory does not hold them, new where nothing does.

        Raises StateError for a stored value that cannot be read.
        """
        find = self._rows.get
        rows = [find(key, -1) for key in keys]
        if -1 in rows:
            self._bring(dict.fromkeys([key for key, row in zip(keys, rows, strict=True) if row < 0]))
            rows = [self._rows[key] for key in keys]
        return rows

    def _bring(self, keys: Iterable[bytes]) -> None:
        """Load viewers that are not in rows, or begin them anew."""
        stored = {key: self._packed.get(key) or self._load(key) for key in keys}
        new = [self._place(key) for key, value in stored.items() if value is None]
        self._words[new] = EMPTY_WORDS
        held = [(key, value) for key, value in stored.items() if value is not None]
        for start in range(0, len(held), AT_ONCE):
            part = held[start : start + AT_ONCE]
            states = from_values([value for _, value in part])
            rows = [self._place(key) for key, _ in part]  # may replace the array
            self.states[rows] = states

    def state(self, key: bytes) -> State:
        """A viewer's state as a writable view, loaded or new if need be. Raises StateError as `rows` does."""
        (row,) = self.rows([key])
        return self.view(row)

    def view(self, row: int) -> State:
        """The state in a row as a writable 0-dimensional view."""
        return self.states[row : row + 1].reshape(())

    def get(self, key: bytes) -> bytes | None:
        """A viewer's state as it would be stored, in memory or in the store; None if nobody holds one."""
        row = self._rows.get(key)
        if row is not None:
            return self._stored([row])[0]
        return self._packed.get(key) or self._load(key)

    def put(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> None:
        """Take over stored values as they were recovered, not marked as changed; None removes, the last one counts.

        They stay as they are until they are asked for.
        """
        newest = dict(zip(keys, values, strict=True))
        for key in newest.keys() & self._rows.keys():
            self.forget(key)
        for key, value in newest.items():
            if value is None:
                self._packed.pop(key, None)
            else:
                self._packed[key] = value

    def mark(self, keys: Iterable[bytes]) -> None:
        """Mark viewers as changed."""
        self._changed.update(dict.fromkeys(keys))

    def remove(self, key: bytes) -> None:
        """Remove a viewer, marked as changed."""
        self.forget(key)
        self._changed[key] = None

    def forget(self, key: bytes) -> None:
        """Drop a viewer from memory alone."""
        self._packed.pop(key, None)
        row = self._rows.pop(key, None)
        if row is not None:
            self._words[row] = EMPTY_WORDS
            self._free.append(row)

    def packed(self) -> Iterator[tuple[bytes, bytes]]:
        """Viewers who are held as their stored values; they may come and go meanwhile."""
        for key in list(self._packed):
            value = self._packed.get(key)
            if value is not None:
                yield key, value

    def shrink(self, key: bytes) -> None:
        """Hold a viewer who is not expected soon as their stored value: little, if they are a stub."""
        (value,) = self._stored([self._rows[key]])
        self.forget(key)
        self._packed[key] = value

    @property
    def changed(self) -> int:
        """Number of viewers that are marked as changed."""
        return len(self._changed)

    def take_changed(self) -> Changes:
        """Copies of what changed since the last call."""
        keys = list(self._changed)
        self._changed = {}
        rows = [self._rows.get(key, -1) for key in keys]
        stored = iter(self._stored([row for row in rows if row >= 0]))
        return Changes(
            keys, [self._packed.get(key) if row < 0 else next(stored) for key, row in zip(keys, rows, strict=True)]
        )

    def _stored(self, rows: Sequence[int]) -> list[bytes]:
        values: list[bytes] = []
        for start in range(0, len(rows), AT_ONCE):
            values += self._pack(self._words[rows[start : start + AT_ONCE]])
        return values

    def _place(self, key: bytes) -> int:
        """The key's row, which may be a new one."""
        self._packed.pop(key, None)
        row = self._rows.get(key)
        if row is None:
            row = self._free.pop() if self._free else len(self._rows)
            if row >= len(self.states):
                self._grow()
            self._rows[key] = row
        return row

    def _grow(self) -> None:
        size = int(len(self.states) * GROWTH) * STATE.itemsize
        del self.states, self._words
        self._memory.resize(size)
        self._map()

    def _map(self) -> None:
        self.states: npt.NDArray[np.void] = np.frombuffer(self._memory, dtype=STATE)
        self._words = self.states.view(WORD).reshape(len(self.states), WORDS)
