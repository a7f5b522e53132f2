"""Who words a request: the cache, then the student, then the teacher if there is one, and plain words at the end.

    chosen request ──> teacher ──┐
                                 v
    request ──────────────────> cache ──> student ──> teacher ──> template
                                         refused by   away, or refused by
                                         the gate     the gate

A text of the teacher is cached under keys of its own. It serves every later request with the same facts, in place of
the student's, so once a text is the teacher's it stays so. A persona's tier tells of the texts that are new in it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Final, TypeAlias

import orjson

from agents.circuits import Circuit, TeacherCircuit
from agents.student_client import Answer, StudentClient, StudentFailed
from agents.teacher_client import TeacherClient, TeacherFailed, TeacherUnavailable
from agents.telemetry import FIRST_TRIES, STUDENT_CALLS, TEACHER_CALLS, TEXTS, WORDINGS, Telemetry
from agents.writer_configuration import WriterConfiguration
from streams.personas import (
    TEMPLATE_MODEL,
    Keys,
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
from streams.teaching import Chat, build_chat, compact_answer
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
ATTEMPTS_BEFORE_TEACHER: Final = 2
"""The same while a teacher takes what the student cannot word: the greedy answer and one more."""
TEACHER_ATTEMPTS: Final = 2
"""Answers of the teacher that are looked at for each text."""
CACHE: Final = "cache"
NO_MODEL: Final = Model("", "", "", 0, 0, 0)

logger = logging.getLogger(__name__)

LookUp: TypeAlias = Callable[[Sequence[str]], Awaitable[Mapping[str, bytes]]]
"""Cached texts by content key."""
Ask: TypeAlias = Callable[[str, WordingTask], Coroutine[None, None, None]]
"""Asks for the text of one key and one task."""


@dataclass(frozen=True, slots=True)
class Written:
    """Texts for a whole persona, and where they are from.

    request: what they word, perhaps less than what was asked for; upgrade: a model should word it later.
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
    """Texts that passed the gate, by content key, and what all answers cost.

    texts: the student's, by keys of the student; taught: the teacher's, by keys of the teacher; student, teacher: name
    and cost of each, latency_ms of the slowest text, as all are asked for at once.
    """

    texts: dict[str, str] = field(default_factory=dict)
    taught: dict[str, str] = field(default_factory=dict)
    student: Model = NO_MODEL
    teacher: Model = NO_MODEL

    def pay_student(self, prompt: Prompt, answer: Answer, latency_ms: int) -> None:
        """Add what an answer cost, used or not; latency_ms: of its text so far."""
        self.student = _added(self.student, prompt.prompt_hash, answer, latency_ms)

    def pay_teacher(self, chat: Chat, answer: Answer, latency_ms: int) -> None:
        """The same for an answer of the teacher."""
        self.teacher = _added(self.teacher, chat.prompt_hash, answer, latency_ms)

    def total(self, named: Model) -> Model:
        """What all of it cost, under the name of one model."""
        return replace(
            named,
            tokens_in=self.student.tokens_in + self.teacher.tokens_in,
            tokens_out=self.student.tokens_out + self.teacher.tokens_out,
            latency_ms=max(self.student.latency_ms, self.teacher.latency_ms),
            teacher_tokens_in=self.teacher.tokens_in,
            teacher_tokens_out=self.teacher.tokens_out,
        )


@dataclass(frozen=True, slots=True)
class _Known:
    """What the cache has of a request. keys: of the student `student_id`; taught_keys: the teacher's by the student's,
    empty without one; rows: texts by the student's keys, the teacher's where there is one.
    """

    student_id: str
    keys: Keys
    taught_keys: Mapping[str, str]
    rows: Mapping[str, bytes]

    def with_answers(self, answers: Answers) -> dict[str, bytes]:
        """All texts by the student's keys; what was answered now comes before what was cached."""
        taught = {key: answers.taught[name] for key, name in self.taught_keys.items() if name in answers.taught}
        new = {**answers.texts, **taught}
        return {**self.rows, **{key: text.encode() for key, text in new.items()}}

    def taught_among(self, keys: Keys, answers: Answers) -> int:
        """How many of these texts the teacher worded now."""
        return sum(self.taught_keys.get(key) in answers.taught for key in keys)


