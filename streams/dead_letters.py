"""Dead letters: what is kept of a record that could not be used."""

from __future__ import annotations

from base64 import b64decode, b64encode
from hashlib import sha256
from typing import Final

from streams.decoding import Rejected
from streams.records import DeadLetter

MAXIMUM_PAYLOAD: Final = 64 * 1024
MAXIMUM_KEY: Final = 1024


def dead_letter(
    rejected: Rejected, topic: str, partition: int, offset: int, key: bytes | None, value: bytes | None
) -> DeadLetter:
    """The dead letter of a record: its reason and source, the start of its key and value, length and SHA-256.

    Length and hash are those of the whole value; an absent value has length 0 and the hash of no bytes.
    """
    content = value or b""
    return DeadLetter(
        reason=rejected.reason,
        detail=rejected.detail,
        source_topic=topic,
        source_partition=partition,
        source_offset=offset,
        key=_start(key, MAXIMUM_KEY),
        payload=_start(value, MAXIMUM_PAYLOAD),
        length=len(content),
        sha256=sha256(content).hexdigest(),
    )


def original_value(letter: DeadLetter) -> bytes | None:
    """The value of the record behind a dead letter, None if the record had none.

    Raises ValueError if the dead letter holds only its start, or something else than was hashed.
    """
    if letter.payload is None:
        return None
    value = b64decode(letter.payload, validate=True)
    if len(value) < letter.length:
        raise ValueError(f"the dead letter keeps {len(value)} of {letter.length} bytes; read the source record")
    if sha256(value).hexdigest() != letter.sha256:
        raise ValueError("the payload of the dead letter does not match its SHA-256")
    return value


def _start(content: bytes | None, limit: int) -> str | None:
    return None if content is None else b64encode(content[:limit]).decode()
