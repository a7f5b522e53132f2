"""What the page counts and keeps: windows, latest personas, removals, delays, lag and rates."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from aiokafka import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from agents.page import kafka
from agents.page.source import (
    DELAYS_LIMIT,
    LATEST_LIMIT,
    Count,
    GroupLag,
    Health,
    Recent,
    RecentCounts,
    SourceUnavailable,
    TopicLag,
    glance_at_persona,
    glance_at_request,
    quantile,
    viewer_card,
)
from agents.settings import Settings
from agents.stores.memory import MemoryStore
from agents.stores.ports import StoredPersona, StoreUnavailable
from streams.decoding import UnreadableRecordError
from streams.records import Persona, Rule, Tier, encode
from tests.persona_samples import NOON, SampleRegistry, sample_persona

MINUTE = 60_000


def stored(persona: Persona) -> StoredPersona:
    return StoredPersona(
        persona.user_id, persona.version, persona.epoch, persona.request_id, persona.tier, encode(persona)
    )


def publish(recent: Recent, persona: Persona, at: int) -> None:
    recent.add_persona(*glance_at_persona(encode(persona), at))


def test_a_glance_agrees_with_the_record() -> None:
    persona = sample_persona()
    latest, request_id = glance_at_persona(encode(persona), NOON)
    assert (latest.user_id, latest.version, latest.tier, latest.rule) == ("ann", 42, Tier.STUDENT, Rule.DRIFT)
    assert latest.labels == ("italian cooking", "gravel cycling")
    assert latest.summary == persona.summary
    assert request_id == persona.request_id
    assert glance_at_request(b'{"request_id": "r", "rule": "age"}') == ("r", Rule.AGE)


@given(st.one_of(st.binary(), st.sampled_from([b"{}", b"[]", b"null", b"3", b'{"rule": 3, "request_id": 1}'])))
def test_a_glance_at_anything_else_is_unreadable(value: bytes) -> None:
    with pytest.raises(UnreadableRecordError):
        glance_at_request(value)
    with pytest.raises(UnreadableRecordError):
        glance_at_persona(value, NOON)


async def test_what_nobody_looks_at_is_not_followed_or_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_with(MemoryStore())
    monkeypatch.setattr(kafka, "FOLLOW_SECONDS", 0.05)
    await asyncio.sleep(0.06)
    waiting = asyncio.create_task(source._until_looked_at())
    await asyncio.sleep(0.06)
    assert not waiting.done()
    await source.overview()
    await asyncio.wait_for(waiting, 1)


def test_counts_leave_the_window() -> None:
    counts = RecentCounts(minutes=60)
    counts.add("drift", NOON)
    counts.add("drift", NOON + MINUTE)
    counts.add("age", NOON + 30 * MINUTE)
    assert counts.totals(NOON + 30 * MINUTE) == (Count("drift", 2), Count("age", 1))
    assert counts.totals(NOON + 60 * MINUTE) == (Count("age", 1), Count("drift", 1))
    assert counts.totals(NOON + 500 * MINUTE) == ()


def test_latest_personas_are_newest_first_and_bounded() -> None:
    recent = Recent()
    for number in range(LATEST_LIMIT + 20):
        publish(recent, sample_persona(f"user-{number}"), NOON + (number * 37 % 100) * 1000)
    times = [latest.at for latest in recent.personas]
    assert len(times) == LATEST_LIMIT
    assert times == sorted(times, reverse=True)


def test_a_removed_viewer_leaves_the_list() -> None:
    recent = Recent()
    publish(recent, sample_persona("ann"), NOON)
    publish(recent, sample_persona("bob"), NOON + 1)
    publish(recent, sample_persona("ann", 6), NOON + 2)
    recent.remove("ann", NOON + 3)
    assert [latest.user_id for latest in recent.personas] == ["bob"]
    assert recent.removals.totals(NOON + 3) == (Count("removed", 1),)


def test_delay_is_from_request_to_its_first_persona() -> None:
    recent = Recent()
    persona = sample_persona()
    recent.add_request(persona.request_id, Rule.DRIFT, NOON)
    publish(recent, sample_persona(tier=Tier.TEMPLATE), NOON + 2_500)
    publish(recent, persona, NOON + 9_000)
    assert list(recent.delays) == [2.5]
    assert recent.rules.totals(NOON) == (Count("drift", 1),)
    assert recent.tiers.totals(NOON) == (Count("student", 1), Count("template", 1))


def test_requests_without_an_answer_are_forgotten_at_last() -> None:
    recent = Recent()
    for number in range(21 * DELAYS_LIMIT):
        recent.add_request(str(number), Rule.AGE, NOON)
    assert len(recent.waiting) == 20 * DELAYS_LIMIT
    assert "0" not in recent.waiting


@given(st.lists(st.floats(0, 1e6), max_size=50), st.floats(0, 1))
def test_a_quantile_is_one_of_the_values(values: list[float], share: float) -> None:
    found = quantile(values, share)
    assert (found is None) if not values else (found in values)
    if values:
        assert quantile(values, 0) == min(values)
        assert quantile(values, 1) == max(values)


def test_a_card_without_titles_or_known_clusters() -> None:
    card = viewer_card([sample_persona(avoid=(99,))], SampleRegistry(cards={}, titles={}))
    assert card.titles == {}
    assert 99 not in card.labels
    assert card.versions[0].added == ("gravel cycling",)


def parts(topic: str, *offsets: int) -> dict[TopicPartition, int]:
    return {TopicPartition(topic, number): offset for number, offset in enumerate(offsets)}


def test_lag_is_what_is_not_committed() -> None:
    ends = parts("a", 100, 50) | parts("b", 10)
    begins = parts("a", 0, 20) | parts("b", 0)
    lag = kafka._group_lag("g", ["a", "b"], begins, ends, {TopicPartition("a", 0): 90})
    # Partition 1 has no commit: all that retention has left counts. Topic b is not read by the group yet.
    assert lag == GroupLag("g", 40, (TopicLag("a", 40),))
    lag = kafka._group_lag("g", ["a", "b"], begins, ends, parts("a", 100, 50) | parts("b", 4))
    assert lag == GroupLag("g", 6, (TopicLag("a", 0), TopicLag("b", 6)))


def test_a_recreated_topic_gives_no_negative_lag() -> None:
    lag = kafka._group_lag("g", ["a"], parts("a", 0), parts("a", 5), parts("a", 900))
    assert lag.lag == 0


def test_rates_are_per_second_over_the_last_seconds() -> None:
    samples = [kafka._Sample(float(second), 100 * second, 50 * second) for second in range(60)]
    assert kafka._rate(samples, lambda sample: sample.appended) == pytest.approx(100)
    assert kafka._rate(samples, lambda sample: sample.applied) == pytest.approx(50)
    assert kafka._rate(samples[:1], lambda sample: sample.appended) == 0
    assert kafka._history(samples) == pytest.approx((100.0,) * 59)
    reset = [*samples, kafka._Sample(60.0, 0, 0)]
    assert kafka._rate(reset, lambda sample: sample.appended) == 0


def source_with(store: MemoryStore) -> kafka.KafkaPageSource:
    return kafka.KafkaPageSource(Settings(kafka_bootstrap="127.0.0.1:9"), store, SampleRegistry())


async def test_a_viewer_is_read_from_the_store() -> None:
    store = MemoryStore()
    for sequence in (3, 4, 5):
        await store.put(stored(sample_persona(sequence=sequence)))
    source = source_with(store)
    card = await source.viewer("ann")
    assert card is not None
    assert card.persona == sample_persona()
    assert [line.version for line in card.versions] == [42, 34, 26]
    assert await source.viewer("bob") is None
    assert await source.viewer("x" * 70_000) is None


async def test_a_stored_persona_nobody_can_read_is_said() -> None:
    store = MemoryStore()
    await store.put(StoredPersona("ann", 10, 0, "r", "student", b'{"user_id": 3}'))
    with pytest.raises(SourceUnavailable, match="cannot be read"):
        await source_with(store).viewer("ann")


async def test_a_store_that_is_away_is_said() -> None:
    store = MemoryStore()
    await store.close()
    with pytest.raises(SourceUnavailable) as raised:
        await source_with(store).viewer("ann")
    assert isinstance(raised.value.__cause__, StoreUnavailable)
    assert (await source_with(store).health())["store"] is Health.DOWN


async def test_kafka_absent_is_a_problem_with_its_address_and_stops_quickly() -> None:
    source = source_with(MemoryStore())
    await source.start()
    try:
        for _ in itertools.repeat(None, 100):
            problem = (await source.overview()).problem
            if problem and "KafkaConnectionError" in problem:
                break
            await asyncio.sleep(0.1)
        assert problem is not None
        assert "127.0.0.1:9" in problem
        assert (await source.health())["kafka"] is Health.DOWN
    finally:
        await asyncio.wait_for(source.stop(), 10)
