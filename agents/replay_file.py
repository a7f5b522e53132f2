"""Replay of an event file: the driver over its lines, then the persona writer over its requests, and a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from agents.event_log import LAST_APPEND_TIME, EventLog
from agents.persona_writer import PersonaWriter
from agents.replay import Control, EndBootstrap, Event, Item, ReplayDriver, as_bootstrap
from agents.stores.memory import MemoryStore
from agents.student_client import StudentClient
from agents.teacher_client import TeacherClient
from agents.telemetry import Telemetry
from agents.writer_configuration import WriterConfiguration
from streams import topics
from streams.teaching import TeacherPolicy
from streams.watch import InputRecord, Outcome, Output


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay put out: JSON lines by file name, and the summary."""

    lines: dict[str, list[bytes]]
    summary: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write `requests.jsonl`, `personas.jsonl`, `dead_letters.jsonl` and `summary.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, lines in self.lines.items():
            (folder / name).write_bytes(b"".join(line + b"\n" for line in lines))
        summary = orjson.dumps(self.summary, option=orjson.OPT_INDENT_2)
        (folder / "summary.json").write_bytes(summary + b"\n")


def controls_of(lines: Sequence[bytes]) -> list[Control]:
    """Control lines as records; one without a usable ts takes effect at the end, where it becomes a dead letter."""
    controls = []
    for line in lines:
        try:
            data = orjson.loads(line)
            user_id, ts = data["user_id"].encode(), int(data["ts"])
        except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError):
            user_id, ts = b"", LAST_APPEND_TIME
        controls.append(Control(line, user_id, ts))
    return controls


async def replay_events(
    log: EventLog,
    controls: Sequence[Control],
    *,
    student: StudentClient | None = None,
    teacher: TeacherClient | None = None,
    policy: TeacherPolicy | None = None,
    bootstrap: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Replayed:
    """Run a log's events and controls (each after the events up to its ts) through the handlers and the writer.

    Without a student two runs give the same bytes, and no teacher is asked. policy: what the teacher words at once,
    None: nothing. `progress` is told how many more events were handled.
    """
    driver = ReplayDriver(log.configuration, log.registry)
    for chunk in _chunks(_script(log.records, controls, bootstrap=bootstrap)):
        await driver.run(chunk)
        progress(sum(isinstance(item, Event) for item in chunk))
    requests = driver.outputs(topics.REFRESH_REQUESTS)
    configured = WriterConfiguration(teacher_policy=policy or TeacherPolicy())
    written, figures = await _write_personas(requests, student, teacher, configured)
    letters = [
        output
        for name in (topics.WATCH_EVENTS, topics.USER_CONTROLS)
        for output in driver.outputs(topics.dead_letters_of(name))
    ]
    letters += [output for output in written if output.topic.endswith(topics.dead_letters_of(""))]
    personas = [output for output in written if output.topic == topics.PERSONAS]
    lines = {
        "requests.jsonl": [output.value or b"" for output in requests],
        "personas.jsonl": [_persona_line(output) for output in personas],
        "dead_letters.jsonl": [output.value or b"" for output in letters],
    }
    summary = _summary(driver, log, lines)
    return Replayed(lines, {**summary, "wording": dict(sorted(figures.items()))})


def _script(events: Sequence[Event], controls: Sequence[Control], *, bootstrap: bool) -> Iterator[Item]:
    waiting = sorted(controls, key=lambda control: control.timestamp)
    for event in events:
        while waiting and waiting[0].timestamp < event.timestamp:
            yield waiting.pop(0)
        yield as_bootstrap(event) if bootstrap else event
    if bootstrap:
        yield EndBootstrap()
    yield from waiting


def _chunks(script: Iterator[Item], size: int = 1000) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    for item in script:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    yield chunk


async def _write_personas(
    requests: Sequence[Output],
    student: StudentClient | None,
    teacher: TeacherClient | None,
    configuration: WriterConfiguration,
) -> tuple[list[Output], Mapping[str, int]]:
    """Answer the requests, one after the other without a student: then nothing depends on timing.

    With the outputs come the figures of each tier: see `Cascade.figures`.
    """
    written: list[Output] = []
    clock = _Clock()

    async def publish(outputs: Sequence[Output]) -> None:
        written.extend(outputs)

    writer = PersonaWriter(
        MemoryStore(), student, publish, configuration, clock, Telemetry(None, None), lambda *_: None, teacher
    )
    for offset, output in enumerate(requests):
        clock.now = int(orjson.loads(output.value or b"{}")["as_of"])
        # The clock leaps from request to request while a model words the earlier ones: none of them expires by that.
        await writer.submit(InputRecord(offset, output.key, output.value, LAST_APPEND_TIME), 0)
        if student is None:
            await writer.idle()
    await writer.idle()
    await writer.stop(0.0)
    return written, writer.wording_figures


class _Clock:
    """Time as the log has it."""

    now = 0

    def __call__(self) -> int:
        return self.now


def _summary(driver: ReplayDriver, log: EventLog, written: dict[str, list[bytes]]) -> dict[str, Any]:
    personas = [orjson.loads(line) for line in written["personas.jsonl"]]
    requests = [orjson.loads(line) for line in written["requests.jsonl"]]
    outcomes = {str(outcome): driver.outcomes[outcome] for outcome in Outcome if outcome is not Outcome.DEAD_LETTER}
    return {
        "lines": len(log.records),
        **outcomes,
        "dead_letters": driver.outcomes[Outcome.DEAD_LETTER],
        "dead_letters_by_reason": {str(reason): count for reason, count in sorted(driver.dead_letters.items())},
        "controls_refused": sum(driver.refused_controls.values()),
        "unassigned": driver.unassigned,
        "users": len(driver.states),
        "requests": len(requests),
        "requests_by_rule": dict(sorted(Counter(request["rule"] for request in requests).items())),
        "personas": sum("tier" in persona for persona in personas),
        "personas_by_tier": dict(sorted(Counter(p["tier"] for p in personas if "tier" in p).items())),
        "tombstones": sum("tombstone" in persona for persona in personas),
        "unknown_videos": len({output.key for output in driver.outputs(topics.UNKNOWN_VIDEOS)}),
        "registry_version": log.registry.version,
        "registry_checksum": log.registry.checksum,
        "thresholds": log.configuration.thresholds.name,
    }


def _persona_line(output: Output) -> bytes:
    if output.value is not None:
        return output.value
    reason = dict(output.headers).get("reason", b"").decode()
    return orjson.dumps({"user_id": (output.key or b"").decode(), "tombstone": reason})
