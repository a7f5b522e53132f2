"""From Kafka records to the columns that the kernel takes: decoded, checked and looked up, many at a time.

Events as they usually are take the quick way: msgspec checks every field while it parses. What it does not accept goes
the way of `streams.decoding`, which says what is wrong. Both give the same columns (tests/unit/test_columns.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import floor
from typing import Annotated, Any, Final, Literal, Protocol, TypeAlias, cast

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from streams import topics
from streams.counting import AUTOPLAY, CLAMPED, EVENT, LOADED, PLAYBACK
from streams.decoding import (
    EARLIEST_TS,
    FUTURE_TOLERANCE_MS,
    LATEST_TS,
    MAXIMUM_DURATION_MS,
    MAXIMUM_ID_BYTES,
    MAXIMUM_NAME_BYTES,
    MAXIMUM_TAG,
    MAXIMUM_TAGS,
    MAXIMUM_TITLE,
    MAXIMUM_USER_ID_BYTES,
    MAXIMUM_WATCH_FRACTION,
    MAXIMUM_WATCH_MS,
    Decoded,
    Rejected,
    RejectReason,
)
from streams.identifiers import event_text, framed, playback_text, text_digest, video_keys
from streams.interests import play_weight, watch_weight
from streams.records import UNASSIGNED, Action, Audience, Traffic, WatchEvent
from streams.registry import Registry
from streams.state import UNIT

MAXIMUM_RECORD_BYTES: Final = 1_048_576
KNOWN_VIDEOS: Final = 500_000
"""Videos whose key and cluster are remembered between batches."""
KNOWN_SESSIONS: Final = 200_000
UNITS: Final = round(1 / UNIT)

Headers: TypeAlias = tuple[tuple[str, bytes], ...]


class Record(Protocol):
    """A Kafka record as consumed. timestamp: append time, ms."""

    @property
    def offset(self) -> int:
        """Place in the partition."""

    @property
    def key(self) -> bytes | None:
        """UTF-8 of the user id, if it is as it must be."""

    @property
    def value(self) -> bytes | None:
        """What was sent."""

    @property
    def timestamp(self) -> int:
        """Append time, ms."""

    @property
    def headers(self) -> Headers:
        """Name and value of each."""


Decode: TypeAlias = Callable[[bytes | None, bytes | None, int], Decoded[WatchEvent] | Rejected]
"""(value, key, append time in ms) -> event or reason."""
Parse: TypeAlias = Callable[[bytes], Any]
"""A value's bytes to a mapping of our field names; may raise, or give something else."""


@dataclass(slots=True)
class Columns:
    """Usable events of a batch, and what became of the rest.

    places: of the events among the records; keys: of their viewers; found: what they say; unplaced: places among the
    events of those whose video is in no live cluster, set by `Reader.events`; rejected, not_organic: other records.
    """

    places: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    found: list[_Found] = field(default_factory=list)
    unplaced: list[int] = field(default_factory=list)
    rejected: list[tuple[int, Rejected]] = field(default_factory=list)
    not_organic: list[int] = field(default_factory=list)


