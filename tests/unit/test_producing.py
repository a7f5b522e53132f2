"""Lines reach the sender as they are, with the right key and pace, and every line is accounted for."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiokafka.errors import KafkaTimeoutError, MessageSizeTooLargeError, NotEnoughReplicasError
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from agents.cli.produce import produce
from agents.producing import (
    ProducePlan,
    ProduceSummary,
    file_lines,
    key_and_time,
    piped_lines,
    produce_lines,
    send_bootstrap_end,
)
from streams.identifiers import murmur2_partition
from streams.mapping import parse_mapping

T0 = 1_362_064_104_000
PLAN = ProducePlan(topic="watch-events", partitions=4)


class Recorder:
    """A sender that remembers records; `failing` of them fail after they were enqueued."""

    def __init__(self, largest: int = 1_000, failing: int = 0, refuse_from: int | None = None) -> None:
        self.records: list[dict[str, Any]] = []
        self.times: list[float] = []
        self._largest = largest
        self._failing = failing
        self._refuse_from = refuse_from

    async def send(
        self,
        topic: str,
        value: bytes | None = None,
        key: bytes | None = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
        headers: Sequence[tuple[str, bytes]] | None = None,
    ) -> asyncio.Future[Any]:
        if len(value or b"") > self._largest:
            raise MessageSizeTooLargeError
        if self._refuse_from is not None and len(self.records) >= self._refuse_from:
            raise KafkaTimeoutError
        self.records.append({"topic": topic, "value": value, "key": key, "partition": partition, "headers": headers})
        loop = asyncio.get_running_loop()
        self.times.append(loop.time())
        future: asyncio.Future[Any] = loop.create_future()
        if len(self.records) <= self._failing:
            loop.call_soon(future.set_exception, NotEnoughReplicasError())
        else:
            loop.call_soon(future.set_result, None)
        return future


def event(number: int, user: str = "u1") -> bytes:
    return orjson.dumps({"user_id": user, "video_id": "v1", "ts": T0 + number * 1_000}) + b"\n"


def accounted(summary: ProduceSummary) -> int:
    return summary.skipped + summary.blank + summary.too_large + summary.acknowledged + summary.failed


async def send(
    lines: list[bytes], sender: Recorder, plan: ProducePlan = PLAN, stop: asyncio.Event | None = None
) -> ProduceSummary:
    summary = await produce_lines(file_lines(lines), sender, plan, stop or asyncio.Event())
    assert summary.lines == accounted(summary)
    return summary


async def test_lines_are_sent_unchanged_and_keyed_by_user() -> None:
    sender = Recorder()
    lines = [b'{ "user_id" : "u\xc3\xa9" }\r\n', event(1)]
    summary = await send(lines, sender)
    assert [(record["value"], record["key"]) for record in sender.records] == [
        (b'{ "user_id" : "u\xc3\xa9" }', "ué".encode()),
        (event(1).rstrip(), b"u1"),
    ]
    assert all(record["partition"] is None for record in sender.records), "Kafka's default partitioner places keys"
    assert summary.complete


HOSTILE = [b"garbage", b"\xff\x00\xfe", b"[1]", b"null", b'{"user_id": 7}', b'{"user_id": null}', b'{"a": 1']


async def test_hostile_lines_are_sent_without_key_and_placed_by_their_hash() -> None:
    sender = Recorder()
    summary = await send([line + b"\n" for line in HOSTILE], sender)
    assert [record["value"] for record in sender.records] == HOSTILE
    assert [record["key"] for record in sender.records] == [None] * len(HOSTILE)
    assert [record["partition"] for record in sender.records] == [murmur2_partition(line, 4) for line in HOSTILE]
    assert (summary.without_key, summary.acknowledged, summary.complete) == (len(HOSTILE), len(HOSTILE), True)


@given(lines=st.lists(st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"") + b"\n"), max_size=30))
def test_any_line_is_accounted_for(lines: list[bytes]) -> None:
    sender = Recorder(largest=40)
    summary = asyncio.run(send(lines, sender))
    assert summary.lines == len(lines)
    assert summary.acknowledged == len(sender.records)


async def test_oversized_and_blank_lines_are_counted_and_left_out() -> None:
    sender = Recorder(largest=200)
    large = b'{"user_id": "u1", "title": "' + b"x" * 300 + b'"}\n'
    summary = await send([event(0), large, b"\n", b"   \n", event(1), large], sender)
    assert len(sender.records) == 2
    assert (summary.too_large, summary.too_large_lines, summary.blank) == (2, [2, 6], 2)
    assert summary.complete


async def test_bootstrap_marks_every_record() -> None:
    sender = Recorder()
    await send([event(0), b"garbage\n"], sender, ProducePlan("watch-events", 4, bootstrap=True))
    assert [record["headers"] for record in sender.records] == [[("personas-bootstrap", b"1")]] * 2


async def test_without_bootstrap_there_is_no_header() -> None:
    sender = Recorder()
    await send([event(0)], sender)
    assert sender.records[0]["headers"] is None


async def test_the_end_of_a_load_is_marked_in_every_partition() -> None:
    sender = Recorder()
    await send_bootstrap_end(sender, "user-controls", 3)
    assert [(record["topic"], record["partition"]) for record in sender.records] == [
        ("user-controls", number) for number in range(3)
    ]
    for record in sender.records:
        marker = [("personas-marker", b"bootstrap_end")]
        assert (record["key"], record["value"], record["headers"]) == (None, b"{}", marker)


async def test_a_failed_record_stops_and_is_counted() -> None:
    sender = Recorder(failing=1)
    summary = await send([event(number) for number in range(1_000)], sender)
    assert summary.failed == 1
    assert summary.error is not None
    assert summary.error.startswith("NotEnoughReplicasError")
    assert summary.lines < 1_000
    assert not summary.complete


async def test_a_refused_record_stops_before_it_is_counted() -> None:
    summary = await send([event(number) for number in range(10)], Recorder(refuse_from=4))
    assert (summary.acknowledged, summary.next_line, summary.complete) == (4, 5, False)
    assert (summary.error or "").startswith("KafkaTimeoutError")


async def test_going_on_at_a_line() -> None:
    sender = Recorder()
    summary = await send([event(number) for number in range(5)], sender, ProducePlan("t", 4, from_line=4))
    assert [record["value"] for record in sender.records] == [event(3).rstrip(), event(4).rstrip()]
    assert (summary.skipped, summary.acknowledged) == (3, 2)


async def test_a_stop_and_a_second_run_send_every_line_once() -> None:
    lines = [event(number) for number in range(100)]
    sender, stop = Recorder(), asyncio.Event()
    asyncio.get_running_loop().call_later(0.1, stop.set)
    first = await send(lines, sender, ProducePlan("t", 4, rate=200), stop)
    assert first.interrupted
    assert 0 < first.acknowledged < 100
    await send(lines, sender, ProducePlan("t", 4, from_line=first.next_line))
    assert [record["value"] for record in sender.records] == [line.rstrip() for line in lines]


async def test_the_rate_is_kept() -> None:
    sender = Recorder()
    await send([event(0) for _ in range(21)], sender, ProducePlan("t", 4, rate=100))
    assert sender.times[-1] - sender.times[0] >= 0.19
    assert all(at - sender.times[0] >= number / 100 - 0.01 for number, at in enumerate(sender.times))


async def test_event_time_sets_the_pace() -> None:
    sender = Recorder()
    lines = [event(0), event(60), b"garbage\n", event(30), event(120)]
    await send(lines, sender, ProducePlan("t", 4, speed=600))
    gaps = [at - sender.times[0] for at in sender.times]
    assert gaps[1] >= 0.09, "60 s at 600 times the speed"
    assert gaps[3] - gaps[1] < 0.05, "no time, and a time that has passed, are due at once"
    assert gaps[4] >= 0.19


def test_key_and_time_through_a_mapping() -> None:
    mapping = parse_mapping(b'{"user_id": "who.id", "video_id": "what", "ts": {"path": "at", "scale": 1000}}')
    assert key_and_time(b'{"who": {"id": "u1"}, "at": 1362064104}', mapping) == (b"u1", T0)
    assert key_and_time(b'{"user_id": "u1", "ts": 5}', mapping) == (None, None)


@pytest.mark.parametrize("ts", ["1362064104000", True, None, [1]])
def test_a_time_that_is_no_number_is_none(ts: object) -> None:
    assert key_and_time(orjson.dumps({"user_id": "u1", "ts": ts})) == (b"u1", None)


async def test_piped_lines_come_as_they_are_written() -> None:
    reading, writing = os.pipe()
    lines = piped_lines(reading, asyncio.Event())
    os.write(writing, b"one\ntw")
    assert await anext(lines) == b"one"
    os.write(writing, b"o\nthree")
    assert await anext(lines) == b"two"
    os.close(writing)
    assert [line async for line in lines] == [b"three"]
    os.close(reading)


async def test_a_stop_ends_a_silent_pipe() -> None:
    reading, writing = os.pipe()
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, stop.set)
    async with asyncio.timeout(5):
        assert [line async for line in piped_lines(reading, stop)] == []
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "5", "--speed", "2"], "not both"),
        (["--rate", "0"], "Invalid value for '--rate'"),
        (["--bootstrap", "--topic", "personas"], "--bootstrap is for the topic watch-events"),
    ],
)
def test_wrong_options(tmp_path: Path, options: list[str], message: str) -> None:
    source = tmp_path / "events.jsonl"
    source.write_bytes(event(0))
    result = CliRunner().invoke(produce, [str(source), *options])
    assert (result.exit_code, message in result.output) == (2, True), result.output


def test_kafka_absent_is_said_in_one_line(tmp_path: Path) -> None:
    source = tmp_path / "events.jsonl"
    source.write_bytes(event(0))
    result = CliRunner(env={"PERSONAS_KAFKA_BOOTSTRAP": "127.0.0.1:1"}).invoke(produce, [str(source)])
    assert result.exit_code == 1
    assert "Kafka at 127.0.0.1:1 does not answer" in result.stderr
    assert len(result.stderr.splitlines()) == 1
