"""The student's weights: base plus adapter against plain matrix arithmetic, row orders, checksums, errors, folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader
from safetensors import safe_open
from tokenizers import Tokenizer

from tests.student_samples import (
    FEED_FORWARD,
    HEADS,
    HIDDEN,
    KEY_VALUE_HEADS,
    LAYERS,
    RANK,
    SHAPES,
    TEMPLATE,
    TOKENS,
    adapter_matrices,
    lora_name,
    write_adapter,
    write_base,
)
from triton_models.distillation.adapter import WeightsError, file_sha256, read_description
from triton_models.distillation.base import (
    hugging_face_config,
    hugging_face_tokenizer,
    hugging_face_weights,
    open_gguf,
    to_gguf_rows,
    to_hugging_face_rows,
)
from triton_models.distillation.hugging_face import bfloat16, write_hugging_face
from triton_models.distillation.merge import LowRank, merge, product, read_adapter, seal

ALPHA = 6.0
ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_base(tmp_path / "base.gguf")
    return tmp_path / "base.gguf"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def matrices_of(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    return dict(hugging_face_weights(path))


# Arithmetic


def test_each_layer_is_the_base_plus_the_scaled_product(base: Path, adapter: Path, tmp_path: Path) -> None:
    student = tmp_path / "student.gguf"
    seal(base, student, ALPHA, adapter)
    before, after, lora = matrices_of(base), matrices_of(student), adapter_matrices()
    assert before.keys() == after.keys()
    for layer in range(LAYERS):
        for projection in SHAPES:
            name = f"model.layers.{layer}.{projection}.weight"
            a, b = (lora[lora_name(layer, projection, side)].astype(np.float64) for side in "AB")
            expected = before[name] + ALPHA / RANK * (b @ a)
            # Q8_0: at most half a step of a block's largest value / 127, and the scale's own rounding.
            blocks = np.abs(expected).reshape(-1, 32).max(axis=1, keepdims=True)
            error = np.abs(after[name] - expected).reshape(-1, 32)
            assert (error <= blocks * (0.5 / 127 + 2**-10)).all()
            assert np.abs(after[name] - before[name]).max() > 0.1, "the adapter changes hardly anything in this test"


def test_norms_and_embeddings_are_the_bases_own(base: Path, adapter: Path, tmp_path: Path) -> None:
    student = tmp_path / "student.gguf"
    seal(base, student, ALPHA, adapter)
    before, after = matrices_of(base), matrices_of(student)
    for name in before:
        if "proj" not in name:
            np.testing.assert_array_equal(before[name], after[name])


def test_a_layer_without_an_adapter_stays_what_it_is(base: Path, tmp_path: Path) -> None:
    only = {lora_name(1, "mlp.up_proj", side): adapter_matrices()[lora_name(1, "mlp.up_proj", side)] for side in "AB"}
    write_adapter(tmp_path / "adapter", only)
    seal(base, tmp_path / "student.gguf", ALPHA, tmp_path / "adapter")
    before, after = matrices_of(base), matrices_of(tmp_path / "student.gguf")
    changed = {name for name in before if np.abs(before[name] - after[name]).max() > 0.01}
    assert changed == {"model.layers.1.mlp.up_proj.weight"}


def test_the_student_says_what_the_base_says_but_for_its_types(base: Path, adapter: Path, tmp_path: Path) -> None:
    student = tmp_path / "student.gguf"
    seal(base, student, ALPHA, adapter)
    before, after = GGUFReader(base), GGUFReader(student)
    contents = {
        name: (before.fields[name].contents(), field.contents())
        for name, field in after.fields.items()
        if not name.startswith("GGUF.")
    }
    assert {name for name, (was, becomes) in contents.items() if was != becomes} == {"general.file_type"}
    assert contents["general.file_type"][1] == 7
    assert {name for name in before.fields if not name.startswith("GGUF.")} == contents.keys()
    assert [t.name for t in after.tensors] == [t.name for t in before.tensors]
    kinds = {tensor.tensor_type.name for tensor in after.tensors if len(tensor.shape) == 2}
    assert (kinds, {t.tensor_type.name for t in after.tensors if len(t.shape) == 1}) == ({"Q8_0"}, {"F32"})


# Row orders


def rotated_neighbours(vector: npt.NDArray[np.float64], angle: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A rotary embedding of one head as GGUF's rows have it: (0, 1), (2, 3), ..."""
    first, second = vector[0::2], vector[1::2]
    turned = np.empty_like(vector)
    turned[0::2] = first * np.cos(angle) - second * np.sin(angle)
    turned[1::2] = first * np.sin(angle) + second * np.cos(angle)
    return turned


