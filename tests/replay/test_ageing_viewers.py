"""Viewers who stay away, through the watch handler: sweeping at any moment, or never, decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from streams import topics
from streams.ageing import IDLE_DAYS, LATENESS_DAYS, free
from streams.decoding import Decoded, decode_control
from streams.positions import Position, PositionKind, Recorded
from streams.state import from_bytes, to_bytes
from streams.state_table import StateTable
from streams.topics import DAY_MS
from streams.watch import InputRecord, Output, WatchHandler
from tests.builders import START, control, event, make_configuration, make_registry

USERS = [f"viewer-{number}" for number in range(6)]
KINDS = ("hide", "unhide", "pin", "unpin", "clear_history", "opt_out", "opt_in", "erase", "forget_video")


class Partition:
    """A handler that is fed one record at a time."""

    def __init__(self) -> None:
        registry = make_registry()
        self.handler = WatchHandler(make_configuration(registry, first_persona_after=5), 0, registry, StateTable())
        self.outputs: list[Output] = []
        self.clock = 0
        self.offset = 0
        self.positions = 0

    @property
    def table(self) -> StateTable:
        return self.handler.table

    def watch(self, user: str, video: str, ts: int) -> None:
        made = event(user, video, ts)
        record = InputRecord(self.offset, user.encode(), made.value, ts)
        self.outputs += [output for batch in self.handler.handle([record]) for output in batch.outputs]
        self.offset += 1
        self.clock = max(self.clock, ts)

    def control(self, user: str, kind: str, ts: int, **fields: object) -> None:
        made = control(user, kind, ts, **fields)
        decoded = decode_control(made.value, user.encode(), append_time=ts)
        assert isinstance(decoded, Decoded)
        item = Position(PositionKind.CONTROL, self.offset, "controls", self.positions, decoded.record)
        self.handler.schedule.add(Recorded(self.positions, item))
        self.positions += 1
        self.outputs += [output for batch in self.handler.handle([], self.offset) for output in batch.outputs]

    def sweep(self) -> int:
        """Free what can be freed, as a worker does; returns how many viewers that were."""
        before = self.table.keys(), dict(self.table.packed())
        free(self.table, self.clock, self.offset)
        stubs = dict(self.table.packed()).keys() - before[1].keys()
        return len(stubs) + len(before[0]) - len(self.table.keys())

    def requests(self) -> list[tuple[bytes | None, bytes | None]]:
        return [(output.key, output.value) for output in self.outputs if output.topic == topics.REFRESH_REQUESTS]

    def stored(self) -> dict[str, bytes]:
        """States without the control marker, which a viewer who was forgotten at a touch keeps: it decides nothing."""
        found = {}
        for user in USERS:
            value = self.table.get(user.encode())
            if value is not None:
                state = from_bytes(value)
                state["control_topic"], state["control_offset"] = 0, -1
                found[user] = to_bytes(state)
        return found


def feed(partitions: Sequence[Partition], seed: int, steps: int) -> int:
    """The same months of watches and controls for each; the first one is swept now and then. How many were freed."""
    random, time, freed = np.random.default_rng(seed), START, 0
    for _ in range(steps):
        time += int(random.exponential(2 * DAY_MS) if random.random() < 0.97 else random.uniform(100, 900) * DAY_MS)
        late = int(random.uniform(0, LATENESS_DAYS) * DAY_MS) if random.random() < 0.1 else 0
        user = USERS[min(int(random.zipf(1.5)) - 1, len(USERS) - 1)]
        cluster, video = int(random.integers(6)), int(random.integers(10))
        kind = str(random.choice(KINDS)) if random.random() < 0.04 else None
        fields = {"forget_video": {"video_id": f"c{cluster}v{video}"}} if kind == "forget_video" else {}
        about = fields.get(kind or "", {"cluster_id": cluster} if kind in KINDS[:4] else {})
        for partition in partitions:
            if kind is None:
                partition.watch(user, f"c{cluster}v{video}", time - late)
            else:
                partition.control(user, kind, time - late, **about)
        if random.random() < 0.1:
            freed += partitions[0].sweep()
    return freed


@pytest.mark.parametrize("seed", range(6))
def test_sweeping_at_any_moment_or_never_gives_the_same_requests_and_states(seed: int) -> None:
    swept, never = Partition(), Partition()
    assert feed([swept, never], seed, 600) > 0
    assert len(never.requests()) > 5
    assert swept.requests() == never.requests()
    swept.sweep()
    never.sweep()
    assert swept.stored() == never.stored()


def test_a_viewer_back_after_more_than_a_year_starts_anew() -> None:
    partition = Partition()
    for number in range(30):
        partition.watch("ann", f"c{number % 2}v{number % 10}", START + number * DAY_MS)
    before = from_bytes(partition.table.get(b"ann") or b"")
    assert int(before["qualifying"]) == 30
    later = int(before["last_ts"]) + (IDLE_DAYS + 1) * DAY_MS
    partition.watch("ann", "c3v1", later)
    after = from_bytes(partition.table.get(b"ann") or b"")
    assert (int(after["events"]), int(after["qualifying"]), int(after["last_ts"])) == (1, 1, later)
    assert int(after["sequence"]) >= int(before["sequence"]) > 0
    assert int(after["epoch"]) == int(before["epoch"])
