"""What agents/batch_intake.py leans on inside faust-streaming, aiokafka and mode.

A failure here after an upgrade means: read docs/decisions/0010-whole-batches.md again, next to the new version's code.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import aiokafka.consumer.consumer
import faust
import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.consumer.fetcher import Fetcher, FetchResult
from aiokafka.consumer.group_coordinator import CoordinatorGroupRebalance, GroupCoordinator
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.errors import IllegalGenerationError, NoError, RebalanceInProgressError, UnknownMemberIdError
from aiokafka.protocol.group import HeartbeatRequest, SyncGroupRequest
from faust.app.base import App
from faust.assignor.partition_assignor import PartitionAssignor
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.transport.conductor import Conductor
from faust.transport.consumer import Consumer as BaseConsumer
from faust.transport.consumer import ConsumerThread, ThreadDelegateConsumer
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer, ConsumerRebalanceListener, Transport
from faust.types import TP
from mode.services import Service
from mode.threads import QueueServiceThread

from agents.batch_intake import (
    MEMBER_SECONDS,
    AssignedChangelogs,
    BatchIntake,
    assign_changelog,
    standbys,
    with_batch_intake,
)
from agents.settings import Settings

RECORD: Final = Path(__file__).parents[2] / "docs" / "decisions" / "0010-whole-batches.md"
TOPIC: Final = "watch"
OTHER: Final = "controls"
CHANGELOG: Final = "interests-changelog"
WATCH_0: Final = TP(TOPIC, 0)
CONTROLS_0: Final = TP(OTHER, 0)
NOW_GENERATION: Final = 5

PARAMETERS: Final[Mapping[tuple[type, str], tuple[str, ...]]] = {
    # Overridden: called by the libraries with these parameters.
    (AIOKafkaConsumerThread, "__post_init__"): ("self",),
    (AIOKafkaConsumerThread, "_create_worker_consumer"): ("self", "transport"),
    (AIOKafkaConsumerThread, "on_start"): ("self",),
    (AIOKafkaConsumerThread, "_fetch_records"): ("self", "consumer", "active_partitions", "timeout", "max_records"),
    (AIOKafkaConsumerThread, "_commit"): ("self", "offsets"),
    (AIOKafkaConsumerThread, "seek_to_committed"): ("self",),
    (ConsumerThread, "on_partitions_assigned"): ("self", "assigned", "generation_id"),
    (Consumer, "_new_consumer_thread"): ("self",),
    (ThreadDelegateConsumer, "_getmany"): ("self", "active_partitions", "timeout"),
    (BaseConsumer, "_wait_next_records"): ("self", "timeout"),
    (BaseConsumer, "getmany"): ("self", "timeout"),
    (BaseConsumer, "_add_gap"): ("self", "tp", "offset_from", "offset_to"),
    (BaseConsumer, "_filter_tps_with_pending_acks"): ("self", "topics"),
    (BaseConsumer, "_new_offset"): ("self", "tp"),
    (BaseConsumer, "wait_empty"): ("self",),
    (BaseConsumer, "_wait_for_ack"): ("self", "timeout"),
    (BaseConsumer, "on_partitions_revoked"): ("self", "revoked"),
    (BaseConsumer, "on_partitions_assigned"): ("self", "assigned", "generation_id"),
    (Consumer, "verify_event_path"): ("self", "now", "tp"),
    (Transport, "__init__"): ("self", "args", "kwargs"),
    (TableManager, "_update_channels"): ("self",),
    # Called.
    (AIOKafkaConsumerThread, "_ensure_consumer"): ("self",),
    (BaseConsumer, "commit"): ("self", "topics", "start_new_transaction"),
    (BaseConsumer, "_clean_unacked_messages"): ("self",),
    (Conductor, "add"): ("self", "topic"),
    (PartitionAssignor, "assigned_standbys"): ("self",),
    (Service, "crash"): ("self", "reason"),
    (GroupCoordinator, "_send_req"): ("self", "request"),
    (AIOKafkaConsumer, "seek"): ("self", "partition", "offset"),
    (AIOKafkaConsumer, "seek_to_committed"): ("self", "partitions"),
    (AIOKafkaConsumer, "committed"): ("self", "partition"),
    (AIOKafkaConsumer, "pause"): ("self", "partitions"),
    (QueueServiceThread, "call_thread"): ("self", "fun", "args", "kwargs"),
    (Fetcher, "fetched_records"): ("self", "partitions", "timeout", "max_records"),
}


@pytest.mark.parametrize(("owner", "name"), PARAMETERS, ids=lambda value: getattr(value, "__name__", value))
def test_methods_take_what_they_took(owner: type, name: str) -> None:
    method = getattr(owner, name, None)
    assert method is not None, f"{owner.__name__}.{name} is gone"
    assert tuple(inspect.signature(method).parameters) == PARAMETERS[owner, name]


def test_the_decision_record_names_the_installed_versions() -> None:
    text = RECORD.read_text()
    for package in ("faust-streaming", "aiokafka", "mode-streaming"):
        assert f"{package} {version(package)}" in text, f"{package} changed: check what the record says of it"


# An app that is never started, with the real objects in it


async def ignore(partition: int, records: Sequence[Any]) -> None:
    """A handler of no effect."""


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[Any]:
    made = faust.App(
        "contract",
        broker="aiokafka://127.0.0.1:1",
        autodiscover=False,
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        table_standby_replicas=1,
        datadir=str(tmp_path),
        TableManager=AssignedChangelogs,
    )
    yield made
    if made._consumer is not None:
        consumer: Any = made.consumer
        consumer._thread.thread_loop.close()


@pytest.fixture
async def intake(app: Any) -> BatchIntake:
    made = with_batch_intake(app, Settings(), {TOPIC: ignore})
    assign_changelog(app, CHANGELOG)
    app.consumer_generation_id = NOW_GENERATION
    made._member_at = math.inf
    return made


@pytest.fixture
def consumer(app: Any, intake: BatchIntake) -> Any:
    app.consumer.assignment = lambda: {WATCH_0, CONTROLS_0}
    return app.consumer


async def test_the_driver_takes_the_place_of_fausts(app: Any, intake: BatchIntake) -> None:
    assert isinstance(app.consumer, Consumer)
    assert type(app.consumer).__name__ == "_BatchConsumer"
    assert type(app.consumer._thread).__name__ == "_BatchConsumerThread"
    assert isinstance(app.producer, Transport.Producer)
    with pytest.raises(RuntimeError, match="before the app starts"):
        with_batch_intake(app, Settings(), {})


async def test_an_app_that_does_not_wait_for_handlers_is_refused(tmp_path: Path) -> None:
    app = faust.App("hasty", broker="aiokafka://127.0.0.1:1", datadir=str(tmp_path), stream_wait_empty=False)
    with pytest.raises(ValueError, match="stream_wait_empty"):
        with_batch_intake(app, Settings(), {TOPIC: ignore})
    with pytest.raises(TypeError, match="AssignedChangelogs"):
        assign_changelog(app, CHANGELOG)


async def test_aiokafka_reads_its_options_when_it_starts(app: Any, consumer: Any, monkeypatch: Any) -> None:
    class ReachedError(Exception):
        pass

    def fetcher(*arguments: Any, **options: Any) -> None:
        raise ReachedError(options["fetch_max_wait_ms"], options["isolation_level"])

    async def at_once() -> None:
        pass

    client: Any = consumer._thread._create_worker_consumer(app.transport)
    monkeypatch.setattr(aiokafka.consumer.consumer, "Fetcher", fetcher)
    monkeypatch.setattr(client._client, "bootstrap", at_once)
    monkeypatch.setattr(client, "_wait_topics", at_once)
    with pytest.raises(ReachedError) as reached:
        await client.start()
    assert reached.value.args == (50, "read_committed")
    client._closed = True
    assert "self.generation" in inspect.getsource(GroupCoordinator.reset_generation)
    # Each response keeps the value that the fetcher has when it comes.
    assert "backoff=self._prefetch_backoff" in inspect.getsource(Fetcher)


# Fetching: aiokafka's own fetcher and positions, with responses laid into it


class Response:
    """The records of one fetch response, as aiokafka's PartitionRecords gives them."""

    def __init__(self, offsets: Sequence[int], fetched_from: int, end: int) -> None:
        self._records = iter([SimpleNamespace(offset=offset) for offset in offsets])
        self._end = end
        self.next_fetch_offset = fetched_from

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        record = next(self._records, None)
        if record is None:
            self.next_fetch_offset = self._end
            raise StopIteration
        self.next_fetch_offset = record.offset + 1
        return record


