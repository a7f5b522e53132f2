"""The arithmetic of the real drift benchmark, against hand-made cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agents.calibration import Histories, joined
from benchmarks.real_drift import (
    CONCLUSIONS,
    FIRST,
    Splice,
    divergence,
    doubling,
    every,
    named_drift,
    paired,
    positions_of,
    spliced,
    splices,
    stored_bits,
    unspliced,
    write,
)
from streams.mixture import Constants
from streams.topics import DAY_MS
from streams.trigger import Thresholds


def daily(*lengths: int) -> Histories:
    """Viewers who watch once a day from day 0; viewer u watches cluster u alone."""
    return joined([(np.arange(n) * DAY_MS, np.full(n, user)) for user, n in enumerate(lengths)])


def test_a_splice_takes_one_viewer_until_the_date_and_the_other_from_it() -> None:
    histories = daily(60, 70)
    splice = Splice(before=0, after=1, date=25 * DAY_MS, at=25)
    mixed = spliced(histories, [splice, splice], window=30)
    assert mixed.begins.tolist() == [0, 55, 110]
    assert mixed.clusters[:55].tolist() == [0] * 25 + [1] * 30
    assert mixed.ts[:55].tolist() == [day * DAY_MS for day in range(55)]
    own = unspliced(histories, [splice], window=30)
    assert own.clusters.tolist() == [0] * 55
    assert own.ts.tolist() == mixed.ts[:55].tolist()


def test_splices_need_watches_on_both_sides_of_the_date_from_both() -> None:
    histories = daily(100, FIRST + 29, 90, 100, 10)
    found = splices(histories, 30, 50, np.random.default_rng(0))
    assert len(found) == 50
    for splice in found:
        assert splice.before != splice.after
        assert {splice.before, splice.after} <= {0, 2, 3}
        assert splice.at == -(-splice.date // DAY_MS)
        assert FIRST <= splice.at <= 90 - 30 or {splice.before, splice.after} == {0, 3}


def test_too_few_long_viewers_give_no_splices() -> None:
    assert splices(daily(100, 40, 40), 30, 50, np.random.default_rng(0)) == []
    assert splices(daily(), 30, 50, np.random.default_rng(0)) == []


def test_a_watch_is_judged_by_what_was_stored_before_it() -> None:
    clusters = np.array([0, 1, 1, 0, 0])
    positions = np.array([0, 1, 2, 0, 1])
    shares = np.array([[0.5, 0.5], [0.75, 0.25], [0.1, 0.9], [0.25, 0.75], [0.5, 0.5]])
    refreshed = np.array([True, False, True, True, False])
    bits = stored_bits(shares, clusters, positions, refreshed)
    assert np.isnan(bits[[0, 3]]).all()  # a viewer's first watch never meets another viewer's store
    assert bits[[1, 2, 4]].tolist() == [1.0, 1.0, 2.0]


def test_regular_refreshes_fall_every_so_many_watches_after_the_first_persona() -> None:
    histories = daily(FIRST + 10, FIRST - 1)
    at = np.flatnonzero(every(positions_of(histories), histories.begins, 4.0))
    assert at.tolist() == [FIRST - 1, FIRST + 3, FIRST + 7]
    assert np.flatnonzero(every(positions_of(histories), histories.begins, np.inf)).tolist() == [FIRST - 1]


def test_regular_refreshes_at_random_phases_keep_the_wanted_number() -> None:
    histories = daily(*[FIRST + 30] * 4000)
    phases = np.random.default_rng(0).random(4000)
    positions = positions_of(histories)
    later = every(positions, histories.begins, 150.0, phases)[positions >= FIRST]
    assert later.mean() == pytest.approx(1 / 150, rel=0.1)


def test_doubling_refreshes_at_twice_the_watches_each_time() -> None:
    assert np.flatnonzero(doubling(np.arange(200))).tolist() == [FIRST - 1, 2 * FIRST - 1, 4 * FIRST - 1, 8 * FIRST - 1]


def test_drift_is_named_by_the_latest_check_and_never_at_the_first_persona() -> None:
    constants = Constants(*[0.5] * len(Constants._fields))
    thresholds = Thresholds("test", 0.1, 4, 0.9, 6, constants, ((10.0, 0.2),))
    trace = np.full((FIRST + 9, 3), -1.0)
    trace[:, 0] = 0.0
    trace[FIRST - 1, 0] = 1.0
    trace[FIRST + 3] = 0.0, 0.3, 10.0
    trace[FIRST + 5, 0] = 1.0  # between checks
    trace[FIRST + 7] = 1.0, 0.1, 10.0
    assert np.flatnonzero(named_drift(trace, np.arange(len(trace)), thresholds)).tolist() == [FIRST + 5]


def test_the_paired_error_is_that_of_the_difference() -> None:
    watches = np.array([10.0, 20.0, 30.0])
    against = np.array([40.0, 70.0, 100.0])
    same = paired(against - 0.5 * watches, against, watches)
    assert (same.bits, same.less, same.error) == pytest.approx((180 / 60, 0.5, 0.0))
    unequal = paired(against - np.array([4.0, 10.0, 16.0]), against, watches)
    assert unequal.less == pytest.approx(0.5)
    assert unequal.error == pytest.approx(np.sqrt(2.0) / 60)


def test_divergence_is_a_bit_for_disjoint_tastes_and_none_for_equal_ones() -> None:
    p, q = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[0.0, 1.0], [0.5, 0.5]])
    assert divergence(p, q) == pytest.approx([1.0, 0.0])


def test_writing_keeps_the_conclusions(tmp_path: Path) -> None:
    path = tmp_path / "real_drift.md"
    write("first\n", path)
    path.write_text(path.read_text() + "\nmine\n")
    write("second\n", path)
    assert path.read_text() == f"second\n{CONCLUSIONS}\nmine\n"
