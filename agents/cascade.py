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
from streams.tasks import Wording, WordingTask, split_task
from streams.teaching import Chat, build_chat, compact_answer
from streams.wording import WordingRejected, distinct_texts, parse_wording, template_wording

ATTEMPTS: Final = 6
"""Answers of the student that are looked at, for each text, before a plain one is written."""
ATTEMPTS_TO_DIFFER: Final = 3
"""Further answers for a text that says the same as another one of its persona."""
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

    texts: the student's, by keys of the student; taught: the teacher's, by keys of the teacher; asked: keys of the
    student that it gave an answer for, used or not; refused: keys of the teacher that it found no usable words for;
    student_ids: name/version of the students that answered; student, teacher: name and cost of each, latency_ms of the
    slowest text, as all are asked for at once.
    """

    texts: dict[str, str] = field(default_factory=dict)
    taught: dict[str, str] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    student_ids: set[str] = field(default_factory=set)
    student: Model = NO_MODEL
    teacher: Model = NO_MODEL

    def pay_student(self, key: str, prompt: Prompt, answer: Answer, latency_ms: int) -> None:
        """Add what an answer cost, used or not; key: of its text; latency_ms: of its text so far."""
        self.asked.add(key)
        self.student_ids.add(f"{answer.model_name}/{answer.model_version}")
        self.student = _added(self.student, prompt.prompt_hash, answer, latency_ms)

    def pay_teacher(self, chat: Chat, answer: Answer, latency_ms: int) -> None:
        """The same for an answer of the teacher."""
        self.teacher = _added(self.teacher, chat.prompt_hash, answer, latency_ms)

    @property
    def taught_rows(self) -> dict[str, bytes]:
        """The teacher's texts as they are cached."""
        return {key: text.encode() for key, text in self.taught.items()}

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
    """What the caches have of a request. whole: all of its texts; keys: of the student `student_id`; taught_keys: the
    teacher's by the student's, empty without one; cached: texts by keys of both.
    """

    request: RefreshRequest
    whole: WordingTask
    student_id: str
    keys: Keys
    taught_keys: Mapping[str, str]
    cached: Mapping[str, str]

    def candidates(self, key: str, answers: Answers) -> list[str]:
        """The texts there are for a key of the student, best first: the teacher's, then what was answered now."""
        taught_key = self.taught_keys.get(key, "")
        found = (
            answers.taught.get(taught_key),
            self.cached.get(taught_key),
            answers.texts.get(key),
            self.cached.get(key),
        )
        return [text for text in found if text]

    def chosen(self, answers: Answers) -> Plan:
        """The best text of each key. What would say the same as an earlier text is missing."""
        texts = distinct_texts(self.whole, [self.candidates(key, answers) for key in self.keys])
        named = zip(self.keys, texts, strict=True)
        return plan(self.request, self.keys, {key: text.encode() for key, text in named if text is not None})

    def sources(self, texts: Mapping[str, str], answers: Answers) -> Counter[str]:
        """How many of these texts the teacher and the student worded now, and how many the cache had."""
        return Counter(self._source(key, text, answers) for key, text in texts.items())

    def _source(self, key: str, text: str, answers: Answers) -> str:
        if answers.taught.get(self.taught_keys.get(key, "")) == text:
            return Tier.TEACHER
        return Tier.STUDENT if answers.texts.get(key) == text else CACHE


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

    def set_student(self, student_id: str) -> None:
        """Look cached texts up as those of this student (name/version), unless an answer told its name already."""
        self._student_id = self._student_id or student_id

    def wants_student(self, request: RefreshRequest) -> bool:
        """Whether a model may word this request; otherwise its texts are plain."""
        if self._circuit is None or request.tier_limit is Tier.TEMPLATE:
            return False
        return bool(context_of(request).interests)  # of nothing a model can only invent

    def plain(self, request: RefreshRequest) -> Written:
        """Texts without a model."""
        whole = plan(request, content_keys(request, TEMPLATE_MODEL.name), {})
        model = replace(TEMPLATE_MODEL, items=len(whole.missing), items_plain=len(whole.missing))
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
        return len(known.chosen(answers).missing)

    async def worded(self, request: RefreshRequest, remaining_seconds: float | None, answers: Answers) -> Written:
        """A model's texts, cached ones included; plain ones, and the lowest tier, where it has none in time.

        answers: what the teacher worded already; the others are added to it.
        """
        known = await self._known(request)
        planned = known.chosen(answers)
        items = len(list(known.keys))
        hits = known.sources(planned.known, answers)[CACHE]
        self._telemetry.count(WORDINGS, hits, "hit")
        self._telemetry.count(WORDINGS, items - hits, "miss")
        if planned.task is not None:
            planned = await self._asked(known, planned, remaining_seconds, answers)
        return self._written(known, planned, answers)

    async def _asked(self, known: _Known, planned: Plan, remaining_seconds: float | None, answers: Answers) -> Plan:
        """The texts once the models were asked for those that are missing, and again for those that repeat."""
        request, loop = known.request, asyncio.get_running_loop()
        deadline = None if remaining_seconds is None else loop.time() + remaining_seconds

        async def ask(key: str, piece: WordingTask) -> None:
            if not known.candidates(key, answers):
                await self._ask_student(request, key, piece, known.taught_keys.get(key), answers)

        async def ask_again(key: str, piece: WordingTask) -> None:
            if known.candidates(key, answers):
                logger.info(
                    "request %s: a text says the same as another one, and is asked for again", request.request_id
                )
                once = range(attempt, attempt + 1)
                await self._ask_student(request, key, piece, None, answers, once, answers.student.latency_ms)

        await self._ask_all(request, planned, remaining_seconds, ask)
        for attempt in range(ATTEMPTS, ATTEMPTS + ATTEMPTS_TO_DIFFER):  # noqa: B007 - `ask_again` reads it
            repeated = known.chosen(answers)
            if repeated.task is None:
                return repeated
            await self._ask_all(request, repeated, None if deadline is None else deadline - loop.time(), ask_again)
        return known.chosen(answers)

    def _written(self, known: _Known, planned: Plan, answers: Answers) -> Written:
        """The persona's texts, plain ones where they are missing, and the account of them."""
        request = without_unworded_topics(known.request, planned)
        keys = content_keys(request, known.student_id)
        completed = plan(request, keys, {key: text.encode() for key, text in planned.known.items()})
        nothing = plan(request, keys, {})
        texts = merge(completed, _template(completed))
        if nothing.task is not None and None in distinct_texts(nothing.task, [(text,) for text in texts_of(texts)]):
            logger.warning("request %s: a plain text says the same as a model's, so all are plain", request.request_id)
            completed, texts = nothing, merge(nothing, _template(nothing))
        sources = known.sources(completed.known, answers)
        sources[Tier.TEMPLATE] = len(completed.missing)
        for source, count in sources.items():
            self._count_texts(source, count)
        tier, named = self._named(known, sources, answers)
        model = replace(
            answers.total(named),
            items=len(list(keys)),
            items_cached=sources[CACHE],
            items_teacher=sources[Tier.TEACHER],
            items_plain=sources[Tier.TEMPLATE],
        )
        return Written(
            request,
            texts,
            tier,
            model,
            cached=answers.student is NO_MODEL and answers.teacher is NO_MODEL and tier is not Tier.TEMPLATE,
            rows=self._new_rows(known, answers),
            upgrade=tier is Tier.TEMPLATE,
        )

    def _named(self, known: _Known, sources: Mapping[str, int], answers: Answers) -> tuple[Tier, Model]:
        """Who worded what is new in a persona; its tier is the student's if nothing is."""
        if sources[Tier.TEMPLATE]:
            return Tier.TEMPLATE, replace(TEMPLATE_MODEL, prompt_hash=answers.student.prompt_hash)
        if sources[Tier.TEACHER]:
            return Tier.TEACHER, answers.teacher
        if sources[Tier.STUDENT]:
            return Tier.STUDENT, answers.student
        name, _, version = known.student_id.rpartition("/")
        return Tier.STUDENT, Model(name, version, "", 0, 0, 0)

    async def _known(self, request: RefreshRequest) -> _Known:
        student_id = self._student_id
        keys = content_keys(request, student_id)
        taught = content_keys(request, self._teacher_id) if self._teacher is not None else None
        names = [*keys, *(taught or ())]
        cached = await self._look_up(names)
        whole = plan(request, keys, {}).task
        assert whole is not None  # noqa: S101 - nothing is known, so all is asked for
        texts = {**plan(request, keys, cached).known, **(plan(request, taught, cached).known if taught else {})}
        taught_keys = dict(zip(keys, taught, strict=True)) if taught else {}
        return _Known(request, whole, student_id, keys, taught_keys, texts)

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
        self,
        request: RefreshRequest,
        key: str,
        piece: WordingTask,
        taught_key: str | None,
        answers: Answers,
        attempts: range = range(ATTEMPTS),
        latency_ms: int = 0,
    ) -> None:
        """Ask the student, and the teacher for what it cannot word, unless the teacher could not word it either.

        The student tries on where the teacher turns out to be away. latency_ms: of the text so far.
        """
        assert self._circuit is not None  # noqa: S101 - callers ask `wants_student` first
        for attempt in attempts:
            if attempt == ATTEMPTS_BEFORE_TEACHER and taught_key is not None and taught_key not in answers.refused:
                await self._ask_teacher(request, taught_key, piece, answers, latency_ms)
                if taught_key in answers.taught or taught_key in answers.refused:
                    return
            prompt = build_prompt(piece, variant=attempt)
            try:
                answer = await self._circuit.word(prompt, seed_of(request.request_id, attempt))
                latency_ms += answer.latency_ms
                answers.pay_student(key, prompt, answer, latency_ms)
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
                if error.answered:
                    answers.refused.add(key)
                return
            except WordingRejected as error:
                self._telemetry.count(TEACHER_CALLS, 1, "rejected")
                self._count_try(Tier.TEACHER, attempt, passed=False)
                logger.info("request %s: an answer of the teacher was not usable: %s", request.request_id, error)
            else:
                self._telemetry.count(TEACHER_CALLS, 1, "used")
                self._count_try(Tier.TEACHER, attempt, passed=True)
                return
        answers.refused.add(key)

    def _new_rows(self, known: _Known, answers: Answers) -> dict[str, bytes]:
        """What to cache, the student's texts under the keys of the one that answered; not where two did.

        Two answer one request where the student's version is replaced meanwhile.
        """
        taught = {key: row for key, row in answers.taught_rows.items() if key not in known.cached}
        if not answers.texts:
            return taught
        answered_by = f"{answers.student.name}/{answers.student.version}"
        if answered_by != self._student_id:
            logger.info("the student is %s, was %s", answered_by, self._student_id or "not known")
            self._student_id = answered_by
        if len(answers.student_ids) > 1:
            return taught
        names = dict(zip(known.keys, content_keys(known.request, answered_by), strict=True))
        return {**{names[key]: text.encode() for key, text in answers.texts.items()}, **taught}

    # Measuring

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
