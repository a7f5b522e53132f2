"""Liveness by progress: what counts as standing still, and what is waiting by design."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from aiokafka.errors import KafkaConnectionError

from agents.liveness import Progress, measure


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """Progress over partitions 0 and 1 with a patience of 60 s, measured every 5 s of a clock of its own."""

    def __init__(self, stalled_seconds: float = 60.0) -> None:
        self.clock = Clock()
        self.progress = Progress("watch-events", stalled_seconds, self.clock)
        self.progress.assigned([0, 1])

    def run(self, seconds: float, *, each: Callable[[], None] = lambda: None, lag: int | None = 0) -> None:
        """Let time pass; partition 1 has this lag, partition 0 none. `each` runs before every measurement."""
        for _ in range(int(seconds / 5)):
            self.clock.now += 5
            each()
            self.progress.lag(0, 0)
            self.progress.lag(1, lag)


def test_nothing_waits_nothing_stalls() -> None:
    watched = Watched()
    watched.run(10_000)
    assert watched.progress.stalled() is None


def test_events_that_wait_with_nothing_applied_stall_after_the_patience() -> None:
    watched = Watched()
    watched.run(55, lag=3)
    assert watched.progress.stalled() is None
    watched.run(5, lag=3)
    problem = watched.progress.stalled()
    assert problem is not None
    for part in ("watch-events partition 1", "events wait", "60 s", "PERSONAS_STALLED_SECONDS=60"):
        assert part in problem


def test_a_partition_that_gets_on_does_not_hide_one_that_does_not() -> None:
    watched = Watched()
    watched.run(60, lag=3, each=lambda: watched.progress.applied(0, 1000))
    assert watched.progress.stalled() is not None


def test_applying_anything_is_getting_on_however_large_the_lag() -> None:
    watched = Watched()
    watched.run(10_000, lag=10**9, each=lambda: watched.progress.applied(1, 1))
    assert watched.progress.stalled() is None


def test_an_empty_batch_is_not_getting_on() -> None:
    watched = Watched()
    watched.run(60, lag=3, each=lambda: watched.progress.applied(1, 0))
    assert watched.progress.stalled() is not None


def test_it_recovers_when_it_moves_again() -> None:
    watched = Watched()
    watched.run(100, lag=3)
    watched.progress.applied(1, 1)
    assert watched.progress.stalled() is None


def test_reading_the_state_back_is_getting_on_while_it_moves() -> None:
    watched = Watched()
    positions = iter(range(10_000))
    watched.run(5_000, lag=None, each=lambda: watched.progress.recovering(1, next(positions)))
    assert watched.progress.stalled() is None
    watched.run(60, lag=None, each=lambda: watched.progress.recovering(1, 123_456) if watched.clock.now < 0 else None)
    assert "its state was being read back" in (watched.progress.stalled() or "")


def test_a_partition_that_is_never_opened_stalls() -> None:
    watched = Watched()
    watched.run(60, lag=None)
    assert watched.progress.stalled() is not None


def test_time_that_was_not_measured_does_not_count() -> None:
    watched = Watched()
    watched.run(50, lag=3)
    watched.clock.now += 3_600  # Kafka away, or the process stopped
    assert watched.progress.stalled() is None
    watched.run(5, lag=3)
    assert "60 s" in (watched.progress.stalled() or "")  # 50 and at most twice the pause


def test_partitions_that_moved_away_are_forgotten_and_new_ones_have_full_patience() -> None:
    watched = Watched()
    watched.run(100, lag=3)
    watched.progress.assigned([])
    assert watched.progress.stalled() is None
    watched.progress.applied(1, 1)
    watched.progress.recovering(1, 1)
    watched.progress.lag(1, 5)
    watched.progress.assigned([1, 2])
    watched.run(55, lag=3)
    assert watched.progress.stalled() is None
    assert watched.progress.partitions == [1, 2]


def test_no_patience_set_means_never() -> None:
    watched = Watched(stalled_seconds=0)
    watched.run(10_000, lag=3)
    assert watched.progress.stalled() is None


@pytest.mark.parametrize(("patience", "pause"), [(60, 5), (600, 5), (6, 1), (0, 5)])
def test_measurements_are_a_fraction_of_the_patience_apart(patience: float, pause: float) -> None:
    assert Progress("t", patience).pause == pause


class FakeLog:
    """Ends of partitions as given; `gaps`: offsets without a record. An end of -1 does not answer."""

    def __init__(self, ends: dict[int, int], gaps: frozenset[int] = frozenset()) -> None:
        self.ends = ends
        self.gaps = gaps
        self.looked = 0

    async def end(self, topic: str, partition: int) -> int:
        if self.ends[partition] < 0:
            raise KafkaConnectionError
        return self.ends[partition]

    async def is_empty(self, topic: str, partition: int, start: int, end: int) -> bool:
        self.looked += 1
        return set(range(start, end)) <= self.gaps


async def passed(watched: Watched, log: FakeLog, seconds: float, reached: dict[int, int | None]) -> str | None:
    for _ in range(int(seconds / 5)):
        watched.clock.now += 5
        await measure(watched.progress, log, "watch-events", reached.get)
    return watched.progress.stalled()


async def test_the_lag_is_the_distance_to_the_end_of_the_log() -> None:
    assert await passed(Watched(), FakeLog({0: 10, 1: 10}), 300, {0: 10, 1: 10}) is None
    assert "partition 1" in (await passed(Watched(), FakeLog({0: 10, 1: 11}), 60, {0: 10, 1: 10}) or "")


async def test_a_transaction_marker_behind_the_last_record_is_no_event() -> None:
    log = FakeLog({0: 10, 1: 12}, gaps=frozenset({10, 11}))
    assert await passed(Watched(), log, 600, {0: 10, 1: 10}) is None
    assert 0 < log.looked < 120, "looked for only where it matters"


async def test_brokers_that_do_not_answer_stall_nobody() -> None:
    assert await passed(Watched(), FakeLog({0: -1, 1: -1}), 600, {0: 10, 1: None}) is None


async def test_a_partition_not_open_yet_waits() -> None:
    assert "partition 1" in (await passed(Watched(), FakeLog({0: 10, 1: 10}), 60, {0: 10, 1: None}) or "")


async def test_a_log_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(FakeLog):
        async def end(self, topic: str, partition: int) -> int:
            await asyncio.sleep(3600)
            raise AssertionError

    monkeypatch.setattr("agents.liveness.ANSWER_SECONDS", 0.01)
    watched = Watched()
    await asyncio.wait_for(measure(watched.progress, Hanging({}), "watch-events", lambda _: 0), 5)
    assert watched.progress.stalled() is None
