"""Merges the adapter into the base model and writes the student: `python -m triton_models.distillation.merge --help`.

Each layer's weights become W + (alpha / rank) B·A, in float64, and are stored as Q8_0 (blocks of 32 bytes and a
half-precision scale), which the CPU engine reads exactly. B·A is added up one rank after the other by elementwise
operations alone: a matrix product of numpy adds in an order that depends on the processor, and the student's checksum
is committed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, ReaderTensor
from gguf.quants import quant_shape_to_byte_shape, quantize
from safetensors import SafetensorError
from safetensors.numpy import load_file

from triton_models.distillation.adapter import (
    ADAPTER_FOLDER,
    DESCRIPTION_FILE,
    WEIGHTS_FILE,
    Description,
    WeightsError,
    file_sha256,
    read_description,
    write_description,
)
from triton_models.distillation.base import PROJECTIONS, architecture, gguf_names, open_gguf, to_gguf_rows, values
from triton_models.distillation.hugging_face import write_hugging_face

Progress = Callable[[int, int], None]
"""Takes how many tensors are done, and of how many."""

_NAME: Final = re.compile(r"base_model\.model\.(?P<layer>model\.layers\.\d+\.\w+\.\w+)\.lora_(?P<side>[AB])\.weight")
_FILE_TYPE: Final = "general.file_type"
_STORED_BLOCK: Final = 32


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to one layer, but for its scale: B·A, rows in Hugging Face's order."""

    a: npt.NDArray[np.float16]
    """(rank, columns)"""
    b: npt.NDArray[np.float16]
    """(rows, rank)"""


def no_progress(done: int, total: int) -> None:
    """Shows nothing."""


def merge(base: Path, student: Path, folder: Path = ADAPTER_FOLDER, progress: Progress = no_progress) -> str:
    """Write the student's GGUF file, atomically, and return its SHA-256: the base with the folder's adapter merged in.

    Without an adapter it is a copy of the base. Raises WeightsError when a file is not the one that `adapter.json`
    names, or the adapter does not fit the base; no student is written then.
    """
    description = read_description(folder)
    if description is None:
        with _placed(student) as work:
            shutil.copyfile(base, work)
        return file_sha256(student)
    _compare(base, description.base_sha256, "the base that the adapter was trained on")
    _compare(folder / WEIGHTS_FILE, description.adapter_sha256, f"the adapter that {DESCRIPTION_FILE} describes")
    changes = read_adapter(folder / WEIGHTS_FILE, base, description.rank)
    with _placed(student) as work:
        _write(base, changes, description.alpha / description.rank, work, progress)
        _compare(work, description.student_sha256, f"the student that {DESCRIPTION_FILE} names")
    return description.student_sha256


def seal(base: Path, student: Path, alpha: float, folder: Path, progress: Progress = no_progress) -> Description:
    """Write `adapter.json` for the `adapter.safetensors` of a folder, and the student. Raises WeightsError."""
    adapter = folder / WEIGHTS_FILE
    changes = read_adapter(adapter, base)
    rank = next(iter(changes.values())).a.shape[0]
    with _placed(student) as work:
        _write(base, changes, alpha / rank, work, progress)
    description = Description(rank, alpha, file_sha256(base), file_sha256(adapter), file_sha256(student))
    write_description(folder, description)
    return description


def read_adapter(path: Path, base: Path, rank: int | None = None) -> dict[str, LowRank]:
    """What an adapter adds, by GGUF's name of the tensor, checked against the base's shapes.

    Names are PEFT's (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`), numbers half precision, and
    every layer is of one rank (`rank`, if given). Raises WeightsError for anything else.
    """
    try:
        matrices = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot read the adapter {path}: {error}") from error
    if not matrices:
        raise WeightsError(f"the adapter {path} is empty")
    reader = open_gguf(base)
    shapes = {tensor.name: tuple(int(size) for size in tensor.shape[::-1]) for tensor in reader.tensors}
    names = gguf_names(architecture(reader).layers)
    layers: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for name, matrix in matrices.items():
        layers.setdefault(_layer(path, name, names), {})[name.split(".lora_")[1][0]] = _half(path, name, matrix)
    first = next(iter(matrices.values()))
    expected = min(first.shape) if rank is None else rank
    return {layer: _low_rank(path, layer, pair, shapes[layer], expected) for layer, pair in sorted(layers.items())}


