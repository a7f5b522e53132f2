"""The student as the persona app sees it: send a prompt, get words back, or learn whether trying again makes sense."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import grpc  # type: ignore[import-untyped,unused-ignore]
import numpy as np
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from agents.settings import Settings
from streams.prompts import Prompt, all_grammars, plain_answer

RETRY_TEMPERATURE: Final = 0.6
"""Sampling temperature of any seed but 0; seed 0 is greedy."""
_CHANNEL_ARGUMENTS: Final = (
    # Setting any argument replaces all of the client's defaults, so the message sizes are stated too.
    ("grpc.max_send_message_length", 4 * 1024 * 1024),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)
# The request itself is refused; sending it again gives the same result. Every other status may pass.
_DETERMINISTIC: Final = frozenset(
    f"StatusCode.{code.name}"
    for code in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
    )
)
_READY_SECONDS: Final = 5.0


class StudentUnavailable(RuntimeError):  # noqa: N818
    """No answer for now: server away, full, restarting, or past the deadline. The same call may succeed later."""


class StudentFailed(RuntimeError):  # noqa: N818
    """The server refused this very request, or answered something that is no answer. Trying again is no use."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the student said. finish_reason: stop, or length if the token cap cut it; latency_ms: of the whole call."""

    text: str
    finish_reason: str
    tokens_in: int
    tokens_out: int
    latency_ms: int
    model_name: str
    model_version: str


class StudentClient(Protocol):
    """Words prompts. Many tasks may call at once; cancelling a call stops its work in the server too."""

    async def word(self, prompt: Prompt, *, seed: int = 0) -> Answer:
        """One answer; seed 0 is greedy, others sample. Raises StudentUnavailable or StudentFailed."""

    async def ready(self) -> bool:
        """Whether a call would be served now; never raises."""

    async def close(self) -> None:
        """Release the connection; calls after that raise StudentUnavailable."""


class TritonStudent:
    """A student behind Triton's gRPC address: one connection for its whole life, a bounded number of calls in flight.

    Must be made inside the running event loop. The deadline limits each call from the moment it is sent, not the wait
    for a free place.
    """

    def __init__(self, settings: Settings) -> None:
        asyncio.get_running_loop()  # gRPC binds to the loop; fail here rather than at the first call
        self._url = settings.triton_url
        self._model = settings.student_model
        self._deadline = settings.student_deadline_seconds
        self._places = asyncio.Semaphore(settings.student_concurrency)
        self._client: Any = triton.InferenceServerClient(self._url, channel_args=list(_CHANNEL_ARGUMENTS))
        self._closed = False

    async def word(self, prompt: Prompt, *, seed: int = 0) -> Answer:
        """See `StudentClient.word`."""
        async with self._places:
            if self._closed:
                raise StudentUnavailable("the student client is closed")
            began = time.monotonic()
            inputs, outputs = _inputs(prompt, seed), _outputs()
            try:
                result = await self._client.infer(self._model, inputs, outputs=outputs, client_timeout=self._deadline)
            except InferenceServerException as error:
                raise self._explained(error) from error
            return _answer(result, round((time.monotonic() - began) * 1000))

    async def ready(self) -> bool:
        """See `StudentClient.ready`."""
        if self._closed:
            return False
        try:
            return bool(await self._client.is_model_ready(self._model, client_timeout=_READY_SECONDS))
        except InferenceServerException:
            return False

    async def identity(self) -> str | None:
        """`name/version` of the student as its answers state them: the newest version that is ready.

        None while there is none; never raises.
        """
        if self._closed:
            return None
        try:
            metadata = await self._client.get_model_metadata(self._model, client_timeout=_READY_SECONDS)
        except InferenceServerException:
            return None
        versions = [version for version in metadata.versions if version.isdecimal()]
        return f"{metadata.name}/{max(versions, key=int)}" if versions else None

    async def close(self) -> None:
        """See `StudentClient.close`."""
        if not self._closed:
            self._closed = True
            await self._client.close()

    def _explained(self, error: InferenceServerException) -> StudentUnavailable | StudentFailed:
        message = f"student {self._model} at {self._url}: {error.message()} ({error.status()})"
        return StudentFailed(message) if error.status() in _DETERMINISTIC else StudentUnavailable(message)


