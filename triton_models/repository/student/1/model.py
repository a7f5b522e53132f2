"""The student's front in Triton: admission, input checks, answers, cancellation and metrics around one engine.

`execute` only admits: it returns None at once, and each answer leaves later through the request's response sender. So
a single instance has many requests in flight, and the engine batches them.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from student_engine import (
    DEFAULT_MAXIMUM_TOKENS,
    GUIDE_TYPES,
    BadRequest,
    Engine,
    EngineClosed,
    Generated,
    Generation,
    Guide,
    ModelConfigError,
    ModelParameters,
    load_guides,
)

CANCEL_POLL_SECONDS = 0.1
MAXIMUM_INPUT_CHARACTERS = 65_536
"""Longer inputs are refused before they are tokenised."""


@dataclass(slots=True)
class _InFlight:
    """A request that was admitted."""

    sender: Any
    prompt: str
    echo: bool
    finish_reason: bool
    began: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    answered: bool = False

    def is_cancelled(self) -> bool:
        """Whether its caller went away. Asking about an answered request crashes the server, hence the lock."""
        with self.lock:
            return not self.answered and bool(self.sender.is_cancelled())

    def close(self) -> None:
        """Ask no more: the answer is about to be sent."""
        with self.lock:
            self.answered = True


class TritonPythonModel:
    """Called by Triton's Python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load weights, compile every guide, start the cancellation watch. A failure keeps the model from loading."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        self._logger = pb_utils.Logger
        try:
            self._parameters = ModelParameters.read(config)
            guides = load_guides(folder)
            self._guides = frozenset(guides)
            began = time.monotonic()
            self._engine = _engine(self._parameters, guides, folder)
        except ModelConfigError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self._logger.log_info(
            f"student: engine {self._parameters.engine} loaded, {len(guides)} guides compiled, "
            f"{time.monotonic() - began:.1f} s"
        )
        self._metrics = _Metrics(args["model_name"], args["model_version"])
        self._lock = threading.Lock()
        self._in_flight: dict[int, _InFlight] = {}
        self._next_key = 0
        self._stopping = threading.Event()
        self._watch = threading.Thread(target=self._watch_cancellations, name="student-cancellations", daemon=True)
        self._watch.start()

    def execute(self, requests: list[Any]) -> None:
        """Admit each request or answer its refusal; never waits for the engine."""
        for request in requests:
            self._admit(request)

    def finalize(self) -> None:
        """Stop the engine; Triton calls this after the requests in flight were answered or its exit timeout passed."""
        self._stopping.set()
        self._watch.join()
        self._engine.close()
        # Metrics must go before their families and before the interpreter does, or the process ends in a crash.
        self._metrics.close()

    def _admit(self, request: Any) -> None:  # noqa: ANN401
        sender = request.get_response_sender()
        try:
            generation, echo, finish_reason = self._read(request)
        except BadRequest as error:
            self._refuse(sender, str(error), pb_utils.TritonError.INVALID_ARG, "invalid")
            return
        entry = _InFlight(sender, generation.prompt, echo, finish_reason, time.monotonic())
        with self._lock:
            full = len(self._in_flight) >= self._parameters.maximum_in_flight
            if not full:
                key = self._next_key
                self._next_key += 1
                self._in_flight[key] = entry
                self._metrics.in_flight.set(len(self._in_flight))
        if full:
            message = f"{self._parameters.maximum_in_flight} requests are in flight already; try again later"
            self._refuse(sender, message, pb_utils.TritonError.UNAVAILABLE, "rejected")
            return
        try:
            self._engine.start(key, generation, lambda outcome: self._finish(key, outcome))
        except Exception as error:  # an admitted request must always be answered
            self._finish(key, error)

    def _read(self, request: Any) -> tuple[Generation, bool, bool]:  # noqa: ANN401
        """Generation, whether to echo the prompt, whether to return the finish reason. Raises BadRequest."""
        prompt = _text(request, "text_input")
        if not prompt:
            raise BadRequest("text_input is missing or empty")
        maximum_tokens = int(_scalar(request, "sampling_param_max_tokens", DEFAULT_MAXIMUM_TOKENS))
        if not 1 <= maximum_tokens <= self._parameters.maximum_output_tokens:
            most = self._parameters.maximum_output_tokens
            raise BadRequest(f"sampling_param_max_tokens is {maximum_tokens}, allowed are 1 to {most}")
        temperature = float(_scalar(request, "sampling_param_temperature", 0.0))
        if not 0.0 <= temperature <= 2.0:
            raise BadRequest(f"sampling_param_temperature is {temperature}, allowed are 0 to 2")
        generation = Generation(
            prompt=prompt,
            maximum_tokens=maximum_tokens,
            temperature=temperature,
            seed=int(_scalar(request, "sampling_param_seed", 0)),
            guide=self._guide(request),
        )
        echo = not bool(_scalar(request, "sampling_param_exclude_input_from_output", False))
        return generation, echo, bool(_scalar(request, "return_finish_reason", False))

    def _guide(self, request: Any) -> Guide | None:  # noqa: ANN401
        kind, text = _text(request, "guided_decoding_guide_type"), _text(request, "guided_decoding_guide")
        if not kind and not text:
            return None
        if kind not in GUIDE_TYPES:
            raise BadRequest(f"guided_decoding_guide_type must be one of {', '.join(GUIDE_TYPES)}")
        guide = Guide(kind, text)
        if guide not in self._guides:
            # Compiling it here would stall every request in flight for up to seconds.
            raise BadRequest("guided_decoding_guide is none of those compiled at load; add it to grammars.json")
        return guide

    def _finish(self, key: int, outcome: Generated | Exception) -> None:
        with self._lock:
            entry = self._in_flight.pop(key, None)
            self._metrics.in_flight.set(len(self._in_flight))
        if entry is None:
            return
        entry.close()
        if isinstance(outcome, BadRequest):
            self._refuse(entry.sender, str(outcome), pb_utils.TritonError.INVALID_ARG, "invalid")
        elif isinstance(outcome, EngineClosed):
            self._refuse(entry.sender, str(outcome), pb_utils.TritonError.UNAVAILABLE, "rejected")
        elif isinstance(outcome, Exception):
            self._logger.log_error(f"student: {outcome}")
            self._refuse(entry.sender, str(outcome), pb_utils.TritonError.INTERNAL, "failed")
        elif outcome.finish_reason == "cancelled":
            self._refuse(entry.sender, "the request was cancelled", pb_utils.TritonError.CANCELLED, "cancelled")
        else:
            self._metrics.answered(outcome, time.monotonic() - entry.began)
            _send(entry.sender, _response(entry, outcome))

    def _refuse(self, sender: Any, message: str, code: Any, outcome: str) -> None:  # noqa: ANN401
        self._metrics.requests[outcome].increment(1)
        _send(sender, pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code)))

    def _watch_cancellations(self) -> None:
        while not self._stopping.wait(CANCEL_POLL_SECONDS):
            with self._lock:
                entries = list(self._in_flight.items())
            for key, entry in entries:
                if entry.is_cancelled():
                    self._engine.cancel(key)


