"""State that ages: stages, stubs, and that sweeping at any moment changes no result."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from streams.ageing import FORGET_DAYS, IDLE_DAYS, KEPT, LATENESS_DAYS, Stage, aged, prune, sweep
from streams.state import BOOTSTRAPPED, OPTED_OUT, STATE, STUB_BYTES, State, new_state, to_bytes
from streams.topics import DAY_MS

NOW = 1_700_000_000_000
SETTLED = 1_000


def counted(days_ago: float = 0.0, *, flags: int = 0, offset: int = 5, pinned: int = -1) -> State:
    """A viewer with something in every field, whose newest event is so old."""
    state = new_state()
    for name in STATE.names or ():
        if name != "format":
            state[name] = 7
    state["hidden"], state["pinned"] = -1, -1
    state["flags"], state["watch_offset"], state["pinned"][0] = flags, offset, pinned
    state["last_ts"] = NOW - round(days_ago * DAY_MS)
    return state


def together(*states: State) -> npt.NDArray[np.void]:
    return np.stack(states)


@pytest.mark.parametrize(
    ("days", "stage"),
    [
        (-50, Stage.FRESH),  # an event behind the newest one
        (0, Stage.FRESH),
        (IDLE_DAYS, Stage.FRESH),
        (IDLE_DAYS + 0.01, Stage.IDLE),
        (IDLE_DAYS + FORGET_DAYS, Stage.IDLE),
        (IDLE_DAYS + FORGET_DAYS + 0.01, Stage.GONE),
    ],
)
def test_stages_follow_the_viewer_s_own_event_time(days: float, stage: Stage) -> None:
    assert aged(counted(days), NOW) is stage


@pytest.mark.parametrize("lasting", [{"flags": OPTED_OUT}, {"pinned": 3}])
def test_a_control_that_holds_keeps_the_viewer_from_being_forgotten(lasting: dict[str, int]) -> None:
    state = counted(5_000, **lasting)
    assert aged(state, NOW) is Stage.IDLE
    found = sweep(together(state), NOW, SETTLED)
    assert (found.stubs.tolist(), found.gone.tolist()) == ([0], [])


def test_hidden_interests_are_such_a_control() -> None:
    state = counted(5_000)
    state["hidden"][2] = 4
    assert aged(state, NOW) is Stage.IDLE


def test_a_state_without_events_does_not_age() -> None:
    state = new_state()
    assert aged(state, NOW) is Stage.FRESH
    found = sweep(together(state), NOW, SETTLED)
    assert (found.stubs.size, found.gone.size) == (0, 0)


def test_a_stub_keeps_the_first_fields_and_nothing_of_what_was_watched() -> None:
    state = counted(500, flags=OPTED_OUT, pinned=3)
    stub = prune(state)
    for name in KEPT:
        assert np.array_equal(stub[name], state[name]), name
    assert {"epoch", "sequence", "watch_offset", "control_offset", "last_ts", "audience", "hidden", "flags"} <= set(
        KEPT
    )
    assert stub.tobytes()[STUB_BYTES:] == new_state().tobytes()[STUB_BYTES:]
    assert len(to_bytes(stub)) < 200
    assert to_bytes(prune(stub)) == to_bytes(stub)
    assert int(state["events"]) == 7, "the state itself stays as it is"


def test_a_row_of_a_table_is_pruned_like_a_state() -> None:
    assert to_bytes(prune(together(counted(500))[0])) == to_bytes(prune(counted(500)))


def test_a_sweep_waits_for_late_events() -> None:
    days = IDLE_DAYS + LATENESS_DAYS
    found = sweep(together(counted(days), counted(days + 1)), NOW, SETTLED)
    assert found.stubs.tolist() == [1]
    found = sweep(together(counted(days + FORGET_DAYS), counted(days + FORGET_DAYS + 1)), NOW, SETTLED)
    assert (found.stubs.tolist(), found.gone.tolist()) == ([0], [1])


def test_stubs_are_written_once() -> None:
    assert sweep(together(prune(counted(500))), NOW, SETTLED).stubs.size == 0


def test_viewers_whose_history_is_being_loaded_stay() -> None:
    found = sweep(together(counted(5_000, flags=BOOTSTRAPPED)), NOW, SETTLED)
    assert (found.stubs.size, found.gone.size) == (0, 0)


def test_a_viewer_whose_events_may_be_read_again_keeps_the_marker() -> None:
    found = sweep(together(counted(5_000, offset=SETTLED), counted(5_000, offset=SETTLED - 1)), NOW, SETTLED)
    assert (found.stubs.tolist(), found.gone.tolist()) == ([0], [1])


def test_personas_that_live_longer_are_forgotten_later() -> None:
    state = counted(IDLE_DAYS + 200)
    assert aged(state, NOW) is Stage.GONE
    assert aged(state, NOW, forget_days=365) is Stage.IDLE
    assert sweep(together(counted(IDLE_DAYS + LATENESS_DAYS + 200)), NOW, SETTLED, forget_days=365).gone.size == 0


class Viewers:
    """One partition's viewers: applies the rule at each touch, as the handler does, and sweeps when told."""

    def __init__(self) -> None:
        self.states: dict[int, State] = {}
        self.seen: list[tuple[int, int, int]] = []
        self.clock = 0
        self.offset = 0

    def touch(self, user: int, ts: int, *, pin: bool) -> None:
        state = self.states.get(user, new_state())
        stage = aged(state, ts)
        state = new_state() if stage is Stage.GONE else prune(state) if stage is Stage.IDLE else state
        if pin:
            state["pinned"][0] = -1 if int(state["pinned"][0]) >= 0 else 1
        else:
            state["events"] = int(state["events"]) + 1
            state["last_ts"] = max(ts, int(state["last_ts"]))
            state["sequence"] = int(state["sequence"]) + (int(state["events"]) % 3 == 0)
            state["watch_offset"] = self.offset
        self.offset += 1
        self.clock = max(self.clock, ts)
        self.states[user] = state
        self.seen.append((user, int(state["sequence"]), int(state["events"])))

    def sweep(self) -> None:
        users = list(self.states)
        found = sweep(together(*self.states.values()), self.clock, self.offset)
        for row in found.stubs.tolist():
            self.states[users[row]] = prune(self.states[users[row]])
        for row in found.gone.tolist():
            del self.states[users[row]]

    def stored(self) -> dict[int, bytes]:
        return {user: to_bytes(state) for user, state in self.states.items()}


