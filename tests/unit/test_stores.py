"""Stores without a server: classes of errors, settings they refuse, and migration files."""

from __future__ import annotations

import re

import pytest
from cassandra import (
    AuthenticationFailed,
    ConsistencyLevel,
    InvalidRequest,
    OperationTimedOut,
    ReadTimeout,
    Unauthorized,
    Unavailable,
    WriteTimeout,
)
from cassandra.cluster import NoHostAvailable
from cassandra.connection import ConnectionShutdown

from agents.settings import Settings, SettingsError
from agents.stores import connection
from agents.stores.connection import open_cluster, store_error
from agents.stores.migrate import packaged_migrations, parse_migration
from agents.stores.ports import StoreRejected, StoreUnavailable

SETTINGS = Settings(
    cassandra_hosts="store.example",
    cassandra_port=9999,
    cassandra_username="u",
    cassandra_password="hunter2",  # noqa: S106
)
LOG_IN = AuthenticationFailed("Provided username u and/or password are incorrect")


@pytest.mark.parametrize(
    "error",
    [
        OperationTimedOut(),
        Unavailable("too few replicas", consistency=ConsistencyLevel.LOCAL_QUORUM),
        ReadTimeout("slow"),
        WriteTimeout("slow", write_type=0),
        ConnectionShutdown("gone"),
        NoHostAvailable("none", {"store.example": OSError("refused")}),
        NoHostAvailable("none", ["store.example"]),
        OSError("anything else"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_may_work_later_is_unavailable_and_names_the_address(error: Exception) -> None:
    found = store_error(error, SETTINGS)
    assert isinstance(found, StoreUnavailable)
    assert "store.example port 9999" in str(found)


def test_an_invalid_request_is_rejected() -> None:
    found = store_error(InvalidRequest("Key length of 70000 is longer than maximum of 65535"), SETTINGS)
    assert isinstance(found, StoreRejected)


@pytest.mark.parametrize(
    "message",
    [
        "unconfigured table personas_by_user",
        'message="table wording_cache does not exist"',
        'message="keyspace personas does not exist"',
        "Keyspace 'personas' does not exist",
    ],
)
def test_a_missing_schema_is_not_the_rows_fault(message: str) -> None:
    found = store_error(InvalidRequest(message), SETTINGS)
    assert isinstance(found, StoreUnavailable)
    assert "personas init" in str(found)


def test_a_missing_right_is_not_the_rows_fault() -> None:
    assert isinstance(store_error(Unauthorized("no MODIFY permission"), SETTINGS), StoreUnavailable)


@pytest.mark.parametrize("error", [LOG_IN, NoHostAvailable("none", {"store.example": LOG_IN})])
def test_a_refused_log_in_names_the_settings_and_never_the_password(error: Exception) -> None:
    found = store_error(error, SETTINGS)
    assert isinstance(found, StoreUnavailable)
    assert "PERSONAS_CASSANDRA_PASSWORD" in str(found)
    assert "hunter2" not in str(found)


def test_a_python_without_libev_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LibevConnection", None)
    with pytest.raises(StoreRejected, match=r"libev.*CPython 3\.11 or 3\.12"):
        open_cluster(Settings())


def test_the_driver_uses_libev() -> None:
    cluster = open_cluster(Settings())
    try:
        assert cluster.connection_class.__name__ == "LibevConnection"
    finally:
        cluster.shutdown()


@pytest.mark.parametrize(
    ("settings", "variable"),
    [
        (Settings(cassandra_keyspace="a; DROP KEYSPACE b"), "PERSONAS_CASSANDRA_KEYSPACE"),
        (Settings(cassandra_keyspace="Upper"), "PERSONAS_CASSANDRA_KEYSPACE"),
        (Settings(cassandra_keyspace="k" * 49), "PERSONAS_CASSANDRA_KEYSPACE"),
        (Settings(cassandra_hosts=" , "), "PERSONAS_CASSANDRA_HOSTS"),
        (Settings(history_versions=0), "PERSONAS_HISTORY_VERSIONS"),
        (Settings(persona_ttl_days=-1), "PERSONAS_PERSONA_TTL_DAYS"),
        (Settings(persona_ttl_days=7301), "PERSONAS_PERSONA_TTL_DAYS"),
    ],
)
def test_unusable_settings_are_refused_by_name(settings: Settings, variable: str) -> None:
    with pytest.raises(SettingsError, match=variable):
        open_cluster(settings)


def test_a_host_without_an_address_is_unavailable() -> None:
    with pytest.raises(StoreUnavailable, match=r"nowhere\.invalid"):
        open_cluster(Settings(cassandra_hosts="nowhere.invalid"))


def test_packaged_migrations_are_numbered_without_gaps_and_repeatable() -> None:
    migrations = packaged_migrations()
    assert [migration.number for migration in migrations] == list(range(1, len(migrations) + 1))
    for migration in migrations:
        assert migration.statements
        for statement in migration.statements:
            assert re.match(r"(CREATE|ALTER|DROP) .*\bIF (NOT )?EXISTS\b", statement), statement


def test_a_migration_is_split_into_statements_without_comments() -> None:
    content = (
        b"-- a; comment\nCREATE TABLE IF NOT EXISTS a (\n  b int PRIMARY KEY\n);\n\n"
        b"  -- more\nDROP TABLE IF EXISTS c;\n"
    )
    migration = parse_migration("0012_some_name.cql", content)
    assert migration.number == 12
    assert migration.name == "0012_some_name"
    assert migration.statements == (
        "CREATE TABLE IF NOT EXISTS a ( b int PRIMARY KEY )",
        "DROP TABLE IF EXISTS c",
    )


def test_any_change_of_a_migration_changes_its_checksum() -> None:
    first = parse_migration("0001_a.cql", b"DROP TABLE IF EXISTS a;")
    assert first.checksum != parse_migration("0001_a.cql", b"DROP TABLE IF EXISTS  a;").checksum
