"""The demo's viewers and its recount, which must be able to find a fault."""

from __future__ import annotations

from itertools import islice
from typing import Any

import orjson

from agents.demo.recount import _expected
from agents.demo.run import _catalogue_by_topic, _due
from agents.demo.story import CLAIMS_CHANGE
from agents.demo.viewers import SHIFT_AT, demo_viewers, watches
from agents.replay import append_times
from streams.records import Rule

ROWS = _catalogue_by_topic()
NOW = 1_780_000_000_000


def first(user_id: str, count: int) -> list[dict[str, Any]]:
    (viewer,) = [v for v in demo_viewers(list(ROWS), 4, 2, seed=7) if v.user_id == user_id]
    return list(islice(watches(viewer, ROWS, NOW, seed=7), count))


def topics_of(events: list[dict[str, Any]]) -> list[str]:
    topic = {row["video_id"]: name for name, rows in ROWS.items() for row in rows}
    return [topic[event["video_id"]] for event in events]


def test_tastes_shift_where_they_are_scripted_to() -> None:
    maya = topics_of(first("maya", 400))
    noah = topics_of(first("noah", 400))
    before, after = maya[:SHIFT_AT], maya[SHIFT_AT:]
    assert before.count("Sourdough baking") > 0.2 * len(before)
    assert after.count("Bouldering") > 0.25 * len(after)
    assert after.count("Sourdough baking") < 0.1 * len(after)
    assert noah[200:].count("Chess endgames") > 0.2 * 200


def test_scripts_are_deterministic_in_order_and_in_the_past() -> None:
    events = first("drifter-01", 200)
    assert events == first("drifter-01", 200)
    times = [event["ts"] for event in events]
    assert times == sorted(times)
    assert times[-1] < NOW
    assert len({event["event_id"] for event in events}) == 200


def test_casual_viewers_stay_below_the_gate() -> None:
    assert 3 <= len(first("casual-001", 1000)) < 20


def test_the_pace_never_goes_back() -> None:
    due = [_due(second / 4, 1.4, casual=False) for second in range(-4, 400)]
    assert due == sorted(due)
    assert due[0] == 0


def test_the_recount_counts_repeats_once_and_broken_lines_never() -> None:
    lines = [orjson.dumps(event) for event in first("maya", 10)]
    counts, repeats = _expected([*lines, lines[3], b"not json", b"[]", b'{"user_id": "casual-001"}', None])
    assert (counts, repeats) == ({"maya": 10}, 1)


def test_only_rules_that_claim_a_change_count_against_a_stable_viewer() -> None:
    assert set(CLAIMS_CHANGE) == {Rule.DRIFT, Rule.FOLLOW_UP, Rule.AGE}


def test_one_absurd_time_does_not_drive_the_clock_of_a_replay() -> None:
    day = 86_400_000
    far = NOW + 4000 * day
    assert append_times([NOW, NOW + day, far, NOW + 2 * day, None]) == [
        NOW,
        NOW + day,
        NOW + day,
        NOW + 2 * day,
        NOW + 2 * day,
    ]
    assert append_times([NOW + day, NOW]) == [NOW + day, NOW + day]
    assert append_times([NOW, NOW + 300 * day]) == [NOW, NOW + 300 * day]
    assert append_times([None, None]) == [0, 0]
    assert append_times([]) == []
