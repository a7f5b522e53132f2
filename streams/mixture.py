"""The estimator of a viewer's distribution over clusters, and the regret that says when to refresh.

A mixture of a few experts, each an absolute-discounting estimate (Ney, Essen and Kneser 1994) over watches:

    p_j(x) = (max(c_j(x) - d, 0) + (k_j + s_j) b_j(x)) / (n_j + k_j)        s_j = sum over x of min(c_j(x), d)

c_j(x): fresh draws of cluster x; n_j: all of them; b_j: what the expert falls back on; k_j: how much it takes to move
it. Two experts share the whole history, slowly forgotten, and fall back on the population's shares: one with a small k
(this viewer is unlike others), one with a large k (this viewer is like the others). The rest see only what came after
their start, and fall back on the first one's estimate, mixed with the population's. Experts are weighted by how well
they predicted; every few fresh draws a new one takes the place of the weakest, with the prior weight of a change of
taste in the meantime (restarts as in Bayesian online change-point detection: Adams and MacKay 2007). After a shift a
young expert predicts better and soon carries the weight.

Not every watch is a fresh draw from the taste. With z the previous watches,

    L(x) = f p(x) + r [x = previous] + s cache(x)          cache: the last watches, each weighing less than the next

and a watch counts as the share of L(x) that is fresh; f, r and s are learned for each viewer by online
expectation-maximisation from a prior. Without this an evening of one series looks like a taste.

The refresh rule: every few watches A <- m A + stride * D^2, D the Jensen-Shannon divergence in bits between the
estimate and the reference, which is what the last request described; a refresh is due when A passes its threshold. D
is the regret of serving the old persona, so A weighs how wrong it is by how long it has been wrong, and the memory m <
1 lets what chance added fade. The estimate is a posterior mean, which chance moves little, so no noise floor is
subtracted.

Every function here works on scalars and on the arrays inside one state record, without numpy's vector operations, so
that the same source runs as plain Python and compiled over whole batches, with the same bytes as a result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from streams.state import COUNTS, EMPTY, EVIDENCE, EXPERTS, PINNED, RECENT, SLOTS

Record = Any
"""One state: a 0-dimensional array or scalar of dtype `streams.state.STATE`."""
Floats = npt.NDArray[np.float64]

FRESH: Final = 0
REPEAT: Final = 1
SESSION: Final = 2
LN2: Final = math.log(2.0)
double: Callable[[Any], float] = np.float64  # type: ignore[assignment]
"""Widens a stored single-precision number: compiled, `float` would leave it as it is."""
whole: Callable[[Any], int] = np.int64  # type: ignore[assignment]
"""Widens a stored integer: compiled, `int` would leave it unsigned."""
OWN: Final = 0
POPULATION: Final = 1
LEAST_WEIGHT: Final = 1e-6
"""Of the two experts that never restart: without it a long run would round them to nothing for good."""
HISTORY: Final = 0
"""Place of the counts that both first experts share; the counts of a later expert are at its own place less one."""


class Constants(NamedTuple):
    """Priors and constants of the estimator, learned from a log (agents/calibration.py).

    discount: d, 0..1. history_half_life: of the whole history, in fresh draws. own_weight, population_weight: k of the
    two experts that share it, in fresh draws; population_share: first weight of the second, 0..1. restart_every: fresh
    draws between new experts; hazard: prior probability of a change of taste per fresh draw; forget: share of the
    population in what new experts fall back on, 0..1; restart_weight_low, restart_weight_high: their k, in turn. fresh,
    repeat, session: prior counts of the three kinds of watches; session_half_life: of the session's cache, in watches.
    """

    discount: float
    history_half_life: float
    own_weight: float
    population_weight: float
    population_share: float
    restart_every: float
    hazard: float
    forget: float
    restart_weight_low: float
    restart_weight_high: float
    fresh: float
    repeat: float
    session: float
    session_half_life: float


class Model(NamedTuple):
    """What an estimate needs beside the state. priors: the population's share of each cluster, by cluster id."""

    constants: Constants
    priors: Floats


def start(state: Record, constants: Constants) -> None:
    """Begin a viewer's estimate: nothing watched, both first experts at the population's shares."""
    state["experts"] = 2
    state["expert_weight"][OWN] = 1.0 - constants.population_share
    state["expert_weight"][POPULATION] = constants.population_share
    state["expert_prior"][OWN] = constants.own_weight
    state["expert_prior"][POPULATION] = constants.population_weight
    state["kinds"][FRESH] = constants.fresh
    state["kinds"][REPEAT] = constants.repeat
    state["kinds"][SESSION] = constants.session
    state["reference_rest"] = 1.0


