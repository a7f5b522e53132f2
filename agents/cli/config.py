"""`personas config`: the settings in force and where each comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields

import click
import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agents.settings import ENVIRONMENT_PREFIX, Settings, load_settings


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object, keyed by setting.")
def config(as_json: bool) -> None:
    """Show the settings in force, secrets redacted.

    \b
    personas config
    personas config --json | jq -r .kafka_bootstrap.value

    Exit status 2 for a value that cannot be used or an unknown PERSONAS_ variable.
    """
    shown = described(load_settings(), os.environ)
    if as_json:
        click.echo(orjson.dumps(shown, option=orjson.OPT_INDENT_2))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("variable", "value", "from", "what it is"):
        table.add_column(heading, overflow="fold")
    for entry in shown.values():
        # Values are the environment's text: shown as they are, never read as markup.
        cells = (entry["variable"], entry["value"], entry["origin"], entry["help"])
        table.add_row(*(Text(str(cell)) for cell in cells))
    Console().print(table)


def described(settings: Settings, environment: Mapping[str, str]) -> dict[str, dict[str, object]]:
    """Each setting's variable, value (secrets redacted), origin (default or environment) and help, by name."""
    values = settings.shown()
    found: dict[str, dict[str, object]] = {}
    for field in fields(settings):
        variable = ENVIRONMENT_PREFIX + field.name.upper()
        found[field.name] = {
            "variable": variable,
            "value": values[field.name],
            "origin": "environment" if variable in environment else "default",
            "help": field.metadata["help"],
        }
    return found
