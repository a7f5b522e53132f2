"""Writes a GGUF model as a folder that TensorRT-LLM and transformers load; nothing is downloaded for it.

The weights are bfloat16, the type that the model was trained in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import TensorSpec, serialize_file

from triton_models.distillation.adapter import WeightsError
from triton_models.distillation.base import (
    hugging_face_config,
    hugging_face_tokenizer,
    hugging_face_tokenizer_config,
    hugging_face_weights,
)

_WEIGHTS: Final = "model.safetensors"


def write_hugging_face(weights: Path, folder: Path) -> None:
    """Write `weights`, a GGUF file, as config.json, generation_config.json, tokenizer files and model.safetensors.

    config.json comes last, so that a folder which has one is complete. Raises WeightsError.
    """
    config = hugging_face_config(weights) | {"torch_dtype": "bfloat16"}
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        _write_weights(weights, folder)
        _write_json(folder / "tokenizer.json", hugging_face_tokenizer(weights))
        _write_json(folder / "tokenizer_config.json", hugging_face_tokenizer_config(weights))
        _write_json(folder / "generation_config.json", generation)
        _write_json(folder / "config.json", config)
    except OSError as error:
        raise WeightsError(f"cannot write the folder {folder}: {error}") from error


def bfloat16(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper half of each finite float32, rounded to nearest, ties to even: numpy has no bfloat16."""
    bits = array.view(np.uint32)
    rounded: npt.NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def _write_weights(weights: Path, folder: Path) -> None:
    arrays = {name: bfloat16(array) for name, array in hugging_face_weights(weights)}
    tensors = {
        name: TensorSpec(dtype="bfloat16", shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
        for name, array in arrays.items()
    }
    serialize_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _WEIGHTS).chmod(0o644)  # the library makes it the owner's alone; a container has another user


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
