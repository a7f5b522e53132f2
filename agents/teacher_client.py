"""The teacher as the persona app sees it: send a chat, get words back, or learn whether others would fare better.

Two kinds behind one Protocol, told apart by `PERSONAS_TEACHER_URL`: any OpenAI-compatible endpoint (`http(s)://.../v1`)
and a model of a Triton server (`triton://host:port/model`) with the student's tensors.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, Protocol
from urllib.parse import SplitResult, urlsplit

import aiohttp
import orjson

from agents.settings import Settings, SettingsError
from agents.student_client import RETRY_TEMPERATURE, Answer, StudentFailed, StudentUnavailable, TritonStudent
from streams.decoding import printable
from streams.prompts import Prompt
from streams.teaching import TEACHING_VERSION, Chat, TeacherPolicy, chat_text

MAXIMUM_RESPONSE_BYTES: Final = 256 * 1024
"""A longer answer is not read to its end: that of one sentence takes a hundredth of it."""
LONGEST_RETRY_AFTER_SECONDS: Final = 600.0
"""A server that asks for a longer pause is asked again after this one."""
MAXIMUM_TOKENS: Final = 10**7
"""A call that says it took more is not believed: no context is as long, and sums must stay readable."""
_DETAIL_CHARACTERS: Final = 200
# Of this very call; every other status that is no success would meet any other call too.
_OF_THE_CALL: Final = frozenset({400, 413, 422})

logger = logging.getLogger(__name__)


class TeacherUnavailable(RuntimeError):  # noqa: N818
    """No answer, and none for other calls: away, full, refusing our key, or past the deadline.

    retry_after_seconds: pause that the server asked for, 0 if it asked for none.
    """

    def __init__(self, message: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class TeacherFailed(RuntimeError):  # noqa: N818
    """No answer to this very call, which says nothing of others: refused, unusable, or no free place in time.

    answered: the server did answer, so it is there.
    """

    def __init__(self, message: str, *, answered: bool = True) -> None:
        super().__init__(message)
        self.answered = answered


class TeacherClient(Protocol):
    """Words chats. Many tasks may call at once; cancelling a call drops its connection."""

    @property
    def teacher_id(self) -> str:
        """Model and version of its chats: part of the content keys of its texts."""

    async def word(self, chat: Chat, *, seed: int = 0) -> Answer:
        """One answer; seed 0 is greedy, others sample. Raises TeacherUnavailable or TeacherFailed."""

    async def close(self) -> None:
        """Release the connections; calls after that raise TeacherUnavailable."""


def teacher_of(settings: Settings) -> TeacherClient | None:
    """The configured teacher; None if there is none. Make it inside the running loop. Raises SettingsError."""
    url = settings.teacher_url
    if not url:
        return None
    _check(settings)
    parts = _split(url)
    if parts.scheme == "triton":
        return TritonTeacher(settings, parts.netloc, parts.path.strip("/"))
    return ChatTeacher(settings)


def policy_of(settings: Settings) -> TeacherPolicy:
    """The policy that the settings state; see `teacher_of` for what checks it."""
    return TeacherPolicy(settings.teacher_share, settings.teacher_interests)


class ChatTeacher:
    """A teacher behind the chat completions of an OpenAI-compatible endpoint. No redirect is followed.

    Its deadline covers the wait for a free place too: a teacher that is slow must not become a queue.
    """

    def __init__(self, settings: Settings) -> None:
        self._url = settings.teacher_url.rstrip("/") + "/chat/completions"
        self._model = settings.teacher_model
        self._key = settings.teacher_api_key
        self._deadline = settings.teacher_deadline_seconds
        self._places = asyncio.Semaphore(settings.teacher_concurrency)
        # Unpacking is off, and asked against: a small body cannot become a large one.
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),  # the deadline is ours
        )

    @property
    def teacher_id(self) -> str:
        """See `TeacherClient.teacher_id`."""
        return f"{self._model}/{TEACHING_VERSION}"

    async def word(self, chat: Chat, *, seed: int = 0) -> Answer:
        """See `TeacherClient.word`. The endpoint is told a temperature and no seed: not all of them take one."""
        async with _place(self._places, self._deadline, self._message):
            began = time.monotonic()
            reply = await self._post(chat, seed)
            return self._answer(reply, round((time.monotonic() - began) * 1000))

    async def close(self) -> None:
        """See `TeacherClient.close`."""
        await self._session.close()

    async def _post(self, chat: Chat, seed: int) -> bytes:
        body = {
            "model": self._model,
            "messages": [{"role": "system", "content": chat.system}, {"role": "user", "content": chat.user}],
            "max_tokens": chat.maximum_tokens,
            "temperature": RETRY_TEMPERATURE if seed else 0.0,
        }
        if self._session.closed:
            raise TeacherUnavailable(self._message("the client is closed"))
        try:
            async with self._session.post(self._url, data=orjson.dumps(body), allow_redirects=False) as response:
                received = await _read(response)
                if response.status == 200:
                    if received is None:
                        raise TeacherFailed(self._message(f"its answer has more than {MAXIMUM_RESPONSE_BYTES} bytes"))
                    return received
                raise self._refusal(response, received or b"")
        except (aiohttp.ClientError, OSError) as error:
            # Only what kind of error it is, and why it could not connect: other texts may quote what was sent.
            reason = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
            raise TeacherUnavailable(self._message(f"{type(error).__name__}{reason}")) from None

    def _refusal(self, response: aiohttp.ClientResponse, body: bytes) -> TeacherUnavailable | TeacherFailed:
        status = response.status
        if status in _OF_THE_CALL:
            return TeacherFailed(self._message(f"status {status}{self._detail(body)}"))
        if 300 <= status < 400:
            return TeacherUnavailable(self._message(f"status {status}: a redirect, which is not followed"))
        if status in (401, 403):
            hint = "it refuses PERSONAS_TEACHER_API_KEY" if self._key else "it wants a key: PERSONAS_TEACHER_API_KEY"
            return TeacherUnavailable(self._message(f"status {status}: {hint}"))
        if status == 404:
            hint = "no such path or model; the URL ends before /chat/completions"
            return TeacherUnavailable(self._message(f"status 404: {hint}"))
        return TeacherUnavailable(
            self._message(f"status {status}"), _retry_after_seconds(response.headers.get("Retry-After", ""))
        )

    def _detail(self, body: bytes) -> str:
        """What the server says was wrong with the call: short, printable and without the key, should it quote it."""
        try:
            text = orjson.loads(body)["error"]["message"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return ""
        if not isinstance(text, str):
            return ""
        text = text.replace(self._key, "***") if self._key else text
        return f": {printable(text[:_DETAIL_CHARACTERS])}"

    def _answer(self, body: bytes, latency_ms: int) -> Answer:
        try:
            reply = orjson.loads(body)
            choice, usage = reply["choices"][0], reply["usage"]
            return Answer(
                # Null where the model spoke of nothing but its thoughts: the gate refuses that.
                text=_text(choice["message"]["content"]),
                finish_reason=str(choice.get("finish_reason") or ""),
                tokens_in=_tokens(usage["prompt_tokens"]),
                tokens_out=_tokens(usage["completion_tokens"]),
                latency_ms=latency_ms,
                model_name=self._model,
                model_version="",
            )
        except (orjson.JSONDecodeError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            what = "is no JSON" if isinstance(error, orjson.JSONDecodeError) else f"lacks or misstates {error}"
            raise TeacherFailed(self._message(f"its answer {printable(what[:_DETAIL_CHARACTERS])}")) from None

    def _message(self, what: str) -> str:
        return f"teacher {self._model} at {self._url}: {what}"


class TritonTeacher:
    """A teacher in a Triton server: the student's tensors without a grammar, the chat as one text in ChatML.

    Its deadline covers the wait for a free place too, as that of `ChatTeacher`.
    """

    def __init__(self, settings: Settings, address: str, model: str) -> None:
        self._model = model
        self._address = address
        self._deadline = settings.teacher_deadline_seconds
        self._places = asyncio.Semaphore(settings.teacher_concurrency)
        self._client = TritonStudent(
            replace(
                settings,
                triton_url=address,
                student_model=model,
                student_concurrency=settings.teacher_concurrency,
                student_deadline_seconds=self._deadline,
            )
        )

    @property
    def teacher_id(self) -> str:
        """See `TeacherClient.teacher_id`."""
        return f"{self._model}/{TEACHING_VERSION}"

    async def word(self, chat: Chat, *, seed: int = 0) -> Answer:
        """See `TeacherClient.word`."""
        prompt = Prompt(chat_text(chat), "", chat.maximum_tokens, chat.prompt_hash)
        async with _place(self._places, self._deadline, self._message):
            try:
                return await self._client.word(prompt, seed=seed)
            except StudentUnavailable as error:
                raise TeacherUnavailable(f"teacher: {error}") from error
            except StudentFailed as error:
                raise TeacherFailed(f"teacher: {error}") from error

    async def close(self) -> None:
        """See `TeacherClient.close`."""
        await self._client.close()

    def _message(self, what: str) -> str:
        return f"teacher {self._model} at {self._address}: {what}"


@asynccontextmanager
async def _place(
    places: asyncio.Semaphore, deadline_seconds: float, message: Callable[[str], str]
) -> AsyncIterator[None]:
    """A place for one call, all within the deadline.

    Past it raises TeacherFailed where there was no place, which is no fault of the server, else TeacherUnavailable.
    """
    asked = False
    try:
        async with asyncio.timeout(deadline_seconds), places:
            asked = True
            yield
    except TimeoutError as error:
        if asked:
            raise TeacherUnavailable(message(f"no answer within {deadline_seconds:g} s")) from error
        raise TeacherFailed(message(f"no free place within {deadline_seconds:g} s"), answered=False) from error


def _check(settings: Settings) -> None:
    parts = _split(settings.teacher_url)
    if parts.scheme not in ("http", "https", "triton") or not parts.hostname:
        raise SettingsError("PERSONAS_TEACHER_URL must be http(s)://host[:port]/v1 or triton://host:port/model")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise SettingsError("PERSONAS_TEACHER_URL holds a user, query or fragment; a key is PERSONAS_TEACHER_API_KEY")
    if parts.scheme == "triton" and (parts.port is None or not parts.path.strip("/")):
        raise SettingsError("PERSONAS_TEACHER_URL must name port and model: triton://host:port/model")
    if parts.scheme != "triton" and not settings.teacher_model:
        raise SettingsError("PERSONAS_TEACHER_MODEL must name the model that PERSONAS_TEACHER_URL serves")
    if not all("!" <= character <= "~" for character in settings.teacher_api_key):
        raise SettingsError("PERSONAS_TEACHER_API_KEY holds a character that no header can carry: a space, a line end?")
    if not 0.0 <= settings.teacher_share <= 1.0:
        raise SettingsError(f"PERSONAS_TEACHER_SHARE={settings.teacher_share} is not between 0 and 1")
    for name in ("teacher_deadline_seconds", "teacher_concurrency"):
        if not getattr(settings, name) > 0:
            raise SettingsError(f"PERSONAS_{name.upper()}={getattr(settings, name)} is not above 0")
    if settings.teacher_interests < 0:
        raise SettingsError(f"PERSONAS_TEACHER_INTERESTS={settings.teacher_interests} is below 0")
    if parts.scheme == "http" and settings.teacher_api_key and not _is_local(parts.hostname):
        logger.warning("the teacher's key goes to %s unencrypted: use https", parts.hostname)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for a port that is no number
    except ValueError as error:
        raise SettingsError("PERSONAS_TEACHER_URL is no URL: its host or port cannot be read") from error
    return parts


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _read(response: aiohttp.ClientResponse) -> bytes | None:
    """The body; None if it is longer than what is read of one."""
    received = bytearray()
    async for chunk in response.content.iter_chunked(16_384):
        received += chunk
        if len(received) > MAXIMUM_RESPONSE_BYTES:
            return None
    return bytes(received)


def _retry_after_seconds(value: str) -> float:
    """A Retry-After header as seconds from now, 0 if it is none (RFC 9110: seconds or a date)."""
    try:
        if value.isascii() and value.isdecimal():
            seconds = float(value)
        else:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return min(max(0.0, seconds), LONGEST_RETRY_AFTER_SECONDS)


def _text(content: Any) -> str:  # noqa: ANN401 - untrusted JSON
    if content is None:
        return ""
    if not isinstance(content, str):
        raise TypeError("content")
    return content


def _tokens(count: Any) -> int:  # noqa: ANN401 - untrusted JSON
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAXIMUM_TOKENS:
        raise ValueError("usage")
    return count
