"""From Kafka records to the columns that the kernel takes: decoded, checked and looked up, many at a time.

Events as they usually are take the quick way: msgspec checks every field while it parses. What it does not accept goes
the way of `streams.decoding`, which says what is wrong. Both give the same columns (tests/unit/test_columns.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from streams.identifiers import event_text, framed, playback_text, text_digest, video_key, video_keys
from streams.interests import play_weight, watch_weight
from streams.records import UNASSIGNED, Action, Audience, Traffic, WatchEvent
from streams.registry import Registry
from streams.state import UNIT

MAXIMUM_RECORD_BYTES: Final = 1_048_576
KNOWN_VIDEOS: Final = 500_000
"""Videos whose key and cluster are remembered between batches."""
NO_SESSION: Final = bytes(8)
AT_ONCE: Final = 128
"""Records decoded together: one that is not usual costs the others of its group the quickest way."""
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
    """Usable events of a batch, field by field, and what became of the rest.

    places: of the events among the records; keys: of their viewers; videos: ids; ts: ms; weights: -2..1;
    identities: what each is known by, sessions: their ids, 8 bytes each; audiences, flags: as in EVENT; clusters: ids
    that the producer gave; unplaced: places among the events of those whose video is in no live cluster, set by
    `Reader.events`; rejected, not_organic: other records.
    """

    places: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)
    ts: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    identities: list[bytes] = field(default_factory=list)
    sessions: list[bytes] = field(default_factory=list)
    audiences: list[int] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)
    clusters: list[int | None] = field(default_factory=list)
    unplaced: list[int] = field(default_factory=list)
    rejected: list[tuple[int, Rejected]] = field(default_factory=list)
    not_organic: list[int] = field(default_factory=list)


class Reader:
    """Turns records into columns; remembers videos between batches."""

    def __init__(self, decode: Decode, parse: Parse) -> None:
        self._decode = decode
        self._parse = parse
        self._direct = False
        self._registry: Registry | None = None
        self._known: dict[str, int] = {}
        # By the numbers in `_known`:
        self._video_keys: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._clusters: npt.NDArray[np.int32] = np.zeros(0, np.int32)

    def read(self, records: Sequence[Record]) -> Columns:
        """Decode and check records."""
        columns = Columns()
        self._direct = self._parse is orjson.loads
        for start in range(0, len(records), AT_ONCE):
            self._read(columns, start, records[start : start + AT_ONCE])
        loaded = [place for place, record in enumerate(records) if topics.BOOTSTRAP_HEADER in record.headers]
        for place in set(loaded) & set(columns.places) if loaded else ():
            columns.flags[bisect_left(columns.places, place)] |= LOADED
        return columns

    def events(
        self, columns: Columns, rows: Sequence[int], offsets: Sequence[int], registry: Registry
    ) -> npt.NDArray[np.void]:
        """The kernel's events, (events,) EVENT. rows: of their viewers; offsets: of the events."""
        events = np.zeros(len(columns.places), EVENT)
        if not len(events):
            return events
        events["row"] = np.array(rows, np.int64)
        events["offset"] = np.array(offsets, np.int64)
        events["ts"] = np.array(columns.ts, np.int64)
        # Zero stands for none in a state's ring.
        events["key"] = np.maximum(np.frombuffer(b"".join(columns.identities), ">u8"), 1)
        events["session"] = np.frombuffer(b"".join(columns.sessions), ">u8")
        events["weight"] = rounded(np.array(columns.weights))
        events["audience"] = np.frombuffer(bytes(columns.audiences), np.uint8)
        events["flags"] = np.frombuffer(bytes(columns.flags), np.uint8)
        events["video"], events["cluster"] = self._look_up(columns.videos, registry)
        columns.unplaced = np.nonzero(events["cluster"] == UNASSIGNED)[0].tolist()
        if columns.clusters.count(None) != len(events):
            for i, cluster in enumerate(columns.clusters):
                if cluster is not None and (successor := registry.successor_of(cluster)) in registry.cards:
                    events["cluster"][i] = successor
        return events

    def _read(self, columns: Columns, start: int, records: Sequence[Record]) -> None:
        """Read records from place `start` on: runs of usual ones together, the others one by one."""
        keys = [record.key for record in records]
        events = self._usual(records, keys)
        done = 0
        while done < len(events):
            end = done
            while end < len(events) and events[end] is not None:
                end += 1
            if end > done:
                columns.places += range(start + done, start + end)
                columns.keys += cast(list[bytes], keys[done:end])  # equal to the user ids' UTF-8
                _add(columns, cast(list[_Usual], events[done:end]))
            if end < len(events):
                self._checked(columns, start + end, records[end])
            done = end + 1

    def _usual(self, records: Sequence[Record], keys: Sequence[bytes | None]) -> list[_Usual | None]:
        """The usual event in each record, None for one that needs a closer look."""
        values = [record.value for record in records]
        lines = self._lines(values)
        events = None if lines is None else self._together(lines, len(values))
        if events is None:
            events = [self._alone(value) for value in values]
        elif _is_plain(lines or b"") and _fit_together(events, keys, records):
            return events
        return [
            event if event is not None and _fits(event, record) else None
            for event, record in zip(events, records, strict=True)
        ]

    def _lines(self, values: Sequence[bytes | None]) -> bytes | None:
        """The values one to a line, if they can be parsed in one go; None if not."""
        if not self._direct or None in values:
            return None
        lines = b"\n".join(cast(Sequence[bytes], values))
        if len(lines) > MAXIMUM_RECORD_BYTES:
            return None
        # The parser takes two objects in one line and an object over two lines. But where every value begins and ends
        # with a brace and has no line break of its own, breaks are between objects: nothing in an object can be "}\n{".
        breaks = len(values) - 1
        if not lines.startswith(b"{") or not lines.endswith(b"}") or lines.count(b"}\n{") != breaks:
            return None
        return lines if lines.count(b"\n") == breaks else None

    def _together(self, lines: bytes, count: int) -> list[_Usual | None] | None:
        """The usual event in each line; None if one holds something else."""
        try:
            events = _DIRECT.decode_lines(lines)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None
        return cast(list[_Usual | None], events) if len(events) == count else None

    def _alone(self, value: bytes | None) -> _Usual | None:
        if value is None or len(value) > MAXIMUM_RECORD_BYTES:
            return None
        if self._direct:
            try:
                return _DIRECT.decode(value)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                pass
        try:
            event = msgspec.convert(self._parse(value), _Usual)
        except Exception:  # whatever a value or the operator's decoder brings about, `decode` says what it is
            return None
        # The producer sends other fields too, in all likelihood with every event.
        self._direct = False
        return event

    def _checked(self, columns: Columns, place: int, record: Record) -> None:
        """The slow way: an event by `decode`, or what is wrong."""
        value = record.value
        if value is not None and len(value) > MAXIMUM_RECORD_BYTES:
            detail = f"{len(value)} bytes, at most {MAXIMUM_RECORD_BYTES} are read"
            columns.rejected.append((place, Rejected(RejectReason.TOO_LARGE, detail)))
            return
        decoded = self._decode(value, record.key, record.timestamp)
        if isinstance(decoded, Rejected):
            columns.rejected.append((place, decoded))
            return
        event = decoded.record
        if event.traffic is not Traffic.ORGANIC:
            columns.not_organic.append(place)
            return
        text = playback_text(event) if event.action is Action.PLAY else None
        flags = (PLAYBACK if text else 0) | (AUTOPLAY if event.autoplay else 0) | (CLAMPED if decoded.clamped else 0)
        columns.places.append(place)
        columns.keys.append(event.user_id.encode())
        columns.videos.append(event.video_id)
        columns.ts.append(event.ts)
        columns.weights.append(watch_weight(event))
        columns.identities.append(text_digest(text or event_text(event)))
        columns.sessions.append(text_digest(event.session_id) if event.session_id else NO_SESSION)
        columns.audiences.append(_AUDIENCES[event.audience])
        columns.flags.append(flags)
        columns.clusters.append(event.cluster_id)

    def _look_up(
        self, videos: Sequence[str], registry: Registry
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
        """Key and cluster of each video; UNASSIGNED (-1) where the registry has no live cluster for it."""
        if registry is not self._registry or len(self._known) >= KNOWN_VIDEOS:
            self._registry, self._known = registry, {}
            self._video_keys, self._clusters = self._video_keys[:0], self._clusters[:0]
        known = self._known
        numbers = [known.get(video, -1) for video in videos]
        if -1 in numbers:
            self._learn([video for video in dict.fromkeys(videos) if video not in known], registry)
            numbers = [known[video] for video in videos]
        places = np.array(numbers)
        return self._video_keys[places], self._clusters[places]

    def _learn(self, videos: Sequence[str], registry: Registry) -> None:
        keys = np.frombuffer(video_keys(videos), "<u8")
        clusters = registry.clusters_of_keys(keys)
        live = np.isin(clusters, registry.cluster_ids)
        self._known.update(zip(videos, range(len(self._known), len(self._known) + len(videos)), strict=True))
        self._video_keys = np.append(self._video_keys, keys)
        self._clusters = np.append(self._clusters, np.where(live, clusters, np.int32(UNASSIGNED)))


def key_of(text: str) -> int:
    """64 bits that stand for a text, never 0."""
    return video_key(text) or 1


def rounded(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Weights as a state's ring holds them, so that a repeated heartbeat compares equal to what was credited."""
    units: npt.NDArray[np.float64] = np.floor(weights * UNITS + 0.5)
    return units * UNIT


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


def _fit_together(events: Sequence[_Usual | None], keys: Sequence[bytes | None], records: Sequence[Record]) -> bool:
    """Whether `_fits` holds for each event of plain values: asked of all at once."""
    usual = cast(list[_Usual], events)
    return [event.user_id.encode() for event in usual] == keys and max([event.ts for event in usual]) <= min(
        [record.timestamp for record in records]
    ) + FUTURE_TOLERANCE_MS


def _fits(event: _Usual, record: Record) -> bool:
    """Whether a usual event goes with its record, and each of its texts is printable."""
    return (
        event.user_id.isprintable()  # an operator's decoder can give what has no UTF-8
        and event.user_id.encode() == record.key
        and event.ts <= record.timestamp + FUTURE_TOLERANCE_MS
        and (_is_plain(record.value or b"") or _is_printable(event))
    )


def _is_plain(value: bytes) -> bool:
    """Whether JSON's own rules leave nothing in the texts of a value that is not printable."""
    return value.isascii() and b"\\" not in value and b"\x7f" not in value


def _is_printable(event: _Usual) -> bool:
    ids = f"{event.user_id}{event.video_id}{event.event_id or ''}{event.playback_id or ''}{event.session_id or ''}"
    names = f"{event.surface or ''}{event.locale or ''}{event.rec_id or ''}{event.title or ''}"
    return ids.isprintable() and names.isprintable() and all(map(str.isprintable, (*event.tags, *event.category)))


def _add(columns: Columns, events: Sequence[_Usual]) -> None:
    """Add what usual events say."""
    columns.videos += [event.video_id for event in events]
    columns.ts += [event.ts for event in events]
    columns.sessions += [text_digest(event.session_id) if event.session_id else NO_SESSION for event in events]
    columns.audiences += [_AUDIENCES[event.audience] for event in events]
    columns.clusters += [event.cluster_id for event in events]
    for event in events:
        flags = AUTOPLAY if event.autoplay else 0
        if event.action == "play":
            weight = play_weight(event.watch_ms, event.duration_ms, event.watch_fraction, autoplay=event.autoplay)
            if event.playback_id is not None:
                flags |= PLAYBACK
        else:
            weight = _ACTIONS[event.action]
        if event.event_id is not None and not flags & PLAYBACK:
            text = f"5:event{len(event.event_id)}:{event.event_id}"  # as `event_text` frames it
        elif flags & PLAYBACK:
            text = framed("playback", event.playback_id or "", event.video_id)
        else:
            text = event_text(cast(WatchEvent, event))  # it reads fields by name
        columns.weights.append(weight)
        columns.flags.append(flags)
        columns.identities.append(text_digest(text))
