"""State that ages: a viewer who was away for long starts anew, and one who stays away is forgotten.

The rule is the viewer's own event time. An event more than IDLE_DAYS after the viewer's newest one finds nothing
counted: what is left is a stub of epoch, sequence, markers, audience and controls. `forget_days` later the viewer is
wholly new, unless a control of theirs still holds.

`aged` applies the rule at each touch, so storage need not: `sweep` names what it can free meanwhile, at any moment or
never, and the results are the same. That holds for every record less than LATENESS_DAYS behind the newest of its
partition; a viewer whose records come later than that may already have been swept, and then starts anew.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from streams.state import BOOTSTRAPPED, EMPTY, OPTED_OUT, STATE, STUB_BYTES, State, new_state
from streams.state_table import StateTable
from streams.topics import DAY_MS

IDLE_DAYS: Final = 400
"""Longer than a year, so that a viewer of one season is known in the next."""
FORGET_DAYS: Final = 120
"""Time to live of a persona (90 days) and retention of the source topics (28), rounded up."""
LATENESS_DAYS: Final = 30
"""How far behind its partition's newest event a record may be: as far as behind its viewer's own (streams/watch.py)."""

KEPT: Final = tuple(
    name for name in STATE.names or () if STATE.fields is not None and STATE.fields[name][1] < STUB_BYTES
)
"""Fields of a stub: the first ones of the record."""


class Stage(IntEnum):
    """What of a viewer's state is still good at a time."""

    FRESH = 0  # all of it
    IDLE = 1  # only what a stub holds
    GONE = 2  # nothing: as a viewer never seen


class Sweep(NamedTuple):
    """Rows to replace by their stub, and rows to remove; each ascending, without a row in common."""

    stubs: npt.NDArray[np.intp]
    gone: npt.NDArray[np.intp]


def aged(state: State | np.void, ts: int, forget_days: int = FORGET_DAYS) -> Stage:
    """Stage of a stored state at an event or control of time `ts` (ms). A state without any event does not age."""
    last = int(state["last_ts"])
    away = ts - last
    if last == 0 or away <= IDLE_DAYS * DAY_MS:
        return Stage.FRESH
    if away <= (IDLE_DAYS + forget_days) * DAY_MS or _holds_control(state):
        return Stage.IDLE
    return Stage.GONE


def prune(state: State | np.void) -> State:
    """The stub of a state: its first fields, and nothing of what was watched. A stub stays as it is."""
    stub = new_state()
    for name in KEPT:
        stub[name] = state[name]
    return stub


def idle_before(clock_ms: int) -> int:
    """Viewers of a partition whose newest event is older than this, ms, can be freed. clock_ms: see `sweep`."""
    return clock_ms - (IDLE_DAYS + LATENESS_DAYS) * DAY_MS


def sweep(states: npt.NDArray[np.void], clock_ms: int, settled_offset: int, forget_days: int = FORGET_DAYS) -> Sweep:
    """What can be freed among the states (n,) of one watch partition.

    `clock_ms`: newest event time of the partition, or earlier. `settled_offset`: input records before this offset are
    never read again; a removed viewer has no marker that could skip them. Viewers whose history is being loaded stay.
    """
    last = states["last_ts"]
    before = idle_before(clock_ms)
    idle = np.flatnonzero((last != 0) & (last < before) & (states["flags"] & BOOTSTRAPPED == 0))
    rows = states[idle]  # few, so that what follows is cheap
    held = (rows["flags"] & OPTED_OUT != 0) | _listed(rows["hidden"]) | _listed(rows["pinned"])
    gone = ~held & (rows["last_ts"] < before - forget_days * DAY_MS) & (rows["watch_offset"] < settled_offset)
    stubs = ~gone & ~_are_stubs(rows)
    return Sweep(idle[stubs], idle[gone])


def free(table: StateTable, clock_ms: int, settled_offset: int, forget_days: int = FORGET_DAYS) -> list[bytes]:
    """Hold viewers of the table's rows who were away for long as stubs, remove those who stayed away.

    Both are marked as changed. Gives the keys of the removed ones of whom a persona was asked for. Arguments: `sweep`.
    """
    found = sweep(table.states, clock_ms, settled_offset, forget_days)
    stubs, gone = table.keys_of(found.stubs.tolist()), table.keys_of(found.gone.tolist())
    for key in stubs:
        state = table.state(key)
        state[...] = prune(state)
        table.mark([key])
        table.shrink(key)
    told = [key for key in gone if table.state(key)["sequence"]]
    for key in gone:
        table.remove(key)
    return told


def _holds_control(state: State | np.void) -> bool:
    return bool(int(state["flags"]) & OPTED_OUT or (state["hidden"] != EMPTY).any() or (state["pinned"] != EMPTY).any())


def _listed(ids: Any) -> npt.NDArray[np.bool_]:  # noqa: ANN401
    listed: npt.NDArray[np.bool_] = (ids != EMPTY).any(axis=1)
    return listed


def _are_stubs(rows: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    rest = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), STATE.itemsize)[:, STUB_BYTES:]
    empty = np.frombuffer(new_state().tobytes(), np.uint8)[STUB_BYTES:]
    found: npt.NDArray[np.bool_] = (rest == empty).all(axis=1)
    return found