class ScriptedStudent:
    """An in-memory student for tests: the same prompt gives the same answer, at once or after a delay.

    script: from a prompt and a seed to the text; it may raise StudentUnavailable or StudentFailed.
    """

    def __init__(
        self,
        script: Callable[[Prompt, int], str] | None = None,
        *,
        concurrency: int = 8,
        delay_seconds: float = 0.0,
        deadline_seconds: float = 60.0,
    ) -> None:
        self._script = script or (lambda prompt, seed: plain_answer(prompt))
        self._places = asyncio.Semaphore(concurrency)
        self._delay = delay_seconds
        self._deadline = deadline_seconds
        self._grammars = frozenset(all_grammars())
        self._in_flight = 0
        self._closed = False
        self.most_in_flight = 0
        self.prompts: list[Prompt] = []

    async def word(self, prompt: Prompt, *, seed: int = 0) -> Answer:
        """See `StudentClient.word`."""
        async with self._places:
            if self._closed:
                raise StudentUnavailable("the student client is closed")
            if prompt.grammar not in self._grammars:
                raise StudentFailed("the grammar is none of those compiled at load")
            self.prompts.append(prompt)
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            try:
                await asyncio.wait_for(asyncio.sleep(self._delay), self._deadline)
            except TimeoutError as error:
                raise StudentUnavailable(f"no answer within {self._deadline} s") from error
            finally:
                self._in_flight -= 1
            text = self._script(prompt, seed)
        return Answer(text, "stop", len(prompt.text.split()), len(text.split()), 0, "scripted", "1")

    async def ready(self) -> bool:
        """See `StudentClient.ready`."""
        return not self._closed

    async def close(self) -> None:
        """See `StudentClient.close`."""
        self._closed = True


def _inputs(prompt: Prompt, seed: int) -> list[Any]:
    values: dict[str, tuple[str, Any]] = {
        "text_input": ("BYTES", prompt.text.encode()),
        "sampling_param_max_tokens": ("INT32", np.int32(prompt.maximum_tokens)),
        "sampling_param_temperature": ("FP32", np.float32(RETRY_TEMPERATURE if seed else 0.0)),
        "sampling_param_seed": ("UINT64", np.uint64(seed)),
        "sampling_param_exclude_input_from_output": ("BOOL", np.bool_(True)),
        "return_finish_reason": ("BOOL", np.bool_(True)),
    }
    if prompt.grammar:
        values["guided_decoding_guide_type"] = ("BYTES", b"ebnf_grammar")
        values["guided_decoding_guide"] = ("BYTES", prompt.grammar.encode())
    inputs = []
    for name, (kind, value) in values.items():
        tensor = triton.InferInput(name, [1], kind)
        tensor.set_data_from_numpy(np.array([value], dtype=np.object_ if kind == "BYTES" else None))
        inputs.append(tensor)
    return inputs


def _outputs() -> list[Any]:
    names = ("text_output", "finish_reason", "num_input_tokens", "num_output_tokens")
    return [triton.InferRequestedOutput(name) for name in names]


def _answer(result: Any, latency_ms: int) -> Answer:  # noqa: ANN401
    response = result.get_response()
    try:
        return Answer(
            text=_element(result, "text_output").decode("utf-8"),
            finish_reason=_element(result, "finish_reason").decode("utf-8"),
            tokens_in=int(_element(result, "num_input_tokens")),
            tokens_out=int(_element(result, "num_output_tokens")),
            latency_ms=latency_ms,
            model_name=str(response.model_name),
            model_version=str(response.model_version),
        )
    except (AttributeError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise StudentFailed(f"model {response.model_name} gave no usable answer: {error}") from error


def _element(result: Any, name: str) -> Any:  # noqa: ANN401
    array = result.as_numpy(name)
    if array is None or array.size != 1:
        raise ValueError(f"output {name} is missing or has not exactly one element")
    return array.item()
