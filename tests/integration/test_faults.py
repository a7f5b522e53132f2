"""Kafka, Cassandra, Triton and the workers themselves fail: every request is answered once, and every event counted.

The tests share one watch worker and one Cassandra keyspace, and bring viewers of their own. Each can run alone.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from functools import partial
from itertools import count

import orjson
import pytest

from agents.kafka_log import KafkaLog
from agents.settings import Settings
from agents.stores.cassandra import CassandraStore
from streams import topics
from streams.decoding import decode_persona, decode_record, decode_request
from streams.personas import ErasureReceipt, receipt_key
from streams.records import Persona, RefreshRequest, Tier
from streams.state import from_bytes
from tests.builders import START, control
from tests.conftest import Stack
from tests.workers import (
    WorkerProcess,
    Workers,
    by_key,
    committed,
    finished,
    read,
    send,
    table_of,
    until,
    until_counted,
    with_topics_and_schema,
)

pytestmark = pytest.mark.stack

GATE = 20
"""Watches before the first persona: fewer show no interest."""
SHUTDOWN_SECONDS = 15
"""Limit of a stop. Half of it is for personas that are being worded, which the student may well use up."""
ANSWERED = 240.0
"""Limit for a scenario's personas; a quiet machine needs a second for each."""
_topic = count()


@pytest.fixture(scope="module")
def settings(stack: Stack, topic_prefix: str, keyspace: str) -> Settings:
    made = replace(
        stack.settings,
        topic_prefix=topic_prefix,
        cassandra_keyspace=keyspace,
        partitions=2,
        template_after=0,
        first_persona_after=GATE,
        student_deadline_seconds=30.0,
        shutdown_seconds=float(SHUTDOWN_SECONDS),
    )
    return with_topics_and_schema(made)


@pytest.fixture(autouse=True)
def _whole_stack(stack: Stack) -> Iterator[None]:
    """Whatever a test stops or pauses is back for the next one."""
    yield
    for part in ("kafka", "cassandra", "triton"):
        stack.local.resume_part(part)
        stack.local.start_part(part)


@pytest.fixture(scope="module")
async def store(settings: Settings) -> AsyncIterator[CassandraStore]:
    store = await CassandraStore.connect(settings)
    yield store
    await store.close()


@pytest.fixture
async def log(settings: Settings) -> AsyncIterator[KafkaLog]:
    log = KafkaLog(settings)
    yield log
    await log.close()


def watches(user: str, first: int = 0, number: int = GATE) -> list[tuple[bytes, bytes]]:
    """Watches of two topics that no other viewer has together, so that nothing is cached already."""
    turn = next(_topic)
    topic, other = (turn * 2) % 115, (turn * 2 + 37) % 115
    return [
        (
            user.encode(),
            orjson.dumps(
                {
                    "user_id": user,
                    "video_id": f"v{23 * (other if i % 2 else topic) + 1 + i:04}",
                    "ts": START + i * 3_600_000,
                    "event_id": f"{user}/{i}",
                }
            ),
        )
        for i in range(first, first + number)
    ]


async def watch(settings: Settings, *users: str) -> None:
    """Each viewer watches enough for one persona."""
    await send(settings, topics.WATCH_EVENTS, [record for user in users for record in watches(user)])


def named(scenario: str, number: int) -> list[str]:
    return [f"{scenario}-{i}" for i in range(number)]


def ensure(workers: Workers, role: str) -> WorkerProcess:
    """A running worker of this role."""
    return next(iter(workers.running(role)), None) or workers.start(role, page=role == "persona")


async def is_ready(worker: WorkerProcess) -> bool:
    return (await worker.readiness())[0] == 200


def requests_of(settings: Settings, users: list[str]) -> dict[str, list[RefreshRequest]]:
    found: dict[str, list[RefreshRequest]] = {user: [] for user in users}
    for message in read(settings, topics.REFRESH_REQUESTS):
        request = decode_request(message.value())
        assert isinstance(request, RefreshRequest)
        if request.user_id in found:
            found[request.user_id].append(request)
    return found


def published(settings: Settings, users: list[str]) -> dict[str, list[bytes | None]]:
    values = by_key(read(settings, topics.PERSONAS))
    return {user: values[user] for user in users if user in values}


async def until_answered(settings: Settings, workers: Workers, log: KafkaLog, users: list[str]) -> None:
    """Wait until every viewer has a persona and every request, upgrades included, is committed."""
    await until(lambda: set(published(settings, users)) == set(users), workers, ANSWERED, 0.5)
    for topic in (topics.REFRESH_REQUESTS, topics.UPGRADE_REQUESTS):
        await until(partial(finished, settings, log, topics.PERSONA_APP, topic), workers, ANSWERED, 0.5)


