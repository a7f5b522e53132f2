"""Calls of models that may be away: the student is waited for, the teacher is done without."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from agents.student_client import Answer, StudentClient, StudentFailed, StudentUnavailable
from agents.teacher_client import TeacherClient, TeacherFailed, TeacherUnavailable
from agents.telemetry import (
    STUDENT_CALLS,
    STUDENT_SECONDS,
    STUDENT_TOKENS,
    TEACHER_CALLS,
    TEACHER_SECONDS,
    TEACHER_TOKENS,
    Telemetry,
)
from agents.writer_configuration import WriterConfiguration, pause_seconds
from streams.prompts import Prompt
from streams.teaching import Chat

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


class TeacherCircuit:
    """Calls of the teacher. After a failure they are refused at once, but for one that tries again after each pause."""

    def __init__(self, teacher: TeacherClient, configuration: WriterConfiguration, telemetry: Telemetry) -> None:
        self._teacher = teacher
        self._configuration = configuration
        self._telemetry = telemetry
        self._failures = 0
        self._again_at = 0.0
        self._probing = False

    @property
    def closed(self) -> bool:
        """Whether a call would be let through now."""
        if not self._failures:
            return True
        return not self._probing and asyncio.get_running_loop().time() >= self._again_at

    async def word(self, chat: Chat, seed: int) -> Answer:
        """The teacher's answer. Raises TeacherFailed, or TeacherUnavailable: without a call where it was just away."""
        if not self.closed:
            self._telemetry.count(TEACHER_CALLS, 1, "skipped")
            raise TeacherUnavailable("the teacher was away at the last try")
        if not self._failures:
            return await self._call(chat, seed)
        self._probing = True
        try:
            return await self._call(chat, seed)
        finally:
            self._probing = False

    async def _call(self, chat: Chat, seed: int) -> Answer:
        before, started = self._failures, time.monotonic()
        try:
            with self._telemetry.span("teacher.call"):
                answer = await self._teacher.word(chat, seed=seed)
        except TeacherUnavailable as error:
            if not self._failures:
                logger.warning("the teacher is unavailable, texts go without it: %s", error)
            # As of the student: calls that were in flight together are one failure.
            self._failures = max(self._failures, before + 1)
            pause = max(pause_seconds(self._failures, self._configuration), error.retry_after_seconds)
            self._again_at = max(self._again_at, asyncio.get_running_loop().time() + pause)
            self._count("unavailable", started)
            raise
        except TeacherFailed as error:
            # Waiting for a place behind calls that hang tells nothing of the teacher.
            if error.answered:
                self._failures = 0
            self._count("failed", started)
            raise
        if self._failures:
            logger.info("the teacher answers again")
        self._failures = 0
        self._telemetry.observe(TEACHER_SECONDS, time.monotonic() - started, "answered")
        self._telemetry.count(TEACHER_TOKENS, answer.tokens_in, "in")
        self._telemetry.count(TEACHER_TOKENS, answer.tokens_out, "out")
        return answer

    def _count(self, outcome: str, started: float) -> None:
        self._telemetry.count(TEACHER_CALLS, 1, outcome)
        self._telemetry.observe(TEACHER_SECONDS, time.monotonic() - started, outcome)
