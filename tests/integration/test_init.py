"""`personas init` on real Kafka and Cassandra: creates, verifies, refuses, and says clearly what is absent."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from uuid import uuid4

import orjson
import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exports without saying so
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourceType,
)

from agents.kafka_admin import (
    KafkaRefused,
    KafkaUnavailable,
    confluent_options,
    create_topics,
    prefixed,
    topic_config,
    topic_ids,
    verify_topics,
    wait_for_kafka,
)
from agents.settings import Settings
from agents.stores.migrate import (
    MigrationError,
    apply_migrations,
    packaged_migrations,
    parse_migration,
    schema_session,
    schema_state,
)
from agents.stores.ports import StoreUnavailable
from streams.topics import PERSONAS, TOPICS, WATCH_EVENTS, Topic
from tests.command_line import run
from tests.conftest import Stack

pytestmark = pytest.mark.stack


@pytest.fixture
def settings(kafka: Stack, cassandra: Stack) -> Settings:
    """Topics and a keyspace of one test alone."""
    name = uuid4().hex[:12]
    return replace(kafka.settings, topic_prefix=f"init-{name}.", cassandra_keyspace=f"init_{name}", partitions=3)


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as held:  # bound but not listening, so nothing else takes it
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_check_then_create_then_verify(settings: Settings) -> None:
    before = run(settings, "init", "--check")
    assert before.exit_code == 1
    assert f"{settings.topic_prefix}watch-events is absent; run `personas init`" in before.output
    assert "0001_personas is not applied" in before.output
    still = orjson.loads(run(settings, "init", "--check", "--json").stdout)
    assert len(still["mismatches"]) == len(TOPICS), "a check created topics"
    assert not still["schema"]["keyspace_exists"], "a check created the keyspace"

    made = orjson.loads(run(settings, "init", "--json").stdout)
    assert made["ok"]
    assert sorted(made["topics_created"]) == sorted(prefixed(settings, topic.name) for topic in TOPICS)
    assert made["migrations_applied"] == [migration.name for migration in packaged_migrations()]

    again = run(settings, "init")
    assert again.exit_code == 0
    assert "created" not in again.output
    assert "verified 0001_personas" in again.output
    assert again.output.endswith("ready\n")
    assert run(settings, "init", "--check").exit_code == 0


def test_topics_are_made_as_specified(settings: Settings) -> None:
    create_topics(settings)
    admin = AdminClient(confluent_options(settings))
    for topic in TOPICS:
        name = prefixed(settings, topic.name)
        partitions = admin.list_topics(name, timeout=10).topics[name].partitions
        assert len(partitions) == (3 if topic.per_user else 1)
        resource = ConfigResource(ResourceType.TOPIC, name)
        found = admin.describe_configs([resource])[resource].result()
        wanted = topic_config(settings, topic)
        assert {key: found[key].value for key in wanted} == wanted


def test_two_at_once_are_harmless(settings: Settings) -> None:
    def initialise(_: int) -> list[str]:
        create_topics(settings)
        with schema_session(settings, 30) as session:
            return apply_migrations(session, settings, packaged_migrations())

    with ThreadPoolExecutor(3) as pool:
        applied = list(pool.map(initialise, range(3)))
    names = [migration.name for migration in packaged_migrations()]
    assert sorted(applied, key=len) == [[], [], names], "each migration is applied by one of them"
    assert verify_topics(settings) == []


def test_a_topic_of_another_shape_is_shown_with_its_remedy_and_left_alone(settings: Settings) -> None:
    admin = AdminClient(confluent_options(settings))
    mine, compacted = prefixed(settings, WATCH_EVENTS), prefixed(settings, PERSONAS)
    config = {"message.timestamp.type": "CreateTime", "retention.ms": "3600000"}
    for future in admin.create_topics(
        [
            NewTopic(mine, num_partitions=5, replication_factor=1, config=config),
            NewTopic(compacted, num_partitions=3, replication_factor=1),
        ]
    ).values():
        future.result()
    result = run(settings, "init", "--json")
    assert result.exit_code == 1
    document = orjson.loads(result.stdout)
    found = {(m["topic"], m["what"]): m for m in document["mismatches"]}
    assert set(found) == {
        (mine, "partition count"),
        (mine, "message.timestamp.type"),
        (mine, "retention.ms"),
        (compacted, "cleanup.policy"),
        (compacted, "message.timestamp.type"),
        (compacted, "delete.retention.ms"),
    }
    count = found[mine, "partition count"]
    assert (count["expected"], count["found"]) == ("3", "5")
    assert "PERSONAS_PARTITIONS=5" in count["remedy"]
    stamp = found[mine, "message.timestamp.type"]
    assert f"--entity-name {mine} --add-config message.timestamp.type=LogAppendTime" in stamp["remedy"]

    entry = ConfigEntry("message.timestamp.type", "LogAppendTime", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, mine, incremental_configs=[entry])
    admin.incremental_alter_configs([resource])[resource].result()
    left = {(m.topic, m.what) for m in verify_topics(settings)}
    assert set(found) - left == {(mine, "message.timestamp.type")}


def test_longer_retention_and_more_partitions_of_a_shared_topic_are_fine(settings: Settings) -> None:
    shared = Topic("shared", per_user=False, retention_ms=1_000)
    admin = AdminClient(confluent_options(settings))
    config = {**topic_config(settings, shared), "retention.ms": "-1", "max.message.bytes": "9000000"}
    new = NewTopic(prefixed(settings, "shared"), num_partitions=2, replication_factor=1, config=config)
    admin.create_topics([new])[prefixed(settings, "shared")].result()
    assert verify_topics(settings, [shared]) == []


def test_too_few_brokers_for_the_replicas_is_said(settings: Settings) -> None:
    result = run(replace(settings, replication_factor=3), "init")
    assert result.exit_code == 1
    assert "eplication" in result.stderr


def test_a_recreated_topic_has_another_id(settings: Settings) -> None:
    topic = Topic("short-lived", per_user=False)
    create_topics(settings, [topic])
    first = topic_ids(settings, ["short-lived"])
    assert topic_ids(settings, ["short-lived"]) == first
    assert len(first["short-lived"]) == 22
    name = prefixed(settings, "short-lived")
    admin = AdminClient(confluent_options(settings))  # its futures fail once it is gone
    admin.delete_topics([name])[name].result()
    deadline = time.monotonic() + 30
    while True:  # a deletion takes a moment to be known
        try:
            topic_ids(settings, ["short-lived"])
        except KafkaRefused:
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    create_topics(settings, [topic])
    assert topic_ids(settings, ["short-lived"]) != first


def test_the_id_of_an_absent_topic_is_refused(settings: Settings) -> None:
    with pytest.raises(KafkaRefused, match="personas init"):
        topic_ids(settings, [WATCH_EVENTS])


def test_a_changed_migration_is_refused(settings: Settings) -> None:
    first = parse_migration("0001_a.cql", b"CREATE TABLE IF NOT EXISTS a (b int PRIMARY KEY);")
    changed = parse_migration("0001_a.cql", b"CREATE TABLE IF NOT EXISTS a (b text PRIMARY KEY);")
    second = parse_migration("0002_b.cql", b"CREATE TABLE IF NOT EXISTS c (d int PRIMARY KEY);")
    with schema_session(settings, 30) as session:
        assert apply_migrations(session, settings, [first]) == ["0001_a"]
        with pytest.raises(MigrationError, match=r"0001_a was changed.*restore the file"):
            apply_migrations(session, settings, [changed, second])
        state = schema_state(session, settings, [changed, second])
        assert state.pending == ("0002_b",), "nothing is applied after a refusal"
        assert len(state.problems) == 1
        assert apply_migrations(session, settings, [first, second]) == ["0002_b"]


def test_a_schema_of_a_newer_version_is_refused(settings: Settings) -> None:
    first = parse_migration("0001_a.cql", b"CREATE TABLE IF NOT EXISTS a (b int PRIMARY KEY);")
    second = parse_migration("0002_b.cql", b"CREATE TABLE IF NOT EXISTS c (d int PRIMARY KEY);")
    with schema_session(settings, 30) as session:
        apply_migrations(session, settings, [first, second])
        with pytest.raises(MigrationError, match="0002_b of a newer version"):
            apply_migrations(session, settings, [first])


def test_a_failed_migration_is_not_recorded_and_frees_the_lock(settings: Settings) -> None:
    broken = parse_migration("0001_a.cql", b"CREATE TABLE IF NOT EXISTS a (b nonsense PRIMARY KEY);")
    mended = parse_migration("0001_a.cql", b"CREATE TABLE IF NOT EXISTS a (b int PRIMARY KEY);")
    with schema_session(settings, 30) as session:
        with pytest.raises(Exception, match="nonsense"):
            apply_migrations(session, settings, [broken])
        assert apply_migrations(session, settings, [mended], wait_seconds=1) == ["0001_a"]


def test_a_held_lock_is_waited_for_and_then_named(settings: Settings) -> None:
    with schema_session(settings, 30) as session:
        apply_migrations(session, settings, [])
        session.execute("INSERT INTO schema_lock (name, owner) VALUES ('migrations', uuid())")
        with pytest.raises(MigrationError, match="another `personas init`"):
            apply_migrations(session, settings, packaged_migrations(), wait_seconds=1)
        session.execute("DELETE FROM schema_lock WHERE name = 'migrations'")
        assert apply_migrations(session, settings, packaged_migrations(), wait_seconds=1)


def test_absent_kafka_is_named_within_the_time(settings: Settings, closed_port: int) -> None:
    started = time.monotonic()
    result = run(replace(settings, kafka_bootstrap=f"127.0.0.1:{closed_port}"), "init", "--wait", "2")
    assert time.monotonic() - started < 8
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert f"127.0.0.1:{closed_port}" in last
    assert "Connection refused" in last
    assert "PERSONAS_KAFKA_BOOTSTRAP" in last


def test_absent_cassandra_is_named_within_the_time(settings: Settings, closed_port: int) -> None:
    started = time.monotonic()
    result = run(replace(settings, cassandra_port=closed_port), "init", "--wait", "2")
    assert time.monotonic() - started < 10
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert f"127.0.0.1 port {closed_port}" in last
    assert "PERSONAS_CASSANDRA_HOSTS" in last


def test_waiting_reports_and_stops_at_the_deadline(settings: Settings, closed_port: int) -> None:
    said: list[str] = []
    away = replace(settings, kafka_bootstrap=f"127.0.0.1:{closed_port}", cassandra_port=closed_port)
    with pytest.raises(KafkaUnavailable):
        wait_for_kafka(away, 4, said.append)
    assert any(str(closed_port) in line for line in said)
    said.clear()
    with pytest.raises(StoreUnavailable), schema_session(away, 4, said.append):
        pytest.fail("connected to nothing")
    assert any(str(closed_port) in line for line in said)


def test_unusable_numbers_are_refused(settings: Settings) -> None:
    from agents.cli.init import initialise
    from agents.settings import SettingsError

    for wrong in (replace(settings, partitions=0), replace(settings, replication_factor=0)):
        with pytest.raises(SettingsError, match="at least 1"):
            initialise(wrong)
