"""Field mapping: reads watch events from topics of another shape.

A mapping is a JSON object from our field to where theirs is:

    {"user_id": "profile.id",
     "video_id": "asset",
     "ts": {"path": "watched_at", "scale": 1000},
     "action": {"path": "verb", "map": {"PLAY": "play", "STOP": "skip"}},
     "tags": {"path": "keywords", "split": "|"}}

Only mapped fields are read. A path is object keys joined by dots. `scale` multiplies a number (1000 turns
seconds into milliseconds), `iso` (true) reads an ISO 8601 time, `map` replaces values, `split` cuts a text
into a list; each entry uses at most one of them. What is absent there is absent here; what cannot be
converted is handed on as it is, so that the decoder rejects it with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from streams.records import Action, Audience, Traffic, WatchEvent

REQUIRED_FIELDS: Final = ("user_id", "video_id", "ts")
EVENT_FIELDS: Final = tuple(f.name for f in fields(WatchEvent))
_INTEGER_FIELDS: Final = frozenset({"ts", "watch_ms", "duration_ms"})
_SCALED_FIELDS: Final = _INTEGER_FIELDS | {"watch_fraction"}
_LIST_FIELDS: Final = frozenset({"tags", "category"})
_CHOICES: Final = {"action": Action, "traffic": Traffic, "audience": Audience}
_OPTIONS: Final = ("scale", "iso", "map", "split")


class MappingError(ValueError):
    """A field mapping cannot be used; the message names the entry and what it accepts."""


@dataclass(frozen=True, slots=True)
class FieldRule:
    """Where one of our fields comes from and how it is converted; at most one conversion is set."""

    field: str
    path: tuple[str, ...]
    scale: float | None = None
    iso: bool = False
    replacements: Mapping[str, object] | None = None
    split: str | None = None

    def convert(self, value: object) -> object:
        """The value in our terms, or unchanged if it is of a kind that the conversion does not know."""
        if self.scale is not None:
            return _scaled(value, self.scale, whole=self.field in _INTEGER_FIELDS)
        if self.iso:
            return _milliseconds(value)
        if self.replacements is not None:
            key = _map_key(value)
            return value if key is None else self.replacements.get(key, value)
        if self.split is not None and isinstance(value, str):
            return [part.strip() for part in value.split(self.split) if part.strip()]
        return value


@dataclass(frozen=True, slots=True)
class FieldMapping:
    """A checked mapping. `apply` turns their object into ours; it never raises."""

    rules: tuple[FieldRule, ...]

    def apply(self, data: dict[str, object]) -> dict[str, object]:
        """Our fields, read from `data` by the rules."""
        found: dict[str, object] = {}
        for rule in self.rules:
            value: object = data
            for step in rule.path:
                value = value.get(step) if isinstance(value, dict) else None
            if value is not None:
                found[rule.field] = rule.convert(value)
        return found


def parse_mapping(content: bytes) -> FieldMapping:
    """A field mapping from the JSON text of its file. Raises MappingError."""
    try:
        entries = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise MappingError(f"the field mapping is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise MappingError("the field mapping must be a JSON object from our field names to paths")
    missing = [name for name in REQUIRED_FIELDS if name not in entries]
    if missing:
        raise MappingError(f"the field mapping must say where {', '.join(missing)} comes from")
    return FieldMapping(tuple(_rule(name, entry) for name, entry in entries.items()))


def iso_milliseconds(text: str) -> int:
    """Milliseconds UTC of an ISO 8601 time; one without an offset is taken as UTC. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    since = moment - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000 + since.microseconds // 1_000


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def _rule(name: str, entry: object) -> FieldRule:
    if name not in EVENT_FIELDS:
        raise MappingError(f"{name!r} is not a field of a watch event; they are {', '.join(EVENT_FIELDS)}")
    if isinstance(entry, str):
        return FieldRule(name, _path(name, entry))
    if not isinstance(entry, dict):
        raise MappingError(f"{name}: give a path or an object with a path, not {entry!r}")
    unknown = sorted(entry.keys() - {"path", *_OPTIONS})
    if unknown:
        raise MappingError(f"{name}: unknown option {unknown[0]!r}; known are path, {', '.join(_OPTIONS)}")
    if len(entry.keys() & set(_OPTIONS)) > 1:
        raise MappingError(f"{name}: use one of {', '.join(_OPTIONS)}, not several")
    return FieldRule(
        name,
        _path(name, entry.get("path")),
        scale=_scale(name, entry["scale"]) if "scale" in entry else None,
        iso=_iso(name, entry["iso"]) if "iso" in entry else False,
        replacements=_replacements(name, entry["map"]) if "map" in entry else None,
        split=_split(name, entry["split"]) if "split" in entry else None,
    )


def _path(name: str, path: object) -> tuple[str, ...]:
    steps = tuple(path.split(".")) if isinstance(path, str) else ()
    if not steps or not all(steps):
        raise MappingError(f"{name}: the path must be object keys joined by dots, not {path!r}")
    return steps


def _scale(name: str, scale: object) -> float:
    if name not in _SCALED_FIELDS:
        raise MappingError(f"{name}: only {', '.join(sorted(_SCALED_FIELDS))} can be scaled")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or scale <= 0:
        raise MappingError(f"{name}: scale must be a number above 0, not {scale!r}")
    return scale


def _iso(name: str, iso: object) -> bool:
    if name != "ts":
        raise MappingError(f"{name}: only ts can be an ISO time")
    if not isinstance(iso, bool):
        raise MappingError(f"{name}: iso must be true or false, not {iso!r}")
    return iso


def _replacements(name: str, replacements: object) -> Mapping[str, Any]:
    if not isinstance(replacements, dict) or not replacements:
        raise MappingError(f"{name}: map must be an object from their values to ours")
    choices = _CHOICES.get(name)
    for theirs, ours in replacements.items():
        if choices is not None and ours not in list(choices):
            raise MappingError(f"{name}: map gives {ours!r} for {theirs!r}, which is not one of {', '.join(choices)}")
    return replacements


def _split(name: str, split: object) -> str:
    if name not in _LIST_FIELDS:
        raise MappingError(f"{name}: only {', '.join(sorted(_LIST_FIELDS))} can be split")
    if not isinstance(split, str) or not split:
        raise MappingError(f"{name}: split must be a separator, not {split!r}")
    return split


def _scaled(value: object, scale: float, *, whole: bool) -> object:
    if type(value) is not int and type(value) is not float:
        return value
    try:
        scaled = value * scale
        return round(scaled) if whole else scaled
    except (OverflowError, ValueError):
        return value


def _milliseconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return iso_milliseconds(value)
    except (ValueError, OverflowError):
        return value


def _map_key(value: object) -> str | None:
    """Their value as the key of a JSON object can write it, if it can."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) and abs(value) < 2**64 else None
