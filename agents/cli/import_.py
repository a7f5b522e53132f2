"""`personas import`: other files to watch events."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO

import click
import orjson
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from agents.clusters.catalogue import CatalogueError, Video, read_catalogue
from agents.importing import (
    FORMATS,
    MOVIELENS_RULES,
    STANDARD_STREAM,
    TIMESTAMP_UNITS,
    ImportFileError,
    ImportRules,
    ImportSummary,
    Progress,
    Refused,
    Row,
    detect_format,
    import_events,
    movielens_ratings,
    movielens_rows,
    movielens_videos,
    opened,
    read_rows,
)
from streams.decoding import Rejected
from streams.mapping import EVENT_FIELDS

SHOWN_REJECTS = 5
"""Rejected rows shown without --rejects."""
ROWS_PER_UPDATE = 2_000


@click.command("import")
@click.argument("file", type=click.Path(exists=True, allow_dash=True, path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Event file to write; - for standard output."
)
@click.option("--format", "file_format", type=click.Choice(["auto", *FORMATS]), default="auto", show_default=True)
@click.option(
    "--map", "mapped", multiple=True, metavar="OURS=THEIRS", help="Our field from their column (or JSON path)."
)
@click.option("--constant", "constants", multiple=True, metavar="OURS=TEXT", help="The same value in every row.")
@click.option(
    "--timestamp-unit",
    type=click.Choice(TIMESTAMP_UNITS),
    help="What their ts is: ms (default), s, us or ISO 8601 text.",
)
@click.option("--rating", metavar="COLUMN", help="Their column of ratings, 0.5 to 5 (MovieLens has it by itself).")
@click.option(
    "--catalogue",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Adds title, tags and category by video_id: JSON lines, CSV or TSV.",
)
@click.option("--rejects", type=click.Path(path_type=Path), help="Write every row left out: line, reason, detail.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def import_(
    file: Path,
    out: Path,
    file_format: str,
    mapped: tuple[str, ...],
    constants: tuple[str, ...],
    timestamp_unit: str | None,
    rating: str | None,
    catalogue: Path | None,
    rejects: Path | None,
    as_json: bool,
) -> None:
    """Turn FILE (CSV, TSV, JSON lines, MovieLens; may be .gz or -) into watch events, sorted by time.

    A column named as one of our fields is that field. Lists are separated by |. Ratings of 4 and more become
    thumbs_up, of 2 and less thumbs_down, the others a play with watch_fraction rating / 5. Rows that cannot be used
    are counted and reported by line; every row is in one class.

    \b
    personas import ml-latest-small/ --out events.jsonl
    personas import log.csv --map user_id=viewer --map ts=at --timestamp-unit s --out events.jsonl
    personas import log.jsonl.gz --map user_id=profile.id --constant traffic=test --out - | head
    personas import log.tsv --catalogue films.jsonl --rejects rejects.jsonl --json --out events.jsonl

    Exit status 1 if nothing can be read or no row can be used, 2 for wrong options.
    """
    rules = ImportRules(_pairs("--map", mapped), _pairs("--constant", constants), timestamp_unit or "ms", rating)
    try:
        summary = _run(file, out, file_format, rules, timestamp_unit, catalogue, rejects)
    except (ImportFileError, CatalogueError) as error:
        raise click.ClickException(str(error)) from error
    except BrokenPipeError:
        raise  # the reader of our output left: click ends quietly
    except OSError as error:
        raise click.ClickException(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    _report(summary, out, as_json)
    if not summary.written:
        sys.exit(1)


def _pairs(option: str, texts: tuple[str, ...]) -> Mapping[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        ours, separator, theirs = text.partition("=")
        if not separator or not theirs:
            raise click.UsageError(f"{option} {text!r} must be OURS=VALUE")
        if ours not in EVENT_FIELDS:
            raise click.UsageError(
                f"{option} {text!r}: {ours!r} is not an event field; they are {', '.join(EVENT_FIELDS)}"
            )
        if ours in pairs:
            raise click.UsageError(f"{option} gives {ours} twice")
        pairs[ours] = theirs
    return pairs


def _run(
    file: Path,
    out: Path,
    file_format: str,
    rules: ImportRules,
    timestamp_unit: str | None,
    catalogue: Path | None,
    rejects: Path | None,
) -> ImportSummary:
    if out != STANDARD_STREAM and out.exists() and file.exists() and out.samefile(file):
        raise click.UsageError("--out is the input file")
    kind = detect_format(file) if file_format == "auto" else file_format
    videos: dict[str, Video] = {}
    if kind == "movielens":
        if rules.columns or rules.rating or timestamp_unit:
            raise click.UsageError("--map, --rating and --timestamp-unit are settled for MovieLens files")
        rules = replace(MOVIELENS_RULES, constants=rules.constants)
        file = movielens_ratings(file)
        videos = movielens_videos(file)
    elif file.is_dir():
        raise click.UsageError(f"{file} is a folder; only --format movielens reads one")
    if catalogue is not None:
        videos |= {video.video_id: video for video in read_catalogue(catalogue).videos}
    with ExitStack() as stack:
        content, progress = stack.enter_context(opened(file))
        rejects_file = None if rejects is None else stack.enter_context(rejects.open("wb"))
        rows = movielens_rows(content, file) if kind == "movielens" else read_rows(content, kind, rules)
        rows = stack.enter_context(_ProgressRows(rows, progress, file.name))
        return import_events(rows, rules, videos, out, _RejectReport(rejects_file))


class _RejectReport:
    """Writes every rejected row to a file, or shows the first few."""

    def __init__(self, target: IO[bytes] | None) -> None:
        self._target = target
        self._shown = 0

    def __call__(self, line: int, why: Rejected | Refused) -> None:
        if self._target is not None:
            entry = {"line": line, "reason": str(why.reason), "detail": why.detail}
            self._target.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
        elif self._shown < SHOWN_REJECTS:
            click.echo(f"line {line}: {why.reason}: {why.detail}", err=True)
        elif self._shown == SHOWN_REJECTS:
            click.echo("more rows are left out; --rejects FILE lists them all", err=True)
        self._shown += 1


class _ProgressRows(Iterator[Row]):
    """Passes rows on and moves a bar on the terminal, if there is one."""

    def __init__(self, rows: Iterator[Row], progress: Progress, name: str) -> None:
        self._rows = rows
        self._progress = progress
        columns = (TextColumn("{task.fields[name]}", markup=False), BarColumn(), "{task.percentage:>3.0f}%")
        console = Console(stderr=True)
        self._bar = ProgressBar(
            *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("", total=progress.total, name=name)
        self._count = 0

    def __enter__(self) -> _ProgressRows:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __next__(self) -> Row:
        self._count += 1
        if self._count % ROWS_PER_UPDATE == 0:
            self._bar.update(self._task, completed=self._progress.position())
        return next(self._rows)


def _report(summary: ImportSummary, out: Path, as_json: bool) -> None:
    if as_json:
        document = {
            "out": str(out),
            "rows": summary.rows,
            "written": summary.written,
            "blank": summary.blank,
            "rejected": dict(sorted(summary.rejected.items())),
            "clamped": summary.clamped,
            "without_title": summary.without_title,
            "users": summary.users,
            "videos": summary.videos,
            "first_ts": summary.first_ts,
            "last_ts": summary.last_ts,
            "already_in_order": summary.already_in_order,
        }
        # standard output may be taken by the events
        click.echo(orjson.dumps(document), err=out == STANDARD_STREAM)
        return
    left_out = summary.rejected.total()
    lines = [
        f"{summary.rows:,} rows: {summary.written:,} events written, {left_out:,} left out, {summary.blank:,} blank"
    ]
    lines += [f"  {reason}: {count:,}" for reason, count in summary.rejected.most_common()]
    if summary.written:
        order = "the file was in time order" if summary.already_in_order else "sorted by time"
        lines.append(f"{summary.users:,} viewers, {summary.videos:,} videos, {order}; {out}")
        if summary.clamped:
            lines.append(f"{summary.clamped:,} events had a value brought into range")
        if summary.without_title:
            lines.append(f"{summary.without_title:,} events have no title; --catalogue adds them")
    else:
        lines.append("no event was written; the reasons above say what to change")
    click.echo("\n".join(lines), err=True)
