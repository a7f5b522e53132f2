"""Whole batches out of a real Kafka: each record handed over once and in order, whatever the group and the log do."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import faust
import pytest
from aiokafka import AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from confluent_kafka.admin import AdminClient
from faust.types import TP

from agents.batch_intake import (
    PREFETCH_SECONDS,
    AssignedChangelogs,
    BatchIntake,
    LogWentBackError,
    _read_between,
    assign_changelog,
    standbys,
    with_batch_intake,
)
from agents.faust_apps import raw_topic
from agents.kafka_admin import aiokafka_options, confluent_options, faust_brokers
from agents.kafka_log import KafkaLog
from agents.settings import Settings
from tests.conftest import Stack

pytestmark = pytest.mark.stack

PARTITIONS: Final = 4
SESSION_SECONDS: Final = 6.0
"""The shortest that a broker accepts by default."""
LIMIT: Final = 60.0

Handler = Callable[["Member", int, Sequence[ConsumerRecord]], Awaitable[None]]


@pytest.fixture(scope="module")
def settings(kafka: Stack, topic_prefix: str) -> Settings:
    return replace(kafka.settings, topic_prefix=topic_prefix, partitions=PARTITIONS)


@pytest.fixture
async def events(settings: Settings) -> str:
    """A topic of this test alone, without its prefix."""
    return await created(settings, "events")


async def created(settings: Settings, name: str) -> str:
    name = f"{name}-{uuid4().hex[:6]}"
    admin = AIOKafkaAdminClient(**aiokafka_options(settings))
    await admin.start()
    try:
        await admin.create_topics([NewTopic(settings.topic_prefix + name, PARTITIONS, 1)])
    finally:
        await admin.close()
    return name


class Member:
    """One app of a consumer group, and what was handed to it."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        topic: str,
        handler: Handler | None = None,
        *,
        changelog: str | None = None,
        controls: str | None = None,
        replicas: int = 0,
    ) -> None:
        self.topic = settings.topic_prefix + topic
        self.batches: list[tuple[int, list[int]]] = []  # (partition, offsets)
        self.controls: list[bytes] = []
        self.flushes = 0
        self._handler = handler or Member.take
        self.app: Any = faust.App(
            f"{self.topic}-group",
            broker=faust_brokers(settings),
            broker_session_timeout=SESSION_SECONDS,
            broker_heartbeat_interval=0.5,
            broker_commit_interval=0.2,
            broker_max_poll_records=500,
            consumer_auto_offset_reset="earliest",
            autodiscover=False,
            web_enabled=False,
            topic_disable_leader=True,
            topic_allow_declare=False,
            topic_partitions=PARTITIONS,
            table_standby_replicas=replicas,
            datadir=str(folder / uuid4().hex),
            store="memory://",
            TableManager=AssignedChangelogs,
        )
        self.intake: BatchIntake = with_batch_intake(self.app, settings, {self.topic: self._handle}, flush=self._flush)
        if changelog is not None:
            assign_changelog(self.app, settings.topic_prefix + changelog)
        if controls is not None:
            self.app.agent(raw_topic(self.app, settings, controls), name="controls")(self._control)

    async def _handle(self, partition: int, records: Sequence[ConsumerRecord]) -> None:
        await self._handler(self, partition, records)

    async def take(self, partition: int, records: Sequence[ConsumerRecord]) -> None:
        """Remember and acknowledge."""
        generation = self.intake.generation
        await asyncio.sleep(0.002)  # lets others run, as awaiting a producer does
        self.batches.append((partition, [record.offset for record in records]))
        self.intake.acknowledge(self.topic, partition, records[-1].offset + 1, generation)

    async def _control(self, stream: Any) -> None:
        async for event in stream.events():
            self.controls.append(event.value)

    async def _flush(self) -> None:
        self.flushes += 1

    @property
    def owned(self) -> set[int]:
        """Partitions of the batch topic."""
        try:
            return {tp.partition for tp in self.app.consumer.assignment() if tp.topic == self.topic}
        except Exception:  # not started yet
            return set()

    def offsets(self, partition: int) -> list[int]:
        """Offsets handed over, as they came."""
        return [offset for owner, batch in self.batches if owner == partition for offset in batch]


@pytest.fixture
async def members() -> AsyncIterator[list[Member]]:
    made: list[Member] = []
    yield made
    for member in made:
        with suppress(Exception):
            await asyncio.wait_for(member.app.stop(), 30)


