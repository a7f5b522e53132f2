"""The Cassandra schema: numbered CQL files, applied once each, in order, and never changed afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from typing import Any, Final
from uuid import uuid4

from agents.settings import Settings
from agents.stores.connection import address, open_cluster, open_session, store_error
from agents.stores.ports import StoreUnavailable

LOCK_SECONDS: Final = 120
"""A lock left behind by a killed process frees itself after this time."""
RETRY_SECONDS: Final = 1.0

_BOOKKEEPING: Final = (
    "CREATE TABLE IF NOT EXISTS schema_migrations "
    "(number int PRIMARY KEY, name text, checksum text, applied_at timestamp)",
    "CREATE TABLE IF NOT EXISTS schema_lock (name text PRIMARY KEY, owner uuid)",
)


class MigrationError(Exception):
    """The schema cannot be brought up to date; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One CQL file: `number` from its name, SHA-256 of its bytes, statements without comments."""

    number: int
    name: str
    checksum: str
    statements: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SchemaState:
    """What a keyspace holds against what this version needs; `problems` are single lines with the remedy."""

    keyspace_exists: bool
    applied: tuple[str, ...]
    pending: tuple[str, ...]
    problems: tuple[str, ...]


def packaged_migrations() -> list[Migration]:
    """This version's migrations, by number."""
    folder = files("agents.stores") / "migrations"
    found = [(entry.name, entry.read_bytes()) for entry in folder.iterdir() if entry.name.endswith(".cql")]
    return [parse_migration(name, content) for name, content in sorted(found)]


def parse_migration(file_name: str, content: bytes) -> Migration:
    """A migration from a file named like `0001_personas.cql`.

    Comments are whole lines starting with `--`; statements end with a semicolon and hold none inside.
    """
    lines = [line for line in content.decode().splitlines() if not line.lstrip().startswith("--")]
    statements = [" ".join(part.split()) for part in "\n".join(lines).split(";")]
    name = file_name.removesuffix(".cql")
    return Migration(
        number=int(name.split("_", 1)[0]),
        name=name,
        checksum=sha256(content).hexdigest(),
        statements=tuple(statement for statement in statements if statement),
    )


