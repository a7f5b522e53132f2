"""What the logs must give, by the plain handler one record at a time, and how what the workers left differs from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from agents.artefacts import load_configuration
from agents.kafka_admin import prefixed, topic_ids
from agents.settings import Settings
from agents.topic_reader import TopicReader
from streams import topics
from streams.decoding import Rejected, decode_control
from streams.positions import Recorded, decode_position
from streams.state import from_bytes
from streams.state_table import StateTable
from streams.watch import Batch, InputRecord, WatchHandler

SHOWN = 5
"""Examples named in a message."""


@dataclass(frozen=True, slots=True)
class Log:
    """A watch topic, under its id, with the positions that were recorded in it. By partition, in offset order."""

    topic_id: str
    records: Mapping[int, list[InputRecord]]
    ends: Mapping[int, int]
    positions: Mapping[int, list[Recorded]]


@dataclass(slots=True)
class Result:
    """What a log gives, or what the workers made of it.

    requests: every content that stands under a request id; letters: keys of dead letters; controls: (topic id,
    partition, offset) of each control that takes effect.
    """

    states: dict[str, bytes] = field(default_factory=dict)
    requests: dict[str, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    letters: set[bytes] = field(default_factory=set)
    controls: set[tuple[str, int, int]] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Differences:
    """All zero when the workers were exact. over, under: events counted too often and lost, summed over viewers."""

    over: int = 0
    under: int = 0
    states_differing: int = 0
    requests_missing: int = 0
    requests_extra: int = 0
    requests_differing: int = 0
    letters_missing: int = 0
    letters_extra: int = 0
    controls_missing: int = 0
    examples: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any(value for name, value in self.figures().items())

    def figures(self) -> dict[str, int]:
        """The counts by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "examples"}


def read_log(settings: Settings, earlier: Sequence[Log] = ()) -> Log:
    """The watch topic as it stands. `earlier`: topics of this name that were deleted; their positions are left out."""
    ids = topic_ids(settings, [topics.WATCH_EVENTS])
    records: dict[int, list[InputRecord]] = {p: [] for p in range(settings.partitions)}
    positions: dict[int, list[Recorded]] = {p: [] for p in range(settings.partitions)}
    with TopicReader(settings) as reader:
        for message in reader.read(prefixed(settings, topics.WATCH_EVENTS)):
            headers: Any = message.headers() or []
            record = InputRecord(
                message.offset() or 0,
                message.key(),
                message.value(),
                message.timestamp()[1],
                tuple((name, value or b"") for name, value in headers),
            )
            records[message.partition() or 0].append(record)
        for message in reader.read(prefixed(settings, topics.WATCH_POSITIONS)):
            item = Recorded(message.offset() or 0, decode_position(message.value()))
            positions[message.partition() or 0].append(item)
    positions = {p: items[sum(len(log.positions[p]) for log in earlier) :] for p, items in positions.items()}
    ends = {
        p: max([r.offset + 1 for r in records[p][-1:]] + [item.item.position for item in positions[p]], default=0)
        for p in records
    }
    return Log(ids[topics.WATCH_EVENTS], records, ends, positions)


def reference(
    settings: Settings, logs: list[Log], limits: Mapping[int, int] | None = None, past: Result | None = None
) -> Result:
    """What these logs give one after the other. `limits`: only the records below these offsets, by partition.

    past: what `expect_controls` found in topics of controls that were deleted.
    """
    ids = topic_ids(settings, [topics.USER_CONTROLS, topics.WATCH_POSITIONS])
    result = Result()
    for partition in range(settings.partitions):
        table = StateTable()
        for log in logs:
            _apply(settings, {**ids, topics.WATCH_EVENTS: log.topic_id}, log, partition, table, result, limits)
        changes = table.take_changed()
        result.states |= {
            key.decode(): value for key, value in zip(changes.keys, changes.values, strict=True) if value is not None
        }
    expect_controls(settings, result)
    if past is not None:
        result.letters |= past.letters
        result.controls |= past.controls
    return result


def left_behind(settings: Settings) -> Result:
    """What the workers left: the newest state of every viewer, all requests, all dead letters, all positions."""
    result = Result()
    with TopicReader(settings) as reader:
        for message in reader.read(prefixed(settings, topics.INTERESTS_CHANGELOG)):
            user, value = (message.key() or b"").decode(), message.value()
            if value is None:
                result.states.pop(user, None)
            else:
                result.states[user] = value
        for message in reader.read(prefixed(settings, topics.REFRESH_REQUESTS)):
            _add_request(result, message.value())
        for name in (topics.WATCH_EVENTS, topics.USER_CONTROLS):
            for message in reader.read(prefixed(settings, topics.dead_letters_of(name))):
                result.letters.add(message.key() or b"")
        for message in reader.read(prefixed(settings, topics.WATCH_POSITIONS)):
            item = decode_position(message.value())
            if item.source_offset >= 0:
                result.controls.add((item.source_topic, message.partition() or 0, item.source_offset))
    return result


