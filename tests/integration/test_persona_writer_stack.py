"""The persona writer and the commands around it on real Kafka, Cassandra and Triton."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from threading import Event

import numpy as np
import orjson
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from agents.kafka_admin import prefixed
from agents.persona_writer import Outcome, PersonaWriter
from agents.settings import Settings
from agents.stores.cassandra import CassandraStore
from agents.student_client import StudentClient, TritonStudent
from agents.telemetry import create_telemetry
from agents.topic_reader import TopicReader
from agents.writer_configuration import WriterConfiguration
from streams import topics
from streams.controls import apply_control
from streams.decoding import Rejected, decode_control, decode_persona, decode_record
from streams.identifiers import murmur2_partition, video_key
from streams.personas import ErasureReceipt, content_keys, receipt_key
from streams.records import Command, ControlKind, RefreshRequest, UserControl, encode
from streams.state import from_bytes, new_state, to_bytes
from streams.watch import InputRecord, Output
from tests.builders import make_model, make_registry
from tests.command_line import run
from tests.conftest import Stack
from tests.request_samples import HOUR, sample_request
from tests.workers import with_topics_and_schema

pytestmark = pytest.mark.stack

PARTITIONS = 2


def prepared(settings: Settings, topic_prefix: str, keyspace: str) -> Settings:
    made = replace(settings, topic_prefix=topic_prefix, cassandra_keyspace=keyspace, partitions=PARTITIONS)
    return with_topics_and_schema(made)


@pytest.fixture(scope="module")
def settings(kafka: Stack, cassandra: Stack, topic_prefix: str, keyspace: str) -> Settings:
    return prepared(kafka.settings, topic_prefix, keyspace)


@asynccontextmanager
async def publisher(settings: Settings) -> AsyncIterator[Callable[[Sequence[Output]], Awaitable[None]]]:
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap, acks="all")
    await producer.start()

    async def publish(outputs: Sequence[Output]) -> None:
        for output in outputs:
            await producer.send_and_wait(
                prefixed(settings, output.topic),
                output.value,
                output.key,
                output.partition,
                headers=list(output.headers),
            )

    try:
        yield publish
    finally:
        await producer.stop()


@asynccontextmanager
async def writing(
    settings: Settings, student: StudentClient | None, done: list[tuple[str, int, int]]
) -> AsyncIterator[PersonaWriter]:
    store = await CassandraStore.connect(settings)
    async with publisher(settings) as publish:
        writer = PersonaWriter(
            store,
            student,
            publish,
            WriterConfiguration(topic_prefix=settings.topic_prefix),
            lambda: time.time_ns() // 1_000_000,
            create_telemetry({}),
            lambda *position: done.append(position),
        )
        try:
            yield writer
        finally:
            await writer.stop(5)
            await store.close()


def record(offset: int, request: RefreshRequest) -> InputRecord:
    return InputRecord(offset, request.user_id.encode(), encode(request), time.time_ns() // 1_000_000)


def published(settings: Settings, topic: str, key: str) -> list[bytes | None]:
    with TopicReader(settings) as reader:
        records = [(r.key(), r.value()) for r in reader.read(prefixed(settings, topic))]
    return [value for found, value in records if found == key.encode()]


async def test_the_student_words_personas_that_reach_cassandra_and_the_topic(stack: Stack, settings: Settings) -> None:
    student = TritonStudent(settings)
    done: list[tuple[str, int, int]] = []
    async with writing(settings, student, done) as writer:
        await writer.submit(record(0, sample_request("ann", 1)), 1)
        await writer.idle()
        await writer.submit(record(1, sample_request("bob", 1)), 1)
        await writer.idle()
        store = await CassandraStore.connect(settings)
        rows = [await store.latest(user) for user in ("ann", "bob")]
        student_id = await student.identity()
        assert student_id is not None
        keys = list(content_keys(sample_request(), student_id))
        cached = await store.wordings(keys)
        await store.close()
    await student.close()
    assert done == [(topics.REFRESH_REQUESTS, 1, 0), (topics.REFRESH_REQUESTS, 1, 1)]
    for user, row in zip(("ann", "bob"), rows, strict=True):
        assert row is not None
        assert published(settings, topics.PERSONAS, user) == [row.body]
    ann, bob = (decode_persona(row.body) for row in rows if row is not None)
    assert ann.model.latency_ms > 0
    # A model this small may word one text badly twice; most texts it must word, and none of those is paid for again.
    assert len(cached) >= len(keys) - 1
    assert bob.model.tokens_out < ann.model.tokens_out
    said = {text.decode() for text in cached.values()}
    of_ann, of_bob = ({persona.summary, *(i.description for i in persona.interests)} for persona in (ann, bob))
    assert len(of_ann & of_bob & said) >= 2


async def test_without_a_student_the_template_waits_for_an_upgrade_and_an_erasure_leaves_nothing(
    settings: Settings,
) -> None:
    closed = replace(settings, triton_url="127.0.0.1:9", student_deadline_seconds=1.0)
    student = TritonStudent(closed)
    done: list[tuple[str, int, int]] = []
    async with writing(settings, student, done) as writer:
        uncached = replace(sample_request("cat", 1, expires_after_ms=300), registry_version=2)
        await writer.submit(record(0, uncached), 0)
        await writer.idle()
        assert not writer.student_available
        assert writer.counts == {Outcome.TEMPLATE: 1}
        assert len(published(settings, topics.UPGRADE_REQUESTS, "cat")) == 1
        await writer.submit(record(1, sample_request("cat", 2, epoch=1, command=Command.ERASE)), 0)
        await writer.idle()
        store = await CassandraStore.connect(settings)
        assert await store.latest("cat") is None
        assert await store.history("cat") == []
        await store.close()
    await student.close()
    template, tombstone = published(settings, topics.PERSONAS, "cat")
    assert template is not None
    assert tombstone is None
    (receipt,) = published(settings, topics.ERASURE_RECEIPTS, receipt_key("cat"))
    assert receipt is not None
    assert decode_record(ErasureReceipt, receipt).epoch == 1


# Commands


def test_control_sends_what_the_watch_app_accepts(settings: Settings) -> None:
    result = run(settings, "control", "zoë", "hide", "--cluster", "12", "--json")
    assert result.exit_code == 0
    sent = orjson.loads(result.stdout)
    (value,) = published(settings, topics.USER_CONTROLS, "zoë")
    decoded = decode_control(value, "zoë".encode(), append_time=sent["ts"])
    assert not isinstance(decoded, Rejected)
    assert decoded.record == UserControl(sent["control_id"], "zoë", ControlKind.HIDE, sent["ts"], cluster_id=12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ann", "hide"], "hide needs --cluster"),
        (["ann", "opt_out", "--cluster", "1"], "opt_out takes no --cluster"),
        (["ann", "forget_video"], "forget_video needs --video"),
        (["ann", "erase", "--video", "v"], "erase takes no --video"),
        (["", "opt_out"], "user_id is empty"),
        (["a\tb", "opt_out"], "control characters"),
        (["x" * 513, "opt_out"], "more than 512"),
        (["ann", "explode"], "is not one of"),
    ],
)
def test_a_control_that_would_be_refused_is_not_sent(arguments: list[str], message: str) -> None:
    result = run(Settings(kafka_bootstrap="127.0.0.1:9"), "control", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_control_without_topics_or_broker_says_so(kafka: Stack) -> None:
    absent = run(replace(kafka.settings, topic_prefix="nowhere-"), "control", "ann", "opt_out")
    assert absent.exit_code == 1
    assert "run `personas init`" in absent.stderr
    refused = run(Settings(kafka_bootstrap="127.0.0.1:9"), "control", "ann", "opt_out")
    assert refused.exit_code == 1
    assert "does not answer" in refused.stderr


def test_erase_without_workers_says_what_is_missing(settings: Settings) -> None:
    result = run(settings, "erase", "eve", "--yes", "--wait", "1", "--json")
    assert result.exit_code == 1
    document = orjson.loads(result.stdout)
    assert document["receipt"] is None
    assert len(document["missing"]) == 4
    assert "goes on as soon as the workers run" in result.stderr
    assert len(published(settings, topics.USER_CONTROLS, "eve")) == 1


def test_erase_asks_before_it_sends(settings: Settings) -> None:
    assert run(settings, "erase", "fay").exit_code == 1
    assert published(settings, topics.USER_CONTROLS, "fay") == []


def test_erase_waits_until_everything_is_gone_and_prints_the_receipt(settings: Settings) -> None:
    run_async(store_persona(settings, "gus", sequence=1))
    with a_worker(settings):
        result = run(settings, "erase", "gus", "--yes", "--wait", "30")
    assert result.exit_code == 0, result.output
    receipt = orjson.loads(result.stdout)
    assert receipt["user_sha256"] == receipt_key("gus")
    assert receipt["epoch"] == 1
    assert "gus" not in result.stdout
    after = run(settings, "export", "gus", "--json")
    document = orjson.loads(after.stdout)
    assert document["latest"] is None
    assert document["history"] == []
    assert document["interests"]["epoch"] == 1
    assert document["interests"]["clusters"] == document["interests"]["last_events"] == []


def test_export_prints_everything_stored(settings: Settings) -> None:
    run_async(store_persona(settings, "hal", sequence=1))
    state = new_state()
    state["events"], state["sequence"] = 3, 1
    state["cluster"][0], state["long"][0], state["hidden"][0] = 5, 2.5, 7
    state["evidence_video"][0][0], state["evidence_ts"][0][0] = np.uint64(video_key("v-unknown")), 1_700_000_000_000
    state["ring_used"], state["ring_video"][0], state["ring_ts"][0] = 1, np.uint64(video_key("v-unknown")), 5
    run_async(store_state(settings, "hal", to_bytes(state)))
    result = run(settings, "export", "hal")
    assert result.exit_code == 0
    document = orjson.loads(result.stdout)
    assert document["latest"]["user_id"] == "hal"
    assert [version["version"] for version in document["history"]] == [document["latest"]["version"]]
    interests = document["interests"]
    assert (interests["events"], interests["opted_out"]) == (3, False)
    (cluster,) = interests["clusters"]
    assert (cluster["cluster_id"], cluster["long"]) == (5, 2.5)
    assert cluster["evidence"] == [{"video_id": f"key:{video_key('v-unknown'):016x}", "ts": 1_700_000_000_000}]
    assert [hidden["cluster_id"] for hidden in interests["hidden"]] == [7]
    assert interests["last_events"][0]["ts"] == 5


def test_export_of_a_stranger_is_empty(settings: Settings) -> None:
    result = run(settings, "export", "nobody", "--json")
    assert result.exit_code == 0
    assert orjson.loads(result.stdout) == {"user_id": "nobody", "latest": None, "history": [], "interests": None}


# What the commands need around them


def run_async(awaitable: Awaitable[None]) -> None:
    """Run beside the session's event loop, in a thread, as the commands' own loops do."""

    async def awaited() -> None:
        await awaitable

    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: asyncio.run(awaited())).result(60)


async def store_persona(settings: Settings, user_id: str, sequence: int) -> None:
    async with writing(settings, None, []) as writer:
        await writer.submit(record(0, sample_request(user_id, sequence, expires_after_ms=HOUR)), 0)
        await writer.idle()


async def store_state(settings: Settings, user_id: str, value: bytes) -> None:
    partition = murmur2_partition(user_id.encode(), PARTITIONS)
    async with publisher(settings) as publish:
        await publish([Output(topics.INTERESTS_CHANGELOG, user_id.encode(), value, partition=partition)])


@contextmanager
def a_worker(settings: Settings) -> Iterator[None]:
    """Answers controls as a worker does, state by state, until the block ends."""
    ready, stop = Event(), Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: asyncio.run(_serve_controls(settings, ready, stop)))
        assert ready.wait(30)
        try:
            yield
        finally:
            stop.set()
            running.result(30)


async def _serve_controls(settings: Settings, ready: Event, stop: Event) -> None:
    consumer = AIOKafkaConsumer(prefixed(settings, topics.USER_CONTROLS), bootstrap_servers=settings.kafka_bootstrap)
    await consumer.start()
    await consumer.seek_to_end()
    ready.set()
    try:
        async with writing(settings, None, []) as writer, publisher(settings) as publish:
            while not stop.is_set():
                for batch in (await consumer.getmany(timeout_ms=100)).values():
                    for item in batch:
                        decoded = decode_control(item.value, item.key, append_time=item.timestamp)
                        assert not isinstance(decoded, Rejected)
                        state, command = apply_control(new_state(), decoded.record, make_model(make_registry()))
                        assert command is Command.ERASE
                        request = replace(
                            sample_request(decoded.record.user_id, 2, epoch=int(state["epoch"]), command=command),
                            request_id="f00d",
                        )
                        await writer.submit(record(item.offset, request), item.partition)
                        await asyncio.sleep(0.3)
                        value = to_bytes(state)
                        assert int(from_bytes(value)["epoch"]) == 1
                        key = item.key
                        await publish([Output(topics.INTERESTS_CHANGELOG, key, value, partition=item.partition)])
    finally:
        await consumer.stop()
