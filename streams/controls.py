"""What a viewer's controls do to their state: pure, applied at the recorded position."""

from __future__ import annotations

import numpy as np

from streams.counting import retract
from streams.identifiers import video_key
from streams.mixture import Model, seat
from streams.records import Command, ControlKind, UserControl
from streams.state import EMPTY, HIDDEN, OPTED_OUT, PINNED, UNIT, State, members, reset, slot_of


def apply_control(state: State, control: UserControl, model: Model) -> tuple[State, Command | None]:
    """The state after a control, and what it asks of the persona app (None: nothing).

    Erasing, opting out and clearing the history start a new epoch; what was counted is gone, markers stay. So does the
    audience unless everything is erased: without it a child's next persona could propose anything.
    """
    kind = control.kind
    if kind is ControlKind.ERASE:
        return _forgotten(state, flags=0), Command.ERASE
    if kind is ControlKind.OPT_OUT:
        gone = _forgotten(state, flags=OPTED_OUT)
        gone["audience"] = state["audience"]
        return gone, Command.OPT_OUT
    if kind is ControlKind.OPT_IN:
        state["flags"] = int(state["flags"]) & ~OPTED_OUT
        return state, None
    if kind is ControlKind.CLEAR_HISTORY:
        cleared = _forgotten(state, flags=int(state["flags"]))
        cleared["hidden"], cleared["pinned"], cleared["audience"] = state["hidden"], state["pinned"], state["audience"]
        for cluster in sorted(members(state["pinned"])):
            seat(cleared, cluster, model)
        return cleared, Command.ERASE
    if int(state["flags"]) & OPTED_OUT:
        return state, None
    if kind is ControlKind.FORGET_VIDEO:
        _forget_video(state, video_key(control.video_id or ""), model)
    else:
        _list_control(state, kind, control.cluster_id if control.cluster_id is not None else EMPTY, model)
    return state, Command.REFRESH if state["request_ts"] else None


def _forgotten(state: State, *, flags: int) -> State:
    return reset(state, epoch=int(state["epoch"]) + 1, flags=flags)


def _list_control(state: State, kind: ControlKind, cluster: int, model: Model) -> None:
    """Hiding lifts a pin and the other way round; a full list drops its oldest entry."""
    hidden = [c for c in state["hidden"].tolist() if c not in (EMPTY, cluster)]
    pinned = [c for c in state["pinned"].tolist() if c not in (EMPTY, cluster)]
    if kind is ControlKind.HIDE:
        hidden.append(cluster)
    if kind is ControlKind.PIN:
        pinned.append(cluster)
        seat(state, cluster, model)
    state["hidden"] = _padded(hidden, HIDDEN)
    state["pinned"] = _padded(pinned, PINNED)


def _padded(ids: list[int], size: int) -> list[int]:
    kept = ids[-size:]
    return kept + [EMPTY] * (size - len(kept))


def _forget_video(state: State, video: int, model: Model) -> None:
    """Take back the video's watches among the last events, and every place where it is evidence."""
    for i in range(int(state["ring_used"])):
        if int(state["ring_video"][i]) == video and int(state["ring_cluster"][i]) >= 0:
            counted, drawn = int(state["ring_counted"][i]) * UNIT, int(state["ring_draw"][i]) * UNIT
            slot, restarts = slot_of(state, int(state["ring_cluster"][i])), int(state["ring_restarts"][i])
            if slot >= 0:
                retract(state, slot, counted, drawn, restarts, int(state["ring_ts"][i]) * 1000, model)
            # The weight stays, so that a later heartbeat of the same playback adds only what is new.
            state["ring_counted"][i] = 0
            state["ring_draw"][i] = 0
            state["ring_video"][i] = 0
    hit = state["evidence_video"] == np.uint64(video)
    state["evidence_video"][hit] = 0
    state["evidence_ts"][hit] = 0
    # The newest comes first, so what is left moves up into the hole.
    for name in ("evidence_video", "evidence_ts"):
        state[name][hit[:, 0], 0] = state[name][hit[:, 0], 1]
        state[name][hit[:, 0], 1] = 0
