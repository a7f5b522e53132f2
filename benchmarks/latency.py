"""From a watch event in Kafka to the refresh request that it causes, and what a burst does to the worker.

    python -m benchmarks.latency                            # 5,000 events/s for 60 s, then ten times that for 10 s
    python -m benchmarks.latency --rate 500 --seconds 20    # a first look
    python -m benchmarks.latency --write                    # also rewrites benchmarks/latency.md

Ends with one JSON object; a missed bar is reported, and the exit status is 0. It is 1 if something failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from agents.kafka_admin import prefixed, topic_ids
from agents.settings import Settings
from agents.topic_reader import TopicReader
from benchmarks.throughput.broker import Broker, CommittedOffsets
from benchmarks.throughput.command import on_a_broker, publish
from benchmarks.throughput.pacer import Pace, start_pacer
from benchmarks.throughput.processes import OPENED, Measured, start_worker
from benchmarks.throughput.report import machine
from streams import topics
from streams.identifiers import request_id

RATE: Final = 5000
SECONDS: Final = 60.0
WARM_UP_SECONDS: Final = 10.0
BURST: Final = 10
BURST_SECONDS: Final = 10.0
EVENTS_A_VIEWER: Final = 30
"""Enough for a first persona, and for some refreshes."""
BAR_MS: Final = 50.0
MEMORY_GROWTH: Final = 0.1
"""That a burst may leave behind: its viewers' states among it."""
SAMPLE_SECONDS: Final = 0.05
START_SECONDS: Final = 120.0
DRAIN_SECONDS: Final = 900.0
SETTLE_SECONDS: Final = 5.0
RESULTS: Final = Path(__file__).parent / "latency.md"


class UnmatchedError(RuntimeError):
    """A request that no event of the log explains, or none at all."""


@dataclass(frozen=True, slots=True)
class Delay:
    """Of one request: appended: when its event was, ms; from_append, from_send: until the request was, ms."""

    appended: int
    from_append: int
    from_send: int


@dataclass(frozen=True, slots=True)
class Phase:
    """What was seen while events came in. seconds: until all was committed, from the last event sent on."""

    events: int
    late_seconds: float
    drain_seconds: float
    memory_before: int
    memory_peak: int
    memory_after: int


@dataclass(frozen=True, slots=True)
class Figures:
    """steady: delays of requests at the rate, burst: of those in the burst."""

    rate: int
    users: int
    steady: Sequence[Delay]
    burst: Sequence[Delay]
    pace: Phase
    peak: Phase
    dead_letters: int

    def document(self) -> dict[str, Any]:
        """One JSON object."""
        p50, p99 = quantiles([delay.from_append for delay in self.steady])
        sent50, sent99 = quantiles([delay.from_send for delay in self.steady])
        burst50, burst99 = quantiles([delay.from_append for delay in self.burst])
        return {
            "rate": self.rate,
            "p50_ms": p50,
            "p99_ms": p99,
            "requests": len(self.steady),
            "users": self.users,
            "p50_from_send_ms": sent50,
            "p99_from_send_ms": sent99,
            "max_ms": max((delay.from_append for delay in self.steady), default=None),
            "late_seconds": self.pace.late_seconds,
            "burst_rate": self.rate * BURST,
            "burst_seconds": BURST_SECONDS,
            "burst_events": self.peak.events,
            "burst_requests": len(self.burst),
            "burst_p50_ms": burst50,
            "burst_p99_ms": burst99,
            "burst_late_seconds": self.peak.late_seconds,
            "drain_seconds": round(self.peak.drain_seconds, 2),
            "dead_letters": self.dead_letters,
            "memory_before_mb": round(self.peak.memory_before / 1e6, 1),
            "memory_peak_mb": round(self.peak.memory_peak / 1e6, 1),
            "memory_after_mb": round(self.peak.memory_after / 1e6, 1),
            "bars_met": {
                f"p99 at most {BAR_MS:.0f} ms": p99 is not None and p99 <= BAR_MS,
                "no dead letters": self.dead_letters == 0,
                f"memory after the burst at most {MEMORY_GROWTH:.0%} above before": self.peak.memory_after
                <= (1 + MEMORY_GROWTH) * self.peak.memory_before,
            },
        }


