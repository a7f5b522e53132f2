"""One worker process: the watch app, the persona app or both, and the page, started and stopped together."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import orjson

from agents.artefacts import load_configuration, load_current_registry
from agents.kafka_admin import topic_ids, verify_topics
from agents.page.kafka import KafkaPageSource
from agents.page.server import create_page, serve_page
from agents.page.source import Health
from agents.persona_app import PersonaApp
from agents.settings import Settings
from agents.stores.cassandra import CassandraStore
from agents.stores.ports import PersonaStore, StoreUnavailable
from agents.telemetry import Telemetry
from agents.watch_app import WatchApp, WorkerError
from streams import topics

WAIT_SECONDS: Final = 2.0
"""Between attempts to reach what is absent at start."""

logger = logging.getLogger(__name__)


class Role(StrEnum):
    """Which apps a worker runs. They are separate consumer groups, so a slow model never stalls counting."""

    WATCH = "watch"
    PERSONA = "persona"
    ALL = "all"


async def run_worker(settings: Settings, role: Role, telemetry: Telemetry, *, page: bool = True) -> int:
    """Run until SIGTERM or SIGINT (returns 0), or until an app crashes (returns 1, so a supervisor restarts it)."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    async with AsyncExitStack() as stack:
        starting = asyncio.ensure_future(_start(stack, settings, role, telemetry, page=page))
        await asyncio.wait([starting, _task(stopping.wait())], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            with suppress(asyncio.CancelledError):
                await starting
            return 0
        apps = starting.result()
        crashes = [_task(app._crashed.wait()) for app in apps]
        logger.info("worker ready: %s", role)
        await asyncio.wait([*crashes, _task(stopping.wait())], return_when=asyncio.FIRST_COMPLETED)
        crashed = [app for app in apps if app.crashed]
        for app in crashed:
            logger.error("%s failed: %r; stopping so that it is restarted", app.conf.id, app.crash_reason)
        return 1 if crashed else 0


async def _start(
    stack: AsyncExitStack, settings: Settings, role: Role, telemetry: Telemetry, *, page: bool
) -> list[Any]:
    """Start the apps of a role; what must be stopped goes on the stack, in order. Returns the Faust apps."""
    await _until_ready("Kafka", settings.kafka_bootstrap, lambda: asyncio.to_thread(_check_topics, settings))
    apps: list[Any] = []
    probes: dict[str, Callable[[], bool]] = {}
    store: PersonaStore | None = None
    if role is not Role.WATCH or page:
        store = await _until_ready(
            "Cassandra",
            f"{settings.cassandra_hosts}:{settings.cassandra_port}",
            lambda: CassandraStore.connect(settings),
        )
        stack.push_async_callback(store.close)
    if role is not Role.WATCH:
        assert store is not None  # noqa: S101
        persona = PersonaApp(settings, store, telemetry)
        stack.push_async_callback(_within, settings.shutdown_seconds, "persona app", persona.stop)
        await persona.start()
        apps.append(persona.app)
        probes["persona app"] = persona.ready
    if role is not Role.PERSONA:
        ids = await asyncio.to_thread(
            topic_ids, settings, [topics.WATCH_EVENTS, topics.USER_CONTROLS, topics.WATCH_POSITIONS]
        )
        configuration, registry = load_configuration(settings, ids)
        watch = WatchApp(settings, configuration, registry, telemetry, ids)
        stack.push_async_callback(watch.close)
        stack.push_async_callback(_within, settings.shutdown_seconds, "watch app", watch.app.stop)
        await watch.app.start()
        apps.append(watch.app)
        probes["watch app"] = lambda: watch.recovered
    if page and store is not None:
        await _serve(stack, settings, store, role, probes, apps, telemetry)
    return apps


async def _serve(
    stack: AsyncExitStack,
    settings: Settings,
    store: PersonaStore,
    role: Role,
    probes: Mapping[str, Callable[[], bool]],
    apps: Sequence[Any],
    telemetry: Telemetry,
) -> None:
    source = KafkaPageSource(settings, store, load_current_registry(settings), telemetry)

    async def ready() -> Mapping[str, Health]:
        own = {name: Health.OK if probe() else Health.DOWN for name, probe in probes.items()}
        return {**await source.health(), **own}

    site = create_page(source, alive=lambda: not any(app.crashed for app in apps), ready=ready)
    running = await serve_page(site, settings.web_host, settings.web_port)
    stack.push_async_callback(running.stop)
    logger.info("page at %s", running.url)
    stack.callback(_announce(settings, role, running.url))


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
        except (StoreUnavailable, ConnectionError, TimeoutError) as error:
            if attempts % 10 == 0:
                logger.warning("waiting for %s at %s: %s", name, address, error)
            attempts += 1
            await asyncio.sleep(WAIT_SECONDS)


async def _within(seconds: float, what: str, stop: Callable[[], Awaitable[Any]]) -> None:
    """Stop something within the deadline; what does not stop is left to the end of the process."""
    try:
        await asyncio.wait_for(stop(), seconds)
    except TimeoutError:
        logger.error("%s did not stop within %.0f s; its uncommitted records will be read again", what, seconds)


def _task(awaitable: Any) -> asyncio.Future[Any]:  # noqa: ANN401
    task: asyncio.Future[Any] = asyncio.ensure_future(awaitable)
    return task
