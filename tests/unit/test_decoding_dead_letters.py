"""A dead letter keeps enough of a record to find, judge and resend it, and no more."""

from __future__ import annotations

from base64 import b64decode
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.dead_letters import dead_letter, original_value
from streams.decoding import Rejected, RejectReason, decode_record
from streams.records import DeadLetter, encode

NOT_JSON = Rejected(RejectReason.NOT_JSON, "unexpected end of data")


def letter_of(key: bytes | None, value: bytes | None) -> DeadLetter:
    return dead_letter(NOT_JSON, "watch-events", 3, 17, key, value)


def test_it_says_why_and_where_from() -> None:
    letter = letter_of(b"u1", b"{")
    assert (letter.reason, letter.detail) == ("not_json", "unexpected end of data")
    assert (letter.source_topic, letter.source_partition, letter.source_offset) == ("watch-events", 3, 17)
    assert b64decode(letter.key or "") == b"u1"


@given(key=st.none() | st.binary(max_size=1_024), value=st.none() | st.binary(max_size=500))
def test_a_short_value_can_be_restored_from_the_topic(key: bytes | None, value: bytes | None) -> None:
    letter = decode_record(DeadLetter, encode(letter_of(key, value)))
    assert original_value(letter) == value
    assert (letter.key is None) == (key is None)


@pytest.mark.parametrize("length", [65_536, 65_537, 1_000_000])
def test_a_long_value_is_cut_at_64_kib_and_hashed_whole(length: int) -> None:
    value = b"x" * length
    letter = letter_of(b"k" * 3_000, value)
    assert len(b64decode(letter.payload or "")) == 65_536
    assert len(b64decode(letter.key or "")) == 1_024
    assert (letter.length, letter.sha256) == (length, sha256(value).hexdigest())


def test_a_cut_value_is_not_taken_for_the_original() -> None:
    assert original_value(letter_of(None, b"x" * 65_536)) == b"x" * 65_536
    with pytest.raises(ValueError, match="65536 of 65537 bytes"):
        original_value(letter_of(None, b"x" * 65_537))


def test_a_changed_value_is_not_taken_for_the_original() -> None:
    with pytest.raises(ValueError, match="SHA-256"):
        original_value(replace(letter_of(None, b"abc"), payload="eHl6"))