def quantiles(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Median and 99% quantile, None of nothing."""
    if not values:
        return None, None
    p50, p99 = np.quantile(values, (0.5, 0.99))
    return round(float(p50), 1), round(float(p99), 1)


def delays(settings: Settings) -> list[Delay]:
    """The delay of every request in the log, each matched with the event that its id was made from.

    Raises UnmatchedError.
    """
    topic = prefixed(settings, topics.WATCH_EVENTS)
    topic_id = topic_ids(settings, [topics.WATCH_EVENTS])[topics.WATCH_EVENTS]
    events: defaultdict[tuple[int, str], list[tuple[int, int, int]]] = defaultdict(list)
    found: list[Delay] = []
    with TopicReader(settings) as reader:
        for message in reader.read(topic):
            event = orjson.loads(message.value() or b"")
            place = (message.partition() or 0, event["user_id"])
            events[place].append((message.offset() or 0, message.timestamp()[1], event["ts"]))
        for message in reader.read(prefixed(settings, topics.REFRESH_REQUESTS)):
            request, at = orjson.loads(message.value() or b""), message.timestamp()[1]
            partition, user = message.partition() or 0, request["user_id"]
            for offset, appended, sent in reversed(events[partition, user]):
                if request_id(topic_id, partition, offset, request["rule"], user) == request["request_id"]:
                    found.append(Delay(appended, at - appended, at - sent))
                    break
            else:
                raise UnmatchedError(f"request {request['request_id']} of {user}: no event has its id")
    return found


class Measurement:
    """A broker, a worker, and producers at a rate."""

    def __init__(self, broker: Broker, rate: int, seconds: float) -> None:
        self._broker = broker
        self._rate = rate
        self._seconds = seconds
        self._users = max(100, round(rate * seconds) // EVENTS_A_VIEWER)
        self._settings = broker.create_topics("latency-")
        self._topic = prefixed(self._settings, topics.WATCH_EVENTS)
        self._sent = 0

    def run(self) -> Figures:
        """Warm-up, the rate, the burst, and the delays from the log. Raises RuntimeError and TimeoutError."""
        logs = self._broker.folder / "logs"
        worker = start_worker(self._settings, logs / "worker.log")
        group = prefixed(self._settings, topics.WATCH_APP)
        try:
            worker.logged(OPENED, self._settings.partitions, START_SECONDS)
            with CommittedOffsets(self._settings, group, self._topic) as committed:
                self._phase(worker, committed, "warm-up", self._rate, WARM_UP_SECONDS)
                steady_from = int(time.time() * 1000)
                pace = self._phase(worker, committed, "rate", self._rate, self._seconds)
                burst_from = int(time.time() * 1000)
                peak = self._phase(worker, committed, "burst", self._rate * BURST, BURST_SECONDS)
            letters = self._dead_letters()
        finally:
            worker.end()
        tell("matching requests with events")
        found = delays(self._settings)
        steady = [delay for delay in found if steady_from <= delay.appended < burst_from]
        burst = [delay for delay in found if delay.appended >= burst_from]
        if not steady:
            raise UnmatchedError("no request was made at the rate: more seconds are needed")
        return Figures(self._rate, self._users, steady, burst, pace, peak, letters)

    def _phase(self, worker: Measured, committed: CommittedOffsets, name: str, rate: int, seconds: float) -> Phase:
        tell(f"{name}: {rate:,} events/s for {seconds:.0f} s")
        before = worker.memory_bytes()
        pace = Pace(rate, seconds, self._users, seed=1 + self._sent, name=name)
        log, counts = self._broker.folder / "logs" / f"{name}.log", self._broker.folder / f"{name}.json"
        pacer = start_pacer(self._settings, self._topic, pace, counts, log)
        peak = before
        try:
            while pacer.running:
                time.sleep(SAMPLE_SECONDS)
                peak = max(peak, worker.memory_bytes())
            said = pacer.last_json()
            self._sent += said["events"]
            ended = time.monotonic()
            while committed.total() < self._sent:
                worker.check()
                peak = max(peak, worker.memory_bytes())
                if time.monotonic() - ended > DRAIN_SECONDS:
                    raise TimeoutError(f"not drained {DRAIN_SECONDS:.0f} s after the {name}")
                time.sleep(SAMPLE_SECONDS)
            drained = time.monotonic() - ended
        finally:
            pacer.end()
        time.sleep(SETTLE_SECONDS)
        return Phase(said["events"], said["late_seconds"], drained, before, peak, worker.memory_bytes())

    def _dead_letters(self) -> int:
        with TopicReader(self._settings) as reader:
            letters = prefixed(self._settings, topics.dead_letters_of(topics.WATCH_EVENTS))
            return sum(1 for _ in reader.read(letters))


def markdown(figures: Figures, command: str) -> str:
    found = figures.document()
    rows = (
        (f"{figures.rate:,} events/s, from the event's append to the request's", "p50_ms", "p99_ms", "requests"),
        ("the same, from when the producer made the event", "p50_from_send_ms", "p99_from_send_ms", "requests"),
        (
            f"{found['burst_rate']:,} events/s for {BURST_SECONDS:.0f} s, from append to append",
            "burst_p50_ms",
            "burst_p99_ms",
            "burst_requests",
        ),
    )
    table = "\n".join(f"| {name} | " + " | ".join(str(found[key]) for key in keys) + " |" for name, *keys in rows)
    bars = "\n".join(f"| {bar} | {'yes' if met else '**no**'} |" for bar, met in found["bars_met"].items())
    return f"""# From a watch event to its refresh request

`{command}`. Written by that command.

{machine()}

| | p50, ms | p99, ms | requests |
| --- | --- | --- | --- |
{table}

| bar | met |
| --- | --- |
{bars}

The burst: {found["burst_events"]:,} events; all were committed {found["drain_seconds"]} s after the last one, with
{found["dead_letters"]} dead letters. The worker's resident memory was {found["memory_before_mb"]} MB before it,
{found["memory_peak_mb"]} MB at most and {found["memory_after_mb"]} MB after it.

One broker, 4 partitions, one worker and the producer share the machine; {figures.users:,} viewers of log-normal
activity; the first {WARM_UP_SECONDS:.0f} s are left out. Both append times are the broker's, in whole milliseconds.
Each request is matched exactly: its id is a hash of the log position of the event that caused it. The producer waits
up to 5 ms to fill a batch; it was {found["late_seconds"]} s behind its schedule at worst at the rate, and
{found["burst_late_seconds"]} s in the burst.
"""


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(command_line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=int, default=RATE, help=f"events a second ({RATE:,})")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"how long at that rate ({SECONDS:.0f})")
    parser.add_argument("--write", action="store_true", help=f"rewrite benchmarks/{RESULTS.name}")
    arguments = parser.parse_args(command_line)
    if arguments.rate < 1 or arguments.seconds < 5:
        parser.error("a rate of at least 1, for at least 5 seconds")
    command = f"python -m benchmarks.latency --rate {arguments.rate} --seconds {arguments.seconds:g}"
    figures = on_a_broker(lambda broker: Measurement(broker, arguments.rate, arguments.seconds).run(), tell)
    text = markdown(figures, command + " --write" * arguments.write)
    publish(text, figures.document(), RESULTS if arguments.write else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