class Log:
    """The consumer thread over aiokafka's fetcher, without a broker. `handed` gets what reaches the intake."""

    def __init__(self, consumer: Any) -> None:
        self.consumer = consumer
        self.thread = consumer._thread
        # Faust takes the current one, and that may be what another test left.
        self.thread.parent_loop = asyncio.get_running_loop()
        self.handed: list[tuple[TP, list[int], int]] = []
        self.active = {WATCH_0, CONTROLS_0}
        consumer.flow_active = True
        consumer._active_partitions = self.active
        self.subscriptions = SubscriptionState()
        self.subscriptions.subscribe({TOPIC, OTHER})
        self.subscriptions.assign_from_subscribed({TopicPartition(*tp) for tp in self.active})
        self.fetcher: Any = Fetcher.__new__(Fetcher)
        self.fetcher._subscriptions = self.subscriptions
        self.fetcher._records = {}
        self.fetcher._closed = False
        self.fetcher._wait_consume_future = None
        self.fetcher._fetch_waiters = set()
        self.fetcher._loop = asyncio.get_running_loop()
        self.client: Any = AIOKafkaConsumer.__new__(AIOKafkaConsumer)
        self.client._closed = True  # for its __del__
        self.client._fetcher = self.fetcher
        self.client._subscription = self.subscriptions
        self.client._coordinator = SimpleNamespace(generation=NOW_GENERATION)
        self.thread._consumer = self.client
        consumer._thread._intake._receive = self._receive
        self.thread._generation = NOW_GENERATION
        self.thread._assignment = self.subscriptions.subscription.assignment
        for tp in self.active:
            self.subscriptions.seek(TopicPartition(*tp), 100)

    def _receive(self, fetched: Any) -> None:
        self.handed.append((fetched.tp, [record.offset for record in fetched.records], fetched.end))
        self.consumer._thread._intake._full.discard(fetched.tp)

    def responds(self, tp: TP, offsets: Sequence[int], end: int) -> None:
        key = TopicPartition(*tp)
        records = Response(offsets, self.position(tp), end)
        assignment = self.subscriptions.subscription.assignment
        self.fetcher._records[key] = FetchResult(key, assignment=assignment, partition_records=records, backoff=0)

    def position(self, tp: TP) -> int:
        position: int = self.subscriptions.subscription.assignment.state_value(TopicPartition(*tp)).position
        return position

    async def fetch(self, maximum: int | None = None) -> Any:
        self.client._closed = False
        try:
            fetched = await self.thread._fetch_records(self.client, self.active, timeout=0.01, max_records=maximum)
        finally:
            self.client._closed = True
        await asyncio.sleep(0)
        return {tp: [record.offset for record in records] for tp, records in fetched.items()}


