"""`personas why`: why a viewer's persona was refreshed."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click
import orjson
from rich.console import Console

from agents.cards import why_card, why_table
from agents.cli.failures import one_line_errors
from agents.cli.get import read_personas
from agents.settings import load_settings
from streams.decoding import decode_persona
from streams.records import Persona


@click.command()
@click.argument("user")
@click.option("--json", "as_json", is_flag=True, help="JSON: user_id, version, rule, explanation; one line a version.")
@click.option("--history", is_flag=True, help="Also one line for each stored version before the latest.")
def why(user: str, as_json: bool, history: bool) -> None:
    """Explain why a viewer's latest persona was written.

    Shows the rule that fired with its value against the threshold, the divergence beside what chance explains at this
    viewer's number of watches, and the interests that rose and fell, before and now.

    \b
    personas why ann
    personas why ann --history
    personas why ann --json | jq .explanation.value

    Exit status 1 if the viewer has no persona.
    """
    settings = load_settings()
    with one_line_errors(settings):
        rows = asyncio.run(read_personas(settings, user, history=history))
        if not rows:
            click.echo(f"no persona is stored for {user!a}", err=True)
            sys.exit(1)
        stored = [decode_persona(row.body) for row in rows]
    if as_json:
        for persona in stored:
            click.echo(orjson.dumps(_shown(persona)))
        return
    console = Console()
    persona = stored[0]
    if persona.explanation is None:
        console.print(f"version {persona.version} was written by rule {persona.rule}; no measurement is stored with it")
    else:
        console.print(why_card(persona.user_id, persona.version, persona.explanation))
    if history:
        console.print(why_table(stored))


def _shown(persona: Persona) -> dict[str, Any]:
    return {
        "user_id": persona.user_id,
        "version": persona.version,
        "rule": persona.rule,
        "explanation": persona.explanation,
    }
