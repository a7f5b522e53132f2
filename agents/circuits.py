"""Calls of a model that may be away."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from agents.student_client import Answer, StudentClient, StudentFailed, StudentUnavailable
from agents.telemetry import STUDENT_CALLS, STUDENT_SECONDS, STUDENT_TOKENS, Telemetry
from agents.writer_configuration import WriterConfiguration, pause_seconds
from streams.prompts import Prompt

logger = logging.getLogger(__name__)


class Circuit:
    """Calls of the student. After a failure one caller at a time tries again, with growing pauses; the others wait."""

    def __init__(self, student: StudentClient, configuration: WriterConfiguration, telemetry: Telemetry) -> None:
        self._student = student
        self._configuration = configuration
        self._telemetry = telemetry
        self._failures = 0
        self._probing = asyncio.Lock()

    @property
    def closed(self) -> bool:
        """Whether the last call reached the student."""
        return not self._failures

    async def word(self, prompt: Prompt, seed: int) -> Answer:
        """The student's answer, however long it is unavailable. Raises StudentFailed."""
        while True:
            with suppress(StudentUnavailable):
                if self.closed:
                    return await self._call(prompt, seed)
                async with self._probing:
                    if not self.closed:
                        await asyncio.sleep(pause_seconds(self._failures, self._configuration))
                        return await self._call(prompt, seed)

    async def _call(self, prompt: Prompt, seed: int) -> Answer:
        before, started = self._failures, time.monotonic()
        try:
            with self._telemetry.span("student.call"):
                answer = await self._student.word(prompt, seed=seed)
        except StudentUnavailable as error:
            if self.closed:
                logger.warning("the student is unavailable, requests wait: %s", error)
            # Calls that were in flight together fail together: that is one failure, not many in a row.
            self._failures = max(self._failures, before + 1)
            self._count("unavailable", time.monotonic() - started)
            raise
        except StudentFailed:
            self._failures = 0
            self._count("failed", time.monotonic() - started)
            raise
        if self._failures:
            logger.info("the student answers again")
        self._failures = 0
        self._telemetry.observe(STUDENT_SECONDS, time.monotonic() - started, "answered")
        self._telemetry.count(STUDENT_TOKENS, answer.tokens_in, "in")
        self._telemetry.count(STUDENT_TOKENS, answer.tokens_out, "out")
        return answer

    def _count(self, outcome: str, seconds: float) -> None:
        self._telemetry.count(STUDENT_CALLS, 1, outcome)
        self._telemetry.observe(STUDENT_SECONDS, seconds, outcome)
