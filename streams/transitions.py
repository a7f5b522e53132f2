"""Which cluster viewers take up after which: a graph learned from event logs, for proposing novel topics.

A viewer takes a cluster up with their TAKEN_UP-th watch of it. An edge A -> B counts the viewers who took up A and, at
a later time, B. One viewer contributes their first MOST_TAKEN_UP take-ups and no more, so at most
MOST_TRANSITIONS transitions, and each edge at most once. An edge that fewer than `least_viewers` viewers stand behind
is dropped.

    rate(A -> B) = (n(A, B) + k g(B)) / (r(A, B) + k)          lift(A -> B) = rate(A -> B) / g(B)

n(A, B): viewers who took up A, then B; r(A, B): those who took up A and not B before; g(B): n over r, both summed over
all A, which is how often B is taken up whatever came before. k = SHRINKAGE viewers' worth of that are added to every
edge, so that few viewers cannot make a large lift. An edge pulls with

    pull(A -> B) = rate(A -> B) lift(A -> B)^2

so a popular B that follows upon A as upon anything else counts by its rate alone, and gives way to one of a fifth of
that rate that follows upon A more than twice as often as upon anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

LEAST_VIEWERS: Final = 50
"""Viewers that must stand behind an edge, by default."""
FEWEST_VIEWERS: Final = 20
"""No setting goes below this."""
TAKEN_UP: Final = 2
"""Watches of a cluster by which it is taken up: one alone is often chance."""
MOST_TAKEN_UP: Final = 24
"""Take-ups of one viewer that count, the first ones."""
MOST_TRANSITIONS: Final = MOST_TAKEN_UP * (MOST_TAKEN_UP - 1) // 2
"""Transitions that one viewer contributes, at most."""
SHRINKAGE: Final = 50.0
MOST_EDGES: Final = 64
"""Edges kept from one cluster, those of the strongest pull."""
_VIEWERS_AT_ONCE: Final = 16_384

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Transitions:
    """Edges between K clusters: those from cluster row i are [offsets[i], offsets[i + 1]), strongest pull first.

    offsets: (K + 1,) int64; targets: (E,) int32 cluster ids; viewers: (E,) int32, distinct ones behind the edge; rates:
    (E,) float32, 0..1, of the viewers who took up the first cluster and not yet the second, the share that took up the
    second, shrunk; lifts: (E,) float32, above 0, that rate against the rate whatever came before.
    """

    offsets: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int32]
    viewers: npt.NDArray[np.int32]
    rates: npt.NDArray[np.float32]
    lifts: npt.NDArray[np.float32]

    def __len__(self) -> int:
        """Number of edges."""
        return len(self.targets)

    def of(self, row: int) -> Transitions:
        """The edges from one cluster row, as a graph of one cluster."""
        begin, end = int(self.offsets[row]), int(self.offsets[row + 1])
        return Transitions(
            np.array([0, end - begin]),
            self.targets[begin:end],
            self.viewers[begin:end],
            self.rates[begin:end],
            self.lifts[begin:end],
        )

    def pulls(self) -> npt.NDArray[np.float64]:
        """(E,), above 0: what an edge counts, in no unit."""
        found: npt.NDArray[np.float64] = self.rates.astype(np.float64) * self.lifts.astype(np.float64) ** 2
        return found

    def fault(self, cluster_ids: npt.NDArray[np.int32]) -> str | None:
        """What is wrong with the arrays for these clusters, (K,) ascending; None if nothing is."""
        edges = len(self.targets)
        if len(self.offsets) != len(cluster_ids) + 1:
            return f"{len(self.offsets)} offsets for {len(cluster_ids)} clusters"
        if not edges == len(self.viewers) == len(self.rates) == len(self.lifts):
            return "arrays of different lengths"
        if self.offsets[0] != 0 or self.offsets[-1] != edges or (np.diff(self.offsets) < 0).any():
            return "offsets that do not ascend from 0 to the number of edges"
        if not np.isin(self.targets, cluster_ids).all():
            return "an edge to a cluster that is not there"
        sources = np.repeat(cluster_ids, np.diff(self.offsets))
        if (sources == self.targets).any():
            return "an edge from a cluster to itself"
        if len(np.unique(_codes(sources, self.targets))) != edges:
            return "one edge twice"
        if not ((self.rates > 0) & (self.rates <= 1) & (self.lifts > 0) & (self.lifts < np.inf)).all():
            return "a rate outside 0..1, or a lift that is not above 0"
        return None if (self.viewers >= FEWEST_VIEWERS).all() else f"an edge of fewer than {FEWEST_VIEWERS} viewers"


def learn(
    viewers: npt.ArrayLike,
    clusters: npt.ArrayLike,
    times: npt.ArrayLike,
    cluster_ids: npt.NDArray[np.int32],
    *,
    least_viewers: int = LEAST_VIEWERS,
) -> Transitions:
    """Learn the graph from watches in any order: (n,) viewers' numbers, cluster ids and times.

    cluster_ids: (K,) ascending, clusters of the registry; watches of others are left out. The result depends on neither
    the order of the watches nor the viewers' numbers. Raises ValueError for `least_viewers` below FEWEST_VIEWERS.
    """
    if least_viewers < FEWEST_VIEWERS:
        raise ValueError(f"least_viewers is {least_viewers}; an edge needs at least {FEWEST_VIEWERS} viewers")
    count = len(cluster_ids)
    rows, taken_at = take_ups(viewers, clusters, times, cluster_ids)
    codes, support = _count(rows, taken_at, count)
    took_up = np.bincount(rows[rows >= 0], minlength=count).astype(np.float64)
    first, second = np.divmod(codes, max(1, count))
    left = np.bincount(first, support, count)  # transitions out of each cluster
    entered = np.bincount(second, support, count)
    # Summed over all other clusters A, the viewers who took up A and not B before.
    exposed = np.maximum(took_up.sum() - took_up - left, 1.0)
    base = entered / exposed
    # One edge's: those who went the other way had taken up B before.
    back = _looked_up(codes, support, second * count + first)
    open_to = np.maximum(took_up[first] - back, support)
    rates = (support + SHRINKAGE * base[second]) / (open_to + SHRINKAGE)
    lifts = rates / np.maximum(base[second], np.finfo(np.float64).tiny)
    kept = support >= least_viewers
    return _graph(first[kept], second[kept], support[kept], rates[kept], lifts[kept], cluster_ids)


def take_ups(
    viewers: npt.ArrayLike, clusters: npt.ArrayLike, times: npt.ArrayLike, cluster_ids: npt.NDArray[np.int32]
) -> tuple[Ints, Ints]:
    """What each viewer took up, in order of time: rows of clusters and times, both (viewers, MOST_TAKEN_UP).

    The rows are -1 past the last. Take-ups of one time are ordered by cluster id.
    """
    who, what, when = (np.asarray(array, np.int64).ravel() for array in (viewers, clusters, times))
    rows = np.minimum(np.searchsorted(cluster_ids, what), max(0, len(cluster_ids) - 1))
    known = cluster_ids[rows] == what if len(cluster_ids) else np.zeros(len(what), bool)
    who, rows, when = who[known], rows[known], when[known]
    order = np.lexsort((when, rows, who))
    who, rows, when = who[order], rows[order], when[order]
    place = _place_in_run(np.flatnonzero(np.append(True, (np.diff(who) != 0) | (np.diff(rows) != 0))[: len(who)]), who)
    taken = place == TAKEN_UP - 1
    who, rows, when = who[taken], rows[taken], when[taken]
    order = np.lexsort((rows, when, who))
    who, rows, when = who[order], rows[order], when[order]
    begins = np.flatnonzero(np.append(True, np.diff(who) != 0)[: len(who)])
    place = _place_in_run(begins, who)
    kept = place < MOST_TAKEN_UP
    number = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(who))))
    found, at = np.full((len(begins), MOST_TAKEN_UP), -1, np.int64), np.zeros((len(begins), MOST_TAKEN_UP), np.int64)
    found[number[kept], place[kept]] = rows[kept]
    at[number[kept], place[kept]] = when[kept]
    return found, at


def _place_in_run(begins: npt.NDArray[np.intp], values: Ints) -> Ints:
    """Place of each value in its run, from 0; runs begin at `begins`."""
    lengths = np.diff(np.append(begins, len(values)))
    return np.arange(len(values)) - np.repeat(begins, lengths)


def _count(rows: Ints, times: Ints, count: int) -> tuple[Ints, npt.NDArray[np.float64]]:
    """Pairs of rows as first * count + second, ascending, and how many viewers went from the first to the second."""
    codes, support = np.zeros(0, np.int64), np.zeros(0)
    for begin in range(0, len(rows), _VIEWERS_AT_ONCE):
        part, at = rows[begin : begin + _VIEWERS_AT_ONCE], times[begin : begin + _VIEWERS_AT_ONCE]
        found = [codes]
        for lag in range(1, MOST_TAKEN_UP):
            first, second = part[:, :-lag], part[:, lag:]
            later = (second >= 0) & (at[:, :-lag] < at[:, lag:])
            found.append(first[later] * count + second[later])
        pairs = np.concatenate(found)
        weights = np.concatenate([support, np.ones(len(pairs) - len(codes))])
        codes, place = np.unique(pairs, return_inverse=True)
        support = np.bincount(place.ravel(), weights, len(codes)).astype(np.float64)
    return codes, support


def _looked_up(codes: Ints, values: npt.NDArray[np.float64], wanted: Ints) -> npt.NDArray[np.float64]:
    """Values of the wanted codes, 0 for one that is not among them."""
    if len(codes) == 0:
        return np.zeros(len(wanted))
    place = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
    return np.where(codes[place] == wanted, values[place], 0.0)


def _graph(
    first: Ints,
    second: Ints,
    support: npt.NDArray[np.float64],
    rates: npt.NDArray[np.float64],
    lifts: npt.NDArray[np.float64],
    cluster_ids: npt.NDArray[np.int32],
) -> Transitions:
    order = np.lexsort((second, -rates * lifts**2, first))
    sources = first[order]
    begins = np.flatnonzero(np.append(True, np.diff(sources) != 0)[: len(sources)])
    order = order[_place_in_run(begins, sources) < MOST_EDGES]
    counts = np.bincount(first[order], minlength=len(cluster_ids))
    return Transitions(
        offsets=np.append(0, np.cumsum(counts)).astype(np.int64),
        targets=cluster_ids[second[order]].astype(np.int32),
        viewers=support[order].astype(np.int32),
        rates=np.minimum(rates[order], 1.0).astype(np.float32),
        lifts=lifts[order].astype(np.float32),
    )


def _codes(first: npt.NDArray[np.int32], second: npt.NDArray[np.int32]) -> Ints:
    return first.astype(np.int64) << np.int64(32) | second.astype(np.int64)
