"""The page's numbers from Kafka itself, so that they are the fleet's and not one worker's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from agents.kafka_admin import aiokafka_options, prefixed
from agents.kafka_clients import TopicMissingError, partitions_of
from agents.page.source import (
    HISTORY_LIMIT,
    WINDOW_MINUTES,
    GroupLag,
    Health,
    LatestPersona,
    Overview,
    Recent,
    SourceUnavailable,
    Titles,
    TopicLag,
    ViewerCard,
    glance_at_persona,
    glance_at_request,
    quantile,
    viewer_card,
)
from agents.settings import Settings
from agents.stores.ports import PersonaStore, StoreError, StoreUnavailable
from agents.telemetry import LAG, Telemetry
from streams.decoding import UnreadableRecordError, decode_persona
from streams.topics import PERSONA_APP, PERSONAS, REFRESH_REQUESTS, USER_CONTROLS, WATCH_APP, WATCH_EVENTS

log = logging.getLogger(__name__)

GROUPS: Final = {WATCH_APP: (WATCH_EVENTS, USER_CONTROLS), PERSONA_APP: (REFRESH_REQUESTS,)}
"""Consumer groups and the topics they commit; the first one counts also before the group's first commit."""
STAYING: Final = (b"moved", b"expired")
"""Reasons of tombstones of personas that nobody removed: they are on another partition, or were gone from the store."""
SAMPLE_SECONDS: Final = 1.0
IDLE_SAMPLE_SECONDS: Final = 10.0
"""Between samples while nobody looks: each costs the brokers a few requests, in every worker of a fleet."""
WATCHED_SECONDS: Final = 15.0
FOLLOW_SECONDS: Final = 300.0
"""Records are followed for this long after the last look, then not at all: a fleet publishes many of them."""
RATE_SECONDS: Final = 10.0
"""Rates are taken over this long: groups commit every few seconds, so a shorter one would show steps."""
LOOK_BACK: Final = 2_000
"""Records per partition that a fresh page reads at most to fill its window."""
RETRY_SECONDS: Final = 2.0
ANSWER_SECONDS: Final = 5.0
"""Brokers that take longer to tell offsets count as away; the client alone would wait 40 seconds."""


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float  # monotonic seconds
    appended: int
    applied: int


