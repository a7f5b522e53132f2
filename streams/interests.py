"""What a viewer's watches add up to: decayed counts at two horizons, evidence, and the distribution they describe.

    c <- c * 2^(-|w| / H_events - days / H_days) + w

Half-lives count events (weights) and days together, so that a light viewer forgets by the calendar and a heavy one by
what was watched since. The counts say how much backs an interest, and whether it rises or falls; the shares come from
the estimator in streams/mixture.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from streams.mixture import Floats, Model, estimate, fresh_draws, observe, seat, withdraw
from streams.records import Action, WatchEvent
from streams.state import SLOTS, State, slot_of

DAY_MS: Final = 86_400_000
SHORT_EVENTS, LONG_EVENTS = 12.0, 80.0
SHORT_DAYS, LONG_DAYS = 14.0, 90.0
SESSION_CAP: Final = 4.0
"""Most weight one cluster gains in one session: an evening of one series is one evening's interest."""
SESSION_UNIT: Final = 1 / 8192
"""In which a state holds the weight that a cluster gained in the session."""
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


def count_watch(
    state: State, cluster: int, weight: float, ts: int, video: int, model: Model, *, evidence: bool
) -> tuple[int, float]:
    """Count one watch of `weight` (negative: a dislike) at `ts`; returns its slot and how much of it was counted.

    Call `advance` first. An event older than the state's time is decayed by days to its own time. `evidence`: keep the
    video as evidence of the interest.
    """
    slot = seat(state, cluster, model)
    size = abs(weight)
    room = max(0.0, SESSION_CAP - int(state["in_session"][slot]) * SESSION_UNIT)
    size = min(size, room)
    state["in_session"][slot] = int(state["in_session"][slot]) + math.ceil(size / SESSION_UNIT)
    _decay(state, 2.0 ** (-size / SHORT_EVENTS), 2.0 ** (-size / LONG_EVENTS))
    late_days = max(0, int(state["last_ts"]) - ts) / DAY_MS
    short, long = size * 2.0 ** (-late_days / SHORT_DAYS), size * 2.0 ** (-late_days / LONG_DAYS)
    if weight < 0:
        state["negative"][slot] = min(float(state["negative"][slot]) + long, MAXIMUM_COUNT)
        return slot, -size
    state["short"][slot] = min(float(state["short"][slot]) + short, MAXIMUM_COUNT)
    state["long"][slot] = min(float(state["long"][slot]) + long, MAXIMUM_COUNT)
    if evidence:
        _keep_evidence(state, slot, video, ts)
    return slot, size


def draw(state: State, slot: int, counted: float, model: Model, *, autoplay: bool) -> float:
    """Show the estimator one qualifying watch; returns how much of a fresh draw from the taste it was, 0..1.

    A watch is one choice, however long it was; one that began by itself is half of one, and one beyond the session's
    cap (counted 0) is none.
    """
    size = 0.0 if counted <= 0 else AUTOPLAY_FACTOR if autoplay else 1.0
    return observe(state, slot, size, model)[1]


def retract(state: State, cluster: int, counted: float, drawn: float, restarts: int, ts: int, model: Model) -> None:
    """Take back what `count_watch` counted at `ts` (negative: a dislike), decayed to now by days, and what `draw` drew.

    restarts: of the estimator before the draw, modulo 256. Nothing falls below zero.
    """
    slot = slot_of(state, cluster)
    if slot < 0:
        return
    withdraw(state, slot, drawn, restarts, model.constants)
    days = max(0, int(state["last_ts"]) - ts) / DAY_MS
    short, long = (abs(counted) * 2.0 ** (-days / half_life) for half_life in (SHORT_DAYS, LONG_DAYS))
    if counted < 0:
        state["negative"][slot] = max(0.0, float(state["negative"][slot]) - long)
        return
    state["short"][slot] = max(0.0, float(state["short"][slot]) - short)
    state["long"][slot] = max(0.0, float(state["long"][slot]) - long)


@dataclass(frozen=True, slots=True)
class Distribution:
    """The viewer's distribution over clusters at one moment, slot by slot.

    share: (SLOTS,) posterior mean, 0 where empty; rest: of every other cluster, per unit of the population's share, so
    that all of it sums to 1; short, long: (SLOTS,) each horizon's counts, as shares; n_eff: independent draws behind
    it.
    """

    share: Floats
    rest: float
    short: Floats
    long: Floats
    n_eff: float


def distribution(state: State, model: Model) -> Distribution:
    """What the viewer's watches say now."""
    share, rest = estimate(state, model)
    short, long = _normalised(state["short"]), _normalised(state["long"])
    return Distribution(share, float(rest), short, long, float(fresh_draws(state)))


def _normalised(counts: npt.NDArray[np.float32]) -> Floats:
    values = counts.astype(np.float64)
    total = float(values.sum())
    return values / total if total > 1e-9 else np.zeros(SLOTS)


def _decay(state: State, short: float, long: float) -> None:
    state["short"] *= np.float32(short)
    state["long"] *= np.float32(long)
    state["negative"] *= np.float32(long)


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
