"""The student's model folder: signature, parameters, grammars, weights; what of the GPU engine can be checked here."""

from __future__ import annotations

import ast
import json
import os
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped,unused-ignore]
from google.protobuf import text_format  # type: ignore[import-untyped,unused-ignore]
from tritonclient.grpc import model_config_pb2

from streams.prompts import all_grammars, grammar_for

MODEL = Path(__file__).parents[2] / "triton_models" / "repository" / "student"
sys.path.append(str(MODEL / "1"))

from student_engine import Guide, ModelConfigError, ModelParameters, load_guides  # noqa: E402
from student_gguf import q4_1, q8_0, readable_weights  # noqa: E402


def configuration() -> Any:
    return text_format.Parse((MODEL / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_the_signature_is_the_published_one() -> None:
    config = configuration()
    types = model_config_pb2.DataType.Name
    inputs = {i.name: (types(i.data_type), list(i.dims), i.optional) for i in config.input}
    assert inputs == {
        "text_input": ("TYPE_STRING", [1], False),
        "sampling_param_max_tokens": ("TYPE_INT32", [1], True),
        "sampling_param_temperature": ("TYPE_FP32", [1], True),
        "sampling_param_seed": ("TYPE_UINT64", [1], True),
        "sampling_param_exclude_input_from_output": ("TYPE_BOOL", [1], True),
        "return_finish_reason": ("TYPE_BOOL", [1], True),
        "guided_decoding_guide_type": ("TYPE_STRING", [1], True),
        "guided_decoding_guide": ("TYPE_STRING", [1], True),
    }
    assert {o.name: types(o.data_type) for o in config.output} == {
        "text_output": "TYPE_STRING",
        "finish_reason": "TYPE_STRING",
        "num_input_tokens": "TYPE_INT32",
        "num_output_tokens": "TYPE_INT32",
    }
    assert config.name == MODEL.name
    assert config.backend == "python"
    assert config.max_batch_size == 0
    assert not config.model_transaction_policy.decoupled
    assert [group.count for group in config.instance_group] == [1]


def test_every_grammar_that_a_prompt_can_carry_is_compiled_at_load() -> None:
    # A change of the grammars needs the file written anew: see triton_models/README.md.
    committed = json.loads((MODEL / "1" / "grammars.json").read_text())
    assert committed == all_grammars()
    assert {grammar_for(key) for key in "s1a"} == set(committed)
    assert load_guides(MODEL / "1") == tuple(Guide("ebnf_grammar", grammar) for grammar in committed)


@pytest.mark.parametrize("text", ["", "{}", "[]", '[""]', "[1]", "not json"])
def test_a_broken_grammar_file_says_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "grammars.json").write_text(text)
    with pytest.raises(ModelConfigError, match=r"grammars\.json"):
        load_guides(tmp_path)


def model_config() -> dict[str, Any]:
    return {"parameters": {k: {"string_value": v.string_value} for k, v in configuration().parameters.items()}}


def test_parameters_come_from_the_file_and_the_environment_wins() -> None:
    parameters = ModelParameters.read(model_config(), {})
    assert (parameters.engine, parameters.weights, parameters.maximum_in_flight) == ("openvino", "", 16)
    changed = ModelParameters.read(model_config(), {"STUDENT_ENGINE": "tensorrt_llm", "STUDENT_MAXIMUM_IN_FLIGHT": "3"})
    assert (changed.engine, changed.maximum_in_flight) == ("tensorrt_llm", 3)
    # An unset variable that a compose file passes on arrives as an empty text.
    assert ModelParameters.read(model_config(), {"STUDENT_MAXIMUM_IN_FLIGHT": ""}).maximum_in_flight == 16


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_wrong_parameter_is_named(value: str) -> None:
    with pytest.raises(ModelConfigError, match="STUDENT_MAXIMUM_IN_FLIGHT"):
        ModelParameters.read(model_config(), {"STUDENT_MAXIMUM_IN_FLIGHT": value})
    with pytest.raises(ModelConfigError, match="engine is missing"):
        ModelParameters.read({}, {})


def gguf(kind: int, raw: bytes, values: int) -> bytes:
    """A GGUF file with one metadata value and two tensors of `values` values."""
    key = b"general.architecture"
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 1)
    head += struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, 5) + b"llama"
    for name, offset in ((b"a", 0), (b"b", len(raw) + -len(raw) % 32)):
        head += struct.pack("<Q", 1) + name + struct.pack("<IQIQ", 1, values, kind, offset)
    head += bytes(-len(head) % 32)
    return head + (raw + bytes(-len(raw) % 32)) * 2


def test_q4_1_tensors_are_rewritten_almost_without_loss(tmp_path: Path) -> None:
    codes = np.arange(16, dtype=np.uint8)
    block = np.float16(0.11).tobytes() + np.float16(-0.73).tobytes() + (codes | (codes[::-1] << 4)).tobytes()
    expected = np.concatenate([codes, codes[::-1]]).astype(np.float32) * np.float32(np.float16(0.11)) + np.float32(
        np.float16(-0.73)
    )
    np.testing.assert_allclose(q4_1(np.frombuffer(block * 2, np.uint8)), np.stack([expected] * 2), atol=1e-6)

    source = tmp_path / "tiny.gguf"
    source.write_bytes(gguf(3, block * 2, 64))
    copy = readable_weights(source)
    assert copy == tmp_path / "tiny.q8_0.gguf"
    assert readable_weights(copy) == copy
    eight = q8_0(np.stack([expected] * 2)).tobytes()
    assert copy.read_bytes() == gguf(8, eight, 64)
    raw = np.frombuffer(eight, np.uint8).reshape(-1, 34)
    back = raw[:, 2:].copy().view(np.int8).astype(np.float32) * raw[:, :2].copy().view(np.float16).astype(np.float32)
    assert np.abs(back - expected).max() < 0.006


