"""Identifiers are deterministic, unambiguous, and place keys where Kafka's own clients place them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from aiokafka.partitioner import DefaultPartitioner
from hypothesis import given
from hypothesis import strategies as st

from streams.identifiers import (
    content_hash,
    event_text,
    interest_id,
    murmur2_partition,
    playback_text,
    request_id,
    text_digest,
    video_key,
)
from streams.records import Action, WatchEvent

EVENT = WatchEvent(user_id="u1", video_id="v1", ts=1_362_064_104_000)


@pytest.mark.parametrize(
    ("key", "hash_of_the_java_client"),
    [(b"21", -973_932_308), (b"foobar", -790_332_482), (b"a-little-bit-long-string", -985_981_536)],
)
def test_murmur2_gives_the_java_clients_published_hashes(key: bytes, hash_of_the_java_client: int) -> None:
    partitions = 1_000_003
    assert murmur2_partition(key, partitions) == (hash_of_the_java_client & 0x7FFF_FFFF) % partitions


@given(key=st.binary(max_size=600), partitions=st.integers(1, 2_000))
def test_murmur2_agrees_with_aiokafka(key: bytes, partitions: int) -> None:
    assert murmur2_partition(key, partitions) == DefaultPartitioner()(key, list(range(partitions)), [])


def test_murmur2_needs_a_partition() -> None:
    with pytest.raises(ValueError, match="at least 1 partition"):
        murmur2_partition(b"key", 0)


def test_identifiers_never_change() -> None:
    """They are stored in topics, registries and Cassandra: another value would orphan what is there."""
    assert video_key("tt0884328") == 2_243_651_027_592_296_966
    assert request_id("topic", 3, 17, "drift", "u1") == "36f3e5b3a85938e73aed97c7ab03112f"
    assert interest_id("u1", 0, 12) == "dd31690a49674c5e"
    assert content_hash(b"words") == "3be147d0936baf6d1beb65ca7654472b"
    assert int.from_bytes(text_digest(event_text(EVENT)), "big") == 15_560_866_770_991_502_236


def test_fields_cannot_imitate_each_other() -> None:
    assert request_id("t1", 1, 11, "age", "u") != request_id("t", 11, 11, "age", "u")
    assert request_id("t", 1, 11, "age", "u") != request_id("t", 11, 1, "age", "u")
    assert interest_id("u1", 1, 2) != interest_id("u", 11, 2)
    assert len({request_id("t", 0, 5, rule, "u") for rule in ("age", "drift", "maturity")}) == 3


def test_event_key_is_the_event_id_where_there_is_one() -> None:
    first = replace(EVENT, event_id="e1")
    assert event_text(first) == event_text(replace(first, ts=5, video_id="other"))
    assert event_text(first) != event_text(replace(first, event_id="e2"))
    assert event_text(replace(EVENT, event_id="v1")) != event_text(EVENT)


@pytest.mark.parametrize(
    "change",
    [
        {"video_id": "v2"},
        {"ts": EVENT.ts + 1},
        {"action": Action.SKIP},
        {"watch_ms": 1},
        {"duration_ms": 1},
        {"watch_fraction": 0.5},
        {"playback_id": "p"},
    ],
)
def test_event_key_without_an_id_tells_events_apart(change: dict[str, object]) -> None:
    assert event_text(replace(EVENT, **change)) != event_text(EVENT)  # type: ignore[arg-type]


def test_event_key_without_an_id_ignores_what_a_retry_may_add() -> None:
    assert event_text(replace(EVENT, title="A title", locale="en")) == event_text(EVENT)


def test_heartbeats_share_their_playback() -> None:
    first = replace(EVENT, playback_id="p1", watch_ms=10_000)
    later = replace(first, ts=EVENT.ts + 10_000, watch_ms=20_000)
    assert playback_text(first) == playback_text(later)
    assert event_text(first) != event_text(later)
    assert playback_text(replace(later, video_id="v2")) != playback_text(first)
    assert playback_text(EVENT) is None
