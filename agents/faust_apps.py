"""Faust as this project uses it: membership, tables, recovery and commits; bytes and acknowledgements are ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final

import faust

from agents.kafka_admin import faust_brokers, faust_credentials
from agents.settings import Settings
from streams import topics
from streams.watch import InputRecord, Output

SESSION_TIMEOUT_SECONDS: Final = 10.0
"""A killed worker's partitions move after this long."""
MAXIMUM_RECORD_BYTES: Final = 4 * 1024 * 1024
COMMIT_INTERVAL_SECONDS: Final = 1.0


def create_app(settings: Settings, name: str, *, finish_before_rebalance: bool = True) -> faust.App:
    """A Faust app whose id and consumer group are `name` with the topic prefix.

    `finish_before_rebalance`: whether partitions move only after every record in flight is acknowledged; the whole
    group waits for it.

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


class StateTable:
    """The per-user table: Faust's recovery and partition ownership, our own durable writes.

    A write through Faust's table only logs a changelog record that failed, so states are written here: changelog first,
    acknowledged, then the store. This leans on faust-streaming 0.15.3's memory store (`data`, `_key_partition`), which
    forgets the keys of partitions that moved away.
    """

    def __init__(self, app: faust.App, settings: Settings, on_recovered: Callable[[], Awaitable[None]]) -> None:
        self._app = app
        self._settings = settings
        self._table: Any = app.Table(
            "interests",
            key_type=bytes,
            value_type=bytes,
            partitions=settings.partitions,
            help="per-user interest state, one fixed-layout record each",
        )
        self._table.on_recover(on_recovered)

    def __len__(self) -> int:
        return len(self._table.data.data)

    def read(self, user_id: str) -> bytes | None:
        """Stored state of a viewer."""
        value: bytes | None = self._table.data.data.get(user_id.encode())
        return value

    def users(self, partition: int) -> list[str]:
        """Ids of the viewers of one partition."""
        owners = self._table.data._key_partition
        return [key.decode() for key, owner in owners.items() if owner == partition]

    def values(self, partition: int) -> list[bytes]:
        """Stored states of one partition."""
        store = self._table.data
        return [store.data[key] for key, owner in store._key_partition.items() if owner == partition]

    async def write(self, partition: int, changelog: Sequence[tuple[bytes, bytes]]) -> None:
        """Store changed states; they are read only once the changelog has acknowledged them."""
        outputs = [Output(topics.INTERESTS_CHANGELOG, key, value, partition=partition) for key, value in changelog]
        await produce(self._app, self._settings, outputs)
        store = self._table.data
        for key, value in changelog:
            store.data[key] = value
            store._key_partition[key] = partition
