"""Other files become events that the worker accepts, and every row is accounted for."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.cli.import_ import import_
from streams.decoding import Decoded, decode_event
from streams.records import WatchEvent

T0 = 1_362_064_104_000


def run(*arguments: str | Path, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(import_, [str(argument) for argument in arguments], input=stdin)


def imported(
    folder: Path, content: str | bytes, name: str, *options: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary and the events of one import."""
    source, out = folder / name, folder / "events.out"
    source.write_bytes(content.encode() if isinstance(content, str) else content)
    result = run(source, "--out", out, "--json", *options)
    assert result.exit_code == 0, result.output
    summary = orjson.loads(result.stdout)
    assert summary["rows"] == summary["written"] + summary["blank"] + sum(summary["rejected"].values())
    return summary, events_of(out)


def events_of(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def test_csv_with_their_column_names(tmp_path: Path) -> None:
    content = 'viewer,asset,at,name,labels,auto\nu1,v1,1362064104,"Bees, up close",bees|nature,yes\n'
    options = ["--map", "user_id=viewer", "--map", "video_id=asset", "--map", "ts=at", "--map", "title=name"]
    options += ["--map", "tags=labels", "--map", "autoplay=auto", "--constant", "surface=home", "--timestamp-unit", "s"]
    _, events = imported(tmp_path, content, "log.csv", *options)
    assert events == [
        {
            "user_id": "u1",
            "video_id": "v1",
            "ts": T0,
            "surface": "home",
            "autoplay": True,
            "title": "Bees, up close",
            "tags": ["bees", "nature"],
        }
    ]


def test_tsv_takes_quotes_as_they_are(tmp_path: Path) -> None:
    content = f'ts\tuser_id\tvideo_id\ttitle\n{T0}\tu1\tv1\t"Bees" and "honey\n'
    _, events = imported(tmp_path, content, "log.tsv")
    assert events[0]["title"] == '"Bees" and "honey'


def test_json_lines_with_nested_fields(tmp_path: Path) -> None:
    rows = [
        {"profile": {"id": 7}, "video_id": "v1", "ts": T0, "tags": ["a", "b"], "watch_ms": 5},
        {"profile": {"id": "u2"}, "video_id": "v1", "ts": str(T0), "autoplay": False, "watch_fraction": "0.5"},
    ]
    content = b"\n".join(orjson.dumps(row) for row in rows)
    _, events = imported(tmp_path, content, "log.jsonl", "--map", "user_id=profile.id")
    assert events == [
        {"user_id": "7", "video_id": "v1", "ts": T0, "watch_ms": 5, "tags": ["a", "b"]},
        {"user_id": "u2", "video_id": "v1", "ts": T0, "watch_fraction": 0.5},
    ]


@pytest.mark.parametrize(
    ("unit", "text"),
    [
        ("ms", "1362064104000"),
        ("s", "1362064104"),
        ("s", "1362064104.0"),
        ("us", "1362064104000000"),
        ("iso", "2013-02-28T15:08:24Z"),
        ("iso", "2013-02-28 16:08:24+01:00"),
    ],
)
def test_timestamp_units(tmp_path: Path, unit: str, text: str) -> None:
    content = f"user_id,video_id,ts\nu1,v1,{text}\n"
    _, events = imported(tmp_path, content, "log.csv", "--timestamp-unit", unit)
    assert events[0]["ts"] == T0


def test_each_bad_row_is_reported_with_its_line_and_reason(tmp_path: Path) -> None:
    rows = [
        "user_id,video_id,ts,watch_ms,title",
        f'u1,v1,{T0},,"two',  # lines 2 and 3: a quoted line break
        'lines"',
        f"u1,v1,{T0}",  # 4
        ",v1,1362064104000,,",  # 5
        "u1,v1,1362064104,,",  # 6
        "u1,v1,soon,,",  # 7
        "",  # 8
        f"u1,v1,{T0},-5,",  # 9
        f"u1,v1,{T0},1_000,",  # 10
    ]
    content = "\n".join(rows).encode() + b"\nu\xff1,v1,1362064104000,,\nu1,v1,1362064104000,,caf\xe9\n"
    rejects = tmp_path / "rejects.jsonl"
    summary, events = imported(tmp_path, content, "log.csv", "--rejects", str(rejects))
    assert [(entry["line"], entry["reason"]) for entry in events_of(rejects)] == [
        (4, "wrong_columns"),
        (5, "missing_field"),
        (6, "ts_not_milliseconds"),
        (7, "wrong_type"),
        (9, "out_of_range"),
        (10, "wrong_type"),
        (11, "unprintable_id"),
    ]
    assert (summary["rows"], summary["written"], summary["blank"], summary["clamped"]) == (10, 2, 1, 2)
    assert [event["title"] for event in events] == ["two lines", "caf"]


def test_bad_json_lines(tmp_path: Path) -> None:
    good = orjson.dumps({"user_id": "u1", "video_id": "v1", "ts": T0})
    content = b"\n".join([b"{", b"[]", b"", b"{}", b'{"autoplay": []}', good])
    summary, _ = imported(tmp_path, content, "log.jsonl")
    assert summary["rejected"] == {"missing_field": 2, "not_an_object": 1, "not_json": 1}
    assert (summary["written"], summary["blank"]) == (1, 1)


def test_a_cell_beyond_the_limit_costs_one_row(tmp_path: Path) -> None:
    content = f"user_id,video_id,ts,title\nu1,v1,{T0},{'x' * 200_000}\nu2,v1,{T0},short\n"
    summary, events = imported(tmp_path, content, "log.csv")
    assert summary["rejected"] == {"unreadable_row": 1}
    assert [event["user_id"] for event in events] == ["u2"]


def test_rows_out_of_order_are_sorted_and_equal_times_keep_theirs(tmp_path: Path) -> None:
    chance = random.Random(7)
    times = [T0 + chance.randrange(50) for _ in range(500)]
    content = "user_id,video_id,ts\n" + "".join(f"u1,v{number},{ts}\n" for number, ts in enumerate(times))
    summary, events = imported(tmp_path, content, "log.csv")
    assert summary["already_in_order"] is False
    expected = sorted(range(500), key=lambda number: times[number])
    assert [event["video_id"] for event in events] == [f"v{number}" for number in expected]
    assert (summary["first_ts"], summary["last_ts"]) == (min(times), max(times))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.out", "log.csv"], "no spool is left"


def test_rows_in_order_are_kept(tmp_path: Path) -> None:
    content = f"user_id,video_id,ts\nu1,v1,{T0}\nu1,v2,{T0}\nu2,v1,{T0 + 1}\n"
    summary, events = imported(tmp_path, content, "log.csv")
    assert summary["already_in_order"] is True
    assert (summary["users"], summary["videos"]) == (2, 2)
    assert [event["video_id"] for event in events] == ["v1", "v2", "v1"]


def test_the_catalogue_fills_what_a_row_lacks(tmp_path: Path) -> None:
    catalogue = tmp_path / "catalogue.jsonl"
    tags = [f"tag {number}" for number in range(40)]
    catalogue.write_bytes(orjson.dumps({"video_id": "v1", "title": "Bees", "tags": tags, "category": ["Nature"]}))
    content = f"user_id,video_id,ts,title\nu1,v1,{T0},\nu1,v1,{T0},Own title\nu1,v2,{T0},\n"
    summary, events = imported(tmp_path, content, "log.csv", "--catalogue", str(catalogue))
    assert [event.get("title") for event in events] == ["Bees", "Own title", None]
    assert (events[0]["tags"], events[1]["category"]) == (tags[:32], ["Nature"])
    assert (summary["without_title"], summary["clamped"]) == (1, 0)


def test_gzip_and_standard_streams(tmp_path: Path) -> None:
    content = f"user_id,video_id,ts\nu2,v1,{T0 + 1}\nu1,v1,{T0}\n"
    _, from_gzip = imported(tmp_path, gzip.compress(content.encode()), "log.csv.gz")
    result = run("-", "--format", "csv", "--out", "-", "--json", stdin=content.encode())
    assert [orjson.loads(line) for line in result.stdout.splitlines()] == from_gzip
    assert orjson.loads(result.stderr)["written"] == 2


RATINGS = [("1", "31", "4.0", 1_260_759_144), ("1", "29", "2.0", 1_260_759_179), ("2", "31", "3.0", 1_260_759_182)]
EXPECTED: list[dict[str, Any]] = [
    {"user_id": "1", "video_id": "31", "ts": 1_260_759_144_000, "action": "thumbs_up"},
    {"user_id": "1", "video_id": "29", "ts": 1_260_759_179_000, "action": "thumbs_down"},
    {"user_id": "2", "video_id": "31", "ts": 1_260_759_182_000, "watch_fraction": 0.6},
]
TITLES: dict[str, dict[str, Any]] = {
    "31": {"title": "Dangerous Minds (1995)", "category": ["Drama"]},
    "29": {"title": "Café, a (1995)"},
}


def movielens_files(variant: str) -> dict[str, bytes]:
    if variant == "latest":
        ratings = "userId,movieId,rating,timestamp\n" + "".join(",".join(map(str, row)) + "\n" for row in RATINGS)
        movies = 'movieId,title,genres\n31,Dangerous Minds (1995),Drama\n29,"Café, a (1995)",(no genres listed)\n'
        return {"ratings.csv": ratings.encode(), "movies.csv": movies.encode()}
    if variant == "1m":
        ratings = "".join("::".join(map(str, row)) + "\n" for row in RATINGS)
        movies = "31::Dangerous Minds (1995)::Drama\n29::Café, a (1995)::\n"
        return {"ratings.dat": ratings.encode(), "movies.dat": movies.encode("latin-1")}
    ratings = "".join("\t".join(map(str, row)) + "\n" for row in RATINGS)
    movies = "31|Dangerous Minds (1995)|||url|0|1\n29|Café, a (1995)|||url|0|0\n"
    return {"u.data": ratings.encode(), "u.item": movies.encode("latin-1"), "u.genre": b"unknown|0\nDrama|1\n\n"}


@pytest.mark.parametrize("variant", ["latest", "1m", "100k"])
def test_movielens(tmp_path: Path, variant: str) -> None:
    folder = tmp_path / f"ml-{variant}"
    folder.mkdir()
    for name, content in movielens_files(variant).items():
        (folder / name).write_bytes(content)
    out = tmp_path / "events.jsonl"
    result = run(folder, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    assert events_of(out) == [event | TITLES[str(event["video_id"])] for event in EXPECTED]


def test_movielens_counts_bad_ratings(tmp_path: Path) -> None:
    content = b"1\t31\t6\t1260759144\n1\t31\t\t1260759144\n1\t31\n1\t31\t5\t1260759144\n\n1\t31\tnan\t1260759144\n"
    summary, _ = imported(tmp_path, content, "u.data")
    assert summary["rejected"] == {"bad_rating": 3, "wrong_columns": 1}
    assert (summary["written"], summary["blank"], summary["without_title"]) == (1, 1, 1)


def test_a_rating_column_of_any_table(tmp_path: Path) -> None:
    content = f"user_id,video_id,ts,stars,action\nu1,v1,{T0},5,\nu1,v2,{T0},1,skip\n"
    _, events = imported(tmp_path, content, "log.csv", "--rating", "stars")
    assert [event["action"] for event in events] == ["thumbs_up", "skip"], "their own action wins"


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("log.csv", "viewer,video_id,ts\nu1,v1,1\n", [], "no column 'user_id' for user_id; the first line has viewer"),
        ("log.csv", "user_id,video_id,ts\n", ["--map", "title=name"], "no column 'name' for title"),
        ("log.csv", "", [], "the first line has nothing"),
        ("log.csv", "user_id,video_id,ts\n", ["--rating", "stars"], "no column 'stars' for --rating"),
        ("log.xlsx", "PK", [], "cannot tell the format"),
        ("log.csv.gz", "user_id,video_id,ts\n", [], "is no gzip file"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, content: str, options: list[str], message: str) -> None:
    source, out = tmp_path / name, tmp_path / "events.jsonl"
    source.write_text(content)
    result = run(source, "--out", out, *options)
    assert (result.exit_code, message in result.output) == (1, True), result.output
    assert not out.exists()


def test_a_gzip_file_cut_short_leaves_no_output(tmp_path: Path) -> None:
    rows = "".join(f"u{number},v1,{T0 + number}\n" for number in range(20_000))
    source, out = tmp_path / "log.csv.gz", tmp_path / "events.jsonl"
    source.write_bytes(gzip.compress(("user_id,video_id,ts\n" + rows).encode())[:-2_000])
    result = run(source, "--out", out)
    assert (result.exit_code, "cut short" in result.output) == (1, True), result.output
    assert list(tmp_path.iterdir()) == [source]


def test_no_usable_row_keeps_the_old_output(tmp_path: Path) -> None:
    source, out = tmp_path / "log.csv", tmp_path / "events.jsonl"
    source.write_text("user_id,video_id,ts\nu1,v1,1362064104\n")
    out.write_text("old")
    result = run(source, "--out", out)
    assert (result.exit_code, out.read_text()) == (1, "old")
    assert "line 2: ts_not_milliseconds" in result.stderr
    assert "looks like seconds" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--map", "user=viewer"], "'user' is not an event field"),
        (["--map", "user_id"], "must be OURS=VALUE"),
        (["--map", "user_id=a", "--map", "user_id=b"], "gives user_id twice"),
        (["--format", "movielens", "--map", "user_id=a"], "settled for MovieLens"),
    ],
)
def test_wrong_options(tmp_path: Path, options: list[str], message: str) -> None:
    source = tmp_path / "log.csv"
    source.write_text("user_id,video_id,ts\n")
    result = run(source, "--out", tmp_path / "out", *options)
    assert (result.exit_code, message in result.output) == (2, True), result.output


