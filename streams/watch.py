"""The watch handler: one partition's records in, changed states and outputs out. No broker, no clock.

Both intakes and the replay driver call `WatchHandler`. It changes the states of its table in place; the caller makes
the outputs durable, then the states, then the offsets (agents/watch_app.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from streams import counting, requesting, topics
from streams.ageing import IDLE_DAYS, Stage, aged, idle_before, prune
from streams.choosing import Catalogue
from streams.columns import Columns, Decode, Headers, Parse, Reader, Record, key_of
from streams.controls import apply_control
from streams.counting import Log
from streams.dead_letters import dead_letter
from streams.decoding import Rejected, RejectReason
from streams.identifiers import request_id
from streams.loading import loaded_viewers
from streams.mixture import Model
from streams.packing import Pack
from streams.positions import Position, PositionKind, Recorded, Schedule
from streams.records import (
    UNASSIGNED,
    Command,
    RefreshRequest,
    Rule,
    Tier,
    UnknownVideo,
    UserControl,
    encode,
)
from streams.registry import Registry
from streams.remap import adopt_registry
from streams.requesting import ASKED, RULES, Gates, Reason, Requests
from streams.selection import Chosen, build_context, catalogue_of, chosen
from streams.state import BOOTSTRAPPED, EMPTY, MARKERS, State, from_values, new_state, pack
from streams.state_table import AT_ONCE, StateTable
from streams.topics import DAY_MS
from streams.trigger import Policy, Thresholds, gates

TRACE_HEADERS: Final = frozenset({"traceparent", "tracestate"})
NOTED_VIDEOS: Final = 100_000
"""Unknown videos remembered so that each is noted once per worker; the topic is compacted, so a repeat is harmless."""


@dataclass(frozen=True, slots=True)
class InputRecord:
    """A `streams.columns.Record` of our own. timestamp: append time, ms."""

    offset: int
    key: bytes | None
    value: bytes | None
    timestamp: int
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class Output:
    """A record to produce. partition: None lets the key decide."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    partition: int | None = None


class Outcome(StrEnum):
    """What became of an input record; every record has exactly one."""

    APPLIED = "applied"
    CLAMPED = "clamped"  # applied after a value was brought into range
    LATE = "late"  # counted, decayed to its own time, not seen by the detector
    DUPLICATE = "duplicate"
    REPEATED = "repeated"  # delivered again after it was applied; skipped by its offset
    NOT_ORGANIC = "not_organic"
    OPTED_OUT = "opted_out"
    DEAD_LETTER = "dead_letter"


_OUTCOMES: Final = {
    counting.APPLIED: Outcome.APPLIED,
    counting.APPLIED_CLAMPED: Outcome.CLAMPED,
    counting.LATE: Outcome.LATE,
    counting.DUPLICATE: Outcome.DUPLICATE,
    counting.REPEATED: Outcome.REPEATED,
    counting.OPT_OUT: Outcome.OPTED_OUT,
    counting.TOO_LATE: Outcome.DEAD_LETTER,
}
_COUNTED: Final = frozenset({counting.APPLIED, counting.APPLIED_CLAMPED, counting.LATE})


@dataclass(slots=True)
class Batch:
    """Result of a batch. outputs: in log order; next_offset: first offset not yet handled."""

    outputs: list[Output] = field(default_factory=list)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    dead_letters: Counter[str] = field(default_factory=Counter)
    requests: Counter[Rule] = field(default_factory=Counter)
    unassigned: int = 0
    next_offset: int = 0


Apply: TypeAlias = Callable[
    [npt.NDArray[np.void], npt.NDArray[np.void], int, Log, Model, Gates, Catalogue, Requests], tuple[int, int]
]
Ask: TypeAlias = Callable[[npt.NDArray[np.void], Reason, Model, Gates, Catalogue, Requests], None]


