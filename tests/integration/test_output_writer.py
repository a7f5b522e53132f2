"""Outputs arrive whole, in order and with their headers, in batches or alone; what is refused is raised."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from aiokafka.errors import MessageSizeTooLargeError

from agents.kafka_admin import create_topics
from agents.output_writer import BATCH_BYTES, OutputWriter
from agents.settings import Settings
from streams import topics
from streams.watch import Output
from tests.conftest import Stack
from tests.workers import read

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def settings(kafka: Stack, topic_prefix: str) -> Settings:
    mine = replace(kafka.settings, topic_prefix=topic_prefix)
    create_topics(mine)
    return mine


@pytest.fixture
async def writer(settings: Settings) -> AsyncIterator[OutputWriter]:
    made = OutputWriter(settings)
    yield made
    await made.close()


async def test_outputs_arrive_in_order_with_their_headers(settings: Settings, writer: OutputWriter) -> None:
    trace = (("traceparent", b"00-1-2-01"),)
    # Larger together than one record batch takes.
    value = b"x" * (BATCH_BYTES // 8)
    requests = [
        Output(topics.REFRESH_REQUESTS, f"u{i % 3}".encode(), value + str(i).encode(), trace if i % 2 else (), i % 3)
        for i in range(40)
    ]
    loose = [Output(topics.UNKNOWN_VIDEOS, f"v{i}".encode(), b"{}") for i in range(5)]
    await writer.write([*requests[:20], *loose, *requests[20:]])
    arrived = read(settings, topics.REFRESH_REQUESTS)
    for partition in range(3):
        expected = [output for output in requests if output.partition == partition]
        found = [message for message in arrived if message.partition() == partition]
        assert [message.value() for message in found] == [output.value for output in expected]
        assert [message.key() for message in found] == [output.key for output in expected]
        assert [tuple(message.headers() or ()) for message in found] == [output.headers for output in expected]
    assert {message.key() for message in read(settings, topics.UNKNOWN_VIDEOS)} == {output.key for output in loose}


async def test_tombstones_and_nothing_at_all(settings: Settings, writer: OutputWriter) -> None:
    await writer.write([])
    await writer.write([Output(topics.PERSONAS, b"gone", None, (("reason", b"expired"),), partition=1)])
    (message,) = read(settings, topics.PERSONAS)
    assert (message.key(), message.value(), message.headers()) == (b"gone", None, [("reason", b"expired")])


async def test_what_a_topic_refuses_is_raised_and_the_rest_is_still_written(
    settings: Settings, writer: OutputWriter
) -> None:
    huge = Output(topics.REFRESH_REQUESTS, b"u", b"x" * 2_000_000, partition=0)
    with pytest.raises(MessageSizeTooLargeError):
        await writer.write([huge])
    before = len(read(settings, topics.REFRESH_REQUESTS))
    await writer.write([Output(topics.REFRESH_REQUESTS, b"u", b"small", partition=0)])
    assert len(read(settings, topics.REFRESH_REQUESTS)) == before + 1