def prior_of(priors: Floats, cluster: int) -> float:
    """The population's share of a cluster: `priors` is indexed by cluster id; 0 for an id that it does not hold."""
    return double(priors[cluster]) if 0 <= cluster < len(priors) else 0.0


def seat(state: Record, cluster: int, model: Model) -> int:
    """The cluster's slot, a free one, or the weakest one, which makes room. Starts the estimate where it is new."""
    if state["experts"] == 0:
        start(state, model.constants)
    held = state["cluster"]
    free = EMPTY
    for slot in range(SLOTS):
        if held[slot] == cluster:
            return slot
        if free == EMPTY and held[slot] == EMPTY:
            free = slot
    if free == EMPTY:
        free = _weakest(state)
        give_up_slot(state, free, model.constants)
    held[free] = cluster
    # So far the cluster was part of the rest.
    state["reference"][free] = double(state["reference_rest"]) * prior_of(model.priors, cluster)
    return free


def _weakest(state: Record) -> int:
    """The slot with the least decayed mass, pinned ones left out."""
    weakest, least = 0, math.inf
    for slot in range(SLOTS):
        if is_pinned(state, int(state["cluster"][slot])):
            continue
        mass = double(state["long"][slot]) + double(state["short"][slot]) + double(state["negative"][slot])
        if mass < least:
            weakest, least = slot, mass
    return weakest


def is_pinned(state: Record, cluster: int) -> bool:
    """Whether the viewer pinned the cluster."""
    for i in range(PINNED):  # noqa: SIM110 - generators do not compile
        if state["pinned"][i] == cluster:
            return True
    return False


def give_up_slot(state: Record, slot: int, constants: Constants) -> None:
    """Empty a slot. Each expert spreads its draws over its base, so that none of the evidence's weight is lost."""
    for i in range(COUNTS):
        count = double(state["count"][i, slot])
        state["spread"][i] = double(state["spread"][i]) + max(count - constants.discount, 0.0)
        state["count"][i, slot] = 0.0
    state["cluster"][slot] = EMPTY
    state["short"][slot] = 0.0
    state["long"][slot] = 0.0
    state["negative"][slot] = 0.0
    state["reference"][slot] = 0.0
    state["in_session"][slot] = 0
    for i in range(EVIDENCE):
        state["evidence_video"][slot, i] = 0
        state["evidence_ts"][slot, i] = 0


def observe(state: Record, slot: int, size: float, model: Model) -> tuple[float, float]:
    """Take one watch of the cluster in `slot`: the probability L that the model gave it, and the fresh draws counted.

    size: how much the watch counts, 0..1; 0 leaves the taste alone and only enters the session.
    """
    constants = model.constants
    cluster = int(state["cluster"][slot])
    experts = int(state["experts"])
    weight, kinds, recent = state["expert_weight"], state["kinds"], state["recent"]
    share = prior_of(model.priors, cluster)
    taste = 0.0
    for j in range(experts):
        taste += double(weight[j]) * _probability(state, j, slot, share, constants)
    fresh, echo, likelihood, draw = 1.0, 0.0, taste, 1.0
    if recent[0] != EMPTY:
        total = double(kinds[FRESH]) + double(kinds[REPEAT]) + double(kinds[SESSION])
        repeat = double(kinds[REPEAT]) / total if recent[0] == cluster else 0.0
        echo = repeat + double(kinds[SESSION]) / total * _cached(recent, cluster, constants.session_half_life)
        fresh = double(kinds[FRESH]) / total
        likelihood = echo + fresh * taste
        draw = fresh * taste / likelihood
        if size > 0.0:
            kinds[FRESH] = double(kinds[FRESH]) + size * draw
            kinds[REPEAT] = double(kinds[REPEAT]) + size * repeat / likelihood
            kinds[SESSION] = double(kinds[SESSION]) + size * max(0.0, 1.0 - draw - repeat / likelihood)
    for i in range(RECENT - 1, 0, -1):
        recent[i] = recent[i - 1]
    recent[0] = cluster
    if size <= 0.0:
        return likelihood, 0.0
    total = 0.0
    for j in range(experts):
        weight[j] = double(weight[j]) * (echo + fresh * _probability(state, j, slot, share, constants))
        total += double(weight[j])
    for j in range(experts):
        weight[j] = double(weight[j]) / total
    for j in range(POPULATION + 1):
        weight[j] = max(double(weight[j]), LEAST_WEIGHT)
    _add(state, slot, size * draw, constants)
    if double(state["since_restart"]) >= constants.restart_every:
        state["since_restart"] = double(state["since_restart"]) - constants.restart_every
        _forget(state, constants)
        _restart(state, constants)
    return likelihood, size * draw


