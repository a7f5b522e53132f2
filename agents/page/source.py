"""What the page shows, and where it gets it: the records, the port, and a double for tests."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

import orjson

from agents.explanations import CHANCE, Reason, divergence_measure, reason_of, scale_end
from streams.decoding import UnreadableRecordError
from streams.records import Explanation, Maturity, Persona, Rule, Tier

WINDOW_MINUTES: Final = 60
"""Rules and tiers are counted over this many minutes back from now, by append time."""
LATEST_LIMIT: Final = 50
DELAYS_LIMIT: Final = 500
HISTORY_LIMIT: Final = 5


class SourceUnavailable(Exception):  # noqa: N818 - a state of the source
    """What was asked for cannot be read now; the message says what does not answer."""


class Health(StrEnum):
    """State of one part: degraded still serves, down does not."""

    OK = "ok"
    DEGRADED = "degraded"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class TopicLag:
    """Records of a topic that a group has not committed yet."""

    topic: str
    lag: int


@dataclass(frozen=True, slots=True)
class GroupLag:
    """A consumer group and what it still has to read."""

    group: str
    lag: int
    topics: tuple[TopicLag, ...]


@dataclass(frozen=True, slots=True)
class Count:
    """How many of one kind."""

    name: str
    count: int


@dataclass(frozen=True, slots=True)
class Overview:
    """The fleet at a glance. `problem`: what does not answer, None while all is well.

    at: ms. events: appended since the topic exists. arriving and applied: events per second over the last
    seconds, appended and committed by the watch group; history: arriving, oldest first, one value per sample.
    rules, tiers, removed and unreadable (records that are none of ours): of the last `window_minutes`.
    delay_p50 and delay_p95: seconds from a request's append to its persona's, None before the first.
    """

    at: int
    problem: str | None = None
    events: int = 0
    arriving: float = 0.0
    applied: float = 0.0
    history: tuple[float, ...] = ()
    groups: tuple[GroupLag, ...] = ()
    window_minutes: int = WINDOW_MINUTES
    rules: tuple[Count, ...] = ()
    tiers: tuple[Count, ...] = ()
    removed: int = 0
    unreadable: int = 0
    delay_p50: float | None = None
    delay_p95: float | None = None


@dataclass(frozen=True, slots=True)
class LatestPersona:
    """One line in the list of latest personas. at: append time, ms."""

    at: int
    user_id: str
    version: int
    tier: Tier
    rule: Rule
    maturity: Maturity
    summary: str
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VersionLine:
    """One stored version of a viewer's persona; added, removed and reworded are labels."""

    version: int
    tier: Tier
    rule: Rule
    generated_at: int
    summary: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    reworded: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Why:
    """A refresh explained. reason: why it was asked for; divergence: how far the interests moved, "" where unknown;
    chance: what the divergence is compared with; divergence_end: where a scale of both ends.
    """

    reason: Reason
    divergence: str
    chance: str
    divergence_end: float


@dataclass(frozen=True, slots=True)
class ViewerCard:
    """A viewer's persona with what a person needs to read it: titles by video id, labels by cluster id.

    why: the explanation in words, None where the persona has none.
    """

    persona: Persona
    titles: Mapping[str, str]
    labels: Mapping[int, str]
    versions: tuple[VersionLine, ...]
    why: Why | None = None


class Labelled(Protocol):
    """What a cluster's card must have."""

    @property
    def label(self) -> str: ...  # noqa: D102


class Titles(Protocol):
    """What the page needs of a registry."""

    @property
    def cards(self) -> Mapping[int, Labelled]: ...  # noqa: D102

    def title_of(self, video_id: str) -> str | None: ...  # noqa: D102


class PageSource(Protocol):
    """Where the page's numbers come from."""

    async def start(self) -> None:
        """Begin to gather; returns at once, also when nothing answers yet."""

    async def stop(self) -> None:
        """Stop gathering and close what was opened here."""

    async def overview(self) -> Overview:
        """The fleet now. Never raises for what does not answer: `Overview.problem` says it."""

    async def latest(self) -> Sequence[LatestPersona]:
        """The latest personas, newest first, at most LATEST_LIMIT."""

    async def viewer(self, user_id: str) -> ViewerCard | None:
        """A viewer's card; None if nothing is stored. Raises SourceUnavailable."""

    async def health(self) -> Mapping[str, Health]:
        """State of each part the page reads from."""


def viewer_card(personas: Sequence[Persona], registry: Titles) -> ViewerCard:
    """The card of one viewer's stored personas (newest first, at least one)."""
    newest = personas[0]
    videos = {evidence.video_id for interest in newest.interests for evidence in interest.evidence}
    titles = {video: title for video in sorted(videos) if (title := registry.title_of(video))}
    clusters = {*newest.avoid, *(cluster for topic in newest.novel for cluster in topic.via)}
    labels = {cluster: registry.cards[cluster].label for cluster in clusters if cluster in registry.cards}
    labels |= {interest.cluster_id: interest.label for interest in newest.interests}
    names = {interest.interest_id: interest.label for persona in personas for interest in persona.interests}
    versions = tuple(_version_line(persona, names) for persona in personas)
    return ViewerCard(newest, titles, labels, versions, _why(newest.explanation) if newest.explanation else None)


def _why(explanation: Explanation) -> Why:
    return Why(
        reason=reason_of(explanation),
        divergence=divergence_measure(explanation),
        chance=CHANCE if explanation.divergence_null is not None else "",
        divergence_end=scale_end(explanation.divergence or 0.0, explanation.divergence_null),
    )