@pytest.fixture
async def log(consumer: Any) -> Log:
    return Log(consumer)


async def test_batches_go_to_the_intake_and_the_rest_to_faust(log: Log) -> None:
    log.responds(WATCH_0, [100, 101, 103], 105)
    log.responds(CONTROLS_0, [100, 101], 102)
    assert await log.fetch() == {CONTROLS_0: [100, 101]}
    assert log.handed == [(WATCH_0, [100, 101, 103], 105)]
    assert (log.position(WATCH_0), log.position(CONTROLS_0)) == (105, 102)


async def test_a_start_and_a_fetch_of_markers_alone_are_reported_once(log: Log) -> None:
    for _ in range(2):
        assert await log.fetch() == {}
        assert log.handed == [(WATCH_0, [], 100)]
    log.responds(WATCH_0, [], 107)
    for _ in range(2):
        assert await log.fetch() == {}
        assert log.handed == [(WATCH_0, [], 100), (WATCH_0, [], 107)]


async def test_the_limit_of_records_keeps_the_position_exact(log: Log) -> None:
    log.responds(WATCH_0, [100, 101, 102, 103], 104)
    await log.fetch(3)
    await log.fetch(3)
    assert log.handed == [(WATCH_0, [100, 101, 102], 103), (WATCH_0, [103], 104)]


async def test_what_is_fetched_while_the_flow_stops_is_put_back(log: Log, monkeypatch: Any) -> None:
    fetched_records = log.fetcher.fetched_records

    async def stopped_meanwhile(*arguments: Any, **options: Any) -> Any:
        records = await fetched_records(*arguments, **options)
        log.consumer.flow_active = False
        return records

    monkeypatch.setattr(log.fetcher, "fetched_records", stopped_meanwhile)
    log.responds(WATCH_0, [100, 101], 102)
    log.responds(CONTROLS_0, [100], 101)
    assert await log.fetch() == {}
    assert log.handed == []
    assert (log.position(WATCH_0), log.position(CONTROLS_0)) == (100, 100)


