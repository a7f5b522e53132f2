"""Turns public and home-grown files into watch events: CSV, TSV, JSON lines and MovieLens, plain or gzipped.

Every row is judged by the decoder that the workers use, so what is written here is accepted there. Rows are read one
at a time; memory holds 16 bytes an event, the set of viewers and videos, and the catalogue. Events are spooled beside
the output in the order read. If that is time order the spool becomes the output; otherwise it is copied once more,
sorted by ts, equal times in the order read. The output appears whole or not at all.

A rating (0.5 to 5) says that a video was watched and liked or not: 4 and more is `thumbs_up`, 2 and less is
`thumbs_down`, anything between is `play` with a `watch_fraction` of rating / 5.
"""

from __future__ import annotations

import csv
import gzip
import io
import mmap
import shutil
import sys
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, Final, NamedTuple

import numpy as np
import orjson

from agents.clusters.catalogue import Video, catalogue_of
from streams.decoding import LATEST_TS, MAXIMUM_TAGS, Rejected, decode_event, printable
from streams.mapping import EVENT_FIELDS, REQUIRED_FIELDS, iso_milliseconds
from streams.records import Action, WatchEvent

STANDARD_STREAM: Final = Path("-")
FORMATS: Final = ("csv", "tsv", "jsonl", "movielens")
TIMESTAMP_UNITS: Final = ("ms", "s", "us", "iso")
LIST_SEPARATOR: Final = "|"
LIKED_FROM, DISLIKED_TO, LOWEST_RATING, HIGHEST_RATING = 4.0, 2.0, 0.5, 5.0
WRONG_COLUMNS: Final = "wrong_columns"
BAD_RATING: Final = "bad_rating"
UNREADABLE_ROW: Final = "unreadable_row"

_SUFFIXES: Final = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".dat": "movielens"}
_INTEGER_FIELDS: Final = frozenset({"watch_ms", "duration_ms", "persona_version", "cluster_id"})
_LIST_FIELDS: Final = frozenset({"tags", "category"})
_TRUE: Final = frozenset({"true", "t", "yes", "y", "1"})
_FALSE: Final = frozenset({"false", "f", "no", "n", "0"})
_DEFAULTS: Final = {f.name: f.default for f in fields(WatchEvent)}


class ImportFileError(ValueError):
    """A file cannot be imported at all; the message says what to do about it."""


class Row(NamedTuple):
    """A row of the input: its line (from 1; the last one of a quoted CSV row) and its values, or what is wrong."""

    line: int
    values: dict[str, Any]
    problem: Rejected | Refused | None = None


class Refused(NamedTuple):
    """Why a row was left out, where the event decoder has no word for it."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class ImportRules:
    """How rows become events.

    columns: our field -> their column, where the names differ (dots reach into JSON objects); constants: our field ->
    text used in every row; timestamp_unit: one of TIMESTAMP_UNITS; rating: their column of ratings, if any.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    timestamp_unit: str = "ms"
    rating: str | None = None

    def column_of(self, name: str) -> str:
        """Their column of our field."""
        return self.columns.get(name, name)


MOVIELENS_RULES: Final = ImportRules(
    columns={"user_id": "userId", "video_id": "movieId", "ts": "timestamp"}, timestamp_unit="s", rating="rating"
)


@dataclass(slots=True)
class ImportSummary:
    """What became of the rows: rows = written + blank + the sum of rejected."""

    rows: int = 0
    written: int = 0
    blank: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    clamped: int = 0
    without_title: int = 0
    users: int = 0
    videos: int = 0
    first_ts: int | None = None
    last_ts: int | None = None
    already_in_order: bool = True


def detect_format(path: Path) -> str:
    """The format of a file or folder by its name. Raises ImportFileError if the name does not tell."""
    if path != STANDARD_STREAM:
        name = path.name.removesuffix(".gz")
        if path.is_dir() or name in ("ratings.csv", "u.data"):
            return "movielens"
        if Path(name).suffix.lower() in _SUFFIXES:
            return _SUFFIXES[Path(name).suffix.lower()]
    raise ImportFileError(f"cannot tell the format of {path} by its name; give --format {'|'.join(FORMATS)}")


