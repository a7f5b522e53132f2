"""What a fleet for a billion viewers needs: arithmetic on measured figures, line by line.

    .venv/bin/python -m benchmarks.scale_model
    .venv/bin/python -m benchmarks.scale_model --set cpu_us_per_event=12 --set users=50e6
    .venv/bin/python -m benchmarks.scale_model --write            # into docs/scale.md

Inputs are in benchmarks/scale_inputs.json, each with where it comes from. Ends with one JSON object.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import orjson

INPUTS: Final = Path(__file__).with_name("scale_inputs.json")
PAGE: Final = Path(__file__).parents[1] / "docs" / "scale.md"
DAY_SECONDS: Final = 86_400
BEGIN, END = "<!-- model -->", "<!-- /model -->"


@dataclass(frozen=True, slots=True)
class Input:
    """A figure that the arithmetic begins with. kind: given, measured, provisional, chosen or assumed.

    quoted: the text of the file that `source` begins with in which the figure stands; empty if it stands in none.
    """

    name: str
    value: float
    what: str
    kind: str
    source: str
    quoted: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """One step. how: the arithmetic with its numbers."""

    what: str
    how: str
    value: float
    unit: str


@dataclass(slots=True)
class Sheet:
    """Lines under headings, and the figures by name."""

    sections: list[tuple[str, list[Line]]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def section(self, heading: str) -> None:
        self.sections.append((heading, []))

    def add(self, name: str, what: str, how: str, value: float, unit: str) -> float:
        self.sections[-1][1].append(Line(what, how, value, unit))
        self.figures[name] = value
        return value


def read_inputs(path: Path = INPUTS) -> list[Input]:
    """The committed inputs."""
    return [Input(**entry) for entry in orjson.loads(path.read_bytes())]


def shown(value: float) -> str:
    """A number as people read it: three digits that count, or all of a whole number."""
    if value == 0 or (value >= 1000 and not float(value).is_integer()):
        return f"{value:,.0f}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"


def model(given: Mapping[str, float]) -> Sheet:
    """All steps. `given`: the inputs' values by name. Raises KeyError for one that is missing."""
    sheet = Sheet()
    rate, peak = _load(sheet, given)
    processes = _watch(sheet, given, peak)
    _changelog(sheet, given, rate, peak)
    _brokers(sheet, given, rate, peak)
    _partitions(sheet, given, peak, processes)
    _personas(sheet, given, rate)
    return sheet


def _load(sheet: Sheet, g: Mapping[str, float]) -> tuple[float, float]:
    sheet.section("Load")
    day = sheet.add(
        "events_day",
        "events a day",
        f"{shown(g['users'])} x {shown(g['events_per_day'])}",
        g["users"] * g["events_per_day"],
        "",
    )
    rate = sheet.add("rate", "mean rate", f"{shown(day)} / {shown(DAY_SECONDS)} s", day / DAY_SECONDS, "events/s")
    peak = sheet.add("peak_rate", "at the peak", f"{shown(rate)} x {shown(g['peak'])}", rate * g["peak"], "events/s")
    return rate, peak


