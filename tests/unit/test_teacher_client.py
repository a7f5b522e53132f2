"""The teacher's client against a fake OpenAI-compatible server: every way a call can end, and what never leaks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import orjson
import pytest
from aiohttp import web

from agents.circuits import TeacherCircuit
from agents.settings import Settings, SettingsError, load_settings
from agents.student_client import Answer, TritonStudent
from agents.teacher_client import (
    LONGEST_RETRY_AFTER_SECONDS,
    MAXIMUM_RESPONSE_BYTES,
    MAXIMUM_TOKENS,
    ChatTeacher,
    TeacherFailed,
    TeacherUnavailable,
    TritonTeacher,
    teacher_of,
)
from agents.telemetry import create_telemetry
from agents.writer_configuration import WriterConfiguration
from streams.prompts import Prompt
from streams.teaching import TEACHING_VERSION, Chat

KEY = "sk-very-secret-0123456789"
CHAT = Chat("Instructions.", '{"key":"1","label":"gravel cycling"}', 200, "hash")
SAID = '{"1":"Enjoys gravel cycling."}'

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def reply(**changes: Any) -> dict[str, Any]:
    return {
        "choices": [{"message": {"role": "assistant", "content": SAID}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 311, "completion_tokens": 17, "total_tokens": 328},
    } | changes


async def good(request: web.Request) -> web.Response:
    return web.json_response(reply())


@dataclass
class Endpoint:
    """A server of chat completions that answers by `handler`; it notes what it was asked."""

    handler: Handler = good
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    dropped: int = 0
    url: str = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(orjson.loads(await request.read()))
        self.headers.append(dict(request.headers))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self.handler(request)
        except asyncio.CancelledError:
            self.dropped += 1
            raise
        finally:
            self.in_flight -= 1


@asynccontextmanager
async def serving(handler: Handler = good) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint(handler)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", endpoint.complete)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    endpoint.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield endpoint
    finally:
        await runner.cleanup()


def settings_for(url: str, **changes: Any) -> Settings:
    base = Settings(teacher_url=url, teacher_model="big-model", teacher_api_key=KEY, teacher_deadline_seconds=5.0)
    return replace(base, **changes)


@asynccontextmanager
async def teaching(handler: Handler = good, **changes: Any) -> AsyncIterator[tuple[Endpoint, ChatTeacher]]:
    async with serving(handler) as endpoint:
        teacher = teacher_of(settings_for(endpoint.url, **changes))
        assert isinstance(teacher, ChatTeacher)
        try:
            yield endpoint, teacher
        finally:
            await teacher.close()


def answering(status: int, body: bytes = b"", **headers: str) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, body=body, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return answer


# Good answers


async def test_an_answer_is_read_with_its_tokens() -> None:
    async with teaching() as (endpoint, teacher):
        answer = await teacher.word(CHAT)
    assert (answer.text, answer.tokens_in, answer.tokens_out) == (SAID, 311, 17)
    assert (answer.model_name, answer.finish_reason) == ("big-model", "stop")
    assert answer.latency_ms >= 0
    (asked,) = endpoint.asked
    assert asked == {
        "model": "big-model",
        "messages": [{"role": "system", "content": CHAT.system}, {"role": "user", "content": CHAT.user}],
        "max_tokens": 200,
        "temperature": 0.0,
    }
    assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert teacher.teacher_id == f"big-model/{TEACHING_VERSION}"


async def test_a_second_try_samples() -> None:
    async with teaching() as (endpoint, teacher):
        await teacher.word(CHAT, seed=7)
    assert endpoint.asked[0]["temperature"] > 0


async def test_without_a_key_none_is_sent() -> None:
    async with teaching(teacher_api_key="") as (endpoint, teacher):
        await teacher.word(CHAT)
    assert "Authorization" not in endpoint.headers[0]


async def test_an_answer_of_thoughts_alone_is_an_empty_text_that_was_paid_for() -> None:
    async def thinking(request: web.Request) -> web.Response:
        return web.json_response(reply(choices=[{"message": {"content": None}, "finish_reason": "length"}]))

    async with teaching(thinking) as (_, teacher):
        answer = await teacher.word(CHAT)
    assert (answer.text, answer.finish_reason, answer.tokens_out) == ("", "length", 17)


async def test_no_more_calls_are_in_flight_than_allowed() -> None:
    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(0.02)
        return await good(request)

    async with teaching(slow, teacher_concurrency=2) as (endpoint, teacher):
        await asyncio.gather(*(teacher.word(CHAT) for _ in range(7)))
    assert (len(endpoint.asked), endpoint.most_in_flight) == (7, 2)


# Failures


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        orjson.dumps(reply(choices=[])),
        orjson.dumps(reply(choices=[{"message": {"content": 5}}])),
        orjson.dumps(reply(choices=[{"message": "text"}])),
        orjson.dumps(reply(choices="text")),
        orjson.dumps(reply(usage=None)),
        orjson.dumps(reply(usage={"prompt_tokens": -1, "completion_tokens": 2})),
        orjson.dumps(reply(usage={"prompt_tokens": "9", "completion_tokens": 2})),
        orjson.dumps(reply(usage={"prompt_tokens": MAXIMUM_TOKENS + 1, "completion_tokens": 2})),
        orjson.dumps(reply(usage={"prompt_tokens": 9, "completion_tokens": 2**63})),
        orjson.dumps(reply(usage={"prompt_tokens": True, "completion_tokens": 2})),
        b"[" * 20_000,
    ],
)
async def test_what_is_no_answer_is_a_failure_of_that_call(body: bytes) -> None:
    async with teaching(answering(200, body)) as (_, teacher):
        with pytest.raises(TeacherFailed, match="its answer"):
            await teacher.word(CHAT)


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_refused_call_says_why_without_the_key(status: int) -> None:
    body = orjson.dumps({"error": {"message": f"no such field\n{KEY} \x1b[31m" + "x" * 5000}})
    async with teaching(answering(status, body)) as (_, teacher):
        with pytest.raises(TeacherFailed, match=f"status {status}: no such field") as caught:
            await teacher.word(CHAT)
    text = str(caught.value)
    assert KEY not in text
    assert len(text) < 400
    assert text.isprintable()


@pytest.mark.parametrize("body", [b"", b"[]", b'{"error":"text"}', b'{"error":{"message":5}}', b"<html>"])
async def test_a_refusal_without_a_reason_is_still_one(body: bytes) -> None:
    async with teaching(answering(400, body)) as (_, teacher):
        with pytest.raises(TeacherFailed, match=r"status 400$"):
            await teacher.word(CHAT)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_is_named_and_not_shown(status: int) -> None:
    body = orjson.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}})
    async with teaching(answering(status, body)) as (_, teacher):
        with pytest.raises(TeacherUnavailable, match="PERSONAS_TEACHER_API_KEY") as caught:
            await teacher.word(CHAT)
    assert KEY not in str(caught.value)


async def test_a_server_that_wants_a_key_is_told_apart_from_one_that_refuses_it() -> None:
    async with teaching(answering(401), teacher_api_key="") as (_, teacher):
        with pytest.raises(TeacherUnavailable, match="wants a key"):
            await teacher.word(CHAT)


@pytest.mark.parametrize("status", [402, 404, 408, 429, 500, 502, 503, 529])
async def test_what_other_calls_would_meet_too_is_unavailable(status: int) -> None:
    async with teaching(answering(status)) as (_, teacher):
        with pytest.raises(TeacherUnavailable, match=f"status {status}"):
            await teacher.word(CHAT)


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7),
        ("0", 0, 0),
        ("99999999999999", LONGEST_RETRY_AFTER_SECONDS, LONGEST_RETRY_AFTER_SECONDS),
        ("-3", 0, 0),
        ("soon", 0, 0),
        ("\u0663", 0, 0),
        (timedelta(seconds=90), 60, 90),
        (timedelta(seconds=-90), 0, 0),
    ],
)
async def test_the_pause_that_a_server_asks_for_is_kept_in_bounds(
    header: str | timedelta, least: float, most: float
) -> None:
    if isinstance(header, timedelta):
        header = format_datetime(datetime.now(UTC) + header, usegmt=True)
    async with teaching(answering(429, Retry_After=header)) as (_, teacher):
        with pytest.raises(TeacherUnavailable) as caught:
            await teacher.word(CHAT)
    assert least <= caught.value.retry_after_seconds <= most


async def test_a_redirect_is_not_followed() -> None:
    async with serving() as elsewhere:
        target = elsewhere.url + "/chat/completions"
        for status in (301, 302, 307, 308):
            async with teaching(answering(status, Location=target)) as (_, teacher):
                with pytest.raises(TeacherUnavailable, match="a redirect, which is not followed"):
                    await teacher.word(CHAT)
        assert elsewhere.asked == []


async def test_a_call_past_its_deadline_is_dropped() -> None:
    async def hang(request: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return await good(request)

    async with teaching(hang, teacher_deadline_seconds=0.1) as (endpoint, teacher):
        with pytest.raises(TeacherUnavailable, match=r"no answer within 0\.1 s"):
            await teacher.word(CHAT)
        async with asyncio.timeout(5):
            while not endpoint.dropped:  # noqa: ASYNC110 - a server's doing sets no event
                await asyncio.sleep(0.005)


async def test_the_deadline_holds_for_an_answer_that_trickles() -> None:
    async def trickle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(1000):
            await response.write(b" ")
            await asyncio.sleep(0.01)
        return response

    async with teaching(trickle, teacher_deadline_seconds=0.2) as (_, teacher):
        began = asyncio.get_running_loop().time()
        with pytest.raises(TeacherUnavailable, match="no answer within"):
            await teacher.word(CHAT)
        assert asyncio.get_running_loop().time() - began < 2


async def test_waiting_for_a_place_ends_too_and_is_no_fault_of_the_server() -> None:
    release = asyncio.Event()

    async def wait(request: web.Request) -> web.Response:
        await release.wait()
        return await good(request)

    async with teaching(wait, teacher_concurrency=1, teacher_deadline_seconds=0.3) as (endpoint, teacher):
        first = asyncio.create_task(teacher.word(CHAT))
        await asyncio.sleep(0.2)
        second = asyncio.create_task(teacher.word(CHAT))
        third = asyncio.create_task(teacher.word(CHAT))
        with pytest.raises(TeacherUnavailable):
            await first
        release.set()
        assert (await second).text == SAID
        assert (await third).text == SAID

    async with teaching(wait, teacher_concurrency=1, teacher_deadline_seconds=0.3) as (endpoint, teacher):
        teacher._places = asyncio.Semaphore(0)
        with pytest.raises(TeacherFailed, match="no free place"):
            await teacher.word(CHAT)
        assert endpoint.asked == []


async def test_a_teacher_that_hangs_opens_the_circuit_though_other_calls_wait_for_a_place() -> None:
    async def hang(request: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    patient = WriterConfiguration(first_pause_seconds=60.0, longest_pause_seconds=60.0)
    async with teaching(hang, teacher_concurrency=2, teacher_deadline_seconds=0.2) as (endpoint, teacher):
        circuit = TeacherCircuit(teacher, patient, create_telemetry({}))
        ends = await asyncio.gather(*(circuit.word(CHAT, 0) for _ in range(6)), return_exceptions=True)
        assert sorted(type(end).__name__ for end in ends) == ["TeacherFailed"] * 4 + ["TeacherUnavailable"] * 2
        assert not circuit.closed
        with pytest.raises(TeacherUnavailable, match="away at the last try"):
            await circuit.word(CHAT, 0)
        assert len(endpoint.asked) == 2


async def test_an_endless_answer_is_cut_off() -> None:
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while sent < 100 * MAXIMUM_RESPONSE_BYTES:
            await response.write(b" " * 65_536)
            sent += 65_536
        return response

    async with teaching(endless) as (_, teacher):
        with pytest.raises(TeacherFailed, match=f"more than {MAXIMUM_RESPONSE_BYTES} bytes"):
            await teacher.word(CHAT)
    assert sent < 90 * MAXIMUM_RESPONSE_BYTES


async def test_a_packed_answer_is_not_unpacked() -> None:
    async with teaching(answering(200, b"\x1f\x8b\x08\x00", Content_Encoding="gzip")) as (endpoint, teacher):
        with pytest.raises(TeacherFailed, match="is no JSON"):
            await teacher.word(CHAT)
    assert endpoint.headers[0]["Accept-Encoding"] == "identity"


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    async with serving() as endpoint:
        url = endpoint.url
    teacher = teacher_of(settings_for(url))
    assert teacher is not None
    with pytest.raises(TeacherUnavailable, match="ClientConnectorError"):
        await teacher.word(CHAT)
    await teacher.close()


async def test_a_connection_that_breaks_off_is_unavailable() -> None:
    async def broken(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    async with teaching(broken) as (_, teacher):
        with pytest.raises(TeacherUnavailable):
            await teacher.word(CHAT)


async def test_a_closed_client_is_unavailable() -> None:
    async with teaching() as (endpoint, teacher):
        await teacher.close()
        with pytest.raises(TeacherUnavailable, match="closed"):
            await teacher.word(CHAT)
    assert endpoint.asked == []


async def test_a_cancelled_call_gives_its_place_back() -> None:
    async def hang(request: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    async with teaching(hang, teacher_concurrency=1) as (endpoint, teacher):
        call = asyncio.create_task(teacher.word(CHAT))
        async with asyncio.timeout(5):
            while not endpoint.asked:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        endpoint.handler = good
        assert (await teacher.word(CHAT)).text == SAID


async def test_neither_errors_nor_logs_nor_the_client_hold_the_key(caplog: pytest.LogCaptureFixture) -> None:
    echo = orjson.dumps({"error": {"message": KEY}, "choices": KEY})
    texts = []
    with caplog.at_level(logging.DEBUG):
        for handler in (
            *(
                answering(status, echo, X_Key=KEY, Location=f"http://{KEY}/")
                for status in (200, 302, 400, 401, 429, 500)
            ),
            answering(200, KEY.encode()),
        ):
            async with teaching(handler) as (_, teacher):
                with pytest.raises((TeacherFailed, TeacherUnavailable)) as caught:
                    await teacher.word(CHAT)
                error: BaseException | None = caught.value
                while error is not None:
                    texts += [str(error), repr(error)]
                    error = error.__cause__
                texts.append(repr(teacher))
    assert KEY not in caplog.text + "".join(texts)


# Settings


def test_there_is_no_teacher_unless_there_is_a_url() -> None:
    assert teacher_of(Settings()) is None
    assert teacher_of(Settings(teacher_model="m", teacher_share=0.5)) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"teacher_url": "ftp://host/v1"}, "PERSONAS_TEACHER_URL"),
        ({"teacher_url": "host/v1"}, "PERSONAS_TEACHER_URL"),
        ({"teacher_url": "http://"}, "PERSONAS_TEACHER_URL"),
        ({"teacher_url": "http://host:port/v1"}, "PERSONAS_TEACHER_URL"),
        ({"teacher_url": "http://[::1/v1"}, "PERSONAS_TEACHER_URL"),
        ({"teacher_url": f"https://user:{KEY}@host/v1"}, "PERSONAS_TEACHER_API_KEY"),
        ({"teacher_url": f"https://host/v1?key={KEY}"}, "PERSONAS_TEACHER_API_KEY"),
        ({"teacher_url": "triton://host/model"}, "port and model"),
        ({"teacher_url": "triton://host:8001"}, "port and model"),
        ({"teacher_model": ""}, "PERSONAS_TEACHER_MODEL"),
        ({"teacher_api_key": f"{KEY}\n"}, "PERSONAS_TEACHER_API_KEY"),
        ({"teacher_api_key": f"{KEY}\r\nX-Other: 1"}, "PERSONAS_TEACHER_API_KEY"),
        ({"teacher_api_key": "ké"}, "PERSONAS_TEACHER_API_KEY"),
        ({"teacher_share": 1.1}, "PERSONAS_TEACHER_SHARE"),
        ({"teacher_share": float("nan")}, "PERSONAS_TEACHER_SHARE"),
        ({"teacher_interests": -1}, "PERSONAS_TEACHER_INTERESTS"),
        ({"teacher_deadline_seconds": 0.0}, "PERSONAS_TEACHER_DEADLINE_SECONDS"),
        ({"teacher_concurrency": 0}, "PERSONAS_TEACHER_CONCURRENCY"),
    ],
)
async def test_settings_that_cannot_be_used_are_named_without_the_key(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named) as caught:
        teacher_of(settings_for("https://host/v1", **changes))
    assert KEY not in str(caught.value)


async def test_a_key_over_plain_http_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for url, warned in (("http://gateway:8080/v1", True), ("http://127.0.0.1:1/v1", False), ("https://host/v1", False)):
        caplog.clear()
        teacher = teacher_of(settings_for(url))
        assert teacher is not None
        await teacher.close()
        assert ("unencrypted" in caplog.text) is warned
        assert KEY not in caplog.text


def test_the_key_comes_from_the_environment_and_is_never_shown() -> None:
    settings = load_settings({"PERSONAS_TEACHER_API_KEY": KEY, "PERSONAS_TEACHER_SHARE": "0.05"})
    assert settings.teacher_api_key == KEY
    assert settings.teacher_share == 0.05
    assert KEY not in repr(settings)
    assert KEY not in str(settings.shown())


# A Triton model


async def test_a_triton_teacher_that_is_away_is_unavailable() -> None:
    async with serving() as endpoint:
        port = endpoint.url.split(":")[2].removesuffix("/v1")
    teacher = teacher_of(settings_for(f"triton://127.0.0.1:{port}/large", teacher_deadline_seconds=0.5))
    assert isinstance(teacher, TritonTeacher)
    assert teacher.teacher_id == f"large/{TEACHING_VERSION}"
    with pytest.raises(TeacherUnavailable, match="large"):
        await teacher.word(CHAT)
    await teacher.close()
    with pytest.raises(TeacherUnavailable, match="closed"):
        await teacher.word(CHAT)


async def test_a_triton_teacher_tells_a_call_past_its_deadline_from_one_that_got_no_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def hang(student: TritonStudent, prompt: Prompt, *, seed: int = 0) -> Answer:
        await asyncio.sleep(30)
        raise AssertionError

    monkeypatch.setattr(TritonStudent, "word", hang)
    teacher = teacher_of(
        settings_for("triton://127.0.0.1:1/large", teacher_deadline_seconds=0.5, teacher_concurrency=1)
    )
    assert teacher is not None
    began = asyncio.get_running_loop().time()
    placed, waiting = await asyncio.gather(teacher.word(CHAT), teacher.word(CHAT), return_exceptions=True)
    assert asyncio.get_running_loop().time() - began < 0.9, "the deadline is waited for once"
    assert isinstance(placed, TeacherUnavailable)
    assert "no answer within 0.5 s" in str(placed)
    assert isinstance(waiting, TeacherFailed)
    assert "no free place within 0.5 s" in str(waiting)
    assert not waiting.answered
    await teacher.close()
