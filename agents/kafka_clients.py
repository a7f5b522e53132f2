"""The partitions of topics that must exist, for consumers that join no group."""

from __future__ import annotations

from collections.abc import Iterable

from aiokafka import AIOKafkaConsumer, TopicPartition


class TopicMissingError(Exception):
    """A topic does not exist; the message says what to do."""


async def partitions_of(consumer: AIOKafkaConsumer, topics: Iterable[str]) -> list[TopicPartition]:
    """All partitions of `topics`, asked of the brokers now. Raises TopicMissingError; creates nothing."""
    # The public partitions_for_topic knows only topics that this consumer already reads.
    cluster = await consumer._client.fetch_all_metadata()
    found: list[TopicPartition] = []
    for topic in topics:
        numbers = cluster.partitions_for_topic(topic)
        if not numbers:
            raise TopicMissingError(f"topic {topic} does not exist; run `personas init`")
        found += [TopicPartition(topic, number) for number in sorted(numbers)]
    return found