@pytest.mark.parametrize("kind", [3, 8])
def test_tensors_are_unpacked_to_half_precision(tmp_path: Path, kind: int) -> None:
    if kind == 3:
        raw = np.float16(0.11).tobytes() + np.float16(-0.73).tobytes() + bytes(range(16))
        values = q4_1(np.frombuffer(raw, np.uint8))
    else:
        raw = np.float16(0.03).tobytes() + np.arange(-16, 16, dtype=np.int8).tobytes()
        values = np.arange(-16, 16, dtype=np.float32)[None] * np.float32(np.float16(0.03))
    source = tmp_path / "tiny.gguf"
    source.write_bytes(gguf(kind, raw, 32))
    copy = readable_weights(source, unpacked=True)
    assert copy == tmp_path / "tiny.f16.gguf"
    assert copy.read_bytes() == gguf(1, values.astype(np.float16).tobytes(), 32)
    assert readable_weights(source, unpacked=True) == readable_weights(copy, unpacked=True) == copy


def test_a_copy_is_made_once_and_again_when_the_weights_change(tmp_path: Path) -> None:
    source = tmp_path / "tiny.gguf"
    source.write_bytes(gguf(3, bytes(20), 32))
    copy = readable_weights(source)
    made = copy.stat().st_mtime_ns
    assert readable_weights(source).stat().st_mtime_ns == made
    os.utime(source, ns=(made + 10**9, made + 10**9))
    readable_weights(source)
    assert copy.stat().st_mtime_ns != made


def test_a_file_that_may_not_be_written_to_is_copied_to_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a read-only image. Root may write to any file, so the answer is given here."""
    source = tmp_path / "image" / "tiny.gguf"
    source.parent.mkdir()
    source.write_bytes(gguf(8, bytes(68), 64))
    assert readable_weights(source) == source
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, _: source.parent not in (path, *path.parents))
    copy = readable_weights(source)
    assert copy.is_relative_to(tmp_path / f"student-{os.getuid()}")
    assert copy.read_bytes() == source.read_bytes()
    assert readable_weights(source) == copy


@pytest.mark.parametrize("content", [b"", b"GGUF", b"nonsense" * 10, b"GGUF" + struct.pack("<IQQ", 9, 1, 1)])
def test_what_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelConfigError, match="not a readable GGUF"):
        readable_weights(tmp_path / "x.gguf")


def test_model_yaml_holds_known_keys_only() -> None:
    known: dict[str, Any] = {
        "model": str,
        "max_batch_size": int,
        "max_num_tokens": int,
        "max_seq_len": int,
        "enable_chunked_prefill": bool,
        "guided_decoding_backend": str,
        "kv_cache_config": {"enable_block_reuse": bool, "free_gpu_memory_fraction": float, "dtype": str},
        "scheduler_config": {"capacity_scheduler_policy": str},
        "cuda_graph_config": {},
        "batch_wait_timeout_ms": int,
    }
    settings = yaml.safe_load((MODEL / "1" / "model.yaml").read_text())
    assert settings["guided_decoding_backend"] == "xgrammar"
    parameters = ModelParameters.read(model_config(), {})
    assert settings["max_seq_len"] >= parameters.maximum_input_tokens + parameters.maximum_output_tokens
    for key, value in settings.items():
        kind = known[key]
        if isinstance(kind, dict):
            assert all(isinstance(value[k], kind[k]) for k in value)
        else:
            assert isinstance(value, kind)


def methods(path: Path, name: str) -> dict[str, list[str]]:
    (found,) = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name]
    return {f.name: [a.arg for a in f.args.args] for f in found.body if isinstance(f, ast.FunctionDef)}


@pytest.mark.parametrize(
    ("file", "name"), [("student_openvino.py", "OpenVinoEngine"), ("student_tensorrt_llm.py", "TensorRtLlmEngine")]
)
def test_both_engines_have_the_methods_that_the_front_calls(file: str, name: str) -> None:
    wanted = methods(MODEL / "1" / "student_engine.py", "Engine")
    assert {key: value for key, value in methods(MODEL / "1" / file, name).items() if key in wanted} == wanted


def test_the_gpu_engine_uses_only_names_that_the_llm_api_has() -> None:
    """TensorRT-LLM is not installed here; what is called on it is listed, so that a new call is looked up first."""
    tree = ast.parse((MODEL / "1" / "student_tensorrt_llm.py").read_text())
    imported = {
        (n.module, a.name)
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("tensorrt_llm")
        for a in n.names
    }
    assert imported == {
        ("tensorrt_llm", "LLM"),
        ("tensorrt_llm", "SamplingParams"),
        ("tensorrt_llm.llmapi", "GuidedDecodingParams"),
    }
    used = {
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Attribute) and n.value.attr == "_llm"
    }
    assert used == {"generate", "generate_async", "tokenizer", "shutdown"}
    keywords = {
        call.func.id: {k.arg for k in call.keywords}
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "SamplingParams"
    }
    assert keywords == {"SamplingParams": {"max_tokens", "top_k", "temperature", "seed", "guided_decoding"}}


def test_the_repository_holds_models_only() -> None:
    folders = [path.name for path in MODEL.parent.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert folders == ["student"]
    assert not (MODEL.parent / "__init__.py").exists()
