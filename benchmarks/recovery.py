"""How long a worker needs to have its viewers' states back, from the changelog and from a disk store.

    python -m benchmarks.recovery                  # a million viewers, 12 clusters each; some minutes, 4 GB of disk
    python -m benchmarks.recovery --users 50000    # a first look
    python -m benchmarks.recovery --write          # also rewrites benchmarks/recovery.md

Ends with one JSON object; a missed bar is reported, and the exit status is 0. It is 1 if a worker fails, or does not
have what was written.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import orjson

from agents.compiled import worker_kernel
from agents.kafka_admin import prefixed
from agents.settings import Settings
from agents.topic_reader import TopicReader
from benchmarks.throughput.broker import Broker, CommittedOffsets, produce, wait_until
from benchmarks.throughput.command import on_a_broker, publish
from benchmarks.throughput.event_log import START_MS, cluster_of_video
from benchmarks.throughput.figures import Bar
from benchmarks.throughput.processes import ASSIGNED, OPENED, Measured, start, start_worker
from benchmarks.throughput.report import machine
from benchmarks.throughput.runners import PEERS
from streams import topics
from streams.packing import Pack
from streams.state import EVIDENCE, RING, SLOTS, WORD, WORDS, from_bytes, new_state

USERS: Final = 1_000_000
CLUSTERS: Final = 12
STOCK_USERS: Final = 50_000
"""Stock Faust needs minutes for a million; its rate is taken from so many."""
TAIL: Final = 0.01
"""Share of the viewers whose state changes while the worker with the warm disk store is down."""
REVISION: Final = 100
"""By how many events those states are ahead of the first ones."""
CHUNK: Final = 10_000
CHECKED: Final = 200
"""Viewers of whom an event is sent after recovery: what comes back shows the state it was applied to."""
START_SECONDS: Final = 120.0
RECOVERY_SECONDS: Final = 1800.0
SETTLE_SECONDS: Final = 3.0
PREFIX: Final = "recovery-"
UNPACKED: Final = re.compile(r"watch partition \d+: all viewers recovered are unpacked")
RESULTS: Final = Path(__file__).parent / "recovery.md"


class WrongStateError(RuntimeError):
    """A recovered state is not what was written."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """seconds: from the assignment of partitions until all are open; memory: resident bytes after it settled.

    unpacked_seconds: from the assignment until every state recovered into memory is unpacked; until then events are
    taken, but memory is not what it will be. Memory is measured later.
    """

    seconds: float
    memory: int
    unpacked_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """stock: viewers a second of stock Faust, measured over `stock_users`; base: a worker with an empty changelog."""

    users: int
    value_bytes: int
    base: Recovery
    memory_store: Recovery
    disk_cold: Recovery
    disk_warm: Recovery
    stock_users: int
    stock: float

    @property
    def bytes_per_user(self) -> float:
        return (self.memory_store.memory - self.base.memory) / self.users

    @property
    def stock_ratio(self) -> float:
        return self.users / self.memory_store.seconds / self.stock

    def bars(self) -> list[Bar]:
        """Negative, so that more is better for each."""
        return [
            Bar("times stock Faust, at least", 20.0, self.stock_ratio),
            Bar("seconds, at most", -30.0, -self.memory_store.seconds),
            Bar("resident bytes a viewer, at most", -2500.0, -self.bytes_per_user),
            Bar("seconds with a warm disk store, at most", -3.0, -self.disk_warm.seconds),
        ]

    def document(self) -> dict[str, Any]:
        """One JSON object."""
        return {
            "users": self.users,
            "seconds": round(self.memory_store.seconds, 2),
            "stock_ratio": round(self.stock_ratio, 1),
            "bytes_per_user": round(self.bytes_per_user),
            "warm_seconds": round(self.disk_warm.seconds, 2),
            "unpacked_seconds": round(self.memory_store.unpacked_seconds or 0, 2),
            "cold_disk_seconds": round(self.disk_cold.seconds, 2),
            "empty_seconds": round(self.base.seconds, 2),
            "value_bytes": self.value_bytes,
            "viewers_per_second": round(self.users / self.memory_store.seconds),
            "stock_viewers_per_second": round(self.stock),
            "stock_users": self.stock_users,
            "disk_store_bytes_per_user": round((self.disk_cold.memory - self.base.memory) / self.users),
            "warm_bytes_per_user": round((self.disk_warm.memory - self.base.memory) / self.users),
            "bars_met": {bar.asked: bar.met for bar in self.bars()},
        }


Numbers = TypeVar("Numbers", int, npt.NDArray[np.int64])


def states_of(numbers: npt.NDArray[np.int64], revision: int) -> npt.NDArray[np.void]:
    """States, (n,) STATE, of the viewers with these numbers: 12 clusters with evidence, a full ring, a past request.

    revision: what tells a later state of a viewer from the first; it shows in `events`.
    """
    random = np.random.default_rng([int(numbers[0]), revision])
    count = len(numbers)
    states = np.repeat(new_state().reshape(1), count)
    states["watch_topic"] = 1  # another topic's: offsets of it say nothing about the one read here
    states["watch_offset"] = 10 * numbers
    states["registry"] = 1
    states["events"] = events_of(numbers, revision)
    states["qualifying"] = states["events"]
    states["first_ts"] = START_MS - 90 * 86_400_000
    states["last_ts"] = START_MS + random.integers(0, 10**8, count)
    states["session_key"] = random.integers(1, 2**63, count)
    states["session_ts"] = states["last_ts"]
    states["sequence"] = states["student_sequence"] = 1
    states["request_ts"] = START_MS
    states["reference_n_eff"] = 20.0
    states["experts"] = 3
    states["expert_weight"][:, :3] = states["expert_prior"][:, :3] = 1 / 3
    states["kinds"] = random.gamma(5.0, 1.0, (count, 3))
    clusters = (random.integers(0, 118, (count, 1)) + 7 * np.arange(CLUSTERS)) % 118  # 7 and 118 share no divisor
    states["cluster"][:, :CLUSTERS] = clusters
    states["recent"] = clusters[:, :8]
    states["stated"] = clusters[:, :5]
    for name in ("short", "long", "reference"):
        states[name][:, :CLUSTERS] = random.gamma(1.0, 2.0, (count, CLUSTERS))
    states["count"][:, :2, :CLUSTERS] = random.gamma(1.0, 2.0, (count, 2, CLUSTERS))
    states["total"] = states["spread"] = states["count"].sum(axis=2)
    states["evidence_video"][:, :CLUSTERS] = random.integers(1, 2**63, (count, CLUSTERS, EVIDENCE))
    states["evidence_ts"][:, :CLUSTERS] = START_MS - random.integers(0, 10**9, (count, CLUSTERS, EVIDENCE))
    states["ring_used"] = RING
    for name in ("ring_key", "ring_video"):
        states[name] = random.integers(1, 2**63, (count, RING))
    states["ring_ts"] = START_MS // 1000 - random.integers(0, 10**6, (count, RING))
    states["ring_cluster"] = clusters[:, random.integers(0, CLUSTERS, RING)]
    states["ring_weight"] = states["ring_counted"] = states["ring_draw"] = 8192
    assert CLUSTERS <= SLOTS  # noqa: S101
    return states


def events_of(numbers: Numbers, revision: int) -> Numbers:
    """Events that the states of these viewers have counted."""
    return 40 + numbers % 50 + revision


def key_of(number: int) -> bytes:
    return b"u%07d" % number


def records(pack: Pack, first: int, end: int, revision: int) -> Iterator[tuple[bytes, bytes]]:
    """Changelog records of viewers number first to end - 1."""
    for start_of_chunk in range(first, end, CHUNK):
        numbers = np.arange(start_of_chunk, min(start_of_chunk + CHUNK, end))
        values = pack(states_of(numbers, revision).view(WORD).reshape(len(numbers), WORDS))
        yield from zip(map(key_of, numbers.tolist()), values, strict=True)


class Measurement:
    """One broker; workers that recover what its changelog holds."""

    def __init__(self, broker: Broker, users: int) -> None:
        self._broker = broker
        self._users = users
        self._settings = broker.create_topics(PREFIX)
        self._changelog = prefixed(self._settings, topics.INTERESTS_CHANGELOG)
        self._pack = worker_kernel(self._settings.data_folder / "kernel").pack
        self._value_bytes = len(next(records(self._pack, 0, 1, 0))[1])
        self._starts = 0
        self._sent = 0
        self._added: Counter[int] = Counter()
        self._revised = 0

    def run(self) -> Figures:
        """Everything, in order. Raises RuntimeError, TimeoutError and WrongStateError."""
        tell("a worker with an empty changelog")
        base = self._recovery(self._settings)
        tell(f"writing {self._users:,} states of {self._value_bytes} bytes")
        produce(self._settings, self._changelog, records(self._pack, 0, self._users, 0))
        tell("a worker with states in memory")
        memory_store = self._recovery(self._settings, check=True, unpacks=True)
        disk = replace(self._settings, state_store="disk", state_folder=self._broker.folder / "states")
        tell("a worker with a disk store that is not there yet")
        disk_cold = self._recovery(disk, check=True)
        self._change_some()
        tell(f"a worker with its disk store, and {self._revised:,} states changed meanwhile")
        disk_warm = self._recovery(disk, check=True)
        stock_users = min(STOCK_USERS, self._users)
        tell(f"stock Faust with {stock_users:,} states")
        stock = stock_users / self._stock_seconds(stock_users)
        return Figures(self._users, self._value_bytes, base, memory_store, disk_cold, disk_warm, stock_users, stock)

    def _recovery(self, settings: Settings, *, check: bool = False, unpacks: bool = False) -> Recovery:
        """Start a worker, wait until all its partitions are open, stop it.

        check: that it has what was written. unpacks: it recovers states into memory.
        """
        self._starts += 1
        worker = start_worker(settings, self._broker.folder / "logs" / f"worker-{self._starts}.log")
        try:
            assigned = worker.logged(ASSIGNED, 1, START_SECONDS)
            seconds = worker.logged(OPENED, settings.partitions, RECOVERY_SECONDS) - assigned
            if check:  # before all is unpacked: both ways into a row are taken
                self._check(worker)
            unpacked = worker.logged(UNPACKED, settings.partitions, RECOVERY_SECONDS) - assigned if unpacks else None
            time.sleep(SETTLE_SECONDS)
            recovery = Recovery(seconds, worker.memory_bytes(), unpacked)
        finally:
            worker.end()
        tell(f"  {recovery.seconds:.2f} s, {recovery.memory / 1e6:,.0f} MB resident")
        return recovery

    def _change_some(self) -> None:
        """New states for the first viewers, as another worker would have written them."""
        self._revised = int(self._users * TAIL)
        produce(self._settings, self._changelog, records(self._pack, 0, self._revised, REVISION))
        for number in [number for number in self._added if number < self._revised]:
            del self._added[number]

    def _check(self, worker: Measured) -> None:
        """Send an event of some viewers: each state must come back with one more than was written."""
        random = np.random.default_rng(self._starts)
        highest = (self._users, int(self._users * TAIL))
        numbers = sorted({int(n) for end in highest for n in random.integers(0, end, CHECKED // 2)})
        video = next(iter(cluster_of_video()))
        events = prefixed(self._settings, topics.WATCH_EVENTS)
        since = int(time.time() * 1000)
        produce(self._settings, events, [(key_of(n), event(n, video, self._sent + i)) for i, n in enumerate(numbers)])
        self._sent += len(numbers)
        self._added.update(numbers)
        with CommittedOffsets(self._settings, prefixed(self._settings, topics.WATCH_APP), events) as committed:
            wait_until(lambda: committed.total() >= self._sent, START_SECONDS, "events sent after recovery committed")
        worker.check()
        with TopicReader(self._settings) as reader:
            newest = {message.key(): message.value() for message in reader.read(self._changelog, since)}
        for number in numbers:
            expected = int(events_of(number, REVISION if number < self._revised else 0)) + self._added[number]
            value = newest.get(key_of(number))
            found = int(from_bytes(value)["events"]) if value else 0
            if found != expected:
                raise WrongStateError(f"viewer {key_of(number).decode()} has {found} events, not {expected}")

    def _stock_seconds(self, users: int) -> float:
        group = "stock"
        compacted = {"cleanup.policy": "compact"}
        self._broker.create_topic(f"{group}-interests-changelog", self._settings.partitions, compacted)
        self._broker.create_topic("stock-events", self._settings.partitions, {})
        produce(self._settings, f"{group}-interests-changelog", records(self._pack, 0, users, 0))
        clusters = self._broker.folder / "clusters.json"
        clusters.write_bytes(b"{}")
        given = {
            "bootstrap": self._settings.kafka_bootstrap,
            "topic": "stock-events",
            "group": group,
            "clusters": clusters,
            "folder": self._broker.folder / "stock",
            "events": users,
        }
        command = [sys.executable, str(PEERS / "faust_recovery.py")]
        process = start(
            [*command, *(f"--{name}={value}" for name, value in given.items())],
            self._broker.folder / "logs" / "stock.log",
        )
        try:
            assigned = process.logged(ASSIGNED, 1, START_SECONDS)

            def recovered() -> bool:
                process.check()
                return process.marks >= users

            wait_until(recovered, RECOVERY_SECONDS, f"{users:,} viewers in stock Faust's table", pause=0.01)
            return time.monotonic() - assigned
        finally:
            process.end()


def event(number: int, video: str, place: int) -> bytes:
    """A watch event of a viewer, unlike any before."""
    return orjson.dumps(
        {
            "user_id": key_of(number).decode(),
            "video_id": video,
            "ts": START_MS + 2 * 10**8 + place,
            "event_id": f"check-{place}",
            "watch_ms": 60_000,
            "duration_ms": 60_000,
        }
    )


def markdown(figures: Figures, command: str, seconds: float) -> str:
    rows = [
        ("empty changelog, worker with states in memory", figures.base),
        (f"{figures.users:,} viewers, states in memory", figures.memory_store),
        (f"{figures.users:,} viewers, disk store not there yet", figures.disk_cold),
        (f"{figures.users:,} viewers, disk store warm, {TAIL:.0%} of the states changed meanwhile", figures.disk_warm),
    ]
    runs = "\n".join(f"| {name} | {found.seconds:.2f} | {found.memory / 1e6:,.0f} |" for name, found in rows)
    bars = "\n".join(
        f"| {bar.asked} | {abs(bar.least):,g} | {abs(bar.value or 0):,.2f} | {'yes' if bar.met else '**no**'} |"
        for bar in figures.bars()
    )
    return f"""# Recovery

