"""The CPU engine: OpenVINO GenAI's continuous batching over a GGUF file, with xgrammar guiding the output."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino_genai
from student_engine import (
    BadRequest,
    EngineClosed,
    EngineFailed,
    Finished,
    Generated,
    Generation,
    Guide,
    ModelConfigError,
    ModelParameters,
)
from student_gguf import readable_weights


@dataclass(slots=True)
class _Running:
    """A request inside the pipeline."""

    handle: Any
    tokens_in: int
    finished: Finished
    cancelled: bool = False


class OpenVinoEngine:
    """One pipeline, stepped by one thread of its own; the pipeline is touched by no other thread.

    Other threads only append to queues under a lock. A failed step fails what was in flight and the engine goes on.
    """

    def __init__(self, parameters: ModelParameters, guides: Iterable[Guide]) -> None:
        self._pipeline = _pipeline(parameters)
        self._tokenizer = self._pipeline.get_tokenizer()
        self._end = int(self._tokenizer.get_eos_token_id())
        self._maximum_input_tokens = parameters.maximum_input_tokens
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, Any, int, Generation, Finished]] = []
        self._cancelled: set[int] = set()
        self._closing = False
        self._running: dict[int, _Running] = {}
        self._warm(guides)
        self._thread = threading.Thread(target=self._run, name="student-steps", daemon=True)
        self._thread.start()

    def start(self, key: int, generation: Generation, finished: Finished) -> None:
        """See `Engine.start`. Tokenising happens here, so a prompt that is too long is refused at once."""
        input_ids = self._tokenizer.encode(generation.prompt, add_special_tokens=False).input_ids
        tokens_in = int(input_ids.shape[1])
        if not 1 <= tokens_in <= self._maximum_input_tokens:
            raise BadRequest(f"text_input has {tokens_in} tokens, allowed are 1 to {self._maximum_input_tokens}")
        with self._changed:
            if self._closing:
                raise EngineClosed("the student is stopping")
            self._waiting.append((key, input_ids, tokens_in, generation, finished))
            self._changed.notify()

    def cancel(self, key: int) -> None:
        """See `Engine.cancel`."""
        with self._changed:
            self._cancelled.add(key)
            self._changed.notify()

    def close(self) -> None:
        """See `Engine.close`. Returns when the stepping thread has ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _warm(self, guides: Iterable[Guide]) -> None:
        """Compile every guide now: compilation happens inside a step, where it would stall all requests in flight."""
        input_ids = self._tokenizer.encode("Hello", add_special_tokens=False).input_ids
        for key, guide in enumerate(guides):
            self._pipeline.add_request(key, input_ids, self._settings(Generation("", maximum_tokens=1, guide=guide)))
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()

    def _settings(self, generation: Generation) -> Any:  # noqa: ANN401
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens = generation.maximum_tokens
        settings.eos_token_id = self._end
        settings.apply_chat_template = False
        settings.do_sample = generation.temperature > 0.0
        if settings.do_sample:
            settings.temperature = generation.temperature
            settings.rng_seed = generation.seed
        if generation.guide is not None:
            settings.structured_output_config = _structured(generation.guide)
        return settings

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._cancelled or self._running or self._closing):
                    self._changed.wait()
                waiting, self._waiting = self._waiting, []
                cancelled, self._cancelled = self._cancelled, set()
                closing = self._closing
            if closing:
                self._fail(waiting, EngineClosed("the student is stopping"))
                return
            try:
                self._step(waiting, cancelled)
            except Exception as error:  # whatever the runtime raises, callers must be answered
                self._fail(waiting, EngineFailed(f"the engine's step failed: {error}"))

    def _step(self, waiting: list[tuple[int, Any, int, Generation, Finished]], cancelled: set[int]) -> None:
        for key, input_ids, tokens_in, generation, finished in waiting:
            handle = self._pipeline.add_request(key, input_ids, self._settings(generation))
            self._running[key] = _Running(handle, tokens_in, finished)
        for key in cancelled & self._running.keys():
            self._running[key].cancelled = True
            self._running[key].handle.cancel()
        if self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        for key, running in list(self._running.items()):
            answer = self._answer(running)
            if answer is not None:
                del self._running[key]
                running.finished(answer)

    def _answer(self, running: _Running) -> Generated | Exception | None:
        """The finished answer, or None while it is being generated."""
        if running.cancelled:
            return Generated("", "cancelled", running.tokens_in, 0)
        status = running.handle.get_status()
        if status == openvino_genai.GenerationStatus.RUNNING:
            return None
        if status != openvino_genai.GenerationStatus.FINISHED:
            return EngineFailed(f"the engine gave the request up ({status.name}); its cache may be too small")
        output = running.handle.read_all()[0]
        tokens = list(output.generated_ids)
        stopped = output.finish_reason == openvino_genai.GenerationFinishReason.STOP
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return Generated(text, "stop" if stopped else "length", running.tokens_in, len(tokens))

    def _fail(self, waiting: list[tuple[int, Any, int, Generation, Finished]], error: Exception) -> None:
        """Answer everything with `error` and leave the pipeline empty."""
        known = set(self._running)
        for running in self._running.values():
            running.handle.cancel()
            running.finished(error)
        for key, _, _, _, finished in waiting:
            if key not in known:
                finished(error)
        self._running.clear()


def _pipeline(parameters: ModelParameters) -> Any:  # noqa: ANN401
    weights = Path(parameters.weights)
    if not parameters.weights or not weights.exists():
        raise ModelConfigError(
            f"no weights at {parameters.weights!r}: set STUDENT_WEIGHTS to a GGUF file (or an OpenVINO model folder)"
        )
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = parameters.cache_gigabytes
    scheduler.max_num_seqs = parameters.maximum_in_flight
    scheduler.enable_prefix_caching = True
    scheduler.dynamic_split_fuse = True
    readable = readable_weights(weights, unpacked=_multiplies_16_bits())
    return openvino_genai.ContinuousBatchingPipeline(str(readable), scheduler, "CPU")


def _multiplies_16_bits() -> bool:
    """Whether there are matrix units for 16 bits; with a single CPU OpenVINO 2026.4 crashes on unpacked weights."""
    cpu = Path("/proc/cpuinfo")
    return len(os.sched_getaffinity(0)) > 1 and cpu.is_file() and "amx_bf16" in cpu.read_text(encoding="utf-8")


def _structured(guide: Guide) -> Any:  # noqa: ANN401
    config = openvino_genai.StructuredOutputConfig()
    if guide.kind == "json":
        config.json_schema = guide.text
    elif guide.kind == "regex":
        config.regex = guide.text
    else:
        config.grammar = guide.text
    return config
