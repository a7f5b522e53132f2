"""Words cases as the system does: the real writer over a store in memory, each answer of the student recorded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, TypeVar

import orjson

from agents.cascade import ATTEMPTS, ATTEMPTS_TO_DIFFER
from agents.evaluation.cases import Case
from agents.persona_writer import PersonaWriter
from agents.stores.memory import MemoryStore
from agents.student_client import Answer, StudentClient, StudentFailed, StudentUnavailable
from agents.telemetry import Telemetry
from agents.writer_configuration import WriterConfiguration
from streams import topics
from streams.decoding import decode_persona
from streams.personas import NO_INTERESTS, compose, content_keys, plan
from streams.prompts import Prompt, build_prompt
from streams.records import Model, Persona, RefreshRequest, Tier, encode
from streams.tasks import WordingTask, split_task, task_keys
from streams.watch import InputRecord, Output
from streams.wording import WordingRejected, parse_wording, template_wording

AT_ONCE: Final = 4
"""Personas worded at the same time; each asks for all its texts at once, and the client bounds the calls."""

RETRY_SECONDS: Final = 1.0
GONE_SECONDS: Final = 180.0
"""After so long without any answer the student is taken to be gone."""

T = TypeVar("T")
Done = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the student."""

    prompt: str
    seed: int
    text: str
    tokens_in: int
    tokens_out: int
    latency_ms: int


@dataclass(frozen=True, slots=True)
class Text:
    """One published text. part: summary, interest or novel; place: its index among those; label: of its item."""

    part: str
    place: int
    label: str
    text: str


@dataclass(frozen=True, slots=True)
class Worded:
    """A case and what was published for it. seconds: from the request to the persona, the wait for others included."""

    case: Case
    persona: Persona
    calls: tuple[Call, ...] = ()
    seconds: float = 0.0

    @property
    def texts(self) -> list[Text]:
        """The texts that were worded, by the student or by a template: a persona without interests has no summary."""
        summary = [Text("summary", 0, "", self.persona.summary)] if self.persona.summary != NO_INTERESTS else []
        interests = [Text("interest", n, i.label, i.description) for n, i in enumerate(self.persona.interests)]
        return summary + interests + [Text("novel", n, t.label, t.reason) for n, t in enumerate(self.persona.novel)]

    @property
    def tokens(self) -> int:
        """Tokens in and out of all calls, refused answers included."""
        return sum(call.tokens_in + call.tokens_out for call in self.calls)


class StudentGone(RuntimeError):  # noqa: N818 - a state of the server
    """The student has not answered for GONE_SECONDS."""


@dataclass(slots=True)
class Shared:
    """A student that is asked for each greedy answer once, whoever wants it. Make it inside a running loop."""

    student: StudentClient
    answers: dict[str, asyncio.Task[Answer]] = field(default_factory=dict)

    async def word(self, prompt: Prompt, *, seed: int = 0) -> Answer:
        """See `StudentClient.word`. What failed is asked for again by the next who wants it."""
        if seed:
            return await self.student.word(prompt, seed=seed)
        asked = self.answers.get(prompt.text)
        if asked is None or (asked.done() and (asked.cancelled() or asked.exception() is not None)):
            asked = self.answers[prompt.text] = asyncio.create_task(self.student.word(prompt))
            # Whoever asked may have been cancelled meanwhile: then nobody else looks at what became of it.
            asked.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(asked)

    async def ready(self) -> bool:
        """See `StudentClient.ready`."""
        return await self.student.ready()

    async def close(self) -> None:
        """The student belongs to whoever made it."""


