"""Runs the demo: stack, clusters, workers, viewers, the kill, the recount; and stops all it started."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from rich.console import Console

from agents.cli.init import initialise
from agents.clusters.files import load_registry
from agents.demo.recount import Recount, recount
from agents.demo.story import Story, summary_of
from agents.demo.viewers import DemoViewer, demo_viewers, watches
from agents.kafka_admin import aiokafka_options, prefixed
from agents.kafka_log import KafkaLog
from agents.localstack.ports import PARTS, ports_of
from agents.localstack.progress import shown_progress
from agents.localstack.stack import LocalStack
from agents.settings import ENVIRONMENT_PREFIX, Settings
from agents.stores.cassandra import CassandraStore
from agents.stores.connection import open_cluster
from streams import topics
from streams.decoding import Rejected, decode_persona, decode_request
from streams.records import Tier

SEED: Final = 7
TOPIC_PREFIX: Final = "demo."
"""Each run has topics of its own below it; a deleted topic's name cannot be used again at once."""
REGULARS: Final = 6
"""Regular viewers beside Maya and Noah: about what one CPU student words in the time there is."""
CASUALS: Final = 120
FIRST_WATCHES: Final = 22
FIRST_SECONDS: Final = 7.0
WATCHES_PER_SECOND: Final = 1.2
"""Of a regular viewer after the first evening, where the demo runs until it is stopped."""
WATCHES: Final = 125
"""Of a regular viewer in all, where the demo ends by itself."""
STAGGER_SECONDS: Final = 0.6
DRAIN_SECONDS: Final = 22.0
"""Kept at the end for the last personas to be worded and for the recount."""
KILL_AT: Final = 0.7
"""Share of the viewers' time after which a worker is killed."""
KILL_SECONDS_ENDLESS: Final = 75.0
TICK_SECONDS: Final = 0.25
MINIMUM_PERSONAS, MINIMUM_STUDENT_SHARE = 10, 0.8
BROKEN: Final = (b"not json", b'{"user_id": "casual-001"}', b"[]")
"""Lines that no worker can use, sent among the others."""


@dataclass(slots=True)
class _Source:
    """One viewer's script, and how far it was sent."""

    viewer: DemoViewer
    script: Any
    starts_at: float
    sent: int = 0


