"""`personas dlq`: list, show, replay and purge dead letters."""

from __future__ import annotations

import re
import sys
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

import click
import orjson

from agents.dead_letter_log import (
    SUFFIX,
    Cut,
    Entry,
    NotReplayableError,
    Replayer,
    cut_for,
    dead_letter_topics,
    delete_before,
    entry_of,
    replayable,
)
from agents.kafka_admin import KafkaRefused, KafkaUnavailable, prefixed
from agents.settings import Settings, load_settings
from agents.topic_reader import TopicReader
from streams.decoding import printable
from streams.mapping import iso_milliseconds

UNREADABLE: Final = "unreadable"
"""Shown as the reason of a record that is no dead letter of ours."""
_AGE: Final = re.compile(r"(\d{1,6})([smhd])")
_UNIT_MS: Final = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


class _Time(click.ParamType):
    """An age like 30m, 2h or 7d, or an ISO 8601 time; gives milliseconds UTC."""

    name = "age or time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ANN401
        if isinstance(value, int):
            return value
        if age := _AGE.fullmatch(value):
            return int(time.time() * 1_000) - int(age[1]) * _UNIT_MS[age[2]]
        try:
            return iso_milliseconds(value)
        except ValueError:
            self.fail(f"{value!r} is neither an age (30m, 2h, 7d) nor an ISO 8601 time", param, ctx)


@dataclass(frozen=True, slots=True)
class Filter:
    """Which letters are meant. since and before: append time, ms; key: of the original record. None: any."""

    topic: str | None = None
    reason: str | None = None
    since: int | None = None
    before: int | None = None
    key: str | None = None

    def meets(self, entry: Entry) -> bool:
        """Whether a letter is one of those meant; its topic is not looked at."""
        return (
            (self.reason is None or _reason(entry) == self.reason)
            and (self.since is None or entry.timestamp >= self.since)
            and (self.before is None or entry.timestamp < self.before)
            and (self.key is None or (entry.letter is not None and _bytes(entry.letter.key) == self.key.encode()))
        )


_FILTERS: Final = (
    click.option("--topic", metavar="NAME", help="Only this source topic, or this dead-letter topic."),
    click.option("--reason", metavar="REASON", help="Only letters of this reason."),
    click.option(
        "--since", type=_Time(), metavar="AGE|TIME", help="Only letters from then on: 30m, 2h, 7d or ISO 8601."
    ),
    click.option("--before", type=_Time(), metavar="AGE|TIME", help="Only letters older than that."),
    click.option("--key", metavar="USER", help="Only letters of records with this key, which is the user id."),
)
_json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")


