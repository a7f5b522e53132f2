"""Whole histories through the estimator and the refresh rule: what calibration and the benchmarks run.

Plain functions over arrays, like streams/mixture.py: agents/compiled.py compiles both. A history is a viewer's clusters
in order; many are one array with the place where each begins. The watch handler takes the same steps one by one.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from streams.mixture import (
    LN2,
    Floats,
    Model,
    Record,
    accumulate,
    describe,
    double,
    estimate,
    fresh_draws,
    observe,
    prior_of,
    seat,
)
from streams.state import EMPTY, SLOTS

Ints = npt.NDArray[np.int64]
LONG_DECAY: Final = 2.0 ** (-1.0 / 80.0)
"""Of the count that keeps a slot, per watch, as the long horizon of streams/counting.py decays."""


class Rule(NamedTuple):
    """When a refresh is due. threshold: of the regret; stride: watches between checks; memory: share of the regret
    kept from check to check; first_after: watches before the first persona; cool_down: watches between two refreshes;
    maximum_age: ms between two refreshes, 0: no limit.
    """

    threshold: float
    stride: int
    memory: float
    first_after: int
    cool_down: int
    maximum_age: int


def watch(state: Record, cluster: int, model: Model) -> float:
    """One full watch: its slot, the decayed count that keeps it, the estimate. Returns the model's probability."""
    slot = seat(state, cluster, model)
    for other in range(SLOTS):
        state["long"][other] = double(state["long"][other]) * LONG_DECAY
    state["long"][slot] = double(state["long"][slot]) + 1.0
    return observe(state, slot, 1.0, model)[0]


def share_of(state: Record, cluster: int, shares: Floats, rest: float, priors: Floats) -> float:
    """A cluster's share of an estimate."""
    for slot in range(SLOTS):
        if state["cluster"][slot] == cluster:
            return double(shares[slot])
    return rest * prior_of(priors, cluster)


def log_losses(states: npt.NDArray[np.void], clusters: Ints, begins: Ints, model: Model, losses: Floats) -> None:
    """Bits per history, prequentially: losses[u] = (of the whole model, of the taste alone), (users, 2), overwritten.

    Each watch is predicted before it is counted. states: zeroed, empty slots, (users,). begins: (users + 1,).
    """
    for user in range(len(begins) - 1):
        state = states[user]
        losses[user, 0], losses[user, 1] = 0.0, 0.0
        for i in range(begins[user], begins[user + 1]):
            cluster = int(clusters[i])
            if i == begins[user]:
                losses[user, 1] -= math.log(prior_of(model.priors, cluster)) / LN2
            else:
                shares, rest = estimate(state, model)
                losses[user, 1] -= math.log(share_of(state, cluster, shares, rest, model.priors)) / LN2
            losses[user, 0] -= math.log(watch(state, cluster, model)) / LN2


def refreshes(
    states: npt.NDArray[np.void], ts: Ints, clusters: Ints, begins: Ints, model: Model, rule: Rule, trace: Floats
) -> None:
    """Run the rule over histories: what `trace_history` does, for each."""
    for user in range(len(begins) - 1):
        history = slice(begins[user], begins[user + 1])
        trace_history(states[user], ts[history], clusters[history], model, rule, trace[history])


def trace_history(state: Record, ts: Ints, clusters: Ints, model: Model, rule: Rule, trace: Floats) -> None:
    """Run the rule over one history. ts, clusters: (watches,).

    trace: (watches, 3), overwritten: refreshed (0; 1: by regret or as the first; 2: by age), and where the divergence
    was checked, that and the smaller number of fresh draws, else -1.
    """
    for i in range(len(clusters)):
        watch(state, int(clusters[i]), model)
        _step(state, int(ts[i]), i + 1, model, rule, trace[i])


def distributions(state: Record, clusters: Ints, model: Model, shares: Floats) -> None:
    """shares[i]: the estimate after watch i of one history, (watches, clusters by id), overwritten."""
    for i in range(len(clusters)):
        watch(state, int(clusters[i]), model)
        taste, rest = estimate(state, model)
        for cluster in range(shares.shape[1]):
            shares[i, cluster] = rest * model.priors[cluster]
        for slot in range(SLOTS):
            if state["cluster"][slot] != EMPTY:
                shares[i, int(state["cluster"][slot])] = taste[slot]


def _step(state: Record, ts: int, watches: int, model: Model, rule: Rule, row: Floats) -> None:
    row[0], row[1], row[2] = 0.0, -1.0, -1.0
    state["since_request"] = int(state["since_request"]) + 1
    if watches < rule.first_after:
        return
    if watches > rule.first_after and int(state["since_request"]) % rule.stride == 0:
        row[1] = accumulate(state, rule.stride, rule.memory, model)
        row[2] = min(fresh_draws(state), double(state["reference_n_eff"]))
    if watches == rule.first_after:
        row[0] = 1.0
    elif state["since_request"] >= rule.cool_down:
        if state["regret"] > rule.threshold:
            row[0] = 1.0
        elif 0 < rule.maximum_age <= ts - int(state["request_ts"]):
            row[0] = 2.0
    if row[0] > 0.0:
        shares, rest = estimate(state, model)
        describe(state, shares, rest)
        state["reference_n_eff"] = fresh_draws(state)
        state["request_ts"] = ts
        state["since_request"] = 0


def decayed_log_loss(clusters: Ints, begins: Ints, half_life: float, prior_weight: float, priors: Floats) -> float:
    """Bits of all watches under plain decayed counts: p(x) = (c(x) + a g(x)) / (sum c + a), a the prior weight."""
    factor = math.exp(-LN2 / half_life)
    counts = np.zeros(len(priors))
    bits = 0.0
    for user in range(len(begins) - 1):
        counts[:] = 0.0
        total = 0.0
        for i in range(begins[user], begins[user + 1]):
            cluster = clusters[i]
            bits -= math.log((counts[cluster] + prior_weight * priors[cluster]) / (total + prior_weight)) / LN2
            counts *= factor
            counts[cluster] += 1.0
            total = total * factor + 1.0
    return bits
