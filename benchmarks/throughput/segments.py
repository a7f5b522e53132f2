"""What a topic's log segments hold, from the headers of their record batches (Kafka's message format 2).

End offsets alone count transaction markers as records; the batch headers tell them apart.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HEADER: Final = struct.Struct(">qiibIhiqqqhii")
"""baseOffset, batchLength, partitionLeaderEpoch, magic, crc, attributes, lastOffsetDelta, baseTimestamp, maxTimestamp,
producerId, producerEpoch, baseSequence, recordCount."""
_LENGTH_COUNTS_FROM: Final = 12
"""batchLength leaves out itself and the base offset before it."""
_CONTROL: Final = 0x20
_MAGIC: Final = 2


@dataclass(frozen=True, slots=True)
class LogContent:
    """records: without transaction markers; bytes: of all batches, as on disk."""

    records: int = 0
    markers: int = 0
    batches: int = 0
    bytes: int = 0

    def __add__(self, other: LogContent) -> LogContent:
        return LogContent(
            self.records + other.records,
            self.markers + other.markers,
            self.batches + other.batches,
            self.bytes + other.bytes,
        )


def topic_content(kafka_folder: Path, topic: str) -> LogContent:
    """Content of every partition of `topic` in a broker's log folder, as far as it is there: not what was compacted."""
    total = LogContent()
    for folder in sorted(kafka_folder.glob(f"{topic}-[0-9]*")):
        if folder.name[len(topic) + 1 :].isdigit():
            total += _content(sorted(folder.glob("*.log")))
    return total


def _content(segments: Iterable[Path]) -> LogContent:
    total = LogContent()
    for segment in segments:
        with segment.open("rb") as file:
            # A segment under way can be allocated ahead: zeros follow the last batch.
            while len(header := file.read(HEADER.size)) == HEADER.size:
                _, length, _, magic, _, attributes, *_, count = HEADER.unpack(header)
                if length <= 0 or magic != _MAGIC:
                    break
                marker = bool(attributes & _CONTROL)
                total += LogContent(0 if marker else count, count if marker else 0, 1, length + _LENGTH_COUNTS_FROM)
                file.seek(length + _LENGTH_COUNTS_FROM - HEADER.size, 1)
    return total
