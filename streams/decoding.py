"""From untrusted bytes to records: pure, and every input gives a record or the reason against it.

What becomes of a watch event (controls follow the same rules where they have the field):

| input | result |
| --- | --- |
| null value | `null_value` |
| not JSON, NaN or Infinity, invalid UTF-8, lone surrogates, nested too deep | `not_json` |
| JSON that is not an object | `not_an_object` |
| the configured decoder raises, or returns no mapping | `decoder_failed` |
| the same key twice in one object | accepted, the last one counts |
| unknown fields | ignored |
| `schema_version` other than 1 (absent or null means 1) | `unknown_schema_version` |
| `user_id`, `video_id` or `ts` absent or null; for a control what its kind needs | `missing_field` |
| null in an optional field, empty optional text | accepted, as if absent |
| wrong JSON type; a boolean or a string for a number; 3.5 for an integer | `wrong_type` |
| 3.0 or 3e0 for an integer | accepted |
| empty `user_id` or `video_id` | `empty_id` |
| `user_id` above 512 bytes, another id above 256, `surface` or `locale` above 64 (UTF-8) | `too_long` |
| control characters or line separators in an id, `surface` or `locale` | `unprintable_id` |
| key absent, or other bytes than the UTF-8 of `user_id` | `key_mismatch` |
| ts below 10^11 (seconds) or from 10^14 (micro- or nanoseconds), zero or negative | `ts_not_milliseconds` |
| ts more than 5 minutes after the append time | clamped to the append time |
| ts long ago | accepted: late is relative to the viewer's own events, which the handler knows |
| negative `watch_ms`, `duration_ms` or `watch_fraction`; NaN | `out_of_range` |
| `watch_ms` above 24 hours | clamped to 24 hours |
| `duration_ms` of 0 or above 7 days | clamped: taken as unknown |
| `watch_fraction` above 1,000 | clamped to 1,000 |
| `cluster_id` outside 0 .. 2^31 - 1, `persona_version` outside 0 .. 2^63 - 1 | `out_of_range` |
| unknown action, traffic, audience or control kind | `unknown_value` |
| `title` above 1,000 characters, more than 32 tags or categories, one above 100 | clamped: cut |
| control characters in a title, tag or category | clamped: each becomes a space |

`too_late` and `too_large` are given by the handlers; they are listed here because dead letters carry them.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Final, Generic, TypeVar, cast, get_args, get_origin, get_type_hints
from unicodedata import category as unicode_category

import orjson

from streams.mapping import FieldMapping
from streams.records import (
    SCHEMA_VERSION,
    Action,
    Audience,
    Command,
    ControlKind,
    Persona,
    RefreshRequest,
    Traffic,
    UserControl,
    WatchEvent,
)

FUTURE_TOLERANCE_MS: Final = 5 * 60_000
"""An event may be this far ahead of its append time before its ts is clamped."""
EARLIEST_TS: Final = 10**11
LATEST_TS: Final = 10**14 - 1
"""Between the two a number of milliseconds is a date from 1973 to 5138; outside it is another unit."""
MAXIMUM_WATCH_MS: Final = 24 * 3_600_000
MAXIMUM_DURATION_MS: Final = 7 * 24 * 3_600_000
MAXIMUM_WATCH_FRACTION: Final = 1_000.0
MAXIMUM_USER_ID_BYTES: Final = 512
MAXIMUM_ID_BYTES: Final = 256
MAXIMUM_NAME_BYTES: Final = 64
MAXIMUM_TITLE: Final = 1_000
MAXIMUM_TAGS: Final = 32
MAXIMUM_TAG: Final = 100
MAXIMUM_DETAIL: Final = 200

_UNPRINTABLE: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})

T = TypeVar("T")


class RejectReason(StrEnum):
    """Why a record became a dead letter."""

    NULL_VALUE = "null_value"
    NOT_JSON = "not_json"
    NOT_AN_OBJECT = "not_an_object"
    DECODER_FAILED = "decoder_failed"
    UNKNOWN_SCHEMA_VERSION = "unknown_schema_version"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    EMPTY_ID = "empty_id"
    TOO_LONG = "too_long"
    UNPRINTABLE_ID = "unprintable_id"
    KEY_MISMATCH = "key_mismatch"
    TS_NOT_MILLISECONDS = "ts_not_milliseconds"
    OUT_OF_RANGE = "out_of_range"
    UNKNOWN_VALUE = "unknown_value"
    TOO_LATE = "too_late"
    TOO_LARGE = "too_large"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that cannot be used. `detail` is printable ASCII, at most 200 characters, for people."""

    reason: RejectReason
    detail: str


