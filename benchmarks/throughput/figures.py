"""Figures from what was sampled of a run: progress against time, and the bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Final

WARM_UP: Final = 0.10
"""Share of the events before the window: imports, compilation, joining the group and first fetches fall into it."""
WIND_DOWN: Final = 0.95
"""Share of the events at which the window ends at the latest: the last step of a timer waits with nothing to do."""


class NotMeasuredError(RuntimeError):
    """A run says nothing; the message says why."""


@dataclass(frozen=True, slots=True)
class Sample:
    """at: seconds, monotonic; done: events; cpu: CPU seconds of the process so far, all threads."""

    at: float
    done: int
    cpu: float


@dataclass(frozen=True, slots=True)
class Rate:
    """events: in the window; seconds: its length; cpu: CPU seconds in it."""

    events: int
    seconds: float
    cpu: float

    @property
    def per_second(self) -> float:
        return self.events / self.seconds

    @property
    def cpu_us(self) -> float:
        """CPU microseconds an event."""
        return self.cpu / self.events * 1e6


def rate(samples: Sequence[Sample], events: int) -> Rate:
    """Between the first and the last step of progress within the window.

    Progress is seen in steps (a commit, a printed mark), so both ends are moments at which one was just seen: whatever
    the size of a step, nothing is counted that was not done within the time. Raises NotMeasuredError.
    """
    steps = [after for before, after in pairwise(samples) if after.done > before.done]
    window = [step for step in steps if WARM_UP * events <= step.done <= WIND_DOWN * events]
    if len(window) < 2:
        raise NotMeasuredError(
            f"{len(window)} steps of progress between {WARM_UP:.0%} and {WIND_DOWN:.0%} of {events:,} events: too few "
            "events for how seldom this program commits"
        )
    first, last = window[0], window[-1]
    return Rate(last.done - first.done, last.at - first.at, last.cpu - first.cpu)


def middle(values: Sequence[float]) -> float | None:
    """Median, None of nothing."""
    return median(values) if values else None


@dataclass(frozen=True, slots=True)
class Bar:
    """What is asked of the product: value and whether it holds, both None if a part was not measured."""

    asked: str
    least: float
    value: float | None

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.value >= self.least


def bars(rates: Mapping[str, float | None]) -> list[Bar]:
    """The bars over the medians by runner."""

    def ratio(name: str, other: str) -> float | None:
        ours, theirs = rates.get(name), rates.get(other)
        return ours / theirs if ours is not None and theirs else None

    return [
        Bar("10k viewers, times quixstreams", 5.0, ratio("ours", "quixstreams")),
        Bar("10k viewers, times bytewax", 1.5, ratio("ours", "bytewax")),
        Bar("10k viewers, times the stateless aiokafka loop", 0.4, ratio("ours", "aiokafka")),
        Bar("10k viewers, times naive Faust", 40.0, ratio("ours", "faust_naive")),
        Bar("10k viewers, events a second", 80_000.0, rates.get("ours")),
        Bar("1M viewers, events a second", 40_000.0, rates.get("ours_1m")),
        Bar("1M viewers, times quixstreams", 1.5, ratio("ours_1m", "quixstreams_1m")),
    ]