class Cascade:
    """Words requests. Make it inside a running loop."""

    def __init__(
        self,
        look_up: LookUp,
        student: StudentClient | None,
        teacher: TeacherClient | None,
        configuration: WriterConfiguration,
        telemetry: Telemetry,
    ) -> None:
        """`student` None words with templates only, whatever the teacher."""
        self.figures: Counter[str] = Counter()
        """Since the start: `TIER.texts`, `TIER.tokens_in`, `TIER.tokens_out`, `TIER.first_tries`, `TIER.first_passes`
        of cache, student, teacher and template."""
        self._look_up = look_up
        self._telemetry = telemetry
        self._circuit = Circuit(student, configuration, telemetry) if student else None
        self._student_id = configuration.student_id
        self._teacher = TeacherCircuit(teacher, configuration, telemetry) if student and teacher else None
        self._teacher_id = f"teacher/{teacher.teacher_id}" if teacher else ""
        self._policy = configuration.teacher_policy

    @property
    def student_available(self) -> bool:
        """False while the student does not answer. True without a student: templates need none."""
        return self._circuit is None or self._circuit.closed

    def wants_student(self, request: RefreshRequest) -> bool:
        """Whether a model may word this request; otherwise its texts are plain."""
        if self._circuit is None or request.tier_limit is Tier.TEMPLATE:
            return False
        return bool(context_of(request).interests)  # of nothing a model can only invent

    def plain(self, request: RefreshRequest) -> Written:
        """Texts without a model."""
        whole = plan(request, content_keys(request, TEMPLATE_MODEL.name), {})
        model = replace(TEMPLATE_MODEL, items=len(whole.missing))
        self._count_texts(Tier.TEMPLATE, len(whole.missing))
        return Written(request, merge(whole, _template(whole)), Tier.TEMPLATE, model)

    async def taught(self, request: RefreshRequest, remaining_seconds: float | None) -> Answers:
        """What the teacher words at once: the texts that it has not worded before, if the policy chooses the request.

        Nothing for any other request, and where the teacher is away or its answers do not pass the gate.
        """
        answers = Answers()
        if self._teacher is None or not self._teacher.closed or not self._policy.chooses(request):
            return answers
        keys = content_keys(request, self._teacher_id)
        planned = plan(request, keys, await self._look_up(list(keys)))
        await self._ask_all(
            request, planned, remaining_seconds, lambda key, piece: self._ask_teacher(request, key, piece, answers)
        )
        return answers

    async def texts_to_pay(self, request: RefreshRequest, answers: Answers) -> int:
        """Texts of the request that neither a cache nor these answers have: what the student would be asked for."""
        known = await self._known(request)
        return len(plan(request, known.keys, known.with_answers(answers)).missing)

    async def worded(self, request: RefreshRequest, remaining_seconds: float | None, answers: Answers) -> Written:
        """A model's texts, cached ones included; plain ones, and the lowest tier, where it has none in time.

        answers: what the teacher worded already; the others are added to it.
        """
        known = await self._known(request)
        before = plan(request, known.keys, known.rows)
        planned = plan(request, known.keys, known.with_answers(answers))
        items = len(list(known.keys))
        hits = len(planned.known) - known.taught_among(known.keys, answers)
        self._telemetry.count(WORDINGS, hits, "hit")
        self._telemetry.count(WORDINGS, items - hits, "miss")
        if planned.task is None and not answers.taught:
            return self._from_cache(request, known, planned, answers)
        await self._ask_all(
            request,
            planned,
            remaining_seconds,
            lambda key, piece: self._ask_student(request, key, piece, known.taught_keys.get(key), answers),
        )
        rows = known.with_answers(answers)
        completed = plan(request, known.keys, rows)
        stated = without_unworded_topics(request, completed)
        completed = plan(stated, content_keys(stated, known.student_id), rows)
        new_rows = self._new_rows(known.student_id, answers)
        if _repeats_itself(stated, completed):
            logger.warning("request %s: the models say the same twice", request.request_id)
            if before.task is None:
                return self._from_cache(request, known, before, answers)
            completed, new_rows, hits = before, {}, len(before.known)
            answers.texts, answers.taught = {}, {}
        elif completed.task is None:
            return self._from_models(stated, known, completed, answers, new_rows, hits)
        taught = known.taught_among(completed.keys, answers)
        plain = len(completed.missing)
        self._count_sources(hits, len(completed.known) - hits - taught, taught, plain)
        model = replace(answers.total(TEMPLATE_MODEL), items=items, items_cached=hits, items_teacher=taught)
        model = replace(model, prompt_hash=answers.student.prompt_hash)
        texts = merge(completed, _template(completed))
        return Written(request, texts, Tier.TEMPLATE, model, rows=new_rows, upgrade=True)

    def _from_cache(self, request: RefreshRequest, known: _Known, planned: Plan, answers: Answers) -> Written:
        """All of it is known. Answers of the teacher that did not pass the gate may have been paid for."""
        items = len(planned.known)
        self._count_texts(CACHE, items)
        name, _, version = known.student_id.rpartition("/")
        model = answers.total(Model(name, version, "", 0, 0, 0, items, items))
        asked = answers.student is not NO_MODEL or answers.teacher is not NO_MODEL
        return Written(request, merge(planned, None), Tier.STUDENT, model, cached=not asked)

    def _from_models(
        self,
        request: RefreshRequest,
        known: _Known,
        completed: Plan,
        answers: Answers,
        rows: Mapping[str, bytes],
        hits: int,
    ) -> Written:
        """Nothing is missing, and some of it is new."""
        taught = known.taught_among(completed.keys, answers)
        self._count_sources(hits, len(completed.known) - hits - taught, taught, 0)
        tier, named = (Tier.TEACHER, answers.teacher) if taught else (Tier.STUDENT, answers.student)
        items = len(list(known.keys))
        model = replace(answers.total(named), items=items, items_cached=hits, items_teacher=taught)
        return Written(request, merge(completed, None), tier, model, rows=rows)

    async def _known(self, request: RefreshRequest) -> _Known:
        student_id = self._student_id
        keys = content_keys(request, student_id)
        taught_keys: dict[str, str] = {}
        if self._teacher is not None:
            taught_keys = dict(zip(keys, content_keys(request, self._teacher_id), strict=True))
        cached = await self._look_up([*keys, *taught_keys.values()])
        own = {key: cached[key] for key in keys if key in cached}
        taught = {key: cached[name] for key, name in taught_keys.items() if name in cached}
        return _Known(student_id, keys, taught_keys, {**own, **taught})

    async def _ask_all(self, request: RefreshRequest, planned: Plan, remaining_seconds: float | None, ask: Ask) -> None:
        """Ask for each missing text on its own, all at once; what fails or comes too late is left out."""
        if planned.task is None or (remaining_seconds is not None and remaining_seconds <= 0):
            return
        limit = asyncio.timeout(remaining_seconds)
        try:
            async with limit, asyncio.TaskGroup() as group:
                for key, piece in zip(planned.missing, split_task(planned.task), strict=True):
                    group.create_task(ask(key, piece))
        except TimeoutError:
            if not limit.expired():
                raise
            logger.warning("request %s waited past its time for a model", request.request_id)

    async def _ask_student(
        self, request: RefreshRequest, key: str, piece: WordingTask, taught_key: str | None, answers: Answers
    ) -> None:
        """Ask the student, and the teacher for what it cannot word."""
        assert self._circuit is not None  # noqa: S101 - callers ask `wants_student` first
        prompt = build_prompt(piece)
        latency_ms = 0
        attempts = ATTEMPTS_BEFORE_TEACHER if self._teacher is not None and self._teacher.closed else ATTEMPTS
        for attempt in range(attempts):
            try:
                answer = await self._circuit.word(prompt, seed_of(request.request_id, attempt))
                latency_ms += answer.latency_ms
                answers.pay_student(prompt, answer, latency_ms)
                self._count_tokens(Tier.STUDENT, answer)
                (answers.texts[key],) = texts_of(parse_wording(answer.text, piece))
            except StudentFailed as error:
                logger.warning("request %s: the student refused: %s", request.request_id, error)
                return
            except WordingRejected as error:
                self._telemetry.count(STUDENT_CALLS, 1, "rejected")
                self._count_try(Tier.STUDENT, attempt, passed=False)
                logger.info("request %s: an answer was not usable: %s", request.request_id, error)
            else:
                self._telemetry.count(STUDENT_CALLS, 1, "used")
                self._count_try(Tier.STUDENT, attempt, passed=True)
                return
        if taught_key is not None:
            await self._ask_teacher(request, taught_key, piece, answers, latency_ms)

    async def _ask_teacher(
        self, request: RefreshRequest, key: str, piece: WordingTask, answers: Answers, latency_ms: int = 0
    ) -> None:
        """Ask the teacher. Where it is away, the text goes without it at once. latency_ms: of the text so far."""
        assert self._teacher is not None  # noqa: S101 - there are keys of the teacher only with one
        chat = build_chat(piece)
        for attempt in range(TEACHER_ATTEMPTS):
            try:
                answer = await self._teacher.word(chat, seed_of(request.request_id, attempt))
                latency_ms += answer.latency_ms
                answers.pay_teacher(chat, answer, latency_ms)
                self._count_tokens(Tier.TEACHER, answer)
                (answers.taught[key],) = texts_of(parse_wording(compact_answer(answer.text), piece))
            except TeacherUnavailable:
                return  # the circuit has said so
            except TeacherFailed as error:
                logger.warning("request %s: %s", request.request_id, error)
                return
            except WordingRejected as error:
                self._telemetry.count(TEACHER_CALLS, 1, "rejected")
                self._count_try(Tier.TEACHER, attempt, passed=False)
                logger.info("request %s: an answer of the teacher was not usable: %s", request.request_id, error)
            else:
                self._telemetry.count(TEACHER_CALLS, 1, "used")
                self._count_try(Tier.TEACHER, attempt, passed=True)
                return

    def _new_rows(self, student_id: str, answers: Answers) -> dict[str, bytes]:
        """What to cache: not the student's texts where their keys are those of another one than answered."""
        taught = {key: text.encode() for key, text in answers.taught.items()}
        answered_by = f"{answers.student.name}/{answers.student.version}"
        if answers.texts and answered_by != student_id:
            logger.info("the student is %s, was %s", answered_by, student_id)
            self._student_id = answered_by
            return taught
        return {**{key: text.encode() for key, text in answers.texts.items()}, **taught}

    # Measuring

    def _count_sources(self, cached: int, student: int, teacher: int, plain: int) -> None:
        for source, texts in (
            (CACHE, cached),
            (Tier.STUDENT, student),
            (Tier.TEACHER, teacher),
            (Tier.TEMPLATE, plain),
        ):
            self._count_texts(source, texts)

    def _count_texts(self, source: str, texts: int) -> None:
        if texts:
            self._telemetry.count(TEXTS, texts, str(source))
            self.figures[f"{source}.texts"] += texts

    def _count_tokens(self, tier: Tier, answer: Answer) -> None:
        self.figures[f"{tier}.tokens_in"] += answer.tokens_in
        self.figures[f"{tier}.tokens_out"] += answer.tokens_out

    def _count_try(self, tier: Tier, attempt: int, *, passed: bool) -> None:
        if attempt:
            return
        self._telemetry.count(FIRST_TRIES, 1, str(tier), "passed" if passed else "rejected")
        self.figures[f"{tier}.first_tries"] += 1
        self.figures[f"{tier}.first_passes"] += passed