def compare(expected: Result, found: Result) -> Differences:
    """What is missing, too much or other than it must be."""
    users = expected.states.keys() | found.states.keys()
    counted = {user: (_events(expected.states.get(user)), _events(found.states.get(user))) for user in users}
    differing = sorted(user for user in users if expected.states.get(user) != found.states.get(user))
    missing = sorted(expected.requests.keys() - found.requests.keys())
    extra = sorted(found.requests.keys() - expected.requests.keys())
    both = expected.requests.keys() & found.requests.keys()
    contents = sorted(identity for identity in both if expected.requests[identity] != found.requests[identity])
    examples = [
        *(f"state of {u}: {_changed(expected.states.get(u), found.states.get(u))}" for u in differing[:SHOWN]),
        *(f"request {identity} is missing" for identity in missing[:SHOWN]),
        *(f"request {identity} is not the log's" for identity in extra[:SHOWN]),
        *(f"request {identity} has other contents" for identity in contents[:SHOWN]),
        *(f"control at {place} has no position" for place in sorted(expected.controls - found.controls)[:SHOWN]),
    ]
    return Differences(
        over=sum(max(0, has - must) for must, has in counted.values()),
        under=sum(max(0, must - has) for must, has in counted.values()),
        states_differing=len(differing),
        requests_missing=len(missing),
        requests_extra=len(extra),
        requests_differing=len(contents),
        letters_missing=len(expected.letters - found.letters),
        letters_extra=len(found.letters - expected.letters),
        controls_missing=len(expected.controls - found.controls),
        examples=tuple(examples),
    )


def behind(expected: Result, found: Result) -> list[str]:
    """Viewers whose stored state lacks an event that `expected`, the reference up to the committed offsets, has."""
    return sorted(user for user, value in expected.states.items() if _marker(found.states.get(user)) < _marker(value))


def _apply(
    settings: Settings,
    ids: dict[str, str],
    log: Log,
    partition: int,
    table: StateTable,
    result: Result,
    limits: Mapping[int, int] | None,
) -> None:
    configuration, registry = load_configuration(settings, ids)
    handler = WatchHandler(configuration, partition, registry, table)
    for recorded in log.positions[partition]:
        handler.schedule.add(recorded)
    limit = log.ends[partition] if limits is None else limits[partition]
    for record in log.records[partition]:
        if record.offset < limit:
            _keep(handler.handle([record]), result)
    _keep(handler.handle([], limit), result)


def _keep(batches: Iterable[Batch], result: Result) -> None:
    for output in (output for batch in batches for output in batch.outputs):
        if output.topic == topics.REFRESH_REQUESTS:
            _add_request(result, output.value)
        elif output.topic == topics.dead_letters_of(topics.WATCH_EVENTS):
            result.letters.add(output.key or b"")


def expect_controls(settings: Settings, result: Result) -> None:
    """Add the controls that the topic holds now, and the dead letters of those that cannot be read."""
    topic_id = topic_ids(settings, [topics.USER_CONTROLS])[topics.USER_CONTROLS]
    topic = prefixed(settings, topics.USER_CONTROLS)
    with TopicReader(settings) as reader:
        for message in reader.read(topic):
            if topics.BOOTSTRAP_END_HEADER in (message.headers() or ()):
                result.controls.add((topic_id, message.partition() or 0, message.offset() or 0))
                continue
            decoded = decode_control(message.value(), message.key(), append_time=message.timestamp()[1])
            if isinstance(decoded, Rejected):
                result.letters.add(f"{topic}/{message.partition()}/{message.offset()}".encode())
            else:
                result.controls.add((topic_id, message.partition() or 0, message.offset() or 0))


def _add_request(result: Result, value: bytes | None) -> None:
    identity = orjson.loads(value or b"{}")["request_id"]
    result.requests[identity].add(value or b"")


def _events(value: bytes | None) -> int:
    return 0 if value is None else int(from_bytes(value)["events"])


def _marker(value: bytes | None) -> int:
    return -1 if value is None else int(from_bytes(value)["watch_offset"])


def _changed(expected: bytes | None, found: bytes | None) -> str:
    """Names of the fields that differ, with the values of those that are single numbers."""
    if expected is None or found is None:
        return "absent" if found is None else "not of the log"
    must, has = from_bytes(expected), from_bytes(found)
    names = [name for name in must.dtype.names or () if must[name].tobytes() != has[name].tobytes()]
    return ", ".join(f"{n} {has[n]} not {must[n]}" if must[n].shape == () else n for n in names[:12])
