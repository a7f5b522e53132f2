"""`personas doctor`: is everything that the workers need there, and as they need it?"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final

import click
import numpy as np
import numpy.typing as npt
import orjson
from confluent_kafka import Message

from agents.artefacts import load_current_registry, load_format, load_thresholds
from agents.kafka_admin import ABSENT, KafkaRefused, KafkaUnavailable, prefixed, verify_topics, wait_for_kafka
from agents.repartition import partition_counts, stored_states
from agents.settings import Settings, SettingsError, load_settings
from agents.stores.cassandra import CassandraStore
from agents.stores.migrate import packaged_migrations, schema_session, schema_state, where
from agents.stores.ports import StoreError
from agents.topic_reader import TopicReader
from streams.columns import Decode
from streams.decoding import Rejected, RejectReason
from streams.identifiers import murmur2_partition
from streams.state import StateError
from streams.topics import INTERESTS_CHANGELOG, TOPICS, WATCH_EVENTS

CONNECT_SECONDS: Final = 5.0
SAMPLE_PER_PARTITION: Final = 100
GUIDE: Final = "docs/operations.md, Changing the partition count"


class Status(StrEnum):
    """Result of a check; only `fail` makes the exit status 1."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: what was found, and for warnings and failures what to do."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def doctor(as_json: bool) -> None:
    """Check settings, connections, topics and key placement.

    Looks at Kafka and its topics, the keys and partitions of the latest watch events and of the oldest and latest
    states, Cassandra and its schema, Triton and the student model, the registry and the thresholds. Changes nothing.

    \b
    personas doctor
    personas doctor --json | jq '.checks[] | select(.status != "ok")'

    Exit status 1 if a check failed.
    """
    settings = load_settings()
    checks = list(run_checks(settings))
    ok = all(check.status is not Status.FAIL for check in checks)
    if as_json:
        click.echo(orjson.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}, option=orjson.OPT_INDENT_2))
    else:
        for check in checks:
            click.echo(f"{check.status:<5}{check.name}: {check.detail}")
            if check.remedy:
                click.echo(f"     -> {check.remedy}")
    if not ok:
        sys.exit(1)


def run_checks(settings: Settings) -> Iterator[Check]:
    """Every check, in order. Blocking; takes a few seconds for each service that does not answer."""
    yield from _artefacts(settings)
    yield from _kafka(settings)
    yield from _cassandra(settings)
    yield from _triton(settings)


def _artefacts(settings: Settings) -> Iterator[Check]:
    def registry() -> str:
        found = load_current_registry(settings)
        return f"version {found.version}, {len(found.cards)} clusters"

    loads: tuple[tuple[str, Callable[[], str], str], ...] = (
        ("registry", registry, "build one with `personas clusters build` or unset PERSONAS_REGISTRY"),
        ("thresholds", lambda: load_thresholds(settings.thresholds).name, "unset PERSONAS_THRESHOLDS or mend the file"),
        ("event decoding", lambda: _loaded_decoding(settings), "mend the file or setting that is named"),
    )
    for name, load, remedy in loads:
        try:
            yield Check(name, Status.OK, load())
        except SettingsError as error:
            yield Check(name, Status.FAIL, str(error), remedy)


def _loaded_decoding(settings: Settings) -> str:
    load_format(settings)
    if settings.event_decoder:
        return f"by {settings.event_decoder}"
    return "the project's JSON" if settings.field_mapping.name == "" else f"JSON mapped by {settings.field_mapping}"


def _kafka(settings: Settings) -> Iterator[Check]:
    try:
        wait_for_kafka(settings, CONNECT_SECONDS)
    except (KafkaUnavailable, SettingsError) as error:
        yield Check("Kafka", Status.FAIL, str(error), "start it, or mend the PERSONAS_KAFKA_ settings")
        yield Check("topics and keys", Status.WARN, "not looked at", "mend Kafka first")
        return
    yield Check("Kafka", Status.OK, f"answers at {settings.kafka_bootstrap}")
    try:
        mismatches = verify_topics(settings)
        for mismatch in mismatches:
            yield Check("topic", Status.FAIL, str(mismatch))
        if not mismatches:
            yield Check("topics", Status.OK, f"{len(TOPICS)} as needed")
        absent = {mismatch.topic for mismatch in mismatches if mismatch.found == ABSENT}
        if not any(mismatch.topic == prefixed(settings, WATCH_EVENTS) for mismatch in mismatches):
            yield from _keys(settings)
        if not absent & {prefixed(settings, topic.name) for topic in TOPICS if topic.per_user}:
            yield from _partition_counts(settings)
            yield from _states(settings)
    except (KafkaUnavailable, KafkaRefused) as error:
        yield Check("topics and keys", Status.FAIL, str(error), "see the message; `personas init` creates topics")


