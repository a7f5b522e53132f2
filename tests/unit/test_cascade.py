"""The teacher tier of the writer: who words what, what it costs, where it is cached, and that it stops nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import orjson
import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from agents.cascade import ATTEMPTS, ATTEMPTS_BEFORE_TEACHER, ATTEMPTS_TO_DIFFER, TEACHER_ATTEMPTS, seed_of
from agents.circuits import TeacherCircuit
from agents.persona_writer import Outcome, PersonaWriter
from agents.stores.memory import MemoryStore
from agents.student_client import Answer, StudentFailed, StudentUnavailable
from agents.teacher_client import TeacherFailed, TeacherUnavailable
from agents.telemetry import Telemetry, create_telemetry
from agents.writer_configuration import WriterConfiguration
from streams import topics
from streams.decoding import decode_persona
from streams.personas import content_keys, plan, texts_of
from streams.prompts import Prompt, build_prompt
from streams.records import Maturity, Persona, RefreshRequest, Tier, encode, persona_version
from streams.tasks import split_task, task_keys
from streams.teaching import Chat, TeacherPolicy, build_chat
from streams.watch import InputRecord, Output
from streams.wording import template_wording
from tests.request_samples import HOUR, NOON, sample_context, sample_request

QUICK = WriterConfiguration(
    student_id="student/1",
    look_ahead=8,
    upgrade_look_ahead=2,
    store_patience_seconds=0.2,
    first_pause_seconds=0.02,
    longest_pause_seconds=0.05,
)
ALL = replace(QUICK, teacher_policy=TeacherPolicy(share=1.0))
TEXTS = 5
GARBAGE = "garbage"

Say = Callable[[Prompt, int], Awaitable[str]]
Teach = Callable[[Chat, int], Awaitable[str]]


def sample_answers() -> tuple[dict[str, str], dict[str, str]]:
    """Good answers to all prompts and chats of the sample: the student's are templates, the teacher's differ."""
    whole = plan(sample_request(), content_keys(sample_request(), "any"), {}).task
    assert whole is not None
    taught = (
        "Mostly watches italian cooking and gravel cycling.",
        "Enjoys italian cooking with five sauces from one pot of tomatoes.",
        "Keeps up with gravel bikes put to an honest test.",
        "Might like bikepacking trips after so much gravel cycling.",
        "Could enjoy sourdough bread next to italian cooking.",
    )
    prompts, chats = {}, {}
    for piece, text, better in zip(split_task(whole), texts_of(template_wording(whole)), taught, strict=True):
        (key,) = task_keys(piece)
        for variant in range(ATTEMPTS + ATTEMPTS_TO_DIFFER):
            prompts[build_prompt(piece, variant).text] = orjson.dumps({key: text}).decode()
        chats[build_chat(piece).user] = orjson.dumps({key: better}, option=orjson.OPT_INDENT_2).decode()
    return prompts, chats


PROMPTS, CHATS = sample_answers()


@dataclass
class Student:
    """Answers by a script; the last step repeats. Without one it answers well."""

    script: list[str | Exception | Say] = field(default_factory=list)
    calls: list[tuple[Prompt, int]] = field(default_factory=list)

    async def word(self, prompt: Prompt, *, seed: int = 0) -> Answer:
        self.calls.append((prompt, seed))
        step = self.script[min(len(self.calls), len(self.script)) - 1] if self.script else PROMPTS[prompt.text]
        if isinstance(step, Exception):
            raise step
        text = step if isinstance(step, str) else await step(prompt, seed)
        return Answer(text, "stop", 300, 80, 1500, "student", "1")

    async def ready(self) -> bool:
        return True

    async def close(self) -> None:
        return None


@dataclass
class Teacher:
    """The same for chats."""

    script: list[str | Exception | Teach] = field(default_factory=list)
    calls: list[tuple[Chat, int]] = field(default_factory=list)
    teacher_id: str = "big/1"

    async def word(self, chat: Chat, *, seed: int = 0) -> Answer:
        self.calls.append((chat, seed))
        step = self.script[min(len(self.calls), len(self.script)) - 1] if self.script else CHATS[chat.user]
        if isinstance(step, Exception):
            raise step
        text = step if isinstance(step, str) else await step(chat, seed)
        return Answer(text, "stop", 500, 20, 700, "big", "")

    async def close(self) -> None:
        return None


@dataclass
class World:
    """A writer with both models, and all that is around it."""

    student: Student = field(default_factory=Student)
    teacher: Teacher | None = field(default_factory=Teacher)
    configuration: WriterConfiguration = QUICK
    store: MemoryStore = field(default_factory=MemoryStore)
    telemetry: Telemetry = field(default_factory=lambda: create_telemetry({}))
    published: list[Output] = field(default_factory=list)
    now: int = NOON
    offset: int = 0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.writer = PersonaWriter(
            self.store,
            self.student,
            self._publish,
            self.configuration,
            lambda: self.now,
            self.telemetry,
            lambda *_: None,
            self.teacher,
        )

    async def _publish(self, outputs: Sequence[Output]) -> None:
        self.published.extend(outputs)

    def record(self, value: bytes | None) -> InputRecord:
        self.offset += 1
        return InputRecord(self.offset, b"key", value, NOON)

    async def answer(self, *requests: RefreshRequest) -> list[Persona]:
        for request in requests:
            await self.writer.submit(self.record(encode(request)), 0)
        await self.writer.idle()
        return self.personas()

    async def upgrade(self) -> Persona:
        await self.writer.submit_upgrade(self.record(self.outputs(topics.UPGRADE_REQUESTS)[-1].value), 0)
        await self.writer.idle()
        return self.personas()[-1]

    def outputs(self, topic: str) -> list[Output]:
        return [output for output in self.published if output.topic == topic]

    def personas(self) -> list[Persona]:
        return [decode_persona(output.value) for output in self.outputs(topics.PERSONAS) if output.value is not None]

    @property
    def taught(self) -> int:
        return len(self.teacher.calls) if self.teacher else 0


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    await made.writer.stop(0)


def asked(prompt: Prompt) -> str:
    return prompt.text.rpartition("<|im_start|>user")[2]


async def one_bad(prompt: Prompt, seed: int) -> str:
    """The student words all but the second interest."""
    return GARBAGE if "honest test" in asked(prompt) else PROMPTS[prompt.text]


# What the student cannot word


async def test_what_the_student_cannot_word_the_teacher_does() -> None:
    world = World(Student([GARBAGE]))
    (persona,) = await world.answer(sample_request("ann", 4))
    assert (persona.tier, persona.version) == (Tier.TEACHER, persona_version(4, Tier.TEACHER))
    assert persona.summary == "Mostly watches italian cooking and gravel cycling."
    assert [len(persona.interests), len(persona.novel)] == [2, 2]
    assert world.outputs(topics.UPGRADE_REQUESTS) == []
    assert len(world.student.calls) == ATTEMPTS_BEFORE_TEACHER * TEXTS
    assert world.taught == TEXTS
    model = persona.model
    assert (model.name, model.version) == ("big", "")
    assert (model.items, model.items_cached, model.items_teacher) == (TEXTS, 0, TEXTS)
    assert (model.teacher_tokens_in, model.teacher_tokens_out) == (TEXTS * 500, TEXTS * 20)
    assert (model.tokens_in, model.tokens_out) == (TEXTS * (500 + 2 * 300), TEXTS * (20 + 2 * 80))
    assert model.latency_ms == 2 * 1500 + 700
    assert world.writer.counts == {Outcome.TEACHER: 1}


async def test_one_text_of_the_teacher_makes_the_tier_and_the_others_stay_the_students() -> None:
    world = World(Student([one_bad]))
    (persona,) = await world.answer(sample_request("ann"))
    assert persona.tier is Tier.TEACHER
    assert persona.interests[1].description == "Keeps up with gravel bikes put to an honest test."
    assert persona.summary in next(answer for answer in PROMPTS.values() if answer.startswith('{"s"'))
    assert world.taught == 1
    assert (persona.model.items_teacher, persona.model.teacher_tokens_in) == (1, 500)


async def test_without_a_failure_no_teacher_is_asked(world: World) -> None:
    (persona,) = await world.answer(sample_request("ann"))
    assert persona.tier is Tier.STUDENT
    assert world.taught == 0


async def test_the_answer_of_the_teacher_passes_the_same_gate() -> None:
    bad = '{"2": "Keeps up with her gravel bikes."}'
    world = World(Student([one_bad]), Teacher([bad]))
    (persona,) = await world.answer(sample_request("ann"))
    assert persona.tier is Tier.TEMPLATE
    assert world.taught == TEACHER_ATTEMPTS
    assert world.teacher is not None
    assert [seed == 0 for _, seed in world.teacher.calls] == [True, False]
    assert (persona.model.name, persona.model.teacher_tokens_out) == ("template", TEACHER_ATTEMPTS * 20)
    assert len(world.outputs(topics.UPGRADE_REQUESTS)) == 1


async def test_a_template_is_upgraded_to_the_teachers_texts() -> None:
    world = World(Student([GARBAGE]), Teacher([GARBAGE]))
    await world.answer(sample_request("ann", 1))
    assert world.teacher is not None
    world.teacher.script = []
    persona = await world.upgrade()
    assert (persona.tier, persona.version) == (Tier.TEACHER, persona_version(1, Tier.TEACHER))
    assert world.writer.counts == {Outcome.TEMPLATE: 1, Outcome.UPGRADED: 1}
    before = world.published[:]
    await world.upgrade()
    assert world.published[len(before) :][0].value == before[-1].value, "the stored bytes go out again"


async def test_a_topic_that_neither_words_well_is_left_out() -> None:
    async def no_sourdough(prompt: Prompt, seed: int) -> str:
        return GARBAGE if "sourdough" in asked(prompt) else PROMPTS[prompt.text]

    world = World(Student([no_sourdough]), Teacher([GARBAGE]))
    (persona,) = await world.answer(sample_request("ann"))
    assert persona.tier is Tier.STUDENT
    assert [topic.label for topic in persona.novel] == ["bikepacking trips"]
    assert (persona.model.items_teacher, persona.model.teacher_tokens_in) == (0, TEACHER_ATTEMPTS * 500)


async def test_a_student_that_refuses_or_is_away_sends_nothing_to_the_teacher() -> None:
    refusing = World(Student([StudentFailed("the model is unknown")]))
    (persona,) = await refusing.answer(sample_request("ann"))
    assert persona.tier is Tier.TEMPLATE
    away = World(Student([StudentUnavailable("refused")]))
    (persona,) = await away.answer(sample_request("ann", expires_after_ms=60))
    assert persona.tier is Tier.TEMPLATE
    assert (refusing.taught, away.taught) == (0, 0)


# A teacher that is away


async def test_a_teacher_that_is_away_stops_nothing() -> None:
    world = World(Student([GARBAGE]), Teacher([TeacherUnavailable("refused")]))
    personas = await world.answer(sample_request("ann"), sample_request("bob"), sample_request("cat"))
    assert [persona.tier for persona in personas] == [Tier.TEMPLATE] * 3
    assert len(world.outputs(topics.UPGRADE_REQUESTS)) == 3
    assert world.writer.student_available


async def test_while_the_teacher_is_away_it_is_not_called_and_the_student_tries_as_often_as_without() -> None:
    slow = replace(QUICK, first_pause_seconds=60.0, longest_pause_seconds=60.0)
    world = World(Student([GARBAGE]), Teacher([TeacherUnavailable("refused")]), slow)
    await world.answer(sample_request("ann"))
    assert world.taught == 1
    calls = len(world.student.calls)
    await world.answer(sample_request("bob"))
    assert world.taught == 1
    assert len(world.student.calls) == calls + ATTEMPTS * TEXTS


async def test_the_student_tries_on_where_the_teacher_turns_out_to_be_away() -> None:
    async def third(prompt: Prompt, seed: int) -> str:
        good = [seed_of(sample_request(user).request_id, ATTEMPTS_BEFORE_TEACHER) for user in ("ann", "bob")]
        return PROMPTS[prompt.text] if seed in good else GARBAGE

    world = World(Student([third]), Teacher([TeacherUnavailable("refused")]))
    (ann,) = await world.answer(sample_request("ann"))
    assert ann.tier is Tier.STUDENT
    assert len(world.student.calls) == (ATTEMPTS_BEFORE_TEACHER + 1) * TEXTS
    # After the pause one call tries again, and its texts wait for no other.
    await asyncio.sleep(0.1)
    world.store, taught = MemoryStore(), world.taught
    world.writer._store = world.store
    bob = (await world.answer(sample_request("bob")))[-1]
    assert (bob.tier, world.taught) == (Tier.STUDENT, taught + 1)


async def test_after_a_pause_the_teacher_is_asked_again() -> None:
    world = World(Student([GARBAGE]), Teacher([TeacherUnavailable("refused"), good_chat]))
    await world.answer(sample_request("ann"))
    assert world.taught == 1, "the other texts went without it"
    await asyncio.sleep(0.1)
    ann, bob = await world.answer(sample_request("bob"))
    assert (ann.tier, bob.tier) == (Tier.TEMPLATE, Tier.TEACHER)
    # All of ann's texts are cached by now, so the upgrade costs nothing.
    assert (await world.upgrade()).model.tokens_in == 0
    assert world.taught == 1 + TEXTS


async def good_chat(chat: Chat, seed: int) -> str:
    return CHATS[chat.user]


async def test_one_call_at_a_time_tries_whether_the_teacher_is_back() -> None:
    release = asyncio.Event()

    async def wait(chat: Chat, seed: int) -> str:
        await release.wait()
        return "x"

    teacher = Teacher([TeacherUnavailable("refused"), wait])
    circuit = TeacherCircuit(teacher, QUICK, create_telemetry({}))
    chat = Chat("", "", 1, "")
    with pytest.raises(TeacherUnavailable, match="refused"):
        await circuit.word(chat, 0)
    assert not circuit.closed
    with pytest.raises(TeacherUnavailable, match="away at the last try"):
        await circuit.word(chat, 0)
    await asyncio.sleep(0.06)
    assert circuit.closed
    probe = asyncio.create_task(circuit.word(chat, 0))
    await asyncio.sleep(0)
    assert not circuit.closed
    with pytest.raises(TeacherUnavailable, match="away at the last try"):
        await circuit.word(chat, 0)
    release.set()
    await probe
    assert circuit.closed
    await circuit.word(chat, 0)
    assert len(teacher.calls) == 3


async def test_a_probe_that_is_cancelled_leaves_the_next_one_free() -> None:
    async def hang(chat: Chat, seed: int) -> str:
        await asyncio.sleep(60)
        return ""

    circuit = TeacherCircuit(Teacher([TeacherUnavailable("refused"), hang]), QUICK, create_telemetry({}))
    with pytest.raises(TeacherUnavailable):
        await circuit.word(Chat("", "", 1, ""), 0)
    await asyncio.sleep(0.06)
    probe = asyncio.create_task(circuit.word(Chat("", "", 1, ""), 0))
    await asyncio.sleep(0)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    assert circuit.closed


async def test_the_pause_is_as_long_as_the_server_asks_for() -> None:
    circuit = TeacherCircuit(Teacher([TeacherUnavailable("429", 0.3)]), QUICK, create_telemetry({}))
    with pytest.raises(TeacherUnavailable):
        await circuit.word(Chat("", "", 1, ""), 0)
    await asyncio.sleep(0.1)
    assert not circuit.closed
    await asyncio.sleep(0.25)
    assert circuit.closed


async def test_a_refused_chat_does_not_open_the_circuit() -> None:
    world = World(Student([one_bad]), Teacher([TeacherFailed("status 400"), good_chat]))
    personas = await world.answer(sample_request("ann"))
    assert personas[-1].tier is Tier.TEMPLATE
    personas = await world.answer(sample_request("bob"))
    assert personas[-1].tier is Tier.TEACHER


async def test_a_teacher_that_hangs_is_left_when_the_request_runs_out_of_time() -> None:
    async def hang(chat: Chat, seed: int) -> str:
        await asyncio.sleep(60)
        return ""

    for configuration in (QUICK, ALL):
        world = World(Student([GARBAGE]), Teacher([hang]), configuration)
        (persona,) = await world.answer(sample_request("ann", expires_after_ms=60))
        assert persona.tier is Tier.TEMPLATE
        assert len(world.outputs(topics.UPGRADE_REQUESTS)) == 1


# Chosen requests


async def test_a_chosen_request_goes_to_the_teacher_at_once() -> None:
    world = World(configuration=ALL)
    (persona,) = await world.answer(sample_request("ann"))
    assert persona.tier is Tier.TEACHER
    assert (world.student.calls, world.taught) == ([], TEXTS)
    model = persona.model
    assert (model.tokens_in, model.teacher_tokens_in, model.items_teacher) == (TEXTS * 500, TEXTS * 500, TEXTS)


async def test_mature_viewers_of_enough_interests_are_chosen() -> None:
    world = World(configuration=replace(QUICK, teacher_policy=TeacherPolicy(interests=2)))
    mature = replace(sample_request("bob"), context=replace(sample_context(), maturity=Maturity.MATURE))
    await world.answer(sample_request("ann"))
    ann, bob = await world.answer(mature)
    assert (ann.tier, bob.tier) == (Tier.STUDENT, Tier.TEACHER)


async def test_of_a_chosen_request_the_student_words_what_the_teacher_did_not() -> None:
    async def half(chat: Chat, seed: int) -> str:
        return GARBAGE if '"label":"italian cooking"' in chat.user else CHATS[chat.user]

    world = World(teacher=Teacher([half]), configuration=ALL)
    (persona,) = await world.answer(sample_request("ann"))
    italian, gravel = (interest.description for interest in persona.interests)
    assert (persona.tier, persona.model.items_teacher) == (Tier.TEACHER, TEXTS - 1)
    assert gravel in str(list(CHATS.values()))
    assert italian in str(list(PROMPTS.values()))


@pytest.mark.parametrize(("step", "tries"), [(GARBAGE, TEACHER_ATTEMPTS), (TeacherFailed("status 400"), 1)])
async def test_what_the_teacher_refused_of_a_chosen_request_it_is_not_asked_for_again(
    step: str | Exception, tries: int
) -> None:
    world = World(Student([GARBAGE]), Teacher([step]), ALL)
    (persona,) = await world.answer(sample_request("ann"))
    assert persona.tier is Tier.TEMPLATE
    assert world.taught == tries * TEXTS
    assert len(world.student.calls) == ATTEMPTS * TEXTS, "the student tries as often as without a teacher"


async def test_a_chosen_request_is_the_students_while_the_teacher_is_away() -> None:
    world = World(teacher=Teacher([TeacherUnavailable("refused")]), configuration=ALL)
    (persona,) = await world.answer(sample_request("ann"))
    assert persona.tier is Tier.STUDENT
    assert len(world.student.calls) == TEXTS


async def test_below_the_gate_and_without_a_student_no_teacher_is_asked() -> None:
    world = World(configuration=ALL)
    (persona,) = await world.answer(sample_request("ann", tier_limit=Tier.TEMPLATE))
    assert (persona.tier, world.taught) == (Tier.TEMPLATE, 0)
    world.now = NOON + 2 * HOUR
    personas = await world.answer(sample_request("bob"))
    assert (personas[-1].tier, world.taught) == (Tier.TEMPLATE, 0)


# The cache


async def test_a_text_of_the_teacher_serves_every_later_request_for_nothing() -> None:
    world = World(Student([one_bad]))
    await world.answer(sample_request("ann"))
    calls = len(world.student.calls)
    ann, bob = await world.answer(sample_request("bob"))
    assert (world.taught, len(world.student.calls)) == (1, calls)
    assert bob.interests[1].description == ann.interests[1].description
    assert (bob.tier, bob.cached, bob.model.tokens_in) == (Tier.STUDENT, True, 0)


async def test_the_teachers_text_takes_the_place_of_the_students_for_everyone() -> None:
    world = World()
    await world.answer(sample_request("ann"))
    world.configuration = ALL
    world.restart()
    await world.answer(sample_request("bob"))
    world.configuration = QUICK
    world.restart()
    ann, bob, cat = await world.answer(sample_request("cat"))
    assert (ann.tier, bob.tier) == (Tier.STUDENT, Tier.TEACHER)
    assert ann.interests[0].description != bob.interests[0].description
    assert (cat.interests[0].description, cat.cached) == (bob.interests[0].description, True)
    assert world.taught == TEXTS
    world.configuration = ALL
    world.restart()
    await world.answer(sample_request("dan"))
    assert world.taught == TEXTS, "what it worded is not asked for again"


async def test_another_teacher_words_anew_and_without_one_its_texts_are_not_used() -> None:
    world = World(configuration=ALL)
    await world.answer(sample_request("ann"))
    world.teacher = Teacher(teacher_id="bigger/1")
    world.restart()
    await world.answer(sample_request("bob"))
    assert world.taught == TEXTS
    world.teacher = None
    world.restart()
    personas = await world.answer(sample_request("cat"))
    assert personas[-1].tier is Tier.STUDENT
    assert len(world.student.calls) == TEXTS


async def test_texts_that_repeat_each_other_are_not_published_as_the_teachers() -> None:
    async def same(chat: Chat, seed: int) -> str:
        key = orjson.loads(chat.user)["key"]
        text = "Enjoys italian cooking with five sauces from one pot of tomatoes."
        return CHATS[chat.user] if key == "s" and chat.user in CHATS else orjson.dumps({key: text}).decode()

    context = sample_context()
    alike = replace(context.interests[1], label="italian cooking", titles=context.interests[0].titles)
    both = replace(context, interests=(context.interests[0], alike), novel=())
    request = replace(sample_request(), context=both)
    world = World(Student([GARBAGE]), Teacher([same]), ALL)
    (persona,) = await world.answer(request)
    assert persona.tier is Tier.TEMPLATE
    assert persona.interests[0].description != persona.interests[1].description
    assert persona.model.items_teacher == 1, "the first of the two stays"
    assert len(await world.store.wordings(list(content_keys(request, "teacher/big/1")))) == 2
    assert world.taught == TEACHER_ATTEMPTS + 2


async def test_the_students_text_stands_in_for_one_of_the_teacher_that_repeats_another() -> None:
    context = sample_context()
    alike = replace(context.interests[1], label="italian cooking", titles=context.interests[0].titles)
    request = replace(sample_request(), context=replace(context, interests=(context.interests[0], alike), novel=()))
    keys, taught = content_keys(request, "student/1"), content_keys(request, "teacher/big/1")
    world = World()
    rows = dict.fromkeys(taught.interests, b"Enjoys italian cooking with five sauces from one pot of tomatoes.")
    rows[keys.interests[1]] = b"Watches more italian cooking lately than before."
    rows[keys.summary] = b"Mostly watches italian cooking."
    await world.store.put_wordings(rows)
    (persona,) = await world.answer(request)
    assert persona.interests[1].description == "Watches more italian cooking lately than before."
    assert (persona.tier, persona.cached, world.student.calls, world.taught) == (Tier.STUDENT, True, [], 0)


async def test_the_teachers_texts_are_cached_though_the_request_is_superseded_as_it_waits_for_the_budget() -> None:
    async def half(chat: Chat, seed: int) -> str:
        return GARBAGE if '"label":"italian cooking"' in chat.user else CHATS[chat.user]

    world = World(teacher=Teacher([half]), configuration=replace(ALL, budget_tokens_per_hour=1, budget_in_flight=1))
    world.writer.set_share(0.0)
    assert world.writer._gate is not None
    world.writer._gate._budget._level = -1000.0
    await world.writer.submit(world.record(encode(sample_request("ann", 1))), 0)
    async with asyncio.timeout(5):
        while not world.writer._gate._budget.waiting:  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.001)
    await world.answer(sample_request("ann", 2, tier_limit=Tier.TEMPLATE))
    assert world.writer.counts == {Outcome.SUPERSEDED: 1, Outcome.TEMPLATE: 1}
    keys = list(content_keys(sample_request(), "teacher/big/1"))
    assert len(await world.store.wordings(keys)) == TEXTS - 1


# The budget and the measures


async def test_the_teachers_tokens_are_not_charged_to_the_students_budget() -> None:
    budget = replace(ALL, budget_tokens_per_hour=1, budget_in_flight=1)
    world = World(configuration=budget)
    async with asyncio.timeout(5):
        personas = await world.answer(*(sample_request(user) for user in ("ann", "bob", "cat")))
    assert {persona.tier for persona in personas} <= {Tier.TEACHER, Tier.STUDENT}
    assert world.student.calls == []


async def test_a_teachers_answer_within_the_students_turn_is_charged_as_the_students_part() -> None:
    earning = replace(QUICK, budget_tokens_per_hour=3600 * 100_000, budget_in_flight=1)
    world = World(Student([one_bad]), configuration=earning)
    await world.answer(sample_request("ann"))
    assert world.writer._gate is not None
    # Six answers of the student for its five texts: the teacher's 520 tokens for one of them are not in it.
    assert world.writer._gate._budget.tokens_per_text == pytest.approx(6 * 380 / 5)


async def test_shares_tokens_and_quality_of_each_tier_are_measured() -> None:
    reader = InMemoryMetricReader()
    telemetry = create_telemetry({}, metric_readers=[reader])
    world = World(Student([one_bad]), telemetry=telemetry)
    await world.answer(sample_request("ann"))
    await world.answer(sample_request("bob"), sample_request("cat", tier_limit=Tier.TEMPLATE))
    assert points(reader, "personas.texts") == {
        ("student",): TEXTS - 1,
        ("teacher",): 1,
        ("cache",): TEXTS,
        ("template",): TEXTS,
    }
    assert points(reader, "personas.first_tries") == {
        ("student", "passed"): TEXTS - 1,
        ("student", "rejected"): 1,
        ("teacher", "passed"): 1,
    }
    assert points(reader, "personas.teacher.tokens") == {("in",): 500, ("out",): 20}
    assert points(reader, "personas.student.tokens") == {("in",): 6 * 300, ("out",): 6 * 80}
    assert points(reader, "personas.teacher.calls") == {("used",): 1}
    assert world.writer.wording_figures == {
        "cache.texts": 5,
        "student.first_passes": 4,
        "student.first_tries": 5,
        "student.texts": 4,
        "student.tokens_in": 1800,
        "student.tokens_out": 480,
        "teacher.first_passes": 1,
        "teacher.first_tries": 1,
        "teacher.texts": 1,
        "teacher.tokens_in": 500,
        "teacher.tokens_out": 20,
        "template.texts": 5,
    }
    telemetry.close()


def points(reader: InMemoryMetricReader, name: str) -> dict[tuple[str, ...], float]:
    data = reader.get_metrics_data()
    assert data is not None
    metrics = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics if m.name == name]
    found = {}
    for point in metrics[0].data.data_points:
        found[tuple(str(value) for value in (point.attributes or {}).values())] = float(point.value)  # type: ignore[union-attr]
    return found
