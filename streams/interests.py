"""The estimator, first form: sparse decayed counts at two horizons, and the distribution they describe.

    c <- c * 2^(-|w| / H_events - days / H_days) + w        n_eff = (sum c)^2 / (decayed sum of w^2)
    p = (n_eff * c / sum c + a * g) / (n_eff + a)            a = 1, g the global prior over clusters

Half-lives count events (weights) and days together, so that a light viewer forgets by the calendar and a heavy one by
what was watched since. A better estimator takes this module's place: the rest uses `count_watch` and `distribution`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from streams.records import Action, WatchEvent
from streams.state import SLOTS, State, clear_slot, slot_of

DAY_MS: Final = 86_400_000
SHORT_EVENTS, LONG_EVENTS = 12.0, 80.0
SHORT_DAYS, LONG_DAYS = 14.0, 90.0
PRIOR_WEIGHT: Final = 1.0
SHORT_BLEND: Final = 0.25
"""Weight of the short horizon in the viewer's distribution."""
SESSION_CAP: Final = 4.0
"""Most weight one cluster gains in one session: an evening of one series is one evening's interest."""
SESSION_GAP_MS: Final = 30 * 60_000
MINIMUM_FRACTION: Final = 0.1
"""A play shorter than this share of the video says nothing."""
QUALIFYING_WEIGHT: Final = 0.3
"""A watch of at least this weight counts towards the first persona and is seen by the detector."""
AUTOPLAY_FACTOR: Final = 0.5
MAXIMUM_COUNT: Final = 1e6

_FIXED_WEIGHTS: Final = {
    Action.THUMBS_UP: 1.0,
    Action.SHARE: 1.0,
    Action.BOOKMARK: 1.0,
    Action.SKIP: -0.25,
    Action.THUMBS_DOWN: -1.0,
    Action.NOT_INTERESTED: -2.0,
}

Floats = npt.NDArray[np.float64]


def watch_weight(event: WatchEvent) -> float:
    """Weight of an event, -2..1: what share was watched, or what the viewer said. Unknown shares count in full."""
    if event.action is not Action.PLAY:
        return _FIXED_WEIGHTS[event.action]
    fraction = event.watch_fraction
    if event.watch_ms is not None and event.duration_ms:
        fraction = event.watch_ms / event.duration_ms
    if fraction is None:
        fraction = 1.0
    if fraction < MINIMUM_FRACTION:
        return 0.0
    return min(fraction, 1.0) * (AUTOPLAY_FACTOR if event.autoplay else 1.0)


def enter_session(state: State, ts: int, session_key: int) -> None:
    """Start a new session where the id changed (0: no id, then after a 30-minute gap)."""
    current = int(state["session_key"])
    changed = session_key != current if session_key or current else ts - int(state["session_ts"]) > SESSION_GAP_MS
    if changed:
        state["in_session"] = 0
    state["session_key"] = session_key
    state["session_ts"] = max(ts, int(state["session_ts"]))


def advance(state: State, ts: int) -> None:
    """Move the state's time forward to `ts`, decaying by days. A time in the past changes nothing."""
    last = int(state["last_ts"])
    if last and ts > last:
        days = (ts - last) / DAY_MS
        _decay(state, 2.0 ** (-days / SHORT_DAYS), 2.0 ** (-days / LONG_DAYS))
    state["last_ts"] = max(ts, last)


def count_watch(state: State, cluster: int, weight: float, ts: int, video: int, *, evidence: bool) -> tuple[int, float]:
    """Count one watch of `weight` (negative: a dislike) at `ts`; returns its slot and how much of it was counted.

    Call `advance` first. An event older than the state's time is decayed by days to its own time. `evidence`: keep the
    video as evidence of the interest.
    """
    slot = seat(state, cluster)
    size = abs(weight)
    room = max(0.0, SESSION_CAP - float(state["in_session"][slot]))
    size = min(size, room)
    state["in_session"][slot] += size
    _decay(state, 2.0 ** (-size / SHORT_EVENTS), 2.0 ** (-size / LONG_EVENTS))
    late_days = max(0, int(state["last_ts"]) - ts) / DAY_MS
    short, long = size * 2.0 ** (-late_days / SHORT_DAYS), size * 2.0 ** (-late_days / LONG_DAYS)
    if weight < 0:
        state["negative"][slot] = min(float(state["negative"][slot]) + long, MAXIMUM_COUNT)
        return slot, -size
    state["short"][slot] = min(float(state["short"][slot]) + short, MAXIMUM_COUNT)
    state["long"][slot] = min(float(state["long"][slot]) + long, MAXIMUM_COUNT)
    state["short_squares"] += short * short
    state["long_squares"] += long * long
    state["evidence_mass"] += size
    if evidence:
        _keep_evidence(state, slot, video, ts)
    return slot, size