@pytest.mark.parametrize("seed", range(20))
def test_sweeping_at_any_moment_or_never_gives_the_same(seed: int) -> None:
    """Long gaps, and records behind the partition's newest by up to the lateness allowed."""
    random = np.random.default_rng(seed)
    swept, never = Viewers(), Viewers()
    time = NOW
    swept_anything = False
    for _ in range(400):
        time += int(random.exponential(15 * DAY_MS))
        late = int(random.choice([0.0, random.uniform(0, LATENESS_DAYS)]) * DAY_MS)
        user, pin = int(random.zipf(1.3)) % 12, bool(random.random() < 0.05)
        for viewers in (swept, never):
            viewers.touch(user, time - late, pin=pin)
        if random.random() < 0.2:
            before = swept.stored()
            swept.sweep()
            swept_anything |= swept.stored() != before
    assert swept_anything
    assert swept.seen == never.seen
    swept.sweep()
    never.sweep()
    assert swept.stored() == never.stored()


def test_rows_are_named_by_their_place_in_the_table() -> None:
    states = np.zeros(20_000, STATE)
    states["last_ts"] = NOW
    states["hidden"], states["pinned"] = -1, -1
    states["last_ts"][::100] = NOW - 500 * DAY_MS
    states["events"] = 1
    found = sweep(states, NOW, SETTLED)
    assert found.stubs.tolist() == list(range(0, 20_000, 100))