@dataclass(slots=True)
class Recorder:
    """A student that keeps what another one answers. gone_since: of the first call in a row that it was away for."""

    student: StudentClient
    calls: list[Call] = field(default_factory=list)
    gone_since: float | None = None

    async def word(self, prompt: Prompt, *, seed: int = 0) -> Answer:
        """See `StudentClient.word`. Raises StudentGone: the writer would wait for a student that is away for ever."""
        try:
            answer = await self.student.word(prompt, seed=seed)
        except StudentUnavailable as error:
            self.gone_since = self.gone_since or time.monotonic()
            if time.monotonic() - self.gone_since > GONE_SECONDS:
                raise StudentGone(f"no answer of the student for {GONE_SECONDS:.0f} s: {error}") from error
            raise
        self.gone_since = None
        self.calls.append(Call(prompt.text, seed, answer.text, answer.tokens_in, answer.tokens_out, answer.latency_ms))
        return answer

    async def ready(self) -> bool:
        """See `StudentClient.ready`."""
        return await self.student.ready()

    async def close(self) -> None:
        """The student belongs to whoever made it."""


class Desk:
    """The real writer over a store in memory, for one case at a time. Make it inside a running loop."""

    def __init__(self, student: StudentClient) -> None:
        self._recorder = Recorder(student)
        self._published: list[Output] = []
        self._offset = 0
        self._now = 0
        self._writer = PersonaWriter(
            MemoryStore(),
            self._recorder,
            self._publish,
            WriterConfiguration(),
            lambda: self._now,
            Telemetry(None, None),
            lambda *_: None,
        )

    async def word(self, case: Case) -> Worded | None:
        """The persona of a case, one after the other; what earlier ones left in the cache is not asked for.

        None if nothing is published, as for a request of an earlier sequence than one before it.
        """
        request = case.request
        self._recorder.calls, self._published, self._now = [], [], request.as_of
        # No time limit: a late persona would be a template, and a slow machine is no fault of the student.
        patient = encode(replace(request, expires_after_ms=10**12))
        began = time.monotonic()
        await self._writer.submit(InputRecord(self._offset, request.user_id.encode(), patient, request.as_of), 0)
        self._offset += 1
        try:
            with _gone_alone():
                await self._writer.idle()
        except asyncio.CancelledError:
            await self._writer.stop(0.0)
            raise
        bodies = [output.value for output in self._published if output.topic == topics.PERSONAS and output.value]
        if not bodies:
            return None
        return Worded(case, decode_persona(bodies[-1]), tuple(self._recorder.calls), time.monotonic() - began)

    async def _publish(self, outputs: Sequence[Output]) -> None:
        self._published.extend(outputs)


async def together(*coroutines: Coroutine[Any, Any, T]) -> list[T]:
    """Run all at once; if one fails the others are cancelled. Raises StudentGone alone, other errors in a group."""
    with _gone_alone():
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in coroutines]
    return [task.result() for task in tasks]


async def word_each(cases: Sequence[Case], student: StudentClient, done: Done) -> list[Worded]:
    """Word every case from nothing: a store of its own, so neither cached texts nor an earlier persona."""

    async def one(case: Case) -> Worded:
        worded = await Desk(student).word(case)
        if worded is None:
            raise RuntimeError(f"no persona was published for request {case.request.request_id}")
        return worded

    return await _some_at_once(one, cases, done)


async def _some_at_once(one: Callable[[Case], Awaitable[Worded]], cases: Sequence[Case], done: Done) -> list[Worded]:
    places = asyncio.Semaphore(AT_ONCE)
    finished = 0

    async def placed(case: Case) -> Worded:
        nonlocal finished
        async with places:
            worded = await one(case)
        finished += 1
        done(finished, len(cases))
        return worded

    return await together(*map(placed, cases))


async def word_in_turn(cases: Sequence[Case], student: StudentClient, done: Done) -> list[Worded]:
    """Word cases over one store in the order of time: what is cached is not asked for again.

    Those that another one of their viewer has overtaken are left out.
    """
    desk, finished = Desk(student), list[Worded]()

    def turn(case: Case) -> tuple[int, str, int, int]:
        # Requests of one viewer may be of the same moment; their order is that of their sequence.
        return case.request.as_of, case.user_id, case.request.epoch, case.request.sequence

    for count, case in enumerate(sorted(cases, key=turn), 1):
        if (worded := await desk.word(case)) is not None:
            finished.append(worded)
        done(count, len(cases))
    return finished


