"""Half an hour of events at a rate, the worker killed and started again now and then; nothing may be lost or twice.

    python -m benchmarks.soak                                      # 30 minutes at 20,000 events/s, 5 kills
    python -m benchmarks.soak --minutes 2 --rate 2000 --kills 1    # a first look
    python -m benchmarks.soak --state-store disk
    python -m benchmarks.soak --write                              # also rewrites benchmarks/soak.md

Ends with one JSON object; a missed bar is reported, and the exit status is 0. It is 1 if a process fails that was not
killed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from agents.kafka_admin import prefixed
from agents.settings import Settings
from agents.topic_reader import TopicReader
from benchmarks.throughput.broker import Broker, CommittedOffsets
from benchmarks.throughput.command import on_a_broker, publish
from benchmarks.throughput.pacer import Pace, counts_of, start_pacer
from benchmarks.throughput.processes import OPENED, Measured, start_worker
from benchmarks.throughput.report import machine
from streams import topics
from streams.state import from_bytes

MINUTES: Final = 30.0
RATE: Final = 20_000
KILLS: Final = 5
USERS: Final = 10_000
SAMPLE_SECONDS: Final = 0.25
PROGRESS_SECONDS: Final = 15.0
AFTER_KILL_SECONDS: Final = 20.0
"""What is late so soon after a kill is told apart: the group gives a dead member its session time-out."""
MEMORY_WARM_UP: Final = 0.3
"""Share of a process's life that its memory may take to settle."""
LEAST_LIFE_SECONDS: Final = 30.0
"""A process that lived shorter says nothing about its memory."""
START_SECONDS: Final = 120.0
DRAIN_SECONDS: Final = 300.0
AGE_BAR: Final = 10.0
MEMORY_BAR: Final = 0.05
SEGMENT_BYTES: Final = 64 * 1024 * 1024
WATCH_BYTES: Final = 4 * SEGMENT_BYTES
"""Of events kept per partition: minutes of them, more than a worker is ever behind."""
RESULTS: Final = Path(__file__).parent / "soak.md"


@dataclass
class CommitAge:
    """Age of the oldest event that is not committed, from samples of the topic's ends.

    An event at an offset that the log did not have at a sample was appended after it, so the age is at most the time
    since the newest sample whose end is not beyond the committed offset.
    """

    partitions: int
    _samples: deque[tuple[float, Sequence[int]]] = field(default_factory=deque)

    def observe(self, now: float, ends: Sequence[int], committed: Sequence[int]) -> float:
        """Upper bound in seconds, 0 if all is committed. now: when the sample was begun, monotonic."""
        self._samples.append((now, ends))
        oldest = now
        for partition in range(self.partitions):
            if committed[partition] < ends[partition]:
                before = [at for at, known in self._samples if known[partition] <= committed[partition]]
                oldest = min(oldest, max(before, default=self._samples[0][0]))
        while len(self._samples) > 1 and self._samples[1][0] <= oldest:
            self._samples.popleft()
        return now - oldest