class _Metrics:
    """What Triton's /metrics shows of the student beside its own figures."""

    def __init__(self, model: str, version: str) -> None:
        labels = {"model": model, "version": version}
        self._families: list[Any] = []
        counter, gauge = pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.GAUGE
        self.in_flight = self._metric("student_in_flight", "Requests admitted and not yet answered", gauge, [labels])[0]
        outcomes = ("answered", "rejected", "invalid", "failed", "cancelled")
        requests = self._metric(
            "student_requests_total", "Requests by outcome", counter, [labels | {"outcome": o} for o in outcomes]
        )
        self.requests = dict(zip(outcomes, requests, strict=True))
        self._tokens_in, self._tokens_out = self._metric(
            "student_tokens_total",
            "Tokens of answered requests",
            counter,
            [labels | {"direction": "in"}, labels | {"direction": "out"}],
        )
        self._latency = self._metric(
            "student_latency_milliseconds_total",
            "Admission to answer, summed over answered requests",
            counter,
            [labels],
        )[0]

    def _metric(self, name: str, description: str, kind: Any, labels: list[dict[str, str]]) -> list[Any]:  # noqa: ANN401
        family = pb_utils.MetricFamily(name=name, description=description, kind=kind)
        self._families.append(family)  # a family must outlive its metrics
        return [family.Metric(labels=each) for each in labels]

    def close(self) -> None:
        """Give the metrics back, then their families."""
        del self.in_flight, self.requests, self._tokens_in, self._tokens_out, self._latency
        self._families.clear()

    def answered(self, answer: Generated, seconds: float) -> None:
        self.requests["answered"].increment(1)
        self._tokens_in.increment(answer.tokens_in)
        self._tokens_out.increment(answer.tokens_out)
        self._latency.increment(seconds * 1000.0)


def _engine(parameters: ModelParameters, guides: tuple[Guide, ...], folder: Path) -> Engine:
    # Imported here: each engine's runtime is there only in its own image.
    if parameters.engine == "openvino":
        from student_openvino import OpenVinoEngine

        return OpenVinoEngine(parameters, guides)
    if parameters.engine == "tensorrt_llm":
        from student_tensorrt_llm import TensorRtLlmEngine

        return TensorRtLlmEngine(parameters, guides, folder / "model.yaml")
    raise ModelConfigError(f"STUDENT_ENGINE={parameters.engine!r} must be openvino or tensorrt_llm")


def _response(entry: _InFlight, answer: Generated) -> Any:  # noqa: ANN401
    text = entry.prompt + answer.text if entry.echo else answer.text
    tensors = [
        _strings("text_output", text),
        pb_utils.Tensor("num_input_tokens", np.array([answer.tokens_in], dtype=np.int32)),
        pb_utils.Tensor("num_output_tokens", np.array([answer.tokens_out], dtype=np.int32)),
    ]
    if entry.finish_reason:
        tensors.append(_strings("finish_reason", answer.finish_reason))
    return pb_utils.InferenceResponse(output_tensors=tensors)


def _strings(name: str, text: str) -> Any:  # noqa: ANN401
    return pb_utils.Tensor(name, np.array([text.encode()], dtype=np.object_))


def _send(sender: Any, response: Any) -> None:  # noqa: ANN401
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _scalar(request: Any, name: str, default: Any) -> Any:  # noqa: ANN401
    """The single element of an optional input, or `default`. Raises BadRequest for another shape."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return default
    array = tensor.as_numpy()
    if array.size != 1:
        raise BadRequest(f"{name} must have exactly one element, got {array.size}")
    return array.item()


def _text(request: Any, name: str) -> str:  # noqa: ANN401
    raw = _scalar(request, name, b"")
    if len(raw) > MAXIMUM_INPUT_CHARACTERS:
        raise BadRequest(f"{name} has {len(raw)} bytes, allowed are {MAXIMUM_INPUT_CHARACTERS}")
    try:
        return bytes(raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"{name} is not UTF-8: {error.reason}") from error
