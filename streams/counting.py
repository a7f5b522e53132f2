"""What one watch event does to its viewer's state: markers, duplicates, counts, evidence, the estimator, the rule.

    c <- c * 2^(-|w| / H_events - days / H_days) + w

Half-lives count events (weights) and days together, so that a light viewer forgets by the calendar and a heavy one by
what was watched since. The counts say how much backs an interest, and whether it rises or falls; the shares come from
the estimator in streams/mixture.py.

Like there, everything works on scalars and on the arrays inside one record, so that the same source runs as plain
Python and compiled over whole batches, with the same bytes as a result.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from streams.choosing import Catalogue
from streams.mixture import LN2, Model, Record, accumulate, double, observe, seat, whole, withdraw
from streams.records import UNASSIGNED
from streams.requesting import NOTHING, Gates, Requests, ask_due, due
from streams.state import BOOTSTRAPPED, OPTED_OUT, RING, SLOTS, UNIT
from streams.topics import DAY_MS

SHORT_EVENTS, LONG_EVENTS = 12.0, 80.0
SHORT_DAYS, LONG_DAYS = 14.0, 90.0
SESSION_CAP: Final = 4.0
"""Most weight one cluster gains in one session: an evening of one series is one evening's interest."""
SESSION_GAP_MS: Final = 30 * 60_000
QUALIFYING_WEIGHT: Final = 0.3
"""A watch of at least this weight counts towards the first persona and is seen by the detector."""
AUTOPLAY_FACTOR: Final = 0.5
MAXIMUM_COUNT: Final = 1e6
LATE_AFTER_MS: Final = 5 * 60_000
"""An event this far behind its viewer's newest one is counted but says nothing to the detector."""
TOO_LATE_MS: Final = 30 * DAY_MS
LATEST_SECOND: Final = 2**32 - 1

PLAYBACK: Final = 1
"""Flag of an event: a heartbeat, whose key names its playback."""
AUTOPLAY: Final = 2
LOADED: Final = 4
"""Flag of an event: part of a history being loaded."""
CLAMPED: Final = 8
"""Flag of an event: a value was brought into range."""

APPLIED, APPLIED_CLAMPED, LATE, DUPLICATE, REPEATED, OPT_OUT, TOO_LATE, AGED = range(1, 9)
"""Outcomes of events, as `streams.watch.Outcome` names them; 0: still to be applied."""
STOP: Final = -1
"""Found where the kernel cannot go on by itself."""

EVENT: Final = np.dtype(
    [
        ("row", "<i8"),  # of its viewer in the table of states
        ("offset", "<i8"),
        ("ts", "<i8"),
        ("key", "<u8"),  # identity among the viewer's events
        ("video", "<u8"),
        ("session", "<u8"),  # 0: no id
        ("weight", "<f8"),  # -2..1, a multiple of UNIT
        ("cluster", "<i4"),
        ("audience", "u1"),  # place in Audience, from 1; 0: not said
        ("flags", "u1"),
        ("outcome", "u1"),  # set by `apply`
    ]
)
"""A decoded watch event, as the kernel takes it."""


class Log(NamedTuple):
    """Where events come from. topic: hash of the topic's id."""

    topic: np.uint64
    partition: int


def apply(
    states: npt.NDArray[np.void],
    events: npt.NDArray[np.void],
    start: int,
    log: Log,
    model: Model,
    gates: Gates,
    catalogue: Catalogue,
    requests: Requests,
) -> tuple[int, int]:
    """Apply events in order from `start`; returns the place of the next one and the number of requests made.

    It stops where there is no room for another request, or before an event that needs more than counting: one of
    outcome TOO_LATE, or of outcome AGED, whose viewer's state must be aged first. states: (rows,) STATE, changed in
    place; events: (events,) EVENT, their outcomes are set; requests: at least one, the first ones are filled.
    """
    made = 0
    for i in range(start, len(events)):
        state = states[events[i]["row"]]
        found = _apply(state, events[i], log, model, gates)
        if found == STOP:
            return i, made
        if found != NOTHING:
            requests[made]["place"] = i
            ask_due(state, found, whole(events[i]["ts"]), model, gates, catalogue, requests[made])
            made += 1
            if made == len(requests):
                return i + 1, made
    return len(events), made


