"""The refresh rule's settings: the calibrated artefact and the operator's policy. streams/requesting.py applies them.

The regret of streams/mixture.py: every few watches the squared divergence between the estimate and what the last
request described is added up, and a refresh is due when the sum passes the calibrated threshold. It finds shifts of
taste, and by itself gives young personas their follow-ups. Calibration (agents/calibration.py) writes the artefact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from streams.ageing import FORGET_DAYS
from streams.mixture import Constants, Floats
from streams.requesting import Gates, null_quantile
from streams.topics import DAY_MS

FORMAT: Final = 2


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
        return float(null_quantile(n_eff, *self.null_table()))

    def null_table(self) -> tuple[Floats, Floats]:
        """`divergence_null` as two arrays, sizes and values."""
        sizes, values = zip(*self.divergence_null, strict=True)
        return np.array(sizes, np.float64), np.array(values, np.float64)


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


def gates(policy: Policy, thresholds: Thresholds, idle: int) -> Gates:
    """The policy and thresholds as the kernel takes them. idle: ms after which a viewer starts anew."""
    sizes, values = thresholds.null_table()
    return Gates(
        first=policy.first_persona_after,
        template=policy.template_after,
        maximum_age=policy.maximum_age_days * DAY_MS,
        regret=thresholds.regret,
        stride=thresholds.stride,
        memory=thresholds.memory,
        cool_down=thresholds.cool_down,
        idle=idle,
        null_sizes=sizes,
        null_values=values,
    )
