"""`personas tail`: follow the persona topic."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator

import click
import orjson
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from rich.console import Console

from agents.cards import persona_line, removal_line
from agents.cli.failures import one_line_errors
from agents.kafka_admin import aiokafka_options, prefixed
from agents.kafka_clients import partitions_of
from agents.settings import Settings, load_settings
from streams.decoding import UnreadableRecordError, decode_persona
from streams.topics import PERSONAS


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: the persona, or user_id and removed.")
@click.option("--from-beginning", is_flag=True, help="Start with the oldest persona kept, not with the next one.")
@click.option("--max", "maximum", type=click.IntRange(min=1), help="Stop after this many.")
def tail(as_json: bool, from_beginning: bool, maximum: int | None) -> None:
    """Follow the persona topic, removals included, until interrupted.

    \b
    personas tail
    personas tail --from-beginning --max 10
    personas tail --json | jq 'select(.tier == "student") | .summary'
    """
    settings = load_settings()
    with one_line_errors(settings):
        asyncio.run(_follow(settings, as_json=as_json, from_beginning=from_beginning, maximum=maximum))


async def _follow(settings: Settings, *, as_json: bool, from_beginning: bool, maximum: int | None) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    console = Console(soft_wrap=True)
    shown = 0
    async for record in _records(settings, stop, from_beginning=from_beginning):
        if as_json:
            click.echo(_json(record))
        else:
            _print(console, record)
        shown += 1
        if shown == maximum:
            return


async def _records(settings: Settings, stop: asyncio.Event, *, from_beginning: bool) -> AsyncIterator[ConsumerRecord]:
    """Records of the persona topic until `stop` is set; joins no group and commits nothing."""
    consumer = AIOKafkaConsumer(**aiokafka_options(settings), enable_auto_commit=False)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(consumer.stop)
        await consumer.start()
        partitions = await partitions_of(consumer, [prefixed(settings, PERSONAS)])
        consumer.assign(partitions)
        await (consumer.seek_to_beginning if from_beginning else consumer.seek_to_end)(*partitions)
        while not stop.is_set():
            for records in (await consumer.getmany(timeout_ms=200)).values():
                for record in records:
                    yield record


def _print(console: Console, record: ConsumerRecord) -> None:
    if record.value is None:
        console.print(removal_line(_user(record), record.timestamp, _reason(record)))
        return
    try:
        console.print(persona_line(decode_persona(record.value)))
    except UnreadableRecordError as error:
        click.echo(f"partition {record.partition} offset {record.offset}: {error}", err=True)


def _json(record: ConsumerRecord) -> bytes:
    if record.value is None:
        return orjson.dumps({"user_id": _user(record), "removed": _reason(record)})
    try:
        decode_persona(record.value)
    except UnreadableRecordError as error:
        return orjson.dumps({"user_id": _user(record), "unreadable": str(error)})
    value: bytes = record.value
    return value


def _user(record: ConsumerRecord) -> str:
    return (record.key or b"").decode("utf-8", "replace")


def _reason(record: ConsumerRecord) -> str:
    for name, value in record.headers:
        if name == "reason":
            return bytes(value).decode("utf-8", "replace")
    return "no reason given"
