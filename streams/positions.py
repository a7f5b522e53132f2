"""Where controls and registry versions take effect in a watch partition.

A control arrives on another topic, so nothing orders it among the watch events. It takes effect at the position that
was the end of its watch partition when it was first read. That position is recorded in the `watch-positions` topic
before it is applied, and a replay reads it there: decisions depend on recorded positions, never on arrival.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from streams.records import SCHEMA_VERSION, ControlKind, UserControl


class PositionKind(StrEnum):
    """What takes effect at a position."""

    CONTROL = "control"
    BOOTSTRAP_END = "bootstrap_end"
    REGISTRY = "registry"


class PositionError(ValueError):
    """A record of the positions topic cannot be read; only this project writes it, so the worker stops."""


@dataclass(frozen=True, slots=True)
class Position:
    """Something that takes effect before the watch record at offset `position`.

    source_topic/source_offset: the control record it came from (its topic's id), or "" and -1. registry_lineage:
    cluster ids of two registries mean the same only if it is equal. watch_topic: id of the topic that it is a position
    in; "" where only one is known.
    """

    kind: PositionKind
    position: int
    source_topic: str = ""
    source_offset: int = -1
    control: UserControl | None = None
    registry_version: int | None = None
    registry_lineage: str = ""
    watch_topic: str = ""
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class Recorded:
    """A position as it stands in the log, at `offset` of the positions partition."""

    offset: int
    item: Position


def encode_position(position: Position) -> bytes:
    """JSON bytes of a position."""
    return orjson.dumps(position)


def decode_position(value: bytes | None) -> Position:
    """A position from its bytes. Raises PositionError."""
    try:
        fields: dict[str, Any] = orjson.loads(value or b"")
        control = fields.pop("control")
        if control is not None:
            control = UserControl(**{**control, "kind": ControlKind(control["kind"])})
        if fields.get("schema_version") != SCHEMA_VERSION:
            raise PositionError(f"position with schema_version {fields.get('schema_version')!r}")
        return Position(**{**fields, "kind": PositionKind(fields["kind"]), "control": control})
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise PositionError(f"unreadable position record: {error}") from error


class Schedule:
    """The positions of one partition in log order, first record of a control wins.

    Positions never go back: an item recorded behind an earlier one takes effect with it.
    """

    def __init__(self) -> None:
        self._items: list[Recorded] = []
        self._last_source: dict[str, int] = {}
        self._latest = 0
        self._next = 0

    def add(self, recorded: Recorded) -> bool:
        """Append a recorded item; returns False for one that was recorded before (a control read twice)."""
        item = recorded.item
        if not self.note(item):
            return False
        self._latest = max(self._latest, item.position)
        if item.position != self._latest:
            values = {name: getattr(item, name) for name in Position.__dataclass_fields__}
            recorded = Recorded(recorded.offset, Position(**{**values, "position": self._latest}))
        self._items.append(recorded)
        return True

    def note(self, item: Position) -> bool:
        """Remember where a position came from, without scheduling it: one in another topic, which is past.

        False if it was recorded before.
        """
        if item.source_offset >= 0:
            if item.source_offset <= self._last_source.get(item.source_topic, -1):
                return False
            self._last_source[item.source_topic] = item.source_offset
        return True

    def recorded(self, source_topic: str, source_offset: int) -> bool:
        """Whether the control at this offset has a position already."""
        return source_offset <= self._last_source.get(source_topic, -1)

    def due(self, next_offset: int) -> Recorded | None:
        """The next item that takes effect at or before `next_offset`, removed from the schedule."""
        if self._next >= len(self._items) or self._items[self._next].item.position > next_offset:
            return None
        self._next += 1
        return self._items[self._next - 1]

    def skip(self, next_offset: int) -> None:
        """Pass over what took effect before `next_offset` was committed; what is due exactly there may not have."""
        while self._next < len(self._items) and self._items[self._next].item.position < next_offset:
            self._next += 1

    def waiting(self) -> int | None:
        """Position of the next item, or None."""
        return self._items[self._next].item.position if self._next < len(self._items) else None
