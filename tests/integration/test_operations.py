"""What an operator does to real workers: a blown fuse and the way past it, a changed partition count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from agents.artefacts import load_configuration
from agents.kafka_admin import confluent_options, create_topics, prefixed, topic_ids
from agents.kafka_log import KafkaLog
from agents.repartition import commit_offsets
from agents.replay import Event, ReplayDriver
from agents.settings import Settings
from streams import topics
from streams.identifiers import murmur2_partition
from streams.state import MARKERS, from_bytes, to_bytes
from tests.builders import START, control, event
from tests.command_line import run
from tests.conftest import Stack
from tests.workers import Workers, read, send, table_of, until, until_counted

pytestmark = pytest.mark.stack

OLD, NEW = 2, 5
USERS = [f"viewer-{number}" for number in range(30)]
ERASED, HIDING, CLEARING = USERS[:3]


@pytest.fixture
def settings(kafka: Stack, topic_prefix: str, request: pytest.FixtureRequest) -> Settings:
    name = request.node.name.partition("[")[0][-12:].replace("_", "-")
    settings = replace(kafka.settings, topic_prefix=f"{topic_prefix}{name}.", partitions=OLD, template_after=0)
    create_topics(settings)
    return settings


@pytest.fixture
def workers(settings: Settings, tmp_path: Path) -> Iterator[Workers]:
    workers = Workers(settings, tmp_path)
    yield workers
    workers.end()


def watches(rounds: range) -> list[Event]:
    """One watch of every viewer a round, of the packaged registry's videos."""
    return [
        event(user, f"v{(7 * place + 13 * number) % 200 + 1:04}", START + (number * 97 + place) * 60_000)
        for number in rounds
        for place, user in enumerate(USERS)
    ]


def pairs(events: Sequence[Event]) -> list[tuple[bytes | None, bytes | None]]:
    return [(found.key, found.value) for found in events]


async def test_a_blown_fuse_loses_nothing_and_is_got_past(settings: Settings, workers: Workers) -> None:
    good, broken = pairs(watches(range(4))), [(USERS[0].encode(), b"broken %d" % number) for number in range(9)]
    await send(settings, topics.WATCH_EVENTS, [*good[:60], *broken, *good[60:]])
    limited = {"PERSONAS_DEAD_LETTERS_PER_MINUTE": "5"}
    for _ in range(2):  # a supervisor's restart does not help
        worker = workers.start(environment=limited)
        await until(lambda worker=worker: not worker.running, workers)  # type: ignore[misc]
        assert worker.process.returncode == 1
        text = worker.text()
        assert f"records of {prefixed(settings, topics.WATCH_EVENTS)} could not be used" in text
        assert "not_json" in text
        assert "PERSONAS_DEAD_LETTERS_PER_MINUTE" in text
    log = KafkaLog(settings)
    try:
        place = murmur2_partition(USERS[0].encode(), OLD)
        group = prefixed(settings, topics.WATCH_APP)
        assert await log.committed(group, topics.WATCH_EVENTS, place) < await log.end(topics.WATCH_EVENTS, place)
    finally:
        await log.close()
    unlimited = workers.start(environment={"PERSONAS_DEAD_LETTERS_PER_MINUTE": "0"})
    await until_counted(settings, workers)
    assert unlimited.stop() == 0, workers.logs()
    counted = sum(int(from_bytes(value)["events"]) for value in table_of(settings).values())
    assert counted == len(good)
    letters = [message.key() for message in read(settings, topics.dead_letters_of(topics.WATCH_EVENTS))]
    assert len(set(letters)) == len(broken)


def without_markers(value: bytes) -> bytes:
    state = from_bytes(value)
    for name in MARKERS:
        state[name] = 0
    return to_bytes(state)


async def test_counts_go_on_where_they_were_after_a_changed_partition_count(
    settings: Settings, workers: Workers
) -> None:
    before, after = watches(range(25)), watches(range(25, 50))
    controls = [
        control(HIDING, "hide", before[-1].timestamp, cluster_id=3),
        control(CLEARING, "clear_history", before[-1].timestamp),
        control(ERASED, "erase", before[-1].timestamp),
    ]
    first = workers.start()
    await send(settings, topics.WATCH_EVENTS, pairs(before))
    await until_counted(settings, workers)
    # They take effect at the very end of the log: where a partition is opened next time.
    await send(settings, topics.USER_CONTROLS, [(found.key, found.value) for found in controls])

    def applied() -> bool:
        states = table_of(settings)
        return all(int(from_bytes(states[user])["control_offset"]) >= 0 for user in (ERASED, HIDING, CLEARING))

    await until(applied, workers)
    assert first.stop() == 0, workers.logs()
    requests = {(m.partition(), m.offset()) for m in read(settings, topics.REFRESH_REQUESTS)}

    refused = run(settings, "repartition", "--partitions", str(NEW), "--yes")
    assert "wait for" in refused.stderr, "nobody has answered the requests"
    await commit_requests(settings)
    done = run(settings, "repartition", "--partitions", str(NEW), "--yes")
    assert done.exit_code == 0, done.output

    old = workers.start()
    await until(lambda: not old.running, workers)
    assert "partition count is 5, needs 2" in old.text(), "a worker of the old count does not start"
    now = replace(settings, partitions=NEW)
    second = workers.start(environment={"PERSONAS_PARTITIONS": str(NEW)})
    await send(now, topics.WATCH_EVENTS, pairs(after))
    await until_counted(now, workers)
    again = control(HIDING, "hide", after[-1].timestamp, cluster_id=4)
    await send(now, topics.USER_CONTROLS, [(again.key, again.value)])
    await until(lambda: 4 in from_bytes(newest(now)[HIDING])["hidden"], workers)
    assert second.stop() == 0, workers.logs()

    states = newest(now)
    configuration, registry = load_configuration(now, topic_ids(now, [topics.WATCH_EVENTS, topics.WATCH_POSITIONS]))
    driver = ReplayDriver(configuration, registry, partition=0)
    await driver.run([*before, *after])
    for user in set(USERS) - {HIDING, ERASED, CLEARING}:
        assert without_markers(states[user]) == without_markers(driver.states[user]), user
    for user in (ERASED, CLEARING):
        state = from_bytes(states[user])
        assert (int(state["epoch"]), int(state["events"])) == (1, 25), user
    assert sorted(from_bytes(states[HIDING])["hidden"].tolist())[-2:] == [3, 4]
    later = [m for m in read(now, topics.REFRESH_REQUESTS) if (m.partition(), m.offset()) not in requests]
    assert later
    assert all(message.partition() == murmur2_partition(message.key(), NEW) for message in later)


def newest(settings: Settings) -> dict[str, bytes]:
    """States by viewer, each on the partition of its key alone."""
    found: dict[tuple[str, int], bytes | None] = {}
    for message in read(settings, topics.INTERESTS_CHANGELOG):
        found[message.key().decode(), message.partition()] = message.value()
    held = {place: value for place, value in found.items() if value is not None}
    assert all(murmur2_partition(user.encode(), settings.partitions) == partition for user, partition in held)
    return {user: value for (user, _), value in held.items()}


async def commit_requests(settings: Settings) -> None:
    """What the persona app leaves when it has answered every request."""
    log = KafkaLog(settings)
    try:
        name = prefixed(settings, topics.REFRESH_REQUESTS)
        ends = [
            TopicPartition(name, partition, await log.end(topics.REFRESH_REQUESTS, partition))
            for partition in range(settings.partitions)
        ]
    finally:
        await log.close()
    commit_offsets(AdminClient(confluent_options(settings)), prefixed(settings, topics.PERSONA_APP), ends)
