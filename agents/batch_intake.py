"""A Faust transport that hands over what a fetch returned whole, instead of a message, an event and a task per record.

    broker ──> consumer thread ──> one batch per partition ──> handler (partition, records)
                      └── other topics ──> Faust's streams, unchanged

Faust keeps the group, its assignor, the commit interval and every other topic. Offsets of batch topics are committed
from `BatchIntake.acknowledge` only. What this leans on in faust-streaming, aiokafka and mode is listed in
docs/decisions/0010-whole-batches.md and pinned by tests/contract/test_faust_internals.py.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import faust
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import NoError, RebalanceInProgressError
from aiokafka.protocol.group import HeartbeatRequest, SyncGroupRequest
from faust.tables.manager import TableManager
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer, Transport
from faust.types import TP

from agents.kafka_admin import aiokafka_options
from agents.kafka_log import fetches
from agents.settings import Settings

FETCH_WAIT_MS: Final = 50
"""How long a broker waits for data. Faust's 1.5 s would let an idle partition hold up a busy one for as long."""
PREFETCH_SECONDS: Final = 0.01
"""How long aiokafka asks a broker for nothing while one partition's data waits. Its 0.1 s lets a slow one stop all."""
FULL_SECONDS: Final = 0.02
"""How soon a partition whose handler was behind is fetched from again."""
MEMBER_SECONDS: Final = 0.05
"""How often it is looked whether the group answered, where it did not for a session."""

logger = logging.getLogger(__name__)

Handler = Callable[[int, Sequence[ConsumerRecord]], Awaitable[None]]
"""(partition, records in offset order, at least one). It never runs twice at once for a partition."""
Flush = Callable[[], Awaitable[None]]


def with_batch_intake(
    app: faust.App, settings: Settings, handlers: Mapping[str, Handler], *, flush: Flush | None = None
) -> BatchIntake:
    """Give `app` a consumer that reads committed transactions only, and hands over whole batches.

    `handlers`: by full topic name; none gives Faust's own streams the same consumer. An exception out of one crashes
    the app. `flush` is called before partitions are given up and before the app stops, when no handler runs: make
    durable what is not, and acknowledge it. It is called repeatedly while streams have unacknowledged events, and once
    at the end; but not when a handler failed, or did not return in time.

    Call it in the running loop, before the app's consumer is made, and for an app without Faust tables: their recovery
    moves positions while records flow. Raises RuntimeError when it is too late, ValueError for an app with
    `stream_wait_empty` off: it gives partitions up without waiting for handlers.
    """
    if app._consumer is not None:
        raise RuntimeError("the app has its consumer already; with_batch_intake must come before the app starts")
    if handlers and not app.conf.stream_wait_empty:
        raise ValueError("batch topics need faust.App(stream_wait_empty=True)")
    intake = BatchIntake(app, settings, handlers, flush)
    app.transport = _BatchTransport(app.conf.broker_consumer, app, intake)
    for name in handlers:
        app.topics.add(app.topic(name, acks=False))  # subscribed and assigned; no stream is behind it
    return intake


