"""What agents/changelog.py and agents/output_writer.py lean on inside aiokafka's producer."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.producer.message_accumulator import BatchBuilder, MessageBatch
from aiokafka.structs import RecordMetadata

from agents.changelog import _ignore_errors

BATCH = 20_000
PARTITION = TopicPartition("interests-changelog", 0)


@pytest.fixture
async def producer() -> AsyncIterator[AIOKafkaProducer]:
    """One that is never started."""
    made = AIOKafkaProducer(bootstrap_servers="127.0.0.1:1", transactional_id="contract", max_batch_size=BATCH)
    yield made
    made._closed = True  # it would complain that it was not stopped


def test_batches_are_built_and_sent_to_a_partition() -> None:
    assert list(inspect.signature(AIOKafkaProducer.send_batch).parameters) == ["self", "batch", "topic", "partition"]
    appended = list(inspect.signature(BatchBuilder.append).parameters)
    assert appended[:4] == ["self", "timestamp", "key", "value"]
    assert "headers" in appended


async def test_a_full_batch_takes_no_more(producer: AIOKafkaProducer) -> None:
    batch = producer.create_batch()
    assert batch.append(timestamp=1, key=b"k", value=b"v") is not None
    while batch.append(timestamp=1, key=b"k", value=bytes(1000)) is not None:
        assert batch.record_count() < 100
    assert 0 < batch.size() <= BATCH


def test_an_acknowledgement_says_the_offset_of_the_batch() -> None:
    assert "offset" in RecordMetadata._fields


async def test_futures_that_nobody_awaits_are_where_they_were(producer: AIOKafkaProducer) -> None:
    """Those of batches that wait, and of a transaction that ends: their errors would be reported as forgotten."""
    assert producer._message_accumulator._batches == {}
    assert producer._txn_manager.wait_for_transaction_end() is None
    builder = producer.create_batch()
    batch = MessageBatch(PARTITION, builder, 1.0, 0.0)
    assert isinstance(batch._drain_waiter, asyncio.Future)
    producer._message_accumulator._batches[PARTITION].append(batch)
    _ignore_errors(producer)
    assert len(batch._drain_waiter._callbacks or ()) == 1
    batch._drain_waiter.set_exception(RuntimeError("nobody looks at this"))
    await asyncio.sleep(0)