def rotated_halves(vector: npt.NDArray[np.float64], angle: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The same as Hugging Face's rows have it: (0, n/2), (1, n/2 + 1), ..."""
    first, second = np.split(vector, 2)
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), first * np.sin(angle) + second * np.cos(angle)]
    )


def test_both_row_orders_give_the_same_attention() -> None:
    random, size, heads = np.random.default_rng(3), 16, 3
    query, key = random.normal(size=(2, heads * size, 20))
    angle = 100_000.0 ** (-np.arange(0, size, 2) / size)
    x, y = random.normal(size=(2, 20))

    def scores(query: npt.NDArray[Any], key: npt.NDArray[Any], rotate: Any) -> list[float]:
        q, k = (query @ x).reshape(heads, size), (key @ y).reshape(heads, size)
        return [float(rotate(q[h], 5 * angle) @ rotate(k[h], 2 * angle)) for h in range(heads)]

    expected = scores(query, key, rotated_halves)
    ours = scores(to_gguf_rows(query, heads), to_gguf_rows(key, heads), rotated_neighbours)
    np.testing.assert_allclose(ours, expected)
    assert not np.allclose(scores(query, key, rotated_neighbours), expected), "any order would pass this test"


def test_the_row_orders_are_inverse_to_each_other() -> None:
    matrix = np.arange(24 * 2).reshape(24, 2)
    np.testing.assert_array_equal(to_hugging_face_rows(to_gguf_rows(matrix, 3), 3), matrix)
    assert to_gguf_rows(matrix, 3)[:4, 0].tolist() == [0, 8, 2, 10]


def test_query_and_key_rows_are_read_in_hugging_faces_order_and_values_as_they_are(base: Path) -> None:
    tensors = {t.name: t for t in open_gguf(base).tensors}
    read = matrices_of(base)
    from gguf.quants import dequantize

    for theirs, ours, heads in (("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KEY_VALUE_HEADS)):
        tensor = tensors[f"blk.0.{ours}.weight"]
        stored = dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(to_gguf_rows(read[f"model.layers.0.self_attn.{theirs}.weight"], heads), stored)
    tensor = tensors["blk.0.attn_v.weight"]
    stored = dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_array_equal(read["model.layers.0.self_attn.v_proj.weight"], stored)


# The same bytes everywhere


def test_the_product_is_summed_rank_by_rank_to_the_last_bit() -> None:
    random = np.random.default_rng(4)
    change = LowRank(
        random.normal(size=(7, 40)).astype(np.float16), (random.normal(size=(30, 7)) * 1e3).astype(np.float16)
    )
    expected = np.zeros((30, 40))
    for i in range(30):
        for j in range(40):
            for rank in range(7):
                expected[i, j] += float(change.b[i, rank]) * float(change.a[rank, j])
    assert product(change).tobytes() == expected.tobytes()


def test_the_students_bytes_do_not_depend_on_the_processor(base: Path, adapter: Path, tmp_path: Path) -> None:
    sealed = seal(base, tmp_path / "student.gguf", ALPHA, adapter)
    command = [sys.executable, "-m", "triton_models.distillation.merge", str(base), str(tmp_path / "again.gguf")]
    for settings in (
        {"OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Haswell"},
        {"OPENBLAS_NUM_THREADS": "2", "OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 F16C"},
    ):
        run = subprocess.run(
            [*command, "--adapter", str(adapter), "--json"],
            env={**os.environ, **settings},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout)["sha256"] == sealed.student_sha256 == file_sha256(tmp_path / "again.gguf")


# Checks


def test_without_an_adapter_the_student_is_the_base(base: Path, tmp_path: Path) -> None:
    sha256 = merge(base, tmp_path / "student.gguf", tmp_path / "none")
    assert (tmp_path / "student.gguf").read_bytes() == base.read_bytes()
    assert sha256 == file_sha256(base)


def test_the_description_holds_what_was_merged(base: Path, adapter: Path, tmp_path: Path) -> None:
    sealed = seal(base, tmp_path / "student.gguf", ALPHA, adapter)
    assert read_description(adapter) == sealed
    assert (sealed.rank, sealed.alpha, sealed.base_sha256) == (RANK, ALPHA, file_sha256(base))
    assert sealed.adapter_sha256 == file_sha256(adapter / "adapter.safetensors")
    (tmp_path / "student.gguf").unlink()
    seen: list[tuple[int, int]] = []
    merged = merge(base, tmp_path / "student.gguf", adapter, lambda done, total: seen.append((done, total)))
    assert merged == sealed.student_sha256
    tensors = len(GGUFReader(base).tensors)
    assert seen == [(done, tensors) for done in range(tensors + 1)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("base_sha256", r"base\.gguf has the SHA-256 .* the base that the adapter was trained on"),
        ("adapter_sha256", r"adapter\.safetensors has the SHA-256 .* the adapter that adapter\.json describes"),
        ("student_sha256", r"student\.gguf has the SHA-256 .* the student that adapter\.json names"),
    ],
)
def test_a_wrong_checksum_leaves_the_student_as_it_was(
    base: Path, adapter: Path, tmp_path: Path, entry: str, message: str
) -> None:
    student = tmp_path / "out" / "student.gguf"
    seal(base, student, ALPHA, adapter)
    student.write_bytes(b"the one before")
    description = json.loads((adapter / "adapter.json").read_text())
    (adapter / "adapter.json").write_text(json.dumps(description | {entry: "0" * 64}))
    with pytest.raises(WeightsError, match=message):
        merge(base, student, adapter)
    assert student.read_bytes() == b"the one before"
    assert [path.name for path in student.parent.iterdir()] == ["student.gguf"], "an unfinished file is left"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("not JSON", "does not describe an adapter"),
        ([], "no JSON object"),
        ({"rank": None}, "rank is None"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": True}, "rank is True"),
        ({"alpha": -1}, "alpha is -1"),
        ({"alpha": "6"}, "alpha is '6'"),
        ({"base_sha256": "abc"}, "base_sha256 is 'abc'"),
        ({"colour": "red"}, "its entries are"),
    ],
)
def test_a_broken_description_says_what_is_wrong(
    base: Path, adapter: Path, tmp_path: Path, entries: Any, message: str
) -> None:
    seal(base, tmp_path / "student.gguf", ALPHA, adapter)
    path = adapter / "adapter.json"
    if isinstance(entries, dict):
        entries = json.loads(path.read_text()) | entries
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    with pytest.raises(WeightsError, match=message):
        read_description(adapter)