async def assert_answered_once(settings: Settings, store: CassandraStore, users: list[str]) -> list[Persona]:
    """Each request has one version per tier, the same bytes in Cassandra and on the topic. Returns the latest ones."""
    latest: list[Persona] = []
    values = published(settings, users)
    for user, requests in requests_of(settings, users).items():
        (request,) = {request.request_id: request for request in requests}.values()
        stored = {row.version: row for row in await store.history(user)}
        bodies = [value or b"" for value in values[user]]
        personas = [decode_persona(body) for body in bodies]
        assert {persona.request_id for persona in personas} == {request.request_id}
        assert {persona.version for persona in personas} == stored.keys()
        # A restart may publish again, but never other bytes.
        assert {(p.version, body) for p, body in zip(personas, bodies, strict=True)} == {
            (row.version, row.body) for row in stored.values()
        }
        assert len(stored) == len({row.tier for row in stored.values()})
        row = await store.latest(user)
        assert row is not None
        assert row.body == bodies[-1]
        latest.append(personas[-1])
    return latest


def assert_worded(personas: list[Persona]) -> None:
    """The student was asked for each; a model this small may word some unusably, which are then templates."""
    assert all(persona.model.tokens_out > 0 or persona.cached for persona in personas)
    students = [persona for persona in personas if persona.tier is Tier.STUDENT]
    assert len(students) >= 0.5 * len(personas), [(persona.user_id, persona.tier) for persona in personas]


async def test_workers_wait_for_kafka_and_requests_wait_for_the_student(
    stack: Stack, settings: Settings, workers: Workers, store: CassandraStore, log: KafkaLog
) -> None:
    users = named("waiting", 5)
    for part in ("triton", "kafka"):
        stack.local.stop_part(part)
    watching, first = workers.start("watch"), workers.start("persona", page=True)
    message = f"waiting for Kafka at {settings.kafka_bootstrap}"
    await until(lambda: message in watching.text() and message in first.text(), workers)
    assert watching.running
    assert first.running
    stack.local.start_part("kafka")
    await until(lambda: "worker ready" in watching.text() and "worker ready" in first.text(), workers)

    async def degraded() -> bool:
        status, parts = await first.readiness()
        return status == 200 and parts == {"kafka": "ok", "store": "ok", "persona app": "degraded"}

    await until(degraded, workers)  # also before the first request
    await watch(settings, *users)
    await until_counted(settings, workers)
    await until(lambda: "the student is unavailable, requests wait" in first.text(), workers)

    # Another worker joins while requests wait: partitions move without waiting for them, and they are read again.
    second = workers.start("persona", page=True)
    await until(lambda: "the student is unavailable, requests wait" in second.text(), workers, seconds=45)
    assert settings.triton_url in second.text()
    assert await degraded()
    assert sum(await committed(settings, log, topics.PERSONA_APP, topics.REFRESH_REQUESTS)) == 0
    assert published(settings, users) == {}

    stack.local.start_part("triton")
    await until_answered(settings, workers, log, users)
    personas = await assert_answered_once(settings, store, users)
    assert_worded(personas)
    for worker in (first, second):
        assert (await worker.readiness())[1]["persona app"] == "ok"
        assert "student answers again" in worker.text()
    assert second.stop() == 0, workers.logs()


async def test_triton_dies_while_it_words(
    stack: Stack, settings: Settings, workers: Workers, store: CassandraStore, log: KafkaLog
) -> None:
    users = named("triton", 5)
    ensure(workers, "watch")
    ensure(workers, "persona")
    await watch(settings, *users)
    await until(lambda: len(published(settings, users)) > 0, workers, ANSWERED)
    stack.local.kill_part("triton")
    assert len(published(settings, users)) < len(users)
    stack.local.start_part("triton")
    await until_answered(settings, workers, log, users)
    assert_worded(await assert_answered_once(settings, store, users))


async def test_workers_frozen_and_killed_while_they_answer(
    settings: Settings, workers: Workers, store: CassandraStore, log: KafkaLog
) -> None:
    """One freezes, the next owner of its partitions is killed, the third answers; then the first one wakes up."""
    users = named("killed", 6)
    ensure(workers, "watch")
    frozen = ensure(workers, "persona")

    async def another_persona() -> None:
        known = len(published(settings, users))
        await until(lambda: len(published(settings, users)) > known, workers, ANSWERED, 0.1)

    await watch(settings, *users)
    await another_persona()
    frozen.process.send_signal(signal.SIGSTOP)
    killed = workers.start("persona")
    await another_persona()
    killed.kill()
    assert len(published(settings, users)) < len(users)
    workers.start("persona", page=True)
    await until(lambda: len(published(settings, users)) == len(users), workers, ANSWERED)
    frozen.process.send_signal(signal.SIGCONT)
    await until_answered(settings, workers, log, users)
    # It gives up what it held when it learns that its partitions have moved, and takes part again.
    await until(lambda: len(published(settings, users)) == len(users) and rejoined(frozen), workers)
    assert_worded(await assert_answered_once(settings, store, users))
    assert frozen.stop() == 0, workers.logs()


def rejoined(worker: WorkerProcess) -> bool:
    return worker.text().count("Setting newly assigned partitions") > 1


