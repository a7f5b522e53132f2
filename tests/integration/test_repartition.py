"""`personas repartition` on real Kafka: nothing is lost, whatever it is interrupted by, and what it refuses."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import orjson
import pytest
from confluent_kafka import (
    Consumer,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, NewPartitions  # type: ignore[attr-defined]

from agents import repartition as module
from agents.kafka_admin import KafkaRefused, confluent_options, create_topics, prefixed, verify_topics
from agents.repartition import READ_BY, Outcome, RepartitionRefused, commit_offsets, repartition
from agents.settings import Settings
from agents.topic_reader import TopicReader
from streams import topics
from streams.identifiers import murmur2_partition
from streams.positions import Position, PositionKind, decode_position, encode_position
from streams.records import ControlKind, UserControl
from streams.state import BOOTSTRAPPED, State, from_bytes, new_state, to_bytes
from streams.topics import TOPICS
from tests.command_line import environment_of, run
from tests.conftest import TEST_MARK, Stack

pytestmark = pytest.mark.stack

OLD, NEW = 2, 5
USERS = [f"viewer-{number}" for number in range(200)]
ERASED = USERS[:10]
PER_USER = [topic.name for topic in TOPICS if topic.per_user]


@dataclass
class Deployment:
    """Topics of one test, filled as workers leave them: everything read and committed."""

    settings: Settings
    number: int = 0

    def __post_init__(self) -> None:
        self.admin = AdminClient(confluent_options(self.settings))

    def name(self, topic: str) -> str:
        return prefixed(self.settings, topic)

    def produce(self, records: list[tuple[str, int, bytes | None, bytes | None]]) -> None:
        producer = Producer(confluent_options(self.settings))
        for topic, partition, key, value in records:
            producer.produce(self.name(topic), value, key, partition)
        assert producer.flush(20) == 0

    def commit_all(self) -> None:
        with TopicReader(self.settings) as log:
            for group, names in READ_BY.items():
                ends = [
                    TopicPartition(self.name(name), partition, log.ends(self.name(name), partition)[1])
                    for name in names
                    for partition in log.partitions(self.name(name))
                ]
                commit_offsets(self.admin, self.name(group), ends)

    def newest(self, topic: str) -> dict[tuple[int, bytes], Message]:
        """The newest record of each key and partition, tombstones left out."""
        found: dict[tuple[int, bytes], Message] = {}
        with TopicReader(self.settings) as log:
            for message in log.read(self.name(topic)):
                key = message.key()
                assert isinstance(key, bytes)
                place = int(message.partition() or 0), key
                if message.value() is None:
                    found.pop(place, None)
                else:
                    found[place] = message
        return found

    def counts(self) -> dict[str, int]:
        with TopicReader(self.settings) as log:
            return {name: len(log.partitions(self.name(name))) for name in PER_USER}


def state_of(user: str, **fields: int) -> State:
    state = new_state()
    rng = np.random.default_rng(len(user) + sum(user.encode()))
    state["events"], state["sequence"], state["last_ts"] = 100 + int(rng.integers(100)), 7, 1_700_000_000_000
    state["short"] = rng.random(state["short"].shape)
    state["watch_partition"] = murmur2_partition(user.encode(), OLD)
    state["watch_topic"], state["control_topic"] = 1, 2
    state["watch_offset"], state["control_offset"] = int(rng.integers(1_000)), 50
    for name, value in fields.items():
        state[name] = value
    return state


def without_markers(value: bytes) -> bytes:
    state = from_bytes(value)
    for name in ("watch_partition", "watch_offset", "control_offset"):
        state[name] = 0
    return to_bytes(state)


@pytest.fixture
def deployment(kafka: Stack, topic_prefix: str) -> Deployment:
    Deployment.number += 1
    settings = replace(
        kafka.settings, topic_prefix=f"{topic_prefix}{Deployment.number}.", partitions=OLD, web_port=Deployment.number
    )
    create_topics(settings)
    made = Deployment(settings)
    records: list[tuple[str, int, bytes | None, bytes | None]] = []
    for user in USERS:
        key = user.encode()
        place = murmur2_partition(key, OLD)
        records.append((topics.WATCH_EVENTS, place, key, b"{}"))
        for name, old, new in (
            (topics.INTERESTS_CHANGELOG, to_bytes(state_of(user, events=1)), to_bytes(state_of(user))),
            (topics.PERSONAS, b"old", b"persona of " + key),
        ):
            records.append((name, place, key, old))
            records.append((name, place, key, None if user in ERASED else new))
    for place in range(OLD):
        registry = Position(PositionKind.REGISTRY, 0, registry_version=4, registry_lineage="ours")
        records.append((topics.WATCH_POSITIONS, place, None, encode_position(registry)))
    made.produce(records)
    made.commit_all()
    return made


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.2)


def change(deployment: Deployment, partitions: int = NEW, **options: bool) -> Outcome:
    return repartition(deployment.settings, partitions, lambda _: None, **options)


def assert_moved(deployment: Deployment) -> None:
    """Every viewer is on the new partition alone, with what was there before."""
    assert set(deployment.counts().values()) == {NEW}
    kept = [user for user in USERS if user not in ERASED]
    places = {(murmur2_partition(user.encode(), NEW), user.encode()) for user in kept}
    states, personas = deployment.newest(topics.INTERESTS_CHANGELOG), deployment.newest(topics.PERSONAS)
    assert set(states) == places
    assert set(personas) == places
    for (partition, key), message in states.items():
        value = message.value()
        assert isinstance(value, bytes)
        assert without_markers(value) == without_markers(to_bytes(state_of(key.decode())))
        state = from_bytes(value)
        moved = partition != murmur2_partition(key, OLD)
        assert int(state["watch_partition"]) == partition
        assert (int(state["watch_offset"]) < 0, int(state["control_offset"]) < 0) == (moved, moved)
    assert all(message.value() == b"persona of " + key for (_, key), message in personas.items())
    versions = []
    with TopicReader(deployment.settings) as log:
        for message in log.read(deployment.name(topics.WATCH_POSITIONS)):
            value = message.value()
            assert isinstance(value, bytes)
            item = decode_position(value)
            assert (item.kind, item.registry_version, item.registry_lineage) == (PositionKind.REGISTRY, 4, "ours")
            versions.append(int(message.partition() or 0))
    assert sorted(versions) == list(range(NEW)), "one record of the registry on each partition, nothing else"
    assert verify_topics(replace(deployment.settings, partitions=NEW)) == []


def test_states_and_personas_move_to_where_their_keys_belong(deployment: Deployment) -> None:
    result = run(deployment.settings, "repartition", "--partitions", str(NEW), "--yes", "--json")
    assert result.exit_code == 0, result.output
    document = orjson.loads(result.stdout)
    expected = sum(murmur2_partition(u.encode(), NEW) != murmur2_partition(u.encode(), OLD) for u in USERS[10:])
    assert expected > 50
    assert (document["states"], document["personas"], document["viewers"]) == (expected, expected, 190)
    assert not document["resumed"]
    assert_moved(deployment)
    again = change(deployment)
    assert (again.states, again.personas, again.misplaced) == (0, 0, 0)
    assert_moved(deployment)


def test_a_dry_run_changes_nothing(deployment: Deployment) -> None:
    result = run(deployment.settings, "repartition", "--partitions", str(NEW), "--dry-run")
    assert result.exit_code == 0
    assert "of 190 states would move" in result.stderr
    assert set(deployment.counts().values()) == {OLD}
    assert verify_topics(deployment.settings) == []


def test_a_tombstone_of_a_moved_persona_says_so(deployment: Deployment) -> None:
    change(deployment)
    with TopicReader(deployment.settings) as log:
        reasons = [m.headers() for m in log.read(deployment.name(topics.PERSONAS)) if m.value() is None]
    assert reasons.count([("reason", b"moved")]) == len(reasons) - len(ERASED)


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("step", [2, 5, 10, 12])
def test_a_run_that_ends_anywhere_goes_on_where_it_was(
    deployment: Deployment, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends after the n-th acknowledged write, count raised or deletion."""
    left = step

    def counted(original: object) -> object:
        def call(*arguments: object) -> object:
            nonlocal left
            left -= 1
            last = left == 0  # the call may make others
            result = original(*arguments)  # type: ignore[operator]
            if last:
                raise KilledError
            return result

        return call

    with monkeypatch.context() as patched:
        for owner, name in (
            (module._Sender, "finish"),
            (module._Repartition, "_raise_counts"),
            (module._Repartition, "_renew_positions"),
        ):
            patched.setattr(owner, name, counted(getattr(owner, name)))
        with pytest.raises(KilledError):
            change(deployment)
    counts = set(deployment.counts().values())
    if counts != {OLD} and counts != {NEW}:
        for partitions in (OLD, NEW):  # workers stay away
            assert verify_topics(replace(deployment.settings, partitions=partitions))
    change(deployment)
    assert_moved(deployment)