def _watch(sheet: Sheet, g: Mapping[str, float], peak: float) -> float:
    sheet.section("Watch workers")
    counting = sheet.add(
        "counting",
        "cores for events, at the peak",
        f"{shown(peak)} x {shown(g['cpu_us_per_event'])} µs / 10^6",
        peak * g["cpu_us_per_event"] / 1e6,
        "cores",
    )
    writing = sheet.add(
        "transactions",
        "cores for transactions, one a flush and partition",
        f"{shown(g['partitions'])} / {shown(g['flush_seconds'])} s x {shown(g['transaction_ms'])} ms / 1000",
        g["partitions"] / g["flush_seconds"] * g["transaction_ms"] / 1000,
        "cores",
    )
    storing = sheet.add(
        "storing",
        "cores for disk stores and their standbys",
        f"{shown(peak)} x {shown(g['records_per_event'])} x 2 x {shown(g['store_us_per_record'])} µs / 10^6",
        peak * g["records_per_event"] * 2 * g["store_us_per_record"] / 1e6,
        "cores",
    )
    cores = sheet.add(
        "cores",
        "cores, with room",
        f"({shown(counting)} + {shown(writing)} + {shown(storing)}) / {shown(g['busy'])} busy",
        (counting + writing + storing) / g["busy"],
        "cores",
    )
    memory = sheet.add(
        "memory_tb",
        "memory of all states",
        f"{shown(g['users'])} x {shown(g['bytes_per_user'])} B / 10^12",
        g["users"] * g["bytes_per_user"] / 1e12,
        "TB",
    )
    by_memory = sheet.add(
        "processes_by_memory",
        "processes by memory",
        f"{shown(memory)} TB x 1000 / ({shown(g['process_memory_gb'])} GB x {shown(g['busy'])} - "
        f"{shown(g['process_base_gb'])} GB), rounded up",
        math.ceil(memory * 1000 / (g["process_memory_gb"] * g["busy"] - g["process_base_gb"])),
        "",
    )
    by_cpu = sheet.add(
        "processes_by_cpu", "processes by processor time", "one core each, rounded up", math.ceil(cores), ""
    )
    processes = sheet.add(
        "processes", "processes", f"the larger of {shown(by_memory)} and {shown(by_cpu)}", max(by_memory, by_cpu), ""
    )
    sheet.add(
        "disk_tb",
        "disk of the stores, one standby of each",
        f"{shown(g['users'])} x {shown(g['state_bytes'])} B x 2 / 10^12",
        g["users"] * g["state_bytes"] * 2 / 1e12,
        "TB",
    )
    return processes


def _changelog(sheet: Sheet, g: Mapping[str, float], rate: float, peak: float) -> None:
    sheet.section("Changelog")
    written = g["records_per_event"] * g["state_bytes"]
    for name, what, events in (("mean", "written, mean", rate), ("peak", "written at the peak", peak)):
        sheet.add(
            f"changelog_{name}_mb",
            what,
            f"{shown(events)} x {shown(g['records_per_event'])} x {shown(g['state_bytes'])} B / 10^6",
            events * written / 1e6,
            "MB/s",
        )
    sheet.add(
        "changelog_tb",
        "size before it is compacted, all replicas",
        f"{shown(g['users'])} x {shown(g['state_bytes'])} B x {shown(g['dirty'])} x {shown(g['replicas'])} / 10^12",
        g["users"] * g["state_bytes"] * g["dirty"] * g["replicas"] / 1e12,
        "TB",
    )


def _brokers(sheet: Sheet, g: Mapping[str, float], rate: float, peak: float) -> None:
    sheet.section("Brokers")
    changelog = sheet.figures["changelog_peak_mb"]
    written = sheet.add(
        "brokers_mb",
        "written at the peak, all replicas",
        f"({shown(peak)} x {shown(g['event_bytes'])} B / 10^6 + {shown(changelog)} MB/s) x {shown(g['replicas'])}",
        (peak * g["event_bytes"] / 1e6 + changelog) * g["replicas"],
        "MB/s",
    )
    events = sheet.add(
        "events_tb",
        "watch events kept, all replicas",
        f"{shown(rate)} x {shown(DAY_SECONDS)} s x {shown(g['retention_days'])} x {shown(g['event_bytes'])} B x "
        f"{shown(g['replicas'])} / 10^12",
        rate * DAY_SECONDS * g["retention_days"] * g["event_bytes"] * g["replicas"] / 1e12,
        "TB",
    )
    by_rate = sheet.add(
        "brokers_by_rate",
        "brokers by what they write",
        f"{shown(written)} / ({shown(g['broker_mb'])} x {shown(g['busy'])}), rounded up",
        math.ceil(written / (g["broker_mb"] * g["busy"])),
        "",
    )
    kept = events + sheet.figures["changelog_tb"]
    by_disk = sheet.add(
        "brokers_by_disk",
        "brokers by what they keep",
        f"{shown(kept)} TB / ({shown(g['broker_tb'])} x {shown(g['busy'])}), rounded up",
        math.ceil(kept / (g["broker_tb"] * g["busy"])),
        "",
    )
    sheet.add("brokers", "brokers", f"the larger of {shown(by_rate)} and {shown(by_disk)}", max(by_rate, by_disk), "")