def retract(state: State, cluster: int, counted: float, ts: int) -> None:
    """Take back what `count_watch` counted at `ts` (negative: a dislike), decayed to now by days; never below zero."""
    slot = slot_of(state, cluster)
    if slot < 0 or counted == 0:
        return
    days = max(0, int(state["last_ts"]) - ts) / DAY_MS
    short, long = (abs(counted) * 2.0 ** (-days / half_life) for half_life in (SHORT_DAYS, LONG_DAYS))
    if counted < 0:
        state["negative"][slot] = max(0.0, float(state["negative"][slot]) - long)
        return
    state["short"][slot] = max(0.0, float(state["short"][slot]) - short)
    state["long"][slot] = max(0.0, float(state["long"][slot]) - long)
    state["short_squares"] = max(0.0, float(state["short_squares"]) - short * short)
    state["long_squares"] = max(0.0, float(state["long_squares"]) - long * long)
    state["evidence_mass"] = max(0.0, float(state["evidence_mass"]) - abs(counted))


def discount_old(state: State, factor: float) -> None:
    """After an alarm the long counts lose most of their say, so that the next snapshot follows the new taste."""
    keep = np.float32(factor)
    state["long"] = state["long"] * keep + state["short"] * (np.float32(1.0) - keep)
    state["long_squares"] = float(state["long_squares"]) * factor + float(state["short_squares"]) * (1.0 - factor)


@dataclass(frozen=True, slots=True)
class Distribution:
    """The viewer's distribution over clusters at one moment, slot by slot.

    share: (SLOTS,) of the viewer's own watches, sums to 1 or is all zero; short, long: the same at each horizon;
    smoothed: (SLOTS,) with the prior mixed in; prior_weight: what a cluster without a slot gets, times its prior.
    """

    share: Floats
    short: Floats
    long: Floats
    smoothed: Floats
    prior_weight: float
    n_eff: float


def distribution(state: State, slot_prior: Floats) -> Distribution:
    """Blend of both horizons. `slot_prior` is (SLOTS,): the global share of each slot's cluster, 0 where empty."""
    long, short = _normalised(state["long"]), _normalised(state["short"])
    share = (1.0 - SHORT_BLEND) * long + SHORT_BLEND * short
    squares = float(state["long_squares"])
    total = float(state["long"].astype(np.float64).sum())
    n_eff = total * total / squares if squares > 1e-12 else 0.0
    prior_weight = PRIOR_WEIGHT / (n_eff + PRIOR_WEIGHT)
    smoothed = share * (1.0 - prior_weight) + prior_weight * slot_prior
    return Distribution(share, short, long, smoothed, prior_weight, n_eff)


def _normalised(counts: npt.NDArray[np.float32]) -> Floats:
    values = counts.astype(np.float64)
    total = float(values.sum())
    return values / total if total > 1e-9 else np.zeros(SLOTS)


def _decay(state: State, short: float, long: float) -> None:
    state["short"] *= np.float32(short)
    state["long"] *= np.float32(long)
    state["negative"] *= np.float32(long)
    state["short_squares"] *= short * short
    state["long_squares"] *= long * long


def seat(state: State, cluster: int) -> int:
    """The cluster's slot, a free one, or the weakest one, which makes room."""
    slot = slot_of(state, cluster)
    if slot >= 0:
        return slot
    free = np.nonzero(state["cluster"] < 0)[0]
    if free.size:
        slot = int(free[0])
    else:
        mass = state["long"] + state["short"] + state["negative"]
        slot = int(np.argmin(mass))
        clear_slot(state, slot)
    state["cluster"][slot] = cluster
    return slot


def _keep_evidence(state: State, slot: int, video: int, ts: int) -> None:
    """The newest watch of each of the last distinct videos, newest first."""
    videos, times = state["evidence_video"][slot], state["evidence_ts"][slot]
    if int(videos[0]) == video:
        times[0] = max(ts, int(times[0]))
        return
    if ts < int(times[0]):
        if ts >= int(times[1]):
            videos[1], times[1] = video, ts
        return
    videos[1], times[1] = videos[0], times[0]
    videos[0], times[0] = video, ts
