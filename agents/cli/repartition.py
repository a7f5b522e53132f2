"""`personas repartition`: more partitions for the per-user topics, keeping what was counted."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click
import orjson

from agents.kafka_admin import KafkaRefused, KafkaUnavailable, wait_for_kafka
from agents.repartition import Outcome, RepartitionRefused
from agents.repartition import repartition as change
from agents.settings import load_settings

CONNECT_SECONDS = 10.0


@click.command()
@click.option(
    "--partitions", type=click.IntRange(min=1), required=True, help="How many each per-user topic shall have."
)
@click.option("--dry-run", is_flag=True, help="Check and count, change nothing.")
@click.option("--overwrite", is_flag=True, help="Counts were raised by hand before: the states of before win.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end.")
def repartition(partitions: int, dry_run: bool, overwrite: bool, yes: bool, as_json: bool) -> None:
    """Give every per-user topic more partitions, and move states and personas to where their keys belong then.

    Stop the producers, let the workers read everything, stop the workers; the command refuses otherwise. If it is
    interrupted, workers do not start until the same command has run to its end. Then set PERSONAS_PARTITIONS for all
    workers and start everything again. docs/operations.md has the whole procedure.

    \b
    personas repartition --partitions 16 --dry-run
    personas repartition --partitions 16

    Exit status 1 if it was refused or could not finish.
    """
    settings = load_settings()
    try:
        wait_for_kafka(settings, CONNECT_SECONDS)
        if not dry_run and not yes:
            planned = change(settings, partitions, _say, dry_run=True, overwrite=overwrite)
            _print(planned, dry_run=True)
            click.confirm("Go on?", abort=True, err=True)
        outcome = change(settings, partitions, _say, dry_run=dry_run, overwrite=overwrite)
    except (RepartitionRefused, KafkaRefused, KafkaUnavailable) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    if as_json:
        click.echo(orjson.dumps({"dry_run": dry_run, **asdict(outcome)}, option=orjson.OPT_INDENT_2))
    else:
        _print(outcome, dry_run=dry_run)


def _say(message: str) -> None:
    click.echo(message, err=True)


def _print(outcome: Outcome, *, dry_run: bool) -> None:
    found = ", ".join(str(count) for count in sorted(set(outcome.before.values())))
    earlier = "; an earlier run had begun" if outcome.resumed else ""
    click.echo(f"per-user topics have {found} partitions, will have {outcome.partitions}{earlier}", err=dry_run)
    if dry_run:
        click.echo(f"{outcome.misplaced} of {outcome.viewers} states would move, and personas with them", err=True)
        return
    click.echo(f"moved {outcome.states} of {outcome.viewers} states and {outcome.personas} personas")
    if outcome.events:
        click.echo(f"placed {outcome.events} records anew that arrived meanwhile")
    click.echo(f"set PERSONAS_PARTITIONS={outcome.partitions} for every worker, then start them")
