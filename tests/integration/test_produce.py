"""`personas produce` against a real broker: placement, hostile lines, bootstrap markers, Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from agents.kafka_admin import create_topics, prefixed
from agents.settings import Settings
from streams.identifiers import murmur2_partition
from streams.topics import USER_CONTROLS, WATCH_EVENTS
from tests.conftest import Stack

pytestmark = pytest.mark.stack

PARTITIONS = 3
T0 = 1_362_064_104_000
COMMAND = [sys.executable, "-c", "from agents.cli import main; main()", "produce"]


@pytest.fixture
def settings(kafka: Stack, request: pytest.FixtureRequest) -> Settings:
    """Settings with topics of this test alone."""
    name = "".join(character if character.isalnum() else "-" for character in request.node.name)[:60]
    settings = replace(kafka.settings, topic_prefix=f"produce-{name}-", partitions=PARTITIONS)
    create_topics(settings)
    return settings


def environment(settings: Settings) -> dict[str, str]:
    return os.environ | {
        "PERSONAS_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
        "PERSONAS_TOPIC_PREFIX": settings.topic_prefix,
        "PERSONAS_PARTITIONS": str(PARTITIONS),
    }


def run(settings: Settings, *arguments: str | Path, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, env=environment(settings), input=stdin, capture_output=True, timeout=60, check=False)


def event(number: int, user: str) -> bytes:
    return orjson.dumps({"user_id": user, "video_id": f"v{number}", "ts": T0 + number * 1_000})


async def records_of(settings: Settings, topic: str) -> list[Any]:
    """Everything in a topic, by partition and offset."""
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.kafka_bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    try:
        partitions = [TopicPartition(prefixed(settings, topic), number) for number in range(PARTITIONS)]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        found: list[Any] = []
        while len(found) < sum(ends.values()):
            for batch in (await consumer.getmany(timeout_ms=1_000)).values():
                found.extend(batch)
        return sorted(found, key=lambda record: (record.partition, record.offset))
    finally:
        await consumer.stop()


async def test_every_line_arrives_once_in_its_partition(settings: Settings, tmp_path: Path) -> None:
    lines = [event(number, f"u{number % 50}") for number in range(5_000)]
    hostile = [b"garbage", b"\xff\xfe", b'{"user_id": 7}']
    large = orjson.dumps({"user_id": "u1", "title": "x" * 2_000_000})
    at_the_limit = orjson.dumps({"user_id": "u1", "title": "x" * 1_000_000})
    source = tmp_path / "events.jsonl"
    source.write_bytes(b"\n".join([*lines, *hostile, large, b"", at_the_limit]) + b"\n")

    result = run(settings, source, "--json")
    assert result.returncode == 1, "a line that could not be sent is a failure"
    summary = orjson.loads(result.stdout)
    assert summary["lines"] == len(lines) + 6
    assert (summary["acknowledged"], summary["without_key"]) == (len(lines) + 4, 3)
    assert (summary["too_large_lines"], summary["blank"], summary["failed"]) == ([len(lines) + 4], 1, 0)

    records = await records_of(settings, WATCH_EVENTS)
    assert sorted(record.value for record in records) == sorted([*lines, *hostile, at_the_limit])
    for record in records:
        assert record.partition == murmur2_partition(record.key or record.value, PARTITIONS)
        assert record.headers == ()
    for user in ("u0", "u49"):
        values = [record.value for record in records if record.key == user.encode()]
        assert values == [line for line in lines if orjson.loads(line)["user_id"] == user], "order per viewer"


async def test_bootstrap_ends_with_one_marker_in_each_partition(settings: Settings, tmp_path: Path) -> None:
    source = tmp_path / "events.jsonl"
    source.write_bytes(b"\n".join(event(number, f"u{number}") for number in range(40)))
    result = run(settings, source, "--bootstrap", "--json")
    assert result.returncode == 0, result.stderr
    assert orjson.loads(result.stdout)["bootstrap_end_sent"] is True
    records = await records_of(settings, WATCH_EVENTS)
    assert [record.headers for record in records] == [(("personas-bootstrap", b"1"),)] * 40
    markers = await records_of(settings, USER_CONTROLS)
    assert [marker.partition for marker in markers] == list(range(PARTITIONS))
    for marker in markers:
        assert (marker.key, marker.value, marker.headers) == (None, b"{}", (("personas-marker", b"bootstrap_end"),))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_stops_cleanly_with_counts(settings: Settings, tmp_path: Path, number: signal.Signals) -> None:
    lines = [event(index, "u1") for index in range(10_000)]
    source = tmp_path / "events.jsonl"
    source.write_bytes(b"\n".join(lines))
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, str(source), "--rate", "200", "--bootstrap", "--json"),
        env=environment(settings),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        await _until_some_arrived(settings)
        process.send_signal(number)
        output, errors = await asyncio.wait_for(process.communicate(), 20)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 130, errors
    summary = orjson.loads(output)
    records = await records_of(settings, WATCH_EVENTS)
    assert summary["interrupted"] is True
    assert 0 < summary["acknowledged"] == len(records) < 10_000
    assert summary["bootstrap_end_sent"] is False
    assert await records_of(settings, USER_CONTROLS) == []

    rest = run(settings, source, "--from-line", str(summary["next_line"]), "--json")
    assert rest.returncode == 0, rest.stderr
    assert [record.value for record in await records_of(settings, WATCH_EVENTS)] == lines


async def _until_some_arrived(settings: Settings) -> None:
    limit = time.monotonic() + 30
    while not await records_of(settings, WATCH_EVENTS):
        assert time.monotonic() < limit, "nothing arrived"


def test_lines_from_a_pipe(settings: Settings) -> None:
    result = run(settings, "-", "--json", stdin=event(1, "u1") + b"\n" + event(2, "u2"))
    assert result.returncode == 0, result.stderr
    assert orjson.loads(result.stdout)["acknowledged"] == 2


def test_a_missing_topic_is_named(settings: Settings, tmp_path: Path) -> None:
    source = tmp_path / "events.jsonl"
    source.write_bytes(event(1, "u1"))
    result = run(settings, source, "--topic", "nowhere")
    assert result.returncode == 1
    assert result.stderr.decode() == (
        f"Error: topic {settings.topic_prefix}nowhere does not exist; run `personas init`\n"
    )
