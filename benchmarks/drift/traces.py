"""What each estimator believed about one viewer after each event, beside what was true."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks.drift import ours
from streams.counting import LONG_DAYS, LONG_EVENTS, SESSION_GAP_MS, SHORT_DAYS, SHORT_EVENTS
from streams.simulation import SimulatedStream
from streams.topics import DAY_MS

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

DECAYED, MIXTURE = "decayed blend", "mixture"
FIRST: Final = 19
"""Index of the event after which the first persona is written: the 20th."""
SHORT_BLEND, PRIOR_WEIGHT = 0.25, 1.0
"""Of the decayed blend: weight of the short horizon, and of the uniform prior in effective events."""
RECENT_DAYS: Final = 3.0


@dataclass(frozen=True)
class Trace:
    """One viewer. K clusters.

    cluster, days: (events,), days since the first event; visits: (events,) true where a session starts; truth: (events,
    K); estimates: by estimator, (events, K) after each event; recent: (events, K) the decayed blend's short horizon;
    recent_days: (events, K) a half-life of three days alone.
    """

    stream: SimulatedStream
    cluster: Integers
    days: Floats
    visits: npt.NDArray[np.bool_]
    truth: Floats
    estimates: Mapping[str, Floats]
    recent: Floats
    recent_days: Floats


def trace(stream: SimulatedStream) -> Trace:
    cluster, ts = np.array(stream.cluster), np.array(stream.ts)
    days = (ts - ts[0]) / DAY_MS
    seen = np.eye(stream.viewer.clusters)[cluster]
    return Trace(
        stream=stream,
        cluster=cluster,
        days=days,
        visits=np.diff(ts, prepend=0) > SESSION_GAP_MS,
        truth=stream.truth(),
        estimates={DECAYED: decayed_blend(seen, days), MIXTURE: ours.estimates(stream)},
        recent=decayed(seen, days, SHORT_EVENTS, SHORT_DAYS)[0],
        recent_days=decayed(seen, days, np.inf, RECENT_DAYS)[0],
    )


def decayed(seen: Floats, days: Floats, half_life_events: float, half_life_days: float) -> tuple[Floats, Floats]:
    """Shares of decayed counts, (events, K), and the effective sample size, (events,).

    Counts at event i are the sum over j <= i of seen[j] 2^(D[j] - D[i]) with D = events / half-life + days / half-life;
    D[i] cancels in both figures. Raises FloatingPointError where a stream is too long for that (D above about 500).
    """
    age = np.arange(len(seen)) / half_life_events + days / half_life_days
    with np.errstate(over="raise"):
        growth = np.exp2(age)
        total = np.cumsum(growth)
        return np.cumsum(growth[:, None] * seen, axis=0) / total[:, None], total**2 / np.cumsum(growth**2)


def decayed_blend(seen: Floats, days: Floats) -> Floats:
    """Decayed counts at two horizons with a uniform prior, (events, K)."""
    short, _ = decayed(seen, days, SHORT_EVENTS, SHORT_DAYS)
    long, n_eff = decayed(seen, days, LONG_EVENTS, LONG_DAYS)
    share = (1.0 - SHORT_BLEND) * long + SHORT_BLEND * short
    prior = (PRIOR_WEIGHT / (n_eff + PRIOR_WEIGHT))[:, None]
    blend: Floats = (1.0 - prior) * share + prior / seen.shape[1]
    return blend


def divergence(p: Floats, q: Floats) -> Floats:
    """Jensen-Shannon divergence in bits along the last axis, 0..1 (Lin 1991)."""
    bits: Floats = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    return np.maximum(bits, 0.0)


def entropy(p: Floats) -> Floats:
    bits: Floats = -(p * np.log2(np.maximum(p, 1e-300))).sum(axis=-1)
    return bits
