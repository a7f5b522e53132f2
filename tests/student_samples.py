"""A tiny Llama model in GGUF and adapters for it, made of a seed: what merging is tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import quantize
from safetensors.numpy import save_file

from triton_models.distillation.base import PROJECTIONS

LAYERS: Final = 2
HIDDEN: Final = 64
HEADS: Final = 4
KEY_VALUE_HEADS: Final = 2
FEED_FORWARD: Final = 96
RANK: Final = 3
KEY_VALUE_ROWS: Final = HIDDEN // HEADS * KEY_VALUE_HEADS
SHAPES: Final = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE_ROWS, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE_ROWS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FEED_FORWARD, HIDDEN),
    "mlp.up_proj": (FEED_FORWARD, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED_FORWARD),
}
"""(rows, columns) of each projection."""
SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENS: Final = (*SPECIAL, *"0123456789abcdefghijklmnopqrstuvwxyz", "Ġ", "he", "ll", "hell", "hello")
MERGES: Final = ("h e", "l l", "he ll", "hell o")
TEMPLATE: Final = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def write_base(path: Path, seed: int = 1) -> None:
    """Matrices as Q4_1, embeddings as Q8_0, norms as float32: the types of the real base."""
    random = np.random.default_rng(seed)
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.name", "tiny")
    writer.add_uint32("general.file_type", 3)
    writer.add_uint32("llama.block_count", LAYERS)
    writer.add_uint32("llama.context_length", 128)
    writer.add_uint32("llama.embedding_length", HIDDEN)
    writer.add_uint32("llama.feed_forward_length", FEED_FORWARD)
    writer.add_uint32("llama.attention.head_count", HEADS)
    writer.add_uint32("llama.attention.head_count_kv", KEY_VALUE_HEADS)
    writer.add_float32("llama.rope.freq_base", 100_000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", list(TOKENS))
    kinds = [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL))
    writer.add_key_value("tokenizer.ggml.token_type", kinds, GGUFValueType.ARRAY, GGUFValueType.INT32)
    writer.add_array("tokenizer.ggml.merges", list(MERGES))
    for name, number in (("bos", 1), ("eos", 2), ("unknown", 0), ("padding", 2)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    writer.add_string("tokenizer.chat_template", TEMPLATE)

    def add(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
        values = random.normal(0.0, 0.1, shape).astype(np.float32)
        if kind == GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", (len(TOKENS), HIDDEN), GGMLQuantizationType.Q8_0)
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{norm}.weight", (HIDDEN,), GGMLQuantizationType.F32)
        for projection, shape in SHAPES.items():
            add(f"blk.{layer}.{PROJECTIONS[projection]}.weight", shape, GGMLQuantizationType.Q4_1)
    add("output_norm.weight", (HIDDEN,), GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def lora_name(layer: int, projection: str, side: str) -> str:
    """PEFT's name of one matrix."""
    return f"base_model.model.model.layers.{layer}.{projection}.lora_{side}.weight"


def adapter_matrices(seed: int = 2, rank: int = RANK) -> dict[str, npt.NDArray[Any]]:
    """Both matrices of every projection."""
    random = np.random.default_rng(seed)
    matrices: dict[str, npt.NDArray[Any]] = {}
    for layer in range(LAYERS):
        for projection, (rows, columns) in SHAPES.items():
            matrices[lora_name(layer, projection, "A")] = random.normal(0, 0.2, (rank, columns)).astype(np.float16)
            matrices[lora_name(layer, projection, "B")] = random.normal(0, 0.2, (rows, rank)).astype(np.float16)
    return matrices


def write_adapter(folder: Path, matrices: dict[str, npt.NDArray[Any]] | None = None) -> None:
    """`adapter.safetensors` alone; `merge.seal` adds its description."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_matrices() if matrices is None else matrices, folder / "adapter.safetensors")