class Reader:
    """Turns records into columns; remembers videos and sessions between batches."""

    def __init__(self, decode: Decode, parse: Parse) -> None:
        self._decode = decode
        self._parse = parse
        self._direct = False
        self._sessions: dict[str | None, int] = {}
        self._videos: dict[str, tuple[int, int]] = {}
        self._registry: Registry | None = None

    def read(self, records: Sequence[Record]) -> Columns:
        """Decode and check records."""
        columns = Columns()
        self._direct = self._parse is orjson.loads
        for place, record in enumerate(records):
            value = record.value
            found = None
            if value is not None and len(value) <= MAXIMUM_RECORD_BYTES:
                found = self._quickly(value, record)
            if found is None:
                found = self._checked(columns, place, record)
                if found is None:
                    continue
            if record.headers and topics.BOOTSTRAP_HEADER in record.headers:
                found = (*found[:-2], found[-2] | LOADED, found[-1])
            columns.places.append(place)
            columns.keys.append(record.key)  # type: ignore[arg-type]  # equal to the user id's UTF-8
            columns.found.append(found)
        return columns

    def events(
        self, columns: Columns, rows: Sequence[int], offsets: Sequence[int], registry: Registry
    ) -> npt.NDArray[np.void]:
        """The kernel's events, (events,) EVENT. rows: of their viewers; offsets: of the events."""
        events = np.zeros(len(columns.places), EVENT)
        if not columns.found:
            return events
        videos, ts, weights, identities, sessions, audiences, flags, given = zip(*columns.found, strict=True)
        events["row"] = rows
        events["offset"] = offsets
        events["ts"] = ts
        # Zero stands for none in a state's ring.
        events["key"] = np.maximum(np.frombuffer(b"".join(identities), "<u8"), 1)
        events["session"] = self._session_keys(sessions)
        events["weight"] = weights
        events["audience"] = audiences
        events["flags"] = flags
        events["video"], events["cluster"] = zip(*self._look_up(videos, registry), strict=True)
        columns.unplaced = np.nonzero(events["cluster"] == UNASSIGNED)[0].tolist()
        if any(cluster is not None for cluster in given):
            for place, cluster in enumerate(given):
                if cluster is not None and (successor := registry.successor_of(cluster)) in registry.cards:
                    events["cluster"][place] = successor
        return events

    def _quickly(self, value: bytes, record: Record) -> _Found | None:
        """A usual event's columns, None for one that needs a closer look."""
        if self._direct:
            try:
                event: _Usual = _DIRECT.decode(value)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                pass
            else:
                # JSON's own rules then leave nothing in a text that is not printable.
                printable = value.isascii() and b"\\" not in value and b"\x7f" not in value
                return _usual(event, record.key, record.timestamp, printable)
        try:
            event = msgspec.convert(self._parse(value), _Usual)
        except Exception:  # whatever a value or the operator's decoder brings about, `decode` says what it is
            return None
        # The producer sends other fields too, in all likelihood with every event.
        self._direct = False
        return _usual(event, record.key, record.timestamp, False)

    def _checked(self, columns: Columns, place: int, record: Record) -> _Found | None:
        """The slow way: an event by `decode`, or None once it is noted what is wrong."""
        value = record.value
        if value is not None and len(value) > MAXIMUM_RECORD_BYTES:
            detail = f"{len(value)} bytes, at most {MAXIMUM_RECORD_BYTES} are read"
            columns.rejected.append((place, Rejected(RejectReason.TOO_LARGE, detail)))
            return None
        decoded = self._decode(value, record.key, record.timestamp)
        if isinstance(decoded, Rejected):
            columns.rejected.append((place, decoded))
            return None
        event = decoded.record
        if event.traffic is not Traffic.ORGANIC:
            columns.not_organic.append(place)
            return None
        text = playback_text(event) if event.action is Action.PLAY else None
        flags = (PLAYBACK if text else 0) | (AUTOPLAY if event.autoplay else 0) | (CLAMPED if decoded.clamped else 0)
        return (
            event.video_id,
            event.ts,
            rounded(watch_weight(event)),
            text_digest(text or event_text(event)),
            event.session_id,
            _AUDIENCES[event.audience],
            flags,
            event.cluster_id,
        )

    def _session_keys(self, sessions: Sequence[str | None]) -> list[int]:
        known = self._sessions
        if not known or len(known) >= KNOWN_SESSIONS:
            known.clear()
            known[None] = 0
        for session in set(sessions) - known.keys():
            known[session] = key_of(session or "")
        return [known[session] for session in sessions]

    def _look_up(self, videos: Sequence[str], registry: Registry) -> list[tuple[int, int]]:
        """Key and cluster of each video; UNASSIGNED (-1) where the registry has no live cluster for it."""
        if registry is not self._registry or len(self._videos) >= KNOWN_VIDEOS:
            self._registry, self._videos = registry, {}
        known = self._videos
        missing = [video for video in dict.fromkeys(videos) if video not in known]
        if missing:
            keys = np.frombuffer(video_keys(missing), "<u8")
            clusters = registry.clusters_of_keys(keys).tolist()
            cards = registry.cards
            for video, key, cluster in zip(missing, keys.tolist(), clusters, strict=True):
                known[video] = key, cluster if cluster in cards else UNASSIGNED
        return [known[video] for video in videos]


def key_of(text: str) -> int:
    """64 bits that stand for a text, never 0."""
    return int.from_bytes(text_digest(text), "little") or 1


def rounded(weight: float) -> float:
    """A weight as a state's ring holds it, so that a repeated heartbeat compares equal to what was credited."""
    return floor(weight * UNITS + 0.5) * UNIT


