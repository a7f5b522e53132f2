"""How unevenly do partitions and workers share the events? Simulated viewers, placed by Kafka's own partitioner.

    .venv/bin/python -m benchmarks.partition_skew [--users 2000000] [--seed 1] [--out benchmarks/partition_skew.md]

Each viewer's events a day are log-normal; the key's partition is murmur2's, as producers and workers compute it. Loads
are exact sums of what falls on each partition. Ends with one JSON object.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Final

import numpy as np
import numpy.typing as npt
import orjson

from streams.identifiers import murmur2_partition

PARTITIONS: Final = (64, 256, 1024, 4096)
SIGMAS: Final = (1.0, 1.5, 2.0)
"""Spread of the viewers' activity: the most active tenth has 39%, 59% and 76% of the events."""
WORKERS: Final = (16, 48, 64)
WORKER_PARTITIONS: Final = 1024
HOT_SHARES: Final = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
BILLION: Final = 1_000_000_000
_WHOLE_HASH: Final = 1 << 31

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def hashes(users: int, seed: int) -> Integers:
    """Kafka's 31-bit key hashes of so many user ids; a hash modulo the partitions is the partition."""
    return np.array([murmur2_partition(b"viewer-%d-%d" % (seed, user), _WHOLE_HASH) for user in range(users)], np.int64)


def loads(hashed: Integers, activity: Floats, partitions: int) -> Floats:
    """Load of each partition (partitions,), the mean being 1."""
    found = np.bincount(hashed % partitions, activity, partitions)
    return np.asarray(found / found.mean())


def estimated_largest(sigma: float, users: int, partitions: int) -> float:
    """The largest load over the mean, estimated from above.

    A partition is a sum over a random number of independent log-normal viewers, with a relative variance of
    exp(sigma^2) / viewers; the largest of many nearly normal ones is sqrt(2 ln partitions) deviations out. The most
    active viewer of all comes on top: with few viewers to a partition that one decides.
    """
    each = users / partitions
    deviations = math.sqrt(math.exp(sigma**2) / each) * math.sqrt(2 * math.log(partitions))
    most_active = math.exp(sigma * NormalDist().inv_cdf(1 - 1 / users) - sigma**2 / 2)
    return 1 + deviations + most_active / each


def worker_largest(load: Floats, workers: int) -> float:
    """Largest load of a worker over the mean, partitions dealt out in turn."""
    found = np.bincount(np.arange(len(load)) % workers, load, workers)
    return float(found.max() / found.mean())


def hot_share_largest(load: Floats, share: float) -> float:
    """Largest load over the mean when one more viewer, on the fullest partition, has this share of all events."""
    return float((load.max() * (1 - share)) + share * len(load))


def report(users: int, seed: int) -> tuple[list[str], dict[str, float]]:
    """The result file's lines, and the figures for the last line."""
    random = np.random.default_rng(seed)
    hashed = hashes(users, seed)
    even = {count: float(loads(hashed, np.ones(users), count).max()) for count in PARTITIONS}
    lines = [
        "# Skew of partitions and hot users",
        "",
        f"`python -m benchmarks.partition_skew --users {users} --seed {seed} --out benchmarks/partition_skew.md`.",
        f"Written by that command: {users:,} simulated viewers, log-normal events a day, keys placed by murmur2.",
        "",
        "## Largest partition over the mean",
        "",
        "*Estimate*: 1 + sqrt(exp(sigma^2) / viewers each) sqrt(2 ln partitions) + the most active viewer's share;",
        "the last column is the same for a billion viewers. What decides is how many viewers share a partition.",
        "",
        "| sigma | most active tenth | partitions | viewers each | all alike | simulated | estimate | at a billion |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    figures: dict[str, float] = {"users": users}
    middle: Floats = np.ones(1)
    for sigma in SIGMAS:
        activity = random.lognormal(0.0, sigma, users)
        top = np.sort(activity)[-users // 10 :].sum() / activity.sum()
        for count in PARTITIONS:
            load = loads(hashed, activity, count)
            found = float(load.max())
            shares = [even[count], found, estimated_largest(sigma, users, count)]
            row = [f"{sigma}", f"{top:.0%}", f"{count}", f"{users // count:,}", *(f"{share:.3f}" for share in shares)]
            lines.append(f"| {' | '.join(row)} | {estimated_largest(sigma, BILLION, count):.3f} |")
            figures[f"largest_{count}_sigma_{sigma:g}"] = round(found, 3)
            if sigma == SIGMAS[1] and count == WORKER_PARTITIONS:
                middle = load
    lines += [
        "",
        f"## Largest worker over the mean, {WORKER_PARTITIONS} partitions, sigma {SIGMAS[1]}",
        "",
        "The partitions of one worker even each other out; a number of workers that does not divide theirs costs more.",
        "",
        "| workers | partitions each | largest over mean |",
        "| --- | --- | --- |",
    ]
    for workers in WORKERS:
        each = WORKER_PARTITIONS / workers
        shown = f"{each:.0f}" if each.is_integer() else f"{math.floor(each)} or {math.ceil(each)}"
        found = worker_largest(middle, workers)
        figures[f"worker_largest_{workers}"] = round(found, 3)
        lines.append(f"| {workers} | {shown} | {found:.3f} |")
    lines += [
        "",
        "## One hot viewer",
        "",
        "A viewer cannot be split: all events of a key are on one partition. Load of the fullest one over the mean,",
        f"when one more viewer there has a share of all events (sigma {SIGMAS[1]}, {WORKER_PARTITIONS} partitions):",
        "",
        "| share of all events | times the mean viewer, of a billion | fullest partition over mean |",
        "| --- | --- | --- |",
    ]
    for share in HOT_SHARES:
        found = hot_share_largest(middle, share)
        figures[f"hot_{share:g}"] = round(found, 3)
        lines.append(f"| {share:.4%} | {share * BILLION:,.0f} | {found:.3f} |")
    return [*lines, ""], figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=2_000_000, help="viewers to simulate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of keys and activities (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the tables to this file")
    options = parser.parse_args(arguments)
    if options.users < max(PARTITIONS):
        parser.error(f"--users must be at least {max(PARTITIONS)}")
    lines, figures = report(options.users, options.seed)
    text = "\n".join(lines)
    sys.stdout.write(text)
    if options.out is not None:
        options.out.write_text(text)
    sys.stdout.write(orjson.dumps(figures).decode() + "\n")


if __name__ == "__main__":
    main()
