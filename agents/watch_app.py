"""The watch app: Faust agents that feed watch events and controls to the pure handler.

    watch-events  ──> handler ──> requests, unknown videos, dead letters ──> changelog ──> offsets
    user-controls ──> a position in the watch partition, recorded first ──> handler

Faust keeps membership, the table and its recovery. Decoding, acknowledgement and the order of writes are ours.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from agents.commit import make_durable
from agents.faust_apps import StateTable, batches, create_app, input_record, is_current, produce, raw_topic
from agents.kafka_log import KafkaLog
from agents.page.source import Health
from agents.settings import Settings
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
from streams.dead_letters import dead_letter
from streams.decoding import Rejected, decode_control
from streams.positions import Position, PositionKind, Recorded, decode_position, encode_position
from streams.records import encode
from streams.registry import Registry
from streams.topics import DAY_MS
from streams.watch import Batch, InputRecord, Output, WatchConfiguration, WatchHandler, highest_markers

BATCH_RECORDS: Final = 1000
RENEW_MS: Final = 14 * DAY_MS
"""Age from which the record of the registry in force is written again: half the retention of positions."""
QUIET_SECONDS: Final = 1.0
"""How often positions are looked for that no watch event brings about."""

logger = logging.getLogger(__name__)


class WorkerError(RuntimeError):
    """The worker cannot go on without an operator; the message says what to do."""


class WatchApp:
    """One worker's share of the watch partitions. `app` is the Faust app to start."""

    def __init__(
        self,
        settings: Settings,
        configuration: WatchConfiguration,
        registry: Registry,
        telemetry: Telemetry,
        topic_ids: dict[str, str],
    ) -> None:
        """`registry` is the version to adopt; `topic_ids` maps unprefixed topic names to Kafka's ids."""
        self._settings = settings
        self._configuration = configuration
        self._registry = registry
        self._telemetry = telemetry
        self._controls_id = topic_ids[topics.USER_CONTROLS]
        self._handlers: dict[int, WatchHandler] = {}
        self._next_offsets: dict[int, int] = {}
        self._locks: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._log = KafkaLog(settings)
        self.recovered = False
        self.app = create_app(settings, topics.WATCH_APP)
        self._watch_topic = settings.topic_prefix + topics.WATCH_EVENTS
        self._table = StateTable(self.app, settings, self._on_recovered)
        self.app.agent(raw_topic(self.app, settings, topics.WATCH_EVENTS), name="watch")(self._watch)
        self.app.agent(raw_topic(self.app, settings, topics.USER_CONTROLS), name="controls")(self._controls)
        self.app.task(self._apply_quiet_positions)
        self.app.on_partitions_revoked.connect(self._on_revoked)

    # Agents: thin loops

    async def _watch(self, stream: Any) -> None:  # noqa: ANN401
        async for events in batches(stream, BATCH_RECORDS):
            by_partition: dict[int, list[Any]] = defaultdict(list)
            for event in events:
                by_partition[event.message.partition].append(event)
            for partition, group in by_partition.items():
                await self._handle(partition, group)

    async def _controls(self, stream: Any) -> None:  # noqa: ANN401
        async for event in stream.noack().events():
            message = event.message
            async with self._locks[message.partition]:
                if is_current(self.app, message):
                    await self._place(message.partition, input_record(message))
                    event.ack()

    async def _handle(self, partition: int, events: Sequence[Any]) -> None:
        async with self._locks[partition]:
            current = [event for event in events if is_current(self.app, event.message)]
            if not current:
                return
            handler = await self._handler(partition)
            records = await self._without_gaps(partition, [input_record(event.message) for event in current])
            batch = handler.handle(records)
            await self._make_durable(partition, batch)
            for event in current:
                event.ack()

    async def _without_gaps(self, partition: int, records: Sequence[InputRecord]) -> list[InputRecord]:
        """The records, with those of the log that the consumer left out between them.

        A gap is mostly a transaction marker. But a record was seen to be missing from what Faust's consumer handed over
        after the broker had not answered for a while, and Faust commits past it.
        """
        complete: list[InputRecord] = []
        expected = self._next_offsets[partition]
        for record in records:
            if record.offset > expected:
                async for found in self._log.read(topics.WATCH_EVENTS, partition, expected, record.offset):
                    logger.warning("watch partition %d: offset %d was read from the log", partition, found.offset)
                    headers = tuple((name, value or b"") for name, value in found.headers)
                    complete.append(InputRecord(found.offset, found.key, found.value, found.timestamp, headers))
            complete.append(record)
            expected = max(expected, record.offset + 1)
        return complete

    # Durability: `Transport` of agents/commit.py, one object per partition's batch

    async def _make_durable(self, partition: int, batch: Batch) -> None:
        started = time.perf_counter()
        await make_durable(_FaustTransport(self), partition, batch)
        self._telemetry.observe(FLUSH_SECONDS, time.perf_counter() - started, "batch")
        self._measure(batch)

    async def produce(self, outputs: Sequence[Output]) -> None:
        """Send outputs and await their acknowledgements."""
        await produce(self.app, self._settings, [self._traced(output) for output in outputs])

    async def write_states(self, partition: int, changelog: Sequence[tuple[bytes, bytes]]) -> None:
        """Changelog, acknowledged; then the table."""
        await self._table.write(partition, changelog)

    def advance(self, partition: int, next_offset: int) -> None:
        """Remember how far a partition was handled; the caller acknowledges its records."""
        self._next_offsets[partition] = max(next_offset, self._next_offsets.get(partition, 0))

    # Controls and positions

    async def _place(self, partition: int, record: InputRecord) -> None:
        """Give a control its position: recorded durably, then scheduled, then applied where it is due."""
        handler = await self._handler(partition)
        if handler.schedule.recorded(self._controls_id, record.offset):
            return
        end = await self._log.end(topics.WATCH_EVENTS, partition)
        if topics.BOOTSTRAP_END_HEADER in record.headers:
            item = Position(PositionKind.BOOTSTRAP_END, end, self._controls_id, record.offset)
        else:
            decoded = decode_control(record.value, record.key, append_time=record.timestamp)
            if isinstance(decoded, Rejected):
                await self._reject_control(partition, record, decoded)
                return
            control = decoded.record
            item = Position(PositionKind.CONTROL, end, self._controls_id, record.offset, control)
        await self._record(handler, item)
        self._telemetry.count(CONTROLS, 1, str(item.control.kind if item.control else item.kind))
        await self._apply_due(handler)

    async def _record(self, handler: WatchHandler, item: Position) -> None:
        producer = await self.app.maybe_start_producer()
        topic = self._settings.topic_prefix + topics.WATCH_POSITIONS
        value = encode_position(item)
        metadata = await (await producer.send(topic, None, value, handler.partition, None, None))
        handler.schedule.add(Recorded(metadata.offset, item))

    async def _reject_control(self, partition: int, record: InputRecord, rejected: Rejected) -> None:
        topic = self._settings.topic_prefix + topics.USER_CONTROLS
        letter = dead_letter(rejected, topic, partition, record.offset, record.key, record.value)
        key = f"{topic}/{partition}/{record.offset}".encode()
        await self.produce([Output(topics.dead_letters_of(topics.USER_CONTROLS), key, encode(letter))])
        self._telemetry.count(DEAD_LETTERS, 1, topics.USER_CONTROLS, rejected.reason)

    async def _apply_due(self, handler: WatchHandler) -> None:
        next_offset = self._next_offsets[handler.partition]
        waiting = handler.schedule.waiting()
        if waiting is None or waiting > next_offset:
            return
        await self._make_durable(handler.partition, handler.handle_due(next_offset))

    async def _apply_quiet_positions(self) -> None:
        """Open assigned partitions, and apply positions behind which no record follows.

        Offsets can have gaps (transaction markers), so a position is also due when the log holds nothing before it.
        """
        while not self.app.should_stop:
            await self.app.sleep(QUIET_SECONDS)
            if not self.recovered:
                continue
            for tp in sorted(self.app.consumer.assignment()):
                if tp.topic != self._watch_topic:
                    continue
                async with self._locks[tp.partition]:
                    if tp in self.app.consumer.assignment() and self.recovered:
                        handler = await self._handler(tp.partition)
                        await self._skip_gap(handler)
                        await self._apply_due(handler)

    async def _skip_gap(self, handler: WatchHandler) -> None:
        """Pass over offsets before a waiting position at which the log holds nothing."""
        waiting, next_offset = handler.schedule.waiting(), self._next_offsets[handler.partition]
        if waiting is None or waiting <= next_offset:
            return
        if await self._log.is_empty(topics.WATCH_EVENTS, handler.partition, next_offset, waiting):
            self.advance(handler.partition, waiting)

    # Partitions

    async def _handler(self, partition: int) -> WatchHandler:
        """The partition's handler; on first use after an assignment its positions are read to their end."""
        handler = self._handlers.get(partition)
        if handler is not None:
            return handler
        start = await self._log.committed(self.app.conf.id, topics.WATCH_EVENTS, partition)
        end = await self._log.end(topics.WATCH_EVENTS, partition)
        self._refuse_truncated_log(partition, end)
        log = [record async for record in self._log.read(topics.WATCH_POSITIONS, partition)]
        recorded = [Recorded(record.offset, decode_position(record.value)) for record in log]
        in_force = [
            item.item.registry_version
            for item in recorded
            if item.item.kind is PositionKind.REGISTRY and item.item.position < start
        ]
        registry = self._configuration.registry_of(in_force[-1] or 0) if in_force else self._registry
        handler = WatchHandler(
            self._configuration, partition, registry, self._table.read, lambda: self._table.users(partition)
        )
        for item in recorded:
            handler.schedule.add(item)
        handler.schedule.skip(start)
        adopted = [item for item in recorded if item.item.kind is PositionKind.REGISTRY]
        times = {record.offset: record.timestamp for record in log}
        renewed = time.time() * 1000 - times[adopted[-1].offset] < RENEW_MS if adopted else False
        await self._adopt_registry(handler, [item.item for item in adopted], start, end, renewed=renewed)
        self._handlers[partition], self._next_offsets[partition] = handler, start
        logger.info("watch partition %d opened at offset %d", partition, start)
        await self._apply_due(handler)
        return handler

    async def _adopt_registry(
        self, handler: WatchHandler, adopted: Sequence[Position], start: int, end: int, *, renewed: bool
    ) -> None:
        """Record where this worker's registry version takes effect, unless the partition has it, or a later one.

        A worker of a rolling restart that still has the older version works with the one in force. A record that would
        soon be past the topic's retention (`renewed` false) is written again.
        """
        own = self._registry
        if adopted and adopted[-1].registry_lineage != own.lineage:
            raise WorkerError(
                f"registry version {own.version} was built anew: its cluster ids mean other things than those that "
                f"version {adopted[-1].registry_version} counted. Adopt one made by `personas clusters extend` or "
                "`rebuild`, or start over under another PERSONAS_TOPIC_PREFIX."
            )
        latest = adopted[-1].registry_version or 0 if adopted else 0
        if latest > own.version:
            logger.warning(
                "partition %d stays with registry version %d: an older one, as this worker's %d, is not gone back to",
                handler.partition,
                latest,
                own.version,
            )
            return
        if adopted and latest == own.version and renewed:
            return
        position = end if adopted else start
        item = Position(PositionKind.REGISTRY, position, registry_version=own.version, registry_lineage=own.lineage)
        await self._record(handler, item)

    def _refuse_truncated_log(self, partition: int, end: int) -> None:
        highest = highest_markers(self._table.values(partition), self._configuration.topic_id).get(partition, -1)
        if highest >= end:
            raise WorkerError(
                f"{self._watch_topic} partition {partition} ends at offset {end}, but events up to {highest} were "
                "counted: the log was truncated. Restore it, or delete the interests changelog to count anew."
            )

    async def _on_revoked(self, *arguments: Any, **_: Any) -> None:  # noqa: ANN401
        """Let a batch under way finish, then forget the handlers: the next owner opens them from durable state."""
        self.recovered = False
        revoked: Iterable[Any] = arguments[-1]
        for tp in revoked:
            async with self._locks[tp.partition]:
                self._handlers.pop(tp.partition, None)

    async def _on_recovered(self) -> None:
        for partition in list(self._handlers):
            async with self._locks[partition]:
                self._handlers.pop(partition, None)
        self.recovered = True
        logger.info("interest table recovered: %d viewers", len(self._table))

    async def health(self) -> Health:
        """Down until the table is recovered, and again while partitions move."""
        return Health.OK if self.recovered else Health.DOWN

    async def close(self) -> None:
        """Close the plain reader; call after the Faust app has stopped."""
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


class _FaustTransport:
    """`Transport` over one WatchApp."""

    def __init__(self, owner: WatchApp) -> None:
        self.produce = owner.produce
        self.write_states = owner.write_states
        self._advance: Callable[[int, int], None] = owner.advance

    async def commit(self, partition: int, next_offset: int) -> None:
        self._advance(partition, next_offset)