async def test_cassandra_does_not_answer_for_a_while(
    stack: Stack, settings: Settings, workers: Workers, store: CassandraStore, log: KafkaLog
) -> None:
    users = named("cassandra", 3)
    ensure(workers, "watch")
    worker = ensure(workers, "persona")
    await until(lambda: "worker ready" in worker.text(), workers)
    before = await committed(settings, log, topics.PERSONA_APP, topics.REFRESH_REQUESTS)
    stack.local.pause_part("cassandra")
    await watch(settings, *users)
    await until_counted(settings, workers)  # counting goes on
    await until(lambda: "is tried again" in worker.text(), workers)
    status, parts = await worker.readiness()
    assert (status, parts["persona app"], parts["store"]) == (503, "down", "down")
    assert await committed(settings, log, topics.PERSONA_APP, topics.REFRESH_REQUESTS) == before
    assert published(settings, users) == {}
    stack.local.resume_part("cassandra")
    await until_answered(settings, workers, log, users)
    await assert_answered_once(settings, store, users)
    assert worker.running

    await until(partial(is_ready, worker), workers)


async def test_an_erasure_overtakes_what_the_student_still_words(
    stack: Stack, settings: Settings, workers: Workers, store: CassandraStore, log: KafkaLog
) -> None:
    """The student does not answer; counting and erasing go on."""
    users = named("erased", 4)
    leaving, staying = users[:2], users[2:]
    ensure(workers, "watch")
    worker = ensure(workers, "persona")
    stack.local.pause_part("triton")
    await watch(settings, *users)
    await until_counted(settings, workers)
    await until(lambda: all(requests_of(settings, users).values()), workers)
    erasing = [control(user, "erase") for user in leaving]
    await send(settings, topics.USER_CONTROLS, [(event.key, event.value) for event in erasing])
    await until(lambda: set(published(settings, users)) == set(leaving), workers)
    assert (await worker.readiness())[1]["persona app"] == "degraded"
    stack.local.resume_part("triton")
    await until_answered(settings, workers, log, users)

    await assert_answered_once(settings, store, staying)
    receipts = by_key(read(settings, topics.ERASURE_RECEIPTS))
    states = table_of(settings)
    for user in leaving:
        assert set(published(settings, [user])[user]) == {None}
        assert await store.latest(user) is None
        assert await store.history(user) == []
        (receipt,) = {decode_record(ErasureReceipt, value or b"").epoch for value in receipts[receipt_key(user)]}
        assert receipt == int(from_bytes(states[user])["epoch"]) == 1
        assert int(from_bytes(states[user])["events"]) == 0
    assert not any(
        user.encode() in (value or b"") for values in receipts.values() for value in values for user in users
    )


async def test_kafka_does_not_answer_for_a_while(
    stack: Stack, settings: Settings, workers: Workers, store: CassandraStore, log: KafkaLog
) -> None:
    users = named("kafka", 4)
    watching, wording = ensure(workers, "watch"), ensure(workers, "persona")
    await until(lambda: "worker ready" in watching.text() and "worker ready" in wording.text(), workers)
    await watch(settings, *users[:2])
    await until(lambda: len(published(settings, users)) > 0, workers, ANSWERED)
    stack.local.pause_part("kafka")
    await asyncio.sleep(5)
    # A stop cannot commit now, and must not wait for it: what is not committed is read again.
    began = time.monotonic()
    assert await asyncio.to_thread(watching.stop) == 1, workers.logs()
    assert time.monotonic() - began < SHUTDOWN_SECONDS + 6
    assert "did not stop within" in watching.text()
    stack.local.resume_part("kafka")
    await watch(settings, *users[2:])
    ensure(workers, "watch")
    await until_counted(settings, workers)
    await until_answered(settings, workers, log, users)
    await assert_answered_once(settings, store, users)
    states = table_of(settings)
    assert [int(from_bytes(states[user])["events"]) for user in users] == [GATE] * len(users)
    assert wording.running


async def test_a_busy_worker_stops_in_time(
    settings: Settings, workers: Workers, store: CassandraStore, log: KafkaLog
) -> None:
    users = named("stopped", 6)
    ensure(workers, "watch")
    worker = ensure(workers, "persona")
    await watch(settings, *users)
    await until(lambda: len(published(settings, users)) > 0, workers, ANSWERED)
    began = time.monotonic()
    assert await asyncio.to_thread(worker.stop) == 0, worker.text()
    assert time.monotonic() - began < SHUTDOWN_SECONDS
    assert not worker.discovery.exists()
    successor = ensure(workers, "persona")
    await until_answered(settings, workers, log, users)
    await assert_answered_once(settings, store, users)
    # The first worker may have left nothing to word, and Python that is still importing dies of SIGTERM.
    await until(partial(is_ready, successor), workers)
    for last in [*workers.running("watch"), *workers.running("persona")]:
        assert await asyncio.to_thread(last.stop) == 0, last.text()
        assert "Traceback" not in last.text(), last.text()