def _added(model: Model, prompt_hash: str, answer: Answer, latency_ms: int) -> Model:
    return Model(
        name=answer.model_name,
        version=answer.model_version,
        prompt_hash=prompt_hash,
        tokens_in=model.tokens_in + answer.tokens_in,
        tokens_out=model.tokens_out + answer.tokens_out,
        latency_ms=max(model.latency_ms, latency_ms),
    )


def seed_of(request_id: str, attempt: int) -> int:
    """Sampling seed of an attempt: 0, which is greedy, at first; then one that the same request gets again."""
    if not attempt:
        return 0
    digest = blake2b(f"{attempt}/{request_id}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "big") & 0x7FFF_FFFF) or 1


def _template(planned: Plan) -> Wording | None:
    return template_wording(planned.task) if planned.task is not None else None


def _repeats_itself(request: RefreshRequest, completed: Plan) -> bool:
    """Whether two texts say the same, cached and plain ones included: each was checked alone."""
    whole = plan(request, completed.keys, {}).task
    assert whole is not None  # noqa: S101 - nothing is known, so all is asked for
    texts = texts_of(merge(completed, _template(completed)))
    try:
        parse_wording(orjson.dumps(dict(zip(task_keys(whole), texts, strict=True))).decode(), whole)
    except WordingRejected as error:
        return error.reason == "repetition"
    return False
