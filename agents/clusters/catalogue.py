"""Reads a catalogue of videos: JSON lines, CSV or TSV, plain or gzipped. Lines that cannot be used are
reported, not fatal.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import orjson

_MAXIMUM_ID_BYTES: Final = 512
_MAXIMUM_TITLE: Final = 1_000
_MAXIMUM_LABELS: Final = 64
_MAXIMUM_LABEL: Final = 200
_MOST_READ: Final = 256
"""Labels of a video that are looked at, repeats and empty ones among them."""
_LONGEST_FIELD: Final = 16 * 2**20
_DELIMITERS: Final = {".csv": ",", ".tsv": "\t"}
_LIST_SEPARATORS: Final = re.compile(r"[|;]")


class CatalogueError(ValueError):
    """A catalogue that cannot be read at all; the message says what to do about it."""


@dataclass(frozen=True, slots=True)
class Video:
    """A video as the catalogue describes it. The title may be empty if tags or categories speak for it."""

    video_id: str
    title: str = ""
    tags: tuple[str, ...] = ()
    category: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line (counted from 1) that was left out, and why."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The usable videos, by id; of a repeated id the last line counts, and `duplicates` holds the earlier line
    numbers.

    `checksum` is of the usable videos, so it does not depend on the file's format or the order of its lines.
    """

    name: str
    checksum: str
    videos: tuple[Video, ...]
    bad_lines: tuple[BadLine, ...] = ()
    duplicates: tuple[int, ...] = ()


class _Reader:
    """Collects rows under the rules that all formats share."""

    def __init__(self) -> None:
        self._videos: dict[str, tuple[int, Video]] = {}
        self._bad_lines: list[BadLine] = []
        self._duplicates: list[int] = []

    def add(self, number: int, row: Mapping[str, Any]) -> None:
        try:
            video = _video(row)
        except ValueError as error:
            self.refuse(number, str(error))
            return
        if video.video_id in self._videos:
            self._duplicates.append(self._videos[video.video_id][0])
        self._videos[video.video_id] = (number, video)

    def refuse(self, number: int, reason: str) -> None:
        self._bad_lines.append(BadLine(number, reason))

    def catalogue(self, name: str) -> Catalogue:
        videos = tuple(self._videos[video_id][1] for video_id in sorted(self._videos))
        checksum = sha256()
        for video in videos:
            checksum.update(orjson.dumps(video))
        return Catalogue(name, checksum.hexdigest(), videos, tuple(self._bad_lines), tuple(self._duplicates))


class _FieldReader(_Reader):
    """Collects one field of the rows as well."""

    def __init__(self, field: str) -> None:
        super().__init__()
        self.values: dict[str, tuple[str, ...]] = {}
        self._field = field

    def add(self, number: int, row: Mapping[str, Any]) -> None:
        try:
            video = _video(row)
            value = row.get(self._field)
            values = _labels({self._field: str(value) if isinstance(value, int | float) else value}, self._field)
        except ValueError as error:
            self.refuse(number, str(error))
            return
        self.values.pop(video.video_id, None)
        if values:
            self.values[video.video_id] = values


def read_catalogue(path: Path) -> Catalogue:
    """Read a catalogue; its columns or fields are video_id, title, tags, category, and others are ignored.

    The format follows the file name: .csv and .tsv (with a header line), everything else JSON lines; .gz
    may follow. In CSV and TSV, tags and categories are separated by | or ;. Raises CatalogueError if the
    file is missing, is no text, lacks the video_id column, or has no usable line.
    """
    reader = _Reader()
    _read_into(path, reader)
    catalogue = reader.catalogue(path.name)
    if not catalogue.videos:
        raise CatalogueError(f"{path} has no usable line{_first(catalogue.bad_lines)}; each needs at least a video_id")
    return catalogue