@contextmanager
def schema_session(
    settings: Settings, wait_seconds: float, waiting: Callable[[str], None] = lambda _: None
) -> Iterator[Any]:
    """A session outside any keyspace; tries to connect for `wait_seconds`, telling `waiting` why it waits.

    Raises StoreUnavailable with the address and the last cause when the time is over. Blocking.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        cluster = open_cluster(settings)
        try:
            session = open_session(cluster, settings)
            break
        except StoreUnavailable as error:
            if time.monotonic() + RETRY_SECONDS >= deadline:
                raise StoreUnavailable(
                    f"{error}; waited {wait_seconds:.0f} s. Start Cassandra (`personas up` starts a local "
                    "one) or set PERSONAS_CASSANDRA_HOSTS and PERSONAS_CASSANDRA_PORT"
                ) from error
            waiting(str(error))
        time.sleep(RETRY_SECONDS)
    try:
        yield session
    finally:
        cluster.shutdown()


def schema_state(session: Any, settings: Settings, migrations: Sequence[Migration]) -> SchemaState:  # noqa: ANN401
    """What of `migrations` is applied. Changes nothing. Raises StoreError."""
    keyspace = settings.cassandra_keyspace
    names = tuple(migration.name for migration in migrations)
    if not _execute(
        session,
        settings,
        "SELECT keyspace_name FROM system_schema.keyspaces WHERE keyspace_name = %s",
        keyspace,
    ):
        return SchemaState(keyspace_exists=False, applied=(), pending=names, problems=())
    _execute(session, settings, f"USE {keyspace}")
    bookkeeping = _execute(
        session,
        settings,
        "SELECT table_name FROM system_schema.tables WHERE keyspace_name = %s AND table_name = %s",
        keyspace,
        "schema_migrations",
    )
    recorded = _recorded(session, settings) if bookkeeping else {}
    return SchemaState(
        keyspace_exists=True,
        applied=tuple(m.name for m in migrations if m.number in recorded),
        pending=tuple(m.name for m in migrations if m.number not in recorded),
        problems=tuple(_problems(recorded, migrations, keyspace)),
    )


def apply_migrations(
    session: Any,  # noqa: ANN401
    settings: Settings,
    migrations: Sequence[Migration],
    wait_seconds: float = LOCK_SECONDS + 10,
) -> list[str]:
    """Create the keyspace and apply what is missing, in order; returns the names of what was applied.

    Statements are `IF NOT EXISTS` and one process at a time applies them, so a second or interrupted run is
    harmless. Raises MigrationError for a migration that was changed after it was applied, for a schema of a
    newer version, and when another process holds the lock for longer than `wait_seconds`; StoreError.
    """
    # CQL takes no bind markers here; the keyspace's name was checked on opening, the number is an integer.
    _execute(
        session,
        settings,
        f"CREATE KEYSPACE IF NOT EXISTS {settings.cassandra_keyspace} WITH replication = "
        f"{{'class': 'NetworkTopologyStrategy', 'replication_factor': {int(settings.replication_factor)}}}",
    )
    _execute(session, settings, f"USE {settings.cassandra_keyspace}")
    for statement in _BOOKKEEPING:
        _execute(session, settings, statement)
    with _lock(session, settings, wait_seconds):
        recorded = _recorded(session, settings)
        problems = list(_problems(recorded, migrations, settings.cassandra_keyspace))
        if problems:
            raise MigrationError("; ".join(problems))
        pending = [migration for migration in migrations if migration.number not in recorded]
        for migration in pending:
            for statement in migration.statements:
                _execute(session, settings, statement)
            _execute(
                session,
                settings,
                "INSERT INTO schema_migrations (number, name, checksum, applied_at) "
                "VALUES (%s, %s, %s, toTimestamp(now()))",
                migration.number,
                migration.name,
                migration.checksum,
            )
    return [migration.name for migration in pending]


@contextmanager
def _lock(session: Any, settings: Settings, wait_seconds: float) -> Iterator[None]:  # noqa: ANN401
    owner = uuid4()
    deadline = time.monotonic() + wait_seconds
    acquire = "INSERT INTO schema_lock (name, owner) VALUES ('migrations', %s) IF NOT EXISTS USING TTL %s"
    while not _execute(session, settings, acquire, owner, LOCK_SECONDS)[0][0]:
        if time.monotonic() >= deadline:
            raise MigrationError(
                f"another `personas init` has held the schema lock of keyspace "
                f"{settings.cassandra_keyspace} for {wait_seconds:.0f} s; let it finish, or "
                f"try again when its lock expires ({LOCK_SECONDS} s)"
            )
        time.sleep(RETRY_SECONDS / 2)
    try:
        yield
    finally:
        _execute(session, settings, "DELETE FROM schema_lock WHERE name = 'migrations' IF owner = %s", owner)


def _recorded(session: Any, settings: Settings) -> dict[int, tuple[str, str]]:  # noqa: ANN401
    """Name and checksum of each applied migration, by number."""
    rows = _execute(session, settings, "SELECT number, name, checksum FROM schema_migrations")
    return {number: (name, checksum) for number, name, checksum in rows}


def _problems(recorded: dict[int, tuple[str, str]], migrations: Sequence[Migration], keyspace: str) -> Iterator[str]:
    known = {migration.number: migration for migration in migrations}
    for number, (name, checksum) in sorted(recorded.items()):
        if number not in known:
            yield (f"keyspace {keyspace} has migration {name} of a newer version; use that version of viewer-personas")
        elif known[number].checksum != checksum:
            yield (
                f"migration {name} was changed after it was applied to keyspace {keyspace} "
                f"(recorded {checksum[:12]}, file {known[number].checksum[:12]}); "
                "restore the file and add a new migration"
            )


def _execute(session: Any, settings: Settings, statement: str, *values: object) -> list[Any]:  # noqa: ANN401
    try:
        return list(session.execute(statement, values or None, timeout=30.0))
    except Exception as error:
        raise store_error(error, settings) from error


def where(settings: Settings) -> str:
    """The keyspace and where it is, as messages show them."""
    return f"keyspace {settings.cassandra_keyspace} at {address(settings)}"
