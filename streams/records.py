"""The records that flow through Kafka and Cassandra, as immutable values.

Every time is an integer number of milliseconds, UTC. `encode` gives the JSON bytes of any record; `streams/decoding.py`
reads untrusted bytes, `streams/schemas/` describes each record for other languages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import msgspec

SCHEMA_VERSION: Final = 1
UNASSIGNED: Final = -1
"""Cluster id of a video that no cluster holds."""


class Action(StrEnum):
    """What the viewer did."""

    PLAY = "play"
    SKIP = "skip"
    THUMBS_UP = "thumbs_up"
    THUMBS_DOWN = "thumbs_down"
    NOT_INTERESTED = "not_interested"
    SHARE = "share"
    BOOKMARK = "bookmark"


class Traffic(StrEnum):
    """Who produced the event; only organic events are applied."""

    ORGANIC = "organic"
    BOT = "bot"
    TEST = "test"


class Audience(StrEnum):
    """Age group of the profile."""

    ADULT = "adult"
    TEEN = "teen"
    KIDS = "kids"


class ControlKind(StrEnum):
    """What a viewer asks of their persona."""

    OPT_OUT = "opt_out"
    OPT_IN = "opt_in"
    HIDE = "hide"
    UNHIDE = "unhide"
    PIN = "pin"
    UNPIN = "unpin"
    FORGET_VIDEO = "forget_video"
    CLEAR_HISTORY = "clear_history"
    ERASE = "erase"


class Rule(StrEnum):
    """Why a refresh was requested."""

    COLD_START = "cold_start"
    DRIFT = "drift"
    FOLLOW_UP = "follow_up"
    MATURITY = "maturity"
    AGE = "age"
    CONTROL = "control"


class Command(StrEnum):
    """What a request asks of the persona app: write a persona, or remove all of a viewer's."""

    REFRESH = "refresh"
    ERASE = "erase"
    OPT_OUT = "opt_out"


class Tier(StrEnum):
    """Who worded a persona."""

    TEMPLATE = "template"
    STUDENT = "student"
    TEACHER = "teacher"


TIER_RANK: Final = {Tier.TEMPLATE: 1, Tier.STUDENT: 2, Tier.TEACHER: 3}
REMOVAL_RANK: Final = 7
"""Rank of a removal: above every tier of the same sequence."""


def persona_version(sequence: int, tier: Tier) -> int:
    """Version of a persona: per-user request sequence x 8 + tier rank. It is also Cassandra's write timestamp."""
    return sequence * 8 + TIER_RANK[tier]


def removal_version(sequence: int) -> int:
    """Version of a removal, on the same scale as persona versions."""
    return sequence * 8 + REMOVAL_RANK


class Maturity(StrEnum):
    """How much evidence stands behind a persona."""

    COLD = "cold"
    FORMING = "forming"
    MATURE = "mature"


class Horizon(StrEnum):
    """Which horizon an interest stands out on."""

    SHORT = "short"
    LONG = "long"


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One thing a viewer did with a video. `watch_fraction` above 1 means looped."""

    user_id: str
    video_id: str
    ts: int
    event_id: str | None = None
    action: Action = Action.PLAY
    watch_ms: int | None = None
    duration_ms: int | None = None
    watch_fraction: float | None = None
    playback_id: str | None = None
    session_id: str | None = None
    surface: str | None = None
    autoplay: bool = False
    traffic: Traffic = Traffic.ORGANIC
    audience: Audience | None = None
    locale: str | None = None
    rec_id: str | None = None
    persona_version: int | None = None
    title: str | None = None
    tags: tuple[str, ...] = ()
    category: tuple[str, ...] = ()
    cluster_id: int | None = None


@dataclass(frozen=True, slots=True)
class UserControl:
    """A viewer's control. `cluster_id` belongs to (un)hide and (un)pin, `video_id` to forget_video."""

    control_id: str
    user_id: str
    kind: ControlKind
    ts: int
    cluster_id: int | None = None
    video_id: str | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """A watch that backs an interest."""

    video_id: str
    ts: int


@dataclass(frozen=True, slots=True)
class Interest:
    """One chosen interest, as the core knows it, before any wording.

    share: 0..1 of the viewer's watches; share_bucket: percent in steps of 5 (5 means up to 7.5%); trend: -1, 0, +1;
    confidence: 0..1; titles: titles of the cluster that may appear in a prompt; valid_from: when it entered the set.
    """

    interest_id: str
    cluster_id: int
    label: str
    share: float
    share_bucket: int
    horizon: Horizon
    trend: int
    confidence: float
    valid_from: int
    query: str
    pinned: bool = False
    titles: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()


