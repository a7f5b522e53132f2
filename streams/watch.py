"""The watch handler: one partition's records in, changed states and outputs out. No broker, no clock.

Both the Faust agent and the replay driver call `WatchHandler`. It reads stored states through a function, never writes
them: the caller makes the outputs durable, then the states, then the offsets (agents/commit.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import blake2b
from typing import Final, TypeAlias

import numpy as np

from streams import topics
from streams.controls import apply_control
from streams.dead_letters import dead_letter
from streams.decoding import Decoded, Rejected, RejectReason
from streams.identifiers import event_key, playback_key, request_id, video_key
from streams.interests import (
    DAY_MS,
    QUALIFYING_WEIGHT,
    advance,
    count_watch,
    distribution,
    draw,
    enter_session,
    watch_weight,
)
from streams.mixture import Model
from streams.positions import Position, PositionKind, Recorded, Schedule
from streams.records import (
    UNASSIGNED,
    Action,
    Audience,
    Command,
    RefreshRequest,
    Rule,
    Tier,
    Traffic,
    UnknownVideo,
    UserControl,
    WatchEvent,
    encode,
)
from streams.registry import Registry
from streams.remap import adopt_registry
from streams.selection import build_context
from streams.state import BOOTSTRAPPED, OPTED_OUT, RING, State, from_bytes, new_state, to_bytes
from streams.trigger import Fired, Policy, Thresholds, adopt, fired, observe

LATE_AFTER_MS: Final = 5 * 60_000
"""An event this far behind its viewer's newest one is counted but says nothing to the detector."""
TOO_LATE_MS: Final = 30 * DAY_MS
MAXIMUM_RECORD_BYTES: Final = 1_048_576
TRACE_HEADERS: Final = frozenset({"traceparent", "tracestate"})
NOTED_VIDEOS: Final = 100_000
"""Unknown videos remembered so that each is noted once per worker; the topic is compacted, so a repeat is harmless."""

Headers: TypeAlias = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class InputRecord:
    """A Kafka record as consumed. timestamp: append time, ms."""

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


@dataclass(slots=True)
class Batch:
    """Result of a batch. states: user id -> state; outputs in order; next_offset: first offset not yet handled."""

    states: dict[str, State] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    dead_letters: Counter[str] = field(default_factory=Counter)
    requests: Counter[Rule] = field(default_factory=Counter)
    unassigned: int = 0
    next_offset: int = 0

    def changelog(self) -> list[tuple[bytes, bytes]]:
        """Changed states as (key, value), in the order in which viewers were first touched."""
        return [(user.encode(), to_bytes(state)) for user, state in self.states.items()]


Decode: TypeAlias = Callable[[bytes | None, bytes | None, int], Decoded[WatchEvent] | Rejected]
"""(value, key, append time in ms) -> event or reason."""


@dataclass(frozen=True, slots=True)
class WatchConfiguration:
    """What a handler works with, the same for every partition. registries: by version, the one in force included."""

    topic: str
    topic_id: str
    positions_id: str
    thresholds: Thresholds
    policy: Policy
    decode: Decode
    registry_of: Callable[[int], Registry]