@dataclass(frozen=True, slots=True)
class Decoded(Generic[T]):
    """A usable record. `clamped` names the fields whose value was brought into range."""

    record: T
    clamped: tuple[str, ...] = ()


class UnreadableRecordError(ValueError):
    """One of our own records cannot be read; the message says where and why."""


class _UnusableError(Exception):
    """Carries a reason out of the field checks; never leaves this module."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(detail)
        self.rejected = Rejected(reason, detail[:MAXIMUM_DETAIL])


Decoder = Callable[[bytes], Mapping[str, object]]
"""Turns a value of another format (Avro, Protobuf) into what JSON would give, dicts and lists. May raise."""


def decode_event(
    value: bytes | None,
    key: bytes | None,
    *,
    append_time: int,
    mapping: FieldMapping | None = None,
    decoder: Decoder | None = None,
) -> Decoded[WatchEvent] | Rejected:
    """A watch event from a record's value and key. `append_time` is the broker's, in milliseconds."""
    try:
        data = _object(value, decoder)
        if mapping is not None:
            data = mapping.apply(data)
        return _event(data, key, append_time)
    except _UnusableError as unusable:
        return unusable.rejected


def decode_control(value: bytes | None, key: bytes | None, *, append_time: int) -> Decoded[UserControl] | Rejected:
    """A viewer's control from a record's value and key. `append_time` is the broker's, in milliseconds."""
    try:
        return _control(_object(value, None), key, append_time)
    except _UnusableError as unusable:
        return unusable.rejected


def decode_request(value: bytes | None) -> RefreshRequest | Rejected:
    """A refresh request, every nested field checked. A refresh has a context; a removal needs none."""
    try:
        request = _own_record(RefreshRequest, value)
        if request.command is Command.REFRESH and request.context is None:
            raise _UnusableError(RejectReason.MISSING_FIELD, "context: a refresh request needs one")
    except _UnusableError as unusable:
        return unusable.rejected
    return request


def decode_persona(value: bytes) -> Persona:
    """A persona as it was published or stored. Raises UnreadableRecordError."""
    return decode_record(Persona, value)


def decode_record(kind: type[T], value: bytes) -> T:
    """A record that this project wrote, any dataclass of `streams.records`. Raises UnreadableRecordError."""
    try:
        return _own_record(kind, value)
    except _UnusableError as unusable:
        rejected = unusable.rejected
        raise UnreadableRecordError(f"not a {kind.__name__}: {rejected.reason}: {rejected.detail}") from None


def _object(value: bytes | None, decoder: Decoder | None) -> dict[str, object]:
    if value is None:
        raise _UnusableError(RejectReason.NULL_VALUE, "the record has no value")
    if decoder is not None:
        return _decoded_by(decoder, value)
    try:
        data = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise _UnusableError(RejectReason.NOT_JSON, printable(str(error))) from None
    if type(data) is not dict:
        raise _UnusableError(RejectReason.NOT_AN_OBJECT, f"expected a JSON object, found {_type_name(data)}")
    return data


def _decoded_by(decoder: Decoder, value: bytes) -> dict[str, object]:
    try:
        return dict(decoder(value))
    except Exception as error:  # the decoder is the operator's: whatever it raises concerns this record only
        detail = printable(f"{type(error).__name__}: {error}")
        raise _UnusableError(RejectReason.DECODER_FAILED, detail) from None


def _event(data: dict[str, object], key: bytes | None, append_time: int) -> Decoded[WatchEvent]:
    _check_version(data)
    clamped: list[str] = []
    user_id = _user_id(data, key)
    video_id = _required_id(data, "video_id")
    ts = _timestamp(data, append_time, clamped)
    given: dict[str, Any] = {}
    for name, field_value in data.items():
        check = _EVENT_FIELDS.get(name)
        if check is None or field_value is None:
            continue
        if type(field_value) is str and not field_value and name in _TEXT_FIELDS:
            continue
        given[name] = check(field_value, name, clamped)
    return Decoded(WatchEvent(user_id, video_id, ts, **given), tuple(clamped))