def _keys(settings: Settings) -> Iterator[Check]:
    """Whether the latest watch events are usable, keyed by user_id, and where Kafka's default partitioner puts them."""
    try:
        decode = load_format(settings).decode
    except SettingsError:  # reported already
        return
    topic = prefixed(settings, WATCH_EVENTS)
    with TopicReader(settings) as reader:
        count = len(reader.partitions(topic))
        found = Counter(_verdict(message, count, decode) for message in reader.read_last(topic, SAMPLE_PER_PARTITION))
    total = found.total()
    if not total:
        yield Check("watch events", Status.OK, f"{topic} is empty: no keys to look at")
        return
    sampled = f"of the {total} latest records of {topic}"
    wrong_key = found.pop(RejectReason.KEY_MISMATCH, 0)
    misplaced = found.pop(_MISPLACED, 0)
    fine = found.pop(_FINE, 0)
    if wrong_key:
        detail = f"{wrong_key} {sampled} have a key other than their user_id; each is a dead letter"
        yield Check("keys", Status.FAIL, detail, "produce with the UTF-8 bytes of user_id as the key")
    if misplaced:
        detail = f"{misplaced} {sampled} are not in the partition of Kafka's default partitioner, so controls miss them"
        yield Check("partitions", Status.FAIL, detail, "with librdkafka clients set partitioner=murmur2_random")
    if found:
        reasons = ", ".join(f"{reason} {number}" for reason, number in found.most_common())
        yield Check(
            "watch events", Status.WARN, f"{found.total()} {sampled} are unusable: {reasons}", "personas dlq list"
        )
    if fine and not wrong_key and not misplaced:
        yield Check("keys", Status.OK, f"{fine} {sampled} are keyed by user_id and lie where they belong")


def _partition_counts(settings: Settings) -> Iterator[Check]:
    """Whether a viewer's records have the same partition number on every topic, the one that workers are told."""
    with TopicReader(settings) as reader:
        counts = partition_counts(settings, reader)
    name = "partition counts"
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{topic} {count}" for topic, count in counts.items())
        remedy = (
            f"if it was interrupted, run `personas repartition --partitions {max(counts.values())}` again ({GUIDE})"
        )
        yield Check(name, Status.FAIL, f"the per-user topics differ: {shown}", remedy)
        return
    (count,) = set(counts.values())
    if count != settings.partitions:
        detail = f"the per-user topics have {count} partitions, PERSONAS_PARTITIONS is {settings.partitions}"
        remedy = f"set PERSONAS_PARTITIONS={count} for every worker; to change the topics, see {GUIDE}"
        yield Check(name, Status.FAIL, detail, remedy)
        return
    yield Check(name, Status.OK, f"{count} on every per-user topic")


def _states(settings: Settings) -> Iterator[Check]:
    """Whether states lie on the partition of their key: the oldest records too, which is what a new count leaves."""
    changelog = prefixed(settings, INTERESTS_CHANGELOG)
    with TopicReader(settings) as reader:
        count = len(reader.partitions(changelog))
        looked_at, misplaced, foreign = 0, 0, 0
        for partition in range(count):
            try:
                keys, states = _some_states(reader, changelog, partition)
            except StateError as error:
                remedy = "only this project writes there; run the version that wrote it"
                yield Check("states", Status.FAIL, f"{changelog} partition {partition}: {error}", remedy)
                return
            looked_at += len(keys)
            suspects = {key for key in keys if murmur2_partition(key, count) != partition}
            misplaced += len(_held(reader, changelog, partition, suspects))
            foreign += int(np.count_nonzero((states["watch_offset"] >= 0) & (states["watch_partition"] != partition)))
    remedy = f"see {GUIDE}; `personas repartition --partitions {count} --dry-run` counts all of them"
    if misplaced:
        detail = f"{misplaced} of {looked_at} states of {changelog} are not on the partition of their key"
        yield Check("states", Status.FAIL, detail, remedy)
    elif foreign:
        detail = f"{foreign} of {looked_at} states of {changelog} count by the offsets of another watch partition"
        yield Check("states", Status.FAIL, detail, remedy)
    else:
        yield Check("states", Status.OK, f"{looked_at} oldest and latest states lie where their keys belong")


