"""Who words a request: the cache first, then the student, and plain words where it has none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Final, TypeAlias

import orjson

from agents.circuits import Circuit
from agents.student_client import Answer, StudentClient, StudentFailed
from agents.telemetry import STUDENT_CALLS, WORDINGS, Telemetry
from agents.writer_configuration import WriterConfiguration
from streams.personas import (
    TEMPLATE_MODEL,
    Plan,
    content_keys,
    context_of,
    merge,
    plan,
    texts_of,
    without_unworded_topics,
)
from streams.prompts import Prompt, build_prompt
from streams.records import Model, RefreshRequest, Tier
from streams.wording import (
    Wording,
    WordingRejected,
    WordingTask,
    parse_wording,
    split_task,
    task_keys,
    template_wording,
)

ATTEMPTS: Final = 4
"""Answers of the student that are looked at, for each text, before a plain one is written."""
NO_MODEL: Final = Model("", "", "", 0, 0, 0)

logger = logging.getLogger(__name__)

LookUp: TypeAlias = Callable[[Sequence[str]], Awaitable[Mapping[str, bytes]]]
"""Cached texts by content key."""


@dataclass(frozen=True, slots=True)
class Written:
    """Texts for a whole persona, and where they are from.

    request: what they word, perhaps less than what was asked for; upgrade: the student should word it later.
    """

    request: RefreshRequest
    texts: Wording
    tier: Tier
    model: Model
    cached: bool = False
    rows: Mapping[str, bytes] = field(default_factory=dict)
    upgrade: bool = False


@dataclass(slots=True)
class Answers:
    """The student's texts by key, and what they cost. latency_ms: of the slowest text, as all are asked for at once."""

    texts: dict[str, str] = field(default_factory=dict)
    model: Model = NO_MODEL

    def pay(self, prompt: Prompt, answer: Answer, latency_ms: int) -> None:
        """Add what an answer cost, used or not; latency_ms: of its text so far."""
        self.model = Model(
            name=answer.model_name,
            version=answer.model_version,
            prompt_hash=prompt.prompt_hash,
            tokens_in=self.model.tokens_in + answer.tokens_in,
            tokens_out=self.model.tokens_out + answer.tokens_out,
            latency_ms=max(self.model.latency_ms, latency_ms),
        )


