"""Writes a batch's outputs: those of a given partition as one record batch, at a tenth of what single sends cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Final

from aiokafka import AIOKafkaProducer

from agents.kafka_admin import aiokafka_options, prefixed
from agents.settings import Settings
from streams.watch import Output

BATCH_BYTES: Final = 500_000
"""A record batch, well below what a topic takes (`max.message.bytes`)."""
MAXIMUM_RECORD_BYTES: Final = 4 * 1024 * 1024


class OutputWriter:
    """An idempotent producer of outputs. It connects when it is first used; `close` when done."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer: AIOKafkaProducer | None = None
        self._connecting = asyncio.Lock()

    async def write(self, outputs: Sequence[Output]) -> None:
        """Send outputs, those of one partition in order, and wait until the brokers have each; raises what failed."""
        producer = await self._connected()
        sent: list[asyncio.Future[Any]] = []
        try:
            placed: dict[tuple[str, int], list[Output]] = {}
            for output in outputs:
                topic = prefixed(self._settings, output.topic)
                if output.partition is None:
                    sent.append(await producer.send(topic, output.value, output.key, headers=list(output.headers)))
                else:
                    placed.setdefault((topic, output.partition), []).append(output)
            for (topic, partition), group in placed.items():
                sent += await _send_batches(producer, topic, partition, group)
            await asyncio.gather(*sent)
        except BaseException:
            for future in sent:  # asyncio would report those that nobody looks at
                future.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise

    async def close(self) -> None:
        """Disconnect."""
        if self._producer is not None:
            await self._producer.stop()

    async def _connected(self) -> AIOKafkaProducer:
        async with self._connecting:
            if self._producer is None:
                producer = AIOKafkaProducer(
                    **aiokafka_options(self._settings),
                    acks="all",
                    enable_idempotence=True,
                    max_batch_size=BATCH_BYTES,
                    max_request_size=MAXIMUM_RECORD_BYTES,
                )
                await producer.start()
                self._producer = producer
            return self._producer


async def _send_batches(
    producer: AIOKafkaProducer, topic: str, partition: int, outputs: Sequence[Output]
) -> list[asyncio.Future[Any]]:
    sent: list[asyncio.Future[Any]] = []
    batch, now = producer.create_batch(), round(time.time() * 1000)
    for output in outputs:
        record = {"timestamp": now, "key": output.key, "value": output.value, "headers": list(output.headers)}
        if batch.append(**record) is None:
            sent.append(await producer.send_batch(batch, topic, partition=partition))
            batch = producer.create_batch()
            batch.append(**record)
    sent.append(await producer.send_batch(batch, topic, partition=partition))
    return sent
