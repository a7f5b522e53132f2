"""The persona app: Faust agents that feed refresh and upgrade requests to the writer, and acknowledge what it finished.

Acknowledgements follow offset order: otherwise Faust can commit past an unfinished record (faust-streaming #606).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final

from agents.batch_intake import with_batch_intake
from agents.faust_apps import create_app, input_record, is_current, produce, raw_topic
from agents.page.source import Health
from agents.persona_writer import PersonaWriter, WriterStopped
from agents.settings import Settings
from agents.stores.ports import PersonaStore
from agents.student_client import TritonStudent
from agents.teacher_client import policy_of, teacher_of
from agents.telemetry import Telemetry
from agents.writer_configuration import WriterConfiguration
from streams import topics
from streams.watch import InputRecord, Output

HEALTH_SECONDS: Final = 2.0
"""Shorter than the time limits of health checks."""
IDENTITY_SECONDS: Final = 5.0
"""How long the start waits to be told which student it has."""

logger = logging.getLogger(__name__)

Submit = Callable[[InputRecord, int], Awaitable[None]]


class PersonaApp:
    """One worker's share of the requests. Make it inside the running loop; `app` is its Faust app."""

    def __init__(self, settings: Settings, store: PersonaStore, telemetry: Telemetry) -> None:
        self._settings = settings
        self._student = TritonStudent(settings)
        self._teacher = teacher_of(settings)
        self._events: dict[tuple[str, int], dict[int, Any]] = defaultdict(dict)
        self._writer = PersonaWriter(
            store,
            self._student,
            self._publish,
            WriterConfiguration(
                budget_tokens_per_hour=settings.budget_tokens_per_hour,
                budget_in_flight=settings.student_concurrency,
                topic_prefix=settings.topic_prefix,
                teacher_policy=policy_of(settings),
            ),
            lambda: time.time_ns() // 1_000_000,
            telemetry,
            self._acknowledge,
            self._teacher,
        )
        self._failing: asyncio.Task[None] | None = None
        self._identifying: asyncio.Task[None] | None = None
        # A request can wait for the student for hours. A rebalance must not: what is unfinished is given up and read
        # again by the next owner.
        self.app = create_app(settings, topics.PERSONA_APP, finish_before_rebalance=False)
        with_batch_intake(self.app, settings, {})
        requests = raw_topic(self.app, settings, topics.REFRESH_REQUESTS)
        upgrades = raw_topic(self.app, settings, topics.UPGRADE_REQUESTS)
        self.app.agent(requests, name="requests")(self._requests)
        self.app.agent(upgrades, name="upgrades")(self._upgrades)
        self.app.on_partitions_revoked.connect(self._on_revoked)
        self.app.on_partitions_assigned.connect(self._on_assigned)

    async def start(self) -> None:
        """Start consuming; a failure of the writer crashes the app."""
        self._failing = asyncio.create_task(self._crash_with_writer())
        self._identifying = asyncio.create_task(self._identify_student())
        # One that is away is not waited for longer: its first answer tells as well.
        await asyncio.wait([self._identifying], timeout=IDENTITY_SECONDS)
        await self.app.start()

    async def stop(self) -> None:
        """Finish what was taken within half the shutdown limit, commit it, leave the group."""
        await self._writer.stop(self._settings.shutdown_seconds / 2)
        await self.app.stop()
        await self._student.close()
        if self._teacher is not None:
            await self._teacher.close()
        for task in (self._failing, self._identifying):
            if task is not None:
                task.cancel()

    async def health(self) -> Health:
        """Down while the store does not answer; degraded while the student does not: requests wait.

        A teacher that does not answer changes nothing: texts go without it.
        """
        if not self._writer.store_available:
            return Health.DOWN
        return Health.OK if await self._student_answers() else Health.DEGRADED

    async def _student_answers(self) -> bool:
        if not self._writer.student_available:
            return False
        try:
            return await asyncio.wait_for(self._student.ready(), HEALTH_SECONDS)
        except TimeoutError:
            return False

    async def _requests(self, stream: Any) -> None:  # noqa: ANN401
        await self._feed(stream, topics.REFRESH_REQUESTS, self._writer.submit)

    async def _upgrades(self, stream: Any) -> None:  # noqa: ANN401
        await self._feed(stream, topics.UPGRADE_REQUESTS, self._writer.submit_upgrade)

    async def _feed(self, stream: Any, topic: str, submit: Submit) -> None:  # noqa: ANN401
        async for event in stream.noack().events():
            message = event.message
            if not is_current(self.app, message):
                continue
            waiting = self._events[topic, message.partition]
            waiting[message.offset] = event
            try:
                await submit(input_record(message), message.partition)
            except WriterStopped:
                waiting.pop(message.offset, None)
                return

    def _acknowledge(self, topic: str, partition: int, offset: int) -> None:
        event = self._events[topic, partition].pop(offset, None)
        if event is not None:
            event.ack()

    async def _publish(self, outputs: Sequence[Output]) -> None:
        await produce(self.app, self._settings, outputs)

    async def _on_assigned(self, *arguments: Any, **_: Any) -> None:  # noqa: ANN401
        """Each partition of the requests brings an equal share of the budget: workers need not talk to each other."""
        assigned: Iterable[Any] = arguments[-1]
        topic = self._settings.topic_prefix + topics.REFRESH_REQUESTS
        self._writer.set_share(sum(tp.topic == topic for tp in assigned) / self._settings.partitions)

    async def _on_revoked(self, *arguments: Any, **_: Any) -> None:  # noqa: ANN401
        revoked: Iterable[Any] = arguments[-1]
        for tp in revoked:
            topic = tp.topic.removeprefix(self._settings.topic_prefix)
            self._events.pop((topic, tp.partition), None)
            if topic in (topics.REFRESH_REQUESTS, topics.UPGRADE_REQUESTS):
                await self._writer.revoke(topic, [tp.partition])

    async def _identify_student(self) -> None:
        """Texts are cached by the student that worded them, so find out which one it is."""
        while (student_id := await self._student.identity()) is None:  # noqa: ASYNC110 - the server is asked
            await asyncio.sleep(HEALTH_SECONDS)
        logger.info("the student is %s", student_id)
        self._writer.set_student(student_id)

    async def _crash_with_writer(self) -> None:
        try:
            await self._writer.run()
        except Exception as error:  # whatever ended the writer ends the worker
            await self.app.crash(error)
