"""How a state is stored: only the 32-bit words in which it differs from an empty one, and a bitmap of where they are.

    value = FORMAT, bitmap, words        FORMAT: one word; bitmap: bit i % 32 of word i // 32 stands for word i

More than half of a viewer's record is unused slots and places, and what is stored is what the changelog, its brokers
and the stores on disk pay for. All words are little-endian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

FORMAT: Final = 3
"""Version of the layout, first field of every value. Values of layout 2 are read too."""

Words = npt.NDArray[np.uint32]
Pack: TypeAlias = Callable[[Words], list[bytes]]
"""Stored values of records given as (records, words)."""


class PackingError(ValueError):
    """Bytes that are no stored value of this layout."""


def bitmap_words(words: int) -> int:
    """Words of the bitmap of a record of so many words."""
    return (words + 31) // 32


def pack_into(records: Words, empty: Words, out: Words, ends: npt.NDArray[np.int64]) -> None:
    """Write the stored values of records (records, words) behind each other into `out`; ends[i]: where value i ends.

    Scalars alone, so that it compiles. `out` must hold the records, a bitmap and a word for each, and one word more.
    """
    words = len(empty)
    bitmap = (words + 31) // 32
    at = 0
    for record in range(len(records)):
        out[at] = FORMAT
        start = at + 1
        at = start + bitmap
        for block in range(bitmap):
            bits = 0
            for i in range(block * 32, min(block * 32 + 32, words)):
                word = records[record, i] ^ empty[i]
                # No branch: which words differ is hard to guess, for a processor too.
                out[at] = word
                differs = int(word != 0)
                at += differs
                bits |= differs << (i - block * 32)
            out[start + block] = bits
        ends[record] = at


def pack_with(
    write: Callable[[Words, Words, Words, npt.NDArray[np.int64]], None], records: Words, empty: Words
) -> list[bytes]:
    """Stored values by `pack_into`, plain or compiled."""
    count, words = records.shape
    out = np.empty(count * (1 + bitmap_words(words) + words) + 1, "<u4")
    ends = np.empty(count, np.int64)
    write(records, empty, out, ends)
    stored, start, values = out.view(np.uint8).data, 0, []
    for end in (ends * 4).tolist():
        values.append(bytes(stored[start:end]))
        start = end
    return values


def unpack(values: Sequence[bytes], empty: Words) -> Words:
    """Records (values, words) of stored values. Raises PackingError if one is none."""
    words, head = len(empty), 4 * (1 + bitmap_words(len(empty)))
    if any(value[:4] != _MARK or len(value) < head for value in values):
        raise PackingError("not of this layout")
    bitmaps = np.frombuffer(b"".join([value[4:head] for value in values]), np.uint8).reshape(len(values), head - 4)
    held = np.unpackbits(bitmaps, axis=1, bitorder="little")
    if held[:, words:].any() or (held.sum(axis=1) * 4 + head != [len(value) for value in values]).any():
        raise PackingError("its bitmap does not match its length")
    records = np.zeros((len(values), words), "<u4")
    records[held[:, :words].view(bool)] = np.frombuffer(b"".join([value[head:] for value in values]), "<u4")
    records ^= empty
    return records


_MARK: Final = FORMAT.to_bytes(4, "little")
