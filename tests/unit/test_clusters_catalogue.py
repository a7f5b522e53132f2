from __future__ import annotations

import gzip
from pathlib import Path

import orjson
import pytest

from agents.clusters.catalogue import BadLine, CatalogueError, Video, catalogue_of, read_catalogue
from agents.clusters.embedding import video_text
from agents.clusters.events import read_watches

LINES = [
    b'{"video_id": "b", "title": "Second", "tags": ["x", "x", " y "], "category": "Food|Baking", "topic": "truth"}',
    b"",
    b"not json",
    b"[1, 2]",
    b'{"title": "no id"}',
    b'{"video_id": 7, "title": "number"}',
    b'{"video_id": "c", "title": ["list"]}',
    b'{"video_id": "d", "tags": [1]}',
    b'{"video_id": "a", "title": "  First \\n line "}',
    b'{"video_id": "b", "title": "Second, again", "tags": null}',
    b'{"video_id": "' + b"x" * 513 + b'"}',
    b'{"video_id": "e", "title": "half \\ud800 pair"}',
]


def test_json_lines_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "videos.jsonl"
    path.write_bytes(b"\n".join(LINES))
    read = read_catalogue(path)
    assert read.videos == (Video("a", "First line"), Video("b", "Second, again"))
    assert [line.number for line in read.bad_lines] == [3, 4, 5, 6, 7, 8, 11, 12]
    assert all(line.reason for line in read.bad_lines)
    assert read.duplicates == (1,)
    assert read.name == "videos.jsonl"


def test_every_format_gives_the_same_catalogue(tmp_path: Path) -> None:
    plain = tmp_path / "v.jsonl"
    plain.write_bytes(
        b'{"video_id":"a","title":"One, two","tags":["x","y"],"category":["Food"]}\n{"video_id":"b","title":"Tab"}\n'
    )
    packed = tmp_path / "v.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    comma = tmp_path / "v.csv"
    comma.write_text(
        'other,title,video_id,tags,category\n1,"One, two",a,x|y,Food\n\n2,Tab,b,,\n3,short\n', encoding="utf-8-sig"
    )
    tab = tmp_path / "V.TSV"
    tab.write_text("video_id\ttitle\ttags\tcategory\na\tOne, two\tx; y\tFood\nb\tTab\t\t\n")
    read = [read_catalogue(path) for path in (plain, packed, comma, tab)]
    assert all(catalogue.videos == read[0].videos for catalogue in read)
    assert read[0].videos[0] == Video("a", "One, two", ("x", "y"), ("Food",))
    assert len({catalogue.checksum for catalogue in read}) == 1
    assert read[2].bad_lines == (BadLine(5, "2 columns, the first line has 5"),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v.jsonl", b"", "no usable line"),
        ("v.jsonl", b"nonsense\n", "line 1: not JSON"),
        ("v.csv", b"id,title\n1,x\n", "no video_id column"),
        ("v.csv", b"", "no video_id column"),
        ("v.csv", b"video_id,title\n1,caf\xe9\n", "not UTF-8"),
        ("v.csv", b"video_id,title\n1,x\n1," + b"x" * 17 * 2**20 + b"\n", "line 3"),
        ("v.jsonl.gz", b"no gzip", "no gzip file"),
        ("v.jsonl.gz", gzip.compress(b'{"video_id":"a"}\n' * 999)[:-9], "cut short"),
        ("v.jsonl.gz", gzip.compress(b'{"video_id":"a"}\n' * 9)[:12] + b"\xff\xff\xff\xff", "damaged"),
    ],
)
def test_a_useless_file_is_refused_with_its_name_and_reason(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CatalogueError, match=message) as caught:
        read_catalogue(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="No such file"):
        read_catalogue(tmp_path / "absent.jsonl")


def test_rows_in_memory_follow_the_same_rules() -> None:
    read = catalogue_of("topic", [{"video_id": "a", "title": None}, {}, {"video_id": "a", "title": "later"}])
    assert read.videos == (Video("a", "later"),)
    assert [line.number for line in read.bad_lines] == [2]
    assert read.duplicates == (1,)
    assert catalogue_of("nothing", []).videos == ()


@pytest.mark.parametrize(
    ("title", "text"),
    [
        ("Heat (1995)", "Heat"),
        ("Best of 2023 [1999] mix", "Best of mix"),
        ("2001", "2001"),
        ("1080 pixels and 12345", "1080 pixels and 12345"),
    ],
)
def test_years_leave_the_embedded_text(title: str, text: str) -> None:
    assert video_text(title) == text


def test_tags_and_categories_follow_the_title() -> None:
    assert video_text("Loaf (2020)", ("bread", "oven"), ("Food",)) == "Loaf. bread, oven. Food"
    assert video_text("", (), ("Food",)) == "Food"
    assert video_text("  ") == ""


def test_watches_are_counted_per_viewer(tmp_path: Path) -> None:
    events = [
        {"user_id": "u1", "video_id": "a"},
        {"user_id": "u1", "video_id": "a", "action": "play"},
        {"user_id": "u1", "video_id": "b", "action": "not_interested"},
        {"user_id": "u2", "video_id": "b"},
        {"user_id": "u2", "video_id": "c"},
        {"video_id": "a"},
    ]
    path = tmp_path / "e.jsonl"
    path.write_bytes(b"\n".join(orjson.dumps(event) for event in events) + b"\nbroken\n")
    watches = read_watches(path)
    assert (watches.viewers, watches.total, watches.bad_lines) == (2, 4, 2)
    shares, viewers = watches.by_cluster({"a": 0, "b": 1, "c": -1}, 3)
    assert shares.tolist() == [1.0, 1.0, 0.0]
    assert viewers.tolist() == [1, 1, 0]


def test_tabular_events_count_alike(tmp_path: Path) -> None:
    path = tmp_path / "e.tsv.gz"
    path.write_bytes(gzip.compress(b"ts\tuser_id\tvideo_id\n1\tu1\ta\n2\tu1\tb\n3\tu2\tb\n"))
    shares, viewers = read_watches(path).by_cluster({"a": 0, "b": 1}, 2)
    assert shares.tolist() == [0.5, 1.5]
    assert viewers.tolist() == [1, 2]


def test_events_without_a_usable_line_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_bytes(b'{"user_id": "u"}\n')
    with pytest.raises(CatalogueError, match="no usable event"):
        read_watches(path)


def test_control_characters_and_endless_tags_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    row = {"video_id": "a", "title": "\x1b[31mred\u202e evil\x07", "tags": ["x" * 5000, "\u200b", "fine"]}
    path.write_bytes(orjson.dumps(row) + b"\n")
    (video,) = read_catalogue(path).videos
    assert video.title == "[31mred evil"
    assert video.tags == ("x" * 200, "fine")
