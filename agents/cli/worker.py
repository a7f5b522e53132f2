"""`personas worker`."""

from __future__ import annotations

import asyncio
import sys

import click

from agents.settings import SettingsError, load_settings


@click.command()
@click.option(
    "--role",
    type=click.Choice(["watch", "persona", "all"]),
    default="all",
    show_default=True,
    help="watch counts events and requests refreshes; persona words and stores them.",
)
@click.option("--web-port", type=int, help="Port of the page; 0 takes a free one, printed at start.")
@click.option("--no-page", is_flag=True, help="Serve no page and no health checks.")
@click.option("--log-json", is_flag=True, help="Log one JSON object a line.")
@click.option("--log-level", default="INFO", show_default=True, help="DEBUG, INFO, WARNING or ERROR.")
def worker(role: str, web_port: int | None, no_page: bool, log_json: bool, log_level: str) -> None:
    """Run the watch app, the persona app, or both, until SIGTERM.

    Waits for Kafka and Cassandra, and stops gracefully. Exits with 1 when an app fails: run it under a supervisor that
    restarts it. Start as many as there are partitions; they share the work.

    \b
    personas worker --role watch
    personas worker --role persona --web-port 8080
    """
    from agents.telemetry import TelemetryError, configure_logging, create_telemetry
    from agents.watch_app import WorkerError
    from agents.worker import Role, run_worker

    settings = load_settings(web_port=web_port)
    secrets = [settings.kafka_password, settings.cassandra_password, settings.teacher_api_key]
    configure_logging(json=log_json, level=log_level.upper(), secrets=[secret for secret in secrets if secret])
    try:
        telemetry = create_telemetry()
    except TelemetryError as error:
        raise click.UsageError(str(error)) from error
    try:
        status = asyncio.run(run_worker(settings, Role(role), telemetry, page=not no_page))
    except (WorkerError, SettingsError) as error:
        raise click.ClickException(str(error)) from error
    finally:
        telemetry.close()
    sys.exit(status)
