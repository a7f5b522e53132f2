"""The student in a real Triton: batching, admission, refusals, cancellation and metrics."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as triton_client
from tritonclient.utils import InferenceServerException

from agents.evaluation.stack import started_triton
from agents.localstack import LocalStackError
from agents.persona_writer import PersonaWriter
from agents.stores.memory import MemoryStore
from agents.student_client import TritonStudent
from agents.telemetry import Telemetry
from agents.writer_configuration import WriterConfiguration
from streams import topics
from streams.decoding import decode_persona
from streams.prompts import build_prompt
from streams.records import encode
from streams.tasks import split_task
from streams.watch import InputRecord, Output
from streams.wording import WordingRejected, parse_wording
from tests.conftest import Stack
from tests.request_samples import NOON, sample_context, sample_request
from tests.wording_samples import sample_task

pytestmark = pytest.mark.stack

KINDS = {
    "text_input": "BYTES",
    "sampling_param_max_tokens": "INT32",
    "sampling_param_temperature": "FP32",
    "sampling_param_seed": "UINT64",
    "sampling_param_exclude_input_from_output": "BOOL",
    "return_finish_reason": "BOOL",
    "guided_decoding_guide_type": "BYTES",
    "guided_decoding_guide": "BYTES",
}
TYPES = {"BYTES": np.object_, "INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64, "BOOL": np.bool_}


@pytest.fixture
async def client(triton: Stack) -> AsyncIterator[Any]:
    made = triton_client.InferenceServerClient(triton.triton_grpc)
    yield made
    await made.close()


async def infer(client: Any, seconds: float = 120.0, /, **values: object) -> Any:
    inputs = []
    for name, value in values.items():
        tensor = triton_client.InferInput(name, [1], KINDS[name])
        tensor.set_data_from_numpy(np.array([value], dtype=TYPES[KINDS[name]]))
        inputs.append(tensor)
    return await client.infer("student", inputs, client_timeout=seconds)


def metrics(stack: Stack) -> dict[str, float]:
    url = f"http://127.0.0.1:{stack.local.ports.triton_metrics}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^(student_\w+)\{(.*?)\} (\S+)$", text, re.MULTILINE):
        part = re.search(r'(?:outcome|direction)="(\w+)"', labels)
        found[name + (f":{part[1]}" if part else "")] = float(value)
    return found


async def until(condition: Any, seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - the state is another process's
            await asyncio.sleep(0.1)


async def test_the_prompt_is_echoed_unless_told_otherwise_and_32_tokens_are_the_default(client: Any) -> None:
    echoed = await infer(client, text_input="Once upon a time", return_finish_reason=True)
    assert echoed.as_numpy("text_output")[0].decode().startswith("Once upon a time")
    assert echoed.as_numpy("num_output_tokens")[0] <= 32
    assert echoed.as_numpy("finish_reason")[0] in (b"length", b"stop")
    alone = await infer(client, text_input="Once upon a time", sampling_param_exclude_input_from_output=True)
    assert not alone.as_numpy("text_output")[0].decode().startswith("Once upon a time")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_input": ""}, "text_input"),
        ({"text_input": "word " * 5000}, "tokens"),
        ({"text_input": "x" * 70_000}, "bytes"),
        ({"text_input": b"\xff\xfe"}, "UTF-8"),
        ({"text_input": "hi", "sampling_param_max_tokens": 0}, "max_tokens"),
        ({"text_input": "hi", "sampling_param_max_tokens": 100_000}, "max_tokens"),
        ({"text_input": "hi", "sampling_param_temperature": -1.0}, "temperature"),
        ({"text_input": "hi", "sampling_param_temperature": float("nan")}, "temperature"),
        ({"text_input": "hi", "guided_decoding_guide_type": "xml", "guided_decoding_guide": "x"}, "guide_type"),
        ({"text_input": "hi", "guided_decoding_guide_type": "json", "guided_decoding_guide": "{}"}, "grammars.json"),
    ],
)
async def test_a_bad_request_is_refused_by_name(client: Any, values: dict[str, object], message: str) -> None:
    with pytest.raises(InferenceServerException, match=re.escape(message)) as caught:
        await infer(client, **values)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


async def test_more_than_it_admits_is_refused_at_once(triton: Stack, client: Any) -> None:
    before = metrics(triton)["student_requests_total:rejected"]
    long: dict[str, object] = {"text_input": "Once upon a time there was", "sampling_param_max_tokens": 120}
    calls = [asyncio.create_task(infer(client, **long)) for _ in range(30)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    refused = [r for r in results if isinstance(r, InferenceServerException)]
    assert len(refused) >= 8
    assert {r.status() for r in refused} == {"StatusCode.UNAVAILABLE"}
    assert len(results) - len(refused) >= 16
    assert metrics(triton)["student_requests_total:rejected"] - before == len(refused)
    await until(lambda: metrics(triton)["student_in_flight"] == 0)


async def test_cancelled_calls_free_their_places(triton: Stack, client: Any) -> None:
    before = metrics(triton)["student_requests_total:cancelled"]
    long: dict[str, object] = {
        "text_input": "Tell a very long story about the sea. It began",
        "sampling_param_max_tokens": 512,
    }
    calls = [asyncio.create_task(infer(client, **long)) for _ in range(16)]
    await until(lambda: metrics(triton)["student_in_flight"] == 16)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await until(lambda: metrics(triton)["student_in_flight"] == 0)
    assert metrics(triton)["student_requests_total:cancelled"] - before >= 12
    again = await infer(client, text_input="The sky is", sampling_param_max_tokens=4)
    assert again.as_numpy("num_output_tokens")[0] == 4


async def test_a_call_past_its_deadline_frees_its_place(triton: Stack, client: Any) -> None:
    with pytest.raises(InferenceServerException, match="Deadline"):
        await infer(client, 1.0, text_input="Tell a very long story. It began", sampling_param_max_tokens=512)
    await until(lambda: metrics(triton)["student_in_flight"] == 0, 5.0)


async def test_a_writer_waits_for_a_student_that_is_full_and_loses_nothing(triton: Stack) -> None:
    """Several times as many texts at once as the student admits, each of a label of its own: nothing is shared."""
    student = TritonStudent(replace(triton.settings, student_concurrency=64))
    published: list[Output] = []

    async def publish(outputs: Sequence[Output]) -> None:
        published.extend(outputs)

    quick = WriterConfiguration(first_pause_seconds=0.05, longest_pause_seconds=0.2)
    writer = PersonaWriter(MemoryStore(), student, publish, quick, lambda: NOON, Telemetry(None, None), lambda *_: None)
    before = metrics(triton)["student_requests_total:rejected"]
    users = [f"viewer-{number}" for number in range(12)]
    try:
        for offset, user in enumerate(users):
            await writer.submit(InputRecord(offset, user.encode(), encode(crowded(user, offset)), NOON), 0)
        await writer.idle()
    finally:
        await writer.stop(0.0)
        await student.close()
    personas = [
        decode_persona(output.value) for output in published if output.topic == topics.PERSONAS and output.value
    ]
    assert sorted(persona.user_id for persona in personas) == sorted(users)
    assert sum(persona.tier == "student" for persona in personas) >= len(users) - 1, "the gate may refuse a text"
    assert metrics(triton)["student_requests_total:rejected"] > before


def crowded(user_id: str, number: int) -> Any:
    context = sample_context()
    towns = ("alpine", "coastal", "northern", "southern", "eastern", "western", "island", "desert", "forest", "river")
    named = f"{towns[number % 10]} {'walking' if number < 10 else 'sailing'}"
    interests = (replace(context.interests[0], label=named, titles=(f"A first day of {named}",)), context.interests[1])
    return replace(sample_request(user_id), context=replace(context, interests=interests), expires_after_ms=10**9)


@pytest.mark.parametrize(("weights", "why"), [("nowhere.gguf", "no weights at"), ("broken.gguf", "broken.gguf")])
def test_a_model_that_cannot_be_loaded_says_why(triton: Stack, tmp_path: Path, weights: str, why: str) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, but not really")
    path = str(tmp_path / weights)
    with (
        pytest.raises(LocalStackError, match=re.escape(why)),
        started_triton(triton.settings, {"STUDENT_WEIGHTS": path}),
    ):
        pass


async def test_it_words_varied_tasks_well_enough(triton: Stack) -> None:
    """At least 90% of the texts pass within two tries, and every call is counted."""
    before = metrics(triton)
    student = TritonStudent(triton.settings)
    pieces = [piece for first in range(10) for piece in split_task(sample_task(2, 1, first))]
    calls = tokens_out = 0

    async def worded(piece: Any) -> bool:
        nonlocal calls, tokens_out
        for seed in (0, 1):
            answer = await student.word(build_prompt(piece), seed=seed)
            calls, tokens_out = calls + 1, tokens_out + answer.tokens_out
            try:
                parse_wording(answer.text, piece)
            except WordingRejected:
                continue
            return True
        return False

    try:
        passed = await asyncio.gather(*map(worded, pieces))
    finally:
        await student.close()
    assert sum(passed) >= 0.9 * len(pieces)
    after = metrics(triton)
    assert after["student_requests_total:answered"] - before["student_requests_total:answered"] == calls
    assert after["student_tokens_total:out"] - before["student_tokens_total:out"] == tokens_out
    assert after["student_latency_milliseconds_total"] > before["student_latency_milliseconds_total"]
