"""The `personas` command. One file per command; a command is imported only when it is called."""

from __future__ import annotations

import importlib
import sys

import click

from agents.settings import SettingsError

# Command name -> (module under agents.cli, one-line help). Kept here so that `personas --help` imports nothing else.
COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("stack", "Start the local Kafka, Cassandra and Triton."),
    "down": ("stack", "Stop the local stack."),
    "status": ("stack", "Show what of the local stack runs, and where."),
    "demo": ("demo", "Run the whole system on this machine with simulated viewers."),
    "init": ("init", "Create and verify topics and the Cassandra schema."),
    "worker": ("worker", "Run the watch app, the persona app, or both."),
    "produce": ("produce", "Send an event file to Kafka."),
    "import": ("import_", "Turn CSV, TSV, JSON lines or MovieLens files into events."),
    "replay": ("replay", "Run an event file through the same handlers, with no broker."),
    "get": ("get", "Print viewers' personas with their evidence."),
    "why": ("why", "Explain why a viewer's persona was refreshed."),
    "tail": ("tail", "Follow the persona topic."),
    "calibrate": ("calibrate", "Find the refresh thresholds on null streams or on your own log."),
    "eval": ("eval", "Measure how good personas are, on viewers whose taste is known."),
    "clusters": ("clusters", "Build and show interest clusters."),
    "dlq": ("dlq", "List, show, replay and purge dead letters."),
    "control": ("control", "Send a viewer's control: hide, pin, opt out, forget."),
    "erase": ("erase", "Erase a viewer everywhere and print the receipt."),
    "export": ("export", "Print everything stored about a viewer."),
    "doctor": ("doctor", "Check settings, connections, topics and key placement."),
    "repartition": ("repartition", "Give the per-user topics more partitions, keeping what was counted."),
    "cost": ("cost", "Compute what the wording of personas costs, tier by tier."),
    "config": ("config", "Show the settings in force, secrets redacted."),
}


class _LazyGroup(click.Group):
    """A group whose commands are imported on first use, so that `--help` answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"agents.cli.{COMMANDS[cmd_name][0]}")
        command = getattr(module, cmd_name.replace("import", "import_"))
        assert isinstance(command, click.Command)  # noqa: S101
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="viewer-personas", prog_name="personas")
def personas() -> None:
    """Viewer personas from a live stream of watch events.

    \b
    Try it:          personas up && personas init, then personas worker
    With no broker:  personas replay events.jsonl --out out/
    Settings come from PERSONAS_* variables and flags; `personas config` shows them.
    """


def main() -> None:
    """Entry point: runs a command, turns a known error into one line and exit status 2."""
    try:
        personas(standalone_mode=True)
    except SettingsError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
