"""The log that every runner reads, and the arithmetic of rates, segments, recovery, latency and soak."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path

import numpy as np
import orjson
import pytest

from benchmarks import latency, recovery, soak
from benchmarks.throughput.event_log import Shape, cached_log, cluster_of_video, columns, lines
from benchmarks.throughput.figures import NotMeasuredError, Sample, bars, middle, rate
from benchmarks.throughput.report import FIRST_NAMES, Results, document, markdown
from benchmarks.throughput.runners import RUNNERS, Run
from benchmarks.throughput.segments import HEADER, LogContent, topic_content
from streams.decoding import Decoded, decode_event
from streams.state import RING, from_bytes, pack

SHAPE = Shape(users=500, events=5000, seed=3)


def test_every_event_is_one_the_worker_accepts_and_its_video_is_in_a_cluster() -> None:
    clusters = cluster_of_video()
    for line in lines(Shape(users=50, events=300)):
        event = orjson.loads(line)
        decoded = decode_event(line, event["user_id"].encode(), append_time=event["ts"])
        assert isinstance(decoded, Decoded)
        assert not decoded.clamped
        assert event["video_id"] in clusters
        assert 200 <= len(line) <= 250


def test_the_log_is_in_order_of_time_and_its_event_ids_are_unique() -> None:
    events = [orjson.loads(line) for line in lines(SHAPE)]
    assert len(events) == SHAPE.events
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
    assert len({event["event_id"] for event in events}) == SHAPE.events


@pytest.mark.parametrize("users", [10, 500, 30_000])
def test_no_viewer_has_more_than_its_share(users: int) -> None:
    shape = Shape(users, events=20_000)
    counts = np.bincount(columns(shape)["viewer"], minlength=users)
    assert counts.sum() == shape.events
    assert counts.max() <= shape.most_events
    assert shape.most_events <= max(1, shape.events * max(1e-4, 3 / users))


def test_activity_differs_between_viewers_and_videos_in_popularity() -> None:
    events = columns(SHAPE)
    counts = np.bincount(events["viewer"], minlength=SHAPE.users)
    assert np.percentile(counts, 90) > 4 * np.percentile(counts, 10)
    seen = np.sort(np.bincount(events["video"]))[::-1]
    assert seen[: len(seen) // 10].sum() > 0.25 * SHAPE.events


def test_a_session_is_of_one_viewer_and_lasts() -> None:
    events = columns(SHAPE)
    viewers: dict[int, int] = {}
    for session, viewer in zip(events["session"].tolist(), events["viewer"].tolist(), strict=True):
        assert viewers.setdefault(session, viewer) == viewer
    assert 3 < SHAPE.events / len(viewers) < 8


def test_the_same_shape_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    shape = Shape(users=20, events=100)
    path = cached_log(shape, tmp_path)
    assert path.read_bytes() == b"".join(line + b"\n" for line in lines(shape))
    assert cached_log(shape, tmp_path) == path
    assert cached_log(Shape(users=20, events=100, seed=2), tmp_path).read_bytes() != path.read_bytes()


def test_a_rate_is_taken_between_steps_of_progress_within_the_window() -> None:
    # 50 a step and second from the second 5 on; the last step waits for a timer.
    steps = [(at, 50 * max(0, at - 4)) for at in range(24)] + [(40, 1000)]
    measured = rate([Sample(float(at), done, at / 2) for at, done in steps], 1000)
    assert measured.events == 950 - 100
    assert measured.per_second == pytest.approx(50.0)
    assert measured.cpu_us == pytest.approx(0.5 / 50 * 1e6)


def test_too_few_steps_are_no_measurement() -> None:
    samples = [Sample(0.0, 0, 0.0), Sample(1.0, 500, 1.0), Sample(2.0, 1000, 2.0)]
    with pytest.raises(NotMeasuredError, match="too few events"):
        rate(samples, 1000)


def test_bars_are_met_missed_or_open() -> None:
    found = {bar.asked: bar.met for bar in bars({"ours": 100_000.0, "quixstreams": 25_000.0, "ours_1m": None})}
    assert found["10k viewers, events a second"] is True
    assert found["10k viewers, times quixstreams"] is False
    assert found["10k viewers, times bytewax"] is None
    assert found["1M viewers, events a second"] is None


def test_the_document_begins_with_the_agreed_names() -> None:
    measured = rate([Sample(float(at), 100 * at, at / 4) for at in range(11)], 1000)
    run = Run(measured, 2.0, LogContent(records=600, bytes=90_000), 1000, 1000)
    results = Results("command", 60.0, {"ours": [run], "bytewax": []}, {"ours": [], "bytewax": ["no disk"]}, ["a log"])
    found = document(results)
    names = [*FIRST_NAMES, "cpu_us_per_event", "changelog_records_per_event"]
    assert list(found)[: len(names)] == names
    assert found["ours"] == 100
    assert found["bytewax"] is None
    assert found["changelog_records_per_event"] == 0.6
    text = markdown(results)
    assert "no disk" in text
    assert next(runner.title for runner in RUNNERS if runner.name == "ours") in text
    assert middle([]) is None


def _batch(records: int, *, marker: bool = False, payload: int = 100) -> bytes:
    length = HEADER.size - 12 + payload
    header = HEADER.pack(0, length, 0, 2, 0, 0x20 if marker else 0, records - 1, 0, 0, 7, 0, 0, records)
    return header + b"\xff" * payload


def test_segments_are_counted_without_markers_and_what_is_allocated_ahead(tmp_path: Path) -> None:
    for name, content in {
        "states-0": _batch(5) + _batch(1, marker=True) + bytes(500),
        "states-1": _batch(3),
        "states-more-0": _batch(9),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "00000000000000000000.log").write_bytes(content)
    found = topic_content(tmp_path, "states")
    assert (found.records, found.markers, found.batches) == (8, 1, 3)
    assert found.bytes == 3 * len(_batch(1))
    assert struct.calcsize(">q") == 8


def test_the_states_to_recover_are_full_and_differ() -> None:
    stored = dict(recovery.records(pack, 0, 30, 0))
    states = [from_bytes(value) for value in stored.values()]
    assert list(stored) == [b"u%07d" % number for number in range(30)]
    for number, state in enumerate(states):
        assert len({int(cluster) for cluster in state["cluster"] if cluster >= 0}) == recovery.CLUSTERS
        assert int(state["ring_used"]) == RING
        assert int(state["events"]) == recovery.events_of(number, 0)
    assert len(set(stored.values())) == 30
    assert int(from_bytes(next(recovery.records(pack, 3, 4, 7))[1])["events"]) == recovery.events_of(3, 7)


def test_bars_of_recovery_are_limits_from_above_but_for_the_ratio() -> None:
    fast = recovery.Figures(
        users=1_000_000,
        value_bytes=1500,
        base=recovery.Recovery(0.1, 10**8),
        memory_store=recovery.Recovery(20.0, 10**8 + 2_000_000_000),
        disk_cold=recovery.Recovery(25.0, 2 * 10**8),
        disk_warm=recovery.Recovery(3.5, 2 * 10**8),
        stock_users=50_000,
        stock=2_000.0,
    )
    assert [bar.met for bar in fast.bars()] == [True, True, True, False]
    assert fast.document()["stock_ratio"] == 25.0
    assert fast.document()["bytes_per_user"] == 2000


def test_quantiles_of_delays() -> None:
    assert latency.quantiles([]) == (None, None)
    assert latency.quantiles(range(101)) == (50.0, 99.0)


def test_commit_age_is_the_time_since_the_oldest_uncommitted_event_could_be_there() -> None:
    age = soak.CommitAge(partitions=1)
    assert age.observe(0.0, [100], [100]) == 0.0
    assert age.observe(1.0, [200], [100]) == 1.0  # the event at 100 came after second 0
    assert age.observe(2.0, [300], [100]) == 2.0
    assert age.observe(3.0, [400], [250]) == 2.0  # the one at 250 came after second 1
    assert age.observe(4.0, [400], [400]) == 0.0


def test_memory_growth_looks_past_the_warm_up() -> None:
    life = soak.Life(0.0, [(float(at), 100 if at < 20 else 200) for at in range(100)])
    assert life.growth() == 0.0
    life.memory += [(100.0 + at, 220) for at in range(100)]
    assert life.growth() == pytest.approx(0.1)
    assert soak.Life(0.0, [(1.0, 5)]).growth() is None


def test_kills_are_spread_over_the_middle_and_repeatable() -> None:
    times = soak.kill_times(5, 1000.0, seed=1)
    assert times == sorted(times) == soak.kill_times(5, 1000.0, seed=1)
    assert times[0] >= 100
    assert times[-1] <= 900
    assert Counter(int((at - 100) // 160) for at in times) == Counter(range(5))