def _apply(state: Record, event: Record, log: Log, model: Model, gates: Gates) -> int:
    """What `due` finds after the event, or STOP."""
    if (
        state["watch_offset"] >= event["offset"]
        and state["watch_topic"] == log.topic
        and state["watch_partition"] == log.partition
    ):
        event["outcome"] = REPEATED
        return NOTHING
    ts, last = whole(event["ts"]), whole(state["last_ts"])
    if last > 0 and ts - last > gates.idle:
        event["outcome"] = AGED
        return STOP
    state["watch_topic"] = log.topic
    state["watch_partition"] = log.partition
    state["watch_offset"] = event["offset"]
    if whole(state["flags"]) & OPTED_OUT:
        event["outcome"] = OPT_OUT
        return NOTHING
    if last - ts > TOO_LATE_MS:
        event["outcome"] = TOO_LATE
        return STOP
    return _count(state, event, model, gates, last - ts > LATE_AFTER_MS)


def _count(state: Record, event: Record, model: Model, gates: Gates, late: bool) -> int:
    weight, flags, ts = double(event["weight"]), whole(event["flags"]), whole(event["ts"])
    place = ring_place(state, event["key"])
    before = 0.0
    if place >= 0:
        before = double(state["ring_weight"][place]) * UNIT
        if not flags & PLAYBACK or weight <= before:
            event["outcome"] = DUPLICATE
            return NOTHING
    event["outcome"] = LATE if late else APPLIED_CLAMPED if flags & CLAMPED else APPLIED
    if event["audience"] > 0:
        state["audience"] = event["audience"]
    if state["first_ts"] == 0 or ts < state["first_ts"]:
        state["first_ts"] = ts
    advance(state, ts)
    enter_session(state, ts, event["session"])
    if place < 0:
        state["events"] = whole(state["events"]) + 1
    place = _remember(state, place, event, weight)
    cluster = whole(event["cluster"])
    if cluster == UNASSIGNED:
        state["unassigned"] = double(state["unassigned"]) + 1.0
        return NOTHING
    gained = weight - before
    if gained == 0.0:
        return NOTHING
    qualifies = weight >= QUALIFYING_WEIGHT
    slot, counted = count_watch(state, cluster, gained, ts, event["video"], model, qualifies)
    state["ring_counted"][place] = whole(state["ring_counted"][place]) + in_units(counted)
    if not qualifies or before >= QUALIFYING_WEIGHT:
        return NOTHING
    restarts = whole(state["restarts"])
    drawn = draw(state, slot, counted, model, flags & AUTOPLAY > 0)
    state["ring_draw"][place] = in_units(drawn)
    state["ring_restarts"][place] = restarts % 256
    state["qualifying"] = whole(state["qualifying"]) + 1
    if flags & LOADED:
        state["flags"] = whole(state["flags"]) | BOOTSTRAPPED
        return NOTHING
    if late:
        return NOTHING
    notice(state, model, gates)
    return due(state, ts, gates)


def notice(state: Record, model: Model, gates: Gates) -> None:
    """Note one qualifying, timely watch, which the estimator has seen, for the refresh rule."""
    state["since_request"] = whole(state["since_request"]) + 1
    if state["student_sequence"] > 0 and whole(state["since_request"]) % gates.stride == 0:
        accumulate(state, gates.stride, gates.memory, model)


# Parts, in the order in which an event needs them


def in_units(weight: float) -> int:
    """A weight as a state holds it, rounded to the nearest."""
    return math.floor(weight / UNIT + 0.5)


def ring_place(state: Record, key: int) -> int:
    """Place of an event or playback among the last ones, or -1."""
    for i in range(whole(state["ring_used"])):
        if state["ring_key"][i] == key:
            return i
    return -1


def advance(state: Record, ts: int) -> None:
    """Move the state's time forward to `ts`, decaying by days. A time in the past changes nothing."""
    last = whole(state["last_ts"])
    if last > 0 and ts > last:
        days = (ts - last) / DAY_MS
        _decay(state, math.exp(-LN2 * days / SHORT_DAYS), math.exp(-LN2 * days / LONG_DAYS))
    if ts > last:
        state["last_ts"] = ts


def enter_session(state: Record, ts: int, session: int) -> None:
    """Start a new session where the id changed (0: no id, then after a 30-minute gap)."""
    if session != 0 or state["session_key"] != 0:
        changed = session != state["session_key"]
    else:
        changed = ts - whole(state["session_ts"]) > SESSION_GAP_MS
    if changed:
        for slot in range(SLOTS):
            state["in_session"][slot] = 0
    state["session_key"] = session
    if ts > state["session_ts"]:
        state["session_ts"] = ts


