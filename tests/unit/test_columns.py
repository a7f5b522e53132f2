"""The quick way through decoding gives what the strict one gives, for whatever comes."""

from __future__ import annotations

import random
from dataclasses import fields
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.columns import AT_ONCE, Columns, Reader, Record
from streams.decoding import Decoded, Rejected, RejectReason, decode_event
from streams.records import WatchEvent
from streams.watch import InputRecord
from tests.builders import START, make_registry

REGISTRY = make_registry()
KEY = b"ann"


def decode(value: bytes | None, key: bytes | None, append_time: int) -> Decoded[WatchEvent] | Rejected:
    return decode_event(value, key, append_time=append_time)


def never(value: bytes) -> Any:
    raise ValueError("so that every event goes the slow way")


def comparable(reader: Reader, records: list[InputRecord]) -> tuple[Any, ...]:
    columns: Columns = reader.read(records)
    count = len(columns.places)
    events = reader.events(columns, list(range(count)), list(range(count)), REGISTRY)
    return events.tolist(), *(getattr(columns, field.name) for field in fields(Columns))


def check(*values: bytes | None, key: bytes | None = KEY, append: int = START) -> Columns:
    records = [InputRecord(offset, key, value, append) for offset, value in enumerate(values)]
    assert comparable(Reader(decode, orjson.loads), records) == comparable(Reader(decode, never), records)
    return Reader(decode, orjson.loads).read(records)


class Refusing(Reader):
    """Fails where the slow way is asked for."""

    def _checked(self, columns: Columns, place: int, record: Record) -> None:
        raise AssertionError(f"not taken as usual: {record.value!r}")


USUAL: dict[str, Any] = {
    "user_id": "ann",
    "video_id": "c0v0",
    "ts": START,
    "event_id": "e1",
    "action": "play",
    "watch_ms": 60_000,
    "duration_ms": 90_000,
    "watch_fraction": 0.7,
    "session_id": "s1",
    "surface": "home",
    "autoplay": True,
    "traffic": "organic",
    "audience": "teen",
    "locale": "en-GB",
    "rec_id": "r1",
    "persona_version": 17,
    "title": "A title",
    "tags": ["one", "two"],
    "category": ["three"],
    "cluster_id": 2,
    "schema_version": 1,
}

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 0.0, 1.0, 0.05, 2.5, 1e300, 2**31, 2**63, 2**64, 10**30, "", " ", "play", "skip",
    "share", "thumbs_down", "organic", "bot", "kids", "ann", "c1v1", "c9v9", "x" * 64, "x" * 65, "x" * 300,
    "é" * 64, "é" * 200, "\u202etxt", "a\u0000b", "a\nb", "a\u2028b", "\u200b", "😀" * 60, [], ["a"], ["a", 1], [""],
    ["x" * 101], ["a"] * 40, {}, {"a": 1}, START, START + 10**9, START - 10**9, 10**10, 10**14, str(START),
]  # fmt: skip


@given(
    odd=st.dictionaries(st.sampled_from(sorted(USUAL)), st.sampled_from(ODD), max_size=4),
    dropped=st.sets(st.sampled_from(sorted(USUAL)), max_size=12),
    extra=st.booleans(),
)
@settings(max_examples=600, deadline=None)
def test_both_ways_give_the_same(odd: dict[str, Any], dropped: set[str], extra: bool) -> None:
    event = {name: value for name, value in USUAL.items() if name not in dropped} | odd
    if extra:
        event["device"] = {"kind": "tv"}
    check(orjson.dumps(event) if all(_fits(value) for value in event.values()) else b"{}")


def _fits(value: Any) -> bool:
    return not (isinstance(value, int) and abs(value) >= 2**64)