class Cascade:
    """Words requests. Make it inside a running loop."""

    def __init__(
        self,
        look_up: LookUp,
        student: StudentClient | None,
        configuration: WriterConfiguration,
        telemetry: Telemetry,
    ) -> None:
        """`student` None words with templates only."""
        self._look_up = look_up
        self._telemetry = telemetry
        self._circuit = Circuit(student, configuration, telemetry) if student else None
        self._student_id = configuration.student_id

    @property
    def student_available(self) -> bool:
        """False while the student does not answer. True without a student: templates need none."""
        return self._circuit is None or self._circuit.closed

    def wants_student(self, request: RefreshRequest) -> bool:
        """Whether the student may word this request; otherwise its texts are plain."""
        if self._circuit is None or request.tier_limit is Tier.TEMPLATE:
            return False
        return bool(context_of(request).interests)  # of nothing a model can only invent

    def plain(self, request: RefreshRequest) -> Written:
        """Texts without a model."""
        whole = plan(request, content_keys(request, TEMPLATE_MODEL.name), {})
        model = replace(TEMPLATE_MODEL, items=len(whole.missing))
        return Written(request, merge(whole, _template(whole)), Tier.TEMPLATE, model)

    async def texts_to_pay(self, request: RefreshRequest) -> int:
        """Texts of the request that no cache has."""
        keys = content_keys(request, self._student_id)
        cached = await self._look_up(list(keys))
        return len(plan(request, keys, cached).missing)

    async def worded(self, request: RefreshRequest, remaining_seconds: float | None) -> Written:
        """The student's texts, cached ones included; plain ones, and the lowest tier, where it has none in time."""
        student_id = self._student_id
        keys = content_keys(request, student_id)
        cached = await self._look_up(list(keys))
        planned = plan(request, keys, cached)
        self._telemetry.count(WORDINGS, len(planned.known), "hit")
        self._telemetry.count(WORDINGS, len(planned.missing), "miss")
        items = len(list(keys))
        if planned.task is None:
            name, _, version = student_id.rpartition("/")
            model = Model(name, version, "", 0, 0, 0, items, items)
            return Written(request, merge(planned, None), Tier.STUDENT, model, cached=True)
        answers = await self._ask(request, planned, remaining_seconds)
        paid = replace(answers.model, items=items, items_cached=len(planned.known))
        rows = {key: text.encode() for key, text in answers.texts.items()}
        completed = plan(request, keys, {**cached, **rows})
        stated = without_unworded_topics(request, completed)
        completed = plan(stated, content_keys(stated, student_id), {**cached, **rows})
        if completed.task is None and not _repeats_itself(stated, completed):
            rows = self._cacheable(student_id, answers.model, rows)
            return Written(stated, merge(completed, None), Tier.STUDENT, paid, rows=rows)
        if completed.task is None:
            logger.warning("request %s: the student says the same twice", request.request_id)
            completed, rows = planned, {}
        model = replace(paid, name=TEMPLATE_MODEL.name, version=TEMPLATE_MODEL.version)
        texts = merge(completed, _template(completed))
        rows = self._cacheable(student_id, answers.model, rows)
        return Written(request, texts, Tier.TEMPLATE, model, rows=rows, upgrade=True)

    async def _ask(self, request: RefreshRequest, planned: Plan, remaining_seconds: float | None) -> Answers:
        """Ask for each missing text on its own, all at once; what fails or comes too late is left out."""
        answers = Answers()
        if planned.task is None or (remaining_seconds is not None and remaining_seconds <= 0):
            return answers
        limit = asyncio.timeout(remaining_seconds)
        try:
            async with limit, asyncio.TaskGroup() as group:
                for key, piece in zip(planned.missing, split_task(planned.task), strict=True):
                    group.create_task(self._ask_piece(request, key, piece, answers))
        except TimeoutError:
            if not limit.expired():
                raise
            logger.warning("request %s waited past its time for the student", request.request_id)
        return answers

    async def _ask_piece(self, request: RefreshRequest, key: str, piece: WordingTask, answers: Answers) -> None:
        assert self._circuit is not None  # noqa: S101 - callers ask `wants_student` first
        prompt = build_prompt(piece)
        latency_ms = 0
        for attempt in range(ATTEMPTS):
            try:
                answer = await self._circuit.word(prompt, seed_of(request.request_id, attempt))
                latency_ms += answer.latency_ms
                answers.pay(prompt, answer, latency_ms)
                (answers.texts[key],) = texts_of(parse_wording(answer.text, piece))
            except StudentFailed as error:
                logger.warning("request %s: the student refused: %s", request.request_id, error)
                return
            except WordingRejected as error:
                self._telemetry.count(STUDENT_CALLS, 1, "rejected")
                logger.info("request %s: an answer was not usable: %s", request.request_id, error)
            else:
                self._telemetry.count(STUDENT_CALLS, 1, "used")
                return

    def _cacheable(self, student_id: str, model: Model, rows: dict[str, bytes]) -> dict[str, bytes]:
        """The rows, unless their keys are those of another student than the one that answered."""
        answered_by = f"{model.name}/{model.version}"
        if not rows or answered_by == student_id:
            return rows
        logger.info("the student is %s, was %s", answered_by, student_id)
        self._student_id = answered_by
        return {}


def seed_of(request_id: str, attempt: int) -> int:
    """Sampling seed of an attempt: 0, which is greedy, at first; then one that the same request gets again."""
    if not attempt:
        return 0
    digest = blake2b(f"{attempt}/{request_id}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "big") & 0x7FFF_FFFF) or 1


def _template(planned: Plan) -> Wording | None:
    return template_wording(planned.task) if planned.task is not None else None


def _repeats_itself(request: RefreshRequest, completed: Plan) -> bool:
    """Whether two texts say the same, cached ones included: each was checked alone."""
    whole = plan(request, completed.keys, {}).task
    assert whole is not None  # noqa: S101 - nothing is known, so all is asked for
    texts = texts_of(merge(completed, None))
    try:
        parse_wording(orjson.dumps(dict(zip(task_keys(whole), texts, strict=True))).decode(), whole)
    except WordingRejected as error:
        return error.reason == "repetition"
    return False
