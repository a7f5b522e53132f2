"""Field mappings read topics of another shape, and a wrong mapping is refused with its entry."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.decoding import Decoded, Rejected, decode_event
from streams.mapping import MappingError, iso_milliseconds, parse_mapping
from streams.records import Action, WatchEvent

NOW = 1_790_000_000_000
REQUIRED = {"user_id": "profile.id", "video_id": "asset", "ts": {"path": "at", "scale": 1000}}
THEIRS = {"profile": {"id": "u1"}, "asset": "v1", "at": 1_789_999_999.25, "user_id": "someone else"}


def decode(entries: dict[str, Any], theirs: object) -> Decoded[WatchEvent] | Rejected:
    mapping = parse_mapping(orjson.dumps(entries))
    return decode_event(orjson.dumps(theirs), b"u1", append_time=NOW, mapping=mapping)


def test_names_paths_and_scale() -> None:
    assert decode(REQUIRED, THEIRS) == Decoded(WatchEvent("u1", "v1", 1_789_999_999_250))


def test_only_mapped_fields_are_read() -> None:
    theirs = THEIRS | {"title": {"en": "An object"}, "schema_version": 7}
    assert decode(REQUIRED, theirs) == decode(REQUIRED, THEIRS)


def test_values_are_replaced_split_and_scaled() -> None:
    entries = REQUIRED | {
        "action": {"path": "verb", "map": {"PLAY": "play", "4": "thumbs_up"}},
        "autoplay": {"path": "auto", "map": {"Y": True, "N": False}},
        "tags": {"path": "keywords", "split": "|"},
        "watch_fraction": {"path": "percent", "scale": 0.01},
    }
    theirs = THEIRS | {"verb": 4, "auto": "Y", "keywords": "bees| honey ||", "percent": 85}
    result = decode(entries, theirs)
    assert isinstance(result, Decoded)
    event = result.record
    assert (event.action, event.autoplay, event.tags) == (Action.THUMBS_UP, True, ("bees", "honey"))
    assert event.watch_fraction == pytest.approx(0.85)


def test_true_and_false_are_replaced_by_their_json_names() -> None:
    entries = REQUIRED | {"action": {"path": "liked", "map": {"true": "thumbs_up", "false": "thumbs_down"}}}
    result = decode(entries, THEIRS | {"liked": False})
    assert isinstance(result, Decoded)
    assert result.record.action is Action.THUMBS_DOWN


def test_iso_times() -> None:
    entries = REQUIRED | {"ts": {"path": "at", "iso": True}}
    result = decode(entries, THEIRS | {"at": "2013-02-28T15:08:24Z"})
    assert isinstance(result, Decoded)
    assert result.record.ts == 1_362_064_104_000


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"profile": None}, "missing_field"),
        ({"profile": "u1"}, "missing_field"),
        ({"profile": {"id": {"deep": 1}}}, "wrong_type"),
        ({"at": "soon"}, "wrong_type"),
        ({"at": True}, "wrong_type"),
        ({"at": 1e308}, "ts_not_milliseconds"),
        ({"at": NOW}, "ts_not_milliseconds"),
        ({"verb": "STOP"}, "unknown_value"),
        ({"verb": ["PLAY"]}, "wrong_type"),
        ({"keywords": 7}, "wrong_type"),
    ],
)
def test_what_cannot_be_converted_is_rejected_by_the_decoder(change: dict[str, Any], expected: str) -> None:
    entries = REQUIRED | {
        "action": {"path": "verb", "map": {"PLAY": "play"}},
        "tags": {"path": "keywords", "split": ","},
    }
    result = decode(entries, THEIRS | change)
    assert isinstance(result, Rejected)
    assert result.reason == expected


def test_an_unreadable_iso_time_is_rejected() -> None:
    result = decode(REQUIRED | {"ts": {"path": "at", "iso": True}}, THEIRS | {"at": "28/02/2013"})
    assert isinstance(result, Rejected)
    assert result.reason == "wrong_type"


@given(
    theirs=st.dictionaries(
        st.sampled_from(["profile", "asset", "at", "verb"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dictionaries(st.just("id"), st.text()),
    )
)
def test_applying_never_raises(theirs: dict[str, object]) -> None:
    entries = REQUIRED | {"action": {"path": "verb", "map": {"1": "play"}}}
    ours = parse_mapping(orjson.dumps(entries)).apply(theirs)
    assert set(ours) <= {"user_id", "video_id", "ts", "action"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "must say where user_id, video_id, ts comes from"),
        (b'{"user_id": "u", "ts": "t"}', "must say where video_id comes from"),
    ],
)
def test_a_file_that_is_no_mapping(content: bytes, message: str) -> None:
    with pytest.raises(MappingError, match=message):
        parse_mapping(content)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"userid": "u"}, "'userid' is not a field of a watch event; they are user_id"),
        ({"title": ""}, "title: the path must be object keys"),
        ({"title": "a..b"}, "title: the path must be object keys"),
        ({"title": {"scale": 2}}, "title: the path must be"),
        ({"title": 7}, "title: give a path"),
        ({"title": {"path": "t", "scales": 2}}, "title: unknown option 'scales'"),
        (
            {"title": {"path": "t", "scale": 2}},
            "title: only duration_ms, ts, watch_fraction, watch_ms can be scaled",
        ),
        ({"watch_ms": {"path": "w", "scale": 0}}, "scale must be a number above 0"),
        ({"watch_ms": {"path": "w", "scale": True}}, "scale must be a number above 0"),
        ({"ts": {"path": "t", "iso": 1}}, "iso must be true or false"),
        ({"watch_ms": {"path": "t", "iso": True}}, "only ts can be an ISO time"),
        ({"ts": {"path": "t", "iso": True, "scale": 2}}, "use one of scale, iso, map, split"),
        ({"action": {"path": "a", "map": {"PLAY": "played"}}}, "map gives 'played' for 'PLAY'"),
        ({"action": {"path": "a", "map": {}}}, "map must be an object"),
        ({"action": {"path": "a", "map": ["play"]}}, "map must be an object"),
        ({"tags": {"path": "t", "split": ""}}, "split must be a separator"),
        ({"title": {"path": "t", "split": ","}}, "only category, tags can be split"),
    ],
)
def test_a_wrong_entry_is_named(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(MappingError, match=message):
        parse_mapping(orjson.dumps(REQUIRED | entry))


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T00:00:00.001", 1),
        ("2013-02-28T16:08:24.123456+01:00", 1_362_064_104_123),
        ("2013-02-28 15:08:24", 1_362_064_104_000),
        ("1969-12-31T23:59:59.999Z", -1),
    ],
)
def test_iso_milliseconds(text: str, milliseconds: int) -> None:
    assert iso_milliseconds(text) == milliseconds
