"""`personas demo`."""

from __future__ import annotations

import signal
import sys

import click

from agents.settings import load_settings


@click.command()
@click.option(
    "--seconds",
    type=click.FloatRange(min=45),
    help="End after this long, counted from when the stack is ready, with one JSON object of figures as the last line.",
)
@click.option("--web-port", type=int, help="Port of the live page; any free one by default.")
def demo(seconds: float | None, web_port: int | None) -> None:
    """Run the whole system on this machine: Kafka, Cassandra, Triton, workers, and viewers with known tastes.

    Personas are shown as they land, here and on a page whose address is printed. Maya's taste shifts and Noah's does
    not; later a worker is killed, and at the end the counts are compared with an independent recount of the log.
    Ctrl-C stops every process it started.

    With --seconds the exit status is 0 only if at least 10 personas landed, 80% of them the student's, the same bytes
    in Cassandra and on the persona topic, and every event was counted exactly once.
    """
    from rich.console import Console

    from agents.cli.stack import interrupt
    from agents.demo.run import Demo, DemoError
    from agents.localstack.assets import AssetError
    from agents.localstack.parts import StackError
    from agents.localstack.ports import PortError

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        status = Demo(load_settings(web_port=web_port), seconds, Console(highlight=False)).run()
    except (DemoError, AssetError, StackError, PortError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
