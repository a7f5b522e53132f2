"""`python -m tests.chaos`: every case on a stack of its own, and a table of what they showed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import click

from agents.localstack.ports import free_ports
from agents.localstack.stack import LocalStack
from tests.chaos.cases import CASES, Case
from tests.chaos.harness import quiet_clients
from tests.chaos.runner import Outcome, Scale, figures, run_cases
from tests.conftest import ASSETS, TEST_MARK

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
HEADING = "## Results\n"
EPILOG = """\b
Examples:
  python -m tests.chaos
  python -m tests.chaos --seed 7 --case killed-at-random-moments --case disk-stale/batch/disk
  python -m tests.chaos --list
"""


@click.command(epilog=EPILOG)
@click.option("--seed", default=1, show_default=True, help="Decides the events and the moments of the faults.")
@click.option(
    "--case", "names", multiple=True, help="A case, or a fault in all its forms; repeat for more. Default: all."
)
@click.option("--events", default=8_000, show_default=True, help="Watch events of a case.")
@click.option("--kills", default=20, show_default=True, help="SIGKILLs of the cases that kill at random moments.")
@click.option("--viewers", default=14, show_default=True, help="Viewers of a case of the persona side.")
@click.option("--lanes", default=3, show_default=True, help="Cases that run at once where they allow it.")
@click.option("--list", "listing", is_flag=True, help="Print the names of the cases and end.")
@click.option("--write", is_flag=True, help="Put the table into docs/faults.md.")
@click.option("--json", "only_json", is_flag=True, help="Print the last line only.")
def main(
    seed: int,
    names: tuple[str, ...],
    events: int,
    kills: int,
    viewers: int,
    lanes: int,
    listing: bool,
    write: bool,
    only_json: bool,
) -> None:
    """Kill, freeze and cut off workers, broker, stores and student while a known set of events flows.

    Compares what is left with a plain reference of the log. The last line is one JSON object of sums. Ends with 0 also
    when something was missed: look at the figures.
    """
    cases = _chosen(names)
    if listing:
        click.echo("\n".join(case.name for case in cases))
        return
    os.environ.setdefault(TEST_MARK, f"chaos-{os.getpid()}")  # workers inherit it, as under pytest
    quiet_clients()
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell lets what it starts in the background ignore the first
        signal.signal(number, _interrupt)
    began = time.monotonic()

    def say(text: str) -> None:
        if not only_json:
            click.echo(f"[{time.monotonic() - began:6.0f} s] {text}")

    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    ASSETS.mkdir(parents=True, exist_ok=True)
    (folder / "assets").symlink_to(ASSETS)
    local = LocalStack(free_ports(), folder)
    say(f"{len(cases)} cases, seed {seed}; stack and logs in {folder}")
    try:
        outcomes = asyncio.run(run_cases(cases, seed, Scale(events, kills, viewers), local, folder, lanes, say))
    finally:
        local.down()
    last = json.dumps(figures(outcomes) | {"seed": seed, "seconds": round(time.monotonic() - began)})
    if write:
        command = f"python -m tests.chaos --seed {seed} --events {events} --kills {kills} --viewers {viewers}"
        PAGE.write_text(with_results(PAGE.read_text(), f"`{command}`", table(outcomes), last))
    if not only_json:
        click.echo(table(outcomes))
    click.echo(last)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def with_results(page: str, command: str, rows: str, last: str) -> str:
    """The page with everything below its results' heading replaced. Raises ValueError if it has no such heading."""
    before, heading, _ = page.partition(HEADING)
    if not heading:
        raise ValueError(f"no line {HEADING.strip()!r}")
    return f"{before}{heading}\n{command} on two shared cores:\n\n{rows}\n\n```json\n{last}\n```\n"


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a markdown table."""
    rows = [
        "| case | seed | events | kills | restarts | over | under | requests missing | extra | versions disagreeing "
        "| s | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        d = outcome.differences
        cells = [
            outcome.name, outcome.seed, outcome.events, outcome.kills, outcome.restarts, d.over, d.under,
            d.requests_missing, d.requests_extra, len(outcome.disagreements), round(outcome.seconds),
            "exact" if outcome.exact else "**missed**",
        ]  # fmt: skip
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def _chosen(names: Sequence[str]) -> list[Case]:
    known = {case.name for case in CASES} | {case.fault for case in CASES}
    if unknown := sorted(set(names) - known):
        raise click.UsageError(f"no case {unknown[0]!r}; --list prints them")
    return [case for case in CASES if not names or case.name in names or case.fault in names]


if __name__ == "__main__":
    main()