def import_events(
    rows: Iterator[Row],
    rules: ImportRules,
    videos: Mapping[str, Video],
    out: Path,
    on_rejected: Callable[[int, Rejected | Refused], None] = lambda line, why: None,
) -> ImportSummary:
    """Write every usable row to `out` (`-` is standard output) as one JSON line, in time order.

    `videos` gives titles, tags and categories where a row has none. `on_rejected` is told the line and the reason of
    each row left out. Without a usable row nothing is written. Raises ImportFileError and OSError.
    """
    summary = ImportSummary()
    users, watched = set[str](), set[str]()
    with _Spool(out) as spool:
        for row in rows:
            summary.rows += 1
            if not row.values and row.problem is None:
                summary.blank += 1
                continue
            result = row.problem or _event_of(row.values, rules, videos)
            if isinstance(result, Rejected | Refused):
                summary.rejected[str(result.reason)] += 1
                on_rejected(row.line, result)
                continue
            event, clamped = result
            spool.add(event.ts, _line(event))
            summary.clamped += clamped
            summary.without_title += event.title is None
            users.add(event.user_id)
            watched.add(event.video_id)
        summary.written = len(spool.times)
        summary.users, summary.videos = len(users), len(watched)
        if spool.times:
            summary.first_ts, summary.last_ts = min(spool.times), max(spool.times)
            summary.already_in_order = spool.in_order
            spool.publish()
    return summary


def _event_of(
    values: Mapping[str, Any], rules: ImportRules, videos: Mapping[str, Video]
) -> tuple[WatchEvent, bool] | Rejected | Refused:
    """The event of a row and whether a value was clamped, or why there is none."""
    found: dict[str, object] = {}
    for name in EVENT_FIELDS:
        value = rules.constants.get(name)
        if value is None:
            value = _look_up(values, rules.column_of(name))
        if value is not None and value != "":
            found[name] = _converted(name, value, rules.timestamp_unit)
    if rules.rating is not None:
        judged = _judged(_look_up(values, rules.rating))
        if isinstance(judged, Refused):
            return judged
        found = judged | found
    _describe(found, videos)
    user_id = found.get("user_id")
    key = user_id.encode("utf-8", "surrogatepass") if isinstance(user_id, str) else None
    # the worker's own judgement; the latest append time, since what counts as the future is the worker's to say
    decoded = decode_event(b"", key, append_time=LATEST_TS, decoder=lambda _: found)
    if isinstance(decoded, Rejected):
        return decoded
    return decoded.record, bool(decoded.clamped)


def _look_up(values: Mapping[str, Any], column: str) -> Any:  # noqa: ANN401
    if column in values or "." not in column:
        return values.get(column)
    value: Any = values
    for step in column.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _converted(name: str, value: object, timestamp_unit: str) -> object:
    """The value as the contract wants it; what cannot be converted stays, for the decoder to refuse."""
    if name == "ts":
        return _milliseconds(value, timestamp_unit)
    if name in _LIST_FIELDS:
        return value.split(LIST_SEPARATOR) if isinstance(value, str) else value
    if name in _INTEGER_FIELDS or name == "watch_fraction":
        return _number(value)
    if name == "autoplay":
        text = str(value).lower() if isinstance(value, str | int) else ""
        return True if text in _TRUE else False if text in _FALSE else value
    return str(value) if type(value) is int else value


def _number(value: object) -> object:
    if not isinstance(value, str) or "_" in value:  # Python would read 1_000
        return value
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    return value


def _milliseconds(value: object, unit: str) -> object:
    if unit == "iso":
        try:
            return iso_milliseconds(value) if isinstance(value, str) else value
        except (ValueError, OverflowError):
            return value
    number = _number(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        return number
    try:
        return round(number * 1_000) if unit == "s" else round(number / 1_000) if unit == "us" else number
    except (ValueError, OverflowError):
        return number


def _judged(rating: object) -> dict[str, object] | Refused:
    number = _number(rating)
    if isinstance(number, bool) or not isinstance(number, int | float):
        return Refused(BAD_RATING, "the rating is not a number")
    if not LOWEST_RATING <= number <= HIGHEST_RATING:
        return Refused(BAD_RATING, f"the rating is not from {LOWEST_RATING} to {HIGHEST_RATING:g}")
    if number >= LIKED_FROM:
        return {"action": Action.THUMBS_UP.value}
    if number <= DISLIKED_TO:
        return {"action": Action.THUMBS_DOWN.value}
    return {"action": Action.PLAY.value, "watch_fraction": number / HIGHEST_RATING}


def _describe(found: dict[str, object], videos: Mapping[str, Video]) -> None:
    """Add what the catalogue knows of the video where the row has nothing."""
    video_id = found.get("video_id")
    video = videos.get(video_id) if isinstance(video_id, str) else None
    if video is None:
        return
    found.setdefault("title", video.title)
    found.setdefault("tags", video.tags[:MAXIMUM_TAGS])
    found.setdefault("category", video.category[:MAXIMUM_TAGS])


def _line(event: WatchEvent) -> bytes:
    given = {name: value for name in EVENT_FIELDS if (value := getattr(event, name)) != _DEFAULTS[name]}
    return orjson.dumps(given, option=orjson.OPT_APPEND_NEWLINE)


# Reading


class Progress(NamedTuple):
    """How far an input has been read: bytes of the file as it lies on the disk; total is None for a stream."""

    position: Callable[[], int]
    total: int | None


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, Progress]]:
    """The content of a plain or gzipped file, or of standard input for `-`. Raises ImportFileError."""
    if path == STANDARD_STREAM:
        yield sys.stdin.buffer, Progress(lambda: 0, None)
        return
    try:
        with path.open("rb") as raw:
            progress = Progress(raw.tell, path.stat().st_size)
            if path.suffix.lower() != ".gz":
                yield raw, progress
                return
            with gzip.open(raw) as content:
                yield content, progress  # type: ignore[misc]  # a GzipFile reads like any binary file
    except gzip.BadGzipFile as error:
        raise ImportFileError(f"{path} is no gzip file ({error}); rename it or compress it again") from error
    except (EOFError, zlib.error) as error:
        raise ImportFileError(f"{path} is damaged or cut short ({error}); fetch it again") from error
    except OSError as error:
        raise ImportFileError(f"cannot read {path}: {error.strerror or error}") from error