@dataclass(frozen=True, slots=True)
class NovelCandidate:
    """A topic the viewer has not consumed, reachable from `via` (cluster ids and labels of own interests)."""

    cluster_id: int
    label: str
    query: str
    lift: float
    confidence: float
    via: tuple[int, ...]
    via_labels: tuple[str, ...] = ()
    titles: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why the rule fired: its value against the threshold, and what moved since the last request.

    divergence: Jensen-Shannon divergence (bits, 0..1) between the last request's distribution and this one;
    divergence_null: its 99% quantile without any shift, at this viewer's sample size; risen/fallen: cluster id, label,
    share before, share now.
    """

    rule: Rule
    value: float
    threshold: float
    watches_since: int
    divergence: float | None = None
    divergence_null: float | None = None
    risen: tuple[tuple[int, str, float, float], ...] = ()
    fallen: tuple[tuple[int, str, float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Basis:
    """The evidence behind a persona: events counted, effective sample size, first and last event time."""

    events: int
    n_eff: float
    first_ts: int
    last_ts: int


@dataclass(frozen=True, slots=True)
class Context:
    """All that a persona is worded from."""

    maturity: Maturity
    basis: Basis
    interests: tuple[Interest, ...]
    novel: tuple[NovelCandidate, ...]
    avoid: tuple[int, ...]
    explanation: Explanation
    language: str = "en"
    audience: Audience | None = None


@dataclass(frozen=True, slots=True)
class RefreshRequest:
    """Asks the persona app to word a persona (or to remove one). The same log gives the same requests.

    `tier_limit` template means that the viewer is below the student's gate. `expires_after_ms` counts from the
    request's append time; after it a template is written instead of a student's persona.
    """

    request_id: str
    user_id: str
    epoch: int
    sequence: int
    as_of: int
    rule: Rule
    expires_after_ms: int
    registry_version: int
    command: Command = Command.REFRESH
    tier_limit: Tier | None = None
    context: Context | None = None
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class PersonaInterest:
    """One interest as published. See `Interest` for units."""

    interest_id: str
    cluster_id: int
    label: str
    share: float
    horizon: Horizon
    trend: int
    description: str
    query: str
    confidence: float
    evidence: tuple[Evidence, ...]
    valid_from: int
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class PersonaNovel:
    """One topic to explore, as published."""

    cluster_id: int
    label: str
    reason: str
    query: str
    via: tuple[int, ...]
    lift: float
    confidence: float


@dataclass(frozen=True, slots=True)
class Model:
    """Which model worded the persona and what it cost. Zero tokens means that all wording came from the cache.

    tokens_in, tokens_out: of all models, answers that were not used included; teacher_tokens_in, teacher_tokens_out:
    the teacher's part of them. items: texts of the persona (summary, descriptions, reasons); items_cached: those the
    wording cache had; items_teacher: those the teacher worded now; items_plain: those of a template, 0 also in records
    that are older than the field.
    """

    name: str
    version: str
    prompt_hash: str
    tokens_in: int
    tokens_out: int
    latency_ms: int
    items: int = 0
    items_cached: int = 0
    items_teacher: int = 0
    teacher_tokens_in: int = 0
    teacher_tokens_out: int = 0
    items_plain: int = 0


@dataclass(frozen=True, slots=True)
class Changes:
    """Interest ids that entered, left or were reworded since the previous version."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    reworded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Persona:
    """The published persona: key `user_id`, compacted topic; a null value is a tombstone."""

    user_id: str
    epoch: int
    version: int
    previous_version: int | None
    request_id: str
    as_of: int
    generated_at: int
    tier: Tier
    cached: bool
    language: str
    maturity: Maturity
    basis: Basis
    model: Model
    summary: str
    interests: tuple[PersonaInterest, ...]
    novel: tuple[PersonaNovel, ...]
    avoid: tuple[int, ...]
    changes: Changes
    rule: Rule
    registry_version: int
    explanation: Explanation | None = None
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that could not be used. payload: the first 64 KiB of its value, base64; key likewise, 1 KiB."""

    reason: str
    detail: str
    source_topic: str
    source_partition: int
    source_offset: int
    key: str | None
    payload: str | None
    length: int
    sha256: str
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class UnknownVideo:
    """A watched video that the registry does not hold; the next registry version places it by its text."""

    video_id: str
    title: str | None
    tags: tuple[str, ...] = field(default=())
    category: tuple[str, ...] = field(default=())
    schema_version: int = SCHEMA_VERSION


_ENCODER: Final = msgspec.json.Encoder()


def encode(record: Any) -> bytes:  # noqa: ANN401
    """JSON bytes of a record; fields in declaration order, so equal records give equal bytes."""
    return _ENCODER.encode(record)