class Kernel(NamedTuple):
    """The functions that cost the most, plain or compiled: of streams.counting, .requesting and .state."""

    apply: Apply
    ask: Ask
    pack: Pack


PLAIN: Final = Kernel(counting.apply, requesting.ask, pack)
REQUESTS_AT_ONCE: Final = 256
"""Made by the kernel before words are put to them."""


@dataclass(frozen=True, slots=True)
class WatchConfiguration:
    """What a handler works with, the same for every partition.

    decode: an event by every rule; parse: a value as a mapping of our field names, for the quick way to usual events;
    registry_of: registries by version, the one in force included.
    """

    topic: str
    topic_id: str
    positions_id: str
    thresholds: Thresholds
    policy: Policy
    decode: Decode
    parse: Parse
    registry_of: Callable[[int], Registry]
    kernel: Kernel = PLAIN


class WatchHandler:
    """Applies the records of one watch partition, and the positions that fall between them."""

    def __init__(
        self,
        configuration: WatchConfiguration,
        partition: int,
        registry: Registry,
        table: StateTable,
        stored: Callable[[], Iterator[tuple[bytes, bytes]]] = lambda: iter(()),
    ) -> None:
        """`registry` is in force at the first offset; `stored` gives viewers that the table's memory does not hold."""
        self.partition = partition
        self.schedule = Schedule()
        self.registry = registry
        self.table = table
        self._configuration = configuration
        self._gates = gates(configuration.policy, configuration.thresholds, IDLE_DAYS * DAY_MS)
        self._model = Model(configuration.thresholds.constants, registry.prior_by_id)
        self._catalogue = catalogue_of(registry)
        self._requests = np.zeros(REQUESTS_AT_ONCE, ASKED)
        self._log = Log(np.uint64(key_of(configuration.topic_id)), partition)
        self._positions_key = key_of(configuration.positions_id)
        self._reader = Reader(configuration.decode, configuration.parse)
        self._stored = stored
        self._noted: set[int] = set()

    def handle(self, records: Sequence[Record], next_offset: int = 0) -> Iterator[Batch]:
        """Apply records in offset order, each after the positions due before it, and what is due at the end of them.

        next_offset: where the log goes on if there are no records. Make each batch durable before the next one is asked
        for. There is one; where a loaded history ends there are more, each with the requests of some viewers.
        """
        batch, done = Batch(next_offset=next_offset), 0
        while True:
            following = records[done].offset if done < len(records) else batch.next_offset
            while (recorded := self.schedule.due(following)) is not None:
                if recorded.item.kind is PositionKind.BOOTSTRAP_END:
                    yield batch
                    yield from self._end_loading(recorded.offset)
                    batch = Batch(next_offset=batch.next_offset)
                else:
                    self._take_effect(batch, recorded)
            if done == len(records):
                break
            waiting = self.schedule.waiting()
            end = len(records)
            if waiting is not None:
                end = next((i for i in range(done, end) if records[i].offset >= waiting), end)
            self._apply_all(batch, records[done:end])
            batch.next_offset = records[end - 1].offset + 1
            done = end
        yield batch

    # Watch events

    def _apply_all(self, batch: Batch, records: Sequence[Record]) -> None:
        """Apply records between which no position is due."""
        columns = self._reader.read(records)
        rows = self.table.rows(columns.keys)
        offsets = [records[place].offset for place in columns.places]
        events = self._reader.events(columns, rows, offsets, self.registry)
        self._adopt_registry(events)
        said: list[tuple[int, Output]] = []
        self._run(batch, records, columns, events, said)
        outcomes = events["outcome"].tolist()
        changed = columns.keys
        if counting.REPEATED in outcomes:
            changed = [key for key, code in zip(changed, outcomes, strict=True) if code != counting.REPEATED]
        self.table.mark(changed)
        for code, count in Counter(outcomes).items():
            batch.outcomes[_OUTCOMES[code]] += count
        for outcome, places in (Outcome.NOT_ORGANIC, columns.not_organic), (Outcome.DEAD_LETTER, columns.rejected):
            if places:
                batch.outcomes[outcome] += len(places)
        said += [(place, self._dead_letter(batch, records[place], rejected)) for place, rejected in columns.rejected]
        batch.unassigned += sum(
            outcomes[i] in _COUNTED for i in np.nonzero(events["cluster"] == UNASSIGNED)[0].tolist()
        )
        self._note_unknown(records, columns, events, said)
        said.sort(key=lambda item: item[0])
        batch.outputs += [output for _, output in said]

    def _run(
        self,
        batch: Batch,
        records: Sequence[Record],
        columns: Columns,
        events: npt.NDArray[np.void],
        said: list[tuple[int, Output]],
    ) -> None:
        """The kernel over all events, stopping at each that needs more than counting."""
        apply, at = self._configuration.kernel.apply, 0
        while at < len(events):
            at, requests = apply(
                self.table.states, events, at, self._log, self._model, self._gates, self._catalogue, self._requests
            )
            for made in chosen(self._requests[:requests]):
                key, record = columns.keys[made.place], records[columns.places[made.place]]
                said.append((columns.places[made.place], self._request_at(batch, made, key.decode(), record)))
            if at == len(events) or (outcome := int(events["outcome"][at])) not in (counting.AGED, counting.TOO_LATE):
                continue
            place, state, ts = columns.places[at], self.table.view(int(events["row"][at])), int(events["ts"][at])
            if outcome == counting.AGED:
                self._age(state, ts)
                state["last_ts"], state["registry"] = ts, self.registry.version
                continue
            days = (int(state["last_ts"]) - ts) // DAY_MS
            detail = f"ts {ts} is {days} days before the viewer's newest event"
            letter = self._dead_letter(batch, records[place], Rejected(RejectReason.TOO_LATE, detail))
            said.append((place, letter))
            at += 1

    def _request_at(self, batch: Batch, chosen: Chosen, user_id: str, record: Record) -> Output:
        """The request that an event made due."""
        rule, topic_id = RULES[chosen.rule], self._configuration.topic_id
        identity = request_id(topic_id, self.partition, record.offset, rule, user_id)
        return self._request(batch, chosen, user_id, identity, trace_of(record.headers))

    def _ask(self, batch: Batch, state: State, user_id: str, reason: Reason, identity: str) -> Output:
        """A request that a position asks for."""
        self._configuration.kernel.ask(
            state.reshape(1), reason, self._model, self._gates, self._catalogue, self._requests
        )
        (made,) = chosen(self._requests[:1])
        return self._request(batch, made, user_id, identity)

    def _request(self, batch: Batch, chosen: Chosen, user_id: str, identity: str, trace: Headers = ()) -> Output:
        policy, rule = self._configuration.policy, RULES[chosen.rule]
        request = RefreshRequest(
            request_id=identity,
            user_id=user_id,
            epoch=chosen.epoch,
            sequence=chosen.sequence,
            as_of=chosen.last_ts,
            rule=rule,
            expires_after_ms=policy.request_expires_ms,
            registry_version=self.registry.version,
            tier_limit=Tier.TEMPLATE if chosen.template_only else None,
            context=build_context(user_id, chosen, self.registry, policy),
        )
        batch.requests[rule] += 1
        return self._request_output(request, trace)

    def _request_output(self, request: RefreshRequest, trace: Headers = ()) -> Output:
        # The partition is given, not left to the key: one user's records stay on one partition number on every topic.
        return Output(
            topics.REFRESH_REQUESTS,
            request.user_id.encode(),
            encode(request),
            tuple(trace),
            partition=self.partition,
        )

    def _note_unknown(
        self,
        records: Sequence[Record],
        columns: Columns,
        events: npt.NDArray[np.void],
        said: list[tuple[int, Output]],
    ) -> None:
        """Tell of counted videos that the registry does not hold, each once."""
        for i in columns.unplaced:
            key = int(events["video"][i])
            if key in self._noted or int(events["outcome"][i]) not in _COUNTED:
                continue
            if self.registry.knows(columns.videos[i]):
                continue
            if len(self._noted) >= NOTED_VIDEOS:
                self._noted.clear()
            self._noted.add(key)
            record = records[columns.places[i]]
            decoded = self._configuration.decode(record.value, record.key, record.timestamp)
            if not isinstance(decoded, Rejected):
                event = decoded.record
                video = UnknownVideo(event.video_id, event.title, event.tags, event.category)
                output = Output(topics.UNKNOWN_VIDEOS, event.video_id.encode(), encode(video))
                said.append((columns.places[i], output))

    def _dead_letter(self, batch: Batch, record: Record, rejected: Rejected) -> Output:
        topic = self._configuration.topic
        letter = dead_letter(rejected, topic, self.partition, record.offset, record.key, record.value)
        # The key says where the record stood, so that one written twice after a crash is recognised.
        key = f"{topic}/{self.partition}/{record.offset}".encode()
        batch.dead_letters[rejected.reason] += 1
        return Output(topics.dead_letters_of(topics.WATCH_EVENTS), key, encode(letter))

    def _adopt_registry(self, events: npt.NDArray[np.void]) -> None:
        """Carry the states that events are about to change over to the registry version in force."""
        states, rows = self.table.states, events["row"]
        older = states["registry"][rows] != self.registry.version
        if not older.any():
            return
        # Most are viewers never seen, in whose state nothing names a cluster.
        first = older & (states["experts"][rows] == 0) & (states["ring_used"][rows] == 0)
        first &= (states["hidden"][rows, 0] == EMPTY) & (states["pinned"][rows, 0] == EMPTY)
        states["registry"][rows[first]] = self.registry.version
        for i in np.nonzero(older & ~first)[0].tolist():
            state = self.table.view(int(rows[i]))
            if not self._applied(state, int(events["offset"][i])):
                adopt_registry(state, self.registry, self._model.constants)

    # Positions

    def _take_effect(self, batch: Batch, recorded: Recorded) -> None:
        item = recorded.item
        if item.kind is PositionKind.REGISTRY:
            self.registry = self._configuration.registry_of(item.registry_version or 0)
            self._model = Model(self._configuration.thresholds.constants, self.registry.prior_by_id)
            self._catalogue = catalogue_of(self.registry)
            self._noted.clear()
        else:
            self._control(batch, item, recorded.offset)

    def _end_loading(self, offset: int) -> Iterator[Batch]:
        """Ask for the persona of each viewer whose history was loaded; a batch without outputs only searched."""
        for newest, keys in loaded_viewers(self.table, self._stored()):
            batch = Batch()
            for key in keys:
                self._end_bootstrap(batch, key, offset, idle_before(newest))
            yield batch

    def _control(self, batch: Batch, item: Position, offset: int) -> None:
        if item.control is None:
            return
        control = _under(self.registry, item.control)
        key = control.user_id.encode()
        state = self.table.state(key)
        if self._position_applied(state, offset):
            return
        self._age(state, control.ts)
        adopt_registry(state, self.registry, self._model.constants)
        state["control_topic"], state["control_offset"] = self._positions_key, offset
        changed, command = apply_control(state, control, self._model)
        state[...] = changed
        self.table.mark([key])
        if command is None:
            return
        configuration = self._configuration
        identity = request_id(configuration.positions_id, self.partition, offset, Rule.CONTROL, control.user_id)
        if command is Command.REFRESH:
            reason = Reason(RULES.index(Rule.CONTROL), 1.0, 1.0, not state["student_sequence"])
            batch.outputs.append(self._ask(batch, state, control.user_id, reason, identity))
            return
        state["sequence"] = int(state["sequence"]) + 1
        batch.requests[Rule.CONTROL] += 1
        removal = RefreshRequest(
            request_id=identity,
            user_id=control.user_id,
            epoch=int(state["epoch"]),
            sequence=int(state["sequence"]),
            as_of=control.ts,
            rule=Rule.CONTROL,
            expires_after_ms=configuration.policy.request_expires_ms,
            registry_version=self.registry.version,
            command=command,
        )
        batch.outputs.append(self._request_output(removal))

    def _end_bootstrap(self, batch: Batch, key: bytes, offset: int, idle_before_ts: int) -> None:
        state = self.table.state(key)
        if not int(state["flags"]) & BOOTSTRAPPED or self._position_applied(state, offset):
            return
        if int(state["watch_topic"]) != int(self._log.topic) or int(state["watch_partition"]) != self.partition:
            return
        adopt_registry(state, self.registry, self._model.constants)
        state["control_topic"], state["control_offset"] = self._positions_key, offset
        state["flags"] = int(state["flags"]) & ~BOOTSTRAPPED
        self.table.mark([key])
        watches, gate = int(state["qualifying"]), self._configuration.policy.first_persona_after
        # Of a viewer who has been away for so long everything is about to be freed, and nothing would stand behind it.
        if watches < max(gate, 1) or int(state["last_ts"]) < idle_before_ts:
            return
        rule, user_id = Rule.MATURITY if state["student_sequence"] else Rule.COLD_START, key.decode()
        identity = request_id(self._configuration.positions_id, self.partition, offset, rule, user_id)
        reason = Reason(RULES.index(rule), float(watches), float(gate), template_only=False)
        batch.outputs.append(self._ask(batch, state, user_id, reason, identity))

    def _age(self, state: State, ts: int) -> None:
        stage = aged(state, ts, self._configuration.policy.forget_days)
        if stage is Stage.IDLE:
            state[...] = prune(state)
        elif stage is Stage.GONE:
            # What was applied and is not committed yet may come again.
            fresh = new_state()
            for name in MARKERS:
                fresh[name] = state[name]
            state[...] = fresh

    # Markers

    def _applied(self, state: State, offset: int) -> bool:
        return (
            int(state["watch_offset"]) >= offset
            and int(state["watch_topic"]) == int(self._log.topic)
            and int(state["watch_partition"]) == self.partition
        )

    def _position_applied(self, state: State, offset: int) -> bool:
        return int(state["control_offset"]) >= offset and int(state["control_topic"]) == self._positions_key