class WatchHandler:
    """Applies the records of one watch partition, and the positions that fall between them."""

    def __init__(
        self,
        configuration: WatchConfiguration,
        partition: int,
        registry: Registry,
        read: Callable[[str], bytes | None],
        users: Callable[[], Iterable[str]],
    ) -> None:
        """`registry` is in force at the first offset; `read` gives stored states, `users` every stored user id."""
        self.partition = partition
        self.schedule = Schedule()
        self.registry = registry
        self._configuration = configuration
        self._model = Model(configuration.thresholds.constants, registry.prior_by_id)
        self._topic_key = _key_of(configuration.topic_id)
        self._positions_key = _key_of(configuration.positions_id)
        self._read = read
        self._users = users
        self._noted: set[int] = set()

    def handle(self, records: Sequence[InputRecord]) -> Batch:
        """Apply records in offset order, each after the positions due before it."""
        batch = Batch()
        for record in records:
            self._apply_due(batch, record.offset)
            batch.outcomes[self._apply(batch, record)] += 1
            batch.next_offset = record.offset + 1
        self._apply_due(batch, batch.next_offset)
        return batch

    def handle_due(self, next_offset: int) -> Batch:
        """Apply the positions due before `next_offset`, where no record brings them about."""
        batch = Batch(next_offset=next_offset)
        self._apply_due(batch, next_offset)
        return batch

    # Watch events

    def _apply(self, batch: Batch, record: InputRecord) -> Outcome:
        if record.value is not None and len(record.value) > MAXIMUM_RECORD_BYTES:
            detail = f"{len(record.value)} bytes, at most {MAXIMUM_RECORD_BYTES} are read"
            return self._dead_letter(batch, record, Rejected(RejectReason.TOO_LARGE, detail))
        decoded = self._configuration.decode(record.value, record.key, record.timestamp)
        if isinstance(decoded, Rejected):
            return self._dead_letter(batch, record, decoded)
        event = decoded.record
        if event.traffic is not Traffic.ORGANIC:
            return Outcome.NOT_ORGANIC
        state = self._state(batch, event.user_id)
        if self._applied(state, record.offset):
            return Outcome.REPEATED
        # Marked before anything that depends on the state: a control may change the answer before the commit.
        batch.states[event.user_id] = state
        self._mark(state, record.offset)
        if int(state["flags"]) & OPTED_OUT:
            return Outcome.OPTED_OUT
        behind = int(state["last_ts"]) - event.ts
        if behind > TOO_LATE_MS:
            detail = f"ts {event.ts} is {behind // DAY_MS} days before the viewer's newest event"
            return self._dead_letter(batch, record, Rejected(RejectReason.TOO_LATE, detail))
        outcome = self._count(batch, state, event, record, late=behind > LATE_AFTER_MS)
        return Outcome.CLAMPED if decoded.clamped and outcome is Outcome.APPLIED else outcome

    def _count(self, batch: Batch, state: State, event: WatchEvent, record: InputRecord, *, late: bool) -> Outcome:
        # Rounded to the ring's precision, so that a repeated heartbeat compares equal to what was credited.
        weight = float(np.float32(watch_weight(event)))
        playback = playback_key(event) if event.action is Action.PLAY else None
        key = playback or event_key(event)
        credited = _credited(state, key)
        if credited is not None and (playback is None or weight <= credited):
            return Outcome.DUPLICATE
        cluster = self._cluster(batch, event)
        video = video_key(event.video_id)
        _describe(state, event)
        advance(state, event.ts)
        enter_session(state, event.ts, _key_of(event.session_id) if event.session_id else 0)
        gained = weight - (credited or 0.0)
        _remember(state, key, video, event.ts, cluster, weight)
        state["events"] = int(state["events"]) + (credited is None)
        outcome = Outcome.LATE if late else Outcome.APPLIED
        if cluster == UNASSIGNED:
            batch.unassigned += 1
            state["unassigned"] += 1.0
            return outcome
        if gained == 0.0:
            return outcome
        qualifies = weight >= QUALIFYING_WEIGHT
        slot, counted = count_watch(state, cluster, gained, event.ts, video, self._model, evidence=qualifies)
        _credit(state, key, counted)
        if not qualifies or (credited or 0.0) >= QUALIFYING_WEIGHT:
            return outcome
        restarts = int(state["restarts"])
        drawn = draw(state, slot, counted, self._model, autoplay=event.autoplay)
        _note_draw(state, key, drawn, restarts)
        state["qualifying"] = int(state["qualifying"]) + 1
        if topics.BOOTSTRAP_HEADER in record.headers:
            state["flags"] = int(state["flags"]) | BOOTSTRAPPED
            return outcome
        if not late:
            self._decide(batch, state, event, record)
        return outcome

    def _decide(self, batch: Batch, state: State, event: WatchEvent, record: InputRecord) -> None:
        configuration = self._configuration
        observe(state, self._model, configuration.thresholds)
        reason = fired(state, event.ts, configuration.policy, self._model, configuration.thresholds)
        if reason is None:
            return
        identity = request_id(configuration.topic_id, self.partition, record.offset, reason.rule, event.user_id)
        trace = tuple(header for header in record.headers if header[0] in TRACE_HEADERS)
        self._request(batch, state, event.user_id, reason, identity, trace)

    def _request(
        self, batch: Batch, state: State, user_id: str, reason: Fired, identity: str, trace: Headers = ()
    ) -> None:
        configuration = self._configuration
        state["flags"] = int(state["flags"]) & ~BOOTSTRAPPED
        shares = distribution(state, self._model)
        context = build_context(
            user_id, state, shares, self.registry, reason, configuration.policy, self._model, configuration.thresholds
        )
        sequence = adopt(state, shares, reason.rule, template_only=reason.template_only)
        request = RefreshRequest(
            request_id=identity,
            user_id=user_id,
            epoch=int(state["epoch"]),
            sequence=sequence,
            as_of=int(state["last_ts"]),
            rule=reason.rule,
            expires_after_ms=configuration.policy.request_expires_ms,
            registry_version=self.registry.version,
            tier_limit=Tier.TEMPLATE if reason.template_only else None,
            context=context,
        )
        batch.requests[reason.rule] += 1
        batch.outputs.append(self._request_output(request, trace))

    def _request_output(self, request: RefreshRequest, trace: Headers = ()) -> Output:
        # The partition is given, not left to the key: one user's records stay on one partition number on every topic.
        return Output(
            topics.REFRESH_REQUESTS,
            request.user_id.encode(),
            encode(request),
            trace,
            partition=self.partition,
        )

    def _cluster(self, batch: Batch, event: WatchEvent) -> int:
        cluster = self.registry.cluster_of(event.video_id)
        if cluster == UNASSIGNED and not self.registry.knows(event.video_id):
            self._note(batch, event)
        if event.cluster_id is not None and self.registry.successor_of(event.cluster_id) in self.registry.cards:
            return self.registry.successor_of(event.cluster_id)
        return cluster if cluster in self.registry.cards else UNASSIGNED

    def _note(self, batch: Batch, event: WatchEvent) -> None:
        key = video_key(event.video_id)
        if key in self._noted:
            return
        if len(self._noted) >= NOTED_VIDEOS:
            self._noted.clear()
        self._noted.add(key)
        video = UnknownVideo(event.video_id, event.title, event.tags, event.category)
        batch.outputs.append(Output(topics.UNKNOWN_VIDEOS, event.video_id.encode(), encode(video)))

    def _dead_letter(self, batch: Batch, record: InputRecord, rejected: Rejected) -> Outcome:
        topic = self._configuration.topic
        letter = dead_letter(rejected, topic, self.partition, record.offset, record.key, record.value)
        # The key says where the record stood, so that one written twice after a crash is recognised.
        key = f"{topic}/{self.partition}/{record.offset}".encode()
        batch.outputs.append(Output(topics.dead_letters_of(topics.WATCH_EVENTS), key, encode(letter)))
        batch.dead_letters[rejected.reason] += 1
        return Outcome.DEAD_LETTER

    # Positions

    def _apply_due(self, batch: Batch, next_offset: int) -> None:
        while (recorded := self.schedule.due(next_offset)) is not None:
            self._take_effect(batch, recorded)

    def _take_effect(self, batch: Batch, recorded: Recorded) -> None:
        item = recorded.item
        if item.kind is PositionKind.REGISTRY:
            self.registry = self._configuration.registry_of(item.registry_version or 0)
            self._model = Model(self._configuration.thresholds.constants, self.registry.prior_by_id)
            self._noted.clear()
        elif item.kind is PositionKind.BOOTSTRAP_END:
            for user_id in sorted(set(self._users()) | batch.states.keys()):
                self._end_bootstrap(batch, user_id, recorded.offset)
        else:
            self._control(batch, item, recorded.offset)

    def _control(self, batch: Batch, item: Position, offset: int) -> None:
        if item.control is None:
            return
        control = _under(self.registry, item.control)
        state = self._state(batch, control.user_id)
        if self._position_applied(state, offset):
            return
        state["control_topic"], state["control_offset"] = self._positions_key, offset
        state, command = apply_control(state, control, self._model)
        batch.states[control.user_id] = state
        if command is None:
            return
        configuration = self._configuration
        identity = request_id(configuration.positions_id, self.partition, offset, Rule.CONTROL, control.user_id)
        if command is Command.REFRESH:
            below_gate = not state["student_sequence"]
            self._request(batch, state, control.user_id, Fired(Rule.CONTROL, 1.0, 1.0, below_gate), identity)
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

    def _end_bootstrap(self, batch: Batch, user_id: str, offset: int) -> None:
        state = self._state(batch, user_id)
        if not int(state["flags"]) & BOOTSTRAPPED or self._position_applied(state, offset):
            return
        if int(state["watch_topic"]) != self._topic_key or int(state["watch_partition"]) != self.partition:
            return
        state["control_topic"], state["control_offset"] = self._positions_key, offset
        state["flags"] = int(state["flags"]) & ~BOOTSTRAPPED
        batch.states[user_id] = state
        watches, gate = int(state["qualifying"]), self._configuration.policy.first_persona_after
        if watches < gate:
            return
        rule = Rule.MATURITY if state["student_sequence"] else Rule.COLD_START
        identity = request_id(self._configuration.positions_id, self.partition, offset, rule, user_id)
        self._request(batch, state, user_id, Fired(rule, float(watches), float(gate)), identity)

    # Markers

    def _state(self, batch: Batch, user_id: str) -> State:
        """The viewer's state, carried over to the registry version in force."""
        state = batch.states.get(user_id)
        if state is None:
            stored = self._read(user_id)
            state = new_state() if stored is None else from_bytes(stored)
        adopt_registry(state, self.registry, self._model.constants)
        return state

    def _applied(self, state: State, offset: int) -> bool:
        return (
            int(state["watch_offset"]) >= offset
            and int(state["watch_topic"]) == self._topic_key
            and int(state["watch_partition"]) == self.partition
        )

    def _mark(self, state: State, offset: int) -> None:
        state["watch_topic"], state["watch_partition"] = self._topic_key, self.partition
        state["watch_offset"] = offset

    def _position_applied(self, state: State, offset: int) -> bool:
        return int(state["control_offset"]) >= offset and int(state["control_topic"]) == self._positions_key