def read_field(path: Path, field: str) -> dict[str, tuple[str, ...]]:
    """The values of any one field or column of a catalogue, by video id, read as tags are; numbers as text.

    Videos without the field, and lines that `read_catalogue` leaves out, are missing. Raises CatalogueError as that
    does, and if no video has the field.
    """
    reader = _FieldReader(field)
    _read_into(path, reader)
    if not reader.values:
        raise CatalogueError(f"no video of {path} has a field {field!r}; name one that the file holds")
    return reader.values


def _read_into(path: Path, reader: _Reader) -> None:
    delimiter = _DELIMITERS.get(_format_suffix(path))
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            if delimiter is None:
                _read_json_lines(stream, reader)
            else:
                _read_table(path, io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter, reader)
    except gzip.BadGzipFile as error:
        raise CatalogueError(f"{path} is no gzip file ({error}); rename it or compress it again") from error
    except (EOFError, zlib.error) as error:
        raise CatalogueError(f"{path} is damaged or cut short ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise CatalogueError(f"{path} is not UTF-8 text ({error.reason}); convert it first") from error
    except OSError as error:
        raise CatalogueError(f"cannot read the catalogue {path}: {error.strerror}") from error


def catalogue_of(name: str, rows: Iterable[Mapping[str, Any]]) -> Catalogue:
    """A catalogue from rows already in memory, under the same rules; it may be empty. Rows count from 1."""
    reader = _Reader()
    for number, row in enumerate(rows, start=1):
        reader.add(number, row)
    return reader.catalogue(name)


def _first(bad_lines: Sequence[BadLine]) -> str:
    return f" (line {bad_lines[0].number}: {bad_lines[0].reason})" if bad_lines else ""


def _format_suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""


def _read_json_lines(stream: Iterable[bytes], reader: _Reader) -> None:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            reader.refuse(number, f"not JSON: {error}")
            continue
        if not isinstance(row, dict):
            reader.refuse(number, "not a JSON object")
            continue
        reader.add(number, row)


def _read_table(path: Path, stream: Iterable[str], delimiter: str, reader: _Reader) -> None:
    limit = csv.field_size_limit(_LONGEST_FIELD)  # of the whole process, so it is put back
    rows = csv.reader(stream, delimiter=delimiter)
    try:
        header = next(rows, [])
        if "video_id" not in header:
            columns = "video_id, title, tags, category"
            raise CatalogueError(f"{path} has no video_id column; its first line must name the columns: {columns}")
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                reader.refuse(rows.line_num, f"{len(row)} columns, the first line has {len(header)}")
                continue
            reader.add(rows.line_num, dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise CatalogueError(f"{path} line {rows.line_num}: {error}; check its quotes") from error
    finally:
        csv.field_size_limit(limit)


def _video(row: Mapping[str, Any]) -> Video:
    video_id = row.get("video_id")
    if not isinstance(video_id, str) or not video_id.strip():
        raise ValueError("video_id is missing or no text")
    if len(_utf8(video_id)) > _MAXIMUM_ID_BYTES:
        raise ValueError(f"video_id is longer than {_MAXIMUM_ID_BYTES} bytes")
    title = row.get("title") or ""
    if not isinstance(title, str):
        raise ValueError("title is no text")
    title = _clean(title)[:_MAXIMUM_TITLE]
    _utf8(title)
    return Video(video_id, title, _labels(row, "tags"), _labels(row, "category"))


def _labels(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = row.get(name) or ()
    if isinstance(value, str):
        value = _LIST_SEPARATORS.split(value)
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name} is neither text nor a list of texts")
    clean = dict.fromkeys(_clean(item)[:_MAXIMUM_LABEL] for item in value[:_MOST_READ])
    for item in clean:
        _utf8(item)
    # Many videos share a label: one copy of it serves all.
    return tuple(sys.intern(item) for item in clean if item)[:_MAXIMUM_LABELS]


def _clean(text: str) -> str:
    """The text on one line, without what a terminal or a page could take for a command."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("text holds half a surrogate pair and cannot be written as UTF-8") from error
