"""The refresh rule: when does a viewer's persona no longer describe what they watch?

The regret of streams/mixture.py: every few watches the squared divergence between the estimate and what the last
request described is added up, and a refresh is due when the sum passes the calibrated threshold. It finds shifts of
taste, and by itself gives young personas their follow-ups. Beside it: the first persona at the gate, and a maximum
age. Calibration (agents/calibration.py) writes the artefact that `Thresholds` reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from streams.ageing import FORGET_DAYS
from streams.counting import AGE, FIRST, NOTHING, REGRET, Gates, due
from streams.interests import Distribution
from streams.mixture import Constants
from streams.records import Rule
from streams.state import State
from streams.topics import DAY_MS

FORMAT: Final = 2
SETTLING: Final = 32
"""Qualifying watches after a drift or its follow-up within which a refresh still belongs to that change of taste."""
_RULES: Final = list(Rule)


class ThresholdsError(ValueError):
    """The calibrated artefact cannot be used."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The calibrated artefact.

    regret: that asks for a refresh, in bits squared times watches; stride: qualifying watches between checks; memory:
    share of the regret kept from check to check, 0..1; cool_down: between refreshes; constants: of the estimator;
    divergence_null: (fresh draws, 99% quantile of the divergence in bits of viewers whose taste does not change),
    ascending.
    """

    name: str
    regret: float
    stride: int
    memory: float
    cool_down: int
    constants: Constants
    divergence_null: tuple[tuple[float, float], ...]

    def null_quantile(self, n_eff: float) -> float:
        """99% quantile of the divergence at this sample size, interpolated in the logarithm of the size."""
        sizes = [math.log(size) for size, _ in self.divergence_null]
        values = [value for _, value in self.divergence_null]
        return float(np.interp(math.log(max(n_eff, 1e-9)), sizes, values))


_POSITIVE: Final = (
    "history_half_life",
    "own_weight",
    "population_weight",
    "restart_every",
    "restart_weight_low",
    "restart_weight_high",
    "fresh",
    "session_half_life",
)
"""Constants by which something is divided."""
LEAST, MOST = 1e-3, 1e6
"""Bounds of the constants: a state holds them and what comes of them in single precision."""


def read_thresholds(document: Mapping[str, Any]) -> Thresholds:
    """Thresholds from the parsed artefact. Raises ThresholdsError naming what is wrong."""
    found = document.get("format") if isinstance(document, Mapping) else None
    if found != FORMAT:
        raise ThresholdsError(f"thresholds of format {found!r}, this version reads {FORMAT}: run `personas calibrate`")
    try:
        null = tuple((float(size), float(value)) for size, value in document["divergence_null"])
        thresholds = Thresholds(
            name=str(document["name"]),
            regret=float(document["regret"]),
            stride=int(document["stride"]),
            memory=float(document["memory"]),
            cool_down=int(document["cool_down"]),
            constants=Constants(**{name: float(document["constants"][name]) for name in Constants._fields}),
            divergence_null=null,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ThresholdsError(f"thresholds: {error!r}") from error
    if not thresholds.regret > 0 or thresholds.stride < 1 or thresholds.cool_down < 1:
        raise ThresholdsError("thresholds: regret must be above 0, stride and cool_down at least 1")
    if not 0 <= thresholds.memory <= 1:
        raise ThresholdsError("thresholds: memory must be a share, 0..1")
    if not null or list(null) != sorted(null) or null[0][0] <= 0:
        raise ThresholdsError("thresholds: divergence_null must be ascending and not empty")
    _check_constants(thresholds.constants)
    return thresholds


def _check_constants(constants: Constants) -> None:
    for name, value in constants._asdict().items():
        least = LEAST if name in _POSITIVE else 0.0
        if not least <= value <= MOST:
            raise ThresholdsError(f"thresholds: {name} is {value}, it must be between {least:g} and {MOST:,.0f}")
    if max(constants.discount, constants.forget, constants.population_share) > 1:
        raise ThresholdsError("thresholds: discount, forget and population_share are shares, at most 1")
    if constants.hazard * constants.restart_every > 0.5:
        raise ThresholdsError("thresholds: hazard times restart_every must be at most .5")


@dataclass(frozen=True, slots=True)
class Policy:
    """What an operator decides. Counts are qualifying watches; 0 switches template_after and maximum_age_days off.

    forget_days: how long a viewer who was away for long is known as a stub (streams/ageing.py).
    """

    first_persona_after: int = 20
    template_after: int = 5
    maximum_age_days: int = 30
    request_expires_ms: int = 3_600_000
    forget_days: int = FORGET_DAYS


@dataclass(frozen=True, slots=True)
class Fired:
    """A rule fired: its value against its threshold."""

    rule: Rule
    value: float
    threshold: float
    template_only: bool = False


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a distribution is from the reference: bits, and the 99% quantile without any change of taste."""

    divergence: float
    null_quantile: float


def gates(policy: Policy, thresholds: Thresholds, idle: int) -> Gates:
    """The policy and thresholds as the kernel takes them. idle: ms after which a viewer starts anew."""
    return Gates(
        first=policy.first_persona_after,
        template=policy.template_after,
        maximum_age=policy.maximum_age_days * DAY_MS,
        regret=thresholds.regret,
        stride=thresholds.stride,
        memory=thresholds.memory,
        cool_down=thresholds.cool_down,
        idle=idle,
    )


def fired(state: State, now: Distribution, ts: int, gates: Gates, thresholds: Thresholds) -> Fired | None:
    """The rule that asks for a refresh after an event at `ts` that gave the distribution `now`. Changes nothing."""
    found = due(state, ts, gates)
    if found == NOTHING:
        return None
    if found == REGRET:
        return Fired(_named(state, now, thresholds), float(state["regret"]), gates.regret)
    if found == AGE:
        return Fired(Rule.AGE, (ts - int(state["request_ts"])) / DAY_MS, gates.maximum_age / DAY_MS)
    watches, below = float(state["qualifying"]), found != FIRST
    return Fired(Rule.COLD_START, watches, float(gates.template if below else gates.first), template_only=below)


def _named(state: State, now: Distribution, thresholds: Thresholds) -> Rule:
    """Follow-up soon after a drift; drift where chance alone seldom goes that far; else the persona grew sharper."""
    settling = _RULES[int(state["request_rule"])] in (Rule.DRIFT, Rule.FOLLOW_UP)
    if settling and int(state["since_request"]) <= SETTLING:
        return Rule.FOLLOW_UP
    found = distance(state, now, thresholds)
    return Rule.DRIFT if found.divergence > found.null_quantile else Rule.MATURITY


def distance(state: State, now: Distribution, thresholds: Thresholds) -> Distance:
    """How far the viewer's distribution is from what the last request described.

    Both come from finite samples, so the smaller of their sizes governs how far apart chance alone puts them.
    """
    return Distance(now.divergence, thresholds.null_quantile(min(now.n_eff, float(state["reference_n_eff"]))))


def adopt(state: State, now: Distribution, rule: Rule, *, template_only: bool) -> int:
    """Record that a request with this distribution is being emitted; returns its sequence.

    The distribution becomes the reference, and the regret starts anew.
    """
    sequence = int(state["sequence"]) + 1
    state["sequence"] = sequence
    if not state["student_sequence"] and not template_only:
        state["student_sequence"] = sequence
    state["reference"] = now.share
    state["reference_rest"] = now.rest
    state["regret"] = 0.0
    state["reference_n_eff"] = now.n_eff
    state["request_ts"] = state["last_ts"]
    state["request_rule"] = _RULES.index(rule)
    state["since_request"] = 0
    return sequence
