"""One worker process: the watch app, the persona app or both, and the page, started and stopped together."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import orjson

from agents.artefacts import load_configuration, load_current_registry
from agents.compiled import worker_kernel
from agents.kafka_admin import KafkaRefused, KafkaUnavailable, topic_ids, verify_topics
from agents.page.kafka import KafkaPageSource
from agents.page.server import create_page, serve_page
from agents.page.source import Health
from agents.persona_app import PersonaApp
from agents.settings import Settings
from agents.stores.cassandra import CassandraStore
from agents.stores.ports import PersonaStore, StoreError, StoreUnavailable
from agents.telemetry import Telemetry
from agents.watch_app import WatchApp, WorkerError
from streams import topics

WAIT_SECONDS: Final = 2.0
"""Between attempts to reach what is absent at start."""
CLOSE_SECONDS: Final = 5.0
"""Limit for closing connections after the apps have stopped."""
REPEAT_SECONDS: Final = 30.0
REMEMBERED_MESSAGES: Final = 1000
SWITCH_SECONDS: Final = 0.0005
"""How long a thread may keep others from Python. At the default of 5 ms, fetching waits while events are handled."""

logger = logging.getLogger(__name__)


class Role(StrEnum):
    """Which apps a worker runs. They are separate consumer groups, so a slow model never stalls counting."""

    WATCH = "watch"
    PERSONA = "persona"
    ALL = "all"


async def run_worker(settings: Settings, role: Role, telemetry: Telemetry, *, page: bool = True) -> int:
    """Run until SIGTERM or SIGINT (returns 0), or until an app crashes (returns 1, so a supervisor restarts it).

    Raises WorkerError for what only an operator can mend.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_Repeats())
    parts, clients = _Parts(ending), AsyncExitStack()
    starting = _task(_start(clients, parts, settings, role, telemetry, page=page))
    try:
        await asyncio.wait([starting, _task(ending.wait())], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            _spare_what_stays()
            logger.info("worker ready: %s", role)
            await ending.wait()
    finally:
        starting.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await starting
        stopped = await parts.stop(settings.shutdown_seconds)
        if not await _within(CLOSE_SECONDS, "a client", clients.aclose) or not stopped:
            _end_at_once(telemetry)
    crashed = [app for app in parts.apps if app.crashed]
    for app in crashed:
        logger.error("%s failed: %r; stopped so that it is restarted", app.conf.id, app.crash_reason)
    return 1 if crashed else 0


def _spare_what_stays() -> None:
    """Take what was loaded out of garbage collection: looking through it stops everything for a quarter of a second."""
    gc.collect()
    gc.freeze()


class _Parts:
    """What a worker has started: its Faust apps, how each part is, and how each is stopped."""

    def __init__(self, ending: asyncio.Event) -> None:
        """`ending` is set when an app crashes, also while another part is still being waited for."""
        self.apps: list[Any] = []
        self.health: dict[str, Callable[[], Awaitable[Health]]] = {}
        self.stalled: Callable[[], str | None] = lambda: None
        self._ending = ending
        self._stops: dict[str, Callable[[], Awaitable[Any]]] = {}

    def add(self, name: str, stop: Callable[[], Awaitable[Any]]) -> None:
        """Stop this part when the worker ends. Call it before the part starts, as a start may fail half-way."""
        self._stops[name] = stop

    def add_app(self, name: str, app: Any, health: Callable[[], Awaitable[Health]]) -> None:  # noqa: ANN401
        """End the worker when this Faust app crashes, and tell how it is."""
        self.apps.append(app)
        self.health[name] = health
        _task(app._crashed.wait()).add_done_callback(lambda _: self._ending.set())

    async def stop(self, seconds: float) -> bool:
        """Stop all parts at once, so that one deadline holds for the whole worker. False if one did not stop."""
        return all(await asyncio.gather(*(_within(seconds, name, stop) for name, stop in self._stops.items())))


async def _start(
    clients: AsyncExitStack, parts: _Parts, settings: Settings, role: Role, telemetry: Telemetry, *, page: bool
) -> None:
    """Start the parts of a role. Counting comes first: it does not wait for Cassandra."""
    try:
        await _until_ready("Kafka", settings.kafka_bootstrap, lambda: asyncio.to_thread(_check_topics, settings))
        if role is not Role.PERSONA:
            await _start_watch(clients, parts, settings, telemetry)
        if role is Role.WATCH and not page:
            return
        address = f"{settings.cassandra_hosts}:{settings.cassandra_port}"
        store = await _until_ready("Cassandra", address, lambda: CassandraStore.connect(settings))
        clients.push_async_callback(store.close)
        if role is not Role.WATCH:
            persona = PersonaApp(settings, store, telemetry)
            parts.add("persona app", persona.stop)
            await persona.start()
            parts.add_app("persona app", persona.app, persona.health)
        if page:
            await _serve(clients, parts, settings, store, role, telemetry)
    except (KafkaUnavailable, KafkaRefused, StoreError) as error:
        raise WorkerError(str(error)) from error


async def _start_watch(clients: AsyncExitStack, parts: _Parts, settings: Settings, telemetry: Telemetry) -> None:
    names = [topics.WATCH_EVENTS, topics.USER_CONTROLS, topics.WATCH_POSITIONS, topics.INTERESTS_CHANGELOG]
    ids = await asyncio.to_thread(topic_ids, settings, names)
    kernel = await asyncio.to_thread(worker_kernel, settings.data_folder / "kernel")
    configuration, registry = load_configuration(settings, ids, kernel=kernel)
    logger.info("registry version %d, thresholds %s", registry.version, configuration.thresholds.name)
    watch = WatchApp(settings, configuration, registry, telemetry, ids)
    clients.push_async_callback(watch.close)
    parts.add("watch app", watch.app.stop)
    await watch.app.start()
    parts.stalled = watch.stalled
    parts.add_app("watch app", watch.app, watch.health)


async def _serve(
    clients: AsyncExitStack, parts: _Parts, settings: Settings, store: PersonaStore, role: Role, telemetry: Telemetry
) -> None:
    source = KafkaPageSource(settings, store, load_current_registry(settings), telemetry)

    async def ready() -> Mapping[str, Health]:
        # At once, so that a health check's own time limit is kept.
        own = asyncio.gather(*(health() for health in parts.health.values()))
        shared = await source.health()
        return {**shared, **dict(zip(parts.health, await own, strict=True))}

    def alive() -> bool:
        return not any(app.crashed for app in parts.apps)

    site = create_page(source, alive=alive, stalled=parts.stalled, ready=ready)
    running = await serve_page(site, settings.web_host, settings.web_port)
    parts.add("page", running.stop)
    logger.info("page at %s", running.url)
    clients.callback(_announce(settings, role, running.url))


def _announce(settings: Settings, role: Role, url: str) -> Callable[[], None]:
    """Write where this worker's page is, so that workers on one host are discoverable; returns the removal."""
    folder = settings.data_folder / "workers"
    folder.mkdir(parents=True, exist_ok=True)
    path: Path = folder / f"{os.getpid()}.json"
    path.write_bytes(orjson.dumps({"pid": os.getpid(), "role": role, "url": url}))
    return lambda: path.unlink(missing_ok=True)


def _check_topics(settings: Settings) -> None:
    mismatches = verify_topics(settings)
    if mismatches:
        lines = "\n  ".join(str(mismatch) for mismatch in mismatches)
        raise WorkerError(f"topics are not as they must be; run `personas init`:\n  {lines}")


async def _until_ready(name: str, address: str, attempt: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401
    """Try until it answers, saying once in a while what is waited for. Errors that waiting cannot mend are raised."""
    attempts = 0
    while True:
        try:
            return await attempt()
        except (KafkaUnavailable, StoreUnavailable) as error:
            if attempts % 10 == 0:
                logger.warning("waiting for %s at %s: %s", name, address, error)
            attempts += 1
            await asyncio.sleep(WAIT_SECONDS)


async def _within(seconds: float, what: str, stop: Callable[[], Awaitable[Any]]) -> bool:
    """Whether something stopped within the deadline. It is not cancelled then: Faust's waits ignore that."""
    stopping = _task(stop())
    await asyncio.wait([stopping], timeout=seconds)
    if not stopping.done():
        logger.error("%s did not stop within %.0f s; what is not committed will be read again", what, seconds)
        return False
    try:
        stopping.result()
    except (Exception, asyncio.CancelledError):
        logger.exception("%s did not stop cleanly", what)
        return False
    return True


def _end_at_once(telemetry: Telemetry) -> None:
    """End with status 1 past the deadline: tasks and threads that wait for a broker would keep the process."""
    if (error := sys.exception()) is not None:
        logger.error("%s", error)
    telemetry.close()
    logging.shutdown()
    os._exit(1)


class _Repeats(logging.Filter):
    """Lets a Kafka client say the same once in a while: it reports many attempts a second while a broker is away."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or not record.name.startswith("aiokafka"):
            return True
        message = record.getMessage()
        if record.created - self._said.get(message, 0.0) < REPEAT_SECONDS:
            return False
        if len(self._said) >= REMEMBERED_MESSAGES:
            self._said.clear()
        self._said[message] = record.created
        return True


def _task(awaitable: Any) -> asyncio.Future[Any]:  # noqa: ANN401
    task: asyncio.Future[Any] = asyncio.ensure_future(awaitable)
    return task
