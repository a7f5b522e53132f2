"""`personas dlq` on real Kafka: counts, shows and replays dead letters."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest
from confluent_kafka import Message, Producer

from agents.dead_letter_log import REPLAY_HEADER
from agents.kafka_admin import confluent_options, create_topics, prefixed
from agents.settings import Settings
from agents.topic_reader import TopicReader
from streams.dead_letters import dead_letter
from streams.decoding import Rejected, RejectReason
from streams.identifiers import murmur2_partition
from streams.records import encode
from streams.topics import REFRESH_REQUESTS, TOPICS, UPGRADE_REQUESTS, USER_CONTROLS, WATCH_EVENTS, dead_letters_of
from tests.command_line import run
from tests.conftest import Stack

pytestmark = pytest.mark.stack

TEXT = b'{"user_id": "ann"}'
BINARY = b"\xff\x00\x1b[31mred"
ESCAPES = "\x1b[31mred \u202etitle".encode()
LETTERS = [
    (RejectReason.MISSING_FIELD, b"ann", TEXT, 2),
    (RejectReason.NOT_JSON, b"bob", BINARY, 1),
    (RejectReason.NOT_JSON, None, ESCAPES, 1),
    (RejectReason.NULL_VALUE, b"cat", None, 0),
    (RejectReason.TOO_LARGE, b"dan", b"x" * 70_000, 0),
    (RejectReason.EMPTY_ID, b"k" * 2_000, b"{}", 0),
]


@pytest.fixture(scope="module")
def settings(kafka: Stack, topic_prefix: str) -> Settings:
    made = replace(kafka.settings, topic_prefix=topic_prefix, partitions=3)
    create_topics(made)
    return made


@pytest.fixture(scope="module", autouse=True)
def _letters(settings: Settings) -> None:
    source = prefixed(settings, WATCH_EVENTS)
    values = [
        encode(dead_letter(Rejected(reason, "why"), source, partition, offset, key, value))
        for offset, (reason, key, value, partition) in enumerate(LETTERS)
    ]
    values.append(b"no dead letter")
    values.append(encode(dead_letter(Rejected(RejectReason.NOT_JSON, "why"), "elsewhere", 0, 0, b"k", b"v")))
    producer = Producer(confluent_options(settings))
    for value in values:
        producer.produce(prefixed(settings, dead_letters_of(WATCH_EVENTS)), value)
    upgrade = prefixed(settings, UPGRADE_REQUESTS)
    letter = dead_letter(Rejected(RejectReason.WRONG_TYPE, "why"), upgrade, 1, 0, b"eve", b"{}")
    producer.produce(prefixed(settings, dead_letters_of(REFRESH_REQUESTS)), encode(letter))
    assert producer.flush(20) == 0


def read(settings: Settings, topic: str) -> list[Message]:
    with TopicReader(settings) as reader:
        return list(reader.read(prefixed(settings, topic)))


def test_list_counts_by_topic_and_reason(settings: Settings) -> None:
    result = run(settings, "dlq", "list", "--json")
    assert result.exit_code == 0
    assert orjson.loads(result.stdout) == {
        "total": 9,
        "topics": {
            prefixed(settings, dead_letters_of(WATCH_EVENTS)): {
                "missing_field": 1,
                "not_json": 3,
                "null_value": 1,
                "too_large": 1,
                "empty_id": 1,
                "unreadable": 1,
            },
            prefixed(settings, dead_letters_of(USER_CONTROLS)): {},
            prefixed(settings, dead_letters_of(REFRESH_REQUESTS)): {"wrong_type": 1},
        },
    }


def test_list_as_text_names_the_latest_of_each_reason(settings: Settings) -> None:
    name = prefixed(settings, dead_letters_of(WATCH_EVENTS))
    lines = run(settings, "dlq", "list").output.splitlines()
    assert f"{name}: 8" in lines
    assert any(line.split() == ["3", "not_json", "latest:", name, "0", "7"] for line in lines)


@pytest.mark.parametrize("short", [True, False])
def test_list_filters_by_topic_and_reason(settings: Settings, short: bool) -> None:
    topic = WATCH_EVENTS if short else prefixed(settings, dead_letters_of(WATCH_EVENTS))
    result = run(settings, "dlq", "list", "--topic", topic, "--reason", "not_json", "--json")
    assert orjson.loads(result.stdout) == {
        "total": 3,
        "topics": {prefixed(settings, dead_letters_of(WATCH_EVENTS)): {"not_json": 3}},
    }


@pytest.mark.parametrize(("since", "total"), [("1h", 9), ("2013-05-01", 9), ("2100-01-01T00:00:00Z", 0)])
def test_list_filters_by_time(settings: Settings, since: str, total: int) -> None:
    assert orjson.loads(run(settings, "dlq", "list", "--since", since, "--json").stdout)["total"] == total


@pytest.mark.parametrize("wrong", [["--topic", "personas"], ["--since", "yesterday"], ["--since", "5"]])
def test_wrong_arguments_are_a_usage_error(settings: Settings, wrong: list[str]) -> None:
    result = run(settings, "dlq", "list", *wrong)
    assert result.exit_code == 2
    assert wrong[1] in result.stderr


def test_show_decodes_the_payload(settings: Settings) -> None:
    document = orjson.loads(run(settings, "dlq", "show", WATCH_EVENTS, "0", "0", "--json").stdout)
    assert document["reason"] == "missing_field"
    assert document["source_topic"] == prefixed(settings, WATCH_EVENTS)
    assert (document["source_partition"], document["source_offset"]) == (2, 0)
    assert document["payload_text"] == TEXT.decode()
    assert document["key_text"] == "ann"


def test_show_prints_binary_as_hexadecimal(settings: Settings) -> None:
    output = run(settings, "dlq", "show", WATCH_EVENTS, "0", "1").output
    assert "00000000  ff 00 1b 5b 33 31 6d 72 65 64" in output
    assert "\x1b" not in output


def test_show_escapes_what_a_terminal_would_obey(settings: Settings) -> None:
    output = run(settings, "dlq", "show", WATCH_EVENTS, "0", "2").output
    assert "\\x1b[31mred \\u202etitle" in output
    assert "\x1b" not in output


def test_show_says_that_a_record_is_no_dead_letter(settings: Settings) -> None:
    assert "unreadable: not a DeadLetter" in run(settings, "dlq", "show", WATCH_EVENTS, "0", "6").output


@pytest.mark.parametrize("position", [["0", "99"], ["7", "0"]])
def test_show_of_nothing_fails(settings: Settings, position: list[str]) -> None:
    result = run(settings, "dlq", "show", WATCH_EVENTS, *position)
    assert result.exit_code == 1
    assert "holds no record" in result.stderr


def test_a_dry_run_sends_nothing(settings: Settings) -> None:
    result = run(settings, "dlq", "replay", "--dry-run")
    assert result.exit_code == 0
    assert f"would send 3 to {prefixed(settings, WATCH_EVENTS)}" in result.output
    assert read(settings, WATCH_EVENTS) == []


def test_replay_sends_the_original_bytes_key_and_partition(settings: Settings) -> None:
    result = run(settings, "dlq", "replay", "--topic", WATCH_EVENTS, "--json")
    assert result.exit_code == 0
    assert orjson.loads(result.stdout) == {
        "dry_run": False,
        "sent": {prefixed(settings, WATCH_EVENTS): 3},
        "passed_over": 5,
        "failed": 0,
    }
    name = prefixed(settings, dead_letters_of(WATCH_EVENTS))
    found = {
        message.value(): (message.key(), message.partition(), message.headers())
        for message in read(settings, WATCH_EVENTS)
    }
    assert found == {
        TEXT: (b"ann", 2, [(REPLAY_HEADER, f"{name}/0/0".encode())]),
        BINARY: (b"bob", 1, [(REPLAY_HEADER, f"{name}/0/1".encode())]),
        ESCAPES: (None, 1, [(REPLAY_HEADER, f"{name}/0/2".encode())]),
    }


def test_replay_says_why_it_passes_a_letter_over(settings: Settings) -> None:
    errors = run(settings, "dlq", "replay", "--topic", WATCH_EVENTS, "--dry-run").stderr
    for reason in ("had no value", "65536 of 70000 bytes", "key may be cut", "not a dead letter", "'elsewhere'"):
        assert reason in errors


def test_replay_filters_by_reason(settings: Settings) -> None:
    result = run(settings, "dlq", "replay", "--reason", "missing_field", "--dry-run", "--json")
    assert orjson.loads(result.stdout)["sent"] == {prefixed(settings, WATCH_EVENTS): 1}


def test_requests_of_both_kinds_go_back_to_their_own_topic(settings: Settings) -> None:
    result = run(settings, "dlq", "replay", "--topic", REFRESH_REQUESTS, "--json")
    assert orjson.loads(result.stdout)["sent"] == {prefixed(settings, UPGRADE_REQUESTS): 1}
    (message,) = read(settings, UPGRADE_REQUESTS)
    assert (message.key(), message.value(), message.partition()) == (b"eve", b"{}", 1)


@pytest.mark.parametrize(("key", "total"), [("ann", 1), ("k" * 2_000, 0), ("nobody", 0)])
def test_list_filters_by_key(settings: Settings, key: str, total: int) -> None:
    result = run(settings, "dlq", "list", "--topic", WATCH_EVENTS, "--key", key, "--json")
    assert orjson.loads(result.stdout)["total"] == total


@pytest.mark.parametrize(("before", "total"), [("1h", 0), ("2100-01-01", 8)])
def test_list_filters_by_age(settings: Settings, before: str, total: int) -> None:
    result = run(settings, "dlq", "list", "--topic", WATCH_EVENTS, "--before", before, "--json")
    assert orjson.loads(result.stdout)["total"] == total


def test_replay_by_key_goes_where_the_key_belongs(settings: Settings) -> None:
    before = len(read(settings, WATCH_EVENTS))
    options = ["--topic", WATCH_EVENTS, "--key", "bob", "--by-key"]
    assert run(settings, "dlq", "replay", *options).exit_code == 0
    messages = read(settings, WATCH_EVENTS)
    assert len(messages) == before + 1
    (placed,) = {m.partition() for m in messages if m.key() == b"bob"} - {1}
    assert placed == murmur2_partition(b"bob", 3)


def test_purge_refuses_where_other_letters_would_go_too(settings: Settings) -> None:
    before = run(settings, "dlq", "list", "--json").stdout
    result = run(settings, "dlq", "purge", "--topic", WATCH_EVENTS, "--reason", "not_json", "--yes")
    assert result.exit_code == 1
    for part in (
        "5 other letters",
        "3 meant",
        "missing_field 1",
        "only from a topic's beginning",
        "nothing was deleted",
    ):
        assert part in result.stderr
    assert run(settings, "dlq", "list", "--json").stdout == before


def test_purge_asks_and_a_dry_run_deletes_nothing(settings: Settings) -> None:
    before = run(settings, "dlq", "list", "--json").stdout
    dry = run(settings, "dlq", "purge", "--dry-run", "--json")
    assert sum(orjson.loads(dry.stdout)["deleted"].values()) == orjson.loads(before)["total"]
    assert run(settings, "dlq", "purge").exit_code == 1  # nobody confirms
    assert run(settings, "dlq", "list", "--json").stdout == before


def test_a_partition_that_is_gone_is_a_failure(settings: Settings) -> None:
    letter = dead_letter(
        Rejected(RejectReason.WRONG_TYPE, "why"), prefixed(settings, USER_CONTROLS), 77, 0, b"k", b"{}"
    )
    producer = Producer(confluent_options(settings))
    producer.produce(prefixed(settings, dead_letters_of(USER_CONTROLS)), encode(letter))
    assert producer.flush(20) == 0
    result = run(settings, "dlq", "replay", "--topic", USER_CONTROLS)
    assert result.exit_code == 1
    assert "was not sent" in result.stderr


def test_absent_topics_say_what_to_run(kafka: Stack) -> None:
    result = run(replace(kafka.settings, topic_prefix="never-made."), "dlq", "list")
    assert result.exit_code == 1
    assert "personas init" in result.stderr


def test_every_topic_with_dead_letters_is_listed(settings: Settings) -> None:
    listed = orjson.loads(run(settings, "dlq", "list", "--json").stdout)["topics"]
    assert set(listed) == {prefixed(settings, t.name) for t in TOPICS if t.name.endswith("dead-letters")}


def test_purge_deletes_the_oldest_letters_and_no_others(settings: Settings) -> None:
    oldest = run(settings, "dlq", "purge", "--topic", WATCH_EVENTS, "--reason", "missing_field", "--yes", "--json")
    assert (oldest.exit_code, orjson.loads(oldest.stdout)) == (
        0,
        {"dry_run": False, "deleted": {prefixed(settings, dead_letters_of(WATCH_EVENTS)): 1}},
    )
    counts = orjson.loads(run(settings, "dlq", "list", "--topic", WATCH_EVENTS, "--json").stdout)
    assert counts["topics"][prefixed(settings, dead_letters_of(WATCH_EVENTS))] == {
        "not_json": 3,
        "null_value": 1,
        "too_large": 1,
        "empty_id": 1,
        "unreadable": 1,
    }
    assert run(settings, "dlq", "show", WATCH_EVENTS, "0", "0").exit_code == 1
    everything = run(settings, "dlq", "purge", "--yes")
    assert everything.exit_code == 0
    assert orjson.loads(run(settings, "dlq", "list", "--json").stdout)["total"] == 0
    assert run(settings, "dlq", "purge", "--yes").output.strip() == "no such dead letters"