class AssignedChangelogs(TableManager):
    """Changelog topics that Faust assigns, with standbys, and neither reads nor recovers.

    Pass it as `faust.App(TableManager=...)`. As it holds no table, streams start at once after a rebalance, the way
    they do in an app without tables.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
        super().__init__(*arguments, **options)
        self._assigned_topics: dict[str, Any] = {}

    @property
    def only_assigned(self) -> frozenset[str]:
        """Full names of the topics given to `assign_changelog`."""
        return frozenset(self._assigned_topics)

    @property
    def changelog_topics(self) -> set[str]:
        """What the assignor takes for changelogs."""
        known: set[str] = super().changelog_topics
        return known | self.only_assigned

    async def _update_channels(self) -> None:
        for topic in self._assigned_topics.values():
            self.app.topics.add(topic)
        await super()._update_channels()


def assign_changelog(app: faust.App, topic: str) -> None:
    """Distribute the partitions of this topic, by its full name, with those of the topics that are consumed.

    The topic must exist. Raises TypeError for an app that was not made with AssignedChangelogs.
    """
    if not isinstance(app.tables, AssignedChangelogs):
        raise TypeError("assign_changelog needs faust.App(TableManager=AssignedChangelogs)")
    app.tables._assigned_topics[topic] = app.topic(topic, acks=False)


def _only_assigned(app: Any) -> frozenset[str]:  # noqa: ANN401
    return app.tables.only_assigned if isinstance(app.tables, AssignedChangelogs) else frozenset()


def standbys(app: faust.App, changelog: str) -> set[int]:
    """Partitions of a changelog, by its full name, that this worker shadows for the one that owns them."""
    return {tp.partition for tp in app.assignor.assigned_standbys() if tp.topic == changelog}


@dataclass(frozen=True, slots=True)
class _Fetched:
    """What one fetch took out of a partition: every record between the last one's `end` and this `end`.

    The first of a generation may have no records: its `end` is where the partition starts.
    """

    tp: TP
    generation: int
    records: Sequence[ConsumerRecord]  # none: transaction markers or aborted records only
    end: int  # offset of the next fetch


@dataclass(slots=True)
class _Progress:
    """How far a partition is under one generation. Offsets are of the next record."""

    generation: int
    end: int | None = None  # of what was taken in hand
    handed: int | None = None  # to the handler
    acknowledged: int | None = None

    def committable(self) -> int | None:
        """Up to where all is handled. It passes over markers that follow the last acknowledged record."""
        if self.handed is None or (self.acknowledged is not None and self.acknowledged >= self.handed):
            return self.end
        return self.acknowledged


class LogWentBackError(RuntimeError):
    """The log ends before what was read of it: the topic was made anew, or truncated."""


class BatchIntake:
    """Batches on their way from the consumer thread to the handlers, and how far they are. Made by `with_batch_intake`.

    Per partition at most one batch is being handled and one waits; nothing more is fetched meanwhile. All methods
    belong to the app's event loop, those with a leading underscore to the consumer.
    """

    def __init__(
        self, app: faust.App, settings: Settings, handlers: Mapping[str, Handler], flush: Flush | None
    ) -> None:
        self._app = app
        self._settings = settings
        self._handlers = dict(handlers)
        self._flush = flush
        self._progress: dict[TP, _Progress] = {}
        self._waiting: dict[TP, _Fetched] = {}
        self._running: dict[TP, asyncio.Task[None]] = {}
        self._giving_up = False  # from when partitions are given up until others are assigned
        self._gave_up = False  # the same, once nothing is waited for any more
        self._member_at = -math.inf  # monotonic s, when what the group answered last was asked
        self._full: set[TP] = set()  # those with a batch waiting; the consumer thread adds, the event loop removes

    @property
    def generation(self) -> int:
        """The group's present generation. Each rebalance brings another."""
        return int(self._app.consumer_generation_id)

    def is_current(self, topic: str, partition: int, generation: int) -> bool:
        """Whether the partition is still assigned as it was under this generation. `topic`: its full name."""
        if self._gave_up or generation != self.generation:
            return False
        return TP(topic, partition) in self._app.consumer.assignment()

    async def is_member(self) -> bool:
        """Whether the group counts on this worker, as far as it can know: waits until it does, or gives up partitions.

        A worker that was frozen for longer than a session may find records that it can fetch, and that another owner
        has put controls between meanwhile. What it fetched before this says yes lies before anything another owner did.
        """
        while not self._is_member():
            if self._giving_up or self._app.should_stop:
                return False
            await asyncio.sleep(MEMBER_SECONDS)
        return True

    def _is_member(self) -> bool:
        return time.monotonic() - self._member_at < self._app.conf.broker_session_timeout

    def acknowledge(self, topic: str, partition: int, next_offset: int, generation: int) -> None:
        """Make every offset before `next_offset` committable; Faust commits it at its next interval.

        `generation`: under which the records were handed over. Those of an earlier one are ignored, as another worker
        may have gone on since.
        """
        progress = self._progress.get(TP(topic, partition))
        if progress is not None and progress.generation == generation == self.generation:
            progress.acknowledged = max(next_offset, progress.acknowledged or 0)

    async def start_over(self, topic: str, partition: int, offset: int) -> None:
        """Commit this offset in place of one that belongs to another log. The app must end then, and start again."""
        thread = self._consumer._thread
        await thread.call_thread(AIOKafkaConsumerThread._commit, thread, {TP(topic, partition): offset})

    async def commit(self) -> None:
        """Commit now what is acknowledged."""
        if not await self._app.consumer.commit():  # it may have waited for a commit that began before
            await self._app.consumer.commit()

    # For the consumer

    @property
    def _consumer(self) -> _BatchConsumer:
        return cast(_BatchConsumer, self._app.consumer)

    def _is_batch(self, topic: str) -> bool:
        return topic in self._handlers

    def _pending(self) -> Iterator[TP]:
        return iter(list(self._progress))

    def _committable(self, tp: TP) -> int | None:
        progress = self._progress.get(tp)
        if progress is None or progress.generation != self.generation:
            return None
        return progress.committable()

    def _acknowledged_under(self, tp: TP) -> int | None:
        progress = self._progress.get(tp)
        return None if progress is None else progress.generation

    def _receive(self, fetched: _Fetched) -> None:
        """Take what the consumer thread fetched, in its order. What is stale is fetched again by its new owner."""
        tp = fetched.tp
        flows = self._consumer.flow_active and not self._giving_up  # Faust can resume the flow while it gives up
        if not flows or not self.is_current(tp.topic, tp.partition, fetched.generation):
            self._full.discard(tp)
            return
        self._waiting[tp] = fetched
        if tp not in self._running:
            self._running[tp] = asyncio.create_task(self._handle_waiting(tp))

    async def _handle_waiting(self, tp: TP) -> None:
        try:
            while not self._app.should_stop and (fetched := self._waiting.pop(tp, None)) is not None:
                self._full.discard(tp)
                await self._handle(fetched)
        except Exception as error:  # whatever failed, no offset may move past it
            logger.exception("%s partition %d: the handler failed", tp.topic, tp.partition)
            await self._app.crash(error)
        finally:
            del self._running[tp]

    async def _handle(self, fetched: _Fetched) -> None:
        tp, generation = fetched.tp, fetched.generation
        progress = self._progress.get(tp)
        if progress is None or progress.generation != generation:
            progress = self._progress[tp] = _Progress(generation, self._start(fetched))
        records = await self._continued(fetched, progress.end)
        if not await self.is_member() or not self.is_current(tp.topic, tp.partition, generation):
            return
        progress.end = max(fetched.end, progress.end or 0)
        if records:
            progress.handed = records[-1].offset + 1
            await self._handlers[tp.topic](tp.partition, records)

    def _start(self, fetched: _Fetched) -> int | None:
        """The commit that a generation starts at. None without one, or when the log ends before it."""
        committed = self._consumer._committed_offset.get(fetched.tp)
        first = fetched.records[0].offset if fetched.records else fetched.end
        return None if committed is not None and first < committed else committed

    async def _continued(self, fetched: _Fetched, end: int | None) -> Sequence[ConsumerRecord]:
        """The records that follow what the handler had up to `end`, none twice and none left out."""
        records = fetched.records
        if not records or end is None or records[0].offset == end:
            return records
        if records[0].offset < end:
            raise LogWentBackError(
                f"{fetched.tp.topic} partition {fetched.tp.partition} was read up to offset {end} and goes on at "
                f"{records[0].offset}: the topic was made anew or truncated. Start the worker again."
            )
        missing = await _read_between(self._settings, fetched.tp, end, records[0].offset)
        if missing:
            logger.error(
                "%s partition %d: offsets %d to %d were not handed over by the consumer; read from the log",
                *fetched.tp,
                missing[0].offset,
                missing[-1].offset,
            )
        return [*missing, *records]

    async def _finish(self) -> None:
        """Let the handlers that run return; then flush, unless one does not or the app failed."""
        running = list(self._running.values())
        if running:
            seconds = self._app.conf.broker_rebalance_timeout / 2
            _, late = await asyncio.wait(running, timeout=seconds)
            if late:
                logger.error("%d handlers did not return within %.0f s; not flushed", len(late), seconds)
                return
        await self._flush_unless_crashed()

    async def _flush_unless_crashed(self) -> None:
        if self._flush is None or self._app.crashed:  # what a failed handler left behind must not be written
            return
        try:
            await self._flush()
        except Exception as error:
            logger.exception("flush before giving up partitions failed")
            await self._app.crash(error)

    def _forget(self, revoked: Iterable[TP]) -> None:
        for tp in revoked:
            self._progress.pop(tp, None)
            self._waiting.pop(tp, None)
            self._full.discard(tp)


