"""`personas init`: Kafka topics and the Cassandra schema."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

import click
import orjson

from agents.kafka_admin import (
    ABSENT,
    KafkaRefused,
    KafkaUnavailable,
    Mismatch,
    create_topics,
    prefixed,
    verify_topics,
    wait_for_kafka,
)
from agents.settings import Settings, SettingsError, load_settings
from agents.stores.migrate import (
    MigrationError,
    SchemaState,
    apply_migrations,
    packaged_migrations,
    schema_session,
    schema_state,
    where,
)
from agents.stores.ports import StoreError
from streams.topics import TOPICS


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `init` made and what it found; topic names are those in Kafka."""

    topics_created: tuple[str, ...]
    topics: tuple[str, ...]
    mismatches: tuple[Mismatch, ...]
    migrations_applied: tuple[str, ...]
    schema: SchemaState

    @property
    def ok(self) -> bool:
        """Whether topics and schema are as the workers need them."""
        complete = self.schema.keyspace_exists and not self.schema.pending and not self.schema.problems
        return complete and not self.mismatches


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit status 1 if anything is missing or differs.")
@click.option(
    "--wait",
    "wait_seconds",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for Kafka, and then for Cassandra.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def init(check: bool, wait_seconds: float, as_json: bool) -> None:
    """Create and verify topics and the Cassandra schema. Safe to run again, and at the same time elsewhere.

    Existing topics are never altered: each difference is shown with the command that mends it.

    \b
    personas init
    personas init --check --json | jq .mismatches
    PERSONAS_TOPIC_PREFIX=staging. PERSONAS_CASSANDRA_KEYSPACE=staging personas init

    Exit status 1 if a service does not answer, or something is missing or different.
    """
    settings = load_settings()
    try:
        outcome = initialise(settings, check=check, wait_seconds=wait_seconds)
    except (KafkaUnavailable, KafkaRefused, StoreError, MigrationError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    if as_json:
        click.echo(orjson.dumps(_document(settings, outcome), option=orjson.OPT_INDENT_2))
    else:
        _print(settings, outcome)
    if not outcome.ok:
        sys.exit(1)


def initialise(settings: Settings, *, check: bool = False, wait_seconds: float = 60.0) -> Outcome:
    """Do what `personas init` does; with `check` only look. Blocking.

    Raises KafkaUnavailable, KafkaRefused, StoreError, MigrationError, SettingsError.
    """
    _check_numbers(settings)
    wait_for_kafka(settings, wait_seconds, _waiting)
    migrations = packaged_migrations()
    with schema_session(settings, wait_seconds, _waiting) as session:
        created = [] if check else create_topics(settings)
        applied = [] if check else apply_migrations(session, settings, migrations)
        return Outcome(
            topics_created=tuple(created),
            topics=tuple(prefixed(settings, topic.name) for topic in TOPICS),
            mismatches=tuple(verify_topics(settings)),
            migrations_applied=tuple(applied),
            schema=schema_state(session, settings, migrations),
        )


def _check_numbers(settings: Settings) -> None:
    if settings.partitions < 1:
        raise SettingsError(f"PERSONAS_PARTITIONS={settings.partitions} must be at least 1")
    if settings.replication_factor < 1:
        raise SettingsError(f"PERSONAS_REPLICATION_FACTOR={settings.replication_factor} must be at least 1")


def _waiting(message: str) -> None:
    click.echo(f"waiting: {message}", err=True)


def _print(settings: Settings, outcome: Outcome) -> None:
    states = dict.fromkeys(outcome.topics, "verified") | dict.fromkeys(outcome.topics_created, "created")
    states |= {m.topic: "missing" if m.found == ABSENT else "differs" for m in outcome.mismatches}
    click.echo(f"Kafka at {settings.kafka_bootstrap}")
    for name, state in states.items():
        click.echo(f"  {state:<9}{name}")
    for mismatch in outcome.mismatches:
        click.echo(f"  ! {mismatch}")
    click.echo(f"Cassandra {where(settings)}")
    if not outcome.schema.keyspace_exists:
        click.echo("  ! the keyspace does not exist; run `personas init`")
    for name in outcome.schema.applied:
        click.echo(f"  {'applied' if name in outcome.migrations_applied else 'verified':<9}{name}")
    for name in outcome.schema.pending:
        click.echo(f"  ! {name} is not applied; run `personas init`")
    for problem in outcome.schema.problems:
        click.echo(f"  ! {problem}")
    click.echo("ready" if outcome.ok else "not ready: see the lines with !")


def _document(settings: Settings, outcome: Outcome) -> dict[str, object]:
    return {
        "ok": outcome.ok,
        "kafka": settings.kafka_bootstrap,
        "topics": outcome.topics,
        "topics_created": outcome.topics_created,
        "mismatches": [asdict(mismatch) for mismatch in outcome.mismatches],
        "cassandra": f"{settings.cassandra_hosts}:{settings.cassandra_port}",
        "keyspace": settings.cassandra_keyspace,
        "migrations_applied": outcome.migrations_applied,
        "schema": asdict(outcome.schema),
    }
