"""Changelog, disk store and standby on real Kafka: what the owner of a partition writes is what the next one reads."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from confluent_kafka import TopicPartition as AdminPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exports without saying so
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from agents import changelog as changelog_module
from agents.changelog import NOBODY, Bounds, ChangelogError, PartitionChangelog, StaleOwnerError
from agents.disk_store import DiskStore
from agents.kafka_admin import aiokafka_options, create_topics, prefixed, topic_ids
from agents.kafka_clients import TopicMissingError
from agents.settings import Settings
from agents.standby import Standby
from streams import topics
from streams.state_table import Changes
from tests.conftest import Stack

pytestmark = pytest.mark.stack

PARTITION = 1
CHANGELOG = (next(topic for topic in topics.TOPICS if topic.name == topics.INTERESTS_CHANGELOG),)
VALUE = bytes(range(256)) * 9
"""As long as a state."""

_numbers = count()


@pytest.fixture
def settings(kafka: Stack, topic_prefix: str) -> Settings:
    """A changelog topic of this test alone."""
    made = replace(kafka.settings, topic_prefix=f"{topic_prefix}{next(_numbers)}-", partitions=2)
    create_topics(made, CHANGELOG)
    return made


@asynccontextmanager
async def opened(settings: Settings, partition: int = PARTITION) -> AsyncIterator[PartitionChangelog]:
    made = PartitionChangelog(settings, partition)
    await made.open()
    try:
        yield made
    finally:
        await made.close()


async def contents(made: PartitionChangelog, start: int | None = None) -> dict[bytes, bytes | None]:
    """What a table holds after recovery; None where a tombstone was read."""
    found: dict[bytes, bytes | None] = {}
    await made.recover(lambda keys, values, _: found.update(zip(keys, values, strict=True)), start)
    return found


async def committed(settings: Settings) -> dict[bytes, bytes | None]:
    """What the partition's next owner reads."""
    async with opened(settings) as made:
        return await contents(made)


def states(start: int, end: int, mark: bytes = b"") -> Changes:
    return Changes([b"user-%d" % i for i in range(start, end)], [mark + b"%d " % i + VALUE for i in range(start, end)])


def table(*changes: Changes) -> dict[bytes, bytes | None]:
    return {key: value for part in changes for key, value in zip(part.keys, part.values, strict=True)}


@asynccontextmanager
async def open_transaction(settings: Settings, transactional_id: str) -> AsyncIterator[AIOKafkaProducer]:
    """A producer that has written `user-0` to the changelog and does not commit."""
    producer = AIOKafkaProducer(
        **aiokafka_options(settings), transactional_id=transactional_id, transaction_timeout_ms=60_000
    )
    await producer.start()
    await producer.begin_transaction()
    await producer.send_and_wait(
        prefixed(settings, topics.INTERESTS_CHANGELOG), b"uncommitted", b"user-0", partition=PARTITION
    )
    try:
        yield producer
    finally:
        await producer.stop()


async def until_answering(settings: Settings) -> None:
    """A broker that was paused is out of its cluster for a while."""
    deadline = time.monotonic() + 60
    while True:
        try:
            async with opened(settings):
                return
        except ChangelogError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.5)


def owner_id(settings: Settings) -> str:
    return prefixed(settings, f"{topics.WATCH_APP}-{PARTITION}")


def configure(settings: Settings, **config: str) -> None:
    """Set topic settings of the changelog, dots written as underscores."""
    entries = [
        ConfigEntry(name.replace("_", "."), value, incremental_operation=AlterConfigOpType.SET)
        for name, value in config.items()
    ]
    name = prefixed(settings, topics.INTERESTS_CHANGELOG)
    resource = ConfigResource(ResourceType.TOPIC, name, incremental_configs=entries)
    admin = _admin(settings)
    admin.incremental_alter_configs([resource])[resource].result(30)


def recreate(settings: Settings) -> None:
    name = prefixed(settings, topics.INTERESTS_CHANGELOG)
    admin = _admin(settings)
    admin.delete_topics([name])[name].result(30)
    deadline = time.monotonic() + 30
    while True:
        try:
            create_topics(settings, CHANGELOG)
            return
        except Exception:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def _admin(settings: Settings) -> AdminClient:
    return AdminClient({"bootstrap.servers": settings.kafka_bootstrap})