def _partitions(sheet: Sheet, g: Mapping[str, float], peak: float, processes: float) -> None:
    sheet.section("Partitions, recovery, restarts")
    each = sheet.add(
        "users_per_partition",
        "viewers to a partition",
        f"{shown(g['users'])} / {shown(g['partitions'])}",
        g["users"] / g["partitions"],
        "",
    )
    sheet.add(
        "partition_peak",
        "events of a partition at the peak",
        f"{shown(peak)} / {shown(g['partitions'])}",
        peak / g["partitions"],
        "events/s",
    )
    most = sheet.add(
        "partitions_per_process",
        "partitions of a process, at most",
        f"{shown(g['partitions'])} / {shown(processes)}, rounded up",
        math.ceil(g["partitions"] / processes),
        "",
    )
    sheet.add(
        "fullest_gb",
        "memory of the fullest process",
        f"{shown(most)} x {shown(each)} x {shown(g['bytes_per_user'])} B / 10^9 + {shown(g['process_base_gb'])} GB",
        most * each * g["bytes_per_user"] / 1e9 + g["process_base_gb"],
        "GB",
    )
    one = sheet.add(
        "partition_seconds",
        "a partition is read back from the changelog, before it is compacted",
        f"{shown(each)} x {shown(g['dirty'])} / 10^6 x {shown(g['cold_seconds'])} s",
        each * g["dirty"] / 1e6 * g["cold_seconds"],
        "s",
    )
    cold = sheet.add(
        "cold_seconds",
        "a process without its disk reads its partitions back",
        f"{shown(most)} x {shown(one)} s",
        most * one,
        "s",
    )
    sheet.add(
        "killed_seconds",
        "a killed process's partitions stand still, with a standby",
        f"{shown(g['moving_seconds'])} s + {shown(g['warm_seconds'])} s",
        g["moving_seconds"] + g["warm_seconds"],
        "s",
    )
    sheet.add(
        "killed_cold_seconds",
        "the same without standby or disk, spread over the other processes",
        f"{shown(g['moving_seconds'])} s + {shown(one)} s",
        g["moving_seconds"] + one,
        "s",
    )
    sheet.add(
        "replaced_seconds",
        "the same where a new process takes them all",
        f"{shown(g['moving_seconds'])} s + {shown(cold)} s",
        g["moving_seconds"] + cold,
        "s",
    )
    read = sheet.add(
        "region_read_tb",
        "read when every process starts cold",
        f"{shown(g['users'])} x {shown(g['state_bytes'])} B x {shown(g['dirty'])} / 10^12",
        g["users"] * g["state_bytes"] * g["dirty"] / 1e12,
        "TB",
    )
    sheet.add(
        "region_seconds",
        "which takes the brokers, if they read as fast as they write",
        f"{shown(read)} TB x 10^6 / ({shown(sheet.figures['brokers'])} x {shown(g['broker_mb'])} MB/s)",
        read * 1e6 / (sheet.figures["brokers"] * g["broker_mb"]),
        "s",
    )
    sheet.add(
        "rolling_minutes",
        "rolling restart, one process after another",
        f"{shown(processes)} x {shown(g['restart_seconds'])} s / 60",
        processes * g["restart_seconds"] / 60,
        "min",
    )
    sheet.add(
        "rolling_pause_minutes",
        "of which the whole group stands still, twice a process",
        f"{shown(processes)} x 2 x {shown(g['rebalance_seconds'])} s / 60",
        processes * 2 * g["rebalance_seconds"] / 60,
        "min",
    )
    sheet.add(
        "repartition_hours",
        "another partition count, with everything stopped",
        f"{shown(g['users'])} / {shown(g['repartition_rate'])} / 60",
        g["users"] / g["repartition_rate"] / 60,
        "h",
    )


