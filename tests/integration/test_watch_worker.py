"""Watch workers on real Kafka: killed, restarted and stopped, they end with the reference's very bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from aiokafka import AIOKafkaProducer

from agents.artefacts import load_configuration
from agents.kafka_admin import create_topics, prefixed, topic_ids
from agents.replay import Event, ReplayDriver
from agents.settings import Settings
from agents.topic_reader import TopicReader
from streams import topics
from streams.state import OPTED_OUT, from_bytes, to_bytes
from tests.builders import START, control
from tests.conftest import Stack
from tests.workers import Workers, send, table_of, until, until_counted

pytestmark = pytest.mark.stack

USERS, EVENTS = 40, 90


@pytest.fixture(scope="module")
def settings(kafka: Stack, topic_prefix: str) -> Settings:
    settings = replace(kafka.settings, topic_prefix=topic_prefix, template_after=0)
    create_topics(settings)
    return settings


@pytest.fixture
def workers(settings: Settings, tmp_path: Path) -> Iterator[Workers]:
    workers = Workers(settings, tmp_path)
    yield workers
    workers.end()


def log_of(seed: int) -> list[tuple[bytes, bytes]]:
    """(key, value) of every event: drifting viewers over the packaged registry's videos, with some broken lines."""
    random = np.random.default_rng(seed)
    records = []
    for i in range(EVENTS):
        for user in range(USERS):
            block = (user * 7 + (0 if i < EVENTS // 2 else 400)) % 2000
            video = f"v{block + 1 + int(random.integers(60)):04}"
            event = {
                "user_id": f"user-{user}",
                "video_id": video,
                "ts": START + i * 40 * 60_000,
                "event_id": f"{user}/{i}",
            }
            records.append((f"user-{user}".encode(), orjson.dumps(event)))
    records[100:100] = [(b"user-1", b"broken"), (b"user-2", b'{"user_id": "someone else"}')]
    return records


async def trickle(settings: Settings, records: list[tuple[bytes, bytes]], seconds: float) -> None:
    """Send records evenly over some time."""
    step = max(1, round(len(records) / (seconds * 20)))
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap) as producer:
        for i, (key, value) in enumerate(records):
            await producer.send(prefixed(settings, topics.WATCH_EVENTS), value, key=key)
            if i % step == 0:
                await asyncio.sleep(0.05)
        await producer.flush()


async def reference(settings: Settings) -> tuple[dict[str, bytes], set[bytes]]:
    """States and requests that the log must give, by the replay driver on the same records."""
    ids = topic_ids(settings, [topics.WATCH_EVENTS, topics.USER_CONTROLS, topics.WATCH_POSITIONS])
    configuration, registry = load_configuration(settings, ids)
    with TopicReader(settings) as reader:
        log = list(reader.read(prefixed(settings, topics.WATCH_EVENTS)))
    states: dict[str, bytes] = {}
    requests: set[bytes] = set()
    for partition in range(settings.partitions):
        driver = ReplayDriver(configuration, registry, partition=partition)
        events = [Event(m.value(), m.key(), m.timestamp()[1]) for m in log if m.partition() == partition]
        await driver.run(events)
        states |= driver.states
        requests |= {output.value or b"" for output in driver.outputs(topics.REFRESH_REQUESTS)}
    return states, requests


async def test_killed_workers_count_every_event_once(settings: Settings, workers: Workers) -> None:
    records = log_of(seed=3)
    first = workers.start()
    workers.start()
    await send(settings, topics.WATCH_EVENTS, records[: len(records) // 2])
    await until(lambda: len(table_of(settings)) > 0, workers)
    # Events go on while partitions move: once when the new worker joins, once when the killed one is missed.
    trickling = asyncio.create_task(trickle(settings, records[len(records) // 2 :], seconds=22))
    first.kill()
    workers.start()
    await trickling
    await until_counted(settings, workers)

    states, requests = await reference(settings)
    assert table_of(settings) == states
    assert sum(int(from_bytes(value)["events"]) for value in states.values()) == USERS * EVENTS
    with TopicReader(settings) as reader:
        found = {message.value() for message in reader.read(prefixed(settings, topics.REFRESH_REQUESTS))}
        letters = {m.key() for m in reader.read(prefixed(settings, topics.dead_letters_of(topics.WATCH_EVENTS)))}
    assert found == requests
    assert len(requests) >= USERS
    assert len(letters) == 2

    # A control is recorded at a position, applied there, and changes nobody else.
    opting = control("user-5", "opt_out")
    await send(settings, topics.USER_CONTROLS, [(opting.key, opting.value)])
    await until(lambda: int(from_bytes(table_of(settings)["user-5"])["flags"]) & OPTED_OUT > 0, workers)
    others = {user: value for user, value in table_of(settings).items() if user != "user-5"}
    assert others == {user: value for user, value in states.items() if user != "user-5"}

    # A graceful stop ends with status 0 and leaves nothing to read again.
    for worker in workers.running("watch"):
        assert worker.stop() == 0, workers.logs()
    await until_counted(settings, workers, seconds=1)


async def test_a_log_that_ends_below_the_markers_is_refused(settings: Settings, workers: Workers) -> None:
    """The changelog holds markers of a topic whose records are gone."""
    worker = workers.start()
    with TopicReader(settings) as reader:
        changelog = [m for m in reader.read(prefixed(settings, topics.INTERESTS_CHANGELOG)) if m.value() is not None]
    partition = changelog[-1].partition()
    state = from_bytes(changelog[-1].value() or b"")
    state["watch_offset"] = 10**9
    worker.kill()
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap) as producer:
        topic = prefixed(settings, topics.INTERESTS_CHANGELOG)
        await producer.send_and_wait(topic, to_bytes(state), key=changelog[-1].key(), partition=partition)
    second = workers.start()
    assert await asyncio.to_thread(second.process.wait, 60) == 1
    assert "the log was truncated" in workers.logs()
