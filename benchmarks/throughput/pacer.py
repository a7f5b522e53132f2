"""A producer that keeps a rate: `python -m benchmarks.throughput.pacer --help`. Its events carry when they are sent.

The last line it prints is a JSON object: events, seconds, and how far it fell behind its schedule at worst.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import orjson
from confluent_kafka import Producer

from agents.kafka_admin import confluent_options
from agents.settings import Settings
from benchmarks.throughput.broker import FLUSH_SECONDS, PARTITIONER
from benchmarks.throughput.event_log import ACTIVITY_SIGMA, cluster_of_video
from benchmarks.throughput.processes import Measured, start

TICK_SECONDS: Final = 0.002
CHUNK: Final = 20_000
FAVOURITES: Final = 60
"""Videos that a viewer comes back to: neighbours in the catalogue, so of a few clusters."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What is sent: `rate` events a second for `seconds`; name: of this pacer, part of its event ids."""

    rate: int
    seconds: float
    users: int
    seed: int
    name: str


def start_pacer(settings: Settings, topic: str, pace: Pace, counts: Path, log: Path) -> Measured:
    """A pacer as a process of its own; counts: where it writes how many events each viewer got."""
    given = {
        "bootstrap": settings.kafka_bootstrap,
        "topic": topic,
        "rate": pace.rate,
        "seconds": pace.seconds,
        "users": pace.users,
        "seed": pace.seed,
        "name": pace.name,
        "counts": counts,
    }
    command = [sys.executable, "-m", "benchmarks.throughput.pacer"]
    return start([*command, *(f"--{name}={value}" for name, value in given.items())], log)


def counts_of(path: Path) -> Counter[str]:
    """What a pacer sent, by viewer."""
    return Counter(orjson.loads(path.read_bytes()))


class Pacer:
    """Draws events and sends them when they are due."""

    def __init__(self, settings: Settings, topic: str, pace: Pace) -> None:
        self._pace = pace
        self._topic = topic
        self._random = np.random.default_rng(pace.seed)
        weights = self._random.lognormal(0.0, ACTIVITY_SIGMA, pace.users)
        self._shares = np.minimum(weights / weights.sum(), 20 / pace.users)
        self._shares /= self._shares.sum()
        cluster_of = cluster_of_video()
        self._videos = sorted(cluster_of, key=lambda video: (cluster_of[video], video))
        self._producer = Producer(
            {
                **confluent_options(settings),
                "partitioner": PARTITIONER,
                "linger.ms": 5,
                "queue.buffering.max.messages": 2_000_000,
            }
        )
        self._failed = 0
        self.sent: Counter[str] = Counter()

    def run(self) -> float:
        """Send everything; returns how late it was at worst, in seconds. Raises RuntimeError if some was not sent."""
        started, number, worst = time.monotonic(), 0, 0.0
        total = round(self._pace.rate * self._pace.seconds)
        rows = self._rows()
        while number < total:
            passed = time.monotonic() - started
            due = min(total, int(passed * self._pace.rate))
            worst = max(worst, passed - number / self._pace.rate)
            now = int(time.time() * 1000)
            for _ in range(due - number):
                self._send(number, now, *next(rows))
                number += 1
                if number % 500 == 0:
                    self._producer.poll(0)
            time.sleep(TICK_SECONDS)
        left = self._producer.flush(FLUSH_SECONDS)
        if left or self._failed:
            raise RuntimeError(f"{left + self._failed} of {total} events were not sent")
        return worst

    def _send(self, number: int, now: int, user: str, video: str, watch_ms: int, duration_ms: int) -> None:
        value = (
            f'{{"schema_version":1,"event_id":"{self._pace.name}-{number:09d}","user_id":"{user}",'
            f'"video_id":"{video}",'
            f'"ts":{now},"action":"play","watch_ms":{watch_ms},"duration_ms":{duration_ms},'
            f'"session_id":"{user}-{now // 1_800_000}","surface":"home","autoplay":false,"locale":"en-GB"}}'
        )
        self._producer.produce(self._topic, value.encode(), user.encode(), on_delivery=self._delivered)
        self.sent[user] += 1

    def _delivered(self, error: object, _: object) -> None:
        self._failed += error is not None

    def _rows(self) -> Iterator[tuple[str, str, int, int]]:
        """Endless (user, video, watch_ms, duration_ms)."""
        pace, random = self._pace, self._random
        while True:
            viewers = random.choice(pace.users, CHUNK, p=self._shares)
            home = viewers * 7919  # each viewer's own part of the catalogue
            near = (home + random.integers(0, FAVOURITES, CHUNK)) % len(self._videos)
            far = random.integers(0, len(self._videos), CHUNK)
            videos = np.where(random.random(CHUNK) < 0.9, near, far)
            durations = random.lognormal(np.log(480_000), 0.8, CHUNK).astype(np.int64) + 15_000
            watched = (durations * random.beta(2.0, 1.0, CHUNK)).astype(np.int64)
            for viewer, video, watch_ms, duration_ms in zip(
                viewers.tolist(), videos.tolist(), watched.tolist(), durations.tolist(), strict=True
            ):
                yield f"u{viewer:07d}", self._videos[video], watch_ms, duration_ms


def main(command_line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput.pacer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, kind in (("rate", int), ("seconds", float), ("users", int), ("seed", int), ("counts", Path)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    for name in ("bootstrap", "topic", "name"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args(command_line)
    pace = Pace(given.rate, given.seconds, given.users, given.seed, given.name)
    pacer = Pacer(Settings(kafka_bootstrap=given.bootstrap), given.topic, pace)
    started = time.monotonic()
    worst = pacer.run()
    given.counts.write_bytes(orjson.dumps(pacer.sent))
    figures = {
        "events": pacer.sent.total(),
        "seconds": round(time.monotonic() - started, 2),
        "late_seconds": round(worst, 3),
    }
    print(orjson.dumps(figures).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
