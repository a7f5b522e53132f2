"""Carries a state over to a registry version in which clusters were retired: what was counted follows their videos."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from streams.mixture import Constants, give_up_slot
from streams.records import UNASSIGNED
from streams.registry import Registry
from streams.state import COUNTS, EMPTY, EVIDENCE, SLOTS, State, slot_of

_SESSION_MOST = int(np.iinfo(np.uint16).max)


def adopt_registry(state: State, registry: Registry, constants: Constants) -> None:
    """Rename or merge the slots of retired clusters into those of their successors, and note the version.

    A retired cluster without a successor keeps its slot, which no persona states, until a stronger one needs the room.
    """
    if int(state["registry"]) == registry.version:
        return
    state["registry"] = registry.version
    for slot in range(SLOTS):
        cluster = int(state["cluster"][slot])
        successor = registry.successor_of(cluster)
        if cluster == EMPTY or successor in (cluster, UNASSIGNED):
            continue
        into = slot_of(state, successor)
        if into < 0:
            state["cluster"][slot] = successor
        else:
            _merge(state, slot, into, constants)
    _map_ids(state, registry.successor_of)


def _merge(state: State, slot: int, into: int, constants: Constants) -> None:
    for name in ("short", "long", "negative", "reference"):
        state[name][into] += state[name][slot]
    state["in_session"][into] = min(_SESSION_MOST, int(state["in_session"][into]) + int(state["in_session"][slot]))
    for i in range(COUNTS):
        # Each cluster gave up to a discount to the expert's base; together they give one.
        first, second = float(state["count"][i, into]), float(state["count"][i, slot])
        given = [min(count, constants.discount) for count in (first, second, first + second)]
        state["spread"][i] = max(0.0, float(state["spread"][i]) - given[0] - given[1] + given[2])
        state["count"][i, into] = first + second
        state["count"][i, slot] = 0.0
    _merge_evidence(state, slot, into)
    give_up_slot(state, slot, constants)


def _merge_evidence(state: State, slot: int, into: int) -> None:
    """The newest watches of both, one for each video."""
    newest: dict[int, int] = {}
    for place in (slot, into):
        pairs = zip(state["evidence_video"][place].tolist(), state["evidence_ts"][place].tolist(), strict=True)
        for video, ts in pairs:
            if ts:
                newest[video] = max(ts, newest.get(video, 0))
    kept = sorted(newest.items(), key=lambda item: (-item[1], item[0]))[:EVIDENCE]
    kept += [(0, 0)] * (EVIDENCE - len(kept))
    state["evidence_video"][into] = [video for video, _ in kept]
    state["evidence_ts"][into] = [ts for _, ts in kept]


def _map_ids(state: State, successor_of: Callable[[int], int]) -> None:
    for name in ("recent", "ring_cluster"):
        state[name] = [_mapped(cluster, successor_of) for cluster in state[name].tolist()]
    for name in ("hidden", "pinned"):
        state[name] = _distinct((_mapped(cluster, successor_of) for cluster in state[name].tolist()), len(state[name]))
    since = dict[int, int]()
    for cluster, ts in zip(state["stated"].tolist(), state["stated_from"].tolist(), strict=True):
        if cluster != EMPTY:
            name_now = _mapped(cluster, successor_of)
            since[name_now] = min(ts, since.get(name_now, ts))
    state["stated"] = _distinct(since, len(state["stated"]))
    state["stated_from"] = [*since.values(), *[0] * (len(state["stated_from"]) - len(since))]


def _mapped(cluster: int, successor_of: Callable[[int], int]) -> int:
    successor = EMPTY if cluster == EMPTY else successor_of(cluster)
    return cluster if successor == UNASSIGNED else successor


def _distinct(clusters: Iterable[int], size: int) -> list[int]:
    kept = [cluster for cluster in dict.fromkeys(clusters) if cluster != EMPTY]
    return kept + [EMPTY] * (size - len(kept))