async def until(condition: Callable[[], bool], what: str, seconds: float = LIMIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        await asyncio.sleep(0.02)


async def sent(settings: Settings, topic: str, number: int, partitions: Sequence[int] = range(PARTITIONS)) -> None:
    """Records without a transaction, spread evenly."""
    async with AIOKafkaProducer(**aiokafka_options(settings), linger_ms=5) as producer:
        waiting = [
            await producer.send(settings.topic_prefix + topic, b"%d" % i, partition=partitions[i % len(partitions)])
            for i in range(number)
        ]
        await asyncio.gather(*waiting)


async def in_transactions(
    settings: Settings, topic: str, number: int, size: int, aborted_every: int
) -> dict[int, list[int]]:
    """Offsets by partition that a reader of committed transactions sees. One transaction in `aborted_every` aborts."""
    visible: dict[int, list[int]] = defaultdict(list)
    name = settings.topic_prefix + topic
    async with AIOKafkaProducer(**aiokafka_options(settings), transactional_id=f"{name}-writer") as producer:
        for turn, first in enumerate(range(0, number, size)):
            await producer.begin_transaction()
            waiting = [
                await producer.send(name, b"%d" % i, partition=i % PARTITIONS) for i in range(first, first + size)
            ]
            written = await asyncio.gather(*waiting)
            if turn % aborted_every == aborted_every - 1:
                await producer.abort_transaction()
                continue
            await producer.commit_transaction()
            for metadata in written:
                visible[metadata.partition].append(metadata.offset)
    return {partition: sorted(offsets) for partition, offsets in visible.items()}


async def committed(settings: Settings, member: Member) -> dict[int, int]:
    """Offset that the group committed, by partition; 0 without one."""
    admin = AIOKafkaAdminClient(**aiokafka_options(settings))
    await admin.start()
    try:
        found = await admin.list_consumer_group_offsets(member.app.conf.id)
    finally:
        await admin.close()
    offsets = {key.partition: value.offset for key, value in found.items() if key.topic == member.topic}
    return {partition: offsets.get(partition, 0) for partition in range(PARTITIONS)}


async def ends(settings: Settings, topic: str) -> dict[int, int]:
    log = KafkaLog(settings)
    try:
        return {partition: await log.end(topic, partition) for partition in range(PARTITIONS)}
    finally:
        await log.close()


async def until_committed(settings: Settings, member: Member, expected: dict[int, int]) -> None:
    deadline = time.monotonic() + LIMIT
    while (found := await committed(settings, member)) != expected:
        assert time.monotonic() < deadline, f"committed {found}, not {expected}"
        await asyncio.sleep(0.2)


def is_handed(members: Sequence[Member], number: int) -> bool:
    return handed(members) == number


def handed(members: Sequence[Member]) -> int:
    return sum(len(offsets) for member in members for _, offsets in member.batches)


async def test_each_record_once_and_in_order_while_a_member_joins_and_leaves(
    settings: Settings, events: str, members: list[Member], tmp_path: Path
) -> None:
    visible = await in_transactions(settings, events, 8_000, 100, 5)
    first, second = Member(settings, tmp_path, events), Member(settings, tmp_path, events)
    members += [first, second]
    await first.app.start()
    await until(lambda: handed(members) > 0, "the first member is given records")
    writing = asyncio.create_task(in_transactions(settings, events, 16_000, 100, 5))
    await second.app.start()
    await until(lambda: len(first.owned) == len(second.owned) == PARTITIONS // 2, "the members share the partitions")
    await until(lambda: handed([second]) > 0, "the second member is given records")
    await asyncio.wait_for(second.app.stop(), 30)
    await until(lambda: len(first.owned) == PARTITIONS, "the first member is alone again")
    later = await writing
    complete = {partition: visible[partition] + later[partition] for partition in visible}
    total = sum(map(len, complete.values()))
    await until(lambda: handed(members) >= total, "every committed record was handed over")
    # Aborted records are never seen; the offsets of markers are passed over in the commit.
    await until_committed(settings, first, await ends(settings, events))
    for partition, offsets in complete.items():
        ours, theirs = first.offsets(partition), second.offsets(partition)
        assert sorted(ours + theirs) == offsets
        assert ours == sorted(ours)
        assert theirs == sorted(theirs)
    assert first.flushes >= 2, "before each rebalance"
    assert not first.app.crashed


async def test_a_handler_that_raises_crashes_the_app_and_a_restart_goes_on_at_the_commit(
    settings: Settings, events: str, members: list[Member], tmp_path: Path
) -> None:
    await sent(settings, events, 2_000)

    async def fails_at_200(member: Member, partition: int, records: Sequence[ConsumerRecord]) -> None:
        if partition == 1 and records[-1].offset >= 200:
            below = [record for record in records if record.offset < 200]
            if below:
                await member.take(partition, below)
            await member.intake.commit()
            raise RuntimeError("a batch that cannot be handled")
        await member.take(partition, records)

    failing = Member(settings, tmp_path, events, fails_at_200)
    members.append(failing)
    await failing.app.start()
    await until(lambda: failing.app.crashed, "the app crashes")
    assert str(failing.app.crash_reason) == "a batch that cannot be handled"
    await asyncio.wait_for(failing.app.stop(), 30)
    assert failing.flushes == 0, "what a failed handler left behind must not be written"
    before = await committed(settings, failing)
    assert before[1] == 200
    assert failing.offsets(1) == list(range(200))

    restarted = Member(settings, tmp_path, events)
    members.append(restarted)
    await restarted.app.start()
    await until_committed(settings, restarted, dict.fromkeys(range(PARTITIONS), 500))
    for partition in range(PARTITIONS):
        assert restarted.offsets(partition) == list(range(before[partition], 500))


async def test_one_slow_partition_stops_neither_the_others_nor_the_membership(
    settings: Settings, events: str, members: list[Member], tmp_path: Path
) -> None:
    released = asyncio.Event()

    async def slow_on_the_first(member: Member, partition: int, records: Sequence[ConsumerRecord]) -> None:
        if partition == 0:
            await released.wait()
        await member.take(partition, records)

    member = Member(settings, tmp_path, events, slow_on_the_first)
    members.append(member)
    await member.app.start()
    await until(lambda: len(member.owned) == PARTITIONS, "all partitions are assigned")
    generation, started = member.intake.generation, time.monotonic()
    turns = 0
    while time.monotonic() < started + SESSION_SECONDS + 2:
        turns += 1
        await sent(settings, events, 4_000)
        await until(partial(is_handed, members, turns * 3_000), "the others go on")
        # One batch is in the handler and one waits; the rest stays in the log.
        assert sum(len(batch.records) for batch in member.intake._waiting.values()) <= 500
        await asyncio.sleep(0.5)
    assert member.intake.generation == generation
    assert member.offsets(0) == []
    released.set()
    await until(lambda: len(member.offsets(0)) == turns * 1_000, "the slow one catches up")
    assert member.offsets(0) == list(range(turns * 1_000))
    await until_committed(settings, member, dict.fromkeys(range(PARTITIONS), turns * 1_000))


async def test_what_was_acknowledged_too_late_is_not_committed(
    settings: Settings, events: str, members: list[Member], tmp_path: Path
) -> None:
    async def keep(member: Member, partition: int, records: Sequence[ConsumerRecord]) -> None:
        member.batches.append((partition, [record.offset for record in records]))

    await sent(settings, events, 400)
    member, other = Member(settings, tmp_path, events, keep), Member(settings, tmp_path, events, keep)
    members += [member, other]
    await member.app.start()
    await until(lambda: handed([member]) == 400, "all is handed over")
    generation = member.intake.generation
    member.intake.acknowledge(member.topic, 0, 7, generation)
    await member.intake.commit()
    assert await committed(settings, member) == {0: 7, 1: 0, 2: 0, 3: 0}
    await other.app.start()
    await until(lambda: len(member.owned) == len(other.owned) == PARTITIONS // 2, "the members share the partitions")
    await until(lambda: handed([member, other]) == 800 - 7, "what was not committed is handed over again")
    assert member.intake.generation > generation
    for partition in range(PARTITIONS):
        assert not member.intake.is_current(member.topic, partition, generation)
        member.intake.acknowledge(member.topic, partition, 100, generation)
    await member.intake.commit()
    await other.intake.commit()
    assert await committed(settings, member) == {0: 7, 1: 0, 2: 0, 3: 0}


async def test_other_topics_reach_their_agents_also_while_a_member_joins_and_leaves(
    settings: Settings, events: str, members: list[Member], tmp_path: Path
) -> None:
    controls = await created(settings, "controls")
    members += [Member(settings, tmp_path, events, controls=controls) for _ in range(2)]
    first, second = members
    await first.app.start()
    await until(lambda: len(first.owned) == PARTITIONS, "all partitions are assigned")
    enough = asyncio.Event()

    async def write() -> set[bytes]:
        written: set[bytes] = set()
        async with AIOKafkaProducer(**aiokafka_options(settings)) as producer:
            while not enough.is_set():
                value = b"%d" % len(written)
                await producer.send_and_wait(
                    settings.topic_prefix + controls, value, partition=len(written) % PARTITIONS
                )
                written.add(value)
        return written

    writing = asyncio.create_task(write())
    await sent(settings, events, 1_000)
    await second.app.start()
    await until(lambda: len(first.owned) == len(second.owned) == PARTITIONS // 2, "the members share the partitions")
    await until(lambda: bool(second.controls), "both members are given controls")
    await asyncio.wait_for(second.app.stop(), 30)
    await until(lambda: len(first.owned) == PARTITIONS, "the first member is alone again")
    enough.set()
    written = await writing
    await until(lambda: written == {*first.controls, *second.controls}, "every control reaches an agent")
    assert handed(members) == 1_000


async def test_a_topic_made_anew_is_read_from_its_beginning_or_ends_the_app(
    settings: Settings, events: str, members: list[Member], tmp_path: Path
) -> None:
    await sent(settings, events, 2_000)
    member = Member(settings, tmp_path, events)
    members.append(member)
    await member.app.start()
    await until_committed(settings, member, dict.fromkeys(range(PARTITIONS), 500))
    admin = AIOKafkaAdminClient(**aiokafka_options(settings))
    await admin.start()
    await admin.delete_topics([member.topic])
    await asyncio.sleep(1)
    await admin.create_topics([NewTopic(member.topic, PARTITIONS, 1)])
    await admin.close()
    await sent(settings, events, 400)
    await until(lambda: member.app.crashed or handed(members) == 2_400, "it is read, or noticed")
    if not member.app.crashed:
        return
    assert isinstance(member.app.crash_reason, LogWentBackError)
    assert handed([member]) <= 2_400
    await asyncio.wait_for(member.app.stop(), 30)
    # Offsets of the topic before may have been committed when the new one was there: the watch app goes back itself.
    group = f"{member.topic}-group"
    AdminClient(confluent_options(settings)).delete_consumer_groups([group])[group].result()
    restarted = Member(settings, tmp_path, events)
    members.append(restarted)
    await restarted.app.start()
    await until_committed(settings, restarted, dict.fromkeys(range(PARTITIONS), 100))
    for partition in range(PARTITIONS):
        assert {*member.offsets(partition)[500:], *restarted.offsets(partition)} == set(range(100))


async def test_what_a_gap_holds_is_read_from_the_log_without_aborted_and_deleted_records(
    settings: Settings, events: str, caplog: pytest.LogCaptureFixture
) -> None:
    visible = await in_transactions(settings, events, 1_200, 40, 3)
    tp, end = TP(settings.topic_prefix + events, 1), visible[1][-1]
    found = [record.offset for record in await _read_between(settings, tp, 3, end)]
    assert found == [offset for offset in visible[1] if 3 <= offset < end]
    gaps = set(range(end)) - set(visible[1])
    marker = next(offset for offset in sorted(gaps) if offset + 1 in visible[1])
    assert await _read_between(settings, tp, marker, marker + 1) == []
    assert not [record for record in caplog.records if record.name == "agents.batch_intake"]
    admin = AIOKafkaAdminClient(**aiokafka_options(settings))
    await admin.start()
    try:
        await admin.delete_records({TopicPartition(*tp): RecordsToDelete(before_offset=50)})
    finally:
        await admin.close()
    found = [record.offset for record in await _read_between(settings, tp, 3, end)]
    assert found == [offset for offset in visible[1] if 50 <= offset < end]
    assert "offsets 3 to 49 were deleted before they were handled" in caplog.text


async def test_a_broker_that_stops_answering_past_the_session_loses_nothing(
    kafka: Stack, settings: Settings, events: str, members: list[Member], tmp_path: Path
) -> None:
    member = Member(settings, tmp_path, events)
    members.append(member)
    await sent(settings, events, 2_000)
    await member.app.start()
    await until(lambda: handed(members) > 0, "records are handed over")
    writing = asyncio.create_task(sent(settings, events, 8_000))
    kafka.local.pause_part("kafka")
    try:
        await asyncio.sleep(SESSION_SECONDS + 2)
    finally:
        kafka.local.resume_part("kafka")
    await writing
    await until_committed(settings, member, dict.fromkeys(range(PARTITIONS), 2_500))
    for partition in range(PARTITIONS):
        assert set(member.offsets(partition)) == set(range(2_500))
    assert not member.app.crashed


async def test_changelog_partitions_are_distributed_with_standbys_and_never_fetched(
    settings: Settings, events: str, members: list[Member], tmp_path: Path
) -> None:
    changelog = await created(settings, "changelog")
    await sent(settings, changelog, 400)
    full = settings.topic_prefix + changelog
    members += [Member(settings, tmp_path, events, changelog=changelog, replicas=1) for _ in range(2)]
    first, second = members
    await first.app.start()
    await second.app.start()
    everything = set(range(PARTITIONS))
    await until(lambda: len(first.owned) == len(second.owned) == PARTITIONS // 2, "the members share the partitions")
    await until(lambda: bool(standbys(first.app, full) and standbys(second.app, full)), "standbys are assigned")
    for owner, shadow in ((first, second), (second, first)):
        assert owner.owned == standbys(shadow.app, full)
        assert {TP(full, partition) for partition in everything} <= owner.app.consumer.assignment()
    assert first.owned | second.owned == everything
    await sent(settings, events, 400)
    await until(lambda: handed(members) == 400, "events are handed over")
    for member in members:
        consumer = member.app.consumer._thread._consumer
        assert consumer._fetcher._prefetch_backoff == PREFETCH_SECONDS
        assert {tp for tp in consumer.assignment() if tp.topic == full} == consumer.paused()
