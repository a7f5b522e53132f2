"""The local stack on the real servers: what they are, that they keep data through a crash, and that nothing is left."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import pytest
from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile
from cassandra.policies import RoundRobinPolicy
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from agents.localstack import processes
from agents.localstack.parts import Triton
from agents.localstack.ports import Ports, free_ports
from tests.conftest import ASSETS, Stack

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps it
pytestmark = pytest.mark.stack

PERSONAS = Path(sys.executable).with_name("personas")


def _pid(stack: Stack, part: str) -> int | None:
    return next(s.pid for s in stack.local.status() if s.part == part)


@contextlib.contextmanager
def _session(stack: Stack) -> Iterator[Any]:
    profiles = {EXEC_PROFILE_DEFAULT: ExecutionProfile(load_balancing_policy=RoundRobinPolicy())}
    cluster = Cluster(["127.0.0.1"], port=stack.cassandra_port, protocol_version=5, execution_profiles=profiles)
    try:
        yield cluster.connect()
    finally:
        cluster.shutdown()


def _end(consumer: Consumer, partition: TopicPartition) -> int:
    """End of the log. A broker that just came back answers before every partition has its leader."""
    limit = time.monotonic() + 30
    while True:
        try:
            return int(consumer.get_watermark_offsets(partition, timeout=20)[1])
        except KafkaException:
            if time.monotonic() > limit:
                raise
            time.sleep(0.5)


def _read(stack: Stack, topic: str) -> list[bytes | None]:
    consumer = Consumer({"bootstrap.servers": stack.kafka_bootstrap, "group.id": "unused", "enable.auto.commit": False})
    try:
        partition = TopicPartition(topic, 0, 0)
        end = _end(consumer, partition)
        consumer.assign([partition])
        return [message.value() for message in consumer.consume(end, timeout=20)]
    finally:
        consumer.close()


def test_up_again_changes_nothing(stack: Stack) -> None:
    before = [s.pid for s in stack.local.status()]
    began = time.monotonic()
    stack.local.up()
    assert time.monotonic() - began < 10
    assert [s.pid for s in stack.local.status()] == before
    assert all(s.state == "running" and s.memory_bytes > 100 * 2**20 for s in stack.local.status())


def test_kafka_creates_no_topic_by_itself(kafka: Stack, topic_prefix: str) -> None:
    errors: list[KafkaError | None] = []
    producer = Producer({"bootstrap.servers": kafka.kafka_bootstrap, "message.timeout.ms": 3000, "log_level": 0})
    producer.produce(f"{topic_prefix}mistyped", b"x", on_delivery=lambda error, _: errors.append(error))
    producer.flush(10)
    assert [error is None for error in errors] == [False]
    admin = AdminClient({"bootstrap.servers": kafka.kafka_bootstrap, "log_level": 0})
    assert f"{topic_prefix}mistyped" not in admin.list_topics(timeout=10).topics


def test_kafka_keeps_its_log_through_a_kill(kafka: Stack, topic_prefix: str) -> None:
    topic = f"{topic_prefix}kept"
    admin = AdminClient({"bootstrap.servers": kafka.kafka_bootstrap, "log_level": 0})
    admin.create_topics([NewTopic(topic, num_partitions=1, replication_factor=1)])[topic].result(20)
    producer = Producer({"bootstrap.servers": kafka.kafka_bootstrap, "log_level": 0})
    for number in range(100):
        producer.produce(topic, str(number).encode())
    assert producer.flush(20) == 0
    try:
        kafka.local.kill_part("kafka")
        with pytest.raises(KafkaException):
            admin.list_topics(timeout=2)
    finally:
        kafka.local.start_part("kafka")
    assert _read(kafka, topic) == [str(number).encode() for number in range(100)]


def test_cassandra_keeps_acknowledged_rows_through_a_kill(cassandra: Stack, keyspace: str) -> None:
    with _session(cassandra) as session:
        session.execute(
            f"CREATE KEYSPACE {keyspace} WITH replication = {{'class': 'SimpleStrategy', 'replication_factor': 1}}"
        )
        session.execute(f"CREATE TABLE {keyspace}.rows (id int PRIMARY KEY, body text)")
        insert = session.prepare(f"INSERT INTO {keyspace}.rows (id, body) VALUES (?, ?)")  # noqa: S608 - our own name
        for number in range(50):
            session.execute(insert, (number, str(number)))
    try:
        cassandra.local.kill_part("cassandra")
    finally:
        cassandra.local.start_part("cassandra")
    with _session(cassandra) as session:
        rows = session.execute(f"SELECT id, body FROM {keyspace}.rows")  # noqa: S608 - our own name
        assert sorted((row.id, row.body) for row in rows) == [(number, str(number)) for number in range(50)]


def test_triton_serves_the_student_and_a_kill_leaves_nothing(triton: Stack) -> None:
    with urllib.request.urlopen(f"http://{triton.triton_http}/v2/models/student") as answer:
        assert json.loads(answer.read())["platform"] == "python"
    part = triton.local._parts["triton"]
    assert isinstance(part, Triton)
    pattern = f"{part._shared_memory}*"
    assert list(SHARED_MEMORY.glob(pattern)) != []
    try:
        triton.local.kill_part("triton")
        assert processes.marked(f"triton:{triton.local.data_folder}") == []
        triton.local.down(["triton"])
        assert list(SHARED_MEMORY.glob(pattern)) == []
    finally:
        triton.local.start_part("triton")


def test_the_commands_start_show_and_stop_kafka_elsewhere(kafka: Stack, tmp_path: Path) -> None:
    """A second stack beside the first: other ports, other folder; the first does not notice."""
    folder = tmp_path / "a folder with spaces"
    folder.mkdir()
    (folder / "assets").symlink_to(ASSETS)
    ports = free_ports()
    flags = _port_flags(ports)
    first = _pid(kafka, "kafka")

    def run(*arguments: str) -> Any:
        command = [str(PERSONAS), *arguments, "--data-folder", str(folder), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    try:
        started = run("up", "--only", "kafka", *flags)
        assert started["environment"]["PERSONAS_KAFKA_BOOTSTRAP"] == f"127.0.0.1:{ports.kafka}"
        assert (
            AdminClient({"bootstrap.servers": f"127.0.0.1:{ports.kafka}", "log_level": 0})
            .list_topics(timeout=20)
            .brokers
        )
        shown = {part["part"]: part for part in run("status")["parts"]}
        assert (shown["kafka"]["state"], shown["triton"]["state"]) == ("running", "stopped")
        assert shown["kafka"]["address"] == f"127.0.0.1:{ports.kafka}"
    finally:
        stopped = run("down")
    assert stopped["killed"] == []
    assert {part["state"] for part in stopped["parts"]} == {"stopped"}
    assert processes.marked(f"kafka:{folder}") == []
    assert _pid(kafka, "kafka") == first


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_up_leaves_no_server(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "assets").symlink_to(ASSETS)
    command = [str(PERSONAS), "up", "--only", "kafka,cassandra", "--data-folder", str(tmp_path)]
    starter = subprocess.Popen([*command, *_port_flags(free_ports())], stderr=subprocess.PIPE, start_new_session=True)
    limit = time.monotonic() + 60
    while not (tmp_path / "run" / "cassandra.pid").exists():
        assert time.monotonic() < limit
        assert starter.poll() is None
        time.sleep(0.05)
    starter.send_signal(number)
    starter.communicate(timeout=60)
    assert starter.returncode == 1
    for part in ("kafka", "cassandra"):
        assert processes.marked(f"{part}:{tmp_path}") == []
        assert not (tmp_path / "run" / f"{part}.pid").exists()


def _port_flags(ports: Ports) -> list[str]:
    names = [f"--{field.name.replace('_', '-')}-port" for field in fields(ports)]
    return [word for name, port in zip(names, astuple(ports), strict=True) for word in (name, str(port))]
