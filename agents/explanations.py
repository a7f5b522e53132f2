"""Why a refresh was asked for, in words: the same in the terminal and on the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from streams.records import Explanation, Rule

SCALE_ROOM: Final = 1.2
"""A scale ends this far beyond the larger of its two values, so that neither stands at the edge."""
CHANCE: Final = "99% of viewers whose taste did not change stay below this, with as many watches as this one has."
_REGRET: Final = "Squared divergence from the last request, added up watch by watch (bits² x watches)."
_HEADLINES: Final = {
    Rule.COLD_START: "Enough was watched for a first persona.",
    Rule.DRIFT: "The interests have moved further than chance explains.",
    Rule.FOLLOW_UP: "The interests moved lately, and what was watched since shows more clearly where to.",
    Rule.MATURITY: "The same interests are known more precisely by now.",
    Rule.AGE: "The persona has reached the maximum age.",
    Rule.CONTROL: "The viewer asked for a change.",
}


@dataclass(frozen=True, slots=True)
class Reason:
    """A fired rule in words.

    headline: what happened; measure: the rule's value against its threshold, "" for a rule that measures nothing;
    meaning: what is measured, "" where the measure says it; end: where a scale of value and threshold ends.
    """

    headline: str
    measure: str
    meaning: str
    end: float


def reason_of(explanation: Explanation) -> Reason:
    """The words for an explanation."""
    value, threshold = explanation.value, explanation.threshold
    measure, meaning = "", ""
    match explanation.rule:
        case Rule.DRIFT | Rule.FOLLOW_UP | Rule.MATURITY:
            measure, meaning = f"accumulated regret {value:.3f} of {threshold:.3f}", _REGRET
        case Rule.AGE:
            measure = f"age {value:.1f} of {threshold:.0f} days"
        case Rule.COLD_START:
            measure = f"{value:.0f} of {threshold:.0f} qualifying watches"
    return Reason(_HEADLINES[explanation.rule], measure, meaning, scale_end(value, threshold))


def divergence_measure(explanation: Explanation) -> str:
    """The divergence against what chance explains, "" where there is none."""
    value, chance = explanation.divergence, explanation.divergence_null
    if value is None:
        return ""
    if chance is None:
        return f"divergence {value:.3f} bits"
    verdict = "beyond" if value > chance else "within"
    return f"divergence {value:.3f} bits, {verdict} what chance explains ({chance:.3f})"


def scale_end(value: float, mark: float | None) -> float:
    """Where a scale that shows both ends; above 0."""
    return SCALE_ROOM * max(value, mark or 0.0, 1e-9)