@dataclass(slots=True)
class Demo:
    """One run. seconds: how long after the stack is ready, None until it is stopped."""

    settings: Settings
    seconds: float | None
    console: Console
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    broken: list[bytes] = field(default_factory=lambda: list(BROKEN))

    def run(self) -> int:
        """Run the demo to its end; returns the exit status and prints the figures as its last line."""
        stack = LocalStack(ports_of(self.settings), self.settings.data_folder)
        folder = self.settings.data_folder.absolute() / "demo"
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = replace(
            self.settings,
            topic_prefix=f"{TOPIC_PREFIX}{int(time.time())}.",
            cassandra_keyspace="personas_demo",
            registry=folder / f"registry-{int(time.time())}",
            template_after=0,
        )
        with ExitStack() as cleanup:
            building = self._build_clusters(cleanup)
            running = {part.part for part in stack.status() if part.state == "running"}
            with shown_progress() as progress:
                stack.up(PARTS, progress)
            cleanup.callback(stack.down, [part for part in PARTS if part not in running])
            ready = time.monotonic()
            if building.wait() != 0:
                raise DemoError(f"building the clusters failed; see {folder / 'clusters.log'}")
            cleanup.callback(self._stop_workers)
            return asyncio.run(self._after_stack(ready))

    def _build_clusters(self, cleanup: ExitStack) -> subprocess.Popen[bytes]:
        """Start building the clusters while the stack starts."""
        folder = self.settings.registry.parent
        for old in folder.glob("registry-*"):
            _remove_tree(old)
        catalogue = Path(__file__).parent.parent / "data" / "demo_catalogue.jsonl"
        log = cleanup.enter_context((folder / "clusters.log").open("wb"))
        command = [sys.executable, "-m", "agents", "clusters", "build", str(catalogue)]
        building = subprocess.Popen(
            [*command, "--out", str(self.settings.registry)],
            stdout=log,
            stderr=log,
            env=_environment(self.settings),
            start_new_session=True,
        )
        cleanup.callback(_end, building)
        return building

    async def _after_stack(self, ready: float) -> int:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopping.set)
        await _delete_topics(self.settings, TOPIC_PREFIX)
        await asyncio.to_thread(self._prepare)
        registry = load_registry(self.settings.registry)
        rows = _catalogue_by_topic()
        viewers = {v.user_id: v for v in demo_viewers(list(rows), REGULARS, CASUALS, SEED)}
        story = Story(self.console, viewers, registry.title_of)
        story.say(f"{len(registry.cards)} interest clusters built from {len(registry):,} titles")
        for name, role in (("watch-1", "watch"), ("watch-2", "watch"), ("persona", "persona")):
            self._start_worker(name, role)
        async with AsyncExitStack() as stack:
            follower = asyncio.create_task(_follow(self.settings, story))
            stack.callback(follower.cancel)
            await self._wait_for_workers(story, stopping)
            acting = asyncio.create_task(self._act(story, viewers, rows, ready))
            watching = asyncio.create_task(stopping.wait())
            limit = None if self.seconds is None else max(0.0, ready + self.seconds - time.monotonic())
            await asyncio.wait([acting, watching, follower], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            for task in (acting, watching):
                task.cancel()
            await asyncio.gather(acting, watching, return_exceptions=True)
            for task in (acting, follower):
                if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                    raise error
            if self.seconds is None:
                return 0
            await asyncio.sleep(1.0)  # the last records reach the follower
        return await self._conclude(story, viewers)

    def _prepare(self) -> None:
        """Topics and tables of this run only: what an earlier demo left is dropped."""
        _drop_keyspace(self.settings)
        initialise(self.settings)

    # Workers

    def _start_worker(self, name: str, role: str) -> None:
        log = (self.settings.data_folder / "logs" / f"demo-{name}.log").open("wb")
        page = ["--web-port", str(self.settings.web_port)] if role == "persona" else ["--no-page"]
        self.workers[name] = subprocess.Popen(
            [sys.executable, "-m", "agents", "worker", "--role", role, *page],
            stdout=log,
            stderr=log,
            env=_environment(self.settings),
            start_new_session=True,
        )

    async def _wait_for_workers(self, story: Story, stopping: asyncio.Event) -> None:
        """Until the page is announced."""
        pid = self.workers["persona"].pid
        announcement = self.settings.data_folder / "workers" / f"{pid}.json"
        while not announcement.exists() and not stopping.is_set():
            self._check_workers()
            await asyncio.sleep(0.2)
        if announcement.exists():
            url = orjson.loads(announcement.read_bytes())["url"]
            story.say(f"live page: {url}", "bold cyan")

    def _check_workers(self) -> None:
        for name, process in self.workers.items():
            if process.poll() is not None:
                path = self.settings.data_folder / "logs" / f"demo-{name}.log"
                raise DemoError(f"worker {name} ended with status {process.returncode}; see {path}")

    def _stop_workers(self) -> None:
        for process in self.workers.values():
            if process.poll() is None:
                process.terminate()
        for process in self.workers.values():
            _end(process, self.settings.shutdown_seconds + 5)

    # Viewers

    async def _act(
        self,
        story: Story,
        viewers: Mapping[str, DemoViewer],
        rows: Mapping[str, Sequence[Mapping[str, Any]]],
        ready: float,
    ) -> None:
        """Viewers watch, a worker is killed, the rest is drained."""
        producer = AIOKafkaProducer(**aiokafka_options(self.settings), acks="all", linger_ms=5)
        await producer.start()
        try:
            now = time.time_ns() // 1_000_000
            begun = time.monotonic()
            sources = _sources(viewers, rows, now, begun)
            active = None if self.seconds is None else max(30.0, ready + self.seconds - DRAIN_SECONDS - begun)
            stop_at = math.inf if active is None else begun + active
            kill_at = begun + (KILL_SECONDS_ENDLESS if active is None else KILL_AT * active)
            pace = WATCHES_PER_SECOND if active is None else (WATCHES - FIRST_WATCHES) / (active - 2 * FIRST_SECONDS)
            killed = False
            while time.monotonic() < stop_at:
                await self._tick(producer, story, sources, pace)
                if not killed and time.monotonic() >= kill_at:
                    killed = True
                    self._kill(story)
                self._check_workers()
                await asyncio.sleep(TICK_SECONDS)
            await producer.flush()
        finally:
            await producer.stop()
        story.say("viewers stopped; waiting until everything they watched is counted and worded")
        await self._drain(story)

    async def _tick(self, producer: AIOKafkaProducer, story: Story, sources: Sequence[_Source], pace: float) -> None:
        topic = prefixed(self.settings, topics.WATCH_EVENTS)
        for source in sources:
            due = _due(time.monotonic() - source.starts_at, pace, casual=source.viewer.casual)
            while source.sent < due:
                event = next(source.script, None)
                if event is None:
                    source.sent = sys.maxsize
                    break
                key = source.viewer.user_id.encode()
                await producer.send(topic, orjson.dumps(event), key=key)
                if source.sent % 40 == 39:  # a producer that retried
                    await producer.send(topic, orjson.dumps(event), key=key)
                story.on_watch(source.viewer.user_id, source.sent)
                source.sent += 1
        if self.broken:
            await producer.send(topic, self.broken.pop(), key=b"casual-001")

    def _kill(self, story: Story) -> None:
        process = self.workers.pop("watch-1")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        story.say(f"SIGKILL: worker watch-1 (pid {process.pid}) is gone; watch-2 takes over its partitions", "bold red")
        self._start_worker("watch-3", "watch")

    async def _drain(self, story: Story) -> None:
        """Until the watch group has read everything and each viewer's newest request is answered."""
        log = KafkaLog(self.settings)
        try:
            while True:
                lag = await log.lag(prefixed(self.settings, topics.WATCH_APP), topics.WATCH_EVENTS)
                if lag == 0 and story.board.answered():
                    story.say("all events counted, all requests answered")
                    return
                await asyncio.sleep(0.5)
        finally:
            await log.close()

    # The end

    async def _conclude(self, story: Story, viewers: dict[str, DemoViewer]) -> int:
        await asyncio.to_thread(self._stop_workers)
        counted = await asyncio.to_thread(recount, self.settings)
        read_back = await self._read_back(story)
        story.say(
            f"independent recount: {counted.records:,} records in the log = {counted.counted:,} counted + "
            f"{counted.repeats:,} repeats + {counted.dead_letters:,} dead letters; over {counted.over}, "
            f"under {counted.under}, unaccounted {counted.unaccounted}",
            "bold",
        )
        story.say(f"{read_back} personas of the student read back, the same bytes in Cassandra and on the topic")
        figures = summary_of(story.board)
        document = {
            "events": counted.records,
            "refresh_requests": figures["refresh_requests"],
            "personas": figures["personas"],
            "by_tier": figures["by_tier"],
            "dead_letters": counted.dead_letters,
            "over": counted.over,
            "under": counted.under,
            "stable_refreshes": story.board.stable_refreshes(viewers),
            **{
                name: value
                for name, value in figures.items()
                if name not in ("refresh_requests", "personas", "by_tier")
            },
        }
        failures = _failures(story, counted, read_back)
        for failure in failures:
            story.say(failure, "bold red")
        sys.stderr.flush()
        print(orjson.dumps(document).decode(), flush=True)  # noqa: T201
        return 1 if failures else 0

    async def _read_back(self, story: Story) -> int:
        """Student personas that Cassandra holds with the very bytes of the persona topic."""
        store = await CassandraStore.connect(self.settings)
        try:
            same = 0
            for user_id, (persona, body) in story.board.latest.items():
                stored = await store.latest(user_id)
                same += persona.tier is not Tier.TEMPLATE and stored is not None and stored.body == body
            return same
        finally:
            await store.close()


class DemoError(RuntimeError):
    """The demo cannot go on; the message says where to look."""


def _failures(story: Story, counted: Recount, read_back: int) -> list[str]:
    board = story.board
    students = sum(persona.tier is not Tier.TEMPLATE for persona, _ in board.personas)  # or the teacher's
    latest_students = sum(persona.tier is not Tier.TEMPLATE for persona, _ in board.latest.values())
    checks = {
        f"only {len(board.personas)} personas landed": len(board.personas) >= MINIMUM_PERSONAS,
        f"only {students} of {len(board.personas)} personas are the student's": students
        >= MINIMUM_STUDENT_SHARE * len(board.personas),
        "not every student persona was read back": 0 < read_back == latest_students,
        f"{counted.unaccounted} records of the log are unaccounted for": counted.unaccounted == 0,
        f"counted too often {counted.over}, lost {counted.under}": counted.over == counted.under == 0,
    }
    return [message for message, passed in checks.items() if not passed]


async def _follow(settings: Settings, story: Story) -> None:
    """Show every request and persona as it is appended."""
    names = [prefixed(settings, name) for name in (topics.REFRESH_REQUESTS, topics.PERSONAS)]
    consumer = AIOKafkaConsumer(*names, **aiokafka_options(settings), auto_offset_reset="earliest")
    await consumer.start()
    try:
        async for record in consumer:
            if record.topic == names[0]:
                request = decode_request(record.value)
                if not isinstance(request, Rejected):
                    story.on_request(request, record.timestamp)
            elif record.value is not None:
                story.on_persona(decode_persona(record.value), record.value, record.timestamp)
    finally:
        await consumer.stop()


def _sources(
    viewers: Mapping[str, DemoViewer],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    now_ms: int,
    begun: float,
) -> list[_Source]:
    sources = []
    for i, viewer in enumerate(viewers.values()):
        delay = (i * STAGGER_SECONDS) % 40 if viewer.casual else i * STAGGER_SECONDS
        sources.append(_Source(viewer, watches(viewer, rows, now_ms, SEED), begun + delay))
    return sources


def _due(seconds: float, pace: float, *, casual: bool) -> float:
    """Watches a viewer has had this long after their start: regulars begin with a quick first evening, then `pace`."""
    if seconds < 0:
        return 0
    if casual:
        return seconds * 0.2
    if seconds < FIRST_SECONDS:
        return FIRST_WATCHES * seconds / FIRST_SECONDS
    return FIRST_WATCHES + (seconds - FIRST_SECONDS) * pace


def _catalogue_by_topic() -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    path = Path(__file__).parent.parent / "data" / "demo_catalogue.jsonl"
    for line in path.read_bytes().splitlines():
        row = orjson.loads(line)
        rows.setdefault(row["topic"], []).append(row)
    return rows


def _environment(settings: Settings) -> dict[str, str]:
    """This process's environment with the demo's settings in it."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
    return own | settings.environment()


async def _delete_topics(settings: Settings, prefix: str) -> None:
    admin = AIOKafkaAdminClient(**aiokafka_options(settings))
    await admin.start()
    try:
        old = [name for name in await admin.list_topics() if name.startswith(prefix)]
        if old:
            await admin.delete_topics(old)
    finally:
        await admin.close()


def _drop_keyspace(settings: Settings) -> None:
    cluster = open_cluster(settings)
    try:
        session = cluster.connect()
        session.execute(f'DROP KEYSPACE IF EXISTS "{settings.cassandra_keyspace}"', timeout=60)
    finally:
        cluster.shutdown()


def _end(process: subprocess.Popen[bytes], seconds: float = 5.0) -> None:
    """Stop a process we started: gently, then by force."""
    if process.poll() is not None:
        return
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    if process.poll() is None:
        process.kill()
        process.wait()


def _remove_tree(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
