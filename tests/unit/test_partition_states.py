"""The states of a partition as they age, in a worker that is never restarted."""

from __future__ import annotations

from typing import Any, cast

from agents.changelog import Apply, Bounds
from agents.partition import PartitionStates, Place
from agents.settings import Settings
from streams.ageing import FORGET_DAYS, IDLE_DAYS, LATENESS_DAYS, prune
from streams.state import LONGEST_STUB
from streams.state_table import StateTable
from streams.topics import DAY_MS
from tests.builders import START, make_configuration, make_registry

SETTLED = 1_000


async def test_a_viewer_who_was_shrunk_is_forgotten_in_time() -> None:
    states = PartitionStates(Settings(), Place(0, "watch", "changelog", None), make_configuration(make_registry()))
    for key, last in ((b"ann", 0), (b"bob", IDLE_DAYS + LATENESS_DAYS + 1)):
        state = states.table.state(key)
        state["last_ts"], state["sequence"], state["watch_offset"] = START + last * DAY_MS, 3, 5
        state["cluster"][0] = 7

    async def free() -> list[bytes | None]:
        await states.find_aged(states.newest_event(), SETTLED)
        return [output.key for output in states.free_aged(states.newest_event(), SETTLED)]

    assert await free() == []
    assert dict(states.table.packed()).keys() == {b"ann"}, "a stub by now"
    assert await free() == []
    states.table.state(b"bob")["last_ts"] += FORGET_DAYS * DAY_MS
    assert await free() == [b"ann"]
    assert states.table.keys() == [b"bob"]


class Log:
    """A changelog that holds these values."""

    failed = False

    def __init__(self, held: dict[bytes, bytes]) -> None:
        self._held = held

    async def open(self) -> Bounds:
        return Bounds(0, len(self._held))

    async def recover(self, apply: Apply, start: int | None) -> int:
        apply(list(self._held), list(self._held.values()), len(self._held))
        return len(self._held)


async def test_stubs_that_were_recovered_stay_packed() -> None:
    table = StateTable()
    for key in (b"ann", b"bob"):
        table.state(key)["last_ts"] = START
        table.state(key)["cluster"][:] = 7
        table.state(key)["long"][:] = 1.5
        table.state(key)["short"][:] = 0.5
        table.state(key)["sequence"] = 3
    table.state(b"ann")[...] = prune(table.state(b"ann"))
    held = {key: table.get(key) or b"" for key in (b"ann", b"bob")}
    assert len(held[b"ann"]) <= LONGEST_STUB < len(held[b"bob"])
    states = PartitionStates(Settings(), Place(0, "watch", "changelog", None), make_configuration(make_registry()))
    states._changelog = cast(Any, Log(held))
    await states.open(None, lambda offset: None)
    while states.unpack_some():
        pass
    assert dict(states.table.packed()) == {b"ann": held[b"ann"]}