def templated(case: Case) -> Worded:
    """The case as templates word it: what the student is compared with."""
    request = case.request
    planned = plan(request, content_keys(request, "template"), {})
    assert planned.task is not None  # noqa: S101 - a case asks for words
    wording = template_wording(planned.task)
    texts = replace(wording, summary=wording.summary or NO_INTERESTS)
    persona = compose(
        request, texts, None, tier=Tier.TEMPLATE, model=Model("template", "", "", 0, 0, 0), cached=False,
        generated_at=request.as_of,
    )  # fmt: skip
    return Worded(case, persona)


async def ask_once(cases: Sequence[Case], student: StudentClient, done: Done) -> list[Worded]:
    """Each case in a model's own first answers, greedy, whatever the gate would say of them.

    The writer would ask up to six times and put a template in place of what the gate refuses.
    """

    async def one(case: Case) -> Worded:
        recorder = Recorder(student)
        began = time.monotonic()
        for piece in split_task(task_of(case.request)):
            await _answered(recorder, build_prompt(piece))
        persona = replace(templated(case).persona, tier=Tier.STUDENT)
        return first_said(Worded(case, persona, tuple(recorder.calls), time.monotonic() - began))

    return await _some_at_once(one, cases, done)


async def _answered(recorder: Recorder, prompt: Prompt) -> None:
    """Wait for an answer as the writer does; what the model refuses stays without."""
    while True:
        try:
            await recorder.word(prompt)
        except StudentUnavailable:
            await asyncio.sleep(RETRY_SECONDS)
        except StudentFailed:
            return
        else:
            return


def first_said(worded: Worded) -> Worded:
    """The case with the first answer to each text in place of what was published, whatever the gate said of it.

    A text whose first answer is no JSON object of one text is that answer as it is. Its calls are those first ones.
    """
    pieces = split_task(task_of(worded.case.request))
    first = {call.prompt: call for call in reversed(worded.calls) if call.seed == 0}
    prompts = [build_prompt(piece).text for piece in pieces]
    said = [_said(first[prompt].text) if prompt in first else "" for prompt in prompts]
    persona = templated(worded.case).persona
    summary, said = (said[0], said[1:]) if len(said) > len(persona.interests) + len(persona.novel) else ("", said)
    interests = tuple(replace(i, description=text) for i, text in zip(persona.interests, said, strict=False))
    novel = tuple(replace(n, reason=text) for n, text in zip(persona.novel, said[len(interests) :], strict=True))
    spoken = replace(worded.persona, summary=summary or NO_INTERESTS, interests=interests, novel=novel)
    return replace(worded, persona=spoken, calls=tuple(first[prompt] for prompt in prompts if prompt in first))


def _said(answer: str) -> str:
    try:
        (text,) = orjson.loads(answer).values()
    except (orjson.JSONDecodeError, AttributeError, ValueError):
        return answer
    return text if isinstance(text, str) else answer


class Source(StrEnum):
    """Where a text is from."""

    CACHE = "cache"
    STUDENT = "student"
    TEMPLATE = "template"


def sources(worded: Worded) -> list[tuple[Text, Source, int]]:
    """Each text of a persona, where it is from, and the tokens of all answers to it.

    A text that the student was not asked for comes from the cache; one that it did not say, from a template.
    """
    context = worded.case.context
    names = [("summary", "")] * bool(context.interests)
    names += [("interest", i.label) for i in context.interests] + [("novel", n.label) for n in context.novel]
    calls = dict(zip(names, calls_of(worded), strict=True))
    found = []
    for text in worded.texts:
        own = calls[text.part, text.label]
        said = any(_said(call.text) == text.text for call in own)
        source = Source.CACHE if not own else Source.STUDENT if said else Source.TEMPLATE
        found.append((text, source, sum(call.tokens_in + call.tokens_out for call in own)))
    return found