`{command}`, {seconds / 60:.0f} minutes. Written by that command.

{machine()}

| asked | bar | measured | met |
| --- | --- | --- | --- |
{bars}

| worker | seconds | resident MB |
| --- | --- | --- |
{runs}

Every viewer has {CLUSTERS} clusters with evidence and a full ring of last events: {figures.value_bytes} bytes a state,
random numbers where a real one has them, so that nothing compresses away. One broker on the same machine, 4 partitions,
one worker. Seconds count from the moment the group assigns the partitions to the line with which the last one opens:
joining the group and starting Python are left out, for stock Faust too. After each recovery events of up to
{CHECKED} viewers are sent, and their states must come back with one event more than they had.

States in memory are held as they are stored at first, and unpacked little by little while events come in; here that was
done {figures.memory_store.unpacked_seconds:.0f} s after the assignment. Bytes a viewer: resident memory
{SETTLE_SECONDS:.0f} s later, less that of the worker with an empty changelog.

Stock Faust has a Table of bytes in memory with the same keys and values, {figures.stock_users:,} of them:
{figures.stock:,.0f} viewers a second. The ratio compares rates, and takes it to keep that rate up to
{figures.users:,}.
"""


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(command_line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recovery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=USERS, help=f"viewers ({USERS:,}), at least 1,000")
    parser.add_argument("--write", action="store_true", help=f"rewrite benchmarks/{RESULTS.name}")
    arguments = parser.parse_args(command_line)
    if arguments.users < 1000:
        parser.error("--users: at least 1,000, or nothing is left of the rounding")
    command = f"python -m benchmarks.recovery --users {arguments.users}" + " --write" * arguments.write
    started = time.monotonic()
    figures = on_a_broker(lambda broker: Measurement(broker, arguments.users).run(), tell)
    text = markdown(figures, command, time.monotonic() - started)
    publish(text, figures.document(), RESULTS if arguments.write else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
