"""What the commands that need a broker have in common: they end well, and their last line is one JSON object."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import orjson

from agents.localstack import LocalStackError
from benchmarks.throughput.broker import Broker, Progress, local_broker
from benchmarks.throughput.runners import settings_for_benchmarks

T = TypeVar("T")


def on_a_broker(measure: Callable[[Broker], T], tell: Progress) -> T:
    """What `measure` finds on a broker of its own. Ends the process, with a word on stderr, if that cannot be."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        with local_broker(settings_for_benchmarks(), tell) as broker:
            return measure(broker)
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
    except (LocalStackError, RuntimeError, TimeoutError) as error:
        raise SystemExit(f"error: {error}") from error


def publish(text: str, figures: Mapping[str, Any], path: Path | None) -> None:
    """Print a report and its figures, and write the report to `path` if there is one."""
    print(text)
    if path is not None:
        path.write_text(text)
    print(orjson.dumps(figures).decode(), flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
