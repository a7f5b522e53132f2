"""The arithmetic of the skew simulation."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.partition_skew import estimated_largest, hashes, hot_share_largest, loads, report, worker_largest
from streams.identifiers import murmur2_partition


def test_hashes_place_keys_as_kafka_does() -> None:
    for count in (3, 64, 1000):
        expected = [murmur2_partition(b"viewer-7-%d" % user, count) for user in range(50)]
        assert (hashes(50, 7) % count).tolist() == expected


def test_loads_are_sums_with_a_mean_of_one() -> None:
    load = loads(np.array([0, 1, 5, 6, 9]), np.array([1.0, 2.0, 3.0, 4.0, 10.0]), 4)
    assert load.tolist() == [0.2, 3.0, 0.8, 0.0]  # sums 1, 15, 4, 0 over a mean of 5


def test_workers_even_their_partitions_out() -> None:
    load = np.array([1.5, 0.5, 0.5, 1.5])
    assert worker_largest(load, 2) == 1.0
    assert worker_largest(np.ones(4), 3) == pytest.approx(1.5)  # one worker has two of the four


def test_a_hot_viewer_adds_a_share_of_everything() -> None:
    assert hot_share_largest(np.ones(100), 0.01) == pytest.approx(1.99)


@pytest.mark.parametrize("sigma", [1.0, 1.5, 2.0])
def test_the_estimate_is_above_what_is_simulated_and_near_it_where_viewers_are_many(sigma: float) -> None:
    users, partitions = 60_000, 32
    hashed = hashes(users, 3)
    activity = np.random.default_rng(3).lognormal(0.0, sigma, users)
    found, estimate = float(loads(hashed, activity, partitions).max()), estimated_largest(sigma, users, partitions)
    assert found < estimate * 1.1
    assert estimate - 1 < 6 * (found - 1)


def test_the_report_ends_with_the_figures_of_its_tables() -> None:
    lines, figures = report(20_000, 1)
    text = "\n".join(lines)
    for count in (64, 4096):
        assert f"{figures[f'largest_{count}_sigma_2']:.3f}" in text
    assert f"{figures['hot_0.01']:.3f}" in text