class KafkaPageSource:
    """Reads offsets, requests and personas from Kafka, and viewers' cards from the store.

    Joins no consumer group. What does not answer is named in `Overview.problem` and tried again. `telemetry`
    gets each group's lag. The store and the registry stay the caller's to close.
    """

    def __init__(
        self, settings: Settings, store: PersonaStore, registry: Titles, telemetry: Telemetry | None = None
    ) -> None:
        self._settings = settings
        self._store = store
        self._registry = registry
        self._telemetry = telemetry
        self._recent = Recent()
        self._samples: deque[_Sample] = deque(maxlen=121)
        self._groups: tuple[GroupLag, ...] = ()
        self._problems: dict[str, str] = {"offsets": "connecting to Kafka", "records": "connecting to Kafka"}
        self._tasks: list[asyncio.Task[None]] = []
        self._looked_at = time.monotonic()
        self._looked = asyncio.Event()

    async def start(self) -> None:
        """See PageSource."""
        parts = {"offsets": self._sample_offsets, "records": self._follow_records}
        self._tasks = [asyncio.create_task(self._keep(name, body)) for name, body in parts.items()]

    async def stop(self) -> None:
        """See PageSource."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def overview(self) -> Overview:
        """See PageSource."""
        self._looked_at = time.monotonic()
        self._looked.set()
        now = int(time.time() * 1000)
        recent, samples = self._recent, self._samples
        return Overview(
            at=now,
            problem=next(iter(self._problems.values()), None),
            events=samples[-1].appended if samples else 0,
            arriving=_rate(samples, lambda sample: sample.appended),
            applied=_rate(samples, lambda sample: sample.applied),
            history=_history(samples),
            groups=self._groups,
            window_minutes=WINDOW_MINUTES,
            rules=recent.rules.totals(now),
            tiers=recent.tiers.totals(now),
            removed=sum(count.count for count in recent.removals.totals(now)),
            unreadable=sum(count.count for count in recent.unreadable.totals(now)),
            delay_p50=quantile(recent.delays, 0.5),
            delay_p95=quantile(recent.delays, 0.95),
        )

    async def latest(self) -> Sequence[LatestPersona]:
        """See PageSource."""
        return tuple(self._recent.personas)

    async def viewer(self, user_id: str) -> ViewerCard | None:
        """See PageSource."""
        try:
            latest = await self._store.latest(user_id)
            history = await self._store.history(user_id, HISTORY_LIMIT) if latest else []
        except StoreUnavailable as error:
            raise SourceUnavailable(str(error)) from error
        except StoreError:  # an id that no store can hold has no persona
            return None
        if latest is None:
            return None
        older = [row for row in history if row.version < latest.version]
        try:
            return viewer_card([decode_persona(row.body) for row in (latest, *older)], self._registry)
        except UnreadableRecordError as error:
            raise SourceUnavailable(f"a stored persona of this viewer cannot be read: {error}") from error

    async def health(self) -> Mapping[str, Health]:
        """See PageSource."""
        return {
            "kafka": Health.DOWN if "offsets" in self._problems else Health.OK,
            "store": Health.OK if await self._store.ready() else Health.DOWN,
        }

    async def _keep(self, name: str, body: Callable[[], Awaitable[None]]) -> None:
        """Run `body` for as long as the page is up, again after an error."""
        while True:
            try:
                await body()
            except (KafkaError, OSError) as error:
                where = f"Kafka at {self._settings.kafka_bootstrap}"
                self._report(name, f"{where} does not answer ({type(error).__name__})")
            except TopicMissingError as error:
                self._report(name, str(error))
            except Exception:
                # The page is a view: a fault in it must be seen, but must not stop the worker's counting.
                log.exception("the page can no longer read %s", name)
                self._problems[name] = f"the page can no longer read {name}; see the worker's log"
                return
            await asyncio.sleep(RETRY_SECONDS)

    def _report(self, name: str, problem: str) -> None:
        if self._problems.get(name) != problem:
            log.warning("page, %s: %s", name, problem)
        self._problems[name] = problem

    # ---- offsets: throughput and lag

    async def _sample_offsets(self) -> None:
        consumer = AIOKafkaConsumer(**aiokafka_options(self._settings), enable_auto_commit=False)
        admin = AIOKafkaAdminClient(**aiokafka_options(self._settings))
        async with contextlib.AsyncExitStack() as stack:
            # A failed start leaves connections behind too, so closing is arranged first.
            stack.push_async_callback(consumer.stop)
            await consumer.start()
            stack.push_async_callback(admin.close)
            await admin.start()
            topics = [prefixed(self._settings, topic) for topics in GROUPS.values() for topic in topics]
            partitions = await partitions_of(consumer, topics)
            while True:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await self._sample(consumer, admin, partitions)
                self._problems.pop("offsets", None)
                await self._pause()

    async def _pause(self) -> None:
        await asyncio.sleep(SAMPLE_SECONDS)
        if self._looked_within(WATCHED_SECONDS):
            return
        self._looked.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._looked.wait(), IDLE_SAMPLE_SECONDS - SAMPLE_SECONDS)

    async def _sample(
        self, consumer: AIOKafkaConsumer, admin: AIOKafkaAdminClient, partitions: Sequence[TopicPartition]
    ) -> None:
        prefix = self._settings.topic_prefix
        ends = await consumer.end_offsets(partitions)
        begins = await consumer.beginning_offsets(partitions)
        groups: list[GroupLag] = []
        applied = 0
        for group, names in GROUPS.items():
            committed = await _committed(admin, prefix + group)
            wanted = [prefix + name for name in names]
            groups.append(_group_lag(prefix + group, wanted, begins, ends, committed))
            if group == WATCH_APP:
                applied = sum(offset for part, offset in committed.items() if part.topic == prefix + WATCH_EVENTS)
        appended = sum(end for part, end in ends.items() if part.topic == prefix + WATCH_EVENTS)
        self._samples.append(_Sample(time.monotonic(), appended, applied))
        self._groups = tuple(groups)
        if self._telemetry is not None:
            for found in groups:
                self._telemetry.observe(LAG, found.lag, found.group)

    # ---- records: rules, tiers, latest personas

    async def _follow_records(self) -> None:
        """Read the window's records and then each new one, until nobody has looked for FOLLOW_SECONDS."""
        await self._until_looked_at()
        consumer = AIOKafkaConsumer(
            **aiokafka_options(self._settings), enable_auto_commit=False, max_partition_fetch_bytes=1 << 20
        )
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(consumer.stop)
            await consumer.start()
            prefix = self._settings.topic_prefix
            partitions = await partitions_of(consumer, [prefix + REFRESH_REQUESTS, prefix + PERSONAS])
            consumer.assign(partitions)
            await _seek_back(consumer, partitions)
            self._recent = Recent()  # what was counted before a lost connection is read again
            while self._looked_within(FOLLOW_SECONDS):
                batches = await consumer.getmany(timeout_ms=500, max_records=500)
                self._problems.pop("records", None)
                for part, records in batches.items():
                    take = self._take_persona if part.topic == prefix + PERSONAS else self._take_request
                    for record in records:
                        take(record)
        # A viewer may be removed while nobody follows: what is kept must not outlive that.
        self._recent = Recent()
        self._problems["records"] = "catching up"

    async def _until_looked_at(self) -> None:
        while not self._looked_within(FOLLOW_SECONDS):
            self._looked.clear()
            await self._looked.wait()

    def _looked_within(self, seconds: float) -> bool:
        return time.monotonic() - self._looked_at < seconds

    def _take_request(self, record: ConsumerRecord) -> None:
        try:
            request_id, rule = glance_at_request(record.value)
        except UnreadableRecordError:
            self._recent.unreadable.add("request", record.timestamp)
        else:
            self._recent.add_request(request_id, rule, record.timestamp)

    def _take_persona(self, record: ConsumerRecord) -> None:
        if record.value is None:
            if dict(record.headers).get("reason") in STAYING:
                return
            self._recent.remove((record.key or b"").decode("utf-8", "replace"), record.timestamp)
            return
        try:
            persona, request_id = glance_at_persona(record.value, record.timestamp)
        except UnreadableRecordError:
            self._recent.unreadable.add("persona", record.timestamp)
        else:
            self._recent.add_persona(persona, request_id)