@dataclass
class Life:
    """One worker process: when it was started, and its resident memory at times since, both in seconds and bytes."""

    started: float
    memory: list[tuple[float, int]] = field(default_factory=list)

    def growth(self) -> float | None:
        """Its memory at the end against that after its warm-up, 0.05 for 5% more; None if it lived too short."""
        if not self.memory or self.memory[-1][0] - self.started < LEAST_LIFE_SECONDS:
            return None
        settled = self.started + MEMORY_WARM_UP * (self.memory[-1][0] - self.started)
        sizes = [size for at, size in self.memory if at >= settled]
        part = max(1, len(sizes) // 5)
        return median(sizes[-part:]) / median(sizes[:part]) - 1.0


@dataclass(frozen=True, slots=True)
class Figures:
    """commit_age_after_kill: the highest within 20 s after a kill; commit_age: at any other time."""

    minutes: float
    events: int
    kills: int
    over: int
    under: int
    memory_growth: float | None
    memory_mb: float
    commit_age: float
    commit_age_after_kill: float
    late_seconds: float
    dead_letters: int
    disk_gb: float
    users: int
    rate: int
    state_store: str

    def document(self) -> dict[str, Any]:
        """One JSON object."""
        growth = self.memory_growth
        return {
            "minutes": round(self.minutes, 2),
            "events": self.events,
            "kills": self.kills,
            "over": self.over,
            "under": self.under,
            "memory_growth": None if growth is None else round(growth, 4),
            "commit_age_max_s": round(self.commit_age, 2),
            "commit_age_after_kill_max_s": round(self.commit_age_after_kill, 2),
            "memory_mb": round(self.memory_mb, 1),
            "rate": self.rate,
            "users": self.users,
            "state_store": self.state_store,
            "late_seconds": self.late_seconds,
            "dead_letters": self.dead_letters,
            "disk_gb_max": round(self.disk_gb, 2),
            "bars_met": {
                "exact": self.over == self.under == 0,
                "memory": None if growth is None else growth <= MEMORY_BAR,
                "commit_age": self.commit_age <= AGE_BAR,
            },
        }


def kill_times(kills: int, seconds: float, seed: int) -> list[float]:
    """Seconds from the start at which to kill: one at random in each of equal parts of the middle 80%."""
    random = np.random.default_rng(seed)
    part = 0.8 * seconds / max(1, kills)
    return [float(0.1 * seconds + part * (i + random.random())) for i in range(kills)]


class Soak:
    """A broker, a pacer, and a worker that is killed."""

    def __init__(self, broker: Broker, pace: Pace, kills: int, state_store: str) -> None:
        self._broker = broker
        self._pace = pace
        self._kill_at = kill_times(kills, pace.seconds, pace.seed)
        self._settings = self._prepared(state_store)
        self._topic = prefixed(self._settings, topics.WATCH_EVENTS)
        self._lives: list[Life] = []
        self._age = CommitAge(self._settings.partitions)
        self._worst = self._worst_after_kill = 0.0
        self._killed_at = -AFTER_KILL_SECONDS
        self._disk = 0

    def run(self) -> Figures:
        """All of it. Raises RuntimeError and TimeoutError."""
        started = time.monotonic()
        worker = self._start()
        counts = self._broker.folder / "counts.json"
        pacer: Measured | None = None
        try:
            worker.logged(OPENED, self._settings.partitions, START_SECONDS)
            pacer = start_pacer(
                self._settings, self._topic, self._pace, counts, self._broker.folder / "logs" / "pacer.log"
            )
            with CommittedOffsets(self._settings, prefixed(self._settings, topics.WATCH_APP), self._topic) as committed:
                worker = self._watch(worker, pacer, committed)
            worker.end()
            said = pacer.last_json()
        finally:
            worker.end()
            if pacer is not None:
                pacer.end()
        tell("comparing every viewer's count")
        over, under = self._compared(counts_of(counts))
        growth = [found for life in self._lives if (found := life.growth()) is not None]
        return Figures(
            minutes=(time.monotonic() - started) / 60,
            events=said["events"],
            kills=len(self._lives) - 1,
            over=over,
            under=under,
            memory_growth=max(growth, default=None),
            memory_mb=max(size for life in self._lives for _, size in life.memory) / 1e6,
            commit_age=self._worst,
            commit_age_after_kill=self._worst_after_kill,
            late_seconds=said["late_seconds"],
            dead_letters=self._dead_letters(),
            disk_gb=self._disk / 1e9,
            users=self._pace.users,
            rate=self._pace.rate,
            state_store=self._settings.state_store,
        )

    def _prepared(self, state_store: str) -> Settings:
        """Topics that do not fill the disk: events deleted by size, the changelog compacted as it grows."""
        by_size = {"retention.bytes": str(WATCH_BYTES), "segment.bytes": str(SEGMENT_BYTES)}
        settings = self._broker.create_topics("soak-", by_size)
        compacted_soon = {"segment.bytes": str(SEGMENT_BYTES), "min.cleanable.dirty.ratio": "0.2"}
        self._broker.configure(prefixed(settings, topics.INTERESTS_CHANGELOG), compacted_soon)
        return replace(settings, state_store=state_store, state_folder=self._broker.folder / "states")

    def _start(self) -> Measured:
        self._lives.append(Life(time.monotonic()))
        return start_worker(self._settings, self._broker.folder / "logs" / f"worker-{len(self._lives)}.log")

    def _watch(self, worker: Measured, pacer: Measured, committed: CommittedOffsets) -> Measured:
        """Until all that the pacer sends is committed; returns the worker that runs then."""
        began = told = time.monotonic()
        sent_all: float | None = None
        waiting = list(self._kill_at)
        while True:
            now = time.monotonic()
            worker.check()
            if waiting and now - began >= waiting[0]:
                waiting.pop(0)
                worker.kill()
                self._killed_at = time.monotonic()
                worker = self._start()
                tell(f"killed and started again after {now - began:.0f} s")
                continue
            ends, done = committed.ends(), committed.by_partition()
            self._note(now, worker, ends, done)
            if not pacer.running and sent_all is None:
                sent_all = now
            if sent_all is not None and done == ends:
                return worker
            if sent_all is not None and now - sent_all > DRAIN_SECONDS:
                raise TimeoutError(f"{sum(ends) - sum(done):,} events not committed after {DRAIN_SECONDS:.0f} s")
            if now - told > PROGRESS_SECONDS:
                told = now
                self._disk = max(self._disk, self._used())
                memory = self._lives[-1].memory[-1][1]
                tell(f"{sum(done):,} committed, {sum(ends) - sum(done):,} to do, {memory / 1e6:,.0f} MB")
            time.sleep(max(0.0, SAMPLE_SECONDS - (time.monotonic() - now)))

    def _note(self, now: float, worker: Measured, ends: Sequence[int], done: Sequence[int]) -> None:
        self._lives[-1].memory.append((now, worker.memory_bytes()))
        age = self._age.observe(now, ends, done)
        if now - self._killed_at <= AFTER_KILL_SECONDS:
            self._worst_after_kill = max(self._worst_after_kill, age)
        else:
            self._worst = max(self._worst, age)

    def _used(self) -> int:
        """Bytes of the broker's segments, those to be deleted included."""
        total = 0
        for path in self._broker.log_folder.rglob("*.log*"):
            try:
                total += path.stat().st_size
            except FileNotFoundError:  # just deleted
                continue
        return total

    def _compared(self, expected: Counter[str]) -> tuple[int, int]:
        """Events that the newest states have too many and too few, summed over viewers."""
        found: Counter[str] = Counter()
        with TopicReader(self._settings) as reader:
            for message in reader.read(prefixed(self._settings, topics.INTERESTS_CHANGELOG)):
                value = message.value()
                counted = int(from_bytes(value)["events"]) if value else 0
                found[(message.key() or b"").decode()] = counted
        return sum((found - expected).values()), sum((expected - found).values())

    def _dead_letters(self) -> int:
        with TopicReader(self._settings) as reader:
            letters = prefixed(self._settings, topics.dead_letters_of(topics.WATCH_EVENTS))
            return sum(1 for _ in reader.read(letters))


def markdown(figures: Figures, command: str) -> str:
    found = figures.document()
    met = {name: "-" if bar is None else "yes" if bar else "**no**" for name, bar in found["bars_met"].items()}
    growth = "-" if figures.memory_growth is None else f"{figures.memory_growth:+.1%}"
    rows = (
        ("events counted twice, and not at all", "0, 0", f"{figures.over:,}, {figures.under:,}", met["exact"]),
        ("memory of a process after its warm-up", f"at most +{MEMORY_BAR:.0%}", growth, met["memory"]),
        (
            f"oldest event not committed, except in the {AFTER_KILL_SECONDS:.0f} s after a kill",
            f"at most {AGE_BAR:.0f} s",
            f"{figures.commit_age:.1f} s",
            met["commit_age"],
        ),
    )
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"""# Soak

`{command}`. Written by that command.

{machine()}

{figures.minutes:.0f} minutes, {figures.events:,} events at {figures.rate:,} a second over {figures.users:,} viewers,
{figures.kills} times SIGKILL and a new worker at once, states in {figures.state_store}.

| asked | bar | measured | met |
| --- | --- | --- | --- |
{table}

In the {AFTER_KILL_SECONDS:.0f} s after a kill the oldest event that was not committed was up to
{figures.commit_age_after_kill:.1f} s old: the group waits for the dead member's session to end. The worker had up to
{figures.memory_mb:,.0f} MB resident. Dead letters: {figures.dead_letters}. The producer was {figures.late_seconds} s
behind its schedule at worst. The broker's log took up to {figures.disk_gb:.1f} GB: events are deleted by size, the
changelog is compacted in segments of {SEGMENT_BYTES // 2**20} MiB.

Exactness: the events in the newest state of every viewer in the changelog against what the producer was told was
acknowledged, summed over viewers. Memory: the median of the last fifth of a process's samples against that of the first
fifth after {MEMORY_WARM_UP:.0%} of its life; the worst of the processes that lived {LEAST_LIFE_SECONDS:.0f} s or more.
Age: an upper bound, from the topic's ends and the group's committed offsets, sampled every {SAMPLE_SECONDS} s.
"""


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(command_line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"how long events are sent ({MINUTES:.0f})")
    parser.add_argument("--rate", type=int, default=RATE, help=f"events a second ({RATE:,})")
    parser.add_argument("--kills", type=int, default=KILLS, help=f"SIGKILLs of the worker ({KILLS})")
    parser.add_argument("--users", type=int, default=USERS, help=f"viewers ({USERS:,})")
    parser.add_argument("--seed", type=int, default=1, help="of events and kills (1)")
    parser.add_argument("--state-store", choices=("memory", "disk"), default="memory")
    parser.add_argument("--write", action="store_true", help=f"rewrite benchmarks/{RESULTS.name}")
    arguments = parser.parse_args(command_line)
    if arguments.minutes < 0.5 or arguments.rate < 1 or arguments.kills < 0 or arguments.users < 100:
        parser.error("at least half a minute, a rate of 1, no kills and 100 viewers")
    command = "python -m benchmarks.soak " + " ".join(sys.argv[1:] if command_line is None else command_line)
    pace = Pace(arguments.rate, arguments.minutes * 60, arguments.users, arguments.seed, "soak")
    figures = on_a_broker(lambda broker: Soak(broker, pace, arguments.kills, arguments.state_store).run(), tell)
    text = markdown(figures, command.strip())
    publish(text, figures.document(), RESULTS if arguments.write else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