async def test_what_is_fetched_of_a_partition_that_is_paused_meanwhile_is_put_back(log: Log, monkeypatch: Any) -> None:
    fetched_records = log.fetcher.fetched_records

    async def paused_meanwhile(*arguments: Any, **options: Any) -> Any:
        records = await fetched_records(*arguments, **options)
        log.consumer.pause_partitions({WATCH_0})
        return records

    monkeypatch.setattr(log.fetcher, "fetched_records", paused_meanwhile)
    log.responds(WATCH_0, [100, 101], 102)
    log.responds(CONTROLS_0, [100], 101)
    assert await log.fetch() == {CONTROLS_0: [100]}
    assert (log.position(WATCH_0), log.position(CONTROLS_0)) == (100, 101)


async def test_what_is_fetched_before_the_listener_knows_of_an_assignment_is_put_back(log: Log) -> None:
    log.subscriptions.assign_from_subscribed({TopicPartition(*tp) for tp in log.active})
    assert log.subscriptions.subscription.assignment is not log.thread._assignment, "another object each time"
    for tp in log.active:
        log.subscriptions.seek(TopicPartition(*tp), 50)
    log.responds(WATCH_0, [50, 51], 52)
    assert await log.fetch() == {}
    assert (log.handed, log.position(WATCH_0)) == ([], 50)


async def test_faust_seeks_to_the_commit_without_batch_topics(log: Log, monkeypatch: Any) -> None:
    sought: list[TopicPartition] = []

    async def here(call: Any) -> Any:
        return await call()

    async def seek(*partitions: TopicPartition) -> Any:
        sought.extend(partitions)
        return dict.fromkeys(partitions, 7)

    async def committed(partition: TopicPartition) -> int:
        return 9

    monkeypatch.setattr(log.thread, "call_thread", here)
    monkeypatch.setattr(log.client, "seek_to_committed", seek)
    monkeypatch.setattr(log.client, "committed", committed)
    await log.consumer.perform_seek()
    assert sought == [TopicPartition(*CONTROLS_0)]
    assert log.consumer._committed_offset == {WATCH_0: 9, CONTROLS_0: 7}


async def test_a_full_partition_is_not_fetched_from_and_nor_are_all_when_all_are_full(log: Log) -> None:
    log.responds(WATCH_0, [100], 101)
    log.responds(CONTROLS_0, [100], 101)
    log.thread._intake._full.add(WATCH_0)
    assert await log.fetch() == {CONTROLS_0: [100]}
    log.responds(CONTROLS_0, [101], 102)
    log.active.discard(CONTROLS_0)
    assert await log.fetch() == {}
    assert log.handed == []
    # The reason: aiokafka takes no partitions for all of them.
    assert await log.fetcher.fetched_records(set()) != {}


async def test_faust_gets_no_records_of_another_generation(app: Any, log: Log, monkeypatch: Any) -> None:
    async def here(call: Any, *arguments: Any, **options: Any) -> Any:
        return await call(*arguments, **options)

    monkeypatch.setattr(log.thread, "call_thread", here)
    log.client._max_poll_records = 500
    log.client._closed = False
    log.responds(CONTROLS_0, [100], 101)
    app.consumer_generation_id = NOW_GENERATION + 1
    assert await log.consumer._getmany(log.active, 0.01) == {}
    app.consumer_generation_id = NOW_GENERATION
    log.responds(CONTROLS_0, [101], 102)
    assert list(await log.consumer._getmany(log.active, 0.01)) == [CONTROLS_0]
    log.client._closed = True
    assert issubclass(AIOKafkaConsumerThread, QueueServiceThread)


async def test_a_stopped_flow_is_not_answered_with_a_seek(app: Any, consumer: Any, monkeypatch: Any) -> None:
    async def fetched(*_: Any, **__: Any) -> Any:
        consumer.flow_active = False
        return {}

    async def seeks() -> None:
        pytest.fail("positions are moved behind the next assignment's back")

    monkeypatch.setattr(consumer, "_getmany", fetched)
    monkeypatch.setattr(consumer, "perform_seek", seeks)
    consumer._active_partitions = {WATCH_0}
    consumer.flow_active = True
    assert [item async for item in consumer.getmany(0.01)] == []
    # Faust's own consumer does seek there; when it no longer does, the override of _wait_next_records can go.
    assert "perform_seek" in inspect.getsource(BaseConsumer.getmany)


