"""What every peer does with an event: look its video's cluster up, and count it at two horizons."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DAY_MS = 86_400_000
SHORT_MS, LONG_MS = DAY_MS, 30 * DAY_MS
"""Half-lives of the two horizons."""
MOST_CLUSTERS = 20
MARKS = 100
"""How many times a program says how far it is."""


@dataclass(frozen=True)
class Arguments:
    """clusters: cluster of each video; folder: of the program's own; events: how many the topic holds."""

    bootstrap: str
    topic: str
    group: str
    clusters: dict[str, int]
    folder: Path
    events: int


def arguments() -> Arguments:
    parser = argparse.ArgumentParser()
    for name in ("bootstrap", "topic", "group", "clusters", "folder", "events"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args()
    clusters = json.loads(Path(given.clusters).read_text())
    return Arguments(given.bootstrap, given.topic, given.group, clusters, Path(given.folder), int(given.events))


def updated(state: dict[str, Any] | None, cluster: int, ts: int) -> dict[str, Any]:
    """The viewer's state with one more event, in place: `events`, newest `ts`, `counts` [short, long] by cluster."""
    if state is None:
        state = {"events": 0, "ts": ts, "counts": {}}
    counts: dict[str, list[float]] = state["counts"]
    passed = max(0, ts - state["ts"])
    if passed:
        short, long = 0.5 ** (passed / SHORT_MS), 0.5 ** (passed / LONG_MS)
        for held in counts.values():
            held[0] *= short
            held[1] *= long
    count = counts.setdefault(str(cluster), [0.0, 0.0])  # JSON keys are text
    count[0] += 1.0
    count[1] += 1.0
    if len(counts) > MOST_CLUSTERS:
        del counts[min(counts, key=lambda held: counts[held][1])]
    state["events"] += 1
    state["ts"] = max(ts, state["ts"])
    return state


class Marks:
    """Says on standard output how many events are done: every hundredth of the log, and its end."""

    def __init__(self, events: int) -> None:
        self._events = events
        self._step = max(1, events // MARKS)
        self._said = self._done = 0

    def add(self, events: int) -> bool:
        """Count events; whether all are done."""
        self._done += events
        if self._done - self._said >= self._step or self._done >= self._events:
            print(self._done, flush=True)
            self._said = self._done
        return self._done >= self._events
