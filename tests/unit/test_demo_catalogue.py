"""The demo catalogue: broad, varied, well-formed, and safe to show."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import orjson
import pytest

import agents
from agents.clusters.build import is_sensitive
from agents.clusters.catalogue import read_catalogue

CATALOGUE = Path(agents.__file__).parent / "data" / "demo_catalogue.jsonl"
FIELDS = {"video_id", "title", "tags", "category", "topic"}


@pytest.fixture(scope="module")
def videos() -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in CATALOGUE.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def by_topic(videos: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    topics: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for video in videos:
        topics[video["topic"]].append(video)
    return topics


def test_is_small_enough_to_ship() -> None:
    assert CATALOGUE.stat().st_size < 600_000


def test_importer_reads_every_line(videos: list[dict[str, Any]]) -> None:
    catalogue = read_catalogue(CATALOGUE)
    assert not catalogue.bad_lines
    assert not catalogue.duplicates
    assert [video.title for video in catalogue.videos] == [video["title"] for video in videos]


def test_has_many_topics_of_twenty_videos_or_more(by_topic: dict[str, list[dict[str, Any]]]) -> None:
    assert len(by_topic) >= 90
    assert {topic: len(rows) for topic, rows in by_topic.items() if len(rows) < 20} == {}


def test_ids_are_unique_and_ascending(videos: list[dict[str, Any]]) -> None:
    assert [video["video_id"] for video in videos] == [f"v{number:04d}" for number in range(1, len(videos) + 1)]


def test_titles_are_unique_whatever_their_case(videos: list[dict[str, Any]]) -> None:
    counts = Counter(video["title"].casefold() for video in videos)
    assert [title for title, count in counts.items() if count > 1] == []


def test_fields_are_complete_and_tidy(videos: list[dict[str, Any]]) -> None:
    for video in videos:
        assert set(video) == FIELDS
        texts = [video["title"], video["topic"], *video["tags"], *video["category"]]
        assert all(text and text == " ".join(text.split()) for text in texts), video
        assert 2 <= len(set(video["tags"])) == len(video["tags"]) <= 4, video
        assert all(tag == tag.lower() for tag in video["tags"]), video
        assert len(video["category"]) == 1, video


def test_titles_of_a_topic_do_not_share_a_template(by_topic: dict[str, list[dict[str, Any]]]) -> None:
    for topic, rows in by_topic.items():
        starts = Counter(tuple(row["title"].lower().split()[:3]) for row in rows)
        assert max(starts.values()) <= 4, topic


def test_tags_vary_within_a_topic(by_topic: dict[str, list[dict[str, Any]]]) -> None:
    for topic, rows in by_topic.items():
        assert len({frozenset(row["tags"]) for row in rows}) >= len(rows) // 3, topic


def test_a_topic_has_one_category(by_topic: dict[str, list[dict[str, Any]]]) -> None:
    categories = {topic: {row["category"][0] for row in rows} for topic, rows in by_topic.items()}
    assert {topic: names for topic, names in categories.items() if len(names) != 1} == {}
    assert 12 <= len(set().union(*categories.values())) <= 18


def test_nothing_is_about_a_sensitive_topic(videos: list[dict[str, Any]]) -> None:
    named = [video["video_id"] for video in videos if is_sensitive([video["title"].lower(), *video["tags"]], [])]
    assert named == []