_Found: TypeAlias = tuple[str, int, float, bytes, str | None, int, int, int | None]
"""Video id, ts, weight, identity, session id, audience, flags, cluster id."""

_AUDIENCES: Final[dict[str | None, int]] = {
    None: 0,
    **{audience.value: place for place, audience in enumerate(Audience, start=1)},
}
_ACTIONS: Final = {
    action.value: watch_weight(WatchEvent("", "", 0, action=action)) for action in Action if action is not Action.PLAY
}

# Limits in characters, such that their UTF-8 is within the limits in bytes of streams.decoding.
_Id: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=MAXIMUM_ID_BYTES // 4)]
_Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=MAXIMUM_NAME_BYTES // 4)]
_Tags: TypeAlias = Annotated[
    list[Annotated[str, msgspec.Meta(max_length=MAXIMUM_TAG)]], msgspec.Meta(max_length=MAXIMUM_TAGS)
]


class _Usual(msgspec.Struct, gc=False):
    """A watch event as it usually is: every field as it must be, nothing to clamp."""

    user_id: Annotated[str, msgspec.Meta(min_length=1, max_length=MAXIMUM_USER_ID_BYTES // 4)]
    video_id: _Id
    ts: Annotated[int, msgspec.Meta(ge=EARLIEST_TS, le=LATEST_TS)]
    event_id: _Id | None = None
    action: Literal["play", "skip", "thumbs_up", "thumbs_down", "not_interested", "share", "bookmark"] = "play"
    watch_ms: Annotated[int, msgspec.Meta(ge=0, le=MAXIMUM_WATCH_MS)] | None = None
    duration_ms: Annotated[int, msgspec.Meta(gt=0, le=MAXIMUM_DURATION_MS)] | None = None
    watch_fraction: Annotated[float, msgspec.Meta(ge=0, le=MAXIMUM_WATCH_FRACTION)] | None = None
    playback_id: _Id | None = None
    session_id: _Id | None = None
    surface: _Name | None = None
    autoplay: bool = False
    traffic: Literal["organic"] = "organic"
    audience: Literal["adult", "teen", "kids"] | None = None
    locale: _Name | None = None
    rec_id: _Id | None = None
    persona_version: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None = None
    title: Annotated[str, msgspec.Meta(min_length=1, max_length=MAXIMUM_TITLE)] | None = None
    tags: _Tags = []
    category: _Tags = []
    cluster_id: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    schema_version: Literal[1] = 1


class _Alone(_Usual, forbid_unknown_fields=True, gc=False):
    """The same without any other field: msgspec passes over what it does not know without a look at all of it."""


_DIRECT: Final = msgspec.json.Decoder(_Alone)


def _usual(event: _Usual, key: bytes | None, append_time: int, printable: bool) -> _Found | None:
    """The columns of a usual event, None for one that needs a closer look. printable: each of its texts is."""
    user, video, ts, event_id, playback = event.user_id, event.video_id, event.ts, event.event_id, event.playback_id
    if user.encode() != key or ts > append_time + FUTURE_TOLERANCE_MS:
        return None
    if not printable and not _is_printable(event):
        return None
    flags = AUTOPLAY if event.autoplay else 0
    if event.action == "play":
        watched, duration = event.watch_ms, event.duration_ms
        weight = play_weight(watched, duration, event.watch_fraction, autoplay=event.autoplay)
        weight = rounded(weight)
        if playback is not None:
            flags |= PLAYBACK
    else:
        weight = _ACTIONS[event.action]
    if flags & PLAYBACK:
        text = framed("playback", playback or "", video)
    elif event_id is not None:
        text = f"5:event{len(event_id)}:{event_id}"  # as `event_text` frames it
    else:
        text = event_text(cast(WatchEvent, event))  # it reads fields by name
    return video, ts, weight, text_digest(text), event.session_id, _AUDIENCES[event.audience], flags, event.cluster_id


def _is_printable(event: _Usual) -> bool:
    ids = f"{event.user_id}{event.video_id}{event.event_id or ''}{event.playback_id or ''}{event.session_id or ''}"
    names = f"{event.surface or ''}{event.locale or ''}{event.rec_id or ''}{event.title or ''}"
    return ids.isprintable() and names.isprintable() and all(map(str.isprintable, (*event.tags, *event.category)))
