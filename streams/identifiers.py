"""Identifiers: deterministic hashes of what flows, and the partition Kafka's default partitioner picks.

Every hash is over unambiguous fields (each is prefixed with its length), so no choice of text in one field can
imitate another, and the same log gives the same identifiers on every machine. None of them is meant to hide its
input. What others see or viewers share is blake2b; within one viewer's state, where nobody gains by a collision but
loses an event of their own, it is XXH3, a quarter of the time.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Final

from xxhash import xxh3_64_digest

from streams.records import WatchEvent

_MASK32: Final = 0xFFFF_FFFF
_MURMUR2_SEED: Final = 0x9747_B28C
_MURMUR2_MULTIPLIER: Final = 0x5BD1_E995


def video_key(video_id: str) -> int:
    """The registry's key of a video: unsigned 64 bit, little-endian blake2b of the id's UTF-8 bytes."""
    return int.from_bytes(blake2b(video_id.encode(), digest_size=8).digest(), "little")


def video_keys(video_ids: Iterable[str]) -> bytes:
    """The keys of many videos, 8 bytes each, little-endian: `video_key` without an integer in between."""
    return b"".join([blake2b(video_id.encode(), digest_size=8).digest() for video_id in video_ids])


def request_id(topic_id: str, partition: int, offset: int, rule: str, user_id: str) -> str:
    """Identifier of a refresh request: 32 hex digits, a function of the log position that caused it.

    `topic_id` is Kafka's id of the topic that holds `offset` (a recreated topic has another), or its name in
    a replay.
    """
    return _hashed("request", topic_id, str(partition), str(offset), rule, user_id, digest_size=16).hex()


def interest_id(user_id: str, epoch: int, cluster_id: int) -> str:
    """Identifier of a viewer's interest: 16 hex digits, the same in every version of one epoch."""
    return _hashed("interest", user_id, str(epoch), str(cluster_id), digest_size=8).hex()


def event_text(event: WatchEvent) -> str:
    """What an event is known by among those of its viewer, for the duplicate check; the state holds its hash.

    The producer's `event_id` decides where there is one. Otherwise two events are the same when the video,
    the time, the action, the watched amounts and the playback are.
    """
    if event.event_id is not None:
        return framed("event", event.event_id)
    return framed(
        "facts",
        event.video_id,
        str(event.ts),
        event.action,
        str(event.watch_ms),
        str(event.duration_ms),
        str(event.watch_fraction),
        event.playback_id or "",
    )


def playback_text(event: WatchEvent) -> str | None:
    """What the playback that an event is a heartbeat of is known by; None without a playback id.

    The video is part of it: a player that reuses its playback id for the next video does not merge the two.
    """
    if event.playback_id is None:
        return None
    return framed("playback", event.playback_id, event.video_id)


def framed(*fields: str) -> str:
    """The fields in one text, each behind its length, so that no choice of text in one can imitate another."""
    return "".join([f"{len(field)}:{field}" for field in fields])


def text_digest(text: str) -> bytes:
    """8 bytes, big-endian, that stand for a text within one viewer's state."""
    return xxh3_64_digest(text.encode())


def content_hash(content: bytes) -> str:
    """32 hex digits that stand for `content`, for keys of content-addressed caches."""
    return blake2b(content, digest_size=16).hexdigest()


def murmur2_partition(key: bytes, partitions: int) -> int:
    """Partition (0 .. partitions - 1) that Kafka's default partitioner gives a record of this key.

    The Java client's rule: 32-bit MurmurHash2 with Kafka's seed, sign bit cleared, modulo the partitions.
    Raises ValueError for fewer than 1 partition.
    """
    if partitions < 1:
        raise ValueError(f"a topic has at least 1 partition, not {partitions}")
    return (_murmur2(key) & 0x7FFF_FFFF) % partitions


def _murmur2(data: bytes) -> int:
    length = len(data)
    whole = length - length % 4
    value = _MURMUR2_SEED ^ length
    for start in range(0, whole, 4):
        block = int.from_bytes(data[start : start + 4], "little") * _MURMUR2_MULTIPLIER & _MASK32
        block = (block ^ block >> 24) * _MURMUR2_MULTIPLIER & _MASK32
        value = value * _MURMUR2_MULTIPLIER & _MASK32 ^ block
    if whole < length:
        value = (value ^ int.from_bytes(data[whole:], "little")) * _MURMUR2_MULTIPLIER & _MASK32
    value = (value ^ value >> 13) * _MURMUR2_MULTIPLIER & _MASK32
    return value ^ value >> 15


def _hashed(*fields: str, digest_size: int) -> bytes:
    return blake2b(framed(*fields).encode(), digest_size=digest_size).digest()