@pytest.mark.parametrize(
    "value",
    [
        None, b"", b"null", b"[]", b"1", b"{", b'{"user_id":"ann"}', b"\xff", b'{"user_id":"\xff"}',
        b'{"user_id":"ann","video_id":"c0v0","ts":1767225600000,"x":"\xff"}',
        b'{"user_id":"ann","video_id":"c0v0","ts":1767225600000,"x":NaN}',
        b'{"user_id":"ann","video_id":"c0v0","ts":1767225600000,"watch_fraction":NaN}',
        b'{"user_id":"ann","video_id":"c0v0","ts":1767225600000,"watch_fraction":1e999}',
        b'{"user_id":"ann","video_id":"c0v0","ts":1767225600000.0}',
        b'{"user_id":"ann","video_id":"c0v0","ts":1767225600000e0}',
        b'{"user_id":"ann","video_id":"c0v0","ts":17672256000000e-1}',
        b'{"user_id":"bob","user_id":"ann","video_id":"c0v0","ts":1767225600000}',
        b'{"user_id":"ann","user_id":"bob","video_id":"c0v0","ts":1767225600000}',
        b'{"user_id":"ann","video_id":"\\ud800","ts":1767225600000}',
        b'{"user_id":"ann","video_id":"c0v0","ts":1767225600000,"schema_version":true}',
        b'{"user_id":"ann","video_id":"c0v0","ts":1767225600000,"schema_version":1.0}',
        b'{"user_id":"ann","video_id":"c0v0","ts":1767225600000,"schema_version":2}',
        b'{"user_id":"ann","video_id":"c0v0","ts":1767225600000,"schema_version":"1"}',
        b'{"user_id":"ann","video_id":"c0v0","ts":1767225600000} ',
        b'{"user_id":"ann","video_id":"c0v0","ts":1767225600000}x',
        b'\xef\xbb\xbf{"user_id":"ann","video_id":"c0v0","ts":1767225600000}',
        b'{"user_id":"ann","video_id":"c0v0","ts":1767225600000,"title":"a\x01b"}',
        b'{"user_id":"ann","video_id":"c0v0","ts":1767225600000,"x":' + b"[" * 2000 + b"]" * 2000 + b"}",
        b'{"user_id":"ann","video_id":"c0v0","ts":1767225600000,"watch_ms":-0}',
        b'{"user_id":"ann","video_id":"c0v0","ts":01767225600000}',
        b'{"user_id":"ann","video_id":"c0v0","ts":+1767225600000}',
        b'{"user_id":"ann","video_id":"c0v0","ts":1767225600000,}',
        b"{'user_id':'ann'}",
    ],
)  # fmt: skip
def test_both_ways_give_the_same_for_odd_bytes(value: bytes | None) -> None:
    check(value)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_both_ways_give_the_same_for_damaged_bytes(seed: int) -> None:
    pick, value = random.Random(seed), bytearray(orjson.dumps(USUAL))
    for _ in range(pick.randrange(1, 4)):
        value[pick.randrange(len(value))] = pick.randrange(256)
    check(bytes(value))


def test_another_key_or_a_time_in_the_future_is_not_usual() -> None:
    value = orjson.dumps(USUAL)
    assert check(value, key=b"bob").rejected[0][1].reason is RejectReason.KEY_MISMATCH
    assert check(value, key=None).rejected
    assert check(value, append=START - 10**9).ts[0] == START - 10**9


@pytest.mark.parametrize("more", [{}, {"device": "tv"}])
def test_usual_events_take_the_quick_way(more: dict[str, Any]) -> None:
    every = [dict(USUAL, **more), {name: USUAL[name] for name in ("user_id", "video_id", "ts")} | more]
    every += [dict(USUAL, action=action, **more) for action in ("skip", "thumbs_up", "not_interested", "bookmark")]
    records = [InputRecord(i, KEY, orjson.dumps(event), START) for i, event in enumerate(every)]
    reader = Refusing(decode, orjson.loads)
    assert len(reader.read(records).places) == len(every)


def test_a_zero_hash_never_names_an_event() -> None:
    reader = Reader(decode, orjson.loads)
    columns = reader.read([InputRecord(0, KEY, orjson.dumps(USUAL), START)])
    columns.identities[0] = bytes(8)
    assert reader.events(columns, [0], [0], REGISTRY)["key"].tolist() == [1]