def _control(data: dict[str, object], key: bytes | None, append_time: int) -> Decoded[UserControl]:
    _check_version(data)
    clamped: list[str] = []
    user_id = _user_id(data, key)
    kind: ControlKind = _check_kind(_required(data, "kind"), "kind", clamped)
    control = UserControl(
        control_id=_required_id(data, "control_id"),
        user_id=user_id,
        kind=kind,
        ts=_timestamp(data, append_time, clamped),
        cluster_id=_check_cluster(_required(data, "cluster_id"), "cluster_id", clamped)
        if kind in _CLUSTER_CONTROLS
        else None,
        video_id=_required_id(data, "video_id") if kind is ControlKind.FORGET_VIDEO else None,
    )
    return Decoded(control, tuple(clamped))


_CLUSTER_CONTROLS: Final = frozenset({ControlKind.HIDE, ControlKind.UNHIDE, ControlKind.PIN, ControlKind.UNPIN})


def _check_version(data: dict[str, object]) -> None:
    version = data.get("schema_version")
    if version is None or (type(version) in (int, float) and version == SCHEMA_VERSION):
        return
    detail = f"schema_version {_shown(version)}: this release reads {SCHEMA_VERSION}"
    raise _UnusableError(RejectReason.UNKNOWN_SCHEMA_VERSION, detail)


def _required(data: dict[str, object], name: str) -> object:
    value = data.get(name)
    if value is None:
        raise _UnusableError(RejectReason.MISSING_FIELD, f"{name} is missing")
    return value


def _user_id(data: dict[str, object], key: bytes | None) -> str:
    user_id = _required(data, "user_id")
    encoded = _id_bytes(user_id, "user_id", MAXIMUM_USER_ID_BYTES)
    if encoded != key:
        raise _UnusableError(RejectReason.KEY_MISMATCH, f"user_id {_shown(user_id)}, key {_shown(key)}")
    return user_id  # type: ignore[return-value]  # _id_bytes refused all but text


def _required_id(data: dict[str, object], name: str) -> str:
    value = _required(data, name)
    _id_bytes(value, name, MAXIMUM_ID_BYTES)
    return value  # type: ignore[return-value]  # _id_bytes refused all but text


def _id_bytes(value: object, name: str, limit: int) -> bytes:
    """The id's UTF-8 bytes, once it is known to be usable."""
    if not isinstance(value, str):
        raise _wrong_type(name, "a string", value)
    if not value:
        raise _UnusableError(RejectReason.EMPTY_ID, f"{name} is empty")
    # isprintable is quick but also refuses what is merely unassigned or invisible, so it only clears the
    # common case
    if not value.isprintable() and any(unicode_category(character) in _UNPRINTABLE for character in value):
        raise _UnusableError(RejectReason.UNPRINTABLE_ID, f"{name} {_shown(value)} has control characters")
    encoded = value.encode()
    if len(encoded) > limit:
        raise _UnusableError(RejectReason.TOO_LONG, f"{name} has {len(encoded)} bytes, more than {limit}")
    return encoded


def _timestamp(data: dict[str, object], append_time: int, clamped: list[str]) -> int:
    value = _required(data, "ts")
    ts = value if type(value) is int else _integer(value, "ts")
    if not EARLIEST_TS <= ts <= LATEST_TS:
        hint = _unit_hint(ts)
        raise _UnusableError(RejectReason.TS_NOT_MILLISECONDS, f"ts {_shown(ts)} {hint}; send milliseconds, UTC")
    if ts > append_time + FUTURE_TOLERANCE_MS:
        clamped.append("ts")
        return append_time
    return ts


def _unit_hint(ts: int) -> str:
    if ts <= 0:
        return "is not after 1970"
    if ts < EARLIEST_TS:
        return "looks like seconds"
    return "looks like microseconds" if ts < 10**17 else "looks like nanoseconds"


def _integer(value: object, name: str) -> int:
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer():
        return int(value)
    raise _wrong_type(name, "an integer", value)


def _wrong_type(name: str, expected: str, value: object) -> _UnusableError:
    return _UnusableError(RejectReason.WRONG_TYPE, f"{name} must be {expected}, found {_type_name(value)}")


# The checks of optional fields: (value, field name, names of clamped fields to add to) -> the record's value.


def _id_check(limit: int) -> Callable[[object, str, list[str]], Any]:
    def check(value: object, name: str, clamped: list[str]) -> Any:  # noqa: ANN401
        _id_bytes(value, name, limit)
        return value

    return check