def _personas(sheet: Sheet, g: Mapping[str, float], rate: float) -> None:
    sheet.section("Personas: student and Cassandra")
    refreshes = sheet.add(
        "refreshes",
        "refreshes",
        f"{shown(rate)} x {shown(g['refreshes'])} / 1000",
        rate * g["refreshes"] / 1000,
        "/s",
    )
    tokens = sheet.add(
        "tokens",
        "tokens that words need",
        f"{shown(refreshes)} x {shown(g['tokens'])}",
        refreshes * g["tokens"],
        "tokens/s",
    )
    sheet.add(
        "students",
        "students on two CPU cores, if nothing else",
        f"{shown(refreshes)} / ({shown(g['student_personas'])} x {shown(g['busy'])}), rounded up",
        math.ceil(refreshes / (g["student_personas"] * g["busy"])),
        "",
    )
    sheet.add(
        "aged",
        "refreshes for age alone, at most",
        f"{shown(g['users'])} / ({shown(g['maximum_age_days'])} x {shown(DAY_SECONDS)} s)",
        g["users"] / (g["maximum_age_days"] * DAY_SECONDS),
        "/s",
    )
    sheet.add(
        "budget",
        "the same as PERSONAS_BUDGET_TOKENS_PER_HOUR",
        f"{shown(tokens)} x 3600",
        tokens * 3600,
        "tokens/h",
    )
    rows = sheet.add(
        "rows",
        "persona rows, latest and history",
        f"{shown(g['users'])} x (1 + {shown(g['history'])})",
        g["users"] * (1 + g["history"]),
        "",
    )
    stored = sheet.add(
        "cassandra_tb",
        "stored, all replicas",
        f"{shown(rows)} x {shown(g['persona_bytes'])} B x {shown(g['replicas'])} / 10^12",
        rows * g["persona_bytes"] * g["replicas"] / 1e12,
        "TB",
    )
    statements = sheet.add(
        "statements",
        "statements, all replicas: two rows, a look at the history, a deletion",
        f"{shown(refreshes)} x 4 x {shown(g['replicas'])}",
        refreshes * 4 * g["replicas"],
        "/s",
    )
    by_rate = sheet.add(
        "nodes_by_rate",
        "Cassandra nodes by statements",
        f"{shown(statements)} / ({shown(g['node_statements'])} x {shown(g['busy'])}), rounded up",
        math.ceil(statements / (g["node_statements"] * g["busy"])),
        "",
    )
    by_disk = sheet.add(
        "nodes_by_disk",
        "Cassandra nodes by disk",
        f"{shown(stored)} TB / ({shown(g['node_tb'])} x {shown(g['busy'])}), rounded up",
        math.ceil(stored / (g["node_tb"] * g["busy"])),
        "",
    )
    sheet.add(
        "nodes", "Cassandra nodes", f"the larger of {shown(by_rate)} and {shown(by_disk)}", max(by_rate, by_disk), ""
    )


def rendered(inputs: Sequence[Input], sheet: Sheet) -> str:
    """The inputs and every step as markdown tables."""
    lines = ["| input | value | kind | comes from |", "| --- | --- | --- | --- |"]
    lines += [f"| {i.what} | {shown(i.value)} | {i.kind} | {i.source} |" for i in inputs]
    for heading, steps in sheet.sections:
        lines += ["", f"### {heading}", "", "| | arithmetic | result |", "| --- | --- | --- |"]
        lines += [f"| {step.what} | {step.how} | **{shown(step.value)}** {step.unit} |" for step in steps]
    return "\n".join([*lines, ""])


def with_model(page: str, text: str) -> str:
    """The page with `text` between its marks. Raises ValueError if they are not there."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=INPUTS, help="file of the inputs (default: the committed one)")
    parser.add_argument("--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", help="another value")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    options = parser.parse_args(arguments)
    inputs, changed = read_inputs(options.inputs), dict(options.set)
    unknown = changed.keys() - {known.name for known in inputs}
    if unknown:
        parser.error(f"no input {sorted(unknown)[0]}; these are there: {', '.join(known.name for known in inputs)}")
    inputs = [
        Input(i.name, changed.get(i.name, i.value), i.what, i.kind, "--set" if i.name in changed else i.source)
        for i in inputs
    ]
    sheet = model({known.name: known.value for known in inputs})
    text = rendered(inputs, sheet)
    if options.write:
        PAGE.write_text(with_model(PAGE.read_text(), text))
    sys.stdout.write(f"{text}\n{orjson.dumps(sheet.figures).decode()}\n")


if __name__ == "__main__":
    main()