def highest_marker(states: npt.NDArray[np.void], topic_id: str, partition: int | None = None) -> int:
    """Highest offset of the watch topic, or of one partition of it, that states have applied; -1: none.

    A log that ends below it was recreated or truncated: its events would be skipped in silence.
    """
    own = states["watch_topic"] == key_of(topic_id)
    if partition is not None:
        own &= states["watch_partition"] == partition
    return int(states["watch_offset"][own].max(initial=-1))


def highest_marker_among(values: Iterable[bytes | None], topic_id: str, partition: int | None = None) -> int:
    """As `highest_marker`, of stored values; None stands for a viewer who was removed. Raises StateError."""
    held = [value for value in values if value is not None]
    parts = (from_values(held[start : start + AT_ONCE]) for start in range(0, len(held), AT_ONCE))
    return max((highest_marker(part, topic_id, partition) for part in parts), default=-1)


def trace_of(headers: Headers) -> Headers:
    """The headers that carry a trace on."""
    return tuple([header for header in headers if header[0] in TRACE_HEADERS]) if headers else ()


def _under(registry: Registry, control: UserControl) -> UserControl:
    """The control with its cluster's successor, where the version in force retired it."""
    if control.cluster_id is None or (successor := registry.successor_of(control.cluster_id)) == UNASSIGNED:
        return control
    return replace(control, cluster_id=successor)