def _version_line(persona: Persona, names: Mapping[str, str]) -> VersionLine:
    def labels(ids: Sequence[str]) -> tuple[str, ...]:
        return tuple(names[interest] for interest in ids if interest in names)

    return VersionLine(
        version=persona.version,
        tier=persona.tier,
        rule=persona.rule,
        generated_at=persona.generated_at,
        summary=persona.summary,
        added=labels(persona.changes.added),
        removed=labels(persona.changes.removed),
        reworded=labels(persona.changes.reworded),
    )


class RecentCounts:
    """Counts by name over a sliding window of whole minutes; memory is bounded by minutes x names."""

    def __init__(self, minutes: int = WINDOW_MINUTES) -> None:
        self._minutes = minutes
        self._counts: dict[int, Counter[str]] = {}

    def add(self, name: str, at: int) -> None:
        """Count one of `name` at time `at` (ms)."""
        self._counts.setdefault(at // 60_000, Counter())[name] += 1

    def totals(self, now: int) -> tuple[Count, ...]:
        """Counts of the window that ends at `now` (ms), most first; forgets what is older."""
        first = now // 60_000 - self._minutes
        self._counts = {minute: counts for minute, counts in self._counts.items() if minute > first}
        total = sum(self._counts.values(), Counter[str]())
        return tuple(Count(name, count) for name, count in sorted(total.items(), key=lambda item: (-item[1], item[0])))


@dataclass(slots=True)
class Recent:
    """What was read lately from the request and persona topics. Everything in it is bounded."""

    rules: RecentCounts = field(default_factory=RecentCounts)
    tiers: RecentCounts = field(default_factory=RecentCounts)
    removals: RecentCounts = field(default_factory=RecentCounts)
    unreadable: RecentCounts = field(default_factory=RecentCounts)
    personas: list[LatestPersona] = field(default_factory=list)
    waiting: dict[str, int] = field(default_factory=dict)
    delays: deque[float] = field(default_factory=lambda: deque(maxlen=DELAYS_LIMIT))

    def add_request(self, request_id: str, rule: Rule, at: int) -> None:
        """Count a request appended at `at` (ms)."""
        self.rules.add(rule, at)
        self.waiting[request_id] = at
        if len(self.waiting) > 20 * DELAYS_LIMIT:  # superseded requests never get an answer
            del self.waiting[next(iter(self.waiting))]

    def add_persona(self, persona: LatestPersona, request_id: str) -> None:
        """Count a published persona, the answer to that request; keep it if it is among the latest."""
        self.tiers.add(persona.tier, persona.at)
        asked = self.waiting.pop(request_id, None)
        if asked is not None:
            self.delays.append(max(0, persona.at - asked) / 1000)
        self.personas.append(persona)
        # Partitions are read one after another, so append times do not arrive in order.
        self.personas.sort(key=lambda latest: latest.at, reverse=True)
        del self.personas[LATEST_LIMIT:]

    def remove(self, user_id: str, at: int) -> None:
        """Count a tombstone and forget what is kept of the viewer."""
        self.removals.add("removed", at)
        self.personas[:] = [latest for latest in self.personas if latest.user_id != user_id]


def glance_at_request(value: bytes | None) -> tuple[str, Rule]:
    """Id and rule of a refresh request, and nothing else of it: every request of the fleet passes here.

    A strict decoding takes a hundred times as long. Raises UnreadableRecordError.
    """
    try:
        request = orjson.loads(value or b"")
        return str(request["request_id"]), Rule(request["rule"])
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableRecordError(f"not a request: {error!r}") from error


def glance_at_persona(value: bytes, at: int) -> tuple[LatestPersona, str]:
    """A persona appended at `at` (ms) as the list shows it, and its request's id. See `glance_at_request`."""
    try:
        persona = orjson.loads(value)
        latest = LatestPersona(
            at=at,
            user_id=str(persona["user_id"]),
            version=int(persona["version"]),
            tier=Tier(persona["tier"]),
            rule=Rule(persona["rule"]),
            maturity=Maturity(persona["maturity"]),
            summary=str(persona["summary"]),
            labels=tuple(str(interest["label"]) for interest in persona["interests"]),
        )
        return latest, str(persona["request_id"])
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableRecordError(f"not a persona: {error!r}") from error


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` (0..1) of the values do not exceed; None for no values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class MemoryPageSource:
    """A source that shows what it was given. For tests, and for looking at the page without a broker."""

    def __init__(
        self,
        overview: Overview,
        latest: Sequence[LatestPersona] = (),
        cards: Mapping[str, ViewerCard] | None = None,
        health: Mapping[str, Health] | None = None,
    ) -> None:
        self.shown = overview
        self._latest = latest
        self._cards = cards or {}
        self._health = health or {"kafka": Health.OK, "store": Health.OK}
        self.running = False

    async def start(self) -> None:
        """See PageSource."""
        self.running = True

    async def stop(self) -> None:
        """See PageSource."""
        self.running = False

    async def overview(self) -> Overview:
        """See PageSource."""
        return self.shown

    async def latest(self) -> Sequence[LatestPersona]:
        """See PageSource."""
        return self._latest

    async def viewer(self, user_id: str) -> ViewerCard | None:
        """See PageSource."""
        return self._cards.get(user_id)

    async def health(self) -> Mapping[str, Health]:
        """See PageSource."""
        return self._health
