"""The fuse: counts over a sliding minute, and what it says when it blows."""

from __future__ import annotations

import pytest

from agents.dead_letter_fuse import DeadLetterFuse, FuseBlown


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_it_blows_past_the_limit_and_not_at_it() -> None:
    fuse = DeadLetterFuse("watch-events", 10, Clock())
    fuse.add({"not_json": 10}, 0, 0)
    with pytest.raises(FuseBlown):
        fuse.add({"not_json": 1}, 0, 10)


def test_one_batch_alone_can_blow_it() -> None:
    with pytest.raises(FuseBlown):
        DeadLetterFuse("watch-events", 10, Clock()).add({"not_json": 11}, 0, 0)


def test_letters_older_than_a_minute_do_not_count() -> None:
    clock = Clock()
    fuse = DeadLetterFuse("watch-events", 10, clock)
    for _ in range(20):  # ten a minute, for two minutes
        fuse.add({"not_json": 1}, 0, 0)
        clock.now += 6.1
    fuse.add({"not_json": 1}, 0, 0)
    with pytest.raises(FuseBlown):
        fuse.add({"not_json": 1}, 0, 0)


def test_batches_without_letters_never_blow_it() -> None:
    clock = Clock()
    fuse = DeadLetterFuse("watch-events", 1, clock)
    with pytest.raises(FuseBlown):
        fuse.add({"not_json": 2}, 0, 0)
    fuse.add({}, 0, 0)
    fuse.add({"not_json": 0}, 0, 0)


def test_no_limit() -> None:
    DeadLetterFuse("watch-events", 0, Clock()).add({"not_json": 10**9}, 0, 0)


def test_it_stays_blown_until_the_minute_is_over() -> None:
    clock = Clock()
    fuse = DeadLetterFuse("watch-events", 5, clock)
    for _ in range(3):
        with pytest.raises(FuseBlown):
            fuse.add({"not_json": 6}, 0, 0)
    clock.now += 61
    fuse.add({"not_json": 5}, 0, 0)


def test_the_message_says_what_where_and_what_to_do() -> None:
    fuse = DeadLetterFuse("shop.watch-events", 100, Clock())
    fuse.add({"not_json": 60, "key_mismatch": 20, "empty_id": 2, "wrong_type": 1}, 3, 7)
    with pytest.raises(FuseBlown) as blown:
        fuse.add({"key_mismatch": 50}, 2, 4711)
    for part in (
        "133 records of shop.watch-events",
        "at most 100",
        "key_mismatch 70, not_json 60, empty_id 2;",
        "partition 2, offset 4711",
        "personas dlq list",
        "PERSONAS_DEAD_LETTERS_PER_MINUTE",
    ):
        assert part in str(blown.value)


def test_memory_does_not_grow_with_batches() -> None:
    clock = Clock()
    fuse = DeadLetterFuse("watch-events", 10**9, clock)
    for _ in range(10_000):
        fuse.add({"not_json": 1}, 0, 0)
        clock.now += 0.05
    assert len(fuse._window) <= 61
