"""`personas control`: send a viewer's control."""

from __future__ import annotations

import asyncio
import time
import uuid

import click
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from agents.cli.failures import one_line_errors
from agents.kafka_admin import aiokafka_options, prefixed
from agents.kafka_clients import partitions_of
from agents.settings import Settings, load_settings
from streams import topics
from streams.decoding import Rejected, decode_control
from streams.records import ControlKind, UserControl, encode

CLUSTER_KINDS = frozenset({ControlKind.HIDE, ControlKind.UNHIDE, ControlKind.PIN, ControlKind.UNPIN})


@click.command()
@click.argument("user")
@click.argument("kind", type=click.Choice([str(kind) for kind in ControlKind]))
@click.option("--cluster", type=click.IntRange(0, 2**31 - 1), help="Cluster id, for hide, unhide, pin and unpin.")
@click.option("--video", help="Video id, for forget_video.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a line.")
def control(user: str, kind: str, cluster: int | None, video: str | None, as_json: bool) -> None:
    """Send a control of viewer USER. It takes effect within seconds, at a recorded position of their watch log.

    \b
    opt_out, opt_in         stop counting and remove the persona; start again
    hide, unhide, pin, unpin  an interest, by its cluster id: see `personas clusters show`
    forget_video            take back the watches of one video
    clear_history           forget all watches, keep hidden and pinned interests
    erase                   forget everything; `personas erase` also waits for it

    \b
    personas control ann hide --cluster 12
    personas control ann forget_video --video v-812
    personas control ann opt_out
    """
    item = new_control(user, ControlKind(kind), cluster, video)
    settings = load_settings()
    with one_line_errors(settings):
        asyncio.run(_send(settings, item))
    if as_json:
        click.echo(orjson.dumps(item))
    else:
        click.echo(f"sent {kind} for {user!a}: control {item.control_id}")


def new_control(user: str, kind: ControlKind, cluster: int | None = None, video: str | None = None) -> UserControl:
    """A control with a new id and the present time. Raises click.UsageError for one that would be refused."""
    if (cluster is not None) != (kind in CLUSTER_KINDS):
        verb = "needs" if kind in CLUSTER_KINDS else "takes no"
        raise click.UsageError(f"{kind} {verb} --cluster")
    if (video is not None) != (kind is ControlKind.FORGET_VIDEO):
        verb = "needs" if kind is ControlKind.FORGET_VIDEO else "takes no"
        raise click.UsageError(f"{kind} {verb} --video")
    now = time.time_ns() // 1_000_000
    item = UserControl(uuid.uuid4().hex, user, kind, now, cluster, video)
    try:
        checked = decode_control(encode(item), user.encode(), append_time=now)
    except (UnicodeEncodeError, TypeError):
        raise click.UsageError("the id is not valid UTF-8") from None
    if isinstance(checked, Rejected):
        raise click.UsageError(checked.detail)
    return item


async def _send(settings: Settings, item: UserControl) -> None:
    # No group, no subscription: the consumer only asks whether the topic is there, which a producer would wait for.
    consumer = AIOKafkaConsumer(**aiokafka_options(settings), enable_auto_commit=False)
    try:
        await consumer.start()
        await partitions_of(consumer, [prefixed(settings, topics.USER_CONTROLS)])
    finally:
        await consumer.stop()
    await send_control(settings, item)


async def send_control(settings: Settings, item: UserControl) -> None:
    """Send a control; returns when all replicas have it. The topic must exist. Raises KafkaError."""
    producer = AIOKafkaProducer(**aiokafka_options(settings), acks="all", enable_idempotence=True)
    try:
        await producer.start()
        topic = prefixed(settings, topics.USER_CONTROLS)
        await producer.send_and_wait(topic, encode(item), item.user_id.encode())
    finally:
        await producer.stop()