def product(change: LowRank) -> npt.NDArray[np.float64]:
    """B·A as (rows, columns), the same bytes on every processor: summed in float64 in the order of the ranks."""
    a, b = change.a.astype(np.float64), change.b.astype(np.float64)
    total = np.zeros((b.shape[0], a.shape[1]))
    term = np.empty_like(total)
    for column, row in zip(b.T, a, strict=True):
        np.multiply(column[:, None], row[None, :], out=term)
        total += term
    return total


def _layer(path: Path, name: str, names: Mapping[str, str]) -> str:
    """GGUF's name of the tensor that an entry of the adapter changes."""
    match = _NAME.fullmatch(name)
    known = match is not None and any(match["layer"].endswith(f".{projection}") for projection in PROJECTIONS)
    if match is None or not known or f"{match['layer']}.weight" not in names:
        raise WeightsError(
            f"the adapter {path} has an entry {name!r}: known are base_model.model.model.layers.N.(self_attn.q_proj, "
            "...k_proj, v_proj, o_proj, mlp.gate_proj, up_proj, down_proj).lora_A.weight and lora_B.weight of the "
            "base's layers"
        )
    return names[f"{match['layer']}.weight"]


def _half(path: Path, name: str, matrix: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    if matrix.dtype != np.float16 or matrix.ndim != 2:
        raise WeightsError(f"the adapter {path} has {name!r} as {matrix.dtype} {matrix.shape}, not a float16 matrix")
    if not np.isfinite(matrix).all():
        raise WeightsError(f"the adapter {path} has {name!r} with values that are no finite numbers")
    return matrix


def _low_rank(
    path: Path, layer: str, pair: Mapping[str, npt.NDArray[Any]], shape: tuple[int, ...], rank: int
) -> LowRank:
    for side in "AB":
        if side not in pair:
            raise WeightsError(f"the adapter {path} has no lora_{side} for {layer}, only the other half")
    rows, columns = shape
    for side, wanted in (("A", (rank, columns)), ("B", (rows, rank))):
        if pair[side].shape != wanted:
            raise WeightsError(
                f"the adapter {path} has lora_{side} of shape {pair[side].shape} for {layer}; "
                f"a layer of {rows} x {columns} at rank {rank} needs {wanted}"
            )
    return LowRank(pair["A"], pair["B"])


def _write(base: Path, changes: Mapping[str, LowRank], scale: float, target: Path, progress: Progress) -> None:
    """The base's metadata and tensors, one tensor in memory at a time; matrices as Q8_0, the rest as it is."""
    reader = open_gguf(base)
    heads_of = architecture(reader).heads_of
    writer = GGUFWriter(target, "llama")
    _copy_metadata(reader, writer)
    for tensor in reader.tensors:
        kind = _stored(tensor)
        shape = tuple(int(size) for size in tensor.shape[::-1])
        size = math.prod(quant_shape_to_byte_shape(shape, kind)) if kind != tensor.tensor_type else tensor.data.nbytes
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(reader.tensors):
            progress(done, len(reader.tensors))
            change = changes.get(tensor.name)
            if change is None and _stored(tensor) == tensor.tensor_type:
                writer.write_tensor_data(tensor.data)
                continue
            array = values(tensor)
            if change is not None:
                heads = heads_of(tensor.name.split(".")[-2])
                change = change if heads is None else LowRank(change.a, to_gguf_rows(change.b, heads))
                array = (array + scale * product(change)).astype(np.float32)
            writer.write_tensor_data(quantize(array, _stored(tensor)))
        progress(len(reader.tensors), len(reader.tensors))
    finally:
        writer.close()


def _stored(tensor: ReaderTensor) -> GGMLQuantizationType:
    """How a tensor is written: vectors (norms) keep their type, matrices become Q8_0."""
    if len(tensor.shape) < 2:
        return tensor.tensor_type
    if int(tensor.shape[0]) % _STORED_BLOCK:
        raise WeightsError(f"{tensor.name} has {tensor.shape[0]} columns, Q8_0 needs a multiple of {_STORED_BLOCK}")
    return GGMLQuantizationType.Q8_0


def _copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    """Everything that the base says about itself, but that its matrices are now Q8_0."""
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue  # the writer's own
        value = int(LlamaFileType.MOSTLY_Q8_0) if name == _FILE_TYPE else field.contents()
        writer.add_key_value(name, value, field.types[0], field.types[1] if len(field.types) > 1 else None)


def _compare(path: Path, sha256: str, what: str) -> None:
    actual = file_sha256(path)
    if actual != sha256:
        raise WeightsError(f"{path.name} has the SHA-256 {actual}; {what} has {sha256}: it was not used")


@contextmanager
def _placed(target: Path) -> Iterator[Path]:
    """A file beside the target that becomes the target at the end: whoever looks sees all of it or none."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".student-", dir=target.parent) as folder:
            work = Path(folder) / target.name
            yield work
            work.replace(target)
    except OSError as error:
        raise WeightsError(f"cannot write {target}: {error}") from error


def main() -> None:
    """The command."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the unfinished file is removed
    arguments = _arguments()
    started = time.monotonic()
    try:
        if arguments.seal is not None:
            seal(arguments.base, arguments.student, arguments.seal, arguments.adapter, _lines)
        sha256 = merge(arguments.base, arguments.student, arguments.adapter, _lines)
        if arguments.hf is not None:
            write_hugging_face(arguments.student, arguments.hf)
        adapted = read_description(arguments.adapter) is not None
    except WeightsError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if arguments.json:
        seconds = round(time.monotonic() - started, 1)
        report = {"student": str(arguments.student), "sha256": sha256, "adapter": adapted, "seconds": seconds}
        sys.stdout.write(json.dumps(report) + "\n")
        return
    sys.stdout.write(f"{sha256}  {arguments.student}{'' if adapted else '  (the base: there is no adapter)'}\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m triton_models.distillation.merge",
        description="Merge the adapter into the base model and write the student's weights as a GGUF file (Q8_0). "
        "Every file is checked against the adapter's adapter.json; the same bytes come out on every machine.",
        epilog="example: python -m triton_models.distillation.merge base.gguf student.gguf --hf student-hf",
    )
    parser.add_argument("base", type=Path, help="the base model, a GGUF file (`make setup` downloads it)")
    parser.add_argument("student", type=Path, help="where to write the student")
    parser.add_argument(
        "--adapter",
        type=Path,
        default=ADAPTER_FOLDER,
        metavar="FOLDER",
        help="folder of adapter.safetensors and adapter.json (default: the packaged one); "
        "without an adapter.json the student is a copy of the base",
    )
    parser.add_argument("--hf", type=Path, metavar="FOLDER", help="also write a Hugging Face folder, for TensorRT-LLM")
    parser.add_argument(
        "--seal",
        type=_positive,
        metavar="ALPHA",
        help="first write adapter.json for a newly trained adapter.safetensors, with this alpha",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line")
    return parser.parse_args()


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _lines(done: int, total: int) -> None:
    """A line on stderr for each tenth."""
    if done * 10 // total > (done - 1) * 10 // total:
        sys.stderr.write(f"student: {done} of {total} tensors\n")
        sys.stderr.flush()


if __name__ == "__main__":
    main()
