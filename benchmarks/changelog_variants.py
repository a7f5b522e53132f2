"""What a longer or shorter time between two writes of states costs, and what it saves.

    python -m benchmarks.changelog_variants            # ten minutes
    python -m benchmarks.changelog_variants --write    # also rewrites benchmarks/changelog_variants.md

The same log goes through a worker per variant; then another worker recovers what it left. Ends with one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from agents.settings import Settings
from benchmarks.throughput.broker import Broker
from benchmarks.throughput.command import on_a_broker, publish
from benchmarks.throughput.figures import middle
from benchmarks.throughput.processes import start_worker
from benchmarks.throughput.report import machine
from benchmarks.throughput.runners import RUNNERS, Bench, Run, Runner, Sizes, settings_for_benchmarks
from streams.state import STATE

SECONDS: Final = (0.05, 0.2, 1.0, 5.0, 20.0)
"""PERSONAS_FLUSH_SECONDS of each variant."""
SIZES: Final = Sizes(small=600_000, large=900_000)
START_SECONDS: Final = 120.0
RESULTS: Final = Path(__file__).with_suffix(".md")


@dataclass(frozen=True, slots=True)
class Variant:
    """runs: of one runner with one interval; recovered: seconds until another worker had the states back, of each."""

    runner: Runner
    flush_seconds: float
    runs: Sequence[Run]
    recovered: Sequence[float]

    def figures(self) -> dict[str, Any]:
        """Medians, by name."""
        contents = [run.changelog for run in self.runs if run.changelog is not None]
        events = self.runs[0].events
        records, size = sum(c.records for c in contents), sum(c.bytes for c in contents)
        return {
            "viewers": self.runner.users,
            "flush_seconds": self.flush_seconds,
            "events_per_second": round(middle([run.rate.per_second for run in self.runs]) or 0),
            "cpu_us_per_event": round(middle([run.rate.cpu_us for run in self.runs]) or 0, 2),
            "records_per_event": round(records / len(contents) / events, 3),
            "bytes_per_event": round(size / len(contents) / events),
            "whole_states_bytes_per_event": round(records / len(contents) / events * STATE.itemsize),
            "recovery_seconds": round(middle(self.recovered) or 0, 2),
            "counted": self.runs[0].counted,
            "events": events,
        }


def main(command_line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.changelog_variants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each variant (3)")
    parser.add_argument("--seed", type=int, default=1, help="of the log (1)")
    parser.add_argument("--write", action="store_true", help=f"rewrite benchmarks/{RESULTS.name}")
    arguments = parser.parse_args(command_line)
    variants = on_a_broker(lambda broker: measure(broker, arguments.repeats, arguments.seed), tell)
    figures = [variant.figures() for variant in variants]
    command = "python -m benchmarks.changelog_variants " + " ".join(
        sys.argv[1:] if command_line is None else command_line
    )
    publish(markdown(figures, command.strip()), {"variants": figures}, RESULTS if arguments.write else None)
    return 0


def measure(broker: Broker, repeats: int, seed: int) -> list[Variant]:
    """Every variant `repeats` times, in turn. Raises FailedRunError."""
    chosen = [runner for runner in RUNNERS if runner.name in ("ours", "ours_1m")]
    bench = Bench(broker, settings_for_benchmarks().data_folder, SIZES, seed, tell, {})
    found: dict[tuple[str, float], Variant] = {}
    for repeat in range(repeats):
        for runner in chosen:
            for seconds in SECONDS:
                variant = found.get((runner.name, seconds), Variant(flushing(runner, seconds), seconds, (), ()))
                recovered: list[float] = []

                def recover(settings: Settings, seconds: list[float] = recovered) -> None:
                    seconds.append(recovery(broker, settings))

                run = bench.run(variant.runner, check=repeat == 0, after=recover)
                tell(f"{runner.name}, {seconds:g} s: {run.rate.per_second:,.0f} events/s, back in {recovered[0]:.2f} s")
                found[runner.name, seconds] = replace(
                    variant, runs=(*variant.runs, run), recovered=(*variant.recovered, *recovered)
                )
    return list(found.values())


def flushing(runner: Runner, seconds: float) -> Runner:
    """The same with another time between two writes."""
    return replace(runner, settings={**runner.settings, "flush_seconds": seconds})


def recovery(broker: Broker, settings: Settings) -> float:
    """Seconds from the assignment of partitions until a worker has them all back from the changelog."""
    log = broker.folder / "logs" / f"{settings.topic_prefix}recovery.log"
    worker = start_worker(settings, log)
    try:
        return worker.recovery_seconds(settings.partitions, START_SECONDS, START_SECONDS)
    finally:
        worker.end()


def markdown(figures: Sequence[dict[str, Any]], command: str) -> str:
    rows = "\n".join(
        f"| {f['viewers']:,} | {f['flush_seconds']:g} | {f['events_per_second']:,} | {f['cpu_us_per_event']:.1f} | "
        f"{f['records_per_event']:.3f} | {f['bytes_per_event']:,} | {f['whole_states_bytes_per_event']:,} | "
        f"{f['recovery_seconds']:.2f} | {'all' if f['counted'] == f['events'] else f['counted']} |"
        for f in figures
    )
    return f"""# How often states are written

`{command}`. Written by that command.

{machine()}

{HEAD}
{rows}

The logs and the measurement are those of [throughput](throughput/RESULTS.md), with {SIZES.small:,} and {SIZES.large:,}
events. A worker reads a log as fast as it can, so a second holds tens of thousands of events; at a slower rate fewer of
a viewer's events fall into one write, and the interval saves less. Bytes are those of the segments. *Whole*: the
same records at {STATE.itemsize:,} bytes each, unpacked. Recovery: from the assignment until another worker has all
partitions back, from a changelog that was not compacted. Counted: events in the newest states.

What a crash leaves to be done again is at most an interval's events; markers in the states make it harmless
(docs/faults.md draws the interval of every case from 0.1, 1 and 3 s).
"""


HEAD: Final = (
    "| viewers | seconds between writes | events/s | CPU µs/event | changelog records/event | bytes/event | whole | "
    "recovery, s | counted |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