# Commits


@pytest.fixture
def commits(app: Any, consumer: Any, monkeypatch: Any) -> list[dict[TP, int]]:
    """What reaches the consumer thread to be committed."""
    reached: list[dict[TP, int]] = []

    async def commit(offsets: Mapping[TP, int]) -> bool:
        reached.append(dict(offsets))
        return True

    async def flush() -> None:
        pass

    monkeypatch.setattr(consumer._thread, "commit", commit)
    monkeypatch.setattr(app.producer, "flush", flush)
    return reached


def hand(intake: BatchIntake, offsets: Sequence[int], end: int, generation: int = NOW_GENERATION) -> Any:
    """What the consumer thread gives to the intake."""
    fetched = SimpleNamespace(
        tp=WATCH_0, generation=generation, records=[SimpleNamespace(offset=offset) for offset in offsets], end=end
    )
    intake._receive(fetched)  # type: ignore[arg-type]
    return intake._running.get(WATCH_0)


async def test_batch_topics_are_committed_from_acknowledgements_only(
    intake: BatchIntake, consumer: Any, commits: list[dict[TP, int]]
) -> None:
    consumer.flow_active = True
    await hand(intake, [10, 11, 12], 13)
    assert not await consumer.commit()
    assert commits == []
    intake.acknowledge(TOPIC, 0, 12, NOW_GENERATION)
    assert await consumer.commit()
    assert not await consumer.commit(), "nothing is new"
    intake.acknowledge(TOPIC, 0, 13, NOW_GENERATION)
    await hand(intake, [], 15)
    await intake.commit()
    assert commits == [{WATCH_0: 12}, {WATCH_0: 15}]


async def test_a_stale_generation_neither_acknowledges_nor_commits(
    app: Any, intake: BatchIntake, consumer: Any, commits: list[dict[TP, int]], monkeypatch: Any
) -> None:
    consumer.flow_active = True
    await hand(intake, [10, 11], 12)
    intake.acknowledge(TOPIC, 0, 12, NOW_GENERATION - 1)
    assert not await consumer.commit()
    intake.acknowledge(TOPIC, 0, 12, NOW_GENERATION)
    app.consumer_generation_id = NOW_GENERATION + 1
    assert not intake.is_current(TOPIC, 0, NOW_GENERATION)
    assert not await consumer.commit()
    assert commits == []
    # The consumer thread knows of a new generation before the event loop does.
    sent: list[Mapping[TP, int]] = []

    async def commit(thread: Any, offsets: Mapping[TP, int]) -> bool:
        sent.append(offsets)
        return True

    monkeypatch.setattr(AIOKafkaConsumerThread, "_commit", commit)
    consumer._thread._consumer = SimpleNamespace(_coordinator=SimpleNamespace(generation=NOW_GENERATION + 1))
    assert not await consumer._thread._commit({WATCH_0: 12})
    assert await consumer._thread._commit({WATCH_0: 12, CONTROLS_0: 3})
    assert sent == [{CONTROLS_0: 3}]


async def test_records_of_an_earlier_generation_are_dropped(intake: BatchIntake, consumer: Any) -> None:
    consumer.flow_active = True
    assert hand(intake, [10], 11, NOW_GENERATION - 1) is None
    consumer.flow_active = False
    assert hand(intake, [10], 11) is None


async def test_a_gap_between_batches_is_asked_of_the_log_and_a_step_back_crashes(
    app: Any, intake: BatchIntake, consumer: Any, monkeypatch: Any
) -> None:
    handed: list[int] = []
    asked: list[tuple[int, int]] = []

    async def handler(partition: int, records: Sequence[Any]) -> None:
        handed.extend(record.offset for record in records)

    async def read(settings: Settings, tp: TP, start: int, end: int) -> list[Any]:
        asked.append((start, end))
        return [SimpleNamespace(offset=12)]

    crashed: deque[BaseException] = deque()

    async def crash(reason: BaseException) -> None:
        crashed.append(reason)

    monkeypatch.setattr("agents.batch_intake._read_between", read)
    monkeypatch.setattr(app, "crash", crash)
    intake._handlers[TOPIC] = handler
    consumer.flow_active = True
    await hand(intake, [10, 11], 12)
    await hand(intake, [12 + 1], 14)
    assert (handed, asked) == ([10, 11, 12, 13], [(12, 13)])
    await hand(intake, [0, 1], 2)
    assert handed == [10, 11, 12, 13]
    assert "made anew or truncated" in str(crashed.pop())