async def _read_between(settings: Settings, tp: TP, start: int, end: int) -> list[ConsumerRecord]:
    """The records that the log holds at start <= offset < end. Mostly none: markers, aborted or compacted records."""
    partition = TopicPartition(*tp)
    options = {**aiokafka_options(settings), "enable_auto_commit": False, "auto_offset_reset": "earliest"}
    found: list[ConsumerRecord] = []
    async with AIOKafkaConsumer(**options, isolation_level="read_committed") as consumer:
        consumer.assign([partition])
        beginning = (await consumer.beginning_offsets([partition]))[partition]
        if beginning > start:
            logger.error(
                "%s partition %d: offsets %d to %d were deleted before they were handled", *tp, start, beginning - 1
            )
        consumer.seek(partition, max(start, beginning))
        async for records in fetches(consumer, partition, end):
            found += [record for record in records if record.offset < end]
    return found


def _assignment(consumer: Any) -> Any:  # noqa: ANN401
    """What aiokafka is assigned now: another object after each rebalance."""
    return consumer._subscription.subscription.assignment


def _shows_membership(request: Any, response: Any) -> bool:  # noqa: ANN401
    if isinstance(request, HeartbeatRequest):  # a group that rebalances waits for its members
        return response.error_code in (NoError.errno, RebalanceInProgressError.errno)
    return isinstance(request, SyncGroupRequest) and response.error_code == NoError.errno


