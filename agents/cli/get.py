"""`personas get`: viewers' personas as cards or JSON."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click
from rich.console import Console

from agents.cards import LabelOf, TitleOf, history_table, persona_card
from agents.cli.failures import one_line_errors
from agents.settings import Settings, load_settings
from agents.stores.cassandra import CassandraStore
from agents.stores.ports import StoredPersona
from streams.decoding import decode_persona


@click.command()
@click.argument("users", metavar="USER...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="One persona a line, as published; with --history every version.")
@click.option("--history", is_flag=True, help="Also the stored versions before the latest.")
def get(users: tuple[str, ...], as_json: bool, history: bool) -> None:
    """Print viewers' personas with their evidence, from Cassandra.

    \b
    personas get ann
    personas get ann bob --history
    personas get ann --json | jq .summary

    Exit status 1 if none of the viewers has a persona.
    """
    settings = load_settings()
    with one_line_errors(settings):
        found = asyncio.run(_read(settings, users, history=history))
        for user in users:
            if not found[user]:
                click.echo(f"no persona is stored for {user!a}", err=True)
        if as_json:
            for rows in found.values():
                for row in rows:
                    click.echo(row.body)
        else:
            _print_cards(settings, [rows for rows in found.values() if rows])
    if not any(found.values()):
        sys.exit(1)


async def read_personas(settings: Settings, user_id: str, *, history: bool) -> list[StoredPersona]:
    """A viewer's latest persona, with `history` the versions before it too, newest first. Raises StoreError."""
    return (await _read(settings, (user_id,), history=history))[user_id]


async def _read(settings: Settings, users: tuple[str, ...], *, history: bool) -> dict[str, list[StoredPersona]]:
    store = await CassandraStore.connect(settings)
    try:
        found: dict[str, list[StoredPersona]] = {}
        for user in users:
            latest = await store.latest(user)
            older = await store.history(user, settings.history_versions) if latest and history else []
            found[user] = [latest, *(row for row in older if row.version < latest.version)] if latest else []
        return found
    finally:
        await store.close()


def _print_cards(settings: Settings, viewers: list[list[StoredPersona]]) -> None:
    if not viewers:
        return
    console = Console()
    title_of, label_of = _names(settings)
    for rows in viewers:
        personas = [decode_persona(row.body) for row in rows]
        console.print(persona_card(personas[0], title_of, label_of))
        if len(personas) > 1:
            console.print(history_table(personas))
        console.print()


def _names(settings: Settings) -> tuple[TitleOf, LabelOf]:
    """Titles and labels from the registry; a card is readable without them, so their absence is only said."""
    from agents.clusters.files import load_registry, packaged_registry
    from agents.clusters.snapshot import RegistryError

    try:
        registry = packaged_registry() if settings.registry == Path() else load_registry(settings.registry)
    except RegistryError as error:
        click.echo(f"titles are not shown: {error}", err=True)
        return (lambda _: None), (lambda _: None)

    def label_of(cluster: int) -> str | None:
        card = registry.cards.get(cluster)
        return card.label if card else None

    return registry.title_of, label_of
