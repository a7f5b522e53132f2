"""Worker processes for tests, and what they leave in Kafka and Cassandra."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import isawaitable
from pathlib import Path
from typing import Any

import orjson
from aiohttp import ClientConnectionError, ClientSession
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from agents.kafka_admin import create_topics, prefixed
from agents.kafka_log import KafkaLog
from agents.settings import Settings
from agents.stores.migrate import apply_migrations, packaged_migrations, schema_session
from agents.topic_reader import TopicReader
from streams import topics
from tests.conftest import TEST_MARK

Records = Sequence[tuple[bytes | None, bytes | None]]
"""(key, value) of records to send."""


def with_topics_and_schema(settings: Settings) -> Settings:
    """The settings, once their topics and their schema are there."""
    create_topics(settings)
    with schema_session(settings, 60) as session:
        apply_migrations(session, settings, packaged_migrations())
    return settings


@dataclass(frozen=True)
class WorkerProcess:
    """`personas worker` as a process of its own. `number` counts up from 0 within its `Workers`."""

    process: subprocess.Popen[bytes]
    number: int
    role: str
    log: Path
    discovery: Path

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def text(self) -> str:
        """All that it has logged."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait()

    def stop(self, seconds: float = 60) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    async def readiness(self) -> tuple[int, dict[str, str]]:
        """Status and answer of /readyz; (0, {}) while there is no page."""
        if not self.discovery.exists():
            return 0, {}
        url = orjson.loads(self.discovery.read_bytes())["url"]
        try:
            async with ClientSession() as client, client.get(f"{url.rstrip('/')}/readyz") as response:
                return response.status, await response.json()
        except ClientConnectionError:
            return 0, {}


class Workers:
    """The workers of one test or module, each logging to a file in `folder`."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self.all: list[WorkerProcess] = []

    def start(
        self, role: str = "watch", *, page: bool = False, environment: Mapping[str, str] | None = None
    ) -> WorkerProcess:
        """Start one, with more variables if given; it may take seconds until it consumes."""
        number = len(self.all)
        path = self._folder / f"worker-{number}-{role}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "agents", "worker", "--role", role, *([] if page else ["--no-page"])],
                env={
                    "PATH": "/usr/bin:/bin",
                    TEST_MARK: os.environ[TEST_MARK],
                    **self._settings.environment(),
                    **(environment or {}),
                },
                stdout=log,
                stderr=log,
            )
        discovery = self._settings.data_folder / "workers" / f"{process.pid}.json"
        worker = WorkerProcess(process, number, role, path, discovery)
        self.all.append(worker)
        return worker

    def running(self, role: str) -> list[WorkerProcess]:
        """Those of this role that have not ended."""
        return [worker for worker in self.all if worker.role == role and worker.running]

    def end(self) -> None:
        """Kill what still runs."""
        for worker in self.all:
            worker.kill()

    def logs(self) -> str:
        """The end of every log, for messages of failed tests."""
        return "\n".join(f"--- {worker.log.name}\n{worker.text()[-4000:]}" for worker in self.all)


async def until(
    condition: Callable[[], bool | Awaitable[bool]], workers: Workers, seconds: float = 120, pause: float = 0.25
) -> None:
    """Wait until the condition holds. Raises AssertionError with the workers' logs if it does not in time."""
    deadline = time.monotonic() + seconds
    while True:
        holds = condition()
        if await holds if isawaitable(holds) else holds:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s\n{workers.logs()}")
        await asyncio.sleep(pause)


async def send(
    settings: Settings, topic: str, records: Records, headers: Sequence[tuple[str, bytes]] | None = None
) -> None:
    """Send records as a producer with Kafka's default partitioner does."""
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap, max_request_size=2_000_000) as producer:
        for key, value in records:
            await producer.send(prefixed(settings, topic), value, key=key, headers=headers)
        await producer.flush()


async def committed(settings: Settings, log: KafkaLog, group: str, topic: str) -> list[int]:
    """First offset of each partition that the group has not committed."""
    name = prefixed(settings, group)
    return [await log.committed(name, topic, partition) for partition in range(settings.partitions)]


async def finished(settings: Settings, log: KafkaLog, group: str, topic: str) -> bool:
    """Whether the group has committed the whole topic. A broker that does not answer yet says nothing."""
    try:
        ends = [await log.end(topic, partition) for partition in range(settings.partitions)]
        return ends == await committed(settings, log, group, topic)
    except KafkaError:
        return False


async def until_counted(settings: Settings, workers: Workers, seconds: float = 120) -> None:
    """Wait until the watch app has committed every watch event."""
    log = KafkaLog(settings)
    try:
        await until(lambda: finished(settings, log, topics.WATCH_APP, topics.WATCH_EVENTS), workers, seconds, 0.5)
    finally:
        await log.close()


def read(settings: Settings, topic: str) -> list[Any]:
    """Every message of a topic, by its name without prefix."""
    with TopicReader(settings) as reader:
        return list(reader.read(prefixed(settings, topic)))


def table_of(settings: Settings) -> dict[str, bytes]:
    """The watch app's states by viewer, from their changelog."""
    newest = {(m.key() or b"").decode(): m.value() for m in read(settings, topics.INTERESTS_CHANGELOG)}
    return {user: value for user, value in newest.items() if value is not None}


def by_key(messages: Iterable[Any]) -> dict[str, list[bytes | None]]:
    """Values of each key in log order."""
    values: dict[str, list[bytes | None]] = {}
    for message in messages:
        values.setdefault(message.key().decode(), []).append(message.value())
    return values
