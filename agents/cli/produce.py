"""`personas produce`: an event file to Kafka."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import BinaryIO

import click
import orjson
from aiokafka.errors import KafkaError
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as ProgressBar

from agents.artefacts import load_format
from agents.importing import ImportFileError, Progress, opened
from agents.kafka_admin import prefixed
from agents.kafka_clients import TopicMissingError
from agents.producing import (
    ProducePlan,
    ProduceSummary,
    create_producer,
    file_lines,
    partition_count,
    piped_lines,
    produce_lines,
    send_bootstrap_end,
)
from agents.settings import Settings, load_settings
from streams.topics import USER_CONTROLS, WATCH_EVENTS

SHOWN_LINE_NUMBERS = 5


@click.command()
@click.argument("events", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
@click.option("--topic", default=WATCH_EVENTS, show_default=True, help="Topic, without PERSONAS_TOPIC_PREFIX.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Events a second.")
@click.option(
    "--speed",
    type=click.FloatRange(min=0, min_open=True),
    metavar="X",
    help="By event time, X times as fast: 1 is real time, 3600 an hour a second.",
)
@click.option("--bootstrap", is_flag=True, help="History load: one request per eligible viewer, at the end.")
@click.option("--from-line", type=click.IntRange(min=1), default=1, metavar="N", help="Go on at this line.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def produce(
    events: Path,
    topic: str,
    rate: float | None,
    speed: float | None,
    bootstrap: bool,
    from_line: int,
    as_json: bool,
) -> None:
    """Send EVENTS (one JSON event a line; may be .gz or -) to Kafka, keyed by user_id.

    Lines are sent as they are, those that are no events too: the worker writes a dead letter for each. Without --rate
    or --speed, as fast as the brokers take them. Ctrl-C stops after what was sent is acknowledged; a second one at
    once. PERSONAS_FIELD_MAPPING says where user_id and ts are in lines of another shape.

    \b
    personas produce events.jsonl
    personas produce events.jsonl --rate 500
    personas produce events.jsonl --speed 86400          a day a second
    personas produce history.jsonl.gz --bootstrap        years of history without a storm of requests

    Exit status 1 if Kafka does not take every line, 2 for wrong options, 130 after Ctrl-C.
    """
    if rate is not None and speed is not None:
        raise click.UsageError("give --rate or --speed, not both")
    if bootstrap and topic != WATCH_EVENTS:
        raise click.UsageError(f"--bootstrap is for the topic {WATCH_EVENTS}")
    settings = load_settings()
    plan = ProducePlan(
        topic=prefixed(settings, topic),
        partitions=1,
        rate=rate,
        speed=speed,
        bootstrap=bootstrap,
        from_line=from_line,
        mapping=load_format(settings).mapping,
    )
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it logs at length what the last line says
    started = monotonic()
    try:
        with opened(events) as (content, progress):
            summary = asyncio.run(_produce(settings, plan, content, progress))
    except (TopicMissingError, ImportFileError) as error:
        raise click.ClickException(str(error)) from error
    except KafkaError as error:
        raise click.ClickException(
            f"Kafka at {settings.kafka_bootstrap} does not answer ({type(error).__name__}); "
            "`personas up` starts a local one, PERSONAS_KAFKA_BOOTSTRAP names another"
        ) from error
    _report(summary, plan, monotonic() - started, as_json)
    if summary.interrupted:
        sys.exit(130)
    if not summary.complete or summary.too_large:
        sys.exit(1)


async def _produce(settings: Settings, plan: ProducePlan, content: BinaryIO, progress: Progress) -> ProduceSummary:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        stop.set()
        loop.remove_signal_handler(number)  # the next one ends the process

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    console = Console(stderr=True)
    columns = (BarColumn(), TextColumn("{task.fields[sent]:,} acknowledged, {task.fields[rate]:,.0f}/s"))
    bar = ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("", total=progress.total, sent=0, rate=0.0)
    started = monotonic()

    def on_turn(summary: ProduceSummary) -> None:
        rate = summary.acknowledged / max(monotonic() - started, 0.001)
        bar.update(task, completed=progress.position(), sent=summary.acknowledged, rate=rate)

    producer = create_producer(settings)
    try:
        await producer.start()
        plan = replace(plan, partitions=await partition_count(producer, plan.topic))
        controls = prefixed(settings, USER_CONTROLS)
        if plan.bootstrap and await partition_count(producer, controls) != plan.partitions:
            raise TopicMissingError(
                f"{controls} and {plan.topic} differ in partitions; `personas init --check` says more"
            )
        with bar:
            summary = await produce_lines(_lines(content, stop), producer, plan, stop, on_turn)
        if plan.bootstrap and summary.complete:
            await send_bootstrap_end(producer, controls, plan.partitions)
    finally:
        await producer.stop()
    return summary


def _lines(content: BinaryIO, stop: asyncio.Event) -> AsyncIterator[bytes]:
    if content is sys.stdin.buffer and not stat.S_ISREG(os.fstat(content.fileno()).st_mode):
        return piped_lines(content.fileno(), stop)
    return file_lines(content)


def _report(summary: ProduceSummary, plan: ProducePlan, seconds: float, as_json: bool) -> None:
    if as_json:
        document = {
            "topic": plan.topic,
            "lines": summary.lines,
            "acknowledged": summary.acknowledged,
            "without_key": summary.without_key,
            "blank": summary.blank,
            "skipped": summary.skipped,
            "too_large": summary.too_large,
            "too_large_lines": summary.too_large_lines,
            "failed": summary.failed,
            "next_line": summary.next_line,
            "interrupted": summary.interrupted,
            "error": summary.error,
            "bootstrap_end_sent": plan.bootstrap and summary.complete,
            "seconds": round(seconds, 3),
        }
        click.echo(orjson.dumps(document))
        return
    speed = summary.acknowledged / max(seconds, 0.001)
    click.echo(f"{summary.acknowledged:,} records acknowledged in {plan.topic}, {seconds:.1f} s, {speed:,.0f}/s")
    if summary.without_key:
        click.echo(f"{summary.without_key:,} of them have no user_id; the worker writes dead letters for them")
    if summary.too_large:
        shown = ", ".join(map(str, summary.too_large_lines[:SHOWN_LINE_NUMBERS]))
        more = ", ..." if summary.too_large > SHOWN_LINE_NUMBERS else ""
        click.echo(f"{summary.too_large:,} lines are larger than a record may be and were left out: {shown}{more}")
    if summary.error is not None:
        click.echo(
            f"error: stopped at line {summary.next_line}, {summary.failed:,} records failed: {summary.error}", err=True
        )
    if summary.interrupted:
        click.echo(f"interrupted; go on with --from-line {summary.next_line}", err=True)
    if plan.bootstrap:
        sent = "the end of the load is marked" if summary.complete else "the end of the load is not marked"
        click.echo(f"{sent}; personas of the loaded viewers are requested when it is")