def _choice_check(choices: type[StrEnum]) -> Callable[[object, str, list[str]], Any]:
    known = {choice.value: choice for choice in choices}

    def check(value: object, name: str, clamped: list[str]) -> Any:  # noqa: ANN401
        if not isinstance(value, str):
            raise _wrong_type(name, "a string", value)
        choice = known.get(value)
        if choice is None:
            detail = f"{name} {_shown(value)} is not one of {', '.join(known)}"
            raise _UnusableError(RejectReason.UNKNOWN_VALUE, detail)
        return choice

    return check


def _range_check(maximum: int) -> Callable[[object, str, list[str]], Any]:
    def check(value: object, name: str, clamped: list[str]) -> Any:  # noqa: ANN401
        number = _integer(value, name)
        if not 0 <= number <= maximum:
            raise _UnusableError(RejectReason.OUT_OF_RANGE, f"{name} {_shown(number)} is outside 0 to {maximum}")
        return number

    return check


def _texts_check(value: object, name: str, clamped: list[str]) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong_type(name, "a list of strings", value)
    texts = tuple([_text(item, name, MAXIMUM_TAG, clamped) for item in value[:MAXIMUM_TAGS]])
    if len(value) > MAXIMUM_TAGS and name not in clamped:
        clamped.append(name)
    return tuple([text for text in texts if text])


def _check_title(value: object, name: str, clamped: list[str]) -> str | None:
    return _text(value, name, MAXIMUM_TITLE, clamped) or None


def _text(value: object, name: str, limit: int, clamped: list[str]) -> str:
    if not isinstance(value, str):
        raise _wrong_type(name, "a string" if name == "title" else "a list of strings", value)
    text = value[:limit]
    if not text.isprintable():
        text = "".join([" " if unicode_category(char) in _UNPRINTABLE else char for char in text])
    if text != value and name not in clamped:
        clamped.append(name)
    return text.strip()


def _check_watch(value: object, name: str, clamped: list[str]) -> int:
    watch_ms = _not_negative(_integer(value, name), name)
    if watch_ms > MAXIMUM_WATCH_MS:
        clamped.append(name)
        return MAXIMUM_WATCH_MS
    return watch_ms


def _check_duration(value: object, name: str, clamped: list[str]) -> int | None:
    duration_ms = _not_negative(_integer(value, name), name)
    if duration_ms == 0 or duration_ms > MAXIMUM_DURATION_MS:
        clamped.append(name)
        return None
    return duration_ms


def _check_fraction(value: object, name: str, clamped: list[str]) -> float:
    if type(value) is not float and type(value) is not int:
        raise _wrong_type(name, "a number", value)
    if not value >= 0:  # also refuses NaN, which a decoder may give
        raise _UnusableError(RejectReason.OUT_OF_RANGE, f"{name} {_shown(value)} is not 0 or more")
    if value > MAXIMUM_WATCH_FRACTION:
        clamped.append(name)
        return MAXIMUM_WATCH_FRACTION
    return float(value)


def _not_negative(number: int, name: str) -> int:
    if number < 0:
        raise _UnusableError(RejectReason.OUT_OF_RANGE, f"{name} {_shown(number)} is negative")
    return number


def _check_flag(value: object, name: str, clamped: list[str]) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(name, "true or false", value)
    return value


_check_cluster = _range_check(2**31 - 1)
_check_kind = _choice_check(ControlKind)

_EVENT_FIELDS: Final[dict[str, Callable[[object, str, list[str]], Any]]] = {
    "event_id": _id_check(MAXIMUM_ID_BYTES),
    "action": _choice_check(Action),
    "watch_ms": _check_watch,
    "duration_ms": _check_duration,
    "watch_fraction": _check_fraction,
    "playback_id": _id_check(MAXIMUM_ID_BYTES),
    "session_id": _id_check(MAXIMUM_ID_BYTES),
    "surface": _id_check(MAXIMUM_NAME_BYTES),
    "autoplay": _check_flag,
    "traffic": _choice_check(Traffic),
    "audience": _choice_check(Audience),
    "locale": _id_check(MAXIMUM_NAME_BYTES),
    "rec_id": _id_check(MAXIMUM_ID_BYTES),
    "persona_version": _range_check(2**63 - 1),
    "title": _check_title,
    "tags": _texts_check,
    "category": _texts_check,
    "cluster_id": _check_cluster,
}


