"""The process under test: started, watched from outside, ended."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
import psutil

from agents.settings import ENVIRONMENT_PREFIX, Settings

STOP_SECONDS: Final = 60.0
LAST_WORDS: Final = 3000
ASSIGNED: Final = re.compile(r"Setting newly assigned partitions (?!set\(\))")
"""What aiokafka logs when its group has given it partitions."""
OPENED: Final = re.compile(r"watch partition \d+ opened")
"""What it logs for each, once the partition's states are there and its events are read."""


@dataclass
class Measured:
    """A process. Its standard error is a file; `marks` is the last number it wrote on a line of standard output."""

    process: subprocess.Popen[bytes]
    log: Path
    marks: int = 0

    def __post_init__(self) -> None:
        self._last_line = b""
        self._usage = psutil.Process(self.process.pid)
        self._reading = threading.Thread(target=self._read_marks, daemon=True)
        self._reading.start()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def cpu_seconds(self) -> float:
        """User and system time of all its threads so far. Raises RuntimeError if it has ended."""
        with self._alive():
            times = self._usage.cpu_times()
            return float(times.user + times.system)

    def memory_bytes(self) -> int:
        """Resident memory. Raises RuntimeError if it has ended."""
        with self._alive():
            return int(self._usage.memory_info().rss)

    def text(self) -> str:
        """All that it has logged."""
        return self.log.read_text(errors="replace")

    def logged(self, pattern: re.Pattern[str], count: int, seconds: float) -> float:
        """When (monotonic) the log was first seen to hold `count` matches. Raises RuntimeError if the process ends, and
        TimeoutError.
        """
        deadline = time.monotonic() + seconds
        while len(pattern.findall(self.text())) < count:
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {pattern.pattern!r} within {seconds:.0f} s:\n{self.text()[-LAST_WORDS:]}")
            time.sleep(0.02)
        return time.monotonic()

    def recovery_seconds(self, partitions: int, start: float, recovery: float) -> float:
        """Seconds from the assignment of partitions until a watch worker has so many open. start, recovery: how long to
        wait for the two, seconds. Raises as `logged` does.
        """
        assigned = self.logged(ASSIGNED, 1, start)
        return self.logged(OPENED, partitions, recovery) - assigned

    def check(self) -> None:
        """Raises RuntimeError with the end of its log if it has ended."""
        if not self.running:
            raise RuntimeError(f"ended with status {self.process.returncode}:\n{self.text()[-LAST_WORDS:]}")

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """SIGTERM, and SIGKILL if it takes too long."""
        if not self.running:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def last_json(self) -> dict[str, Any]:
        """What it printed as its last line, once it has ended well. Raises RuntimeError if it has not."""
        self._reading.join(STOP_SECONDS)
        if self.process.wait(STOP_SECONDS) != 0:
            self.check()
        found: dict[str, Any] = orjson.loads(self._last_line)
        return found

    def _alive(self) -> _Alive:
        return _Alive(self)

    def _read_marks(self) -> None:
        assert self.process.stdout is not None  # noqa: S101 - opened by `start`
        for line in self.process.stdout:
            self._last_line = line
            if line.strip().isdigit():
                self.marks = int(line)


@dataclass(frozen=True)
class _Alive:
    """Turns psutil's answers about a process that is gone into what the process said last."""

    measured: Measured

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, psutil.Error):
            self.measured.process.wait(5)
            self.measured.check()


def start(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Measured:
    """Start a program; it inherits this environment without the product's settings."""
    log.parent.mkdir(parents=True, exist_ok=True)
    own = {name: value for name, value in os.environ.items() if not name.startswith((ENVIRONMENT_PREFIX, "OTEL_"))}
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            env={**own, "PYTHONUNBUFFERED": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=file,
        )
    return Measured(process, log)


def start_worker(settings: Settings, log: Path, *, profile: Path | None = None) -> Measured:
    """The product's watch worker, as an operator starts it; profile: where samples of its CPU time go."""
    worker = ["worker", "--role", "watch", "--no-page"]
    if profile is None:
        return start([sys.executable, "-m", "agents", *worker], log, settings.environment())
    command = [sys.executable, "-m", "benchmarks.throughput.profiled", str(profile), *worker]
    return start(command, log, settings.environment())
