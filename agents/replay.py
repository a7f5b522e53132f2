"""Replay without a broker: the same handlers, in the same order of writes, on a clock that the log drives.

`ReplayDriver` runs a script of records. Faults are data in the script, so a test of recovery reads like prose:

    driver = ReplayDriver(configuration, registry)
    await driver.run([event(1), event(2), Crash(Step.OUTPUTS), event(3), Duplicate(2), Reorder(2), event(4), event(5)])
    assert driver.requests() == expected

As in Kafka, records, outputs and the changelog outlive a crash; the table, and offsets not yet committed, do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, TypeAlias

from streams import topics
from streams.columns import Headers
from streams.dead_letters import dead_letter
from streams.decoding import Rejected, decode_control
from streams.positions import Position, PositionKind, Recorded
from streams.records import encode
from streams.registry import Registry
from streams.state_table import StateTable
from streams.watch import (
    Batch,
    InputRecord,
    Outcome,
    Output,
    WatchConfiguration,
    WatchHandler,
)

YEAR_MS: Final = 366 * 86_400_000


class Step(StrEnum):
    """How far a batch gets before a crash."""

    NOTHING = "nothing"
    OUTPUTS = "outputs"
    STATES = "states"


@dataclass(frozen=True, slots=True)
class Event:
    """A watch event as bytes. timestamp: its append time, ms."""

    value: bytes | None
    key: bytes | None
    timestamp: int
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class Control:
    """A user control as bytes; it takes effect after the events before it."""

    value: bytes
    key: bytes
    timestamp: int


@dataclass(frozen=True, slots=True)
class EndBootstrap:
    """The end of loaded history: one request per eligible viewer."""


@dataclass(frozen=True, slots=True)
class AdoptRegistry:
    """A registry version takes effect after the events before it."""

    version: int


@dataclass(frozen=True, slots=True)
class Crash:
    """Kill the worker while it handles the records since its last batch, after a step; it starts again by itself."""

    after: Step


@dataclass(frozen=True, slots=True)
class Duplicate:
    """The producer sends its last `count` events once more."""

    count: int


@dataclass(frozen=True, slots=True)
class Reorder:
    """The next `count` events arrive in reverse order."""

    count: int


Item: TypeAlias = Event | Control | EndBootstrap | AdoptRegistry | Crash | Duplicate | Reorder


class _Killed(Exception):  # noqa: N818 - not an error: the fault that the script asked for
    """The worker died here."""


@dataclass(slots=True)
class _Broker:
    """What outlives a crash."""

    events: list[InputRecord] = field(default_factory=list)
    positions: list[Recorded] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    changelog: dict[bytes, bytes] = field(default_factory=dict)
    committed: int = 0
    controls: int = 0


class ReplayDriver:
    """One worker on one partition. Give it a script with `run`; then read what it put out."""

    def __init__(
        self, configuration: WatchConfiguration, registry: Registry, *, partition: int = 0, batch_records: int = 500
    ) -> None:
        """`batch_records`: most records handled together; any value gives the same states and requests."""
        self._partition = partition
        self._configuration = configuration
        self._registry = registry
        self._batch_records = batch_records
        self._broker = _Broker()
        self._dying: Step | None = None
        self._table = StateTable(pack=configuration.kernel.pack)
        self.outcomes: Counter[Outcome] = Counter()
        self.dead_letters: Counter[str] = Counter()
        self.refused_controls: Counter[str] = Counter()
        self.unassigned = 0
        self._start()

    async def run(self, script: Iterable[Item]) -> None:
        """Run a script to its end; call again to go on."""
        reversing: list[Event] = []
        left = 0
        for item in script:
            if left and isinstance(item, Event):
                reversing.append(item)
                left -= 1
                if not left:
                    await self._append_all(reversed(reversing))
                    reversing = []
            elif isinstance(item, Reorder):
                left = item.count
            else:
                await self._one(item)
        await self._append_all(reversed(reversing))
        await self._drain()

    @property
    def states(self) -> dict[str, bytes]:
        """Stored state of every viewer."""
        return {key.decode(): value for key, value in self._broker.changelog.items()}

    def outputs(self, topic: str) -> list[Output]:
        """Everything put out on a topic, in order; what a crash made repeat is in it twice."""
        return [output for output in self._broker.outputs if output.topic == topic]

    async def _one(self, item: Item) -> None:
        if isinstance(item, Event):
            await self._append_all([item])
        elif isinstance(item, Duplicate):
            again = self._broker.events[-item.count :] if item.count else []
            await self._append_all([Event(r.value, r.key, r.timestamp, r.headers) for r in again])
        elif isinstance(item, Crash):
            self._dying = item.after
            await self._drain()
            self._dying = None
        else:
            self._place(item)

    async def _append_all(self, events: Iterable[Event]) -> None:
        for event in events:
            offset = len(self._broker.events)
            self._broker.events.append(InputRecord(offset, event.key, event.value, event.timestamp, event.headers))
            if offset + 1 - self._broker.committed >= self._batch_records:
                await self._drain()

    def _place(self, item: Item) -> None:
        """Controls get the position that the partition ends at, as in the watch app."""
        broker, end = self._broker, len(self._broker.events)
        if isinstance(item, AdoptRegistry):
            self._record(Position(PositionKind.REGISTRY, end, registry_version=item.version))
        elif isinstance(item, EndBootstrap):
            broker.controls += 1
            self._record(Position(PositionKind.BOOTSTRAP_END, end, topics.USER_CONTROLS, broker.controls - 1))
        elif isinstance(item, Control):
            broker.controls += 1
            decoded = decode_control(item.value, item.key, append_time=item.timestamp)
            offset = broker.controls - 1
            if isinstance(decoded, Rejected):
                letter = dead_letter(decoded, topics.USER_CONTROLS, self._partition, offset, item.key, item.value)
                broker.outputs.append(Output(topics.dead_letters_of(topics.USER_CONTROLS), None, encode(letter)))
                self.refused_controls[decoded.reason] += 1
                return
            self._record(Position(PositionKind.CONTROL, end, topics.USER_CONTROLS, offset, decoded.record))

    def _record(self, item: Position) -> None:
        recorded = Recorded(len(self._broker.positions), item)
        self._broker.positions.append(recorded)
        self._handler.schedule.add(recorded)

    def _start(self) -> None:
        """A worker starts: its table from the changelog, its place from the committed offset."""
        self._table = StateTable(pack=self._configuration.kernel.pack)
        self._table.put(list(self._broker.changelog), list(self._broker.changelog.values()))
        self._handler = WatchHandler(
            self._configuration,
            self._partition,
            self._registry_at(self._broker.committed),
            self._table,
        )
        for recorded in self._broker.positions:
            self._handler.schedule.add(recorded)
        self._handler.schedule.skip(self._broker.committed)

    def _registry_at(self, offset: int) -> Registry:
        versions = [
            recorded.item.registry_version
            for recorded in self._broker.positions
            if recorded.item.kind is PositionKind.REGISTRY and recorded.item.position < offset
        ]
        return self._configuration.registry_of(versions[-1] or 0) if versions else self._registry

    async def _drain(self) -> None:
        """Handle everything up to the end of the log, through crashes."""
        while True:
            broker = self._broker
            waiting = broker.events[broker.committed : broker.committed + self._batch_records]
            try:
                for batch in self._handler.handle(waiting, len(broker.events)):
                    self._make_durable(batch)
                    self._count(batch)
            except _Killed:
                self._dying = None
                self._start()
                continue
            if broker.committed >= len(broker.events):
                return

    def _count(self, batch: Batch) -> None:
        self.outcomes += batch.outcomes
        self.dead_letters += batch.dead_letters
        self.unassigned += batch.unassigned

    def _make_durable(self, batch: Batch) -> None:
        """Outputs, then states, then the offset, as the watch app does; a crash falls between two of them."""
        broker, changes = self._broker, self._table.take_changed()
        self._die_after(Step.NOTHING)
        broker.outputs.extend(batch.outputs)
        self._die_after(Step.OUTPUTS)
        for key, value in zip(changes.keys, changes.values, strict=True):
            if value is None:
                broker.changelog.pop(key, None)
            else:
                broker.changelog[key] = value
        self._die_after(Step.STATES)
        broker.committed = max(batch.next_offset, broker.committed)

    def _die_after(self, step: Step) -> None:
        if self._dying is step:
            raise _Killed


def append_times(ts: Sequence[int | None]) -> list[int]:
    """Append time of each line of an event file, ms: the latest time seen so far in it.

    A file has no append times, and no line may drive the clock far ahead of the others: the log ends at the latest time
    that no gap of more than a year separates from the middle of the log. What claims to be later is in the future.
    """
    known = sorted(t for t in ts if t is not None)
    if not known:
        return [0] * len(ts)
    limit = known[len(known) // 2]
    for t in known[len(known) // 2 :]:
        if t - limit > YEAR_MS:
            break
        limit = t
    plausible = [t if t is not None and t <= limit else None for t in ts]
    clock = next((t for t in plausible if t is not None), limit)
    times = []
    for own in plausible:
        clock = clock if own is None else max(clock, own)
        times.append(clock)
    return times


def as_bootstrap(event: Event) -> Event:
    """The event as history being loaded."""
    return replace(event, headers=(*event.headers, topics.BOOTSTRAP_HEADER))
