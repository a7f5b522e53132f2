"""With the student away, watch events go on being counted and requests wait in Kafka, not in a worker's memory."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import replace

import orjson
import psutil
import pytest

from agents.kafka_log import KafkaLog
from agents.settings import Settings
from streams import topics
from streams.records import encode
from tests.builders import START
from tests.conftest import Stack
from tests.request_samples import sample_request
from tests.workers import Workers, committed, read, send, until, until_counted, with_topics_and_schema

pytestmark = pytest.mark.stack

SOME, MANY = 2_000, 24_000
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def settings(kafka: Stack, cassandra: Stack, topic_prefix: str, keyspace: str) -> Iterator[Settings]:
    """Topics and schema, and a student's address at which nobody answers."""
    with socket.socket() as held:  # bound but not listening, so nothing else takes it
        held.bind(("127.0.0.1", 0))
        made = replace(
            kafka.settings,
            topic_prefix=topic_prefix,
            cassandra_keyspace=keyspace,
            partitions=2,
            triton_url=f"127.0.0.1:{held.getsockname()[1]}",
        )
        yield with_topics_and_schema(made)


def requests(first: int, number: int) -> list[tuple[bytes, bytes]]:
    users = [f"waiting-{place}" for place in range(first, first + number)]
    return [
        (user.encode(), encode(sample_request(user, request_id=f"{place:032x}"))) for place, user in enumerate(users)
    ]


def watches(number: int) -> list[tuple[bytes, bytes]]:
    return [
        (
            b"viewer-%d" % (place % 50),
            orjson.dumps(
                {
                    "user_id": f"viewer-{place % 50}",
                    "video_id": f"v{place % 900 + 1:04}",
                    "ts": START + place * 60_000,
                    "event_id": str(place),
                }
            ),
        )
        for place in range(number)
    ]


async def test_requests_wait_in_kafka_while_the_student_is_away(settings: Settings, workers: Workers) -> None:
    watching, persona = workers.start("watch"), workers.start("persona")
    await send(settings, topics.REFRESH_REQUESTS, requests(0, SOME))
    await until(lambda: "the student is unavailable, requests wait" in persona.text(), workers)
    await asyncio.sleep(3)
    process = psutil.Process(persona.process.pid)
    few = process.memory_info().rss
    more = requests(SOME, MANY)
    await send(settings, topics.REFRESH_REQUESTS, more)
    before = len(read(settings, topics.REFRESH_REQUESTS))
    await send(settings, topics.WATCH_EVENTS, watches(3_000))
    await until_counted(settings, workers)
    await asyncio.sleep(5)
    many = process.memory_info().rss
    most = sum(len(value) for _, value in more) * 0.75  # as objects, all of them would be several times this
    shown = f"{few / MEGABYTE:.0f} MB with {SOME} waiting, {many / MEGABYTE:.0f} MB with {SOME + MANY}"
    assert many - few < most, shown
    assert len(read(settings, topics.REFRESH_REQUESTS)) > before, "the watch app goes on asking"
    assert watching.running
    assert persona.running
    log = KafkaLog(settings)
    try:
        assert sum(await committed(settings, log, topics.PERSONA_APP, topics.REFRESH_REQUESTS)) == 0
    finally:
        await log.close()
