"""`personas doctor` on real services: what it finds right, what wrong, and what it says to do."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewPartitions  # type: ignore[attr-defined]

from agents.cli.doctor import Check, Status, run_checks
from agents.cli.init import initialise
from agents.kafka_admin import confluent_options, prefixed
from agents.repartition import repartition
from agents.settings import Settings
from streams.identifiers import murmur2_partition
from streams.state import new_state, to_bytes
from streams.topics import INTERESTS_CHANGELOG, PERSONAS, TOPICS, WATCH_EVENTS
from tests.command_line import run
from tests.conftest import Stack

pytestmark = pytest.mark.stack

PARTITIONS = 3


@pytest.fixture(scope="module")
def closed_port() -> Iterator[int]:
    with socket.socket() as held:  # bound but not listening, so nothing else takes it
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture(scope="module")
def settings(kafka: Stack, cassandra: Stack, topic_prefix: str, keyspace: str, closed_port: int) -> Settings:
    """Made by `init`, with Triton absent."""
    made = replace(
        kafka.settings,
        topic_prefix=topic_prefix,
        cassandra_keyspace=keyspace,
        partitions=PARTITIONS,
        triton_url=f"127.0.0.1:{closed_port}",
    )
    assert initialise(made).ok
    return made


def checks(settings: Settings) -> dict[str, Check]:
    return {check.name: check for check in run_checks(settings)}


def event(user_id: str) -> bytes:
    return orjson.dumps({"user_id": user_id, "video_id": "v", "ts": 1_700_000_000_000})


def produce(settings: Settings, records: Sequence[tuple[bytes | None, bytes, int]]) -> None:
    producer = Producer(confluent_options(settings))
    for key, value, partition in records:
        producer.produce(prefixed(settings, WATCH_EVENTS), value, key, partition)
    assert producer.flush(20) == 0


def fresh(settings: Settings, name: str) -> Settings:
    """The same services with topics of one test alone."""
    made = replace(settings, topic_prefix=f"{settings.topic_prefix}{name}.")
    assert initialise(made).ok
    return made


def test_what_is_right_is_ok_and_what_is_absent_fails_with_its_address(settings: Settings, closed_port: int) -> None:
    found = checks(settings)
    for name in ("thresholds", "registry", "event decoding", "Kafka", "topics", "watch events", "Cassandra"):
        assert found[name].status is Status.OK, found[name]
    assert found["topics"].detail == f"{len(TOPICS)} as needed"
    assert found["Triton"].status is Status.FAIL
    assert f"127.0.0.1:{closed_port}" in found["Triton"].detail
    assert "PERSONAS_TRITON_URL" in found["Triton"].remedy


def test_the_command_fails_if_a_check_does(settings: Settings) -> None:
    as_json = run(settings, "doctor", "--json")
    assert as_json.exit_code == 1
    document = orjson.loads(as_json.stdout)
    assert not document["ok"]
    assert {check["status"] for check in document["checks"]} == {"ok", "fail"}
    text = run(settings, "doctor")
    assert text.exit_code == 1
    assert "fail Triton: " in text.output


def test_events_keyed_and_placed_as_kafka_does_are_ok(settings: Settings) -> None:
    mine = fresh(settings, "placed")
    users = [f"viewer-{number}" for number in range(40)]
    records = [(user.encode(), event(user), murmur2_partition(user.encode(), PARTITIONS)) for user in users]
    assert {partition for _, _, partition in records} == set(range(PARTITIONS))
    produce(mine, records)
    found = checks(mine)
    assert found["keys"].status is Status.OK
    assert found["keys"].detail.startswith("40 of the 40 ")


def test_events_of_another_partitioner_fail(settings: Settings) -> None:
    mine = fresh(settings, "misplaced")
    right = murmur2_partition(b"ann", PARTITIONS)
    produce(mine, [(b"ann", event("ann"), right), (b"ann", event("ann"), (right + 1) % PARTITIONS)])
    found = checks(mine)
    assert found["partitions"].status is Status.FAIL
    assert found["partitions"].detail.startswith("1 of the 2 ")
    assert "murmur2_random" in found["partitions"].remedy
    assert "keys" not in found


def test_events_with_another_key_fail_and_unusable_ones_warn(settings: Settings) -> None:
    mine = fresh(settings, "keys")
    produce(mine, [(b"session-1", event("ann"), 0), (None, event("ann"), 1), (b"ann", b"no json", 0)])
    found = checks(mine)
    assert found["keys"].status is Status.FAIL
    assert found["keys"].detail.startswith("2 of the 3 ")
    assert found["watch events"].status is Status.WARN
    assert "not_json 1" in found["watch events"].detail


def test_events_of_another_shape_are_read_by_the_field_mapping(settings: Settings, tmp_path: Path) -> None:
    mapping = tmp_path / "mapping.json"
    mapping.write_bytes(orjson.dumps({"user_id": "who", "video_id": "what", "ts": "when"}))
    mine = replace(fresh(settings, "mapped"), field_mapping=mapping)
    value = orjson.dumps({"who": "ann", "what": "v", "when": 1_700_000_000_000})
    produce(mine, [(b"ann", value, murmur2_partition(b"ann", PARTITIONS))])
    assert checks(mine)["keys"].status is Status.OK
    assert checks(replace(mine, field_mapping=Path()))["watch events"].status is Status.WARN


def test_only_the_latest_events_are_looked_at(settings: Settings) -> None:
    mine = fresh(settings, "latest")
    right = murmur2_partition(b"ann", PARTITIONS)
    produce(mine, [(b"ann", b"no json", right)] + [(b"ann", event("ann"), right)] * 100)
    found = checks(mine)
    assert "watch events" not in found
    assert found["keys"].detail.startswith("100 of the 100 ")


def test_absent_topics_and_schema_fail_with_the_command_that_makes_them(settings: Settings) -> None:
    found = list(run_checks(replace(settings, topic_prefix="never-made.", cassandra_keyspace="never_made")))
    absent = [check for check in found if check.name == "topic"]
    assert len(absent) == len(TOPICS)
    assert all(check.status is Status.FAIL and "personas init" in check.detail for check in absent)
    (cassandra,) = [check for check in found if check.name == "Cassandra"]
    assert (cassandra.status, cassandra.remedy) == (Status.FAIL, "run `personas init`")


def test_absent_services_fail_with_their_addresses(settings: Settings, closed_port: int) -> None:
    away = replace(settings, kafka_bootstrap=f"127.0.0.1:{closed_port}", cassandra_port=closed_port)
    found = checks(away)
    for name in ("Kafka", "Cassandra"):
        assert found[name].status is Status.FAIL
        assert str(closed_port) in found[name].detail


def test_broken_artefacts_fail_by_name(settings: Settings, tmp_path: Path) -> None:
    broken = tmp_path / "thresholds.json"
    broken.write_text("{}")
    found = checks(replace(settings, thresholds=broken, registry=tmp_path, event_decoder="no_such_module:decode"))
    for name in ("thresholds", "registry", "event decoding"):
        assert found[name].status is Status.FAIL, found[name]
        assert found[name].remedy


def test_triton_and_the_student_are_ok_when_ready(settings: Settings, triton: Stack) -> None:
    found = checks(replace(settings, triton_url=triton.triton_grpc))
    assert found["Triton"].status is Status.OK, found["Triton"]
    assert found["student"].status is Status.OK, found["student"]


def test_another_model_name_fails(settings: Settings, triton: Stack) -> None:
    found = checks(replace(settings, triton_url=triton.triton_grpc, student_model="nobody"))
    assert found["student"].status is Status.FAIL
    assert "PERSONAS_STUDENT_MODEL" in found["student"].remedy


def state_of(user: str, partition: int, offset: int = 5) -> tuple[bytes, bytes, int]:
    """A changelog record: the state of a viewer who was counted on this partition."""
    state = new_state()
    state["watch_partition"], state["watch_offset"] = partition, offset
    return user.encode(), to_bytes(state), partition


def store(settings: Settings, records: Sequence[tuple[bytes, bytes | None, int]]) -> None:
    producer = Producer(confluent_options(settings))
    for key, value, partition in records:
        producer.produce(prefixed(settings, INTERESTS_CHANGELOG), value, key, partition)
    assert producer.flush(20) == 0


def raise_counts(settings: Settings, count: int, names: Sequence[str]) -> None:
    admin = AdminClient(confluent_options(settings))
    for name in names:
        admin.create_partitions([NewPartitions(prefixed(settings, name), count)])[prefixed(settings, name)].result()


PER_USER = [topic.name for topic in TOPICS if topic.per_user]
VIEWERS = [f"viewer-{number}" for number in range(150)]


def test_states_where_their_keys_belong_are_ok(settings: Settings) -> None:
    mine = fresh(settings, "states")
    store(mine, [state_of(user, murmur2_partition(user.encode(), PARTITIONS)) for user in VIEWERS])
    found = checks(mine)
    assert found["partition counts"].status is Status.OK
    assert (found["states"].status, found["states"].detail.partition(" ")[0]) == (Status.OK, "150")


def test_counts_that_differ_name_the_command_that_goes_on(settings: Settings) -> None:
    mine = fresh(settings, "halfway")
    raise_counts(mine, 6, [INTERESTS_CHANGELOG, PERSONAS])
    found = checks(mine)["partition counts"]
    assert found.status is Status.FAIL
    assert f"{prefixed(mine, PERSONAS)} 6" in found.detail
    assert "personas repartition --partitions 6" in found.remedy


def test_another_count_than_the_setting_names_the_setting(settings: Settings) -> None:
    mine = fresh(settings, "setting")
    found = checks(replace(mine, partitions=5))["partition counts"]
    assert found.status is Status.FAIL
    assert found.remedy.startswith(f"set PERSONAS_PARTITIONS={PARTITIONS} ")


def test_counts_raised_without_moving_states_fail_until_they_are_moved(settings: Settings) -> None:
    mine = fresh(settings, "raised")
    store(mine, [state_of(user, murmur2_partition(user.encode(), PARTITIONS)) for user in VIEWERS])
    raise_counts(mine, 6, PER_USER)
    mine = replace(mine, partitions=6)
    found = checks(mine)
    assert found["partition counts"].status is Status.OK
    assert found["states"].status is Status.FAIL
    assert "personas repartition --partitions 6" in found["states"].remedy
    repartition(mine, 6, lambda _: None, overwrite=True)
    assert checks(mine)["states"].status is Status.OK


def test_markers_of_another_partition_fail(settings: Settings) -> None:
    mine = fresh(settings, "markers")
    place = murmur2_partition(b"ann", PARTITIONS)
    key, value, _ = state_of("ann", (place + 1) % PARTITIONS)
    store(mine, [(key, value, place)])
    found = checks(mine)["states"]
    assert found.status is Status.FAIL
    assert "offsets of another watch partition" in found.detail


def test_unreadable_states_fail(settings: Settings) -> None:
    mine = fresh(settings, "unreadable")
    store(mine, [(b"ann", b"no state", 0)])
    assert "partition 0: state of layout" in checks(mine)["states"].detail
