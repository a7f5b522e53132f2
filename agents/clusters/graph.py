"""Makes a registry's next version: the same clusters and videos, with another graph of transitions or safe list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from agents.clusters.events import WatchLog
from agents.clusters.snapshot import RegistryError, RegistrySnapshot
from streams.registry import ClusterCard
from streams.transitions import MOST_TAKEN_UP, MOST_TRANSITIONS, learn


def with_transitions(snapshot: RegistrySnapshot, log: WatchLog, least_viewers: int) -> RegistrySnapshot:
    """The next version, with the transitions learned from a log in the place of any before.

    Raises RegistryError where no edge has enough viewers, ValueError for `least_viewers` below the floor of 20.
    """
    cluster_ids = np.array([card.cluster_id for card in snapshot.cards], np.int32)
    found = learn(log.viewers, log.clusters, log.times, cluster_ids, least_viewers=least_viewers)
    viewers = len(np.unique(log.viewers))
    if not len(found):
        raise RegistryError(
            f"{log.name} has no transition with {least_viewers} viewers behind it, of {viewers:,}; take a longer log of"
            " more viewers, or a coarser registry"
        )
    step = {
        "step": "transitions",
        "source": log.name,
        "watches": len(log.viewers),
        "viewers": viewers,
        # Not `least_viewers`, which says that a registry's text was learned from viewing.
        "least_viewers_of_an_edge": least_viewers,
        "most_taken_up": MOST_TAKEN_UP,
        "most_transitions": MOST_TRANSITIONS,
        "edges": len(found),
    }
    return replace(snapshot, version=snapshot.version + 1, transitions=found, history=(*snapshot.history, step))


def with_safe(snapshot: RegistrySnapshot, added: Iterable[int], removed: Iterable[int]) -> RegistrySnapshot:
    """The next version, with clusters added to the safe list and others taken off; the same one if nothing changes.

    Raises RegistryError for a cluster that no persona proposes to anyone: on the list it would only seem checked.
    """
    cards = {card.cluster_id: card for card in snapshot.cards}
    for cluster in added:
        if not cards[cluster].suggestible:
            raise RegistryError(
                f"cluster {cluster}, {cards[cluster].label!r}, is proposed to nobody ({_reason(cards[cluster])}); leave"
                " it off the list"
            )
    before = set(snapshot.safe)
    after = (before | set(added)) - set(removed)
    if after == before:
        return snapshot
    step = {"step": "safe", "added": sorted(after - before), "removed": sorted(before - after)}
    return replace(snapshot, version=snapshot.version + 1, safe=tuple(sorted(after)), history=(*snapshot.history, step))


def named_clusters(cards: Sequence[ClusterCard], names: Iterable[str]) -> list[int]:
    """Cluster ids of ids or labels, whatever their case. Raises RegistryError for one that names no or several."""
    return [_named(cards, name) for name in names]


def _named(cards: Sequence[ClusterCard], name: str) -> int:
    by_label = [card.cluster_id for card in cards if card.label and card.label == name.strip().lower()]
    by_id = [card.cluster_id for card in cards if str(card.cluster_id) == name.strip()]
    found = by_id or by_label
    if not found:
        raise RegistryError(f"no cluster has the id or label {name!r}; `personas clusters show` lists them")
    if len(found) > 1:
        raise RegistryError(f"{name!r} is the label of clusters {', '.join(map(str, found))}; give an id")
    return found[0]


def _reason(card: ClusterCard) -> str:
    if card.sensitive:
        return "it is sensitive"
    return "it is a grab-bag" if not card.coherent else "it has no words of its own"
