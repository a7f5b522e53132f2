"""The schema files describe what is written, and what the decoder takes."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, get_args, get_type_hints

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from streams.dead_letters import dead_letter
from streams.decoding import Decoded, Rejected, RejectReason, decode_control, decode_event, decode_request
from streams.personas import ErasureReceipt, receipt_key
from streams.records import (
    Command,
    ControlKind,
    DeadLetter,
    Persona,
    RefreshRequest,
    Tier,
    UnknownVideo,
    UserControl,
    WatchEvent,
    encode,
)
from tests.unit.test_decoding import CONTROL, FULL, NOW, PERSONA, PLAIN, REQUEST

RECORDS: dict[str, type] = {
    "watch_event": WatchEvent,
    "user_control": UserControl,
    "refresh_request": RefreshRequest,
    "persona": Persona,
    "dead_letter": DeadLetter,
    "unknown_video": UnknownVideo,
    "erasure_receipt": ErasureReceipt,
}
LETTER = dead_letter(
    Rejected(RejectReason.NOT_JSON, "no"), "watch-events", 0, 7, b"k" * 5_000, bytes(range(256)) * 1_000
)
SAMPLES: list[tuple[str, Any]] = [
    ("watch_event", WatchEvent("u1", "v1", NOW)),
    ("user_control", UserControl("c1", "u1", ControlKind.ERASE, NOW)),
    ("user_control", UserControl("c1", "u1", ControlKind.PIN, NOW, cluster_id=3)),
    ("user_control", UserControl("c1", "u1", ControlKind.FORGET_VIDEO, NOW, video_id="v1")),
    ("refresh_request", REQUEST),
    ("refresh_request", replace(REQUEST, command=Command.ERASE, context=None, tier_limit=Tier.TEMPLATE)),
    ("persona", PERSONA),
    ("persona", replace(PERSONA, explanation=None, previous_version=26)),
    ("dead_letter", LETTER),
    ("dead_letter", replace(LETTER, key=None, payload=None, length=0)),
    ("unknown_video", UnknownVideo("v1", None)),
    ("unknown_video", UnknownVideo("v1", "How bees dance", ("bees",), ("Science",))),
    ("erasure_receipt", ErasureReceipt(receipt_key("u1"), 1, 23, "0f" * 16, NOW, ("personas_by_user",))),
]


@cache
def schema(name: str) -> Any:
    return orjson.loads((files("streams") / "schemas" / f"{name}.json").read_bytes())


def valid(name: str, data: object) -> bool:
    return bool(Draft202012Validator(schema(name)).is_valid(data))


def test_there_is_one_schema_per_record() -> None:
    names = {entry.name.removesuffix(".json") for entry in (files("streams") / "schemas").iterdir()}
    assert names == set(RECORDS)


@pytest.mark.parametrize("name", RECORDS)
def test_schemas_are_draft_2020_12(name: str) -> None:
    assert schema(name)["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema(name))


@pytest.mark.parametrize(("name", "record"), SAMPLES)
def test_what_is_written_is_valid(name: str, record: object) -> None:
    errors = [error.message for error in Draft202012Validator(schema(name)).iter_errors(orjson.loads(encode(record)))]
    assert errors == []


@pytest.mark.parametrize(("name", "kind"), RECORDS.items())
def test_schema_and_record_have_the_same_fields_at_every_level(name: str, kind: type) -> None:
    compare_fields(schema(name), schema(name), kind)


def compare_fields(root: dict[str, Any], node: dict[str, Any], kind: Any) -> None:
    described = set(node["properties"])
    assert described - {"schema_version"} == {f.name for f in fields(kind)} - {"schema_version"}, kind
    hints = get_type_hints(kind)
    for name in described & set(hints):
        inner = [hints[name], *get_args(hints[name])]
        for candidate in inner:
            if is_dataclass(candidate):
                compare_fields(root, object_schema(root, node["properties"][name]), candidate)


def object_schema(root: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """The schema of the object behind a reference, a list or a choice."""
    if "$ref" in node:
        return object_schema(root, root["$defs"][node["$ref"].rsplit("/", 1)[1]])
    if "anyOf" in node:
        return object_schema(root, node["anyOf"][0])
    if "items" in node:
        return object_schema(root, node["items"])
    return node


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("refresh_request", {"sequence": "4"}),
        ("refresh_request", {"context": None}),
        ("refresh_request", {"rule": "boredom"}),
        ("refresh_request", {"schema_version": 2}),
    ],
)
def test_request_schema_and_decoder_refuse_the_same(name: str, data: dict[str, Any]) -> None:
    changed = orjson.loads(encode(REQUEST)) | data
    assert not valid(name, changed)
    assert isinstance(decode_request(orjson.dumps(changed)), Rejected)


@pytest.mark.parametrize(
    "change",
    [{"version": "34"}, {"tier": "oracle"}, {"interests": [{}]}, {"basis": None}, {"avoid": ["x"]}],
)
def test_persona_schema_refuses_wrong_personas(change: dict[str, Any]) -> None:
    assert not valid("persona", orjson.loads(encode(PERSONA)) | change)


GOOD: list[dict[str, Any]] = [
    {},
    {"schema_version": None},
    {"schema_version": 1.0},
    {"ts": 1_362_064_104_000},
    {"ts": float(NOW)},
    {"watch_ms": 0, "duration_ms": 0, "watch_fraction": 0},
    {"watch_ms": 10**12, "duration_ms": 10**12, "watch_fraction": 10**6},
    {"title": "t" * 5_000, "tags": ["x" * 200] * 50, "category": []},
    {"title": "a\x1bb"},
    {"event_id": "", "surface": "", "locale": None, "action": "", "audience": "", "title": ""},
    {"autoplay": None, "tags": None, "action": None, "audience": None},
    {"unknown": {"anything": [1, None]}},
]
BAD: list[dict[str, Any]] = [
    {"user_id": ""},
    {"user_id": "u" * 513},
    {"user_id": 7},
    {"user_id": None},
    {"video_id": "v" * 257},
    {"video_id": "v\x00"},
    {"video_id": "v\u2029"},
    {"ts": NOW // 1_000},
    {"ts": NOW * 1_000},
    {"ts": -1},
    {"ts": "2026-01-01"},
    {"ts": 1.5},
    {"ts": True},
    {"action": "PLAY"},
    {"action": 1},
    {"traffic": "robots"},
    {"audience": "all"},
    {"watch_ms": -1},
    {"watch_ms": 1.5},
    {"duration_ms": -1},
    {"watch_fraction": -0.5},
    {"watch_fraction": "1"},
    {"autoplay": 1},
    {"autoplay": ""},
    {"watch_ms": ""},
    {"tags": ""},
    {"event_id": "e" * 257},
    {"session_id": "s\n"},
    {"surface": "s" * 65},
    {"cluster_id": -1},
    {"cluster_id": 2**31},
    {"persona_version": -1},
    {"title": 1},
    {"tags": "bees"},
    {"tags": [1]},
    {"category": {"a": 1}},
    {"schema_version": 2},
    {"schema_version": "1"},
    {"schema_version": True},
]


def decodes(data: dict[str, Any]) -> bool:
    user_id = data.get("user_id")
    key = user_id.encode() if isinstance(user_id, str) else b"u1"
    return isinstance(decode_event(orjson.dumps(data), key, append_time=NOW), Decoded)


@pytest.mark.parametrize("change", GOOD)
def test_schema_and_decoder_take_the_same_events(change: dict[str, Any]) -> None:
    data = FULL | change
    assert (valid("watch_event", data), decodes(data)) == (True, True)


@pytest.mark.parametrize("change", BAD)
def test_schema_and_decoder_refuse_the_same_events(change: dict[str, Any]) -> None:
    data = FULL | change
    assert (valid("watch_event", data), decodes(data)) == (False, False)


any_value = (
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**62)
    | st.floats(-1e15, 1e15)
    | st.text(st.characters(codec="ascii"), max_size=80)
    | st.sampled_from(["play", "bot", "kids", NOW, 1])
    | st.lists(st.text(max_size=3) | st.integers(0, 9), max_size=3)
)


@given(change=st.fixed_dictionaries({}, optional=dict.fromkeys(FULL, any_value)))
def test_schema_and_decoder_agree_on_arbitrary_values(change: dict[str, Any]) -> None:
    data = PLAIN | change
    assert valid("watch_event", data) == decodes(data)


@pytest.mark.parametrize("kind", [*ControlKind, "delete", None, 3])
@pytest.mark.parametrize("target", [{}, {"cluster_id": 3}, {"video_id": "v"}, {"cluster_id": -1, "video_id": ""}])
def test_schema_and_decoder_agree_on_controls(kind: object, target: dict[str, Any]) -> None:
    data = CONTROL | {"kind": kind} | target
    decoded = decode_control(orjson.dumps(data), b"u1", append_time=NOW)
    assert valid("user_control", data) == isinstance(decoded, Decoded)