def _filters(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the filters as options; it gets them as fields of `Filter`."""
    for option in reversed(_FILTERS):
        command = option(command)
    return command


@click.group()
def dlq() -> None:
    """List, show, replay and purge dead letters: the records that could not be used, with the reason.

    \b
    personas dlq list --since 1d
    personas dlq show watch-events 0 12
    personas dlq replay --topic watch-events --reason key_mismatch --dry-run
    personas dlq purge --before 7d
    """


@dlq.command("list")
@_filters
@_json_option
def list_(as_json: bool, **filters: Any) -> None:  # noqa: ANN401
    """Count dead letters by topic and reason, with the position of the latest of each.

    \b
    personas dlq list
    personas dlq list --topic watch-events --since 2h --json
    personas dlq list --key ann
    """
    settings, wanted = load_settings(), Filter(**filters)
    counts: dict[str, Counter[str]] = {name: Counter() for name in _topics(settings, wanted.topic)}
    latest: dict[tuple[str, str], str] = {}
    with _one_line_errors(), TopicReader(settings) as log:
        for entry in _entries(log, counts, wanted):
            counts[entry.topic][_reason(entry)] += 1
            latest[entry.topic, _reason(entry)] = f"{entry.partition} {entry.offset}"
    if as_json:
        click.echo(
            orjson.dumps(
                {"total": sum(map(Counter.total, counts.values())), "topics": counts},
                option=orjson.OPT_INDENT_2,
            )
        )
        return
    for name, reasons in counts.items():
        click.echo(f"{name}: {reasons.total()}")
        for found, count in reasons.most_common():
            click.echo(f"  {count:>8}  {found:<24} latest: {name} {latest[name, found]}")


@dlq.command()
@click.argument("topic")
@click.argument("partition", type=click.IntRange(min=0))
@click.argument("offset", type=click.IntRange(min=0))
@_json_option
def show(topic: str, partition: int, offset: int, as_json: bool) -> None:
    """Show one dead letter: where it came from, why, and its payload as text or hexadecimal.

    TOPIC is the source topic or its dead-letter topic; PARTITION and OFFSET are those of the letter, as
    `personas dlq list` prints them.

    \b
    personas dlq show watch-events 0 12
    """
    settings = load_settings()
    (name,) = _topics(settings, topic)
    with _one_line_errors(), TopicReader(settings) as log:
        message = log.read_one(name, partition, offset)
    if message is None:
        click.echo(f"error: {name} holds no record at partition {partition}, offset {offset}", err=True)
        sys.exit(1)
    entry = entry_of(message)
    if as_json:
        click.echo(orjson.dumps(_document(entry), option=orjson.OPT_INDENT_2))
    else:
        _print(entry)


@dlq.command()
@_filters
@click.option("--by-key", is_flag=True, help="To the partition of the key, as after `personas repartition`.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent, send nothing.")
@_json_option
def replay(by_key: bool, dry_run: bool, as_json: bool, **filters: Any) -> None:  # noqa: ANN401
    """Send the original records back to their source topics, to the partition and with the key they had.

    A letter that does not hold its whole record (64 KiB of value, 1 KiB of key) is passed over and counted.
    Each replayed record carries the header `replayed-from`. Replaying twice sends twice. Records from before a
    change of the partition count go with --by-key: to where their keys belong now.

    \b
    personas dlq replay --topic watch-events --reason unknown_schema_version --dry-run
    personas dlq replay --topic watch-events --since 1d
    personas dlq replay --key ann

    Exit status 1 if a record could not be sent.
    """
    settings, wanted = load_settings(), Filter(**filters)
    sent: Counter[str] = Counter()
    passed_over: Counter[str] = Counter()
    with _one_line_errors(), TopicReader(settings) as log:
        replayer = Replayer(settings, (lambda name: len(log.partitions(name))) if by_key else None)
        try:
            for entry in _entries(log, _topics(settings, wanted.topic), wanted):
                try:
                    record = replayable(entry)
                except NotReplayableError as error:
                    passed_over[str(error)] += 1
                    click.echo(f"passed over {entry.position}: {error}", err=True)
                    continue
                sent[record.topic] += 1
                if not dry_run:
                    replayer.send(record)
        finally:  # what was handed over is delivered also after an interruption
            replayer.finish()
    for position, cause in replayer.failed:
        click.echo(f"error: {position} was not sent: {cause}", err=True)
    failed = len(replayer.failed)
    if as_json:
        result = {"dry_run": dry_run, "sent": sent, "passed_over": passed_over.total(), "failed": failed}
        click.echo(orjson.dumps(result, option=orjson.OPT_INDENT_2))
    else:
        for name, count in sent.items():
            click.echo(f"{'would send' if dry_run else 'sent'} {count} to {name}")
        click.echo(f"passed over {passed_over.total()}, failed {failed}")
    if failed:
        sys.exit(1)


@dlq.command()
@_filters
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, delete nothing.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@_json_option
def purge(dry_run: bool, yes: bool, as_json: bool, **filters: Any) -> None:  # noqa: ANN401
    """Delete dead letters for good.

    Kafka deletes only the beginning of a topic, up to a letter. So the letters meant must be the oldest ones: where
    others stand before them, nothing is deleted and those are counted. Letters that arrive meanwhile stay. Without
    purging, letters are deleted after 28 days.

    \b
    personas dlq purge --before 7d --dry-run
    personas dlq purge --topic watch-events --yes
    personas dlq purge --topic watch-events --reason not_json

    Exit status 1 if other letters are in the way, or Kafka refused.
    """
    settings, wanted = load_settings(), Filter(**filters)
    with _one_line_errors():
        with TopicReader(settings) as log:
            cuts = [
                cut_for(name, map(entry_of, log.read(name)), wanted.meets, _reason)
                for name in _topics(settings, wanted.topic)
            ]
        cuts = [cut for cut in cuts if cut.chosen]
        _refuse_to_delete_others(cuts)
        chosen = sum(cut.chosen for cut in cuts)
        if chosen and not dry_run:
            if not yes:
                click.confirm(f"Delete {chosen} dead letters for good?", abort=True, err=True)
            delete_before(settings, cuts)
    if as_json:
        result = {"dry_run": dry_run, "deleted": {cut.topic: cut.chosen for cut in cuts}}
        click.echo(orjson.dumps(result, option=orjson.OPT_INDENT_2))
        return
    for cut in cuts:
        click.echo(f"{'would delete' if dry_run else 'deleted'} {cut.chosen} of {cut.topic}")
    if not cuts:
        click.echo("no such dead letters")


def _refuse_to_delete_others(cuts: Iterable[Cut]) -> None:
    """Exit with 1 if letters that are not meant would be deleted too."""
    blocked = [cut for cut in cuts if cut.others]
    for cut in blocked:
        reasons = ", ".join(f"{reason} {count}" for reason, count in cut.others.most_common())
        click.echo(
            f"error: {cut.others.total()} other letters of {cut.topic} stand before the last of the {cut.chosen} meant "
            f"({reasons}), and Kafka deletes only from a topic's beginning; nothing was deleted. Replay or keep what "
            "is needed of them (`personas dlq replay`, `personas dlq show`), then purge by --topic and --before alone",
            err=True,
        )
    if blocked:
        sys.exit(1)


def _entries(log: TopicReader, topics: Iterable[str], wanted: Filter) -> Iterator[Entry]:
    for topic in topics:
        yield from filter(wanted.meets, map(entry_of, log.read(topic, wanted.since)))


def _topics(settings: Settings, topic: str | None) -> list[str]:
    """Dead-letter topics meant by `--topic`: all, or the one of that name, with or without suffix and prefix."""
    known = dead_letter_topics(settings)
    if topic is None:
        return known
    full = topic if topic.endswith(SUFFIX) else f"{topic}{SUFFIX}"
    for candidate in (full, prefixed(settings, full)):
        if candidate in known:
            return [candidate]
    sources = ", ".join(name.removesuffix(SUFFIX) for name in known)
    raise click.UsageError(f"{topic!r} has no dead-letter topic; these have: {sources}")


def _reason(entry: Entry) -> str:
    return UNREADABLE if entry.letter is None else printable(entry.letter.reason)


def _document(entry: Entry) -> dict[str, object]:
    document: dict[str, object] = {
        "topic": entry.topic,
        "partition": entry.partition,
        "offset": entry.offset,
        "timestamp": entry.timestamp,
    }
    if entry.letter is None:
        return document | {"unreadable": entry.unreadable}
    return (
        document
        | asdict(entry.letter)
        | {
            "key_text": _text(_bytes(entry.letter.key)),
            "payload_text": _text(_bytes(entry.letter.payload)),
        }
    )


def _print(entry: Entry) -> None:
    appended = datetime.fromtimestamp(entry.timestamp / 1_000, UTC).isoformat(timespec="milliseconds")
    click.echo(f"letter   {entry.topic} partition {entry.partition} offset {entry.offset}, {appended}")
    letter = entry.letter
    if letter is None:
        click.echo(f"unreadable: {printable(entry.unreadable)}")
        return
    source = printable(letter.source_topic)
    click.echo(f"source   {source} partition {letter.source_partition} offset {letter.source_offset}")
    click.echo(f"reason   {printable(letter.reason)}: {printable(letter.detail)}")
    click.echo(f"key      {_shown(_bytes(letter.key))}")
    click.echo(f"length   {letter.length}, SHA-256 {printable(letter.sha256)}")
    click.echo("payload")
    click.echo(_shown(_bytes(letter.payload)))


def _bytes(encoded: str | None) -> bytes | None:
    """The bytes behind base64 text; text that is no base64 as it is."""
    if encoded is None:
        return None
    try:
        return b64decode(encoded, validate=True)
    except ValueError:
        return encoded.encode(errors="replace")


def _text(content: bytes | None) -> str | None:
    """`content` as text, None if it is not UTF-8."""
    try:
        return None if content is None else content.decode()
    except UnicodeDecodeError:
        return None


def _shown(content: bytes | None) -> str:
    """`content` for a terminal: text with control characters escaped, else a hexadecimal dump."""
    if content is None:
        return "(none)"
    text = _text(content)
    if text is None:
        return "\n".join(_hex_lines(content))
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _hex_lines(content: bytes) -> Iterator[str]:
    for start in range(0, len(content), 16):
        row = content[start : start + 16]
        characters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{start:08x}  {row.hex(' '):<47}  {characters}"


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (KafkaUnavailable, KafkaRefused) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
