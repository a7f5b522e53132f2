"""Rows, loads, marks and copies of the table of states."""

from __future__ import annotations

import numpy as np
import pytest

from streams.state import STATE, StateError, from_bytes, new_state, to_bytes
from streams.state_table import FIRST_ROWS, Changes, StateTable


def state_of(events: int) -> bytes:
    state = new_state()
    state["events"] = events
    return to_bytes(state)


def keys(count: int) -> list[bytes]:
    return [f"viewer-{i}".encode() for i in range(count)]


def test_a_table_grows_without_losing_a_row() -> None:
    table, many = StateTable(), keys(5 * FIRST_ROWS)
    for start in range(0, len(many), 700):
        rows = table.rows(many[start : start + 700])
        table.states["events"][rows] = np.arange(start, start + len(rows)) + 1
    assert table.states["events"][table.rows(many)].tolist() == list(range(1, len(many) + 1))
    assert len(table) == len(many)
    one_by_one = StateTable()
    for i, key in enumerate(many):
        one_by_one.state(key)["events"] = i
    assert int(one_by_one.state(many[-1])["events"]) == len(many) - 1
    recovered = StateTable()
    recovered.put(many, [state_of(i) for i in range(len(many))])
    rows = recovered.rows(many)
    assert recovered.states["events"][rows].tolist() == list(range(len(many)))


def test_what_memory_does_not_hold_is_loaded_once() -> None:
    asked = list[bytes]()

    def load(key: bytes) -> bytes | None:
        asked.append(key)
        return state_of(7) if key == b"ann" else None

    table = StateTable(load)
    rows = table.rows([b"ann", b"bob", b"ann"])
    assert rows[0] == rows[2] != rows[1]
    assert [int(table.states["events"][row]) for row in rows] == [7, 0, 7]
    assert asked == [b"ann", b"bob"]
    table.rows([b"bob", b"ann"])
    assert asked == [b"ann", b"bob"]
    assert (table.get(b"ann"), table.get(b"eve")) == (state_of(7), None)


def test_changes_are_copies_in_the_order_of_the_first_change() -> None:
    table = StateTable()
    for key in (b"ann", b"bob", b"eve"):
        table.state(key)["events"] = 1
    table.mark([b"eve", b"ann", b"eve"])
    assert table.changed == 2
    changes = table.take_changed()
    table.state(b"ann")["events"] = 2
    assert changes == Changes([b"eve", b"ann"], [state_of(1), state_of(1)])
    assert table.take_changed() == Changes([], [])
    assert int(from_bytes(table.get(b"ann") or b"")["events"]) == 2


def test_removed_viewers_leave_a_tombstone_and_a_clean_row() -> None:
    table = StateTable()
    table.state(b"ann")["events"] = 5
    table.remove(b"ann")
    assert table.take_changed() == Changes([b"ann"], [None])
    assert (len(table), table.get(b"ann"), b"ann" in table) == (0, None, False)
    assert to_bytes(table.state(b"bob")) == to_bytes(new_state())


def test_recovered_values_are_not_changes_and_the_last_one_counts() -> None:
    table = StateTable()
    table.put([b"ann", b"bob", b"ann", b"bob"], [state_of(1), state_of(2), state_of(3), None])
    assert (table.get(b"ann"), table.get(b"bob"), table.changed) == (state_of(3), None, 0)
    table.put([b"bob", b"bob"], [None, state_of(9)])
    assert table.get(b"bob") == state_of(9)
    assert int(table.state(b"bob")["events"]) == 9
    table.put([b"bob"], [state_of(10)])
    assert int(table.state(b"bob")["events"]) == 10
    table.put([b"eve"], [b"\x63" + state_of(1)[1:]])
    with pytest.raises(StateError, match="layout 99"):
        table.state(b"eve")
    assert table.get(b"eve") == b"\x63" + state_of(1)[1:], "as it was"


def test_a_shrunk_viewer_comes_back_whole() -> None:
    table = StateTable()
    table.state(b"ann")["last_ts"] = 5
    table.mark([b"ann"])
    table.shrink(b"ann")
    assert (len(table), b"ann" in table, table.keys()) == (1, True, [b"ann"])
    stored = table.take_changed().values[0]
    assert stored is not None
    assert table.get(b"ann") == stored
    assert int(table.state(b"ann")["last_ts"]) == 5
    table.shrink(b"ann")
    table.put([b"ann"], [state_of(4)])
    assert table.get(b"ann") == state_of(4)


def test_a_state_is_stored_as_what_differs_from_an_empty_one() -> None:
    pick = np.random.default_rng(3)
    for share in (0.0, 0.01, 0.4, 1.0):
        words = new_state().reshape(1).view("<u4").copy()
        places = pick.random(len(words)) < share
        words[places] = pick.integers(0, 2**32, int(places.sum()), dtype=np.uint32)
        words[0] = words[0] // 2**16 * 2**16 + 3
        state = words.view(STATE).reshape(())
        value = to_bytes(state)
        assert from_bytes(value).tobytes() == state.tobytes()
        assert len(value) <= 4 + 76 + 4 * (int(places.sum()) + 1)
        for cut in (1, 4, 40, 79):
            with pytest.raises(StateError):
                from_bytes(value[: len(value) - cut])
        with pytest.raises(StateError):
            from_bytes(value + bytes(4))
