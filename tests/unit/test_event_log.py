"""The watches of a file of events."""

from __future__ import annotations

from typing import Any

import orjson

from agents.clusters.files import PACKAGED
from agents.event_log import load_event_log
from agents.settings import Settings
from tests.request_samples import NOON


def event(number: int, **changed: object) -> dict[str, Any]:
    """A whole watch of a video of cluster 0 at a second of its own."""
    return {
        "schema_version": 1,
        "event_id": f"event-{number}",
        "user_id": "viewer",
        "video_id": f"video-{number}",
        "cluster_id": 0,
        "action": "play",
        "watch_ms": 100_000,
        "duration_ms": 100_000,
        "ts": NOON + 1000 * number,
        **changed,
    }


def watched(*events: object) -> list[tuple[str, int]]:
    log = load_event_log([orjson.dumps(one) for one in events], Settings(registry=PACKAGED))
    return [(event.video_id, cluster) for event, cluster in log.watches()]


def test_watches_come_in_the_order_of_the_log_with_their_clusters() -> None:
    assert watched(event(2), event(1, cluster_id=3)) == [("video-2", 0), ("video-1", 3)]


def test_an_event_that_was_sent_twice_counts_once() -> None:
    assert watched(event(1), event(2), event(1)) == [("video-1", 0), ("video-2", 0)]


def test_a_playback_counts_once_however_many_heartbeats_it_has() -> None:
    beats = [event(n, video_id="one", playback_id="playback") for n in range(4)]
    assert watched(*beats) == [("one", 0)]


def test_what_is_no_watch_is_left_out() -> None:
    assert (
        watched(
            event(1, watch_ms=100),
            event(2, traffic="bot"),
            event(3, cluster_id=-1),
            event(4, user_id=""),
            {"no": "event"},
        )
        == []
    )