class _FetchedMap(dict[TP, list[ConsumerRecord]]):
    """Records by partition, as Faust wants them, and the generation they were fetched under."""

    generation: int = -1


class _BatchConsumerThread(AIOKafkaConsumerThread):
    """The thread that talks to the brokers. Positions move here only, so what it takes out it hands on or puts back."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._intake = cast(_BatchTransport, self.transport).intake
        self._generation = -1
        self._assignment: Any = None  # aiokafka's, with the positions, that belongs to the generation
        self._ends: dict[TP, tuple[int, int]] = {}  # generation, and offset of the next fetch

    def _create_worker_consumer(self, transport: Any) -> Any:  # noqa: ANN401
        consumer = super()._create_worker_consumer(transport)
        consumer._fetch_max_wait_ms = FETCH_WAIT_MS
        consumer._isolation_level = "read_committed"
        return consumer

    async def on_start(self) -> None:
        await super().on_start()
        consumer = self._ensure_consumer()
        consumer._fetcher._prefetch_backoff = PREFETCH_SECONDS
        consumer._coordinator._send_req = self._noting_membership(consumer._coordinator._send_req)

    def _noting_membership(self, send: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        """`send`, which asks the group's coordinator, and notes when it was asked what shows that it counts on us."""

        async def noting(request: Any) -> Any:  # noqa: ANN401
            asked = time.monotonic()
            response = await send(request)
            if _shows_membership(request, response):
                self._intake._member_at = asked
            return response

        return noting

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        consumer, unread = self._ensure_consumer(), _only_assigned(self.app)
        self._generation, self._assignment = generation_id, _assignment(consumer)
        consumer.pause(*(TopicPartition(*tp) for tp in assigned if tp.topic in unread))
        await super().on_partitions_assigned(assigned, generation_id)

    async def seek_to_committed(self) -> Mapping[TP, int]:
        return cast(Mapping[TP, int], await self.call_thread(self._seek_to_committed))

    async def _seek_to_committed(self) -> Mapping[TP, int]:
        """Without batch topics: an assignment starts at the commit, and a late seek would go back behind batches."""
        consumer = self._ensure_consumer()
        batch = {tp for tp in consumer.assignment() if self._intake._is_batch(tp.topic)}
        others = consumer.assignment() - batch
        committed = {tp: await consumer.committed(tp) for tp in batch}
        if others:  # none would mean all
            committed |= await consumer.seek_to_committed(*others)
        return committed

    async def _fetch_records(
        self,
        consumer: Any,  # noqa: ANN401
        active_partitions: set[TP],
        timeout: float | None = None,
        max_records: int | None = None,
    ) -> Mapping[TP, list[ConsumerRecord]]:
        full = frozenset(self._intake._full)
        wanted = set(active_partitions) - full  # the set itself is changed by the other thread
        if not wanted:  # aiokafka takes an empty set for every partition
            await asyncio.sleep(FULL_SECONDS)
            return _FetchedMap()
        records = await super()._fetch_records(consumer, wanted, FULL_SECONDS if full else timeout, max_records)
        return self._hand_on(consumer, wanted, records, active_partitions)

    def _hand_on(
        self,
        consumer: Any,  # noqa: ANN401
        wanted: set[TP],
        records: Mapping[TP, list[ConsumerRecord]],
        active: set[TP],
    ) -> _FetchedMap:
        """Give batches to the intake and the rest to Faust. Nothing is awaited since the positions moved."""
        stock = _FetchedMap()
        stock.generation = self._generation
        flows = self.consumer.flow_active and _assignment(consumer) is self._assignment
        flowing = set(active) if flows else set()  # read once: the event loop changes both
        for tp, taken in records.items():
            if tp not in flowing:  # Faust would leave them out
                consumer.seek(tp, taken[0].offset)
            elif not self._intake._is_batch(tp.topic):
                stock[tp] = taken
        for tp in wanted & flowing:
            if self._intake._is_batch(tp.topic):
                self._hand_over(tp, records.get(tp, []))
        return stock

    def _hand_over(self, tp: TP, records: list[ConsumerRecord]) -> None:
        state, generation = self._assignment.state_value(tp), self._generation
        if state is None or not state.has_valid_position:
            return
        known, last = self._ends.get(tp, (None, 0))
        self._ends[tp] = generation, state.position
        if not records and known == generation and state.position <= last:
            return
        self._intake._full.add(tp)
        fetched = _Fetched(TP(*tp), generation, records, state.position)
        self.parent_loop.call_soon_threadsafe(self._intake._receive, fetched)

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        generation = self._ensure_consumer()._coordinator.generation
        current = {
            tp: offset
            for tp, offset in offsets.items()
            if not self._intake._is_batch(tp.topic) or self._intake._acknowledged_under(tp) == generation
        }
        return bool(current) and await super()._commit(current)