def test_the_input_is_not_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "events.jsonl"
    source.write_bytes(b"{}")
    assert run(source, "--out", source).exit_code == 2
    assert source.read_bytes() == b"{}"


cells = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(["u1", str(T0), "0.5", "nan", "1e400"])


@settings(max_examples=60)
@given(
    rows=st.lists(st.lists(cells, min_size=4, max_size=6), max_size=8), unit=st.sampled_from(["ms", "s", "us", "iso"])
)
def test_whatever_the_cells_each_row_is_in_one_class(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], unit: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    lines = ["user_id\tvideo_id\tts\twatch_fraction\ttags", f"u1\tv1\t{T0}\t\t", *("\t".join(row) for row in rows)]
    source, out = folder / "log.tsv", folder / "out"
    source.write_bytes("\n".join(lines).encode())
    result = run(source, "--out", out, "--json", "--timestamp-unit", unit)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    summary = orjson.loads(result.stdout)
    assert summary["rows"] == summary["written"] + summary["blank"] + sum(summary["rejected"].values())
    for line in out.read_bytes().splitlines() if out.exists() else ():
        user_id = orjson.loads(line)["user_id"]
        decoded = decode_event(line, user_id.encode(), append_time=2 * T0)
        assert isinstance(decoded, Decoded)
        assert isinstance(decoded.record, WatchEvent)