async def read_by_faust(app: Any, consumer: Any, offsets: Sequence[int], monkeypatch: Any) -> list[Any]:
    """Messages of a topic with an agent, the way Faust's fetcher gets them."""
    messages: list[Any] = []
    fetcher = SimpleNamespace(_stopped=asyncio.Event())

    async def fetched(*_: Any, **__: Any) -> Any:
        fetcher._stopped.set()
        records = [ConsumerRecord(OTHER, 0, offset, 0, 0, b"", b"", None, 0, 0, []) for offset in offsets]
        return {CONTROLS_0: records}

    async def callback(message: Any) -> None:
        messages.append(message)

    monkeypatch.setattr(app.topics, "acks_enabled_for", lambda topic: True)
    monkeypatch.setattr(consumer, "_getmany", fetched)
    monkeypatch.setattr(consumer, "callback", callback)
    monkeypatch.setattr(consumer, "highwater", lambda tp: 0)
    consumer._active_partitions = {CONTROLS_0}
    consumer.flow_active = True
    await consumer._drain_messages(fetcher)
    return messages


async def test_a_gap_behind_the_first_offset_of_all_does_not_stop_commits(
    app: Any, consumer: Any, commits: list[dict[TP, int]], monkeypatch: Any
) -> None:
    messages = await read_by_faust(app, consumer, [0, 3, 4], monkeypatch)
    for message in messages:
        assert consumer.ack(message)
        await consumer.commit()
    assert commits == [{CONTROLS_0: 1}, {CONTROLS_0: 4}, {CONTROLS_0: 5}]


async def test_what_follows_a_gap_is_committed_only_once_it_is_acknowledged(
    app: Any, consumer: Any, commits: list[dict[TP, int]], monkeypatch: Any
) -> None:
    first, behind_gap, last = await read_by_faust(app, consumer, [10, 14, 15], monkeypatch)
    for message in (first, last):
        consumer.ack(message)
        await consumer.commit()
    assert commits == [{CONTROLS_0: 11}, {CONTROLS_0: 14}]
    consumer.ack(behind_gap)
    await consumer.commit()
    assert commits[2:] == [{CONTROLS_0: 16}]


# Rebalances


async def test_partitions_are_given_up_after_handlers_flush_and_commit(
    app: Any, intake: BatchIntake, consumer: Any, monkeypatch: Any
) -> None:
    order: list[str] = []

    async def handler(partition: int, records: Sequence[Any]) -> None:
        await asyncio.sleep(0.01)
        order.append("handler")

    async def flush() -> None:
        assert intake.generation == NOW_GENERATION
        order.append("flush")

    async def commit(*_: Any, **__: Any) -> bool:
        order.append("commit")
        return True

    async def signal(sender: Any, revoked: set[TP], **_: Any) -> None:
        order.append("signal")

    intake._handlers[TOPIC], intake._flush = handler, flush
    monkeypatch.setattr(consumer, "commit", commit)
    app.on_partitions_revoked.connect(signal)
    consumer.flow_active = True
    hand(intake, [10, 11], 12)
    await asyncio.sleep(0)
    await consumer.on_partitions_revoked({WATCH_0})
    assert [step for step in order if step != "commit"] == ["handler", "flush", "signal"]
    assert order[order.index("flush") + 1] == "commit"
    assert not consumer.flow_active
    assert list(intake._pending()) == []
    # An earlier recovery that ends only now resumes the flow.
    consumer.resume_flow()
    assert hand(intake, [12, 13], 14) is None
    monkeypatch.setattr(consumer, "_on_partitions_assigned", commit)
    app.on_rebalance_start()
    await consumer.on_partitions_assigned({WATCH_0}, NOW_GENERATION)
    await hand(intake, [12, 13], 14)
    assert order.count("handler") == 2