def _some_states(reader: TopicReader, changelog: str, partition: int) -> tuple[list[bytes], npt.NDArray[np.void]]:
    """The oldest and the latest states of a partition: keys, and the first fields of what the sample has newest."""
    start, end = reader.ends(changelog, partition)
    first = min(end, start + SAMPLE_PER_PARTITION)
    return stored_states(reader, changelog, partition, [(start, first), (max(first, end - SAMPLE_PER_PARTITION), end)])


def _held(reader: TopicReader, changelog: str, partition: int, keys: set[bytes]) -> set[bytes]:
    """Those of `keys` that a partition really holds: a later tombstone may stand outside the sample."""
    held: set[bytes] = set()
    if not keys:
        return held
    for message in reader.read_range(changelog, partition, *reader.ends(changelog, partition)):
        key = message.key()
        if key in keys:
            held.add(key) if message.value() is not None else held.discard(key)
    return held


_FINE: Final = "fine"
_MISPLACED: Final = "misplaced"


def _verdict(message: Message, partitions: int, decode: Decode) -> str:
    key = message.key()
    key = key.encode() if isinstance(key, str) else key
    _, append_time = message.timestamp()
    value = message.value()
    decoded = decode(value.encode() if isinstance(value, str) else value, key, append_time)
    if isinstance(decoded, Rejected):
        return str(decoded.reason)
    placed = murmur2_partition(decoded.record.user_id.encode(), partitions) == message.partition()
    return _FINE if placed else _MISPLACED


def _cassandra(settings: Settings) -> Iterator[Check]:
    try:
        with schema_session(settings, CONNECT_SECONDS) as session:
            state = schema_state(session, settings, packaged_migrations())
    except (StoreError, SettingsError) as error:
        yield Check("Cassandra", Status.FAIL, str(error), "start it, or mend the PERSONAS_CASSANDRA_ settings")
        return
    if not state.keyspace_exists or state.pending:
        missing = ", ".join(state.pending)
        yield Check("Cassandra", Status.FAIL, f"{where(settings)} lacks {missing}", "run `personas init`")
        return
    for problem in state.problems:
        yield Check("Cassandra", Status.FAIL, problem)
    if state.problems:
        return
    if asyncio.run(_store_answers(settings)):
        yield Check("Cassandra", Status.OK, f"{where(settings)}: schema as needed, reads at LOCAL_QUORUM answer")
    else:
        yield Check(
            "Cassandra",
            Status.FAIL,
            f"{where(settings)} does not answer reads at LOCAL_QUORUM",
            "bring replicas back; `nodetool status` shows them",
        )


async def _store_answers(settings: Settings) -> bool:
    try:
        store = await CassandraStore.connect(settings)
    except StoreError:
        return False
    try:
        return await store.ready()
    finally:
        await store.close()


def _triton(settings: Settings) -> Iterator[Check]:
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    where_to = f"Triton at {settings.triton_url}"
    client = InferenceServerClient(settings.triton_url)
    try:
        if not client.is_server_ready(client_timeout=CONNECT_SECONDS):
            yield Check("Triton", Status.FAIL, f"{where_to} is not ready", "wait for its models to load; see its log")
            return
        yield Check("Triton", Status.OK, f"{where_to} is ready")
        model = settings.student_model
        if client.is_model_ready(model, client_timeout=CONNECT_SECONDS):
            yield Check("student", Status.OK, f"model {model} is ready")
        else:
            remedy = "load it, or set PERSONAS_STUDENT_MODEL to the name it has there"
            yield Check("student", Status.FAIL, f"{where_to} has no ready model {model}", remedy)
    except InferenceServerException as error:
        remedy = "start it (`personas up` starts a local one) or set PERSONAS_TRITON_URL to its gRPC address"
        yield Check("Triton", Status.FAIL, f"{where_to} does not answer ({error.message()})", remedy)
    finally:
        client.close()