def test_killed_processes_leave_what_the_next_one_finishes(deployment: Deployment) -> None:
    environment = {k: v for k, v in environment_of(deployment.settings).items() if v is not None}
    command = [sys.executable, "-m", "agents", "repartition", "--partitions", str(NEW), "--yes"]
    rng = random.Random(5)
    for _ in range(3):
        process = subprocess.Popen(
            command,
            env={"PATH": "/usr/bin:/bin", TEST_MARK: os.environ[TEST_MARK], **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        for line in process.stderr:  # once it begins to change something
            if line.strip().endswith(f"{NEW} partitions"):
                break
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.wait()
        process.stderr.close()
    change(deployment)
    assert_moved(deployment)


def test_events_that_arrived_meanwhile_are_placed_anew(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    original = module._Repartition._fence_writers

    def late(work: module._Repartition) -> None:
        original(work)
        deployment.produce(
            [(topics.WATCH_EVENTS, murmur2_partition(u.encode(), OLD), u.encode(), b"late") for u in USERS]
        )

    monkeypatch.setattr(module._Repartition, "_fence_writers", late)
    assert change(deployment).events == len(USERS)
    with TopicReader(deployment.settings) as log:
        group = {**confluent_options(deployment.settings), "group.id": deployment.name(topics.WATCH_APP)}
        consumer = Consumer(group)
        name = deployment.name(topics.WATCH_EVENTS)
        starts = consumer.committed([TopicPartition(name, p) for p in range(NEW)], timeout=10)
        consumer.close()
        waiting = [
            m
            for tp in starts
            for m in log.read_range(name, tp.partition, max(0, tp.offset), log.ends(name, tp.partition)[1])
        ]
    assert sorted(str(m.key(), "utf-8") for m in waiting) == sorted(USERS)  # type: ignore[arg-type]
    assert all(murmur2_partition(m.key(), NEW) == m.partition() for m in waiting)  # type: ignore[arg-type]


# What is refused


@pytest.fixture
def member(deployment: Deployment) -> Iterator[None]:
    """A member of the watch group."""
    consumer = Consumer({**confluent_options(deployment.settings), "group.id": deployment.name(topics.WATCH_APP)})
    consumer.subscribe([deployment.name(topics.WATCH_EVENTS)])
    for _ in range(100):
        consumer.poll(0.1)
        if consumer.assignment():
            break
    yield
    consumer.close()


@pytest.mark.usefixtures("member")
def test_running_workers(deployment: Deployment) -> None:
    result = run(deployment.settings, "repartition", "--partitions", str(NEW), "--yes")
    assert result.exit_code == 1
    assert "has 1 members: stop every worker first" in result.stderr


@pytest.mark.parametrize("topic", [topics.USER_CONTROLS, topics.REFRESH_REQUESTS])
def test_records_that_wait(deployment: Deployment, topic: str) -> None:
    deployment.produce([(topic, 1, b"viewer-1", b"{}")])
    with pytest.raises(RepartitionRefused, match=f"1 records of .*{topic} partition 1 wait for"):
        change(deployment)


def test_fewer_partitions(deployment: Deployment) -> None:
    with pytest.raises(RepartitionRefused, match="cannot take any away"):
        change(deployment, OLD - 1)


def test_another_count_than_the_run_that_began(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(module._Repartition, "_move", lambda *_: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            change(deployment)
    with pytest.raises(RepartitionRefused, match="name the count that the earlier run was given"):
        change(deployment, NEW + 1)


def control_at(deployment: Deployment, user: str) -> int:
    """Record a control of this viewer at the end of the watch partition; returns its offset among the positions."""
    place = murmur2_partition(user.encode(), OLD)
    with TopicReader(deployment.settings) as log:
        _, end = log.ends(deployment.name(topics.WATCH_EVENTS), place)
        _, offset = log.ends(deployment.name(topics.WATCH_POSITIONS), place)
    control = UserControl("c1", user, ControlKind.HIDE, 1_700_000_000_000, cluster_id=3)
    item = Position(PositionKind.CONTROL, end, "controls", 0, control)
    deployment.produce([(topics.WATCH_POSITIONS, place, None, encode_position(item))])
    return offset


def test_a_control_that_is_not_applied_yet(deployment: Deployment) -> None:
    user = USERS[50]
    offset = control_at(deployment, user)
    place = murmur2_partition(user.encode(), OLD)
    pending = to_bytes(state_of(user, control_offset=offset - 1))
    deployment.produce([(topics.INTERESTS_CHANGELOG, place, user.encode(), pending)])
    with pytest.raises(RepartitionRefused, match=f"a control of '{user}' .* not applied yet"):
        change(deployment)
    applied = to_bytes(state_of(user, control_offset=offset))
    deployment.produce([(topics.INTERESTS_CHANGELOG, place, user.encode(), applied)])
    change(deployment)


def test_a_load_that_has_not_ended(deployment: Deployment) -> None:
    user = USERS[60].encode()
    state = to_bytes(state_of(USERS[60], flags=BOOTSTRAPPED))
    deployment.produce([(topics.INTERESTS_CHANGELOG, murmur2_partition(user, OLD), user, state)])
    with pytest.raises(RepartitionRefused, match=r"1 viewers of partition \d wait for the end marker"):
        change(deployment)


def test_states_of_another_partitioner(deployment: Deployment) -> None:
    user = USERS[70].encode()
    elsewhere = (murmur2_partition(user, OLD) + 1) % OLD
    deployment.produce([(topics.INTERESTS_CHANGELOG, elsewhere, user, to_bytes(state_of(USERS[70])))])
    with pytest.raises(RepartitionRefused, match="producers use another one"):
        change(deployment)


def test_an_unreadable_state(deployment: Deployment) -> None:
    deployment.produce([(topics.INTERESTS_CHANGELOG, 0, b"k", b"no state")])
    with pytest.raises(RepartitionRefused, match="partition 0: state of layout"):
        change(deployment)


def test_producers_that_write(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(_: float) -> None:
        deployment.produce([(topics.USER_CONTROLS, 0, b"viewer-1", b"{}")])

    monkeypatch.setattr(time, "sleep", write)
    with pytest.raises(RepartitionRefused, match="stop the producers"):
        change(deployment)


def raise_by_hand(deployment: Deployment) -> None:
    for name in PER_USER:
        wanted = [NewPartitions(deployment.name(name), NEW)]
        deployment.admin.create_partitions(wanted)[deployment.name(name)].result()
    deadline = time.monotonic() + 20
    while set(deployment.counts().values()) != {NEW}:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_counts_raised_by_hand_are_mended_only_on_demand(deployment: Deployment) -> None:
    raise_by_hand(deployment)
    user = next(u for u in USERS[10:] if murmur2_partition(u.encode(), NEW) >= OLD)
    anew = to_bytes(state_of(user, events=1))
    place = murmur2_partition(user.encode(), NEW)
    deployment.produce([(topics.INTERESTS_CHANGELOG, place, user.encode(), anew)])
    with pytest.raises(RepartitionRefused, match="--overwrite"):
        change(deployment)
    change(deployment, overwrite=True)
    value = deployment.newest(topics.INTERESTS_CHANGELOG)[place, user.encode()].value()
    assert isinstance(value, bytes)
    assert int(from_bytes(value)["events"]) == int(state_of(user)["events"])


def test_missing_topics_and_brokers(kafka: Stack) -> None:
    with pytest.raises((KafkaRefused, KafkaException)):
        repartition(replace(kafka.settings, topic_prefix="never-made."), NEW, lambda _: None)