def test_weights_without_a_description_are_not_ignored(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no adapter\.json: write it with .*--seal"):
        merge(base, tmp_path / "student.gguf", adapter)


Q_A, Q_B = lora_name(0, "self_attn.q_proj", "A"), lora_name(0, "self_attn.q_proj", "B")
HALF = np.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model.model.lm_head.lora_A.weight": np.zeros((RANK, HIDDEN), HALF)}, "an entry 'base_model.model.lm_"),
        ({lora_name(9, "mlp.up_proj", "A"): np.zeros((RANK, HIDDEN), HALF)}, r"an entry '.*layers\.9\."),
        ({lora_name(0, "mlp.side_proj", "A"): np.zeros((RANK, HIDDEN), HALF)}, r"an entry '.*side_proj"),
        ({Q_A.replace("weight", "default.weight"): np.zeros((RANK, HIDDEN), HALF)}, r"an entry '.*default"),
        (
            {Q_A: np.zeros((RANK, HIDDEN + 1), HALF)},
            rf"lora_A of shape \(3, 65\) for blk.0.attn_q.weight.*\(3, {HIDDEN}\)",
        ),
        ({Q_A: np.zeros((HIDDEN, RANK), HALF)}, "lora_A of shape"),
        ({Q_B: np.zeros((HIDDEN, RANK + 1), HALF)}, r"lora_B of shape \(64, 4\).*rank 3"),
        ({Q_B: None}, r"no lora_B for blk\.0\.attn_q\.weight"),
        ({Q_A: np.zeros((RANK, HIDDEN), np.float32)}, "as float32 .*not a float16 matrix"),
        ({Q_A: np.zeros(HIDDEN, HALF)}, "not a float16 matrix"),
        ({Q_B: np.full((HIDDEN, RANK), np.nan, HALF)}, "no finite numbers"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    base: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    matrices = {name: matrix for name, matrix in (adapter_matrices() | change).items() if matrix is not None}
    write_adapter(tmp_path / "adapter", matrices)
    with pytest.raises(WeightsError, match=message):
        read_adapter(tmp_path / "adapter" / "adapter.safetensors", base, RANK)


def test_the_rank_must_be_the_described_one(base: Path, adapter: Path) -> None:
    with pytest.raises(WeightsError, match=r"at rank 5 needs \(5, 64\)|at rank 5 needs \(5, 96\)"):
        read_adapter(adapter / "adapter.safetensors", base, 5)


def test_what_is_no_adapter_or_no_base_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nonsense" * 9)
    with pytest.raises(WeightsError, match="cannot read the adapter"):
        read_adapter(tmp_path / "x", base)
    with pytest.raises(WeightsError, match="not a readable GGUF file"):
        read_adapter(adapter / "adapter.safetensors", tmp_path / "x")
    write_adapter(tmp_path / "empty", {})
    with pytest.raises(WeightsError, match="is empty"):
        read_adapter(tmp_path / "empty" / "adapter.safetensors", base)


# The command


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "triton_models.distillation.merge", *arguments]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_seals_merges_and_writes_the_folder(base: Path, adapter: Path, tmp_path: Path) -> None:
    student, folder = tmp_path / "student.gguf", tmp_path / "hf"
    run = command(str(base), str(student), "--adapter", str(adapter), "--seal", "6", "--hf", str(folder))
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{file_sha256(student)}  {student}\n"
    assert "tensors" in run.stderr
    assert json.loads((adapter / "adapter.json").read_text())["student_sha256"] == file_sha256(student)
    assert (folder / "config.json").is_file()


def test_the_command_says_when_there_is_no_adapter(base: Path, tmp_path: Path) -> None:
    run = command(str(base), str(tmp_path / "student.gguf"), "--adapter", str(tmp_path / "none"))
    assert run.returncode == 0
    assert run.stdout.endswith("(the base: there is no adapter)\n")


def test_an_error_of_the_command_is_one_line(base: Path, adapter: Path, tmp_path: Path) -> None:
    run = command(str(base), str(tmp_path / "student.gguf"), "--adapter", str(adapter))
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("error: ")
    assert "Traceback" not in run.stderr
    missing = command(str(tmp_path / "none.gguf"), str(tmp_path / "student.gguf"), "--adapter", str(tmp_path / "none"))
    assert (missing.returncode, "Traceback" in missing.stderr) == (1, False)
    assert "none.gguf" in missing.stderr
    assert command(str(base), "x", "--seal", "-1").returncode == 2


# Hugging Face


def test_the_configuration_comes_from_the_files_metadata(base: Path) -> None:
    config = hugging_face_config(base)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [config[name] for name in sizes] == [HIDDEN, FEED_FORWARD, LAYERS, HEADS, KEY_VALUE_HEADS]
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 100_000.0)
    assert (config["vocab_size"], config["tie_word_embeddings"], config["eos_token_id"]) == (len(TOKENS), True, 2)


