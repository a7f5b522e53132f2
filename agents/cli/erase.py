"""`personas erase`: erase a viewer, and wait until it is true."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass

import click
import orjson
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from rich.console import Console

from agents.cli.control import new_control, send_control
from agents.cli.failures import one_line_errors
from agents.kafka_admin import aiokafka_options, prefixed
from agents.kafka_clients import partitions_of
from agents.settings import Settings, load_settings
from agents.stores.cassandra import CassandraStore
from agents.stores.ports import PersonaStore
from streams import topics
from streams.decoding import decode_record
from streams.identifiers import murmur2_partition
from streams.personas import ErasureReceipt, receipt_key
from streams.records import ControlKind, UserControl
from streams.state import StateError, from_bytes

POLL_MS = 200


@dataclass(slots=True)
class Progress:
    """What of an erasure has been seen. Stored rows are those of an epoch before the erasure's."""

    receipt: ErasureReceipt | None = None
    tombstone: bool = False
    state_epoch: int = -1
    rows_left: int = 1

    def missing(self) -> list[str]:
        """What has not been seen yet, as people read it."""
        state_gone = self.receipt is not None and self.state_epoch >= self.receipt.epoch
        parts = {
            "receipt (erasure-receipts)": self.receipt is not None,
            "tombstone (personas)": self.tombstone,
            "stored personas (Cassandra)": self.rows_left == 0,
            "interest state (changelog)": state_gone,
        }
        return [name for name, seen in parts.items() if not seen]


@click.command()
@click.argument("user")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.option("--wait", type=click.FloatRange(min=0), default=60.0, show_default=True, help="Seconds to wait for it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: receipt and missing.")
def erase(user: str, yes: bool, wait: float, as_json: bool) -> None:
    """Erase viewer USER everywhere and print the receipt.

    Sends the erase control, then waits for the persona's tombstone, the removal of the stored personas, the empty
    interest state and the receipt. The workers do the erasing: they must be running. Watch events already in Kafka
    stay there for the topic's retention and are not counted again. Cassandra frees the space after its grace period
    of 10 days.

    \b
    personas erase ann
    personas erase ann --yes --wait 120 --json

    Exit status 1 if something is still missing after the wait; the erasure then goes on without this command.
    """
    item = new_control(user, ControlKind.ERASE)
    if not yes:
        click.confirm(f"Erase everything about {user!a}?", abort=True)
    settings = load_settings()
    with one_line_errors(settings), Console(stderr=True).status("erasing"):
        progress = asyncio.run(_erase(settings, item, wait))
    missing = progress.missing()
    if as_json:
        click.echo(orjson.dumps({"receipt": progress.receipt, "missing": missing}))
    elif progress.receipt is not None and not missing:
        click.echo(orjson.dumps(progress.receipt, option=orjson.OPT_INDENT_2))
    if missing:
        click.echo(
            f"not seen within {wait:g} s: {', '.join(missing)}; "
            f"the erasure (control {item.control_id}) goes on as soon as the workers run",
            err=True,
        )
        sys.exit(1)


async def _erase(settings: Settings, item: UserControl, wait: float) -> Progress:
    store = await CassandraStore.connect(settings)
    consumer = AIOKafkaConsumer(**aiokafka_options(settings), enable_auto_commit=False)
    try:
        await consumer.start()
        await _follow(settings, consumer, item.user_id)
        await send_control(settings, item)
        progress = Progress()
        try:
            async with asyncio.timeout(wait):
                while progress.missing():
                    await _observe(settings, consumer, store, item.user_id, progress)
        except TimeoutError:
            pass
        return progress
    finally:
        await consumer.stop()
        await store.close()


async def _follow(settings: Settings, consumer: AIOKafkaConsumer, user_id: str) -> None:
    """Start at the present ends of what an erasure writes to: the viewer's partition, and all receipts."""
    names = {name: prefixed(settings, name) for name in (topics.PERSONAS, topics.INTERESTS_CHANGELOG)}
    per_user = await partitions_of(consumer, names.values())
    counts = {topic: sum(tp.topic == topic for tp in per_user) for topic in names.values()}
    key = user_id.encode()
    followed = [tp for tp in per_user if tp.partition == murmur2_partition(key, counts[tp.topic])]
    followed += await partitions_of(consumer, [prefixed(settings, topics.ERASURE_RECEIPTS)])
    consumer.assign(followed)
    await consumer.seek_to_end(*followed)
    for tp in followed:  # a seek takes effect at the next fetch; the ends must be those before the control is sent
        await consumer.position(tp)


async def _observe(
    settings: Settings, consumer: AIOKafkaConsumer, store: PersonaStore, user_id: str, progress: Progress
) -> None:
    for records in (await consumer.getmany(timeout_ms=POLL_MS)).values():
        for record in records:
            _read(settings, record, user_id, progress)
    if progress.receipt is not None:
        rows = [await store.latest(user_id), *await store.history(user_id, settings.history_versions)]
        progress.rows_left = sum(row is not None and row.epoch < progress.receipt.epoch for row in rows)


def _read(settings: Settings, record: ConsumerRecord, user_id: str, progress: Progress) -> None:
    if record.topic == prefixed(settings, topics.ERASURE_RECEIPTS):
        if record.key == receipt_key(user_id).encode():
            progress.receipt = decode_record(ErasureReceipt, record.value)
    elif record.key != user_id.encode():
        return
    elif record.topic == prefixed(settings, topics.PERSONAS):
        progress.tombstone |= record.value is None
    elif record.value is not None:
        try:
            progress.state_epoch = int(from_bytes(record.value)["epoch"])
        except StateError as error:
            click.echo(f"{record.topic} offset {record.offset}: {error}", err=True)
