"""Faust as this project uses it: membership, partitions and commits; bytes, states and acknowledgements are ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, Final

import faust

from agents.batch_intake import AssignedChangelogs
from agents.kafka_admin import faust_brokers, faust_credentials
from agents.settings import Settings
from streams.watch import InputRecord, Output

SESSION_TIMEOUT_SECONDS: Final = 10.0
"""A killed worker's partitions move after this long."""
MAXIMUM_RECORD_BYTES: Final = 4 * 1024 * 1024
COMMIT_INTERVAL_SECONDS: Final = 1.0
MAXIMUM_FETCHED: Final = 20_000
"""Most records taken from a fetch at a time."""


def create_app(
    settings: Settings, name: str, *, finish_before_rebalance: bool = True, standby_replicas: int = 0
) -> faust.App:
    """A Faust app whose id and consumer group are `name` with the topic prefix.

    `finish_before_rebalance`: whether partitions move only after every record in flight is acknowledged; the whole
    group waits for it. `standby_replicas`: of the partitions of changelogs that are only assigned.

    Stock `exactly_once` loses and repeats records (faust-streaming #323, #517), so processing stays at-least-once, made
    exact by the markers inside each state. An agent that fails takes the process down: a worker that looks alive and
    consumes nothing is worse than one that restarts.
    """
    folder = settings.data_folder / "faust" / name
    folder.mkdir(parents=True, exist_ok=True)
    return faust.App(
        id=settings.topic_prefix + name,
        broker=faust_brokers(settings),
        broker_credentials=faust_credentials(settings),
        broker_session_timeout=SESSION_TIMEOUT_SECONDS,
        broker_heartbeat_interval=SESSION_TIMEOUT_SECONDS / 5,
        broker_commit_interval=COMMIT_INTERVAL_SECONDS,
        consumer_auto_offset_reset="earliest",
        consumer_max_fetch_size=MAXIMUM_RECORD_BYTES,
        producer_max_request_size=MAXIMUM_RECORD_BYTES,
        processing_guarantee="at_least_once",
        agent_supervisor="mode.supervisors.CrashingSupervisor",
        autodiscover=False,
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        topic_partitions=settings.partitions,
        stream_buffer_maxsize=4096,
        stream_wait_empty=finish_before_rebalance,
        datadir=str(folder),
        store="memory://",
        TableManager=AssignedChangelogs,
        table_standby_replicas=standby_replicas,
        broker_max_poll_records=MAXIMUM_FETCHED,
        producer_linger=0,
    )


def raw_topic(app: faust.App, settings: Settings, name: str) -> Any:  # noqa: ANN401
    """A topic as bytes: Faust would commit a record that its own codecs cannot decode."""
    return app.topic(
        settings.topic_prefix + name,
        key_type=bytes,
        value_type=bytes,
        key_serializer="raw",
        value_serializer="raw",
    )


def input_record(message: Any) -> InputRecord:  # noqa: ANN401
    """What a handler sees of a Faust message."""
    headers = message.headers or ()
    pairs = headers.items() if isinstance(headers, dict) else headers
    return InputRecord(
        offset=message.offset,
        key=message.key,
        value=message.value,
        timestamp=round(message.timestamp * 1000),
        headers=tuple((str(name), value or b"") for name, value in pairs),
    )


def is_current(app: faust.App, message: Any) -> bool:  # noqa: ANN401
    """Whether a message was read under the present assignment: any other is, or will be, delivered again."""
    generation: int = app.consumer_generation_id
    return message.generation_id == generation and message.tp in app.consumer.assignment()


async def produce(app: faust.App, settings: Settings, outputs: Sequence[Output]) -> None:
    """Send outputs in order and wait until the broker has acknowledged each; raises what failed."""
    producer = await app.maybe_start_producer()
    sent: list[Awaitable[Any]] = [
        await producer.send(
            settings.topic_prefix + output.topic,
            output.key,
            output.value,
            output.partition,
            None,
            list(output.headers) or None,
        )
        for output in outputs
    ]
    for acknowledgement in sent:
        await acknowledgement


async def batches(stream: Any, maximum: int) -> AsyncIterator[list[Any]]:  # noqa: ANN401
    """Events of a stream as they come, together: all that arrived while the last batch was handled, at most `maximum`.

    Nothing is acknowledged. Not Faust's `noack_take`: an event that arrives just as a batch is handed out can slip into
    the buffer that is then cleared, and is never seen again (faust-streaming 0.15.3, met when a rebalance delayed one).
    """
    queue: asyncio.Queue[Any] = asyncio.Queue(maximum)

    async def read() -> None:
        async for event in stream.noack().events():
            await queue.put(event)

    reading = asyncio.create_task(read())
    try:
        while True:
            taking = asyncio.create_task(queue.get())
            await asyncio.wait([taking, reading], return_when=asyncio.FIRST_COMPLETED)
            if not taking.done():
                taking.cancel()
                reading.result()  # raises what ended it
                return
            batch = [taking.result()]
            while len(batch) < maximum and not queue.empty():
                batch.append(queue.get_nowait())
            yield batch
    finally:
        reading.cancel()