def _remember(state: Record, place: int, event: Record, weight: float) -> int:
    """Keep the event among the last ones; returns its place, the one it had (-1: none) or the oldest one's."""
    if place < 0:
        place = whole(state["ring_next"])
        state["ring_counted"][place] = 0
        state["ring_draw"][place] = 0
        state["ring_next"] = (place + 1) % RING
        if state["ring_used"] < RING:
            state["ring_used"] = whole(state["ring_used"]) + 1
    state["ring_key"][place] = event["key"]
    state["ring_video"][place] = event["video"]
    state["ring_ts"][place] = min(whole(event["ts"]) // 1000, LATEST_SECOND)
    state["ring_cluster"][place] = event["cluster"]
    state["ring_weight"][place] = in_units(weight)
    return place


def count_watch(
    state: Record, cluster: int, weight: float, ts: int, video: int, model: Model, evidence: bool
) -> tuple[int, float]:
    """Count one watch of `weight` (negative: a dislike) at `ts`; returns its slot and how much of it was counted.

    Call `advance` first. An event older than the state's time is decayed by days to its own time. `evidence`: keep the
    video as evidence of the interest.
    """
    slot = seat(state, cluster, model)
    used = whole(state["in_session"][slot])
    size = min(abs(weight), max(0.0, SESSION_CAP - used * UNIT))
    state["in_session"][slot] = used + math.ceil(size / UNIT)
    _decay(state, math.exp(-LN2 * size / SHORT_EVENTS), math.exp(-LN2 * size / LONG_EVENTS))
    late_days = max(0, whole(state["last_ts"]) - ts) / DAY_MS
    long = size * math.exp(-LN2 * late_days / LONG_DAYS)
    if weight < 0.0:
        state["negative"][slot] = min(double(state["negative"][slot]) + long, MAXIMUM_COUNT)
        return slot, -size
    short = size * math.exp(-LN2 * late_days / SHORT_DAYS)
    state["short"][slot] = min(double(state["short"][slot]) + short, MAXIMUM_COUNT)
    state["long"][slot] = min(double(state["long"][slot]) + long, MAXIMUM_COUNT)
    if evidence:
        _keep_evidence(state, slot, video, ts)
    return slot, size


def draw(state: Record, slot: int, counted: float, model: Model, autoplay: bool) -> float:
    """Show the estimator one qualifying watch; returns how much of a fresh draw from the taste it was, 0..1.

    A watch is one choice, however long it was; one that began by itself is half of one, and one beyond the session's
    cap (counted 0) is none.
    """
    size = 0.0 if counted <= 0.0 else AUTOPLAY_FACTOR if autoplay else 1.0
    return observe(state, slot, size, model)[1]


def retract(state: Record, slot: int, counted: float, drawn: float, restarts: int, ts: int, model: Model) -> None:
    """Take back what `count_watch` counted at `ts` (negative: a dislike), decayed to now by days, and what `draw` drew.

    restarts: of the estimator before the draw, modulo 256. Nothing falls below zero.
    """
    withdraw(state, slot, drawn, restarts, model.constants)
    days = max(0, whole(state["last_ts"]) - ts) / DAY_MS
    long = abs(counted) * math.exp(-LN2 * days / LONG_DAYS)
    if counted < 0.0:
        state["negative"][slot] = max(0.0, double(state["negative"][slot]) - long)
        return
    short = abs(counted) * math.exp(-LN2 * days / SHORT_DAYS)
    state["short"][slot] = max(0.0, double(state["short"][slot]) - short)
    state["long"][slot] = max(0.0, double(state["long"][slot]) - long)


def _decay(state: Record, short: float, long: float) -> None:
    for slot in range(SLOTS):
        state["short"][slot] = double(state["short"][slot]) * short
        state["long"][slot] = double(state["long"][slot]) * long
        state["negative"][slot] = double(state["negative"][slot]) * long


def _keep_evidence(state: Record, slot: int, video: int, ts: int) -> None:
    """The newest watch of each of the last distinct videos, newest first."""
    videos, times = state["evidence_video"][slot], state["evidence_ts"][slot]
    if videos[0] == video:
        times[0] = max(ts, whole(times[0]))
        return
    if ts < times[0]:
        if ts >= times[1]:
            videos[1] = video
            times[1] = ts
        return
    videos[1] = videos[0]
    times[1] = times[0]
    videos[0] = video
    times[0] = ts