def estimate(state: Record, model: Model) -> tuple[Floats, float]:
    """Posterior mean of the viewer's distribution.

    (SLOTS,) the share of each slot's cluster, 0 if empty; and the rest's share per unit of the population's: a cluster
    without a slot has that times its prior.
    """
    constants, weight = model.constants, state["expert_weight"]
    shares = np.zeros(SLOTS)
    own, rest = double(weight[OWN]), 0.0
    for j in range(2, int(state["experts"])):
        spread = _mix(state, j, double(weight[j]), constants, shares)
        own += (1.0 - constants.forget) * spread
        rest += constants.forget * spread
    rest += _mix(state, OWN, own, constants, shares)
    rest += _mix(state, POPULATION, double(weight[POPULATION]), constants, shares)
    for slot in range(SLOTS):
        if state["cluster"][slot] != EMPTY:
            shares[slot] += rest * prior_of(model.priors, int(state["cluster"][slot]))
    return shares, rest


def _mix(state: Record, j: int, weight: float, constants: Constants, shares: Floats) -> float:
    """Add an expert's own part, times its weight, to the shares; returns the weight of what it falls back on."""
    counts, prior = state["count"][_counts_of(j)], double(state["expert_prior"][j])
    per_draw = weight / (double(state["total"][_counts_of(j)]) + prior)
    for slot in range(SLOTS):
        if counts[slot] > constants.discount:
            shares[slot] += per_draw * (double(counts[slot]) - constants.discount)
    return per_draw * (prior + double(state["spread"][_counts_of(j)]))


def _counts_of(j: int) -> int:
    return max(HISTORY, j - 1)


def fresh_draws(state: Record) -> float:
    """Expected number of independent draws behind the estimate: the experts' totals by their weights."""
    draws = 0.0
    for j in range(int(state["experts"])):
        draws += double(state["expert_weight"][j]) * double(state["total"][_counts_of(j)])
    return draws


def divergence_from_reference(state: Record, shares: Floats, rest: float, priors: Floats) -> float:
    """Jensen-Shannon divergence in bits, 0..1, between the reference and an estimate as `estimate` gives it."""
    cluster, reference = state["cluster"], state["reference"]
    total, unseen = 0.0, 1.0
    for slot in range(SLOTS):
        if cluster[slot] != EMPTY:
            total += _half_divergence(double(shares[slot]), double(reference[slot]))
            unseen -= prior_of(priors, int(cluster[slot]))
    if unseen > 1e-12:
        total += unseen * _half_divergence(rest, double(state["reference_rest"]))
    return min(1.0, max(0.0, total / LN2))


def survey(state: Record, model: Model) -> tuple[Floats, float, float, float]:
    """The estimate as `estimate` gives it, the fresh draws behind it, and its divergence from the reference in bits."""
    shares, rest = estimate(state, model)
    return shares, rest, fresh_draws(state), divergence_from_reference(state, shares, rest, model.priors)


def accumulate(state: Record, stride: int, memory: float, model: Model) -> float:
    """Add `stride` watches of squared regret to the state; returns the divergence in bits."""
    shares, rest = estimate(state, model)
    distance = divergence_from_reference(state, shares, rest, model.priors)
    state["regret"] = memory * double(state["regret"]) + stride * distance * distance
    return distance


def describe(state: Record, shares: Floats, rest: float) -> None:
    """Make an estimate the reference: it is what the request now emitted describes. The regret starts anew."""
    for slot in range(SLOTS):
        state["reference"][slot] = shares[slot]
    state["reference_rest"] = rest
    state["regret"] = 0.0


