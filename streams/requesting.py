"""When a request for a persona is due, what it describes, and what the viewer's state notes of it.

The rule: the first persona at the gate, and before it one that takes no model; then the regret of streams/mixture.py,
squared divergence added up, past the calibrated threshold; and a maximum age. A request takes down all that its context
is made from (streams/selection.py puts the words to it) and makes the present estimate the reference.

Like streams/mixture.py, everything works on scalars and on arrays of records, so that the same source runs as plain
Python and compiled, with the same result.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from streams.choosing import CHOICE, NONE, Catalogue, choose, is_statable
from streams.mixture import Floats, Model, Record, describe, double, seat, survey, whole
from streams.records import Rule
from streams.state import BOOTSTRAPPED, EMPTY, PINNED, SLOTS
from streams.topics import DAY_MS

SETTLING: Final = 32
"""Qualifying watches after a drift or its follow-up within which a refresh still belongs to that change of taste."""
RULES: Final = tuple(Rule)
"""By the numbers that stand for them here and in states."""
COLD_START: Final = RULES.index(Rule.COLD_START)
DRIFT: Final = RULES.index(Rule.DRIFT)
FOLLOW_UP: Final = RULES.index(Rule.FOLLOW_UP)
MATURITY: Final = RULES.index(Rule.MATURITY)
BY_AGE: Final = RULES.index(Rule.AGE)

NOTHING, FIRST, TEMPLATE, REGRET, AGE = range(5)
"""What `due` finds."""


class Gates(NamedTuple):
    """When a request is due: `streams.trigger.Policy` and `Thresholds` as plain numbers.

    first, template: qualifying watches, template 0: never; maximum_age: ms, 0: no limit; regret, stride, memory,
    cool_down: see there; idle: ms after which a viewer starts anew (streams/ageing.py); null_sizes, null_values: the
    table divergence_null, ascending.
    """

    first: int
    template: int
    maximum_age: int
    regret: float
    stride: int
    memory: float
    cool_down: int
    idle: int
    null_sizes: Floats
    null_values: Floats


class Reason(NamedTuple):
    """What asks for a persona: number of the rule, its value against its threshold; template_only: without a model."""

    rule: int
    value: float
    threshold: float
    template_only: bool


MOVED: Final = 0.03
"""Change of share from which an interest is named as risen or fallen."""
NAMED: Final = 3
"""Most interests named as risen, and as fallen."""

ASKED: Final = np.dtype(
    [
        ("place", "<i8"),  # of the event that made it due
        ("rule", "u1"),
        ("template_only", "?"),
        ("value", "<f8"),
        ("threshold", "<f8"),
        # Of the viewer, before the request.
        ("epoch", "<i8"),
        ("sequence", "<i8"),  # of this request
        ("events", "<i8"),
        ("qualifying", "<i8"),
        ("since_request", "<i8"),  # qualifying watches
        ("described", "?"),  # by a request before that a model was for
        ("audience", "u1"),
        ("first_ts", "<i8"),
        ("last_ts", "<i8"),
        ("n_eff", "<f8"),  # independent draws behind the estimate
        ("divergence", "<f8"),  # Jensen-Shannon, of the estimate from the reference, in bits
        ("null_quantile", "<f8"),  # 99% quantile of the divergence without any change of taste
        # Clusters whose share moved most, then NONE, and their shares in the reference and now.
        ("risen", "<i8", (NAMED,)),
        ("risen_from", "<f8", (NAMED,)),
        ("risen_to", "<f8", (NAMED,)),
        ("fallen", "<i8", (NAMED,)),
        ("fallen_from", "<f8", (NAMED,)),
        ("fallen_to", "<f8", (NAMED,)),
        *CHOICE,
    ]
)
"""A request, as numbers."""

Requests = npt.NDArray[np.void]
"""(n,) ASKED."""


def due(state: Record, ts: int, gates: Gates) -> int:
    """Which request an event at `ts` makes due, after it was counted."""
    if state["student_sequence"] == 0:
        if state["qualifying"] >= gates.first:
            return FIRST
        if 0 < gates.template <= state["qualifying"] and state["request_ts"] == 0:
            return TEMPLATE
        return NOTHING
    if state["since_request"] < gates.cool_down:
        return NOTHING
    if state["regret"] > gates.regret:
        return REGRET
    if 0 < gates.maximum_age <= ts - whole(state["request_ts"]):
        return AGE
    return NOTHING


def ask_due(
    state: Record, found: int, ts: int, model: Model, gates: Gates, catalogue: Catalogue, request: Record
) -> None:
    """Make the request that `due` found. request: one element of dtype ASKED, to be filled."""
    _seat_pinned(state, model)
    now = survey(state, model)
    if found == REGRET:
        reason = Reason(_named(state, now[2], now[3], gates), double(state["regret"]), gates.regret, False)
    elif found == AGE:
        days = (ts - whole(state["request_ts"])) / DAY_MS
        reason = Reason(BY_AGE, days, gates.maximum_age / DAY_MS, False)
    else:
        gate = gates.first if found == FIRST else gates.template
        reason = Reason(COLD_START, double(state["qualifying"]), double(gate), found == TEMPLATE)
    _ask(state, now, reason, gates, catalogue, request)


def ask(
    states: npt.NDArray[np.void], reason: Reason, model: Model, gates: Gates, catalogue: Catalogue, requests: Requests
) -> None:
    """Make a request of the only viewer in an array, whatever the rule says, as the first of `requests`, of which there
    is at least one.
    """
    _seat_pinned(states[0], model)
    _ask(states[0], survey(states[0], model), reason, gates, catalogue, requests[0])


def _seat_pinned(state: Record, model: Model) -> None:
    """Give pinned clusters their slots back: of a viewer who was away for long the list alone was kept."""
    for i in range(PINNED):
        if state["pinned"][i] != EMPTY:
            seat(state, int(state["pinned"][i]), model)


def _ask(
    state: Record,
    now: tuple[Floats, float, float, float],
    reason: Reason,
    gates: Gates,
    catalogue: Catalogue,
    request: Record,
) -> None:
    shares, rest, n_eff, divergence = now
    request["rule"] = reason.rule
    request["template_only"] = reason.template_only
    request["value"] = reason.value
    request["threshold"] = reason.threshold
    request["epoch"] = state["epoch"]
    request["sequence"] = whole(state["sequence"]) + 1
    request["events"] = state["events"]
    request["qualifying"] = state["qualifying"]
    request["since_request"] = state["since_request"]
    request["described"] = state["student_sequence"] > 0
    request["audience"] = state["audience"]
    request["first_ts"] = state["first_ts"]
    request["last_ts"] = state["last_ts"]
    request["n_eff"] = n_eff
    request["divergence"] = divergence
    request["null_quantile"] = _null_of(state, n_eff, gates)
    _name_moved(state, shares, 1.0, catalogue, request["risen"], request["risen_from"], request["risen_to"])
    _name_moved(state, shares, -1.0, catalogue, request["fallen"], request["fallen_from"], request["fallen_to"])
    choose(state, shares, catalogue, request)
    describe(state, shares, rest)
    state["reference_n_eff"] = n_eff
    state["flags"] = whole(state["flags"]) & ~BOOTSTRAPPED
    state["sequence"] = request["sequence"]
    if state["student_sequence"] == 0 and not reason.template_only:
        state["student_sequence"] = request["sequence"]
    state["request_ts"] = state["last_ts"]
    state["request_rule"] = reason.rule
    state["since_request"] = 0


def _name_moved(
    state: Record,
    shares: Floats,
    direction: float,
    catalogue: Catalogue,
    clusters: npt.NDArray[np.int64],
    before: Floats,
    now: Floats,
) -> None:
    """The clusters that moved most in a direction (1.0: up, -1.0: down), those left out that no persona may state."""
    last, last_cluster = math.inf, NONE
    for place in range(NAMED):
        best, most = NONE, MOVED
        for slot in range(SLOTS):
            cluster = int(state["cluster"][slot])
            change = direction * (double(shares[slot]) - double(state["reference"][slot]))
            named = change > last or (change == last and cluster <= last_cluster)
            if not change >= most or named or not is_statable(state, cluster, catalogue):
                continue
            if best == NONE or change > most or cluster < int(state["cluster"][best]):
                best, most = slot, change
        clusters[place] = NONE
        if best == NONE:
            continue
        last, last_cluster = most, int(state["cluster"][best])
        clusters[place] = last_cluster
        before[place] = state["reference"][best]
        now[place] = shares[best]


def _named(state: Record, n_eff: float, divergence: float, gates: Gates) -> int:
    """Follow-up soon after a drift; drift where chance alone seldom goes that far; else the persona grew sharper."""
    settling = state["request_rule"] == DRIFT or state["request_rule"] == FOLLOW_UP
    if settling and state["since_request"] <= SETTLING:
        return FOLLOW_UP
    return DRIFT if divergence > _null_of(state, n_eff, gates) else MATURITY


def _null_of(state: Record, n_eff: float, gates: Gates) -> float:
    """Both distributions come from finite samples: the smaller governs how far apart chance alone puts them."""
    return null_quantile(min(n_eff, double(state["reference_n_eff"])), gates.null_sizes, gates.null_values)


def null_quantile(size: float, sizes: Floats, values: Floats) -> float:
    """A table's value at a sample size, interpolated in the logarithm of the size and held at the ends."""
    last = len(sizes) - 1
    if size <= sizes[0]:
        return double(values[0])
    for i in range(1, last + 1):
        if size <= sizes[i]:
            part = math.log(size / sizes[i - 1]) / math.log(sizes[i] / sizes[i - 1])
            return double(values[i - 1]) + part * (double(values[i]) - double(values[i - 1]))
    return double(values[last])
