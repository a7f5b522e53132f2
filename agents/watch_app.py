"""The watch app: watch events and controls into the pure handler, and what comes of them made durable.

    watch-events  ──> handler ──> requests, unknown videos, dead letters ──> changelog ──> offsets
    user-controls ──> a position in the watch partition, recorded first ──> handler

Outputs carry deterministic ids and states carry the offset that they were last changed by, so whatever a crash leaves
half done is done again without a trace. Outputs are acknowledged batch by batch; changed states are flushed in one
transaction now and then, and offsets are committed after it. Events go on meanwhile: a flush writes copies.

Faust keeps membership, partitions and commits. Events come in whole fetches (agents/batch_intake.py), or through a
Faust agent; decoding, acknowledgement, states and their recovery are ours.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from agents.batch_intake import BatchIntake, assign_changelog, standbys, with_batch_intake
from agents.changelog import StaleOwnerError
from agents.dead_letter_fuse import DeadLetterFuse
from agents.faust_apps import batches, create_app, input_record, raw_topic
from agents.kafka_admin import KafkaRefused, KafkaUnavailable, TopicIds
from agents.kafka_log import KafkaLog
from agents.liveness import Progress, measure
from agents.output_writer import OutputWriter
from agents.page.source import Health
from agents.partition import Kept, PartitionStates, Place
from agents.settings import Settings, SettingsError
from agents.standby import Standby
from agents.telemetry import (
    CONTROLS,
    DEAD_LETTERS,
    EVENTS,
    FLUSH_SECONDS,
    REQUESTS,
    UNKNOWN_VIDEOS,
    Telemetry,
)
from streams import topics
from streams.columns import Record
from streams.dead_letters import dead_letter
from streams.decoding import Rejected, decode_control
from streams.positions import Position, PositionKind, Recorded, decode_position, encode_position
from streams.records import encode
from streams.registry import Registry
from streams.state_table import Changes
from streams.topics import DAY_MS
from streams.watch import Batch, InputRecord, Output, WatchConfiguration, WatchHandler, highest_marker_among

BATCH_RECORDS: Final = 1000
"""Most records that the agent intake hands over together."""
OWN_TOPICS: Final = (
    topics.WATCH_EVENTS,
    topics.USER_CONTROLS,
    topics.WATCH_POSITIONS,
    topics.INTERESTS_CHANGELOG,
)
"""Topics to which what a worker remembers belongs."""
RENEW_MS: Final = 14 * DAY_MS
"""Age from which the record of the registry in force is written again: half the retention of positions."""
QUIET_SECONDS: Final = 1.0
"""How often positions are looked for that no watch event brings about."""
POSITIONS_SECONDS: Final = 120.0
"""Limit of finding a partition's place once its states are there; a worker that does not is restarted."""
UNPACK_SECONDS: Final = 0.005
"""Pause after each few recovered viewers that were unpacked: half of the time is left for events."""
SWEEP_SECONDS: Final = 3600.0
"""How often viewers are looked for who were away for long."""
BATCH, AGENT = "batch", "agent"
MEMORY, DISK = "memory", "disk"

logger = logging.getLogger(__name__)


class WorkerError(RuntimeError):
    """The worker cannot go on without an operator; the message says what to do."""


@dataclass(frozen=True, slots=True)
class _Adopted:
    """The registry that was last recorded for a partition. at: append time of the record, ms."""

    version: int
    lineage: str
    at: float

    @property
    def expires_soon(self) -> bool:
        return time.time() * 1000 - self.at >= RENEW_MS


@dataclass(slots=True)
class _Owned:
    """A partition that is open. next_offset: first one not handled, or whose outputs are not acknowledged.

    flushed: first offset whose states are not in the changelog; generation: of the group, under which it was opened;
    waiting: Faust's events that wait for a flush, in the agent intake.
    """

    handler: WatchHandler
    states: PartitionStates
    adopted: _Adopted
    next_offset: int
    flushed: int
    generation: int
    flushing: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: deque[Any] = field(default_factory=deque)