_TEXT_FIELDS: Final = _EVENT_FIELDS.keys() - {
    "watch_ms", "duration_ms", "watch_fraction", "autoplay", "persona_version", "tags", "category", "cluster_id",
}  # fmt: skip
"""Optional texts; an empty one says nothing."""


def printable(text: str) -> str:
    """`text` as printable ASCII, escaped, at most 200 characters: safe in logs, terminals and JSON."""
    return ascii(text[:MAXIMUM_DETAIL])[1:-1][:MAXIMUM_DETAIL]


def _shown(value: object) -> str:
    """A short, safe picture of an untrusted value."""
    if isinstance(value, str | bytes):
        return ascii(value[:40])[:60] + ("..." if len(value) > 40 else "")
    # turning a huge number into digits is slow, or refused
    if isinstance(value, int) and abs(value) >= 2**64:
        return "beyond 64 bits"
    if value is None or isinstance(value, int | float):
        return repr(value)
    return _type_name(value)


_TYPE_NAMES: Final = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "an integer",
}


def _type_name(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"the number {value!r}"
    return _TYPE_NAMES.get(type(value)) or printable(type(value).__name__)


# Our own records: one strict reader per type, built from its annotations.

_Reader = Callable[[object, str], Any]


def _own_record(kind: type[T], value: bytes | None) -> T:
    data = _object(value, None)
    _check_version(data)
    read: _Reader = _reader(cast(Any, kind))
    return cast(T, read(data, ""))


@cache
def _reader(hint: Any) -> _Reader:  # noqa: ANN401
    if is_dataclass(hint):
        return _dataclass_reader(hint)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        choice = _choice_check(hint)
        return lambda value, path: choice(value, path, [])
    if hint is int:
        return _integer_64
    if hint is float:
        return _number
    if hint in (str, bool):
        return _exactly(hint)
    if get_origin(hint) is tuple:
        return _tuple_reader(get_args(hint))
    if get_origin(hint) is types.UnionType:
        return _optional_reader(get_args(hint))
    raise TypeError(f"no reader for {hint!r}")


def _dataclass_reader(kind: Any) -> _Reader:  # noqa: ANN401
    hints = get_type_hints(kind)
    readers = {f.name: _reader(hints[f.name]) for f in fields(kind)}
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]

    def read(value: object, path: str) -> Any:  # noqa: ANN401
        if not isinstance(value, dict):
            raise _wrong_type(path, "an object", value)
        prefix = f"{path}." if path else ""
        for name in required:
            if name not in value:
                raise _UnusableError(RejectReason.MISSING_FIELD, f"{prefix}{name} is missing")
        return kind(**{name: readers[name](value[name], prefix + name) for name in readers if name in value})

    return read


def _exactly(kind: type) -> _Reader:
    expected = "a string" if kind is str else "true or false"

    def read(value: object, path: str) -> Any:  # noqa: ANN401
        if not isinstance(value, kind):
            raise _wrong_type(path, expected, value)
        return value

    return read


def _integer_64(value: object, path: str) -> int:
    number = _integer(value, path)
    if abs(number) >= 2**63:
        raise _UnusableError(RejectReason.OUT_OF_RANGE, f"{path} is beyond 64 bits")
    return number


def _number(value: object, path: str) -> float:
    if type(value) is not float and type(value) is not int:
        raise _wrong_type(path, "a number", value)
    return float(value)


def _tuple_reader(arguments: tuple[Any, ...]) -> _Reader:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        item = _reader(arguments[0])

        def read_all(value: object, path: str) -> Any:  # noqa: ANN401
            if not isinstance(value, list):
                raise _wrong_type(path, "a list", value)
            return tuple([item(entry, f"{path}[{index}]") for index, entry in enumerate(value)])

        return read_all
    items = [_reader(argument) for argument in arguments]

    def read_each(value: object, path: str) -> Any:  # noqa: ANN401
        if not isinstance(value, list) or len(value) != len(items):
            raise _wrong_type(path, f"a list of {len(items)}", value)
        return tuple(
            [read(entry, f"{path}[{index}]") for index, (read, entry) in enumerate(zip(items, value, strict=True))]
        )

    return read_each


def _optional_reader(arguments: tuple[Any, ...]) -> _Reader:
    kinds = [argument for argument in arguments if argument is not types.NoneType]
    if len(kinds) != 1:
        raise TypeError(f"no reader for a choice of {kinds!r}")
    item = _reader(kinds[0])
    return lambda value, path: None if value is None else item(value, path)
