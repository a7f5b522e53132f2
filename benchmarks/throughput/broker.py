"""A Kafka broker of a benchmark's own: its topics, the events in them, and how far a group has committed."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Final

import orjson
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exports without saying so
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourceType,
)

from agents.kafka_admin import confluent_options, create_topics, prefixed
from agents.localstack.ports import free_ports
from agents.localstack.progress import silent
from agents.localstack.stack import LocalStack
from agents.settings import Settings
from streams import topics

PARTITIONER: Final = "murmur2_random"
"""Kafka's own for keyed records: librdkafka's default is another."""
FLUSH_SECONDS: Final = 60.0

Progress = Callable[[str], None]


def quiet(text: str) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class Broker:
    """A running broker. settings: with its address, 4 partitions and an empty topic prefix."""

    settings: Settings
    stack: LocalStack
    folder: Path

    @property
    def log_folder(self) -> Path:
        """Where its topics' segments are."""
        return self.folder / "kafka"

    def prefixed(self, prefix: str) -> Settings:
        """Settings of a worker whose topics have this prefix. All keep their kernel in one folder, compiled once."""
        return replace(self.settings, topic_prefix=prefix, data_folder=self.folder / "workers")

    def create_topics(self, prefix: str, more: Mapping[str, str] | None = None) -> Settings:
        """The product's topics under a prefix, as `personas init` creates them; more: settings of the watch topic."""
        settings = self.prefixed(prefix)
        create_topics(settings)
        if more:
            self.configure(prefixed(settings, topics.WATCH_EVENTS), more)
        return settings

    def create_topic(self, name: str, partitions: int, config: Mapping[str, str]) -> None:
        """One more topic, replicated once."""
        new = NewTopic(name, num_partitions=partitions, replication_factor=1, config=dict(config))
        admin = self.admin()  # kept: an answer dies with its client
        for future in admin.create_topics([new], operation_timeout=15).values():
            future.result()

    def configure(self, topic: str, config: Mapping[str, str]) -> None:
        """Change a topic's settings."""
        entries = [
            ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in config.items()
        ]
        resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=entries)
        admin = self.admin()
        for future in admin.incremental_alter_configs([resource]).values():
            future.result()

    def delete_topics(self, run: str) -> None:
        """Delete every topic with `run` in its name; their segments go a minute later."""
        admin = self.admin()
        names = [name for name in admin.list_topics(timeout=15).topics if run in name]
        for future in admin.delete_topics(names).values() if names else ():
            future.result()

    def admin(self) -> AdminClient:
        """A client for what else is asked of the broker."""
        return AdminClient(confluent_options(self.settings))


@contextmanager
def local_broker(base: Settings, progress: Progress = quiet) -> Iterator[Broker]:
    """A broker on free ports with a new folder below the data folder, so that its log is on the project's own disk.

    Stopped and removed at the end. Raises what LocalStack.up raises.
    """
    parent = base.data_folder.absolute() / "benchmarks"
    parent.mkdir(parents=True, exist_ok=True)
    assets = base.data_folder.absolute() / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="broker-", dir=parent))
    (folder / "assets").symlink_to(assets)
    ports = free_ports()
    stack = LocalStack(ports, folder)
    try:
        progress("starting a broker")
        stack.up(["kafka"], silent)
        yield Broker(ports.settings(replace(base, topic_prefix="", partitions=4, replication_factor=1)), stack, folder)
    finally:
        stack.down(["kafka"])
        shutil.rmtree(folder, ignore_errors=True)


def produce_lines(settings: Settings, topic: str, path: Path, events: int) -> None:
    """Write the first `events` lines of a log to a topic (its name in Kafka), keyed by `user_id`."""
    with path.open("rb") as file:
        found = (line.rstrip(b"\n") for line in islice(file, events))
        produce(settings, topic, ((orjson.loads(line)["user_id"].encode(), line) for line in found))


def produce(settings: Settings, topic: str, records: Iterable[tuple[bytes, bytes]]) -> int:
    """Write (key, value) records as fast as the broker takes them; returns how many. Raises KafkaException."""
    failed: list[str] = []
    options = {"partitioner": PARTITIONER, "linger.ms": 50, "queue.buffering.max.kbytes": 262_144}
    producer = Producer({**confluent_options(settings), **options})

    def delivered(error: object, _: object) -> None:
        if error is not None:
            failed.append(str(error))

    count = 0
    for key, value in records:
        while True:
            try:
                producer.produce(topic, value, key, on_delivery=delivered)
                break
            except BufferError:
                producer.poll(0.1)
        count += 1
        if count % 1000 == 0:
            producer.poll(0)
    left = producer.flush(FLUSH_SECONDS)
    if left or failed:
        raise RuntimeError(f"{topic}: {left} records not sent in {FLUSH_SECONDS:.0f} s; {failed[:1]}")
    return count


class CommittedOffsets:
    """How far a group has committed a topic, asked of the broker without joining the group."""

    def __init__(self, settings: Settings, group: str, topic: str) -> None:
        """`group` and `topic` are names in Kafka."""
        self._partitions = [TopicPartition(topic, number) for number in range(settings.partitions)]
        self._consumer = Consumer(
            {**confluent_options(settings), "group.id": group, "enable.auto.commit": False}  # never subscribed
        )

    def __enter__(self) -> CommittedOffsets:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def by_partition(self) -> list[int]:
        """First offset not committed of each partition; 0 where nothing is, or while the group has no coordinator."""
        try:
            found = self._consumer.committed(self._partitions, timeout=10)
        except KafkaException:
            return [0] * len(self._partitions)
        return [max(0, int(partition.offset)) for partition in found]

    def total(self) -> int:
        return sum(self.by_partition())

    def ends(self) -> list[int]:
        """Offset that the next record of each partition will get."""
        return [int(self._consumer.get_watermark_offsets(tp, timeout=10)[1]) for tp in self._partitions]


def wait_until(condition: Callable[[], bool], seconds: float, what: str, pause: float = 0.1) -> None:
    """Return once the condition holds. Raises TimeoutError that says what did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(pause)