class WatchApp:
    """One worker's share of the watch partitions. Make it inside the running loop; `app` is the Faust app to start."""

    def __init__(
        self,
        settings: Settings,
        configuration: WatchConfiguration,
        registry: Registry,
        telemetry: Telemetry,
        topic_ids: dict[str, str],
    ) -> None:
        """`registry` is the version to adopt; `topic_ids` maps unprefixed topic names to Kafka's ids.

        Raises SettingsError for an intake or a store that there is not.
        """
        self._settings = settings
        self._configuration = configuration
        self._registry = registry
        self._telemetry = telemetry
        self._topic_ids = topic_ids
        self._controls_id = topic_ids[topics.USER_CONTROLS]
        self._watch_id = topic_ids[topics.WATCH_EVENTS]
        self._admin = TopicIds(settings)
        _check("PERSONAS_INTAKE", settings.intake, BATCH, AGENT)
        _check("PERSONAS_STATE_STORE", settings.state_store, MEMORY, DISK)
        self._owned: dict[int, _Owned] = {}
        self._kept: dict[int, Kept] = {}
        self._failed: list[_Owned] = []
        self._locks: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._log = KafkaLog(settings)
        self._outputs = OutputWriter(settings)
        self._watch_topic = settings.topic_prefix + topics.WATCH_EVENTS
        self._changelog = settings.topic_prefix + topics.INTERESTS_CHANGELOG
        self._fuse = DeadLetterFuse(self._watch_topic, settings.dead_letters_per_minute)
        self._progress = Progress(self._watch_topic, settings.stalled_seconds)
        self._standby = self._create_standby()
        self._following = False
        self._assigned: frozenset[int] | None = None
        self._moved = asyncio.Event()
        self.app = create_app(settings, topics.WATCH_APP, standby_replicas=settings.standby_replicas)
        assign_changelog(self.app, self._changelog)
        batch = settings.intake == BATCH
        handlers = {self._watch_topic: self._handle_batch} if batch else {}
        self._intake: BatchIntake = with_batch_intake(self.app, settings, handlers, flush=self._flush_all)
        if not batch:
            self.app.agent(raw_topic(self.app, settings, topics.WATCH_EVENTS), name="watch")(self._watch)
        self.app.agent(raw_topic(self.app, settings, topics.USER_CONTROLS), name="controls")(self._controls)
        for task in (
            self._follow,
            self._open_and_apply_quiet,
            self._flush_regularly,
            self._measure_lag,
            self._unpack_recovered,
            self._free_aged,
        ):
            self.app.task(task)
        self.app.on_partitions_revoked.connect(self._on_revoked)
        self.app.on_partitions_assigned.connect(self._on_assigned)

    # Intakes: thin loops

    async def _handle_batch(self, partition: int, records: Sequence[Record]) -> None:
        generation = self._intake.generation
        async with self._locks[partition]:
            if self._intake.is_current(self._watch_topic, partition, generation):
                await self._handle(partition, records)

    async def _watch(self, stream: Any) -> None:  # noqa: ANN401
        async for events in batches(stream, BATCH_RECORDS):
            by_partition: dict[int, list[Any]] = defaultdict(list)
            for event in events:
                by_partition[event.message.partition].append(event)
            for partition, group in by_partition.items():
                await self._handle_events(partition, group)

    async def _handle_events(self, partition: int, events: Sequence[Any]) -> None:
        async with self._locks[partition]:
            if not await self._intake.is_member():
                return
            current = [event for event in events if self._is_current(event.message)]
            if not current:
                return
            owned = await self._handle(partition, [input_record(event.message) for event in current])
            if owned is not None:
                owned.waiting.extend(current)

    async def _controls(self, stream: Any) -> None:  # noqa: ANN401
        async for event in stream.noack().events():
            message = event.message
            async with self._locks[message.partition]:
                if self._is_current(message) and await self._place(message.partition, input_record(message)):
                    event.ack()

    def _is_current(self, message: Any) -> bool:  # noqa: ANN401
        return self._intake.is_current(message.topic, message.partition, message.generation_id)

    # Outputs, then states, then offsets

    async def _handle(self, partition: int, records: Sequence[Record]) -> _Owned | None:
        """Apply records and make what they put out durable. Call it with the partition's lock.

        None where the partition was given up meanwhile: its next owner does it.
        """
        owned = await self._open(partition)
        if owned is not None:
            await self._apply(owned, owned.handler.handle(records), records[0].offset)
        return owned

    async def _apply(self, owned: _Owned, batches: Iterable[Batch], offset: int) -> None:
        """Do what changes states, from this offset on, and await the outputs of each batch before the next is made.

        Where partitions move meanwhile the rest is left: it is not in `next_offset`, so the next owner does it.
        """
        partition = owned.handler.partition
        try:
            for batch in batches:
                self._fuse.add(batch.dead_letters, partition, offset)
                await self.produce(batch.outputs)
                owned.next_offset = max(owned.next_offset, batch.next_offset)
                self._progress.applied(partition, len(batch.outputs))
                self._measure(batch)
                if self._assigned is None:
                    return
                await asyncio.sleep(0)
        except BaseException:
            # The states are ahead of what was put out now: they must never be flushed.
            self._failed.append(self._owned.pop(partition))
            raise

    async def produce(self, outputs: Sequence[Output]) -> None:
        """Send outputs and await their acknowledgements."""
        if outputs:
            await self._outputs.write([self._traced(output) for output in outputs])

    async def _flush(self, partition: int) -> None:
        """Write what changed, then let the offsets that it covers be committed."""
        owned = self._owned.get(partition)
        if owned is None:
            return
        async with owned.flushing:
            async with self._locks[partition]:  # between batches, so that the outputs of all that changed are durable
                if self._owned.get(partition) is not owned:  # a batch failed meanwhile, or the partition moved
                    return
                changes, covered = owned.states.table.take_changed(), owned.next_offset
            if changes or covered != owned.flushed:
                await self._write(owned, changes, covered)
            while owned.waiting and owned.waiting[0].message.offset < covered:
                owned.waiting.popleft().ack()

    async def _write(self, owned: _Owned, changes: Changes, covered: int) -> None:
        """Make states durable that hold everything before the offset `covered`."""
        partition, started = owned.handler.partition, time.perf_counter()
        if changes:
            await owned.states.write(changes, covered)
        self._progress.applied(partition, covered - owned.flushed or len(changes))
        owned.flushed = covered
        self._intake.acknowledge(self._watch_topic, partition, covered, owned.generation)
        self._telemetry.observe(FLUSH_SECONDS, time.perf_counter() - started, "batch")

    async def _flush_all(self) -> None:
        if self._owned:
            await self._refuse_another_log()
            await asyncio.gather(*(self._flush(partition) for partition in list(self._owned)))

    async def _flush_regularly(self) -> None:
        """Flush each partition once in `flush_seconds`, one after the other: events wait for a fraction of the work."""
        while not self.app.should_stop:
            partitions = sorted(self._owned)
            for partition in partitions:
                started = time.monotonic()
                await self._refuse_another_log()
                await self._flush(partition)
                spent = time.monotonic() - started
                await self.app.sleep(max(self._settings.flush_seconds / len(partitions) - spent, 0))
            if not partitions:
                await self.app.sleep(self._settings.flush_seconds)

    # Controls and positions

    async def _place(self, partition: int, record: InputRecord) -> bool:
        """Give a control its position: recorded durably, then scheduled, then applied where it is due.

        False where the partition was given up meanwhile.
        """
        owned = await self._open(partition)
        if owned is None:
            return False
        if owned.handler.schedule.recorded(self._controls_id, record.offset):
            return True
        # After an outage the end that the brokers tell can be behind what was read.
        end = max(await self._log.end(topics.WATCH_EVENTS, partition), owned.next_offset)
        if topics.BOOTSTRAP_END_HEADER in record.headers:
            item = Position(
                PositionKind.BOOTSTRAP_END, end, self._controls_id, record.offset, watch_topic=self._watch_id
            )
        else:
            decoded = decode_control(record.value, record.key, append_time=record.timestamp)
            if isinstance(decoded, Rejected):
                await self._reject_control(partition, record, decoded)
                return True
            control = decoded.record
            item = Position(
                PositionKind.CONTROL, end, self._controls_id, record.offset, control, watch_topic=self._watch_id
            )
        await self._record(owned.handler, owned.states, item)
        self._telemetry.count(CONTROLS, 1, str(item.control.kind if item.control else item.kind))
        await self._apply_due(owned)
        return True

    async def _record(self, handler: WatchHandler, states: PartitionStates, item: Position) -> None:
        offset = await states.record(self._settings.topic_prefix + topics.WATCH_POSITIONS, encode_position(item))
        handler.schedule.add(Recorded(offset, item))

    async def _reject_control(self, partition: int, record: InputRecord, rejected: Rejected) -> None:
        topic = self._settings.topic_prefix + topics.USER_CONTROLS
        letter = dead_letter(rejected, topic, partition, record.offset, record.key, record.value)
        key = f"{topic}/{partition}/{record.offset}".encode()
        await self.produce([Output(topics.dead_letters_of(topics.USER_CONTROLS), key, encode(letter))])
        self._telemetry.count(DEAD_LETTERS, 1, topics.USER_CONTROLS, rejected.reason)

    async def _apply_due(self, owned: _Owned) -> None:
        waiting = owned.handler.schedule.waiting()
        if waiting is not None and waiting <= owned.next_offset:
            await self._apply(owned, owned.handler.handle([], owned.next_offset), owned.next_offset)

    async def _open_and_apply_quiet(self) -> None:
        """Open assigned partitions, and apply positions behind which no record follows.

        Offsets can have gaps (transaction markers), so a position is also due when the log holds nothing before it.
        """
        while not self.app.should_stop:
            await asyncio.gather(*(self._open_and_apply(partition) for partition in sorted(self._assigned or ())))
            if self._standby is not None and self._following and self._assigned is not None:
                await self._standby.assign(standbys(self.app, self._changelog) - self._assigned)
            self._moved.clear()
            await self.app.wait_for_stopped(self._moved.wait(), timeout=QUIET_SECONDS)

    async def _open_and_apply(self, partition: int) -> None:
        async with self._locks[partition]:
            if partition in (self._assigned or ()):
                owned = await self._open(partition)
                if owned is not None:
                    await self._skip_gap(owned)
                    await self._apply_due(owned)

    async def _skip_gap(self, owned: _Owned) -> None:
        """Pass over offsets before a waiting position at which the log holds nothing."""
        waiting, next_offset = owned.handler.schedule.waiting(), owned.next_offset
        if waiting is None or waiting <= next_offset:
            return
        if await self._log.is_empty(topics.WATCH_EVENTS, owned.handler.partition, next_offset, waiting):
            owned.next_offset = max(owned.next_offset, waiting)

    # Partitions

    async def _open(self, partition: int) -> _Owned | None:
        """The partition; on first use after an assignment its states are recovered and its positions read.

        None where it was given up meanwhile.
        """
        owned = self._owned.get(partition)
        if owned is not None:
            return owned
        generation = self._intake.generation
        if self._standby is not None:
            await self._standby.release(partition)
        states = PartitionStates(self._settings, self._place_of(partition), self._configuration)
        try:
            await states.open(
                self._kept.pop(partition, None), lambda offset: self._progress.recovering(partition, offset)
            )
            async with asyncio.timeout(POSITIONS_SECONDS):
                owned = await self._with_positions(partition, states, generation)
            # What was read is of the states that were recovered only if no other owner did anything in between.
            await states.confirm()
        except StaleOwnerError:
            await states.close()
            if await self._intake.is_member() and self._intake.is_current(self._watch_topic, partition, generation):
                raise
            return None
        except BaseException:
            await states.close()
            raise
        if not self._intake.is_current(self._watch_topic, partition, generation):
            self._keep(partition, await states.close())
            return None
        self._owned[partition] = owned
        logger.info(
            "watch partition %d opened at offset %d, %d viewers in memory",
            partition,
            owned.next_offset,
            len(states.table),
        )
        await self._apply_due(owned)
        return owned

    async def _with_positions(self, partition: int, states: PartitionStates, generation: int) -> _Owned:
        await self._refuse_another_log()
        start = await self._log.committed(self.app.conf.id, topics.WATCH_EVENTS, partition)
        end = await self._log.end(topics.WATCH_EVENTS, partition)
        self._refuse_truncated_log(partition, states.highest_watch_offset, end)
        log = [record async for record in self._log.read(topics.WATCH_POSITIONS, partition)]
        recorded = [Recorded(record.offset, decode_position(record.value)) for record in log]
        present = [item for item in recorded if item.item.watch_topic in ("", self._watch_id)]
        if recorded and not present:
            await self._begin_another_log(topics.WATCH_EVENTS, partition)
        sources = {item.item.source_topic for item in recorded} - {""}
        if sources and self._controls_id not in sources:
            await self._begin_another_log(topics.USER_CONTROLS, partition)
        in_force = [
            item.item.registry_version
            for item in recorded
            if item.item.kind is PositionKind.REGISTRY and (item not in present or item.item.position < start)
        ]
        registry = self._configuration.registry_of(in_force[-1] or 0) if in_force else self._registry
        handler = WatchHandler(self._configuration, partition, registry, states.table, states.stored)
        for item in recorded:
            handler.schedule.add(item) if item in present else handler.schedule.note(item.item)
        handler.schedule.skip(start)
        times = {record.offset: record.timestamp for record in log}
        adopted = [
            _Adopted(item.item.registry_version or 0, item.item.registry_lineage, times[item.offset])
            for item in recorded
            if item.item.kind is PositionKind.REGISTRY
        ]
        in_place = await self._adopt_registry(handler, states, adopted[-1] if adopted else None, start, end)
        return _Owned(handler, states, in_place, next_offset=start, flushed=start, generation=generation)

    async def _adopt_registry(
        self, handler: WatchHandler, states: PartitionStates, adopted: _Adopted | None, start: int, end: int
    ) -> _Adopted:
        """Record where this worker's registry version takes effect, unless the partition has it, or a later one.

        A worker of a rolling restart that still has the older version works with the one in force.
        """
        own = self._registry
        if adopted is None:
            return await self._record_registry(handler, states, own.version, start)
        if adopted.lineage != own.lineage:
            raise WorkerError(
                f"registry version {own.version} was built anew: its cluster ids mean other things than those that "
                f"version {adopted.version} counted. Adopt one made by `personas clusters extend` or "
                "`rebuild`, or start over under another PERSONAS_TOPIC_PREFIX."
            )
        if adopted.version > own.version:
            logger.warning(
                "partition %d stays with registry version %d: an older one, as this worker's %d, is not gone back to",
                handler.partition,
                adopted.version,
                own.version,
            )
        if adopted.version >= own.version and not adopted.expires_soon:
            return adopted
        return await self._record_registry(handler, states, max(adopted.version, own.version), end)

    async def _renew_registry(self, owned: _Owned) -> None:
        """Write what says which registry is in place again, before the topic's retention removes it."""
        if owned.adopted.expires_soon:
            handler = owned.handler
            end = max(await self._log.end(topics.WATCH_EVENTS, handler.partition), owned.next_offset)
            owned.adopted = await self._record_registry(handler, owned.states, owned.adopted.version, end)

    async def _record_registry(
        self, handler: WatchHandler, states: PartitionStates, version: int, position: int
    ) -> _Adopted:
        lineage = self._registry.lineage
        item = Position(
            PositionKind.REGISTRY,
            position,
            registry_version=version,
            registry_lineage=lineage,
            watch_topic=self._watch_id,
        )
        await self._record(handler, states, item)
        return _Adopted(version, lineage, time.time() * 1000)

    async def _begin_another_log(self, name: str, partition: int) -> None:
        """Go back to the start of a log of which no worker has read: what is committed belongs to the one before."""
        topic = self._settings.topic_prefix + name
        committed = await self._log.committed(self.app.conf.id, name, partition)
        beginning = await self._log.beginning(name, partition)
        if committed > beginning:
            await self._intake.start_over(topic, partition, beginning)
            raise WorkerError(
                f"topic {topic} was made anew, but partition {partition} was committed up to {committed}: that was of "
                f"the topic before. It is set back to {beginning}; restarted, the worker reads from there"
            )

    async def _refuse_another_log(self) -> None:
        """End the worker if a topic was made anew: offsets and markers of one log say nothing about another."""
        while True:
            try:
                found = await asyncio.to_thread(self._admin.read, OWN_TOPICS)
            except KafkaUnavailable as error:
                logger.warning("the ids of the topics are not known: %s", error)
                continue
            except KafkaRefused as error:
                raise WorkerError(str(error)) from error
            for name in OWN_TOPICS:
                if found[name] != self._topic_ids[name]:
                    raise WorkerError(
                        f"topic {self._settings.topic_prefix}{name} was made anew; restarted, the worker reads it from "
                        "its start"
                    )
            return

    def _refuse_truncated_log(self, partition: int, highest: int, end: int) -> None:
        if highest >= end:
            raise WorkerError(
                f"{self._watch_topic} partition {partition} ends at offset {end}, but events up to {highest} were "
                "counted: the log was truncated. Restore it, or delete the interests changelog to count anew."
            )

    def _place_of(self, partition: int) -> Place:
        return Place(
            partition,
            self._watch_id,
            self._topic_ids[topics.INTERESTS_CHANGELOG],
            self._folder_of(partition) if self._settings.state_store == DISK else None,
        )

    def _folder_of(self, partition: int) -> Path:
        settings = self._settings
        folder = settings.data_folder / "state" if settings.state_folder == Path() else settings.state_folder
        return folder / f"{settings.topic_prefix}{topics.WATCH_APP}" / str(partition)

    def _create_standby(self) -> Standby | None:
        if self._settings.state_store != DISK or self._settings.standby_replicas == 0:
            return None
        return Standby(
            self._settings,
            self._folder_of,
            self._topic_ids[topics.INTERESTS_CHANGELOG],
            self._watch_id,
            lambda values: highest_marker_among(values, self._configuration.topic_id),
        )

    async def _on_assigned(self, *arguments: Any, **_: Any) -> None:  # noqa: ANN401
        assigned: Iterable[Any] = arguments[-1]
        self._assigned = frozenset(tp.partition for tp in assigned if tp.topic == self._watch_topic)
        self._kept = {partition: kept for partition, kept in self._kept.items() if partition in self._assigned}
        self._progress.assigned(self._assigned)
        self._moved.set()

    async def _on_revoked(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Let go of every partition: a rebalance gives all of them anew. What memory holds is kept in case."""
        self._assigned = None
        self._progress.assigned(())
        for partition, owned in list(self._owned.items()):
            async with owned.flushing, self._locks[partition]:
                if self._owned.pop(partition, None) is owned:
                    self._keep(partition, await owned.states.close())

    def _keep(self, partition: int, kept: Kept | None) -> None:
        if kept is not None and (self._assigned is None or partition in self._assigned):
            self._kept[partition] = kept

    # Watching over it all

    async def _follow(self) -> None:
        """Keep the stores warm of which this worker is a standby."""
        if self._standby is not None:
            await self._standby.start()
            self._following = True
            await self._standby.run()

    async def _measure_lag(self) -> None:
        while not self.app.should_stop:
            await self.app.sleep(self._progress.pause)
            await measure(self._progress, self._log, topics.WATCH_EVENTS, self._flushed)

    def _flushed(self, partition: int) -> int | None:
        owned = self._owned.get(partition)
        return None if owned is None else owned.flushed

    async def _unpack_recovered(self) -> None:
        """Make states of recovered values, little by little: a partition opens before, and events come first."""
        while not self.app.should_stop:
            worked = False
            for owned in list(self._owned.values()):
                if owned.states.unpack_some():
                    worked = True
                    await self.app.sleep(UNPACK_SECONDS)
            if not worked:
                await self.app.sleep(QUIET_SECONDS)

    async def _free_aged(self) -> None:
        """Free what is held of viewers who were away for long. It changes no decision: see streams/ageing.py."""
        while not self.app.should_stop:
            await self.app.sleep(SWEEP_SECONDS)
            for partition in sorted(self._owned):
                if not self.app.should_stop:
                    await self._free_aged_of(partition)

    async def _free_aged_of(self, partition: int) -> None:
        owned = self._owned.get(partition)
        if owned is None:
            return
        # Committed, not flushed: what may be read again must find the markers that skip it.
        settled = await self._log.committed(self.app.conf.id, topics.WATCH_EVENTS, partition)
        if self._owned.get(partition) is not owned:
            return
        clock = owned.states.newest_event()
        await owned.states.find_aged(clock, settled)
        async with self._locks[partition]:
            if self._owned.get(partition) is owned and await self._intake.is_member():
                told = owned.states.free_aged(clock, settled)
                await self._apply(owned, [Batch(outputs=told)], owned.next_offset)
                await self._renew_registry(owned)

    def stalled(self) -> str | None:
        """What stands still although events wait, for the liveness probe; None while the worker gets on."""
        return self._progress.stalled()

    async def health(self) -> Health:
        """Down until every assigned partition is recovered, and again while partitions move."""
        open_all = self._assigned is not None and self._assigned <= self._owned.keys()
        return Health.OK if open_all else Health.DOWN

    async def close(self) -> None:
        """Close what is left open; call after the Faust app has stopped."""
        if self._standby is not None:
            await self._standby.close()
        for owned in (*self._failed, *self._owned.values()):
            await owned.states.close()
        await self._outputs.close()
        await self._log.close()

    # Telemetry

    def _traced(self, output: Output) -> Output:
        if output.topic != topics.REFRESH_REQUESTS or not self._telemetry.traces:
            return output
        with self._telemetry.span("watch.request", self._telemetry.extract(output.headers)):
            headers = tuple(self._telemetry.inject(output.headers))
        return Output(output.topic, output.key, output.value, headers, output.partition)

    def _measure(self, batch: Batch) -> None:
        if not self._telemetry.measures:
            return
        for outcome, count in batch.outcomes.items():
            self._telemetry.count(EVENTS, count, outcome)
        for reason, count in batch.dead_letters.items():
            self._telemetry.count(DEAD_LETTERS, count, topics.WATCH_EVENTS, reason)
        for rule, count in batch.requests.items():
            self._telemetry.count(REQUESTS, count, rule)
        unknown = sum(output.topic == topics.UNKNOWN_VIDEOS for output in batch.outputs)
        self._telemetry.count(UNKNOWN_VIDEOS, unknown)


def _check(name: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise SettingsError(f"{name}={value} must be {' or '.join(choices)}")
