"""What every student client promises: the real one over Triton and the in-memory one run the same suite."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from agents.settings import Settings
from agents.student_client import ScriptedStudent, StudentClient, StudentFailed, StudentUnavailable, TritonStudent
from streams.prompts import build_prompt
from streams.tasks import split_task
from streams.wording import WordingRejected, parse_wording
from tests.wording_samples import sample_task

Make = Callable[[float], StudentClient]
"""Makes a client with this deadline in seconds."""

PIECE = split_task(sample_task(1, 0))[0]
PROMPT = build_prompt(PIECE)


@pytest.fixture(params=["scripted", pytest.param("triton", marks=pytest.mark.stack)])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    clients: list[StudentClient] = []
    settings: Settings | None = None
    if request.param == "triton":
        settings = request.getfixturevalue("triton").settings

    def made(deadline: float) -> StudentClient:
        if settings is None:
            client: StudentClient = ScriptedStudent(delay_seconds=0.05, deadline_seconds=deadline, concurrency=4)
        else:
            client = TritonStudent(replace(settings, student_deadline_seconds=deadline, student_concurrency=4))
        clients.append(client)
        return client

    yield made
    for client in clients:
        await client.close()


async def test_it_is_ready_and_answers_in_the_asked_form(make: Make) -> None:
    client = make(60.0)
    assert await client.ready()
    answer = await client.word(PROMPT, seed=0)
    wording = parse_wording(answer.text, PIECE)
    assert wording.summary
    assert answer.finish_reason == "stop"
    assert answer.tokens_in > 20
    assert 1 <= answer.tokens_out <= PROMPT.maximum_tokens
    assert answer.latency_ms >= 0
    assert answer.model_name
    assert answer.model_version


async def test_many_callers_get_their_own_answers(make: Make) -> None:
    client = make(120.0)
    pieces = [piece for first in range(4) for piece in split_task(sample_task(2, 1, first))]
    answers = await asyncio.gather(*(client.word(build_prompt(piece)) for piece in pieces))
    usable = 0
    for piece, answer in zip(pieces, answers, strict=True):
        try:
            parse_wording(answer.text, piece)
        except WordingRejected:
            continue
        usable += 1
    # An answer that belongs to another piece is not usable for this one.
    assert usable >= 0.85 * len(pieces)


async def test_a_cancelled_call_leaves_the_client_usable(make: Make) -> None:
    client = make(60.0)
    calls = [asyncio.create_task(client.word(PROMPT)) for _ in range(6)]
    await asyncio.sleep(0.02)
    for call in calls:
        call.cancel()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert (await client.word(PROMPT)).text


async def test_past_the_deadline_it_is_unavailable(make: Make) -> None:
    with pytest.raises(StudentUnavailable):
        await make(0.001).word(PROMPT)


async def test_a_grammar_that_was_not_compiled_at_load_is_a_lasting_failure(make: Make) -> None:
    with pytest.raises(StudentFailed, match="compiled at load"):
        await make(60.0).word(replace(PROMPT, grammar='root ::= "yes" | "no"'))


async def test_a_closed_client_is_unavailable(make: Make) -> None:
    client = make(60.0)
    await client.close()
    await client.close()
    assert not await client.ready()
    with pytest.raises(StudentUnavailable):
        await client.word(PROMPT)


async def test_nobody_listening_is_unavailable_and_not_ready() -> None:
    client = TritonStudent(Settings(triton_url="127.0.0.1:9", student_deadline_seconds=5.0))
    try:
        assert not await client.ready()
        with pytest.raises(StudentUnavailable, match=r"127\.0\.0\.1:9"):
            await client.word(PROMPT)
    finally:
        await client.close()


async def test_a_script_decides_by_prompt_and_seed_and_may_fail() -> None:
    def script(prompt: object, seed: int) -> str:
        if seed == 3:
            raise StudentUnavailable("scripted")
        return str(seed)

    client = ScriptedStudent(script)
    assert (await client.word(PROMPT, seed=7)).text == "7"
    with pytest.raises(StudentUnavailable, match="scripted"):
        await client.word(PROMPT, seed=3)
    assert client.prompts == [PROMPT, PROMPT]


async def test_calls_in_flight_are_bounded() -> None:
    client = ScriptedStudent(concurrency=3, delay_seconds=0.01)
    await asyncio.gather(*(client.word(PROMPT) for _ in range(10)))
    assert client.most_in_flight == 3


def test_the_real_client_must_be_made_inside_a_loop() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        TritonStudent(Settings())
