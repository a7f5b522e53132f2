"""`personas why`: why a viewer's persona was refreshed."""

from __future__ import annotations

import asyncio
import sys

import click
import orjson
from rich.console import Console

from agents.cards import why_card
from agents.cli.failures import one_line_errors
from agents.cli.get import read_personas
from agents.settings import load_settings
from streams.decoding import decode_persona


@click.command()
@click.argument("user")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: user_id, version, rule, explanation.")
def why(user: str, as_json: bool) -> None:
    """Explain why a viewer's latest persona was written.

    Shows the rule, its value against the threshold, the watches since the last request, the divergence beside
    what chance explains, and the interests that rose and fell.

    \b
    personas why ann
    personas why ann --json | jq .explanation.value
    """
    settings = load_settings()
    with one_line_errors(settings):
        rows = asyncio.run(read_personas(settings, user, history=False))
        if not rows:
            click.echo(f"no persona is stored for {user!a}", err=True)
            sys.exit(1)
        persona = decode_persona(rows[0].body)
    if as_json:
        shown = {
            "user_id": persona.user_id,
            "version": persona.version,
            "rule": persona.rule,
            "explanation": persona.explanation,
        }
        click.echo(orjson.dumps(shown))
    elif persona.explanation is None:
        click.echo(f"version {persona.version} was written by rule {persona.rule}; no measurement is stored with it")
    else:
        Console().print(why_card(persona.user_id, persona.version, persona.explanation))
