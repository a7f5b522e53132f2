"""Events a second of the watch worker beside other ways to keep state over Kafka; ends with one JSON object.

python -m benchmarks.throughput                              # median of 3, under half an hour on 2 quiet cores
python -m benchmarks.throughput --quick --only ours aiokafka # a first look: once, fewer events
python -m benchmarks.throughput --write                      # also rewrites benchmarks/throughput/RESULTS.md
python -m benchmarks.throughput --profile --only ours_1m     # once, and where the worker's CPU time goes
python -m benchmarks.throughput --profile --only ours ours_1m --write   # the same into benchmarks/throughput/PROFILE.md
python -m benchmarks.throughput --only ours --flush-seconds .2

A missed bar is reported, and the exit status is 0; it is 1 if a run failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

import orjson

from agents.settings import Settings
from benchmarks.throughput.broker import Broker
from benchmarks.throughput.command import on_a_broker, publish
from benchmarks.throughput.event_log import Shape, cached_log
from benchmarks.throughput.report import Results, document, markdown
from benchmarks.throughput.runners import RUNNERS, Bench, FailedRunError, Run, Runner, Sizes, settings_for_benchmarks

HERE: Final = Path(__file__).parent
REPEATS: Final = 3
QUICK: Final = Sizes(small=300_000, large=500_000, first=40_000)
SHOWN_FUNCTIONS: Final = 25
PARTS: Final = (
    ("records out of fetches", "consumer/fetcher.py:fetched_records"),
    ("decoding and checking events", "streams/columns.py:read"),
    ("their columns, videos looked up", "streams/columns.py:events"),
    ("their viewers' rows", "streams/state_table.py:rows"),
    ("the kernel, and words to its requests", "streams/watch.py:_run"),
    ("of which words", "streams/watch.py:_request_at"),
    ("requests acknowledged", "agents/output_writer.py:write"),
    ("changed states written", "agents/watch_app.py:_flush"),
    ("of which copied and packed", "streams/state_table.py:take_changed"),
    ("Kafka's producers", "producer/sender.py:_sender_routine"),
)
"""What functions do, with all that they call."""


def main(command_line: Sequence[str] | None = None) -> int:
    options = parser()
    arguments = options.parse_args(command_line)
    if arguments.write and not arguments.profile and (arguments.only or arguments.quick):
        options.error("--write needs all programs at full length: leave --only and --quick away")
    command = "python -m benchmarks.throughput " + " ".join(sys.argv[1:] if command_line is None else command_line)
    sizes = QUICK if arguments.quick else Sizes()
    repeats = 1 if arguments.quick or arguments.profile else arguments.repeats
    chosen = [runner for runner in RUNNERS if not arguments.only or runner.name in arguments.only]
    started = time.monotonic()
    data_folder = settings_for_benchmarks().data_folder

    def measure(broker: Broker) -> tuple[dict[str, list[Run]], dict[str, list[str]]]:
        worker = {"flush_seconds": arguments.flush_seconds, "state_store": arguments.state_store}
        bench = Bench(broker, data_folder, sizes, arguments.seed, tell, worker)
        profile = data_folder.absolute() / "benchmarks" / "profile.json" if arguments.profile else None
        return run_all(bench, chosen, repeats, profile, profiles)

    profiles: list[str] = []
    runs, failures = on_a_broker(measure, tell)
    if arguments.profile:
        text = "\n".join([f"# Where the time goes\n\n`{command.strip()}`. Written by that command.\n", *profiles])
        figures = {name: round(run.rate.cpu_us, 2) for name, found in runs.items() for run in found}
        publish(text, {"cpu_us_per_event": figures}, HERE / "PROFILE.md" if arguments.write else None)
        return 1 if any(failures.values()) else 0
    logs = [described(sizes.shape(runner, arguments.seed), data_folder) for runner in chosen]
    results = Results(command.strip(), time.monotonic() - started, runs, failures, list(dict.fromkeys(logs)))
    publish(markdown(results), document(results), HERE / "RESULTS.md" if arguments.write else None)
    return 1 if any(failures.values()) else 0


def run_all(
    bench: Bench, chosen: Sequence[Runner], repeats: int, profile: Path | None, profiles: list[str]
) -> tuple[dict[str, list[Run]], dict[str, list[str]]]:
    """Every runner `repeats` times, in turn; a failed run does not stop the others. Profiles are added as markdown."""
    runs: dict[str, list[Run]] = {runner.name: [] for runner in chosen}
    failures: dict[str, list[str]] = {runner.name: [] for runner in chosen}
    for repeat in range(repeats):
        for runner in chosen:
            try:
                profiled = None if runner.program else profile
                run = bench.run(runner, check=repeat == 0, profile=profiled)
            except FailedRunError as error:
                failures[runner.name].append(str(error))
                tell(f"{runner.name}: {error}")
                continue
            runs[runner.name].append(run)
            tell(f"{runner.name}: {run.rate.per_second:,.0f} events/s, {run.rate.cpu_us:.1f} µs CPU an event")
            if profiled is not None:
                profiles.append(described_profile(runner, run, orjson.loads(profiled.read_bytes())))
    return runs, failures


def described_profile(runner: Runner, run: Run, found: Mapping[str, Mapping[str, int]]) -> str:
    """Shares of the worker's CPU samples, by what is done and by function."""
    total = sum(found["self"].values()) or 1

    def share(count: int) -> str:
        return f"{count / total:.1%} | {count / total * run.rate.cpu_us:.2f}"

    parts = "\n".join(f"| {what} | {share(found['inclusive'].get(function, 0))} |" for what, function in PARTS)
    functions = "\n".join(
        f"| `{function}` | {share(count)} |" for function, count in islice(found["self"].items(), SHOWN_FUNCTIONS)
    )
    return f"""## {runner.title}

{run.rate.per_second:,.0f} events/s and {run.rate.cpu_us:.1f} µs of CPU an event while sampled; {total:,} samples.

| part, with all that it calls | share | µs an event |
| --- | --- | --- |
{parts}

| function, by itself and with the C code it calls | share | µs an event |
| --- | --- | --- |
{functions}
"""


def described(shape: Shape, data_folder: Path) -> str:
    """What a log holds, for the report."""
    path = cached_log(shape, data_folder.absolute() / "benchmarks" / "logs")
    counts: Counter[bytes] = Counter()
    size = 0
    with path.open("rb") as file:
        for line in file:
            counts[line.split(b'"user_id":"', 1)[1].split(b'"', 1)[0]] += 1
            size += len(line) - 1
    (_, most), *_ = counts.most_common(1)
    return (
        f"{shape.users:,} viewers of log-normal activity (sigma 1), of whom {len(counts):,} appear in {shape.events:,} "
        f"events of {size / shape.events:.0f} bytes; the busiest has {most / shape.events:.4%}. Seed {shape.seed}."
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [runner.name for runner in RUNNERS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="once, with fewer events")
    parser.add_argument(
        "--repeats", type=int, default=REPEATS, help=f"runs of each, of which the median is taken ({REPEATS})"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the logs (1)")
    parser.add_argument(
        "--flush-seconds", type=float, default=Settings().flush_seconds, help="the worker's, as PERSONAS_FLUSH_SECONDS"
    )
    parser.add_argument("--state-store", choices=("memory", "disk"), default=Settings().state_store)
    parser.add_argument("--profile", action="store_true", help="sample where the worker's CPU time goes; once")
    parser.add_argument("--write", action="store_true", help="rewrite RESULTS.md, or PROFILE.md with --profile")
    return parser


def tell(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
