"""The refresh rule, first form: when does a viewer's persona no longer describe what they watch?

Page-Hinkley (Page 1954; Hinkley 1971) on each watch's surprise under the reference, which is the distribution that the
last request carried. With K clusters and consecutive repeats of a cluster collapsed into one run:

    v = min(1, -ln p_reference(x) / ln 40K)
    S <- max(0, S + v - mean(v) - delta)                    alarm when S > h, after `minimum_runs` runs

plus: the first persona at the gate, a follow-up after an alarm, maturity (evidence grew fourfold) and a maximum age.
`h` is calibrated on null streams and comes with the artefact that `Thresholds` reads; see streams/simulation.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from streams.interests import DAY_MS, Distribution, Floats, discount_old
from streams.records import Rule
from streams.state import State

FORMAT: Final = 1
ALARM_KEEPS: Final = 0.1
"""Factor of the old long counts after an alarm."""


class ThresholdsError(ValueError):
    """The calibrated artefact cannot be used."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The calibrated artefact.

    page_hinkley: h; delta: drift allowed without accumulating; minimum_runs: runs before an alarm; maturity_factor:
    growth of evidence that asks for a refresh; follow_up_after, cool_down: qualifying watches; divergence_null:
    (effective sample size, 99% quantile of the Jensen-Shannon divergence in bits without a shift), ascending.
    """

    name: str
    page_hinkley: float
    delta: float
    minimum_runs: int
    maturity_factor: float
    follow_up_after: int
    cool_down: int
    divergence_null: tuple[tuple[float, float], ...]

    def null_quantile(self, n_eff: float) -> float:
        """99% quantile of the divergence at this sample size, interpolated in the logarithm of the size."""
        sizes = [math.log(size) for size, _ in self.divergence_null]
        values = [value for _, value in self.divergence_null]
        return float(np.interp(math.log(max(n_eff, 1e-9)), sizes, values))


def read_thresholds(document: Mapping[str, Any]) -> Thresholds:
    """Thresholds from the parsed artefact. Raises ThresholdsError naming what is wrong."""
    if document.get("format") != FORMAT:
        raise ThresholdsError(f"thresholds of format {document.get('format')!r}, this version reads {FORMAT}")
    try:
        null = tuple((float(size), float(value)) for size, value in document["divergence_null"])
        thresholds = Thresholds(
            name=str(document["name"]),
            page_hinkley=float(document["page_hinkley"]),
            delta=float(document["delta"]),
            minimum_runs=int(document["minimum_runs"]),
            maturity_factor=float(document["maturity_factor"]),
            follow_up_after=int(document["follow_up_after"]),
            cool_down=int(document["cool_down"]),
            divergence_null=null,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ThresholdsError(f"thresholds: {error!r}") from error
    if not thresholds.page_hinkley > 0 or not null or list(null) != sorted(null) or null[0][0] <= 0:
        raise ThresholdsError("thresholds: page_hinkley must be above 0, divergence_null ascending and not empty")
    return thresholds


@dataclass(frozen=True, slots=True)
class Policy:
    """What an operator decides. Counts are qualifying watches; 0 switches template_after and maximum_age_days off."""

    first_persona_after: int = 20
    template_after: int = 5
    maximum_age_days: int = 30
    request_expires_ms: int = 3_600_000


@dataclass(frozen=True, slots=True)
class Fired:
    """A rule fired: its value against its threshold."""

    rule: Rule
    value: float
    threshold: float
    template_only: bool = False


def observe(state: State, slot: int, cluster: int, cluster_prior: float, clusters: int, thresholds: Thresholds) -> None:
    """Show the detector one qualifying, timely watch. Call it before `fired`."""
    state["since_request"] = int(state["since_request"]) + 1
    if state["follow_up"] > 1:
        state["follow_up"] = int(state["follow_up"]) - 1
    if not state["student_sequence"] or cluster == int(state["last_cluster"]):
        state["last_cluster"] = cluster
        return
    state["last_cluster"] = cluster
    probability = float(state["reference"][slot]) or float(state["reference_prior"]) * cluster_prior
    surprise = min(1.0, -math.log(max(probability, 1e-12)) / math.log(40.0 * clusters))
    runs = int(state["runs"]) + 1
    mean = float(state["surprise_mean"]) + (surprise - float(state["surprise_mean"])) / runs
    state["runs"], state["surprise_mean"] = runs, mean
    state["surprise_sum"] = max(0.0, float(state["surprise_sum"]) + surprise - mean - thresholds.delta)


def fired(state: State, ts: int, policy: Policy, thresholds: Thresholds) -> Fired | None:
    """The rule that asks for a refresh now, if any. Reads the state only."""
    if not state["student_sequence"]:
        return _first(state, policy)
    since = int(state["since_request"])
    if since < thresholds.cool_down:
        return None
    if int(state["follow_up"]) == 1:
        return Fired(Rule.FOLLOW_UP, float(since), float(thresholds.follow_up_after))
    value = float(state["surprise_sum"])
    if value > thresholds.page_hinkley and int(state["runs"]) >= thresholds.minimum_runs:
        return Fired(Rule.DRIFT, value, thresholds.page_hinkley)
    growth = float(state["evidence_mass"]) / max(float(state["reference_mass"]), 1e-9)
    if growth >= thresholds.maturity_factor:
        return Fired(Rule.MATURITY, growth, thresholds.maturity_factor)
    days = (ts - int(state["request_ts"])) / DAY_MS
    if policy.maximum_age_days and days >= policy.maximum_age_days:
        return Fired(Rule.AGE, days, float(policy.maximum_age_days))
    return None


def _first(state: State, policy: Policy) -> Fired | None:
    watches = int(state["qualifying"])
    if watches >= policy.first_persona_after:
        return Fired(Rule.COLD_START, float(watches), float(policy.first_persona_after))
    if policy.template_after and watches >= policy.template_after and not state["request_ts"]:
        return Fired(Rule.COLD_START, float(watches), float(policy.template_after), template_only=True)
    return None


def react(state: State, reason: Fired) -> None:
    """After an alarm the old taste loses most of its say: the snapshot follows the new one. Call before `adopt`."""
    if reason.rule is Rule.DRIFT:
        discount_old(state, ALARM_KEEPS)


def adopt(state: State, now: Distribution, rule: Rule, thresholds: Thresholds, *, template_only: bool) -> int:
    """Record that a request with this distribution is being emitted; returns its sequence.

    The distribution becomes the reference, and the detector starts anew.
    """
    sequence = int(state["sequence"]) + 1
    state["sequence"] = sequence
    if not state["student_sequence"] and not template_only:
        state["student_sequence"] = sequence
    state["reference"] = np.where(state["cluster"] >= 0, now.smoothed, 0.0)
    state["reference_prior"] = now.prior_weight
    state["reference_n_eff"] = now.n_eff
    state["reference_mass"] = state["evidence_mass"]
    state["request_ts"] = state["last_ts"]
    state["since_request"] = 0
    state["follow_up"] = thresholds.follow_up_after + 1 if rule is Rule.DRIFT else 0
    state["runs"], state["surprise_mean"], state["surprise_sum"] = 0, 0.0, 0.0
    return sequence


def divergence(before: Floats, now: Floats) -> float:
    """Jensen-Shannon divergence in bits, 0..1, of two share vectors (each sums to 1; zeros allowed)."""
    middle = 0.5 * (before + now)
    return max(0.0, 0.5 * (_relative_entropy(before, middle) + _relative_entropy(now, middle)))


def _relative_entropy(p: Floats, q: Floats) -> float:
    kept = p > 0
    return float((p[kept] * np.log2(p[kept] / q[kept])).sum())
