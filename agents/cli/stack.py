"""`personas up | down | status`: the local stack."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import click
import orjson
from rich.console import Console
from rich.table import Table

from agents.localstack import LocalStackError
from agents.localstack.ports import PARTS, Ports, ports_of
from agents.localstack.progress import shown_progress
from agents.localstack.stack import LocalStack, PartStatus
from agents.settings import load_settings

_PORT_NAMES = tuple(f.name for f in dataclasses.fields(Ports))


def _parts(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    if value is None:
        return PARTS
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if unknown := sorted(set(names) - set(PARTS)):
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(PARTS)}", context, parameter)
    return names


_only = click.option("--only", metavar="PART,...", callback=_parts, help=f"Only these of {', '.join(PARTS)}.")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
_data_folder = click.option(
    "--data-folder", type=click.Path(path_type=Path, file_okay=False), help="Instead of PERSONAS_DATA_FOLDER."
)


def _port_flags(command: Callable[..., None]) -> Callable[..., None]:
    for field in reversed(dataclasses.fields(Ports)):
        flag = f"--{field.name.replace('_', '-')}-port"
        command = click.option(flag, f"port_{field.name}", type=int, metavar="N", help=f"Default: {field.default}.")(
            command
        )
    return command


@click.command(
    epilog="\b\nExamples:\n  personas up\n  personas up --only kafka,cassandra\n  personas up --port-offset 100"
)
@_only
@click.option("--port-offset", type=int, default=0, metavar="N", help="Add N to every port that no flag names.")
@_port_flags
@_data_folder
@_json
def up(only: tuple[str, ...], port_offset: int, data_folder: Path | None, as_json: bool, **flags: int | None) -> None:
    """Start the local Kafka, Cassandra and Triton, and wait until they answer.

    What already runs is left alone. The first start downloads jars and weights (about 300 MB) and keeps them in the
    data folder. The ports come from PERSONAS_KAFKA_BOOTSTRAP, PERSONAS_CASSANDRA_PORT and PERSONAS_TRITON_URL, so
    that workers and stack agree.
    """
    settings = load_settings(data_folder=data_folder)
    # SIGINT too: a shell without job control starts background commands with it ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        shifted = ports_of(settings).shifted(port_offset)
        ports = dataclasses.replace(shifted, **{n: v for n in _PORT_NAMES if (v := flags[f"port_{n}"]) is not None})
        local = LocalStack(ports, settings.data_folder)
        with shown_progress() as progress:
            local.up(only, progress)
    except LocalStackError as error:
        raise click.ClickException(str(error)) from error
    served = ports.settings(settings)
    addresses = {name: getattr(served, name) for name in ("kafka_bootstrap", "cassandra_port", "triton_url")}
    changed = {name: value for name, value in addresses.items() if value != getattr(settings, name)}
    variables = {f"PERSONAS_{name.upper()}": str(value) for name, value in changed.items()}
    if as_json:
        _print_json({"parts": [_as_json(s) for s in local.status()], "environment": variables})
        return
    if variables:
        click.echo("Other ports than the settings say; for the other commands:")
        click.echo("\n".join(f"export {name}={value}" for name, value in variables.items()))


@click.command(epilog="\b\nExamples:\n  personas down\n  personas down --only triton")
@_only
@_data_folder
@_json
def down(only: tuple[str, ...], data_folder: Path | None, as_json: bool) -> None:
    """Stop the local stack. Data stays; what does not run is fine."""
    local = _existing(data_folder)
    with shown_progress() as progress:
        killed = local.down(only, progress)
    if as_json:
        _print_json({"parts": [_as_json(s) for s in local.status()], "killed": killed})


@click.command(epilog="Example:  personas status --json | jq '.parts[] | select(.state != \"running\")'")
@_data_folder
@_json
def status(data_folder: Path | None, as_json: bool) -> None:
    """Show what of the local stack runs, where, and how much memory it takes.

    States: running, paused (by SIGSTOP), stopped, stale (it ended without `down`; `up` and `down` clear that).
    """
    states = _existing(data_folder).status()
    if as_json:
        _print_json({"parts": [_as_json(s) for s in states]})
        return
    table = Table("part", "state", "pid", "address", "memory", "log", box=None, pad_edge=False)
    for s in states:
        memory = f"{s.memory_bytes / 2**20:.0f} MiB" if s.memory_bytes else ""
        table.add_row(s.part, s.state, str(s.pid or ""), s.address, memory, str(s.log) if s.log.exists() else "")
    width = None if sys.stdout.isatty() else 200
    Console(markup=False, width=width, soft_wrap=True).print(table)


def _existing(data_folder: Path | None) -> LocalStack:
    """The stack of a data folder, whatever ports it was started on: pid files know."""
    return LocalStack(Ports(), load_settings(data_folder=data_folder).data_folder)


def _as_json(state: PartStatus) -> dict[str, Any]:
    return {**dataclasses.asdict(state), "log": str(state.log)}


def _print_json(value: dict[str, Any]) -> None:
    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2))


def interrupt(number: int, frame: FrameType | None) -> None:
    """A signal handler: end as Ctrl-C does, so that what was started is stopped."""
    raise KeyboardInterrupt