def test_the_folder_holds_the_same_weights_as_bfloat16(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    write_hugging_face(base, folder)
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == names
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.iterdir()), "a container has another user"
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    with safe_open(folder / "model.safetensors", "np") as opened:
        assert set(opened.keys()) == matrices_of(base).keys()
    for name, array in matrices_of(base).items():
        entry = header[name]
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        assert (entry["dtype"], tuple(entry["shape"])) == ("BF16", array.shape)
        widened = (np.frombuffer(content[start:end], np.uint16).astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_allclose(widened.reshape(array.shape), array, rtol=2**-8)


def test_bfloat16_rounds_to_the_nearest_even() -> None:
    one, step = 0x3F80, 2.0**-7
    values = np.array([1.0, 1 + step / 2, 1 + step * 1.5, 1 + step * 0.51, -(1 + step * 0.49), 0.0], np.float32)
    assert bfloat16(values).tolist() == [one, one, one + 2, one + 1, one | 0x8000, 0]


def test_the_tokenizer_splits_as_the_vocabulary_says(base: Path) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(hugging_face_tokenizer(base)))
    encoded = tokenizer.encode("<|im_start|>hello 42<|im_end|>")
    assert encoded.tokens == ["<|im_start|>", "hello", "Ġ", "4", "2", "<|im_end|>"]
    assert encoded.ids[0] == 1
    assert tokenizer.decode(encoded.ids) == "hello 42"