def withdraw(state: Record, slot: int, draw: float, restarts: int, constants: Constants) -> None:
    """Take back a watch that counted `draw` fresh draws, from the experts that had started by then.

    restarts: their number before the watch, modulo 256, fewer than 256 ago.
    """
    before_watch = int(state["restarts"]) - (int(state["restarts"]) - restarts) % 256
    for i in range(COUNTS):
        if int(state["born"][i]) <= before_watch:
            before = double(state["count"][i, slot])
            _set_count(state, i, slot, before, max(0.0, before - draw), constants)


def _add(state: Record, slot: int, draw: float, constants: Constants) -> None:
    for i in range(int(state["experts"]) - 1):
        before = double(state["count"][i, slot])
        _set_count(state, i, slot, before, before + draw, constants)
    state["since_restart"] = double(state["since_restart"]) + draw


def _set_count(state: Record, i: int, slot: int, before: float, after: float, constants: Constants) -> None:
    change = min(after, constants.discount) - min(before, constants.discount)
    # Taking back in single precision may end a little below zero.
    state["spread"][i] = max(0.0, double(state["spread"][i]) + change)
    state["total"][i] = max(0.0, double(state["total"][i]) + after - before)
    state["count"][i, slot] = after


def _probability(state: Record, j: int, slot: int, share: float, constants: Constants) -> float:
    """An expert's probability of the cluster in `slot`, whose share of the population is `share`."""
    if j <= POPULATION:
        return _discounted(state, j, slot, share, constants)
    base = (1.0 - constants.forget) * _discounted(state, OWN, slot, share, constants) + constants.forget * share
    return _discounted(state, j, slot, base, constants)


def _discounted(state: Record, j: int, slot: int, base: float, constants: Constants) -> float:
    i, prior = _counts_of(j), double(state["expert_prior"][j])
    own = max(double(state["count"][i, slot]) - constants.discount, 0.0)
    return (own + (prior + double(state["spread"][i])) * base) / (double(state["total"][i]) + prior)


def _cached(recent: npt.NDArray[np.int32], cluster: int, half_life: float) -> float:
    """Share of a cluster in the last watches, newest first, each weighing less than the next by the half-life."""
    factor = math.exp(-LN2 / half_life)
    weight, found, total = 1.0, 0.0, 0.0
    for i in range(RECENT):
        if recent[i] == EMPTY:
            break
        total += weight
        if recent[i] == cluster:
            found += weight
        weight *= factor
    return found / total


def _restart(state: Record, constants: Constants) -> None:
    """Start an expert; where all places are taken the weakest restarting one goes."""
    weight, place = state["expert_weight"], int(state["experts"])
    if place < EXPERTS:
        state["experts"] = place + 1
    else:
        place = POPULATION + 1
        for j in range(place + 1, EXPERTS):
            if weight[j] < weight[place]:
                place = j
    weight[place] = 0.0
    others = 0.0
    for j in range(EXPERTS):
        others += double(weight[j])
    entering = constants.hazard * constants.restart_every
    for j in range(EXPERTS):
        weight[j] = double(weight[j]) * (1.0 - entering) / others
    weight[place] = entering
    low = int(state["restarts"]) % 2 == 0
    state["restarts"] = int(state["restarts"]) + 1
    state["expert_prior"][place] = constants.restart_weight_low if low else constants.restart_weight_high
    i = _counts_of(place)
    state["total"][i] = 0.0
    state["spread"][i] = 0.0
    state["born"][i] = state["restarts"]
    for slot in range(SLOTS):
        state["count"][i, slot] = 0.0


def _forget(state: Record, constants: Constants) -> None:
    """Decay the history by the fresh draws of one beat."""
    factor = math.exp(-LN2 * constants.restart_every / constants.history_half_life)
    counts, spread, without_slot = state["count"][HISTORY], 0.0, double(state["spread"][HISTORY])
    for slot in range(SLOTS):
        before = double(counts[slot])
        if before > 0.0:
            counts[slot] = before * factor
            without_slot -= min(before, constants.discount)
            spread += min(double(counts[slot]), constants.discount)
    state["spread"][HISTORY] = spread + max(0.0, without_slot) * factor
    state["total"][HISTORY] = double(state["total"][HISTORY]) * factor


def _half_divergence(p: float, q: float) -> float:
    """One cluster's part of the Jensen-Shannon divergence, in nats."""
    middle, total = 0.5 * (p + q), 0.0
    if p > 0.0:
        total += 0.5 * p * math.log(p / middle)
    if q > 0.0:
        total += 0.5 * q * math.log(q / middle)
    return total
