"""`personas cost`: what the wording of personas costs, tier by tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path

import click
import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from streams.costs import CostInputs, Costs, as_dict, costs, measure
from streams.records import Persona


@dataclass(frozen=True, slots=True)
class Figure:
    """A value and where it is from."""

    value: float
    source: str


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """An option for each input, in their order."""
    for known in reversed(fields(CostInputs)):
        kind = click.FloatRange(min=0.0, max=known.metadata["most"])
        flag = f"--{known.name.replace('_', '-')}"
        text = known.metadata["what"].capitalize() + "."
        command = click.option(flag, type=kind, metavar="NUMBER", help=text)(command)
    return command


@click.command()
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path, allow_dash=True, dir_okay=False),
    metavar="PERSONAS.jsonl",
    help="Measure shares and tokens in persona records, one a line (.gz, or - for standard input).",
)
@_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object: inputs with their sources, and the costs.")
def cost(source: Path | None, as_json: bool, **given: float | None) -> None:
    """Compute what the wording of personas costs a day and a month: cache, student, teacher and template.

    Every figure is an input. Without flags they are the committed ones: measured where that was possible, assumed
    where it is yours to know, above all the prices. The table says which is which. A flag sets one; --from measures
    shares and tokens in your own personas, as `personas tail --json` and `personas replay` write them; a flag wins
    over it. Prices are in any one currency. A month is 30 days.

    \b
    personas cost
    personas cost --from out/personas.jsonl --personas-per-day 0.2
    personas cost --teacher-share 0.1 --teacher-price-in 0.15 --teacher-price-out 0.6
    personas cost --viewers 5e6 --student-hour-price 1.2 --student-tokens-per-second 40000 --json | jq .costs.cost_month

    The student pays for its machine by the hour, and all that it takes to get a text through the checks is in its
    tokens per text, failed tries before the teacher too. What runs anyway (Kafka, Cassandra, counting) is not in it:
    docs/scale.md is about that.

    Exit status 1 for a file that cannot be read, 2 for values that contradict each other.
    """
    figures = committed_figures()
    if source is not None:
        figures |= _measured(source)
    figures |= {name: Figure(value, "flag") for name, value in given.items() if value is not None}
    try:
        inputs = CostInputs(**{name: figure.value for name, figure in figures.items()})
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    found = costs(inputs)
    if as_json:
        shown = {name: {"value": figure.value, "source": figure.source} for name, figure in figures.items()}
        click.echo(orjson.dumps({"inputs": shown, "costs": as_dict(found)}, option=orjson.OPT_INDENT_2))
        return
    _print(figures, found)


def committed_figures() -> dict[str, Figure]:
    """The packaged inputs by name, in the order of `CostInputs`."""
    entries = orjson.loads(files("agents").joinpath("data", "cost_inputs.json").read_bytes())
    found = {}
    for known in fields(CostInputs):
        entry = entries[known.name]
        found[known.name] = Figure(entry["value"], f"{entry['kind']}: {entry['source']}")
    return found


def _measured(source: Path) -> dict[str, Figure]:
    from agents.event_log import UnreadableFile, read_lines

    try:
        sums = measure(_personas(source, read_lines(source)))
        inputs = sums.inputs()
    except (UnreadableFile, ValueError) as error:
        raise click.ClickException(f"{source}: {error}" if isinstance(error, ValueError) else str(error)) from error
    return {name: Figure(value, f"measured: {sums.personas:,} personas of {source}") for name, value in inputs.items()}


def _personas(source: Path, lines: list[bytes]) -> Iterator[Persona]:
    """The personas of a file; its tombstones and empty lines are left out. Raises ValueError with the line's number."""
    from streams.decoding import UnreadableRecordError, decode_persona

    for number, line in enumerate(lines, 1):
        if not line.strip() or _is_tombstone(line):
            continue
        try:
            yield decode_persona(line)
        except UnreadableRecordError as error:
            raise ValueError(f"line {number} is no persona: {error}") from error


def _is_tombstone(line: bytes) -> bool:
    """Whether the line says that a persona was removed, as `personas replay` and `personas tail --json` write it."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return record is None or (isinstance(record, dict) and not record.keys().isdisjoint({"tombstone", "removed"}))


def _print(figures: dict[str, Figure], found: Costs) -> None:
    console = Console()
    console.print(_table(("input", "value", "from"), _input_rows(figures)))
    console.print()
    rows = [
        [part.tier, f"{part.share:.1%}", *(_shown(value) for value in (part.texts, part.tokens_in, part.tokens_out)),
         _money(part.cost_day), _money(part.cost_month)]
        for part in found.tiers
    ]  # fmt: skip
    whole = [sum(getattr(part, name) for part in found.tiers) for name in ("texts", "tokens_in", "tokens_out")]
    rows.append(["all", "100.0%", *map(_shown, whole), _money(found.cost_day), _money(found.cost_month)])
    headings = ("tier", "share", "texts a day", "tokens in", "tokens out", "cost a day", "cost a month")
    console.print(_table(headings, rows, numbers=True))
    console.print()
    for what, value in (
        ("personas a day", _shown(found.personas_day)),
        ("student machines, busy as given", f"{found.machines:,.2f}"),
        ("cost of a thousand personas", _money(found.cost_per_thousand_personas)),
        ("cost a month of a million viewers", _money(found.cost_month_per_million_viewers)),
    ):
        console.print(Text(f"{what:36} {value:>14}"))


def _input_rows(figures: dict[str, Figure]) -> list[list[str]]:
    what = {known.name: known.metadata["what"] for known in fields(CostInputs)}
    return [[what[name], f"{figure.value:,.10g}", figure.source] for name, figure in figures.items()]


def _table(headings: tuple[str, ...], rows: list[list[str]], *, numbers: bool = False) -> Table:
    table = Table(box=None, pad_edge=False)
    for place, heading in enumerate(headings):
        right = place > 0 if numbers else place == 1
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _shown(value: float) -> str:
    return f"{value:,.0f}"


def _money(value: float) -> str:
    return f"{value:,.4f}" if 0 < value < 1 else f"{value:,.2f}"
