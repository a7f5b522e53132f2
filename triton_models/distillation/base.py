"""The base model as Hugging Face names it, read from its GGUF file with numpy: weights, configuration, tokenizer.

GGUF keeps the rows of the query and key projections in another order, since its rotary embedding turns neighbours
(0, 1), (2, 3), ... where Hugging Face's turns halves (0, n/2), (1, n/2 + 1), ... of each head; `to_gguf_rows` and
`to_hugging_face_rows` go from one to the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from triton_models.distillation.adapter import WeightsError

PROJECTIONS: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Linear layers of a block: Hugging Face's name to GGUF's. These are what an adapter can change."""

_NORMS: Final = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_OUTSIDE_BLOCKS: Final = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_CONTROL_TOKEN: Final = 3
_ENDS_OF_TEXT: Final = ("bos", "eos", "unknown", "padding")


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes of a Llama model. Rows and columns of its tensors follow from them."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    key_value_heads: int

    def heads_of(self, projection: str) -> int | None:
        """How many heads the rows of a GGUF projection such as `attn_q` are reordered in; None: they are not."""
        return {"attn_q": self.heads, "attn_k": self.key_value_heads}.get(projection)


def open_gguf(path: Path) -> GGUFReader:
    """A GGUF file, its tensors mapped into memory. Raises WeightsError when it cannot be read or is no Llama model."""
    try:
        reader = GGUFReader(path)
        kind = _metadata(reader, "general.architecture")
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise WeightsError(f"{path} is not a readable GGUF file: {error}. Delete it and run `make setup`") from error
    if kind != "llama":
        raise WeightsError(f"{path} is a {kind!r} model; only a Llama model in GGUF can be the base")
    return reader


def architecture(reader: GGUFReader) -> Architecture:
    """The sizes that the file's metadata give."""
    heads = int(_metadata(reader, "llama.attention.head_count"))
    return Architecture(
        layers=int(_metadata(reader, "llama.block_count")),
        hidden=int(_metadata(reader, "llama.embedding_length")),
        feed_forward=int(_metadata(reader, "llama.feed_forward_length")),
        heads=heads,
        key_value_heads=int(_metadata(reader, "llama.attention.head_count_kv", heads)),
    )


def gguf_names(layers: int) -> dict[str, str]:
    """GGUF's name of every tensor that a model of so many layers can have, by Hugging Face's name."""
    names = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in _OUTSIDE_BLOCKS.items()}
    for layer in range(layers):
        for theirs, ours in (PROJECTIONS | _NORMS).items():
            names[f"model.layers.{layer}.{theirs}.weight"] = f"blk.{layer}.{ours}.weight"
    return names


def to_gguf_rows(matrix: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows (heads x n) of a query or key projection in Hugging Face's order, put into GGUF's."""
    return _swapped(matrix, (heads, 2, -1))


def to_hugging_face_rows(matrix: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """The inverse of `to_gguf_rows`."""
    return _swapped(matrix, (heads, -1, 2))


def values(tensor: ReaderTensor) -> npt.NDArray[np.float32]:
    """A tensor's values, dequantised: float32, (rows, columns) or (columns,). The same numbers on every processor."""
    dequantised: npt.NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    return dequantised


def hugging_face_weights(path: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Every weight of a GGUF file under Hugging Face's name and in its row order, one at a time, float32.

    `lm_head.weight` is there only if the file has one: a model with tied embeddings has not. Raises WeightsError
    for a tensor that a Llama model does not have.
    """
    reader = open_gguf(path)
    sizes = architecture(reader)
    names = {ours: theirs for theirs, ours in gguf_names(sizes.layers).items()}
    for tensor in reader.tensors:
        if tensor.name not in names:
            raise WeightsError(
                f"{path} has a tensor {tensor.name!r} that a Llama model of {sizes.layers} layers has not"
            )
        array = values(tensor)
        heads = sizes.heads_of(tensor.name.split(".")[-2])
        yield names[tensor.name], array if heads is None else to_hugging_face_rows(array, heads)


def hugging_face_config(path: Path) -> dict[str, Any]:
    """`config.json` of the model but for its number type: what `transformers.LlamaConfig` takes, from the metadata."""
    reader = open_gguf(path)
    sizes = architecture(reader)
    ends = _ends_of_text(reader)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.feed_forward,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_value_heads,
        "head_dim": sizes.hidden // sizes.heads,
        "max_position_embeddings": int(_metadata(reader, "llama.context_length")),
        "rms_norm_eps": _decimal(_metadata(reader, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(_metadata(reader, "llama.rope.freq_base", 10_000.0)),
        "rope_scaling": None,
        "vocab_size": len(_metadata(reader, "tokenizer.ggml.tokens")),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": ends["bos"],
        "eos_token_id": ends["eos"],
        "pad_token_id": ends["padding"],
        "use_cache": True,
    }


def hugging_face_tokenizer(path: Path) -> dict[str, Any]:
    """`tokenizer.json`, which the tokenizers library reads: byte-level BPE as SmolLM's, digits one by one.

    Raises WeightsError when the file's vocabulary is of another kind.
    """
    reader = open_gguf(path)
    kind = (_metadata(reader, "tokenizer.ggml.model"), _metadata(reader, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise WeightsError(f"{path} has a vocabulary of kind {kind}; only SmolLM's ('gpt2', 'smollm') is known here")
    tokens: list[str] = _metadata(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _metadata(reader, "tokenizer.ggml.token_type")
    special = [number for number, token_kind in enumerate(kinds) if token_kind == _CONTROL_TOKEN]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": tokens[number], **flags} for number in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": _metadata(reader, "tokenizer.ggml.merges"),
        },
    }


def hugging_face_tokenizer_config(path: Path) -> dict[str, Any]:
    """`tokenizer_config.json`: the special tokens and the chat template of the file's metadata."""
    reader = open_gguf(path)
    tokens: list[str] = _metadata(reader, "tokenizer.ggml.tokens")
    ends = _ends_of_text(reader)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ends["bos"]],
        "eos_token": tokens[ends["eos"]],
        "unk_token": tokens[ends["unknown"]],
        "pad_token": tokens[ends["padding"]],
        "chat_template": _metadata(reader, "tokenizer.chat_template"),
        "model_max_length": int(_metadata(reader, "llama.context_length")),
        "clean_up_tokenization_spaces": False,
    }


def _swapped(matrix: npt.NDArray[Any], shape: tuple[int, int, int]) -> npt.NDArray[Any]:
    split = matrix.reshape(*shape, *matrix.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(matrix.shape))


def _ends_of_text(reader: GGUFReader) -> dict[str, int]:
    return {name: int(_metadata(reader, f"tokenizer.ggml.{name}_token_id")) for name in _ENDS_OF_TEXT}


def _metadata(reader: GGUFReader, key: str, default: Any = None) -> Any:  # noqa: ANN401
    field = reader.get_field(key)
    if field is not None:
        return field.contents()
    if default is None:
        raise WeightsError(f"the GGUF file says nothing about {key!r}: it is not the file that is locked here")
    return default


def _decimal(number: float) -> float:
    """The shortest decimal that is this float32: 1e-05 where float64 would say 9.999999747378752e-06."""
    return float(str(np.float32(number)))
