"""The graph of transitions: whose steps count, how often, and which edges stay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.transitions import (
    FEWEST_VIEWERS,
    MOST_TAKEN_UP,
    MOST_TRANSITIONS,
    SHRINKAGE,
    TAKEN_UP,
    Ints,
    Transitions,
    _count,
    learn,
    take_ups,
)

IDS = np.array([2, 3, 5, 7, 11], np.int32)
Log = list[tuple[int, int, int]]
"""Viewer, cluster, time."""


def columns(log: Log) -> tuple[Ints, Ints, Ints]:
    viewers, clusters, times = np.array(log, np.int64).reshape(-1, 3).T
    return viewers, clusters, times


def walks(viewers: range, *clusters: int) -> Log:
    """Each viewer takes the clusters up one after the other."""
    return [
        (viewer, cluster, 10 * place + watch)
        for viewer in viewers
        for place, cluster in enumerate(clusters)
        for watch in range(TAKEN_UP)
    ]


def edges(graph: Transitions) -> dict[tuple[int, int], tuple[int, float, float]]:
    sources = np.repeat(IDS, np.diff(graph.offsets)).tolist()
    values = zip(graph.viewers.tolist(), graph.rates.tolist(), graph.lifts.tolist(), strict=True)
    return dict(zip(zip(sources, graph.targets.tolist(), strict=True), values, strict=True))


logs = st.lists(st.tuples(st.integers(0, 60), st.sampled_from([*IDS.tolist(), 99]), st.integers(0, 30)), max_size=400)


def test_an_edge_counts_viewers_in_the_order_in_which_they_went() -> None:
    found = edges(learn(*columns(walks(range(60), 2, 3) + walks(range(100, 130), 3, 5)), IDS))
    assert {edge: viewers for edge, (viewers, *_) in found.items()} == {(2, 3): 60}


@pytest.mark.parametrize(("viewers", "kept"), [(49, False), (50, True)])
def test_an_edge_needs_its_viewers(viewers: int, kept: bool) -> None:
    assert bool(edges(learn(*columns(walks(range(viewers), 2, 3)), IDS))) is kept


def test_no_setting_goes_below_the_floor() -> None:
    with pytest.raises(ValueError, match="at least 20"):
        learn([], [], [], IDS, least_viewers=FEWEST_VIEWERS - 1)


def test_one_viewer_watching_a_lot_is_one_viewer() -> None:
    log = [(1, cluster, 100 * round_ + cluster) for round_ in range(500) for cluster in IDS.tolist()]
    assert not len(learn(*columns(log), IDS, least_viewers=20))


def test_rates_and_lifts_are_those_of_the_formula() -> None:
    log = walks(range(100), 2, 3) + walks(range(100, 200), 5, 7) + walks(range(200, 300), 5, 3)
    viewers, rate, lift = edges(learn(*columns(log), IDS))[2, 3]
    # Take-ups of 2, 5 and 7, none after 3; 200 of them are followed by 3.
    base = 200 / (100 + 200 + 100)
    assert viewers == 100
    assert rate == pytest.approx((100 + SHRINKAGE * base) / (100 + SHRINKAGE))
    assert lift == pytest.approx(rate / base, rel=1e-5)


def test_a_popular_target_pulls_less_than_one_that_follows_more_than_by_chance() -> None:
    """Everybody takes up 3 sooner or later; only those who took up 2 take up 5, and half as many."""
    log = walks(range(100), 2, 3, 5) + walks(range(100, 200), 2, 3) + walks(range(200, 900), 7, 3)
    graph = learn(*columns(log), IDS)
    begin, end = graph.offsets[0], graph.offsets[1]
    assert graph.targets[begin:end].tolist() == [5, 3]
    rates = dict(zip(graph.targets[begin:end].tolist(), graph.rates[begin:end].tolist(), strict=True))
    assert rates[3] > 1.5 * rates[5]


def test_take_ups_of_one_moment_are_no_transition() -> None:
    log = [(viewer, cluster, watch) for viewer in range(60) for cluster in (2, 3) for watch in range(TAKEN_UP)]
    assert not len(learn(*columns(log), IDS))


def test_one_watch_is_no_take_up() -> None:
    log = walks(range(60), 2) + [(viewer, 3, 50) for viewer in range(60)]
    assert not len(learn(*columns(log), IDS))


@given(logs)
def test_a_viewer_contributes_no_more_than_the_bound_and_each_edge_once(log: Log) -> None:
    for viewer in {viewer for viewer, *_ in log}:
        rows, times = take_ups(*columns([watch for watch in log if watch[0] == viewer]), IDS)
        assert rows.shape[0] <= 1
        codes, support = _count(rows, times, len(IDS))
        assert support.sum() <= MOST_TRANSITIONS
        assert (support == 1).all()
        assert len(set(codes.tolist())) == len(codes)


def test_the_bound_is_reached_and_not_passed() -> None:
    many = np.arange(100, dtype=np.int32)
    rows, times = take_ups(*columns(walks(range(1), *range(100))), many)
    _, support = _count(rows, times, len(many))
    assert rows[0].tolist() == list(range(MOST_TAKEN_UP))
    assert support.sum() == MOST_TRANSITIONS


@given(logs, st.randoms(use_true_random=False), st.integers(1, 10**6))
def test_neither_the_order_nor_the_numbers_of_viewers_matter(log: Log, random: object, shift: int) -> None:
    # Enough of each viewer for edges to pass the threshold.
    log = [(viewer + 61 * copy, cluster, ts) for viewer, cluster, ts in log for copy in range(20)]
    other = [(shift * 7 - viewer * 3, cluster, ts) for viewer, cluster, ts in log]
    random.shuffle(other)  # type: ignore[attr-defined]
    first, second = (learn(*columns(each), IDS, least_viewers=20) for each in (log, other))
    for name in ("offsets", "targets", "viewers", "rates", "lifts"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()
    assert first.fault(IDS) is None


@given(logs)
def test_removing_a_viewer_changes_no_support_by_more_than_one(log: Log) -> None:
    rows, times = take_ups(*columns(log), IDS)
    codes, support = _count(rows, times, len(IDS))
    fewer, less = _count(rows[1:], times[1:], len(IDS))
    before = dict(zip(codes.tolist(), support.tolist(), strict=True))
    after = dict(zip(fewer.tolist(), less.tolist(), strict=True))
    assert after.keys() <= before.keys()
    assert all(0 <= value - after.get(code, 0) <= 1 for code, value in before.items())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"offsets": np.array([0, 1])}, "2 offsets for 5 clusters"),
        ({"offsets": np.array([0, 2, 1, 1, 1, 1])}, "do not ascend"),
        ({"targets": np.array([4], np.int32)}, "not there"),
        ({"targets": np.array([2], np.int32)}, "to itself"),
        ({"rates": np.array([np.nan], np.float32)}, "rate outside"),
        ({"lifts": np.array([np.inf], np.float32)}, "lift"),
        ({"viewers": np.array([19], np.int32)}, "fewer than 20"),
        ({"viewers": np.array([50, 50], np.int32)}, "different lengths"),
    ],
)
def test_arrays_that_are_no_graph_are_refused(change: dict[str, np.ndarray], fault: str) -> None:  # type: ignore[type-arg]
    whole = {
        "offsets": np.array([0, 1, 1, 1, 1, 1]),
        "targets": np.array([3], np.int32),
        "viewers": np.array([50], np.int32),
        "rates": np.array([0.5], np.float32),
        "lifts": np.array([2.0], np.float32),
    }
    assert Transitions(**whole).fault(IDS) is None
    assert fault in (Transitions(**{**whole, **change}).fault(IDS) or "")