def read_rows(content: BinaryIO, file_format: str, rules: ImportRules) -> Iterator[Row]:
    """The rows of a CSV, TSV or JSON-lines file. Raises ImportFileError if a table lacks a column that is needed."""
    if file_format == "jsonl":
        return _json_rows(content)
    return _table_rows(content, file_format, rules)


def _json_rows(content: BinaryIO) -> Iterator[Row]:
    for number, line in enumerate(content, start=1):
        if not line.strip():
            yield Row(number, {})
            continue
        try:
            values = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            yield Row(number, {}, Refused("not_json", printable(str(error))))
            continue
        if isinstance(values, dict):
            yield Row(number, values or {"": None})  # an empty object lacks every field, it is not a blank line
        else:
            yield Row(number, {}, Refused("not_an_object", "the line is JSON, but no object"))


def _table_rows(content: BinaryIO, file_format: str, rules: ImportRules) -> Iterator[Row]:
    # bytes that are no UTF-8 become lone surrogates, which the decoder refuses in ids and blanks out in titles
    text = io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline="")
    dialect: dict[str, Any] = {} if file_format == "csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(text, **dialect)
    header = next(reader, [])
    _check_header(header, rules)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(reader.line_num, {}, Refused(UNREADABLE_ROW, f"{error}; check the quotes"))
            continue
        if cells and len(cells) != len(header):
            detail = f"{len(cells)} columns, the first line has {len(header)}"
            yield Row(reader.line_num, {}, Refused(WRONG_COLUMNS, detail))
            continue
        yield Row(reader.line_num, dict(zip(header, cells, strict=False)))


def _check_header(header: Sequence[str], rules: ImportRules) -> None:
    shown = printable(", ".join(header)) or "nothing"
    needed = [name for name in REQUIRED_FIELDS if name not in rules.constants]
    for name in [*needed, *(name for name in rules.columns if name not in needed)]:
        column = rules.column_of(name)
        if column not in header:
            raise ImportFileError(
                f"no column {column!r} for {name}; the first line has {shown}. Name it with --map {name}=COLUMN"
            )
    if rules.rating is not None and rules.rating not in header:
        raise ImportFileError(f"no column {rules.rating!r} for --rating; the first line has {shown}")


# MovieLens: ratings.csv (ml-latest, ml-25m, ml-32m), ratings.dat (ml-1m, ml-10m), u.data (ml-100k)


def movielens_ratings(path: Path) -> Path:
    """The ratings file of a MovieLens folder, or `path` itself if it is a file. Raises ImportFileError."""
    if not path.is_dir():
        return path
    for name in ("ratings.csv", "ratings.csv.gz", "ratings.dat", "ratings.dat.gz", "u.data", "u.data.gz"):
        if (path / name).is_file():
            return path / name
    raise ImportFileError(f"{path} holds no ratings.csv, ratings.dat or u.data; unpack a MovieLens archive there")


def movielens_rows(content: BinaryIO, ratings: Path) -> Iterator[Row]:
    """The rows of a ratings file; `ratings` is its path, which tells the variant."""
    name = ratings.name.removesuffix(".gz")
    if name.endswith(".csv"):
        return _table_rows(content, "csv", MOVIELENS_RULES)
    return _rating_rows(content, b"::" if name.endswith(".dat") else b"\t")