async def _committed(admin: AIOKafkaAdminClient, group: str) -> dict[TopicPartition, int]:
    offsets = await admin.list_consumer_group_offsets(group)
    return {part: found.offset for part, found in offsets.items() if found.offset >= 0}


def _group_lag(
    group: str,
    topics: Sequence[str],
    begins: Mapping[TopicPartition, int],
    ends: Mapping[TopicPartition, int],
    committed: Mapping[TopicPartition, int],
) -> GroupLag:
    """Lag of a group by topic. A partition without a commit has all its records to be read."""
    lags: list[TopicLag] = []
    for number, topic in enumerate(topics):
        parts = [part for part in ends if part.topic == topic]
        if number and not any(part in committed for part in parts):
            continue
        lag = sum(max(0, ends[part] - max(begins[part], committed.get(part, 0))) for part in parts)
        lags.append(TopicLag(topic, lag))
    return GroupLag(group, sum(found.lag for found in lags), tuple(lags))


async def _seek_back(consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition]) -> None:
    """Seek to where the window begins, but no further back than LOOK_BACK records."""
    since = int(time.time() * 1000) - WINDOW_MINUTES * 60_000
    ends = await consumer.end_offsets(partitions)
    begins = await consumer.beginning_offsets(partitions)
    found = await consumer.offsets_for_times(dict.fromkeys(partitions, since))
    for part in partitions:
        first = found[part]
        start = ends[part] if first is None else first.offset
        consumer.seek(part, max(begins[part], ends[part] - LOOK_BACK, start))


def _rate(samples: Sequence[_Sample], value: Callable[[_Sample], int]) -> float:
    """Per second, from the newest sample back to the first one at least RATE_SECONDS old (or the oldest)."""
    if len(samples) < 2:
        return 0.0
    newest = samples[-1]
    oldest = next((old for old in reversed(samples) if newest.at - old.at >= RATE_SECONDS), samples[0])
    return max(0, value(newest) - value(oldest)) / (newest.at - oldest.at)


def _history(samples: Sequence[_Sample]) -> tuple[float, ...]:
    pairs = list(zip(list(samples), list(samples)[1:], strict=False))[-60:]
    return tuple(max(0, new.appended - old.appended) / (new.at - old.at) for old, new in pairs)
