"""Reading topics to the end that they have now, without joining a consumer group."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from agents.kafka_admin import KafkaRefused, KafkaUnavailable, confluent_options, prefixed
from agents.settings import Settings

STALL_SECONDS: Final = 15.0
_READ_AT_ONCE: Final = 500
_WAIT_SECONDS: Final = 0.05
"""For the end of a partition to be told, since it comes alone."""
_PASSING: Final = (KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE)
"""For a moment after a topic was created or a partition moved."""


class TopicReader:
    """Reads whole topics or their last records; a context manager. Topic names are those in Kafka."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._consumer = Consumer(
            {
                **confluent_options(settings),
                "group.id": prefixed(settings, "reader"),  # required, never joined
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "enable.partition.eof": True,  # tells the end also after transaction markers
                "isolation.level": "read_committed",
            }
        )

    def __enter__(self) -> TopicReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def read(self, topic: str, since_ms: int | None = None) -> Iterator[Message]:
        """Every record of `topic` appended at or after `since_ms`, up to the end that it has now.

        Raises KafkaUnavailable if the brokers fall silent, KafkaRefused if the topic does not exist.
        """

        def start(partition: int, low: int, high: int) -> int:
            return low if since_ms is None else self._offset_at(topic, partition, since_ms, high)

        yield from self._read_from(topic, start)

    def read_last(self, topic: str, count: int) -> Iterator[Message]:
        """The last records of each partition of `topic`: at most `count`. Raises as `read` does."""
        yield from self._read_from(topic, lambda _, low, high: max(low, high - count))

    def read_range(self, topic: str, partition: int, start: int, end: int) -> Iterator[Message]:
        """The records at offsets start <= offset < end of a partition that has them. Raises as `read` does."""
        if start < end:
            yield from self._read_until([TopicPartition(topic, partition, start)], {partition: end})

    def ends(self, topic: str, partition: int) -> tuple[int, int]:
        """First offset of a partition, and the one that the next record will get. Raises KafkaUnavailable."""
        low, high = self._ask(self._consumer.get_watermark_offsets, TopicPartition(topic, partition))
        return int(low), int(high)

    def read_one(self, topic: str, partition: int, offset: int) -> Message | None:
        """The record at this position, None if the topic does not hold it (any more)."""
        if partition not in self.partitions(topic):
            return None
        low, high = self._ask(self._consumer.get_watermark_offsets, TopicPartition(topic, partition))
        if not low <= offset < high:
            return None
        start = [TopicPartition(topic, partition, offset)]
        first = next(self._read_until(start, {partition: high}), None)
        return first if first is not None and first.offset() == offset else None

    def partitions(self, topic: str) -> list[int]:
        """Partition numbers of `topic`. Raises KafkaUnavailable and KafkaRefused."""
        known = self._ask(self._consumer.list_topics, topic).topics[topic]
        if known.error is not None:
            raise KafkaRefused(f"topic {topic} at {self._address}: {known.error.str()}; run `personas init`")
        return sorted(known.partitions)

    def _read_from(self, topic: str, start_of: Callable[[int, int, int], int]) -> Iterator[Message]:
        """Records from the offset that `start_of` gives for (partition, first offset, end) to the end."""
        ends: dict[int, int] = {}
        starts: list[TopicPartition] = []
        for partition in self.partitions(topic):
            low, high = self._ask(self._consumer.get_watermark_offsets, TopicPartition(topic, partition))
            start = start_of(partition, low, high)
            if start < high:
                ends[partition] = high
                starts.append(TopicPartition(topic, partition, start))
        yield from self._read_until(starts, ends)

    def _read_until(self, starts: list[TopicPartition], ends: dict[int, int]) -> Iterator[Message]:
        if not ends:
            return
        self._consumer.assign(starts)
        quiet_since = time.monotonic()
        while ends:
            messages = self._ask(self._consumer.consume, _READ_AT_ONCE, timeout=_WAIT_SECONDS)
            for message in messages:
                partition, error = message.partition(), message.error()
                if error is not None and error.code() == KafkaError._PARTITION_EOF:
                    ends.pop(partition, None)
                elif error is not None:
                    raise KafkaUnavailable(f"reading at {self._address}: {error.str()}")
                elif message.offset() < ends.get(partition, 0):
                    yield message
                if error is None and message.offset() + 1 >= ends.get(partition, 0):
                    ends.pop(partition, None)
            if messages:
                quiet_since = time.monotonic()
            if time.monotonic() - quiet_since > STALL_SECONDS:
                raise KafkaUnavailable(f"Kafka at {self._address} sent nothing for {STALL_SECONDS:.0f} s")
        self._consumer.unassign()

    def _offset_at(self, topic: str, partition: int, since_ms: int, high: int) -> int:
        (found,) = self._ask(self._consumer.offsets_for_times, [TopicPartition(topic, partition, since_ms)])
        return high if found.offset < 0 else int(found.offset)

    def _ask(self, call: Callable[..., Any], *arguments: object, timeout: float = STALL_SECONDS) -> Any:  # noqa: ANN401
        """The client's answer; a broker that does not lead a partition yet is asked again."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                return call(*arguments, timeout=timeout)
            except KafkaException as error:
                cause: KafkaError = error.args[0]
                if cause.code() not in _PASSING or time.monotonic() >= deadline:
                    raise KafkaUnavailable(
                        f"Kafka at {self._address} does not answer ({cause.str()}); "
                        "check PERSONAS_KAFKA_BOOTSTRAP and that the brokers run"
                    ) from error
            time.sleep(0.1)

    @property
    def _address(self) -> str:
        return self._settings.kafka_bootstrap
