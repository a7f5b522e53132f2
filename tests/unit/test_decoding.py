"""Each kind of bad input has one documented result, and no bytes whatever raise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.decoding import (
    MAXIMUM_DETAIL,
    Decoded,
    Rejected,
    RejectReason,
    UnreadableRecordError,
    decode_control,
    decode_event,
    decode_persona,
    decode_record,
    decode_request,
)
from streams.mapping import parse_mapping
from streams.records import (
    Action,
    Audience,
    Basis,
    Changes,
    Command,
    Context,
    ControlKind,
    Evidence,
    Explanation,
    Horizon,
    Interest,
    Maturity,
    Model,
    NovelCandidate,
    Persona,
    PersonaInterest,
    PersonaNovel,
    RefreshRequest,
    Rule,
    Tier,
    Traffic,
    UserControl,
    WatchEvent,
    encode,
)

NOW = 1_790_000_000_000
PLAIN: dict[str, Any] = {"user_id": "u1", "video_id": "v1", "ts": NOW - 1_000}
FULL: dict[str, Any] = PLAIN | {
    "event_id": "e1",
    "action": "thumbs_up",
    "watch_ms": 61_000,
    "duration_ms": 120_000,
    "watch_fraction": 1.5,
    "playback_id": "p1",
    "session_id": "s1",
    "surface": "home",
    "autoplay": True,
    "traffic": "bot",
    "audience": "kids",
    "locale": "pt-BR",
    "rec_id": "r1",
    "persona_version": 17,
    "title": "How bees dance",
    "tags": ["bees", "nature"],
    "category": ["Science"],
    "cluster_id": 0,
    "schema_version": 1,
    "a field of tomorrow": {"nested": [1]},
}


def decode(data: object, key: bytes | None = b"u1") -> Decoded[WatchEvent] | Rejected:
    return decode_event(orjson.dumps(data), key, append_time=NOW)


def accepted(data: object, key: bytes | None = b"u1") -> Decoded[WatchEvent]:
    result = decode(data, key)
    assert isinstance(result, Decoded), result
    return result


def reason(result: object) -> str:
    assert isinstance(result, Rejected), result
    return result.reason


def test_a_plain_event_takes_the_defaults() -> None:
    assert accepted(PLAIN) == Decoded(WatchEvent("u1", "v1", NOW - 1_000))


def test_every_field_is_read() -> None:
    assert accepted(FULL).record == WatchEvent(
        user_id="u1",
        video_id="v1",
        ts=NOW - 1_000,
        event_id="e1",
        action=Action.THUMBS_UP,
        watch_ms=61_000,
        duration_ms=120_000,
        watch_fraction=1.5,
        playback_id="p1",
        session_id="s1",
        surface="home",
        autoplay=True,
        traffic=Traffic.BOT,
        audience=Audience.KIDS,
        locale="pt-BR",
        rec_id="r1",
        persona_version=17,
        title="How bees dance",
        tags=("bees", "nature"),
        category=("Science",),
        cluster_id=0,
    )
    assert accepted(FULL).clamped == ()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "null_value"),
        (b"", "not_json"),
        (b"user_id=u1", "not_json"),
        (b"\xff\xfe{}", "not_json"),
        (b'{"user_id": "u1", "video_id": "v1", "ts": NaN}', "not_json"),
        (b'{"user_id": "u1", "video_id": "v1", "ts": 1e999}', "not_json"),
        (b'{"user_id": "\\ud800", "video_id": "v1", "ts": 1790000000000}', "not_json"),
        pytest.param(b"[" * 5_000, "not_json", id="unclosed"),
        pytest.param(b'{"a":' * 5_000 + b"1" + b"}" * 5_000, "not_json", id="deep"),
        (b"[]", "not_an_object"),
        (b"null", "not_an_object"),
        (b"17", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"{}", "missing_field"),
    ],
)
def test_what_is_no_object(value: bytes | None, expected: str) -> None:
    assert reason(decode_event(value, b"u1", append_time=NOW)) == expected


@pytest.mark.parametrize("version", [2, 0, -1, "1", True, 1.5, [1], {}])
def test_unknown_schema_version(version: object) -> None:
    assert reason(decode(PLAIN | {"schema_version": version})) == "unknown_schema_version"


@pytest.mark.parametrize("version", [1, 1.0, None])
def test_known_schema_version(version: object) -> None:
    assert accepted(PLAIN | {"schema_version": version}).clamped == ()


@pytest.mark.parametrize("name", ["user_id", "video_id", "ts"])
def test_required_fields(name: str) -> None:
    absent = {key: value for key, value in PLAIN.items() if key != name}
    for data in (absent, PLAIN | {name: None}):
        result = decode(data)
        assert result == Rejected(RejectReason.MISSING_FIELD, f"{name} is missing")


@pytest.mark.parametrize("name", ["event_id", "action", "title", "session_id", "locale", "audience"])
def test_null_and_empty_optional_text_count_as_absent(name: str) -> None:
    """An empty event_id that counted would make all such events duplicates of the first."""
    for value in (None, ""):
        assert accepted(PLAIN | {name: value}) == accepted(PLAIN)


TEXTS = ("user_id", "video_id", "event_id", "action", "playback_id", "session_id", "surface", "traffic")
MORE_TEXTS = ("audience", "locale", "rec_id", "title")
WRONG_TYPES: dict[tuple[str, ...], tuple[object, ...]] = {
    (*TEXTS, *MORE_TEXTS): (1, 1.5, True, ["a"], {"a": "b"}),
    ("ts", "watch_ms", "duration_ms", "persona_version", "cluster_id"): ("1790000000000", 0.5, True, [1], {}),
    ("watch_fraction",): ("0.5", "", True, [0.5]),
    ("autoplay",): (0, 1, "true", "", []),
    ("tags", "category"): ("bees", "", {"a": 1}, 1, [1], ["a", None], [["a"]]),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for names, values in WRONG_TYPES.items() for name in names for value in values],
)
def test_wrong_types(name: str, value: object) -> None:
    result = decode(PLAIN | {name: value})
    assert reason(result) == "wrong_type"
    assert isinstance(result, Rejected)
    assert result.detail.startswith(name)


def test_integral_floats_are_integers() -> None:
    event = accepted(PLAIN | {"ts": float(NOW), "watch_ms": 3.0, "watch_fraction": 1}).record
    assert (event.ts, event.watch_ms, event.watch_fraction) == (NOW, 3, 1.0)
    assert [type(value) for value in (event.ts, event.watch_ms, event.watch_fraction)] == [int, int, float]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("user_id", "", "empty_id"),
        ("video_id", "", "empty_id"),
        ("user_id", "u" * 513, "too_long"),
        pytest.param("user_id", "u" * 10_000, "too_long", id="user_id far too long"),
        ("user_id", "é" * 257, "too_long"),
        ("video_id", "v" * 257, "too_long"),
        ("event_id", "e" * 257, "too_long"),
        ("surface", "s" * 65, "too_long"),
        ("user_id", "u\x001", "unprintable_id"),
        ("user_id", "u1\n", "unprintable_id"),
        ("video_id", "v\x1b[31m", "unprintable_id"),
        ("video_id", "v\u2028", "unprintable_id"),
        ("session_id", "s\x7f", "unprintable_id"),
        ("watch_ms", -1, "out_of_range"),
        ("duration_ms", -1, "out_of_range"),
        ("watch_fraction", -0.1, "out_of_range"),
        ("cluster_id", -1, "out_of_range"),
        ("cluster_id", 2**31, "out_of_range"),
        ("persona_version", -1, "out_of_range"),
        ("persona_version", 2**63, "out_of_range"),
        ("persona_version", 1e300, "out_of_range"),
        ("action", "PLAY", "unknown_value"),
        ("action", "impression", "unknown_value"),
        ("traffic", "human", "unknown_value"),
        ("audience", "senior", "unknown_value"),
        ("ts", NOW // 1_000, "ts_not_milliseconds"),
        ("ts", NOW * 1_000, "ts_not_milliseconds"),
        ("ts", NOW * 1_000_000, "ts_not_milliseconds"),
        ("ts", 1e300, "ts_not_milliseconds"),
        ("ts", 0, "ts_not_milliseconds"),
        ("ts", -NOW, "ts_not_milliseconds"),
    ],
)
def test_unusable_values(field: str, value: object, expected: str) -> None:
    data = PLAIN | {field: value}
    user_id = data["user_id"]
    assert reason(decode(data, user_id.encode())) == expected


@pytest.mark.parametrize("user_id", ["u" * 512, "é" * 256, "名前", "a b", "👩‍🚀", "\u00ad-soft"])
def test_usable_user_ids(user_id: str) -> None:
    assert accepted(PLAIN | {"user_id": user_id}, user_id.encode()).record.user_id == user_id


@pytest.mark.parametrize("key", [None, b"", b"u2", b'"u1"', b"u1 ", b"\xff", "ü1".encode("latin-1")])
def test_a_key_that_is_not_the_user_id(key: bytes | None) -> None:
    assert reason(decode(PLAIN, key)) == "key_mismatch"


@pytest.mark.parametrize(
    ("ts", "hint"), [(NOW // 1_000, "seconds"), (NOW * 1_000, "microseconds"), (NOW * 10**6, "nanoseconds")]
)
def test_the_unit_of_a_wrong_ts_is_named(ts: int, hint: str) -> None:
    result = decode(PLAIN | {"ts": ts})
    assert isinstance(result, Rejected)
    assert f"looks like {hint}" in result.detail


@pytest.mark.parametrize("ahead", [0, 1, 300_000])
def test_a_clock_a_little_ahead_is_believed(ahead: int) -> None:
    result = accepted(PLAIN | {"ts": NOW + ahead})
    assert (result.record.ts, result.clamped) == (NOW + ahead, ())


@pytest.mark.parametrize("ahead", [300_001, 10 * 365 * 86_400_000])
def test_the_far_future_is_clamped_to_the_append_time(ahead: int) -> None:
    result = accepted(PLAIN | {"ts": NOW + ahead})
    assert (result.record.ts, result.clamped) == (NOW, ("ts",))


def test_history_is_accepted() -> None:
    assert accepted(PLAIN | {"ts": 1_362_064_104_000}) == Decoded(WatchEvent("u1", "v1", 1_362_064_104_000))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("watch_ms", 86_400_001, 86_400_000),
        ("watch_ms", 2**63, 86_400_000),
        ("watch_ms", 1e300, 86_400_000),
        ("duration_ms", 0, None),
        ("duration_ms", 604_800_001, None),
        ("watch_fraction", 1_000.5, 1_000.0),
        pytest.param("title", "t" * 1_001, "t" * 1_000, id="title far too long"),
        ("title", "a\x1b[31mb", "a [31mb"),
        ("title", "a\r\nb", "a  b"),
        ("tags", [str(number) for number in range(33)], tuple(str(number) for number in range(32))),
        ("category", ["c" * 101, "b"], ("c" * 100, "b")),
    ],
)
def test_clamped_values(field: str, value: object, expected: object) -> None:
    result = accepted(PLAIN | {field: value})
    assert getattr(result.record, field) == expected
    assert result.clamped == (field,)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("watch_ms", 0),
        ("watch_ms", 86_400_000),
        ("duration_ms", 1),
        ("duration_ms", 604_800_000),
        ("watch_fraction", 0.0),
    ],
)
def test_values_at_the_edge_are_kept(field: str, value: object) -> None:
    result = accepted(PLAIN | {field: value})
    assert (getattr(result.record, field), result.clamped) == (value, ())


def test_blank_texts_are_absent() -> None:
    assert accepted(PLAIN | {"title": "  ", "tags": ["", " a "]}).record == replace(accepted(PLAIN).record, tags=("a",))


def test_the_last_of_duplicate_keys_counts() -> None:
    value = b'{"user_id": "u2", "video_id": "v1", "ts": 1790000000000, "user_id": "u1"}'
    result = decode_event(value, b"u1", append_time=NOW)
    assert isinstance(result, Decoded)
    assert result.record.user_id == "u1"


def test_details_are_short_and_printable() -> None:
    hostile = "\x1b]0;owned\x07" + "é" * 9_000
    for data in (PLAIN | {"action": hostile}, PLAIN | {"user_id": hostile}, {"user_id": {"deep": hostile}}):
        result = decode(data)
        assert isinstance(result, Rejected)
        assert len(result.detail) <= MAXIMUM_DETAIL
        assert result.detail.isascii()
        assert result.detail.isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def check_result(result: Decoded[WatchEvent] | Rejected, key: bytes | None) -> None:
    if isinstance(result, Rejected):
        assert len(result.detail) <= MAXIMUM_DETAIL
        assert result.detail.isprintable()
        return
    event = result.record
    assert event.user_id.encode() == key
    assert event.video_id
    assert 10**11 <= event.ts <= NOW + 300_000
    assert event.watch_ms is None or 0 <= event.watch_ms <= 86_400_000
    assert event.duration_ms is None or 0 < event.duration_ms <= 604_800_000
    assert event.watch_fraction is None or 0 <= event.watch_fraction <= 1_000
    assert len(event.tags) <= 32
    again = decode_event(encode(event), key, append_time=NOW)
    assert again == Decoded(event), "a decoded event is its own normal form"


@given(value=st.binary(max_size=300), key=st.none() | st.binary(max_size=8))
def test_any_bytes_give_a_result(value: bytes, key: bytes | None) -> None:
    check_result(decode_event(value, key, append_time=NOW), key)
    assert isinstance(decode_control(value, key, append_time=NOW), Decoded | Rejected)
    assert isinstance(decode_request(value), RefreshRequest | Rejected)


@given(data=json_values)
def test_any_json_gives_a_result(data: object) -> None:
    value = orjson.dumps(data, option=orjson.OPT_NON_STR_KEYS) if _encodable(data) else b"{}"
    check_result(decode_event(value, b"u1", append_time=NOW), b"u1")
    assert isinstance(decode_request(value), RefreshRequest | Rejected)


@settings(max_examples=400)
@given(data=st.fixed_dictionaries({}, optional=dict.fromkeys([*FULL, "schema_version"], json_values)))
def test_any_value_in_any_field_gives_a_result(data: dict[str, object]) -> None:
    if _encodable(data):
        check_result(decode(PLAIN | data), b"u1")


usable_values = st.fixed_dictionaries(
    {},
    optional={
        "ts": st.integers(10**11, 10**14 - 1) | st.floats(1e11, 9e13).map(round),
        "action": st.sampled_from(list(Action)),
        "watch_ms": st.integers(0, 2**63),
        "duration_ms": st.integers(0, 2**40),
        "watch_fraction": st.floats(0, 2_000),
        "title": st.text(max_size=1_200),
        "tags": st.lists(st.text(max_size=120), max_size=40),
        "session_id": st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=60),
        "cluster_id": st.integers(0, 2**31 - 1),
    },
)


@given(data=usable_values)
def test_values_in_range_are_accepted(data: dict[str, object]) -> None:
    if _encodable(data):
        check_result(accepted(PLAIN | data), b"u1")


def _encodable(data: object) -> bool:
    try:
        orjson.dumps(data)
    except TypeError:  # a lone surrogate, which JSON bytes cannot hold
        return False
    return True


class TestDecoderHook:
    """A decoder of another format may give what JSON cannot hold, or raise."""

    def test_its_mapping_is_used(self) -> None:
        result = decode_event(b"\x00avro", b"u1", append_time=NOW, decoder=lambda value: dict(PLAIN))
        assert result == accepted(PLAIN)

    @pytest.mark.parametrize("given_instead", [None, 17, "text", [1]])
    def test_no_mapping(self, given_instead: Any) -> None:
        result = decode_event(b"x", b"u1", append_time=NOW, decoder=lambda value: given_instead)
        assert reason(result) == "decoder_failed"

    def test_it_raises(self) -> None:
        def decoder(value: bytes) -> dict[str, object]:
            raise KeyError("magic byte\x1b" * 100)

        result = decode_event(b"x", b"u1", append_time=NOW, decoder=decoder)
        assert isinstance(result, Rejected)
        assert (result.reason, result.detail[:8]) == ("decoder_failed", "KeyError")
        assert len(result.detail) <= MAXIMUM_DETAIL
        assert result.detail.isprintable()

    @pytest.mark.parametrize(
        ("field", "value", "expected"),
        [
            ("watch_fraction", float("nan"), "out_of_range"),
            ("watch_ms", float("nan"), "wrong_type"),
            ("watch_ms", float("inf"), "wrong_type"),
            pytest.param("watch_ms", -(10**5_000), "out_of_range", id="huge negative"),
            pytest.param("ts", 10**5_000, "ts_not_milliseconds", id="huge"),
            ("video_id", "v\ud800", "unprintable_id"),
            ("video_id", b"v1", "wrong_type"),
            ("tags", {"a", "b"}, "wrong_type"),
            ("schema_version", b"1", "unknown_schema_version"),
        ],
    )
    def test_values_that_json_cannot_hold(self, field: str, value: object, expected: str) -> None:
        result = decode_event(b"x", b"u1", append_time=NOW, decoder=lambda _: PLAIN | {field: value})
        assert reason(result) == expected

    def test_an_infinite_fraction_and_a_surrogate_in_a_title_are_clamped(self) -> None:
        data = PLAIN | {"watch_fraction": float("inf"), "title": "a\udfffb"}
        result = decode_event(b"x", b"u1", append_time=NOW, decoder=lambda _: data)
        assert isinstance(result, Decoded)
        assert (result.record.watch_fraction, result.record.title) == (1_000.0, "a b")
        assert set(result.clamped) == {"watch_fraction", "title"}

    def test_decoder_then_mapping(self) -> None:
        mapping = parse_mapping(b'{"user_id": "who", "video_id": "what.id", "ts": {"path": "at", "scale": 1000}}')
        data = {"who": "u1", "what": {"id": "v1"}, "at": NOW // 1_000 - 1}
        result = decode_event(b"x", b"u1", append_time=NOW, mapping=mapping, decoder=lambda _: data)
        assert result == Decoded(WatchEvent("u1", "v1", NOW - 1_000))


CONTROL: dict[str, Any] = {"control_id": "c1", "user_id": "u1", "kind": "erase", "ts": NOW}


def control(data: dict[str, Any], key: bytes | None = b"u1") -> Decoded[UserControl] | Rejected:
    return decode_control(orjson.dumps(data), key, append_time=NOW)


class TestControls:
    @pytest.mark.parametrize("kind", ["opt_out", "opt_in", "clear_history", "erase"])
    def test_kinds_without_a_target(self, kind: str) -> None:
        """A target that the kind has no use for is left out, whatever it holds."""
        expected = Decoded(UserControl("c1", "u1", ControlKind(kind), NOW))
        assert control(CONTROL | {"kind": kind}) == expected
        assert control(CONTROL | {"kind": kind, "cluster_id": "x", "video_id": 3}) == expected

    @pytest.mark.parametrize("kind", ["hide", "unhide", "pin", "unpin"])
    def test_kinds_of_a_cluster(self, kind: str) -> None:
        result = control(CONTROL | {"kind": kind, "cluster_id": 7})
        assert result == Decoded(UserControl("c1", "u1", ControlKind(kind), NOW, cluster_id=7))
        assert reason(control(CONTROL | {"kind": kind})) == "missing_field"
        assert reason(control(CONTROL | {"kind": kind, "cluster_id": -1})) == "out_of_range"

    def test_forget_video(self) -> None:
        result = control(CONTROL | {"kind": "forget_video", "video_id": "v1"})
        assert result == Decoded(UserControl("c1", "u1", ControlKind.FORGET_VIDEO, NOW, video_id="v1"))
        assert reason(control(CONTROL | {"kind": "forget_video"})) == "missing_field"

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"kind": "delete"}, "unknown_value"),
            ({"kind": 1}, "wrong_type"),
            ({"control_id": ""}, "empty_id"),
            ({"control_id": None}, "missing_field"),
            ({"user_id": "u2"}, "key_mismatch"),
            ({"ts": NOW // 1_000}, "ts_not_milliseconds"),
            ({"schema_version": 2}, "unknown_schema_version"),
        ],
    )
    def test_unusable(self, change: dict[str, Any], expected: str) -> None:
        assert reason(control(CONTROL | change)) == expected

    def test_no_value(self) -> None:
        assert reason(decode_control(None, b"u1", append_time=NOW)) == "null_value"

    def test_the_future_is_clamped(self) -> None:
        result = control(CONTROL | {"ts": NOW * 2})
        assert isinstance(result, Decoded)
        assert (result.record.ts, result.clamped) == (NOW, ("ts",))


EXPLANATION = Explanation(
    Rule.DRIFT, 0.07, 0.06, 42, 0.3, 0.2, risen=((3, "Bees", 0.1, 0.4),), fallen=((4, "Cars", 0.5, 0.1),)
)
BASIS = Basis(events=80, n_eff=31.5, first_ts=NOW - 10**9, last_ts=NOW)
REQUEST = RefreshRequest(
    request_id="0" * 32,
    user_id="u1",
    epoch=0,
    sequence=4,
    as_of=NOW,
    rule=Rule.DRIFT,
    expires_after_ms=3_600_000,
    registry_version=2,
    context=Context(
        maturity=Maturity.MATURE,
        basis=BASIS,
        interests=(
            Interest(
                "a" * 16, 3, "Bees", 0.4, 40, Horizon.SHORT, 1, 0.9, NOW, "bees and honey",
                titles=("How bees dance",), evidence=(Evidence("v1", NOW),),
            ),
        ),
        novel=(NovelCandidate(5, "Gardens", "city gardens", 1.4, 0.5, (3,), ("Bees",), ("A garden",)),),
        avoid=(9,),
        explanation=EXPLANATION,
        audience=Audience.ADULT,
    ),
)  # fmt: skip
PERSONA = Persona(
    user_id="u1",
    epoch=0,
    version=34,
    previous_version=None,
    request_id="0" * 32,
    as_of=NOW,
    generated_at=NOW + 5,
    tier=Tier.STUDENT,
    cached=False,
    language="en",
    maturity=Maturity.MATURE,
    basis=BASIS,
    model=Model("student", "1", "ab", 300, 80, 1_800),
    summary="Watches bees.",
    interests=(
        PersonaInterest(
            "a" * 16, 3, "Bees", 0.4, Horizon.SHORT, 1, "Bees up close.", "bees and honey", 0.9,
            (Evidence("v1", NOW),), NOW,
        ),
    ),
    novel=(PersonaNovel(5, "Gardens", "Bees live there.", "city gardens", (3,), 1.4, 0.5),),
    avoid=(9,),
    changes=Changes(added=("a" * 16,)),
    rule=Rule.DRIFT,
    registry_version=2,
    explanation=EXPLANATION,
)  # fmt: skip


class TestOwnRecords:
    @pytest.mark.parametrize(
        "request_", [REQUEST, replace(REQUEST, context=None, command=Command.ERASE, tier_limit=Tier.TEMPLATE)]
    )
    def test_a_request_comes_back_as_it_was(self, request_: RefreshRequest) -> None:
        assert decode_request(encode(request_)) == request_

    def test_a_persona_comes_back_as_it_was(self) -> None:
        assert decode_persona(encode(PERSONA)) == PERSONA

    def test_fields_with_defaults_may_be_absent_and_unknown_ones_are_ignored(self) -> None:
        data = orjson.loads(encode(PERSONA))
        del data["explanation"], data["interests"][0]["pinned"]
        data["interests"][0]["of tomorrow"] = 1
        assert decode_persona(orjson.dumps(data)) == replace(PERSONA, explanation=None)

    @pytest.mark.parametrize(
        ("path", "value", "expected", "place"),
        [
            (["context"], None, "missing_field", "context"),
            (["sequence"], "4", "wrong_type", "sequence"),
            (["sequence"], True, "wrong_type", "sequence"),
            (["sequence"], 1e300, "out_of_range", "sequence"),
            (["rule"], "boredom", "unknown_value", "rule"),
            (["schema_version"], 2, "unknown_schema_version", "schema_version"),
            (["user_id"], None, "wrong_type", "user_id"),
            (["context", "interests"], {}, "wrong_type", "context.interests"),
            (
                ["context", "interests", 0, "evidence", 0, "ts"],
                "x",
                "wrong_type",
                "context.interests[0].evidence[0].ts",
            ),
            (["context", "novel", 0, "lift"], "x", "wrong_type", "context.novel[0].lift"),
            (
                ["context", "explanation", "risen", 0],
                [3, "Bees", 0.1],
                "wrong_type",
                "context.explanation.risen[0]",
            ),
            (["context", "interests", 0, "pinned"], 1, "wrong_type", "context.interests[0].pinned"),
            (["context", "basis"], 1, "wrong_type", "context.basis"),
        ],
    )
    def test_a_wrong_request_is_rejected_with_its_place(
        self, path: list[Any], value: object, expected: str, place: str
    ) -> None:
        data = orjson.loads(encode(REQUEST))
        target = data
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = value
        result = decode_request(orjson.dumps(data))
        assert isinstance(result, Rejected)
        assert (result.reason, result.detail.startswith(place)) == (expected, True), result

    @pytest.mark.parametrize("name", ["request_id", "user_id", "epoch", "sequence", "registry_version"])
    def test_a_request_lacks_a_field(self, name: str) -> None:
        data = orjson.loads(encode(REQUEST))
        del data[name]
        assert decode_request(orjson.dumps(data)) == Rejected(RejectReason.MISSING_FIELD, f"{name} is missing")

    def test_a_request_without_value(self) -> None:
        assert reason(decode_request(None)) == "null_value"

    def test_an_unreadable_persona_says_why(self) -> None:
        with pytest.raises(UnreadableRecordError, match=r"not a Persona: missing_field: user_id is missing"):
            decode_persona(b"{}")
        with pytest.raises(UnreadableRecordError, match="not_json"):
            decode_record(Persona, b"garbage")
