"""The runs as markdown and as one JSON object."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.throughput.figures import Bar, bars, middle
from benchmarks.throughput.runners import PEERS, RUNNERS, Run

FIRST_NAMES: Final = (
    "ours",
    "ours_1m",
    "ours_plain_agent",
    "faust_naive",
    "faust_take",
    "quixstreams",
    "bytewax",
    "confluent",
    "aiokafka",
)
"""Of the figures that the JSON object begins with."""
PACKAGES: Final = ("faust-streaming", "aiokafka", "confluent-kafka", "numpy", "numba", "orjson")
PEER_PACKAGES: Final = ("quixstreams", "bytewax", "confluent-kafka", "rocksdict")


@dataclass(frozen=True)
class Results:
    """runs: by runner; failures: what each runner's failed runs said; busiest: of each log by its viewers, the share of
    events that the busiest viewer has, and how many viewers it names.
    """

    command: str
    seconds: float
    runs: Mapping[str, Sequence[Run]]
    failures: Mapping[str, Sequence[str]]
    logs: Sequence[str]

    def rates(self) -> dict[str, float | None]:
        """Median events a second by runner."""
        return {name: middle([run.rate.per_second for run in runs]) for name, runs in self.runs.items()}


def document(results: Results) -> dict[str, Any]:
    """One JSON object; figures that were not measured are null."""
    rates = results.rates()
    found: dict[str, Any] = {name: _rounded(rates.get(name), 0) for name in FIRST_NAMES}
    ours = results.runs.get("ours", ())
    found["cpu_us_per_event"] = _rounded(_cpu(ours), 2)
    found["changelog_records_per_event"] = _rounded(_records(ours), 3)
    found |= {name: _rounded(rates[name], 0) for name in rates if name not in FIRST_NAMES}
    found["changelog_bytes_per_event"] = _rounded(_bytes(ours), 0)
    by_name = {f"{name}_{suffix}": figure for name, runs in results.runs.items() for suffix, figure in _more(runs)}
    found |= {name: figure for name, figure in by_name.items() if figure is not None}
    found["bars"] = {bar.asked: _rounded(bar.value, 2) for bar in bars(rates)}
    found["bars_met"] = {bar.asked: bar.met for bar in bars(rates)}
    found["failures"] = {name: list(said) for name, said in results.failures.items() if said}
    return found


def markdown(results: Results) -> str:
    rates = results.rates()
    return (
        "\n\n".join(
            [
                "# Events a second, beside what else could be used",
                f"`{results.command}`, {results.seconds / 60:.0f} minutes. Written by that command.",
                machine(peers=True),
                "## Bars",
                _table(("ours against", "asked", "measured", "met"), [_bar_row(bar) for bar in bars(rates)]),
                "## Runs",
                _table(
                    (
                        "program",
                        "events/s, median",
                        "of each run",
                        "CPU µs/event",
                        "changelog records/event",
                        "changelog bytes/event",
                        "requests/1,000 events",
                        "events read",
                        "counted",
                        "what is durable when an event counts as done",
                    ),
                    [_run_row(runner.name, results) for runner in RUNNERS if runner.name in results.runs],
                ),
                "\n".join(f"- failed: {name}: {line}" for name, said in results.failures.items() for line in said)
                or "All ran.",
                METHOD.format(logs="\n".join(f"- {log}" for log in results.logs)),
            ]
        )
        + "\n"
    )


METHOD: Final = """## How it is measured

One broker (Apache Kafka, one node, its log on this machine's disk), one process at a time, runners interleaved. Every
topic has 4 partitions and LogAppendTime; events are keyed by viewer with Kafka's murmur2 partitioner, not compressed.

{logs}

The product is the whole worker process (`personas worker --role watch`): decoding and validation, cluster look-up, the
counts, the refresh rule, requests, changelog, offsets. The peers look the cluster up in a dict and keep decayed
counts at two horizons per viewer and cluster where they have state; they validate nothing and request nothing.
Most requests are viewers' first ones, after 5 and 20 watches: a log of a hundred events a viewer holds more of them
than a service sees, and a shorter one (`--quick`) more still.

Each is watched from outside. One with state in Kafka is where its committed offsets are, asked of the broker every 50
ms; the others print a mark every hundredth of the log. The rate is taken between the first and last step of progress
within 10% and 95% of the events, so that start-up, compilation, the first fetches and the wait for a last timer fall
outside for everyone. CPU is the process's user and system time in the same window. Changelog records and bytes are read
from the headers of the record batches in the broker's segments, transaction markers left out, over all events. Counted:
events in the newest state of every viewer in the changelog after the run, or for a program whose state others cannot
read how many it says it handled; the first run of each is counted, and one that does not count all has failed."""


def machine(*, peers: bool = False) -> str:
    """This machine, its Python and the packages, in a sentence or two; peers: those of the peers' environment too."""
    memory = psutil.virtual_memory().total / 2**30
    own = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    text = (
        f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release()}, Python "
        f"{platform.python_version()}, {own}."
    )
    if not peers:
        return text
    others = ", ".join(f"{name} {_locked(name)}" for name in PEER_PACKAGES)
    return f"{text} Peers of another environment: {others}."


def _processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def _locked(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)", (PEERS / "requirements.lock").read_text(), re.MULTILINE)
    return found[1] if found else "?"


def _bar_row(bar: Bar) -> tuple[str, ...]:
    digits = 0 if bar.least >= 1000 else 2
    value = "-" if bar.value is None else f"{bar.value:,.{digits}f}"
    met = "-" if bar.met is None else "yes" if bar.met else "**no**"
    return bar.asked, f"{bar.least:,g}" if digits else f"{bar.least:,.0f}", value, met


def _run_row(name: str, results: Results) -> tuple[str, ...]:
    runner = next(runner for runner in RUNNERS if runner.name == name)
    runs = results.runs[name]
    if not runs:
        return (runner.title, *["failed"] * 8, runner.durability)
    return (
        runner.title,
        _shown(results.rates()[name], 0),
        " ".join(f"{run.rate.per_second:,.0f}" for run in runs),
        _shown(_cpu(runs), 1),
        _shown(_records(runs), 3),
        _shown(_bytes(runs), 0),
        _shown(_requests(runs), 1),
        f"{runs[0].events:,}",
        "all" if any(run.counted is not None for run in runs) else "-",
        runner.durability,
    )


def _more(runs: Sequence[Run]) -> list[tuple[str, float | None]]:
    return [
        ("cpu_us", _rounded(_cpu(runs), 2)),
        ("changelog_records", _rounded(_records(runs), 3)),
        ("requests_per_1000", _rounded(_requests(runs), 2)),
    ]


def _cpu(runs: Sequence[Run]) -> float | None:
    return middle([run.rate.cpu_us for run in runs])


def _records(runs: Sequence[Run]) -> float | None:
    return middle([run.changelog.records / run.events for run in runs if run.changelog])


def _bytes(runs: Sequence[Run]) -> float | None:
    return middle([run.changelog.bytes / run.events for run in runs if run.changelog])


def _requests(runs: Sequence[Run]) -> float | None:
    return middle([1000 * run.requests / run.events for run in runs if run.requests is not None])


def _rounded(value: float | None, digits: int) -> float | None:
    if value is None:
        return None
    return round(value, digits) if digits else round(value)


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