class TestPartitionChangelog:
    async def test_what_is_flushed_is_recovered_in_order(self, settings: Settings) -> None:
        first, second = states(0, 1500), states(700, 2000, b"later ")
        async with opened(settings) as made:
            await made.flush(first)
            end = await made.flush(second)
            assert not made.failed
        async with opened(settings) as made:
            chunks: list[tuple[int, int]] = []
            found: dict[bytes, bytes | None] = {}

            def apply(keys: Sequence[bytes], values: Sequence[bytes | None], next_offset: int) -> None:
                found.update(zip(keys, values, strict=True))
                chunks.append((len(keys), next_offset))

            complete = await made.recover(apply)
            assert found == table(first, second)
            assert sum(size for size, _ in chunks) == 2800
            assert chunks == sorted(chunks, key=lambda chunk: chunk[1])
            assert chunks[-1][1] >= end
            assert complete >= end
            assert await contents(made, complete) == {}

    async def test_recovery_reads_on_from_an_offset(self, settings: Settings) -> None:
        async with opened(settings) as made:
            offset = await made.flush(states(0, 50))
            await made.flush(states(40, 60, b"tail "))
        async with opened(settings) as made:
            assert await contents(made, offset) == table(states(40, 60, b"tail "))

    async def test_tombstones_are_handed_on(self, settings: Settings) -> None:
        async with opened(settings) as made:
            await made.flush(states(0, 3))
            await made.flush(Changes([b"user-1"], [None]))
        assert (await committed(settings))[b"user-1"] is None

    async def test_an_empty_partition_and_an_empty_flush(self, settings: Settings) -> None:
        made = PartitionChangelog(settings, PARTITION)
        assert await made.open() == Bounds(0, 1)  # the barrier that stands for the end
        assert await contents(made) == {}
        assert await made.flush(Changes([], [])) == 1
        await made.close()

    async def test_partitions_are_apart(self, settings: Settings) -> None:
        async with opened(settings, 0) as other, opened(settings, 1) as made:
            await other.flush(states(0, 5))
            await made.flush(states(5, 10))
            await other.flush(states(0, 5, b"again "))
        assert await committed(settings) == table(states(5, 10))

    async def test_a_large_flush_takes_several_transactions(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(changelog_module, "TRANSACTION_BYTES", 2_500_000)
        changes = states(0, 4000)  # 9 MB
        async with opened(settings) as made:
            end = await made.flush(changes)
        assert 4000 + 2 <= end <= 4000 + 8  # each but the last ends with a marker before the next record
        assert await committed(settings) == table(changes)

    async def test_a_record_whose_place_the_broker_does_not_tell_is_an_error(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        create_topics(settings)
        async with opened(settings) as made:
            topic = prefixed(settings, topics.WATCH_POSITIONS)
            first = await made.record(topic, b"{}")
            producer, send = made._opened(), made._opened().send

            async def unknown(*arguments: Any, **named: Any) -> asyncio.Future[Any]:
                sent = await send(*arguments, **named)
                found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                found.set_result((await sent)._replace(offset=-1))
                return found

            assert await made.record(topic, b"{}") > first
            monkeypatch.setattr(producer, "send", unknown)
            with pytest.raises(ChangelogError, match="no longer knows where"):
                await made.record(topic, b"{}")

    async def test_values_larger_than_a_batch(self, settings: Settings) -> None:
        configure(settings, max_message_bytes="4000000")
        changes = Changes([b"a", b"large", b"z"], [b"1", b"x" * 2_000_000, b"2"])
        async with opened(settings) as made:
            await made.flush(changes)
        assert await committed(settings) == table(changes)

    async def test_what_the_topic_refuses_is_an_error_that_names_the_setting(self, settings: Settings) -> None:
        async with opened(settings) as made:
            await made.flush(states(0, 2))
            configure(settings, max_message_bytes="1000")
            with pytest.raises(ChangelogError, match=r"interests-changelog.*max\.message\.bytes"):
                await made.flush(states(0, 2, b"refused "))
            with pytest.raises(ChangelogError, match="after a flush that failed"):
                await made.flush(states(0, 1))
        configure(settings, max_message_bytes="1048588")
        assert await committed(settings) == table(states(0, 2))

    async def test_a_refused_batch_takes_the_rest_of_its_transaction_with_it(self, settings: Settings) -> None:
        async with opened(settings) as made:
            with pytest.raises(ChangelogError, match=r"max\.message\.bytes"):
                await made.flush(Changes([b"a", b"large", b"z"], [b"1", b"x" * 2_000_000, b"2"]))
        assert await committed(settings) == {}

    async def test_a_missing_topic_or_partition(self, kafka: Stack, settings: Settings) -> None:
        with pytest.raises(TopicMissingError, match="personas init"):
            await PartitionChangelog(replace(settings, topic_prefix=f"{settings.topic_prefix}no-"), 0).open()
        with pytest.raises(TopicMissingError, match="PERSONAS_PARTITIONS"):
            await PartitionChangelog(settings, 7).open()

    async def test_a_topic_made_anew_is_noticed(self, settings: Settings) -> None:
        async with opened(settings) as made:
            await made.flush(states(0, 100))
            recreate(settings)
            with pytest.raises(ChangelogError):
                await made.flush(states(0, 1))


class TestTransactions:
    async def test_what_the_last_owner_left_open_is_aborted(self, settings: Settings) -> None:
        async with opened(settings) as made:
            await made.flush(states(0, 3))
        async with open_transaction(settings, owner_id(settings)):
            assert await committed(settings) == table(states(0, 3))

    async def test_recovery_ends_where_only_control_records_follow(self, settings: Settings) -> None:
        async with opened(settings) as made:
            await made.flush(states(0, 3))
        for _ in range(3):
            async with open_transaction(settings, owner_id(settings)) as producer:
                await producer.abort_transaction()
        async with opened(settings) as made:
            assert await contents(made) == table(states(0, 3))
            assert await contents(made, 5) == {}  # behind the barrier, its marker and the states

    async def test_an_open_transaction_of_a_foreign_producer_stays_unseen(self, settings: Settings) -> None:
        async with opened(settings) as made:
            await made.flush(states(0, 3))
        async with open_transaction(settings, "foreign"):
            assert await committed(settings) == table(states(0, 3))

    async def test_a_cancelled_flush_is_never_seen(self, settings: Settings) -> None:
        async with opened(settings) as made:
            await made.flush(states(0, 3))
            flush = asyncio.create_task(made.flush(states(0, 20_000, b"cancelled ")))
            await asyncio.sleep(0.02)
            flush.cancel()
            with pytest.raises(asyncio.CancelledError):
                await flush
            assert made.failed
            with pytest.raises(ChangelogError, match="after a flush that failed"):
                await made.flush(states(0, 1))
        assert await committed(settings) == table(states(0, 3))

    @pytest.mark.parametrize("records", [3, 5_000])
    async def test_no_answer_is_not_taken_for_a_commit(
        self, settings: Settings, kafka: Stack, monkeypatch: pytest.MonkeyPatch, records: int
    ) -> None:
        monkeypatch.setattr(changelog_module, "FLUSH_SECONDS", 4.0)
        monkeypatch.setattr(changelog_module, "STOP_SECONDS", 1.0)
        made = PartitionChangelog(settings, PARTITION)
        await made.open()
        await made.flush(states(0, 3))
        kafka.local.pause_part("kafka")
        try:
            with pytest.raises(ChangelogError, match="may or may not be written"):
                await made.flush(states(0, records, b"unknown "))
            await made.close()
        finally:
            kafka.local.resume_part("kafka")
            await until_answering(settings)
        assert await committed(settings) in (table(states(0, 3)), table(states(0, records, b"unknown ")))


class TestStaleOwner:
    async def test_it_can_write_no_more(self, settings: Settings) -> None:
        async with opened(settings) as stale:
            await stale.flush(states(0, 3))
            async with opened(settings) as owner:
                with pytest.raises(StaleOwnerError, match="owned by another worker"):
                    await stale.flush(states(0, 3, b"stale "))
                await owner.flush(states(1, 2, b"new "))
                with pytest.raises(ChangelogError):
                    await stale.flush(states(0, 3, b"stale "))
        assert await committed(settings) == table(states(0, 3), states(1, 2, b"new "))

    async def test_it_cannot_confirm_that_it_owns_the_partition(self, settings: Settings) -> None:
        """As of a worker that was frozen between recovering states and reading what goes with them."""
        async with opened(settings) as stale:
            await contents(stale)
            await stale.confirm()
            async with opened(settings) as owner:
                await owner.flush(states(0, 3))
                with pytest.raises(StaleOwnerError):
                    await stale.confirm()
                await owner.confirm()
                await owner.flush(states(3, 5))
        assert await committed(settings) == table(states(0, 5))

    async def test_not_even_what_it_had_begun(self, settings: Settings) -> None:
        """As of a worker that was stopped between its records and their commit."""
        async with opened(settings) as stale:
            await stale.flush(states(0, 3))
            producer: Any = stale._producer
            await producer.begin_transaction()
            batch = producer.create_batch()
            for key, value in table(states(0, 3, b"stale ")).items():
                batch.append(timestamp=None, key=key, value=value)
            name, partition = stale._partition
            await (await producer.send_batch(batch, name, partition=partition))
            async with opened(settings) as owner:
                assert await contents(owner) == table(states(0, 3))
                await owner.flush(states(0, 1, b"new "))
                with pytest.raises(Exception, match="newer producer"):
                    await producer.commit_transaction()
                seen = {key: value for key, value in await committed_records(settings) if key != NOBODY}
                assert seen == table(states(0, 3), states(0, 1, b"new "))
        assert await committed(settings) == table(states(0, 3), states(0, 1, b"new "))

    async def test_nor_while_its_flush_is_under_way(self, settings: Settings) -> None:
        async def flush_on(stale: PartitionChangelog) -> None:
            for round_number in count():
                await stale.flush(states(0, 5_000, b"%d " % round_number))

        async with opened(settings) as stale:
            await stale.flush(states(0, 5_000, b"first "))
            flushing = asyncio.create_task(flush_on(stale))
            await asyncio.sleep(0.2)
            async with opened(settings) as owner:
                taken_over = await contents(owner)
                with pytest.raises(StaleOwnerError):
                    await flushing
                await owner.flush(states(0, 1, b"new "))
        assert len(taken_over) == 5_000
        assert len({(value or b"").split()[0] for value in taken_over.values()}) == 1  # whole transactions only
        assert await committed(settings) == taken_over | table(states(0, 1, b"new "))

    async def test_its_end_leaves_no_reports_of_forgotten_errors(
        self, settings: Settings, caplog: pytest.LogCaptureFixture
    ) -> None:
        gc.collect()  # what other tests left behind is not this one's
        caplog.clear()
        async with opened(settings) as stale:
            await stale.flush(states(0, 3))
            async with opened(settings):
                with pytest.raises(StaleOwnerError):
                    await stale.flush(states(0, 3, b"stale "))
        del stale
        gc.collect()
        assert [record for record in caplog.records if record.name == "asyncio"] == []

    async def test_what_it_commits_until_it_is_fenced_is_recovered(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with opened(settings) as stale:
            await stale.flush(states(0, 3))

            class LateProducer(AIOKafkaProducer):  # type: ignore[misc]  # aiokafka has no types
                async def start(self) -> None:
                    await stale.flush(states(1, 2, b"just in time "))
                    await super().start()

            monkeypatch.setattr(changelog_module, "AIOKafkaProducer", LateProducer)
            async with opened(settings) as owner:
                assert await contents(owner) == table(states(0, 3), states(1, 2, b"just in time "))

    async def test_the_newest_owners_values_outlive_compaction(self, settings: Settings) -> None:
        configure(settings, segment_ms="100", min_cleanable_dirty_ratio="0.01", min_compaction_lag_ms="0")
        async with opened(settings) as stale:
            await stale.flush(states(0, 200, b"old "))
            async with opened(settings) as owner:
                with pytest.raises(StaleOwnerError):
                    await stale.flush(states(0, 200, b"stale "))
                await owner.flush(states(0, 100, b"new "))
                await owner.flush(Changes([b"user-150"], [None]))
                await until_compacted(settings, owner)
        found = await committed(settings)
        expected = table(states(0, 200, b"old "), states(0, 100, b"new "))
        del expected[b"user-150"]
        assert {key: value for key, value in found.items() if value is not None and key != b"tick"} == expected


async def committed_records(settings: Settings) -> list[tuple[bytes, bytes | None]]:
    """What a reader of committed records sees now, in log order, without taking the partition over."""
    partition = TopicPartition(prefixed(settings, topics.INTERESTS_CHANGELOG), PARTITION)
    found: list[tuple[bytes, bytes | None]] = []
    async with AIOKafkaConsumer(**aiokafka_options(settings), isolation_level="read_committed") as consumer:
        consumer.assign([partition])
        await consumer.seek_to_beginning(partition)
        end = (await consumer.end_offsets([partition]))[partition]
        while await consumer.position(partition) < end:
            records = (await consumer.getmany(timeout_ms=200)).get(partition, ())
            found += [(record.key, record.value) for record in records]
    return found


async def until_compacted(settings: Settings, owner: PartitionChangelog) -> None:
    """Write until the broker has rolled and cleaned the log's older segments: one record left of each user."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        await owner.flush(Changes([b"tick"], [b"%f" % time.time()]))
        await asyncio.sleep(0.5)
        users = [key for key, _ in await committed_records(settings) if key != b"tick"]
        if len(users) == len(set(users)):
            return
    pytest.fail("the broker did not compact the changelog in time")


class TestDiskStoreOnTheLog:
    async def test_a_warm_store_reads_only_the_tail(self, settings: Settings, tmp_path: Path) -> None:
        ids = topic_ids(settings, [topics.INTERESTS_CHANGELOG])
        changelog_id = ids[topics.INTERESTS_CHANGELOG]
        async with opened(settings) as made:
            offset = await made.flush(states(0, 500))
            store = DiskStore.open(tmp_path / "store", changelog_id, "watch", Bounds(0, offset))
            store.write(states(0, 500).keys, states(0, 500).values, offset, 41)
            store.close()
            await made.flush(states(490, 510, b"tail "))
        made = PartitionChangelog(settings, PARTITION)
        store = DiskStore.open(tmp_path / "store", changelog_id, "watch", await made.open())
        read: list[bytes] = []

        def apply(keys: Sequence[bytes], values: Sequence[bytes | None], next_offset: int) -> None:
            read.extend(keys)
            store.write(keys, values, next_offset, 60)

        await made.recover(apply, store.offset)
        await made.close()
        assert len(read) == 20
        assert dict(store.items()) == table(states(0, 500), states(490, 510, b"tail "))
        assert store.highest_watch_offset == 60
        store.close()

    async def test_a_store_of_a_topic_made_anew_is_rebuilt(self, settings: Settings, tmp_path: Path) -> None:
        before = topic_ids(settings, [topics.INTERESTS_CHANGELOG])[topics.INTERESTS_CHANGELOG]
        async with opened(settings) as made:
            offset = await made.flush(states(0, 5))
        store = DiskStore.open(tmp_path / "store", before, "watch", Bounds(0, offset))
        store.write(states(0, 5).keys, states(0, 5).values, offset, 4)
        store.close()
        recreate(settings)
        async with opened(settings) as made:
            await made.flush(states(0, 100, b"anew "))
        after = topic_ids(settings, [topics.INTERESTS_CHANGELOG])[topics.INTERESTS_CHANGELOG]
        assert after != before
        made = PartitionChangelog(settings, PARTITION)
        store = DiskStore.open(tmp_path / "store", after, "watch", await made.open())
        await made.close()
        assert (store.offset, store.highest_watch_offset, list(store.keys())) == (None, -1, [])
        store.close()

    async def test_a_log_whose_beginning_was_cut_off_leaves_no_old_store(
        self, settings: Settings, tmp_path: Path
    ) -> None:
        configure(settings, cleanup_policy="compact,delete")
        async with opened(settings) as made:
            offset = await made.flush(states(0, 5))
            await made.flush(states(0, 50, b"later "))
        store = DiskStore.open(tmp_path / "store", "id", "watch", Bounds(0, offset))
        store.write(states(0, 5).keys, states(0, 5).values, offset, 4)
        store.close()
        cut = AdminPartition(prefixed(settings, topics.INTERESTS_CHANGELOG), PARTITION, offset + 10)
        admin = _admin(settings)
        for future in admin.delete_records([cut]).values():
            future.result(30)
        made = PartitionChangelog(settings, PARTITION)
        bounds = await made.open()
        assert bounds.beginning == offset + 10
        store = DiskStore.open(tmp_path / "store", "id", "watch", bounds)
        assert store.offset is None
        assert len(await contents(made, store.offset)) > 0
        with pytest.raises(ChangelogError, match="was cut"):
            await contents(made, 0)
        store.close()
        await made.close()


class TestStandby:
    @pytest.fixture
    async def standby(self, settings: Settings, tmp_path: Path) -> AsyncIterator[Standby]:
        ids = topic_ids(settings, [topics.INTERESTS_CHANGELOG])
        made = Standby(
            settings,
            lambda partition: tmp_path / str(partition),
            ids[topics.INTERESTS_CHANGELOG],
            "watch",
            lambda values: len(values),
        )
        await made.start()
        yield made
        await made.close()

    async def test_it_follows_what_is_committed(self, settings: Settings, standby: Standby, tmp_path: Path) -> None:
        running = asyncio.create_task(standby.run())
        async with opened(settings) as made:
            await made.flush(states(0, 3000))
            await standby.assign([0, PARTITION])
            await caught_up(standby, running)
            await made.flush(states(2990, 3010, b"tail "))
            await made.flush(Changes([b"user-5"], [None]))
            await caught_up(standby, running)
        await standby.release(PARTITION)
        assert standby.partitions == {0}
        made = PartitionChangelog(settings, PARTITION)
        changelog_id = topic_ids(settings, [topics.INTERESTS_CHANGELOG])[topics.INTERESTS_CHANGELOG]
        store = DiskStore.open(tmp_path / str(PARTITION), changelog_id, "watch", await made.open())
        expected = table(states(0, 3000), states(2990, 3010, b"tail "))
        del expected[b"user-5"]
        assert dict(store.items()) == expected
        assert store.highest_watch_offset > 0
        assert await contents(made, store.offset) == {}
        store.close()
        await made.close()
        await standby.close()
        await asyncio.wait_for(running, 10)

    async def test_it_writes_nothing_of_an_open_transaction(self, settings: Settings, standby: Standby) -> None:
        running = asyncio.create_task(standby.run())
        async with opened(settings) as made:
            await made.flush(states(0, 10))
        await standby.assign([PARTITION])
        async with open_transaction(settings, owner_id(settings)):
            await caught_up(standby, running)
            await asyncio.sleep(0.5)
            store = standby._stores[PARTITION]
            assert dict(store.items()) == table(states(0, 10))
        await standby.close()
        await asyncio.wait_for(running, 10)

    async def test_partitions_come_and_go(self, settings: Settings, standby: Standby, tmp_path: Path) -> None:
        running = asyncio.create_task(standby.run())
        async with opened(settings, 0) as first, opened(settings, 1) as second:
            await standby.assign([0])
            await first.flush(states(0, 10))
            await caught_up(standby, running)
            await standby.assign([1])
            fetching = standby._consumer.assignment()
            await standby.assign([1])
            assert standby._consumer.assignment() is fetching, "what was fetched is thrown away"
            await first.flush(states(0, 20, b"more "))
            await second.flush(states(20, 30))
            await caught_up(standby, running)
            assert dict(standby._stores[1].items()) == table(states(20, 30))
            await standby.assign([])
            assert await standby.lag() == {}
            await standby.assign([0, 1])
            await caught_up(standby, running)
            assert dict(standby._stores[0].items()) == table(states(0, 20, b"more "))
        await standby.close()
        await asyncio.wait_for(running, 10)

    async def test_an_error_ends_it(self, settings: Settings, standby: Standby) -> None:
        running = asyncio.create_task(standby.run())
        await standby.assign([PARTITION])
        standby._stores[PARTITION]._database.close()
        async with opened(settings) as made:
            await made.flush(states(0, 10))
        with pytest.raises(Exception, match=r"disk store .* fails"):
            await asyncio.wait_for(running, 10)


async def caught_up(standby: Standby, running: asyncio.Task[None]) -> None:
    """Until every followed store has all that is committed."""
    deadline = time.monotonic() + 30
    while sum((await standby.lag()).values()):
        assert time.monotonic() < deadline
        assert not running.done()
        await asyncio.sleep(0.05)