def _rating_rows(content: BinaryIO, separator: bytes) -> Iterator[Row]:
    columns = ("userId", "movieId", "rating", "timestamp")
    for number, line in enumerate(content, start=1):
        if not line.strip():
            yield Row(number, {})
            continue
        cells = line.decode("utf-8", "surrogateescape").strip("\r\n").split(separator.decode())
        if len(cells) != len(columns):
            yield Row(number, {}, Refused(WRONG_COLUMNS, f"{len(cells)} columns, a rating has {len(columns)}"))
            continue
        yield Row(number, dict(zip(columns, cells, strict=True)))


def movielens_videos(ratings: Path) -> dict[str, Video]:
    """Titles and genres from the film list beside the ratings file; empty if there is none."""
    for name, read in (("movies.csv", _films_csv), ("movies.dat", _films_dat), ("u.item", _films_item)):
        for path in (ratings.parent / name, ratings.parent / f"{name}.gz"):
            if path.is_file():
                with opened(path) as (content, _):
                    films = catalogue_of(name, list(read(content, path.parent)))
                return {video.video_id: video for video in films.videos}
    return {}


def _films_csv(content: BinaryIO, folder: Path) -> Iterator[dict[str, Any]]:
    for row in csv.DictReader(io.TextIOWrapper(content, encoding="utf-8-sig", errors="replace", newline="")):
        yield _film(row.get("movieId") or "", row.get("title") or "", (row.get("genres") or "").split("|"))


def _films_dat(content: BinaryIO, folder: Path) -> Iterator[dict[str, Any]]:
    for line in content:
        cells = _text(line).split("::")
        if len(cells) == 3:
            yield _film(cells[0], cells[1], cells[2].split("|"))


def _films_item(content: BinaryIO, folder: Path) -> Iterator[dict[str, Any]]:
    genres = _genre_names(folder / "u.genre")
    for line in content:
        cells = _text(line).split("|")
        if len(cells) > 5:
            flags = zip(genres, cells[5:], strict=False)
            yield _film(cells[0], cells[1], [genre for genre, flag in flags if flag == "1"])


def _genre_names(path: Path) -> list[str]:
    """Genres in the order of the flags of u.item; each line is name|number."""
    if not path.is_file():
        return []
    lines = _text(path.read_bytes()).split()
    return [line.partition("|")[0] for line in lines]


def _film(video_id: str, title: str, genres: list[str]) -> dict[str, Any]:
    return {"video_id": video_id, "title": title, "category": [g for g in genres if not g.startswith("(no genres")]}


def _text(content: bytes) -> str:
    """ml-10m is UTF-8, ml-1m and ml-100k are Latin-1."""
    try:
        return content.decode().strip("\r\n")
    except UnicodeDecodeError:
        return content.decode("latin-1").strip("\r\n")


# Writing


class _Spool:
    """Collects encoded lines beside the output and publishes them in time order."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._path = None if out == STANDARD_STREAM else out.with_name(out.name + ".partial")
        self._file: IO[bytes]
        self.times = array("q")
        self._ends = array("q", [0])
        self.in_order = True

    def __enter__(self) -> _Spool:
        self._file = tempfile.TemporaryFile() if self._path is None else self._path.open("w+b")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def add(self, ts: int, line: bytes) -> None:
        """Append a line; times must come in order for `in_order` to hold."""
        if self.times and ts < self.times[-1]:
            self.in_order = False
        self.times.append(ts)
        self._ends.append(self._ends[-1] + len(line))
        self._file.write(line)

    def publish(self) -> None:
        """Put the output in its place; standard output gets the lines."""
        self._file.flush()
        if self._path is None:
            self._copy(sys.stdout.buffer)
            sys.stdout.buffer.flush()
        elif self.in_order:
            self._path.replace(self._out)
        else:
            self._publish_sorted(self._path.with_suffix(".sorted"))

    def _publish_sorted(self, path: Path) -> None:
        try:
            with path.open("wb") as target:
                self._copy(target)
            path.replace(self._out)
        finally:
            path.unlink(missing_ok=True)

    def _copy(self, target: IO[bytes]) -> None:
        if self.in_order:
            self._file.seek(0)
            shutil.copyfileobj(self._file, target)
            return
        order = np.argsort(np.frombuffer(self.times, dtype=np.int64), kind="stable")
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            for index in order:
                target.write(lines[self._ends[index] : self._ends[index + 1]])