def calls_of(worded: Worded) -> list[list[Call]]:
    """The calls for each text that the request asks for, in their order."""
    by_prompt: dict[str, list[Call]] = {}
    for call in sorted(worded.calls, key=lambda call: call.seed != 0):
        by_prompt.setdefault(call.prompt, []).append(call)
    found = []
    for piece in split_task(task_of(worded.case.request)):
        # Each try has another prompt, and further ones are made where two texts say the same.
        prompts = [build_prompt(piece, variant).text for variant in range(ATTEMPTS + ATTEMPTS_TO_DIFFER)]
        found.append([call for prompt in dict.fromkeys(prompts) for call in by_prompt.get(prompt, [])])
    return found


def task_of(request: RefreshRequest) -> WordingTask:
    """Everything that a request asks for."""
    task = plan(request, content_keys(request, "any"), {}).task
    assert task is not None  # noqa: S101 - a case asks for words
    return task


@dataclass(frozen=True, slots=True)
class Form:
    """How the answers for one case kept to the form.

    asked: texts; first: whose first answer the gate took; own: published texts that the student said, word for word;
    dropped: novel topics left out for want of words; answers, refused: all answers and those the gate refused, with
    reasons.
    """

    asked: int
    first: int
    own: int
    dropped: int
    answers: int
    refused: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Every text that was asked for is the student's own and published."""
        return self.own == self.asked


def form_of(worded: Worded) -> Form:
    """Judge the recorded answers by the gate and by what was published, so that a fallback counts as a failure."""
    pieces = split_task(task_of(worded.case.request))
    first, own, refused = 0, 0, []
    published = {text.text for text in worded.texts}
    for piece, calls in zip(pieces, calls_of(worded), strict=True):
        accepted = []
        for number, call in enumerate(calls):
            try:
                wording = parse_wording(call.text, piece)
            except WordingRejected as error:
                refused.append(error.reason)
                continue
            first += number == 0
            accepted += [text for text in (wording.summary, *wording.descriptions, *wording.reasons) if text]
        own += worded.persona.tier is Tier.STUDENT and any(text in published for text in accepted)
    dropped = len(worded.case.context.novel) - len(worded.persona.novel)
    return Form(len(pieces), first, own, dropped, len(worded.calls), tuple(refused))


def template_passes(cases: Sequence[Case]) -> float:
    """Share of template texts that the gate takes, asked for piece by piece as the student's are."""
    passed = []
    for case in cases:
        for piece in split_task(task_of(case.request)):
            wording = template_wording(piece)
            (text,) = [t for t in (wording.summary, *wording.descriptions, *wording.reasons) if t]
            passed.append(_passes(text, piece))
    return sum(passed) / len(passed)


def answer_lines(worded: Iterable[Worded]) -> list[bytes]:
    """What was asked, answered and published, as JSON lines."""
    return [
        orjson.dumps(
            {
                "request_id": one.case.request.request_id,
                "user_id": one.case.user_id,
                "tier": str(one.persona.tier),
                "seconds": round(one.seconds, 3),
                "texts": [{"part": t.part, "label": t.label, "text": t.text} for t in one.texts],
                "calls": [
                    {
                        "prompt": c.prompt,
                        "seed": c.seed,
                        "text": c.text,
                        "tokens_in": c.tokens_in,
                        "tokens_out": c.tokens_out,
                    }
                    for c in one.calls
                ],
            }
        )
        for one in worded
    ]


def _passes(text: str, piece: WordingTask) -> bool:
    (key,) = task_keys(piece)
    try:
        parse_wording(orjson.dumps({key: text}).decode(), piece)
    except WordingRejected:
        return False
    return True


@contextmanager
def _gone_alone() -> Iterator[None]:
    """StudentGone in place of the group of tasks that it ended."""
    try:
        yield
    except BaseExceptionGroup as group:
        first: BaseException = group.subgroup(StudentGone) or group
        while first is not group and isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
