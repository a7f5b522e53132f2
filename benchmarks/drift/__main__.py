"""Compare refresh policies on simulated viewers whose taste is known; ends with one JSON object of the figures.

python -m benchmarks.drift                       # seed 1, all simulators, a few minutes on 2 cores
python -m benchmarks.drift --seed 7 --viewers-scale .1 --kinds default anchored
python -m benchmarks.drift --write               # also rewrites benchmarks/drift/RESULTS.md and its plots
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from multiprocessing import Pool
from multiprocessing.pool import Pool as WorkerPool
from pathlib import Path
from types import FrameType

import orjson

from benchmarks.drift import ours
from benchmarks.drift.figures import Figures, Outcome, figures, outcome
from benchmarks.drift.plots import write_plots
from benchmarks.drift.policies import POLICIES, SAME_ESTIMATOR
from benchmarks.drift.report import Results, document, markdown
from benchmarks.drift.traces import trace
from streams.simulation import Kind, Purpose, SimulatedStream, population

HERE = Path(__file__).parent
CHUNK = 8
PROGRESS_SECONDS = 5.0


def main(command_line: Sequence[str] | None = None) -> None:
    options = parser()
    arguments = options.parse_args(command_line)
    if arguments.write and set(arguments.kinds) != set(Kind):
        options.error("--write needs all kinds: leave --kinds away")
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started us with SIGINT ignored
        signal.signal(number, _interrupt)
    command = f"python -m benchmarks.drift --seed {arguments.seed} --viewers-scale {arguments.viewers_scale:g}"
    command += " --write" * arguments.write
    started = time.monotonic()
    ours.compile_once()  # here, so that the worker processes inherit it
    try:
        with Pool(arguments.processes, initializer=_ignore_interrupt) as pool:
            outcomes = {
                kind: run(pool, kind, arguments.seed, arguments.viewers_scale)
                for kind in sorted(arguments.kinds, key=list(Kind).index)
            }
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
    by_kind: dict[Kind, dict[str, Figures]] = {
        kind: {name: figures(group) for name, group in by_policy.items()} for kind, by_policy in outcomes.items()
    }
    results = Results(arguments.seed, command, time.monotonic() - started, by_kind)
    text = markdown(results)
    print(text)
    if arguments.write:
        (HERE / "RESULTS.md").write_text(text)
        write_plots(HERE, by_kind[Kind.DEFAULT], outcomes[Kind.DEFAULT])
    print(orjson.dumps(document(results)).decode(), flush=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drift", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=_seed, default=1, help="of the viewers; calibration never meets them (1)")
    parser.add_argument("--viewers-scale", type=_scale, default=1.0, help="times 400 viewers per class and kind (1)")
    parser.add_argument(
        "--kinds", type=Kind, nargs="+", choices=list(Kind), default=list(Kind), metavar="KIND", help=", ".join(Kind)
    )
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--write", action="store_true", help="rewrite RESULTS.md and the plots; needs all kinds")
    return parser


def run(pool: WorkerPool, kind: Kind, seed: int, scale: float) -> dict[str, list[Outcome]]:
    """Every viewer of this kind under every policy: all of them by default, ours and its like on other simulators."""
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    told = time.monotonic()
    viewers = enumerate(population(kind, Purpose.REPORTING, seed, scale))
    done = 0
    for done, of_viewer in enumerate(pool.imap(partial(_measure, kind), viewers, CHUNK), start=1):
        for name, result in of_viewer.items():
            outcomes[name].append(result)
        if time.monotonic() - told > PROGRESS_SECONDS:
            print(f"{kind}: {done:,} viewers", file=sys.stderr, flush=True)
            told = time.monotonic()
    print(f"{kind}: {done:,} viewers, all", file=sys.stderr, flush=True)
    return dict(outcomes)


def _measure(kind: Kind, numbered: tuple[int, SimulatedStream]) -> dict[str, Outcome]:
    number, stream = numbered
    policies = POLICIES if kind is Kind.DEFAULT else SAME_ESTIMATOR
    of_viewer = trace(stream)
    return {p.name: outcome(p, of_viewer) for p in policies if number % p.every_viewer == 0}


def _seed(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _scale(text: str) -> float:
    value = float(text)
    if not 0 < value < 1000:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below 1000")
    return value


def _ignore_interrupt() -> None:
    """Workers leave Ctrl-C and SIGTERM's clean-up to the parent, which ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