class _BatchConsumer(Consumer):
    """Faust's consumer, without the batch topics."""

    def _new_consumer_thread(self) -> _BatchConsumerThread:
        return _BatchConsumerThread(self, loop=self.loop, beacon=self.beacon)

    @property
    def _intake(self) -> BatchIntake:
        return cast(_BatchTransport, self.transport).intake

    async def _getmany(self, active_partitions: set[TP] | None, timeout: float) -> Mapping[TP, list[ConsumerRecord]]:
        fetched = await super()._getmany(active_partitions, timeout)
        # Faust looks at the generation only now: records of the last one would pass for those of this one, and what
        # comes before them, fetched again, for seen.
        stale = isinstance(fetched, _FetchedMap) and fetched.generation != self.app.consumer_generation_id
        return {} if stale else fetched

    async def _wait_next_records(self, timeout: float) -> tuple[Any, set[TP] | None]:
        # Faust would go back to the committed offsets when the flow is stopped, at some time later, while the next
        # assignment is read already. The thread has put back what was fetched too late.
        records, active = await super()._wait_next_records(timeout)
        return records if self.flow_active else None, active

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Any]]:
        """Records of the other topics, one by one."""
        async for tp, message in super().getmany(timeout):
            if self._read_offset[tp] == 0 and message.offset > 1:
                # Faust takes a 0 for nothing read, and would for ever wait for what follows it and is no record.
                await self._add_gap(tp, 1, message.offset)
            yield tp, message

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """Offsets that hold no record count as done. Faust includes `offset_to`, which is the next record itself."""
        await super()._add_gap(tp, offset_from, offset_to - 1)

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterator[TP]:  # noqa: ANN401
        yield from super()._filter_tps_with_pending_acks(topics)
        yield from (tp for tp in self._intake._pending() if topics is None or tp in topics or tp.topic in topics)

    def _new_offset(self, tp: TP) -> int | None:
        if self._intake._is_batch(tp.topic):
            return self._intake._committable(tp)
        offset: int | None = super()._new_offset(tp)
        return offset

    async def wait_empty(self) -> None:
        """Before partitions are given up and at the end of the app: let streams and handlers finish, then commit."""
        self._intake._giving_up = True
        self._intake._waiting.clear()
        if self.app.crashed:  # its consumer thread ends by itself, and a commit would be cancelled
            return
        if not self._intake._is_member():
            self._unacked_messages.clear()  # nobody handles them here any more
        await super().wait_empty()
        await self._intake._finish()
        await self._intake.commit()
        self._intake._gave_up = True

    async def _wait_for_ack(self, timeout: float) -> None:
        if not self._intake._running:
            await self._intake._flush_unless_crashed()  # streams may acknowledge what is flushed only
        self._clean_unacked_messages()
        if self._unacked_messages:
            await super()._wait_for_ack(timeout)

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        await super().on_partitions_revoked(revoked)
        self._intake._forget(revoked)

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        self._intake._giving_up = self._intake._gave_up = False
        await super().on_partitions_assigned(assigned, generation_id)

    def verify_event_path(self, now: float, tp: TP) -> None:
        if self._intake._is_batch(tp.topic) or tp.topic in _only_assigned(self.app):
            return  # no stream ever sees these, which Faust would report as an error
        super().verify_event_path(now, tp)


class _BatchTransport(Transport):
    Consumer = _BatchConsumer

    def __init__(self, url: Any, app: faust.App, intake: BatchIntake) -> None:  # noqa: ANN401
        super().__init__(url, app)
        self.intake = intake
