"""Reads who watched what in an event file: counts for the clusters' viewers and prior, and the order of clusters."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson
from scipy.sparse import csr_array

from agents.clusters.catalogue import CatalogueError
from streams.records import UNASSIGNED, Traffic
from streams.registry import Registry

_DELIMITERS: Final = {".csv": ",", ".tsv": "\t"}
_LINES_PER_REPORT: Final = 100_000
_DIGITS: Final = 19
_NOT_WATCHED: Final = frozenset({"skip", "thumbs_down", "not_interested"})


@dataclass(frozen=True, slots=True)
class WatchCounts:
    """Watches by (viewer number, video id). `bad_lines`: lines without a user_id and video_id."""

    name: str
    counts: Mapping[tuple[int, str], int]
    viewers: int
    bad_lines: int

    @property
    def total(self) -> int:
        """All watches."""
        return sum(self.counts.values())

    def by_cluster(
        self, clusters: Mapping[str, int], count: int
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Viewers' shares summed per cluster, (count,), and distinct viewers per cluster, (count,).

        `clusters` gives each video's cluster; watches of videos outside any (missing or negative) are left out.
        """
        of_viewer: dict[int, Counter[int]] = {}
        for (viewer, video_id), watches in self.counts.items():
            cluster = clusters.get(video_id, -1)
            if cluster >= 0:
                of_viewer.setdefault(viewer, Counter())[cluster] += watches
        shares = np.zeros(count)
        viewers = np.zeros(count, np.int64)
        for counter in of_viewer.values():
            whole = counter.total()
            for cluster, watches in counter.items():
                shares[cluster] += watches / whole
                viewers[cluster] += 1
        return shares, viewers

    def by_video(self, video_ids: Sequence[str]) -> csr_array:
        """Who watched which video: (len(video_ids), viewers), 1 where they did."""
        rows = {video_id: row for row, video_id in enumerate(video_ids)}
        pairs = [(rows[video_id], viewer) for viewer, video_id in self.counts if video_id in rows]
        of_video, viewer = np.array(pairs, np.intp).reshape(-1, 2).T
        return csr_array((np.ones(len(pairs), np.int32), (of_video, viewer)), shape=(len(video_ids), self.viewers))


@dataclass(frozen=True, slots=True)
class WatchLog:
    """Watches in clusters of a registry, (n,) each: numbers of viewers from 0, cluster ids, times in ms.

    unplaced: watches of videos in no cluster. `bad_lines`: lines without a user_id, a video_id and a time.
    """

    name: str
    viewers: npt.NDArray[np.int64]
    clusters: npt.NDArray[np.int64]
    times: npt.NDArray[np.int64]
    unplaced: int
    bad_lines: int


def read_log(path: Path, registry: Registry, progress: Callable[[int], None] | None = None) -> WatchLog:
    """Read an event file as `read_watches` does, with `ts` in ms; an event's own `cluster_id` goes before its video's.

    Clusters of earlier versions of the registry stand for their successors. progress: told the lines read so far.
    Raises CatalogueError if the file cannot be read or has no watch in any cluster.
    """
    viewers: dict[str, int] = {}
    who, videos, own, when = array("q"), list[str](), array("q"), array("q")
    bad_lines = 0
    for number, row in enumerate(_file_rows(path), start=1):
        if progress is not None and number % _LINES_PER_REPORT == 0:
            progress(number)
        user_id, video_id, ts = row.get("user_id"), row.get("video_id"), _whole(row.get("ts"))
        if not (isinstance(user_id, str) and user_id and isinstance(video_id, str) and video_id) or ts is None:
            bad_lines += 1
        elif _is_watch(row):
            who.append(viewers.setdefault(user_id, len(viewers)))
            videos.append(video_id)
            when.append(ts)
            cluster = _whole(row.get("cluster_id"))
            own.append(UNASSIGNED if cluster is None else registry.successor_of(cluster))
    clusters = np.where(np.array(own, np.int64) >= 0, np.array(own, np.int64), registry.clusters_of(videos))
    placed = clusters >= 0
    if not placed.any():
        raise CatalogueError(
            f"{path} has no watch of a video in a cluster ({bad_lines} bad lines, {len(videos)} watches of videos that "
            "the registry does not hold); each event needs user_id, video_id and ts in ms"
        )
    return WatchLog(
        path.name,
        np.array(who, np.int64)[placed],
        clusters[placed].astype(np.int64),
        np.array(when, np.int64)[placed],
        int(np.count_nonzero(~placed)),
        bad_lines,
    )


def _whole(value: object) -> int | None:
    """A whole number of at least 0, as JSON or CSV give it; None for anything else, and for one beyond 63 bits."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= _DIGITS:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def read_watches(path: Path) -> WatchCounts:
    """Count an event file: .csv and .tsv with user_id and video_id columns, everything else JSON lines; .gz may
    follow.

    Skips, dislikes, and what bots and tests did do not count. Raises CatalogueError if the file cannot be read or has
    no usable line.
    """
    counts: Counter[tuple[int, str]] = Counter()
    viewers: dict[str, int] = {}
    bad_lines = 0
    for row in _file_rows(path):
        user_id, video_id = row.get("user_id"), row.get("video_id")
        if not (isinstance(user_id, str) and user_id and isinstance(video_id, str) and video_id):
            bad_lines += 1
        elif _is_watch(row):
            counts[viewers.setdefault(user_id, len(viewers)), video_id] += 1
    if not counts:
        raise CatalogueError(f"{path} has no usable event ({bad_lines} bad lines); each needs user_id and video_id")
    return WatchCounts(path.name, counts, len(viewers), bad_lines)


def _is_watch(row: Mapping[str, Any]) -> bool:
    """As workers apply events: bots and tests are no viewers."""
    action, traffic = row.get("action"), row.get("traffic")
    return not (isinstance(action, str) and action in _NOT_WATCHED) and traffic in (None, "", Traffic.ORGANIC)


def _file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            yield from _rows(path, stream)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise CatalogueError(f"cannot read the events {path}: {error}") from error


def _rows(path: Path, stream: Any) -> Iterator[Mapping[str, Any]]:  # noqa: ANN401
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    delimiter = _DELIMITERS.get(suffixes[-1] if suffixes else "")
    if delimiter is not None:
        yield from csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=delimiter)
        return
    yield from _json_rows(stream)


def _json_rows(lines: Iterable[bytes]) -> Iterator[Mapping[str, Any]]:
    for line in lines:
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            row = None
        yield row if isinstance(row, dict) else {}