async def test_records_wait_until_the_group_answers_where_it_did_not_for_a_session(
    app: Any, intake: BatchIntake, consumer: Any
) -> None:
    """As of a worker that was frozen: another may own the partition, and have put controls between these records."""
    handed: list[int] = []

    async def handler(partition: int, records: Sequence[Any]) -> None:
        handed.extend(record.offset for record in records)

    intake._handlers[TOPIC] = handler
    consumer.flow_active = True
    intake._member_at = time.monotonic() - app.conf.broker_session_timeout - 1
    handling = hand(intake, [10], 11)
    assert handling is not None
    await asyncio.sleep(3 * MEMBER_SECONDS)
    assert handed == []
    intake._member_at = time.monotonic()
    await handling
    assert handed == [10]


async def test_records_of_a_session_that_ended_are_left_to_the_next_owner(
    app: Any, intake: BatchIntake, consumer: Any, commits: list[dict[TP, int]]
) -> None:
    handed: list[int] = []

    async def handler(partition: int, records: Sequence[Any]) -> None:
        handed.extend(record.offset for record in records)

    class Message:
        acked = False

    intake._handlers[TOPIC] = handler
    consumer.flow_active = True
    message = Message()
    consumer._unacked_messages.add(message)
    intake._member_at = time.monotonic() - app.conf.broker_session_timeout - 1
    hand(intake, [10], 11)
    await asyncio.wait_for(consumer.wait_empty(), 0.9)
    assert handed == []
    assert commits == []
    assert not intake.is_current(*WATCH_0, NOW_GENERATION), "until partitions are assigned again"


HEARTBEAT, SYNC, JOIN = HeartbeatRequest("g", 1, "m"), SyncGroupRequest("g", 1, "m", None, []), object()


@pytest.mark.parametrize(
    ("request_", "error", "noted"),
    [
        (HEARTBEAT, NoError, True),
        (HEARTBEAT, RebalanceInProgressError, True),
        (HEARTBEAT, UnknownMemberIdError, False),
        (HEARTBEAT, IllegalGenerationError, False),
        (SYNC, NoError, True),
        (SYNC, RebalanceInProgressError, False),
        (JOIN, NoError, False),
    ],
)
async def test_the_groups_answers_are_seen_where_they_pass(
    intake: BatchIntake, consumer: Any, monkeypatch: Any, request_: Any, error: Any, noted: bool
) -> None:
    async def answer(request: Any) -> Any:
        assert request is request_
        await asyncio.sleep(0.02)
        return SimpleNamespace(error_code=error.errno)

    async def start(self: Any) -> None:
        self._consumer = SimpleNamespace(
            _fetcher=SimpleNamespace(), _coordinator=SimpleNamespace(_send_req=answer), _client=None
        )

    monkeypatch.setattr(AIOKafkaConsumerThread, "on_start", start)
    monkeypatch.setattr(AIOKafkaConsumerThread, "_ensure_consumer", lambda self: self._consumer)
    await consumer._thread.on_start()
    intake._member_at, before = -math.inf, time.monotonic()
    await consumer._thread._consumer._coordinator._send_req(request_)
    assert (intake._member_at >= before) == noted
    assert intake._member_at <= time.monotonic() - 0.02, "the group may have waited since it was asked"
    assert "self._send_req(request)" in inspect.getsource(GroupCoordinator._do_heartbeat)
    assert "self._coordinator._send_req(" in inspect.getsource(CoordinatorGroupRebalance)


async def test_streams_are_flushed_while_their_events_wait_for_it(
    intake: BatchIntake, consumer: Any, commits: list[dict[TP, int]]
) -> None:
    class Message:
        acked = False

    message = Message()
    flushes: list[bool] = []

    async def flush() -> None:
        flushes.append(message.acked)
        message.acked = True

    intake._flush = flush
    consumer._unacked_messages.add(message)
    await asyncio.wait_for(consumer.wait_empty(), 0.9)
    assert flushes == [False, True], "once for the event, and once at the end"


async def test_the_generation_is_set_in_the_consumer_thread_before_the_event_loop_hears_of_the_assignment() -> None:
    source = inspect.getsource(ConsumerRebalanceListener.on_partitions_assigned)
    generation = source.index("consumer_generation_id = generation")
    assert generation < source.index("on_partitions_assigned(ensure_TPset"), "the order of the listener changed"
    assert "_coordinator.generation" in source


