"""The states of a partition as they age, in a worker that is never restarted."""

from __future__ import annotations

from agents.partition import PartitionStates, Place
from agents.settings import Settings
from streams.ageing import FORGET_DAYS, IDLE_DAYS, LATENESS_DAYS
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
