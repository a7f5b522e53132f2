"""Which interests and topics are chosen: against the rule written down once more, plain and compiled."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from agents.compiled import compiled
from streams import choosing, mixture
from streams.choosing import CHOICE, NONE, catalogue
from streams.registry import Neighbours, Registry, Wording
from streams.state import EMPTY, SLOTS, STATED, State, new_state
from streams.transitions import Transitions
from tests.builders import START, make_registry

CLUSTERS = 40


def odd_registry(pick: random.Random, *, graph: bool) -> Registry:
    """Clusters of random closeness, some of which may not be named or are named in another's words.

    graph: with random transitions between them.
    """
    registry = make_registry(clusters=CLUSTERS, successors={7: 3, 31: NONE})
    cards = {}
    for cluster, card in registry.cards.items():
        card = replace(card, prior=pick.choice([0.1, 0.2, pick.random()]))
        kind = pick.random()
        if kind < 0.1:
            card = replace(card, sensitive=True)
        elif kind < 0.2:
            card = replace(card, wording=Wording.NONE)
        elif kind < 0.35:
            card = replace(
                card, wording=Wording.PARENT, label=registry.cards[cluster - cluster % 5].label if cluster % 5 else "x"
            )
        cards[cluster] = card
    registry.cards = cards
    ids, cosines = [], []
    for cluster in cards:
        near = sorted(((pick.choice([0.1, 0.15, 0.5, pick.random()]), o) for o in cards if o != cluster), reverse=True)[
            :9
        ]
        ids.append([other for _, other in near])
        cosines.append([cosine for cosine, _ in near])
    registry._neighbours = Neighbours(np.array(ids, np.int32), np.array(cosines, np.float32))
    registry.safe = frozenset(pick.sample(sorted(cards), 20))
    if graph:
        registry.transitions = random_transitions(pick, sorted(cards))
    return registry


def random_transitions(pick: random.Random, clusters: list[int]) -> Transitions:
    targets = [pick.sample([o for o in clusters if o != c], pick.randrange(6)) for c in clusters]
    flat = [target for each in targets for target in each]
    return Transitions(
        offsets=np.cumsum([0, *map(len, targets)]),
        targets=np.array(flat, np.int32),
        viewers=np.full(len(flat), 50, np.int32),
        rates=np.array([pick.choice([0.1, pick.random()]) for _ in flat], np.float32),
        lifts=np.array([pick.choice([2.0, 0.5 + pick.random()]) for _ in flat], np.float32),
    )


def odd_state(pick: random.Random) -> tuple[State, list[float]]:
    """A viewer with anything in their slots and lists, and the shares of the slots."""
    state = new_state()
    held = pick.sample([*range(CLUSTERS), CLUSTERS + 5], pick.randrange(SLOTS + 1))
    state["cluster"][: len(held)] = held
    state["cluster"] = pick.sample(state["cluster"].tolist(), SLOTS)
    for slot in range(SLOTS):
        if state["cluster"][slot] != EMPTY:
            state["long"][slot] = pick.choice([0, 1.9, 2, 2.1, 3, 3.1, 20 * pick.random()])
            state["short"][slot] = 5 * pick.random()
            state["negative"][slot] = pick.choice([0, 0, 0, 1, 1.5, 4])
            state["evidence_video"][slot], state["evidence_ts"][slot] = [slot, slot + 1], [START + slot, START]
    for name, most in (("hidden", 3), ("pinned", 3), ("stated", STATED)):
        members = pick.sample(range(CLUSTERS), pick.randrange(most + 1))
        state[name][: len(members)] = members
    state["audience"] = pick.choice([0, 1, 1, 2, 3])
    state["stated_from"][:] = [START - i for i in range(STATED)]
    state["last_ts"] = START + 99
    shares = [pick.choice([0.02, 0.03, 0.1, 0.1 + 1e-9, 0.2 * pick.random()]) for _ in range(SLOTS)]
    return state, shares


def wanted_interests(state: State, shares: list[float], registry: Registry, avoid: set[int]) -> list[int]:
    """The interests by the rule."""
    stated, pinned = set(state["stated"].tolist()), state["pinned"].tolist()
    unspoken = hidden_labels(state, registry)
    ranked = []
    for cluster, share, long, negative in zip(
        state["cluster"].tolist(), shares, state["long"].tolist(), state["negative"].tolist(), strict=True
    ):
        if cluster not in registry.cards or not registry.cards[cluster].statable or cluster in avoid:
            continue
        bar = 2 / 3 if cluster in stated else 1.0
        if cluster in pinned:
            ranked.append((-10.0 - pinned.index(cluster), cluster, share))
        elif registry.cards[cluster].label in unspoken:
            continue
        elif long - negative >= 3 * bar and share >= 0.03 * bar:
            ranked.append((-share * (1.25 if cluster in stated else 1.0), cluster, share))
    first: dict[str, tuple[float, int]] = {}
    for _, cluster, share in sorted(ranked):
        first.setdefault(registry.cards[cluster].label, (share, cluster))
    chosen = list(first.values())[:5]
    return [cluster for _, cluster in sorted(chosen, key=lambda item: (-np.floor(item[0] * 1e6 + 0.5), item[1]))]


def hidden_labels(state: State, registry: Registry) -> set[str]:
    return {registry.cards[cluster].label for cluster in state["hidden"].tolist() if cluster in registry.cards}


def wanted_topics(
    state: State, shares: list[float], interests: list[int], registry: Registry, avoid: set[int]
) -> list[tuple[int, int, float]]:
    """The novel topics by the rule: cluster, place of the interest it comes from, score."""
    held = state["cluster"].tolist()
    known = avoid | set(held)
    unspoken = hidden_labels(state, registry)
    open_to = {
        c: card
        for c, card in registry.cards.items()
        if card.suggestible and c not in known and card.label not in unspoken
        if state["audience"] <= 1 or c in registry.safe
    }
    if not interests:
        popular = sorted(open_to, key=lambda cluster: (-open_to[cluster].prior, cluster))
        return [(cluster, NONE, 0.0) for cluster in popular[:3]]
    labels = {registry.cards[cluster].label for cluster in interests}

    def fits(cluster: int) -> bool:
        return cluster in open_to and open_to[cluster].label not in labels

    near: dict[tuple[int, int], float] = {}
    after: dict[tuple[int, int], float] = {}
    graph = registry.transitions
    for place, interest in enumerate(interests):
        share = shares[held.index(interest)]
        weight = max(share, 0.05) if interest in state["pinned"].tolist() else share
        for other, cosine in registry.similar(interest):
            if cosine >= 0.15:
                near[place, other] = cosine * weight * (1.0 if graph is None else registry.prior_by_id[other])
        if graph is not None:
            edges = slice(*graph.offsets[[*registry.cards].index(interest) :][:2].tolist())
            for other, rate, lift in zip(graph.targets[edges], graph.rates[edges], graph.lifts[edges], strict=True):
                after[place, int(other)] = weight * float(rate) * float(lift) ** 2
    if graph is not None:
        near, after = (
            {
                pair: part * value / sum(v for (_, c), v in found.items() if fits(c))
                for pair, value in found.items()
                if fits(pair[1])
            }
            for found, part in ((near, 0.25), (after, 0.75))
        )
    gains: dict[int, list[float]] = {}
    for found in (near, after):
        for (place, other), gain in found.items():
            if fits(other):
                gains.setdefault(other, [0.0] * len(interests))[place] += gain
    ranked = sorted(gains, key=lambda cluster: (-np.floor(sum(gains[cluster]) * 1e9 + 0.5), cluster))
    chosen: list[tuple[int, int, float]] = []
    for cluster in ranked:
        used = [via for _, via, _ in chosen]
        if any(c in {o for _, o in after} for c in gains):
            source = int(np.argmax([gain * (0.5 if i in used else 1) for i, gain in enumerate(gains[cluster])]))
            chosen.append((cluster, source, sum(gains[cluster])))
            continue
        source = int(np.argmax(gains[cluster]))
        if len(interests) < 3 or source not in used:
            chosen.append((cluster, source, sum(gains[cluster])))
    return chosen[:3]


COMPILED = compiled(mixture, choosing)


@pytest.mark.parametrize("graph", [False, True], ids=["without graph", "with graph"])
@pytest.mark.parametrize("choose", [choosing.choose, COMPILED.choose], ids=["plain", "compiled"])
def test_what_is_chosen_is_what_the_rule_says(choose: Any, graph: bool) -> None:
    found = 0
    for seed in range(300):
        pick = random.Random(seed)
        registry = odd_registry(random.Random(seed // 20), graph=graph)
        state, shares = odd_state(pick)
        disliked = (state["negative"] >= 1.5) & (state["negative"] > state["long"])
        disliked &= ~np.isin(state["cluster"], state["pinned"])
        avoid = {c for c in (*state["hidden"].tolist(), *state["cluster"][disliked].tolist()) if c != EMPTY}
        interests = wanted_interests(state, shares, registry, avoid)
        topics = wanted_topics(state, shares, interests, registry, avoid)
        before = dict(zip(state["stated"].tolist(), state["stated_from"].tolist(), strict=True))
        held = state["cluster"].tolist()
        (choice,) = choices = np.zeros(1, CHOICE)
        choose(state.reshape(1)[0], np.array(shares), catalogue(registry), choice)
        rows = sorted(registry.cards)

        assert [c for c in choice["interest"].tolist() if c != NONE] == interests, seed
        assert [c for c in state["stated"].tolist() if c != EMPTY] == interests
        since = [before.get(cluster, START + 99) for cluster in interests]
        assert choice["since"].tolist()[: len(interests)] == state["stated_from"].tolist()[: len(interests)] == since
        assert set(choices["avoid"][0][: choice["avoided"]].tolist()) == avoid
        for place, cluster in enumerate(interests):
            slot = held.index(cluster)
            assert choice["share"][place] == shares[slot]
            assert choice["mass"][place] == state["long"][slot]
            assert choice["evidence_video"][place].tolist() == [slot, slot + 1]
            assert choice["pinned"][place] == (cluster in state["pinned"].tolist())
        proposed = [
            (rows[row], via) for row, via in zip(choice["novel"].tolist(), choice["via"], strict=True) if row != NONE
        ]
        assert proposed == [(cluster, via) for cluster, via, _ in topics], seed
        assert choice["score"].tolist()[: len(topics)] == pytest.approx([score for *_, score in topics])
        found += len(topics)
    assert found > 500
