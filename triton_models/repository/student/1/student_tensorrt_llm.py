"""The GPU engine: TensorRT-LLM's LLM API with in-flight batching, with xgrammar guiding the output."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]
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
from tensorrt_llm import LLM, SamplingParams
from tensorrt_llm.llmapi import GuidedDecodingParams


class TensorRtLlmEngine:
    """One LLM and one event loop in a thread of its own; each request is a task on that loop."""

    def __init__(self, parameters: ModelParameters, guides: Iterable[Guide], settings: Path) -> None:
        self._llm = LLM(**_arguments(settings, parameters))
        self._maximum_input_tokens = parameters.maximum_input_tokens
        # Compiled now, so that no request in flight waits for a compilation.
        self._llm.generate(
            ["Hello"] * len(warm := [_sampling(Generation("", maximum_tokens=1, guide=guide)) for guide in guides]),
            warm,
            use_tqdm=False,
        )
        self._results: dict[int, Any] = {}
        self._cancelled: set[int] = set()
        self._lock = threading.Lock()
        self._closing = False
        self._tasks: set[asyncio.Future[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="student-loop", daemon=True)
        self._thread.start()

    def start(self, key: int, generation: Generation, finished: Finished) -> None:
        """See `Engine.start`. Tokenising happens here, so a prompt that is too long is refused at once."""
        input_ids = self._llm.tokenizer.encode(generation.prompt, add_special_tokens=False)
        if not 1 <= len(input_ids) <= self._maximum_input_tokens:
            raise BadRequest(f"text_input has {len(input_ids)} tokens, allowed are 1 to {self._maximum_input_tokens}")
        with self._lock:
            if self._closing:
                raise EngineClosed("the student is stopping")
            asyncio.run_coroutine_threadsafe(self._generate(key, input_ids, generation, finished), self._loop)

    def cancel(self, key: int) -> None:
        """See `Engine.cancel`."""
        self._loop.call_soon_threadsafe(self._abort, key)

    def close(self) -> None:
        """See `Engine.close`. Returns when every request was answered and the LLM is shut down."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._llm.shutdown()

    async def _generate(self, key: int, input_ids: list[int], generation: Generation, finished: Finished) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        self._tasks.add(task)
        try:
            result = self._llm.generate_async(input_ids, _sampling(generation))
            self._results[key] = result
            await result.aresult()
            finished(self._outcome(key, result, len(input_ids)))
        except Exception as error:  # whatever the runtime raises, the caller must be answered
            finished(EngineFailed(f"generation failed: {error}"))
        finally:
            self._results.pop(key, None)
            self._cancelled.discard(key)
            self._tasks.discard(task)

    def _outcome(self, key: int, result: Any, tokens_in: int) -> Generated | Exception:  # noqa: ANN401
        output = result.outputs[0]
        if key in self._cancelled:
            return (
                EngineClosed("the student is stopping") if self._closing else Generated("", "cancelled", tokens_in, 0)
            )
        if output.finish_reason not in ("stop", "length"):
            return EngineFailed(f"the engine gave the request up ({output.finish_reason})")
        return Generated(output.text, output.finish_reason, tokens_in, len(output.token_ids))

    def _abort(self, key: int) -> None:
        result = self._results.get(key)
        if result is not None:
            self._cancelled.add(key)
            result.abort()

    async def _drain(self) -> None:
        for key in list(self._results):
            self._abort(key)
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _arguments(settings: Path, parameters: ModelParameters) -> dict[str, Any]:
    """Keyword arguments of LLM from model.yaml. Raises ModelConfigError when the file is not a mapping."""
    arguments = yaml.safe_load(settings.read_text(encoding="utf-8"))
    if not isinstance(arguments, dict):
        raise ModelConfigError(f"{settings} must be a mapping of tensorrt_llm.LLM arguments")
    return arguments | {"model": parameters.weights} if parameters.weights else arguments


def _sampling(generation: Generation) -> Any:  # noqa: ANN401
    return SamplingParams(
        max_tokens=generation.maximum_tokens,
        # Greedy is top_k 1: a temperature of 0 is outside what SamplingParams documents.
        top_k=1 if generation.temperature == 0.0 else None,
        temperature=generation.temperature or None,
        seed=generation.seed,
        guided_decoding=_guided(generation.guide),
    )


def _guided(guide: Guide | None) -> Any:  # noqa: ANN401
    if guide is None:
        return None
    if guide.kind == "json":
        return GuidedDecodingParams(json=guide.text)
    if guide.kind == "regex":
        return GuidedDecodingParams(regex=guide.text)
    return GuidedDecodingParams(grammar=guide.text)
