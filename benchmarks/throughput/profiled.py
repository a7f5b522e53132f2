"""The product's command line with its CPU time sampled: `python -m benchmarks.throughput.profiled OUT worker ...`

Sampling begins at SIGUSR1, without start-up and compilation. The kernel's profiling timer counts CPU time of all
threads, and each tick is met in the main thread. If that only waits, the tick is another thread's: the first that does
not wait is noted, or none if all do (work outside of Python).
"""

from __future__ import annotations

import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Final

import orjson

from agents.cli import main

SECONDS_PER_SAMPLE: Final = 0.002
BEGIN: Final = signal.SIGUSR1
WAITING: Final = frozenset({"select", "wait", "poll", "get", "_wait_for_tstate_lock", "_worker", "acquire"})
"""Innermost functions of a thread that waits."""
_samples: Counter[tuple[str, ...]] = Counter()


def _note(_: int, frame: FrameType | None) -> None:
    if frame is None or frame.f_code.co_name not in WAITING:
        _samples[_stack(frame)] += 1
        return
    own = threading.get_ident()
    others = [other for thread, other in sys._current_frames().items() if thread != own]
    busy = next((other for other in others if other.f_code.co_name not in WAITING), None)
    _samples[(*_stack(busy), "(another thread)")] += 1


def _stack(frame: FrameType | None) -> tuple[str, ...]:
    """Innermost first."""
    found: list[str] = []
    while frame is not None:
        code = frame.f_code
        found.append(f"{'/'.join(code.co_filename.split('/')[-2:])}:{code.co_name}")
        frame = frame.f_back
    return tuple(found)


def run(out: Path, arguments: list[str]) -> None:
    """Run the command line; then write self and inclusive samples by function to `out`."""
    sys.argv = ["personas", *arguments]
    signal.signal(signal.SIGPROF, _note)
    signal.signal(BEGIN, lambda *_: signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_SAMPLE, SECONDS_PER_SAMPLE))
    try:
        main()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        own: Counter[str] = Counter()
        inclusive: Counter[str] = Counter()
        for stack, count in _samples.items():
            own[stack[0]] += count
            for function in set(stack):
                inclusive[function] += count
        out.write_bytes(orjson.dumps({"self": dict(own.most_common()), "inclusive": dict(inclusive.most_common())}))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