EVENTS = [orjson.dumps({"user_id": "ann", "video_id": f"c{i}v{i}", "ts": START + i}) for i in range(4)]
MIXED: list[bytes | None] = [
    None,
    b"",
    b" ",
    b"\n",
    b"{",
    orjson.dumps(USUAL),
    orjson.dumps(USUAL) + b"\n" + orjson.dumps(USUAL | {"event_id": "e2"}),
    b"\n" + orjson.dumps(USUAL),
    orjson.dumps(USUAL) + orjson.dumps(USUAL | {"event_id": "e2"}),
    b" " + orjson.dumps(USUAL) + b" ",
    b'{"user_id":"ann",',
    b'"video_id":"c1v1","ts":1767225600000}',
    b'{"user_id":"ann","video_id":"c1v1","ts":1767225600000,"tags":[{}',
    b'{"user_id":"ann","video_id":"c1v1","ts":1767225600000,"title":"}',
    b"{}",
    b"}",
    b"}{",
    orjson.dumps(USUAL, option=orjson.OPT_INDENT_2),
    *(orjson.dumps(USUAL | {"event_id": f"e{i}", "video_id": f"c{i}v{i}", "ts": START - i}) for i in range(3, 6)),
    *(
        orjson.dumps(USUAL | {"event_id": text, "title": text})
        for text in ("é", "\u202etxt", "a\\b", "a\x7fb", "x" * 64)
    ),
    orjson.dumps(USUAL | {"user_id": "bob"}),
    orjson.dumps(USUAL | {"traffic": "bot"}),
    orjson.dumps(USUAL | {"device": "tv"}),
    orjson.dumps(USUAL | {"ts": START + 10**9}),
    orjson.dumps(USUAL | {"playback_id": "p1"}),
    orjson.dumps({"user_id": "ann", "video_id": "c0v0", "ts": START}),
]


@given(values=st.lists(st.sampled_from(MIXED), max_size=12))
@settings(max_examples=400, deadline=None)
def test_both_ways_give_the_same_for_neighbours_of_every_kind(values: list[bytes | None]) -> None:
    columns = check(*values)
    assert len(columns.places) + len(columns.rejected) + len(columns.not_organic) == len(values)


def test_groups_keep_the_order_of_the_log() -> None:
    values = [orjson.dumps(USUAL | {"ts": START - i}) for i in range(3 * AT_ONCE + 5)]
    values[7], values[AT_ONCE], values[-1] = b"{", b"", b"[]"
    columns = check(*values)
    assert [place for place, _ in columns.rejected] == [7, AT_ONCE, len(values) - 1]
    assert columns.places == sorted(set(range(len(values))) - {7, AT_ONCE, len(values) - 1})
    assert columns.ts == [START - place for place in columns.places]


@pytest.mark.parametrize(
    "values",
    [
        [EVENTS[0] + EVENTS[1], EVENTS[2], EVENTS[3], b""],
        [EVENTS[1] + EVENTS[2], b" "],
        [b'{"user_id":"ann",', EVENTS[1][len(b'{"user_id":"ann",') :], EVENTS[2] + EVENTS[3]],
    ],
)
def test_values_of_two_events_or_of_none_do_not_make_up_for_each_other(values: list[bytes]) -> None:
    assert len(check(*values).rejected) >= len(values) // 2


def test_an_operators_decoder_may_give_text_without_utf_8() -> None:
    def parse(value: bytes) -> Any:
        return USUAL | {"user_id": "\ud800"}

    def decode_parsed(value: bytes | None, key: bytes | None, append_time: int) -> Decoded[WatchEvent] | Rejected:
        return decode_event(value, key, append_time=append_time, decoder=parse)

    columns = Reader(decode_parsed, parse).read([InputRecord(0, KEY, b"x", START)])
    assert [rejected.reason for _, rejected in columns.rejected] == [RejectReason.UNPRINTABLE_ID]
