"""GGUF files as OpenVINO reads them without loss, or computes with them faster, in a file it may write to.

OpenVINO's reader keeps a Q4_1 block (value = scale x code + offset) as 4-bit codes with a whole-number zero point, so
each block's offset is rounded to a multiple of its scale. That costs a small model most of its sense: it no longer
repeats a list correctly. Q8_0 (value = scale x code) is read exactly, and takes 145 MB instead of 98 MB.
With matrix units for 16 bits (AMX) the codes are unpacked anew in every step; unpacked once, to F16, a step with many
requests in flight takes a quarter less time, and the file 271 MB. Their results are rounded to 8 bits either way.
The reader opens its file for writing, though it writes nothing: one in a read-only image needs a copy elsewhere.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt
from student_engine import ModelConfigError

_MAGIC: Final = b"GGUF"
_Q4_1: Final = 3
_Q8_0: Final = 8
_F16: Final = 1
_BLOCK: Final = 32
_Q4_1_BYTES: Final = 20
_Q8_0_BYTES: Final = 34
_SCALAR_FORMATS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9
_MAXIMUM_COUNT: Final = 10_000_000


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: bytes
    shape: tuple[int, ...]
    kind: int
    offset: int


def readable_weights(weights: Path, *, unpacked: bool = False) -> Path:
    """`weights` itself, or a copy if it has Q4_1 tensors (Q8_0 in the copy) or may not be written to.

    unpacked: the copy has F16 in place of either. It is made beside the file, or in the temporary folder if that fails;
    one made before is used again while it is newer. Raises ModelConfigError for a file that is no GGUF 2 or 3.
    """
    if weights.suffix != ".gguf":
        return weights
    with weights.open("rb") as source:
        try:
            head, tensors, start, alignment = _read(source)
        except (struct.error, ValueError, KeyError) as error:
            raise ModelConfigError(f"{weights} is not a readable GGUF file: {error}") from error
    changed = {_Q4_1, _Q8_0} if unpacked else {_Q4_1}
    kind, ending = (_F16, "f16") if unpacked else (_Q8_0, "q8_0")
    converts = any(tensor.kind in changed for tensor in tensors)
    if not converts and os.access(weights, os.W_OK):
        return weights
    name = f"{weights.stem}.{ending if converts else 'copy'}.gguf"
    for folder in (weights.parent, Path(tempfile.gettempdir()) / f"student-{os.getuid()}"):
        copy = folder / name
        if copy.is_file() and copy.stat().st_mtime_ns >= weights.stat().st_mtime_ns:
            return copy
        if folder != weights.parent:
            folder.mkdir(mode=0o700, exist_ok=True)
        if os.access(folder, os.W_OK):
            _write(copy, head, _bodies(weights, tensors, start, changed, kind), alignment)
            return copy
    raise ModelConfigError(f"no folder to write {name} to: make {weights.parent} or the temporary folder writable")


def _read(source: IO[bytes]) -> tuple[bytes, list[_Tensor], int, int]:
    """Header with metadata (as bytes), tensors, where their data starts, alignment."""
    if source.read(4) != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    version, tensor_count, value_count = struct.unpack("<IQQ", source.read(20))
    if version not in (2, 3) or tensor_count > _MAXIMUM_COUNT or value_count > _MAXIMUM_COUNT:
        raise ValueError(f"version {version} or counts are not supported")
    alignment = 32
    for _ in range(value_count):
        key = _string(source)
        value = _value(source, struct.unpack("<I", source.read(4))[0])
        if key == b"general.alignment":
            alignment = int(value)
    end = source.tell()
    tensors = []
    for _ in range(tensor_count):
        name = _string(source)
        (dimensions,) = struct.unpack("<I", source.read(4))
        shape = struct.unpack(f"<{dimensions}Q", source.read(8 * dimensions))
        kind, offset = struct.unpack("<IQ", source.read(12))
        tensors.append(_Tensor(name, shape, kind, offset))
    start = source.tell() + -source.tell() % alignment
    source.seek(0)
    return source.read(end), tensors, start, alignment


def _string(source: IO[bytes]) -> bytes:
    (length,) = struct.unpack("<Q", source.read(8))
    return source.read(length)


def _value(source: IO[bytes], kind: int) -> Any:  # noqa: ANN401
    if kind == _STRING:
        return _string(source)
    if kind == _ARRAY:
        element, count = struct.unpack("<IQ", source.read(12))
        return [_value(source, element) for _ in range(count)]
    form = "<" + _SCALAR_FORMATS[kind]
    return struct.unpack(form, source.read(struct.calcsize(form)))[0]


def _bodies(
    weights: Path, tensors: list[_Tensor], start: int, changed: Set[int], kind: int
) -> Iterator[tuple[_Tensor, bytes]]:
    """Tensors with their data, those of the kinds that are `changed` as `kind`."""
    data = np.memmap(weights, dtype=np.uint8, mode="r", offset=0)
    ends = _ends(tensors, len(data) - start)
    for tensor in tensors:
        raw = data[start + tensor.offset : start + ends[tensor.offset]]
        if tensor.kind not in changed:
            yield tensor, raw.tobytes()
            continue
        blocks = int(np.prod(tensor.shape)) // _BLOCK
        values = q4_1(raw[: blocks * _Q4_1_BYTES]) if tensor.kind == _Q4_1 else from_q8_0(raw[: blocks * _Q8_0_BYTES])
        yield replace(tensor, kind=kind), (values.astype(np.float16) if kind == _F16 else q8_0(values)).tobytes()


def _write(copy: Path, head: bytes, bodies: Iterable[tuple[_Tensor, bytes]], alignment: int) -> None:
    infos = bytearray(head)
    padded: list[bytes] = []
    offset = 0
    for tensor, body in bodies:
        infos += struct.pack("<Q", len(tensor.name)) + tensor.name
        infos += struct.pack(f"<I{len(tensor.shape)}QIQ", len(tensor.shape), *tensor.shape, tensor.kind, offset)
        padded.append(body + bytes(-len(body) % alignment))
        offset += len(padded[-1])
    infos += bytes(-len(infos) % alignment)
    with tempfile.NamedTemporaryFile(dir=copy.parent, prefix=".student-", delete=False) as target:
        target.write(infos)
        target.writelines(padded)
    Path(target.name).replace(copy)  # atomic: another loader sees all of it or none


def _ends(tensors: list[_Tensor], size: int) -> dict[int, int]:
    """Where each tensor's bytes end, by the offset where they begin (padding included)."""
    offsets = sorted(tensor.offset for tensor in tensors)
    return dict(zip(offsets, [*offsets[1:], size], strict=True))


def q4_1(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Values of Q4_1 blocks (20 bytes: half-precision scale and offset, then 32 codes of 4 bits), as (blocks, 32)."""
    blocks = raw.reshape(-1, _Q4_1_BYTES)
    scale_offset = blocks[:, :4].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    values: npt.NDArray[np.float32] = codes * scale_offset[:, :1] + scale_offset[:, 1:]
    return values


def q8_0(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Q8_0 blocks (34 bytes: half-precision scale, 32 signed bytes) of values (blocks, 32)."""
    scale = (np.abs(values).max(axis=1) / 127.0).astype(np.float16)
    divisor = np.where(scale == 0, np.float16(1), scale).astype(np.float32)
    codes = np.clip(np.rint(values / divisor[:, None]), -127, 127).astype(np.int8)
    return np.concatenate([scale[:, None].view(np.uint8), codes.view(np.uint8)], axis=1)


def from_q8_0(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Values of Q8_0 blocks, as (blocks, 32)."""
    blocks = raw.reshape(-1, _Q8_0_BYTES)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    values: npt.NDArray[np.float32] = blocks[:, 2:].copy().view(np.int8).astype(np.float32) * scale
    return values