async def test_without_tables_positions_are_set_before_anything_flows(
    app: Any, consumer: Any, monkeypatch: Any
) -> None:
    assert not app.tables, "an app with tables recovers them"
    assert app.tables.changelog_topics == {CHANGELOG}
    order: list[str] = []
    recovery: Any = Recovery(app, app.tables)

    async def reached(generation_id: int) -> None:
        assert generation_id == NOW_GENERATION
        recovery._stopped.set()
        order.append("no recovery")

    monkeypatch.setattr(recovery, "_resume_streams", reached)
    recovery._generation_id = NOW_GENERATION
    recovery.signal_recovery_start.set()
    await asyncio.wait_for(type(recovery)._restart_recovery.fun(recovery), 10)
    assert order == ["no recovery"]
    order.clear()
    resumed: set[TP] = set()

    async def seek() -> None:
        assert not consumer.flow_active
        order.append("seek")

    async def fetch() -> None:
        order.append("fetch")

    flow = consumer.resume_flow

    def resume() -> None:
        order.append("flow")
        flow()

    consumer.assignment = lambda: {WATCH_0, CONTROLS_0, TP(CHANGELOG, 0)}
    monkeypatch.setattr(consumer, "resume_partitions", resumed.update)
    monkeypatch.setattr(consumer, "perform_seek", seek)
    monkeypatch.setattr(consumer, "resume_flow", resume)
    monkeypatch.setattr(app._fetcher, "maybe_start", fetch)
    consumer.stop_flow()
    await Recovery(app, app.tables)._resume_streams(NOW_GENERATION)
    assert order == ["seek", "flow", "fetch"]
    assert resumed == {WATCH_0, CONTROLS_0}, "changelogs stay paused"


async def test_changelog_partitions_are_paused_where_they_are_assigned(
    app: Any, consumer: Any, monkeypatch: Any
) -> None:
    paused: list[TopicPartition] = []

    async def told(*_: Any) -> None:
        pass

    assignment = object()
    consumer._thread._consumer = SimpleNamespace(
        pause=lambda *tps: paused.extend(tps),
        _subscription=SimpleNamespace(subscription=SimpleNamespace(assignment=assignment)),
    )
    monkeypatch.setattr(consumer, "threadsafe_partitions_assigned", told)
    await consumer._thread.on_partitions_assigned({WATCH_0, TP(CHANGELOG, 3)}, NOW_GENERATION)
    assert paused == [TopicPartition(CHANGELOG, 3)]
    assert consumer._thread._assignment is assignment
    assert consumer._thread._generation == NOW_GENERATION


async def test_topics_are_subscribed_without_an_agent(app: Any, consumer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(consumer, "pause_partitions", lambda tps: None)
    await app.tables._update_channels()
    assert set(await app.topics._update_indices()) == {TOPIC, CHANGELOG}
    assert not app.topics.acks_enabled_for(TOPIC)


@pytest.mark.parametrize("members", [1, 2, 3])
async def test_the_assignor_distributes_changelogs_with_standbys(app: Any, consumer: Any, members: int) -> None:
    names = {TOPIC, OTHER, CHANGELOG}
    cluster = SimpleNamespace(partitions_for_topic=lambda _: set(range(6)))
    metadata = {f"member-{number}": app.assignor.metadata(names) for number in range(members)}
    owned: list[int] = []
    shadowed: list[int] = []
    for assignment in app.assignor.assign(cluster, metadata).values():
        app.assignor.on_assignment(assignment)
        assigned = dict(assignment.assignment)
        shadows = standbys(app, CHANGELOG)
        owned += assigned[TOPIC]
        shadowed += shadows
        assert set(assigned[CHANGELOG]) == set(assigned[TOPIC]) | shadows
        assert shadows.isdisjoint(assigned[TOPIC])
    assert sorted(owned) == list(range(6))
    assert sorted(shadowed) == (list(range(6)) if members > 1 else [])


async def test_a_crash_is_seen_by_handlers_and_at_the_end(app: Any, intake: BatchIntake, consumer: Any) -> None:
    flushed: list[bool] = []

    async def fails(partition: int, records: Sequence[Any]) -> None:
        raise RuntimeError("no")

    async def flush() -> None:
        flushed.append(True)

    intake._handlers[TOPIC], intake._flush = fails, flush
    consumer.flow_active = True
    await hand(intake, [10], 11)
    assert app.crashed
    assert app.should_stop
    assert str(app.crash_reason) == "no"
    assert await consumer.wait_empty() is None
    assert flushed == []
    assert App.crash is Service.crash