def highest_markers(values: Iterable[bytes], topic_id: str) -> dict[int, int]:
    """Highest applied offset per watch partition among stored states of this topic.

    A log that ends below it was recreated or truncated: its events would be skipped in silence.
    """
    key, highest = _key_of(topic_id), dict[int, int]()
    for value in values:
        state = from_bytes(value)
        if int(state["watch_topic"]) == key:
            partition, offset = int(state["watch_partition"]), int(state["watch_offset"])
            highest[partition] = max(offset, highest.get(partition, -1))
    return highest


def _key_of(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") or 1


def _describe(state: State, event: WatchEvent) -> None:
    if event.audience is not None:
        state["audience"] = list(Audience).index(event.audience) + 1
    first = int(state["first_ts"])
    state["first_ts"] = min(first, event.ts) if first else event.ts


def _credited(state: State, key: int) -> float | None:
    """Weight already counted for this event or playback, if it is among the last ones."""
    for i in range(int(state["ring_used"])):
        if int(state["ring_key"][i]) == key:
            return float(state["ring_weight"][i])
    return None


def _under(registry: Registry, control: UserControl) -> UserControl:
    """The control with its cluster's successor, where the version in force retired it."""
    if control.cluster_id is None or (successor := registry.successor_of(control.cluster_id)) == UNASSIGNED:
        return control
    return replace(control, cluster_id=successor)


def _place_of(state: State, key: int) -> int:
    return int(np.nonzero(state["ring_key"][: int(state["ring_used"])] == np.uint64(key))[0][0])


def _credit(state: State, key: int, counted: float) -> None:
    """Note how much of an event was counted, for taking it back."""
    state["ring_counted"][_place_of(state, key)] += counted


def _note_draw(state: State, key: int, drawn: float, restarts: int) -> None:
    """Note how much of a fresh draw an event was, and which experts counted it, for taking it back."""
    place = _place_of(state, key)
    state["ring_draw"][place], state["ring_restarts"][place] = drawn, restarts % 256


def _remember(state: State, key: int, video: int, ts: int, cluster: int, weight: float) -> None:
    used = int(state["ring_used"])
    place = next((i for i in range(used) if int(state["ring_key"][i]) == key), -1)
    if place < 0:
        place = int(state["ring_next"])
        state["ring_counted"][place] = 0
        state["ring_draw"][place] = 0
        state["ring_next"] = (place + 1) % RING
        state["ring_used"] = min(used + 1, RING)
    state["ring_key"][place], state["ring_video"][place], state["ring_ts"][place] = key, video, ts
    state["ring_cluster"][place], state["ring_weight"][place] = cluster, weight
