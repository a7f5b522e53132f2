"""The teacher's run over contexts: what is written, what is asked again and why, and how a run stops and goes on."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web

from agents.student_client import Answer
from agents.teacher_client import TeacherFailed, TeacherUnavailable
from streams.tasks import task_keys
from streams.teaching import Chat, build_chat
from tests.distillation_samples import contexts, plain, text_of
from triton_models.distillation.pairs import Pair, encoded, read_pairs, write_pairs
from triton_models.distillation.teacher import ABSENCES, Counts, TeacherAway, ask, opened

ROOT = Path(__file__).parents[2]
CONTEXTS = contexts(12)
GOOD = {build_chat(pair.task).user: pair for pair in CONTEXTS}

Step = str | Exception


def answer_of(pair: Pair, text: str | None = None) -> str:
    (key,) = task_keys(pair.task)
    return orjson.dumps({key: text or text_of(pair)}).decode()


@dataclass
class FakeTeacher:
    """Answers well; before that, what the script says of a context by its number."""

    script: dict[int, list[Step]] = field(default_factory=dict)
    calls: list[tuple[Chat, int]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    hold: asyncio.Event | None = None

    @property
    def teacher_id(self) -> str:
        return "fake/1"

    async def word(self, chat: Chat, *, seed: int = 0) -> Answer:
        self.calls.append((chat, seed))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await (self.hold.wait() if self.hold else asyncio.sleep(0))
            facts = orjson.loads(chat.user)
            facts.pop("refused", None)
            pair = GOOD[orjson.dumps(facts).decode()]
            steps = self.script.get(CONTEXTS.index(pair), [])
            step = steps.pop(0) if steps else answer_of(pair)
        finally:
            self.in_flight -= 1
        if isinstance(step, Exception):
            raise step
        return Answer(step, "stop", 300, 20, 5, "fake", "")

    async def close(self) -> None:
        pass


async def asked(
    teacher: FakeTeacher, pairs: Sequence[Pair] = CONTEXTS, *, tries: int = 3, concurrency: int = 4
) -> tuple[list[Pair], Counts]:
    """What a run writes, in the order of the contexts."""
    out, counts = io.BytesIO(), Counts(len(pairs))
    await ask(teacher, pairs, out, counts, tries=tries, concurrency=concurrency, pause_seconds=0.001)
    return sorted(written_in(out), key=lambda pair: [c.line for c in CONTEXTS].index(pair.line)), counts


def written_in(out: io.BytesIO) -> list[Pair]:
    lines = [orjson.loads(line) for line in out.getvalue().splitlines()]
    texts = {encoded_task(line): line["text"] for line in lines}
    assert len(texts) == len(lines)
    return [plain(pair) for pair in CONTEXTS if encoded_task(orjson.loads(encoded(pair))) in texts]


def encoded_task(record: dict[str, Any]) -> bytes:
    return orjson.dumps(record["task"])


# Asking


async def test_each_context_gets_its_text() -> None:
    teacher = FakeTeacher()
    written, counts = await asked(teacher)
    assert written == [plain(pair) for pair in CONTEXTS]
    assert (counts.written, counts.refused, counts.left, counts.tries) == (12, 0, 0, 12)
    assert (counts.tokens_in, counts.tokens_out) == (12 * 300, 12 * 20)
    assert {seed for _, seed in teacher.calls} == {0}


async def test_so_many_are_asked_at_once() -> None:
    teacher = FakeTeacher()
    await asked(teacher, concurrency=3)
    assert teacher.most_in_flight == 3


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (answer_of(CONTEXTS[2], "Never begins as it must, whatever it says."), "opening"),
        (answer_of(CONTEXTS[2], f"{CONTEXTS[2].facts.opening} is seen in Rome at all times."), "name"),
        (answer_of(CONTEXTS[2], f"{CONTEXTS[2].facts.opening}."), "length"),
        ("Here you are: a sentence.", "wrong_form"),
        ('{"2": "Enjoys it."}', "wrong_form"),
        ('{"1": 5}', "wrong_form"),
        ('["1"]', "wrong_form"),
        ("", "wrong_form"),
    ],
)
async def test_a_refused_text_is_asked_for_again_with_the_reason(bad: str, reason: str) -> None:
    teacher = FakeTeacher({2: [bad]})
    written, counts = await asked(teacher)
    assert len(written) == 12
    assert (counts.written, counts.tries, counts.reasons) == (12, 13, {reason: 1})
    ((chat, seed),) = [(chat, seed) for chat, seed in teacher.calls if seed]
    refused = orjson.loads(chat.user)["refused"]
    assert refused["why"].startswith(reason.partition("_")[0])
    assert seed == 1


async def test_only_the_last_refusal_is_given_back() -> None:
    bad: list[str | Exception] = [
        answer_of(CONTEXTS[0], f"{word} begins as it must, whatever it says.") for word in ("Never", "Hardly")
    ]
    teacher = FakeTeacher({0: bad})
    await asked(teacher, CONTEXTS[:1])
    refused = [orjson.loads(chat.user).get("refused", {}).get("answer", "") for chat, _ in teacher.calls]
    assert [text.split(" ")[0] for text in refused] == ["", "Never", "Hardly"]


async def test_what_no_try_mends_is_left_out_and_counted() -> None:
    teacher = FakeTeacher({5: ["no"] * 3, 7: [TeacherFailed("too long")] * 3})
    written, counts = await asked(teacher)
    assert [pair.line for pair in written] == [p.line for n, p in enumerate(CONTEXTS) if n not in (5, 7)]
    assert (counts.written, counts.refused, counts.left) == (10, 2, 0)
    assert counts.reasons == {"wrong_form": 3, "failed": 3}


async def test_an_absence_costs_no_try() -> None:
    teacher = FakeTeacher({3: [TeacherUnavailable("away")] * (ABSENCES - 1)})
    written, counts = await asked(teacher, tries=1)
    assert len(written) == 12
    assert counts.tries == 12


async def test_a_teacher_that_stays_away_ends_the_run_and_what_is_written_stays() -> None:
    teacher = FakeTeacher({n: [TeacherUnavailable("no such host")] * ABSENCES for n in range(3, 12)})
    out, counts = io.BytesIO(), Counts(12)
    with pytest.raises(TeacherAway, match="no such host"):
        await ask(teacher, CONTEXTS, out, counts, tries=3, concurrency=1, pause_seconds=0.001)
    assert len(written_in(out)) == counts.written == 3
    assert counts.left == 9
    assert teacher.in_flight == 0


async def test_a_run_that_is_cancelled_leaves_whole_lines_and_no_call() -> None:
    teacher = FakeTeacher(hold=asyncio.Event())
    out = io.BytesIO()
    run = asyncio.create_task(ask(teacher, CONTEXTS, out, Counts(12), tries=3, concurrency=4))
    while teacher.in_flight < 4:  # noqa: ASYNC110
        await asyncio.sleep(0)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert (teacher.in_flight, out.getvalue()) == (0, b"")


# The file


def test_a_file_of_pairs_says_what_is_done_and_loses_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "pairs.jsonl"
    first, second = map(plain, CONTEXTS[:2])
    with opened(path) as (out, done):
        assert done == frozenset()
        out.write(encoded(first))
        out.write(encoded(second)[:-9])
    with opened(path) as (out, done):
        assert done == {first.prompt}
        out.write(encoded(second))
    assert list(read_pairs([path])) == [first, second]


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    with opened(path), pytest.raises(ValueError, match="another run"), opened(path):
        pass


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not mine\n")
    with pytest.raises(ValueError, match=r"notes\.txt:1 is no pair"), opened(path):
        pass
    assert path.read_text() == "not mine\n"


# The command


@asynccontextmanager
async def serving(ready: Callable[[int], bool]) -> AsyncIterator[tuple[str, list[str]]]:
    """An OpenAI-compatible endpoint that answers the calls whose number is `ready`, and never the others."""
    users: list[str] = []

    async def complete(request: web.Request) -> web.Response:
        user = orjson.loads(await request.read())["messages"][1]["content"]
        users.append(user)
        if not ready(len(users)):
            await asyncio.sleep(60)
        reply = {
            "choices": [{"message": {"content": answer_of(GOOD[user])}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 300, "completion_tokens": 20},
        }
        return web.json_response(reply)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1", users
    finally:
        await runner.cleanup()


async def started(url: str, *arguments: object) -> asyncio.subprocess.Process:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PERSONAS_")}
    if url:
        environment |= {"PERSONAS_TEACHER_URL": url, "PERSONAS_TEACHER_MODEL": "large"}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "triton_models.distillation.teacher", *map(str, arguments),
        cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def test_the_command_stops_at_sigterm_and_goes_on_where_it_was(tmp_path: Path) -> None:
    source, out = tmp_path / "contexts.jsonl", tmp_path / "pairs.jsonl"
    write_pairs(source, CONTEXTS)
    async with serving(lambda number: number <= 5) as (url, users):
        process = await started(url, source, out, "--concurrency", 2)
        async with asyncio.timeout(60):
            while len(users) < 7:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            stdout, stderr = await process.communicate()
    figures = orjson.loads(stdout.splitlines()[-1])
    assert process.returncode == 143, stderr
    assert (figures["written"], figures["left"]) == (5, 7)
    assert len(list(read_pairs([out]))) == 5
    async with serving(lambda _: True) as (url, users):
        process = await started(url, source, out)
        stdout, stderr = await process.communicate()
    figures = orjson.loads(stdout.splitlines()[-1])
    assert process.returncode == 0, stderr
    assert (figures["done_before"], figures["written"], figures["left"]) == (5, 7, 0)
    assert len(users) == 7
    assert {pair.line: pair.text for pair in read_pairs([out])} == {p.line: text_of(p) for p in CONTEXTS}


async def test_without_a_teacher_the_command_says_what_to_set(tmp_path: Path) -> None:
    write_pairs(tmp_path / "contexts.jsonl", CONTEXTS)
    process = await started("", tmp_path / "contexts.jsonl", tmp_path / "pairs.jsonl")
    _, stderr = await process.communicate()
    assert process.returncode == 1
    assert b"error: no teacher is set: PERSONAS_TEACHER_URL" in stderr
