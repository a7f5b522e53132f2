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
            state["long"][slot] = pick.choice([0, 1.4, 1.5, 1.6, 2.25, 2.3, 20 * pick.random()])
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
        elif long - negative >= 2.25 * bar and share >= 0.03 * bar:
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


def chosen_by(choose: Any, state: State, shares: list[float], registry: Registry) -> bytes:
    choices = np.zeros(1, CHOICE)
    choose(state.reshape(1)[0], np.array(shares), catalogue(registry), choices[0])
    return choices.tobytes() + state.tobytes()


@pytest.mark.parametrize("graph", [False, True], ids=["without graph", "with graph"])
def test_compiled_chooses_the_same_bytes(graph: bool) -> None:
    for seed in range(200):
        registry = odd_registry(random.Random(seed // 20), graph=graph)
        plain, machine = (
            chosen_by(each, *odd_state(random.Random(seed)), registry) for each in (choosing.choose, COMPILED.choose)
        )
        assert plain == machine, seed


def test_a_graph_without_edges_is_as_none() -> None:
    for seed in range(100):
        bare, empty = (
            odd_registry(random.Random(seed // 20), graph=False),
            odd_registry(random.Random(seed // 20), graph=False),
        )
        nothing = np.zeros(0, np.int32)
        empty.transitions = Transitions(
            np.zeros(len(empty.cards) + 1, np.int64), nothing, nothing, np.zeros(0, np.float32), np.zeros(0, np.float32)
        )
        first, second = (
            chosen_by(choosing.choose, *odd_state(random.Random(seed)), registry) for registry in (bare, empty)
        )
        assert first == second


# What the viewer said


def viewer(**watched: float) -> tuple[State, list[float]]:
    """A viewer by decayed watches of clusters: c3=10.0."""
    state, shares = new_state(), [0.0] * SLOTS
    total = sum(watched.values()) or 1.0
    for slot, (name, mass) in enumerate(watched.items()):
        state["cluster"][slot], state["long"][slot], shares[slot] = int(name[1:]), mass, mass / total
    return state, shares


def of(state: State, shares: list[float], registry: Registry) -> tuple[list[int], list[int], list[int], list[int]]:
    """Clusters stated, proposed, named as the way to a proposed one, and avoided."""
    (choice,) = choices = np.zeros(1, CHOICE)
    choosing.choose(state.reshape(1)[0], np.array(shares), catalogue(registry), choice)
    rows = sorted(registry.cards)
    stated = [c for c in choices["interest"][0].tolist() if c != NONE]
    via = [stated[place] for place in choices["via"][0].tolist() if place != NONE]
    novel = [rows[row] for row in choices["novel"][0].tolist() if row != NONE]
    return stated, novel, via, choices["avoid"][0][: int(choices["avoided"][0])].tolist()


def registry_of(graph: bool, **cards: dict[str, Any]) -> Registry:
    registry = make_registry(clusters=12)
    registry.cards = {c: replace(card, **cards.get(f"c{c}", {})) for c, card in registry.cards.items()}
    if graph:
        registry.transitions = random_transitions(random.Random(1), sorted(registry.cards))
    return registry


GRAPHS = pytest.mark.parametrize("graph", [False, True], ids=["without graph", "with graph"])
SHARED = {"c4": {"wording": Wording.PARENT, "label": "music"}, "c5": {"wording": Wording.PARENT, "label": "music"}}


@GRAPHS
def test_what_is_hidden_is_neither_stated_nor_proposed_nor_a_way(graph: bool) -> None:
    registry = registry_of(graph)
    for hidden in range(12):
        state, shares = viewer(c0=10.0, c1=8.0, c2=6.0, c3=4.0)
        state["hidden"][0] = hidden
        stated, novel, via, avoid = of(state, shares, registry)
        assert hidden not in (*stated, *novel, *via)
        assert avoid == [hidden]
        assert len(novel) == 3


@GRAPHS
def test_a_hidden_interest_does_not_come_back_under_a_label_that_another_shares(graph: bool) -> None:
    state, shares = viewer(c4=10.0, c5=9.0, c6=5.0)
    state["hidden"][0] = 4
    assert of(state, shares, registry_of(graph, **SHARED))[0] == [6]


@GRAPHS
def test_a_topic_called_as_a_hidden_one_is_not_proposed(graph: bool) -> None:
    registry = registry_of(graph, c4={"wording": Wording.PARENT, "label": "topic 7"})
    for cold in (False, True):
        state, shares = viewer() if cold else viewer(c0=10.0, c6=5.0)
        assert 7 in of(state.copy(), shares, replace_prior(registry, 7))[1]
        state["hidden"][0] = 4
        assert 7 not in of(state, shares, replace_prior(registry, 7))[1]


def replace_prior(registry: Registry, cluster: int) -> Registry:
    """The registry with a cluster that is on top of every list of topics."""
    registry.cards = {c: replace(card, prior=0.5 if c == cluster else card.prior) for c, card in registry.cards.items()}
    ids = registry._neighbours.ids.copy()
    rows = [row for row, c in enumerate(registry.cards) if c != cluster]
    for row in rows:
        ids[row] = [cluster, *[other for other in ids[row] if other != cluster]]
    registry._neighbours = Neighbours(ids, registry._neighbours.cosines)
    if registry.transitions is not None:
        count = len(registry.cards)
        registry.transitions = Transitions(
            np.array([0, *np.cumsum([c != cluster for c in registry.cards])]),
            np.full(count - 1, cluster, np.int32),
            np.full(count - 1, 50, np.int32),
            np.full(count - 1, 0.5, np.float32),
            np.full(count - 1, 3.0, np.float32),
        )
    return registry


def test_a_pinned_interest_is_stated_though_never_watched() -> None:
    state, shares = viewer(c0=10.0, c1=9.0, c2=8.0, c3=7.0, c6=6.0, c9=0.0)
    state["pinned"][0] = 9
    assert of(state, shares, registry_of(graph=True))[0] == [0, 1, 2, 3, 9]


def test_a_pinned_interest_is_stated_though_disliked_and_not_avoided() -> None:
    state, shares = viewer(c0=10.0, c1=1.0)
    state["negative"][1] = 5.0
    assert of(state.copy(), shares, registry_of(graph=False))[::3] == ([0], [1])
    state["pinned"][0] = 1
    assert of(state, shares, registry_of(graph=False))[::3] == ([0, 1], [])


def test_what_is_pinned_and_hidden_is_hidden() -> None:
    """Two clusters of which one was hidden and one pinned may become one in a rebuild."""
    state, shares = viewer(c0=10.0, c1=9.0)
    state["pinned"][0] = state["hidden"][0] = 1
    stated, novel, via, avoid = of(state, shares, registry_of(graph=True))
    assert stated == [0]
    assert 1 not in (*novel, *via)
    assert avoid == [1]


def test_of_more_pins_than_places_the_last_ones_are_stated() -> None:
    state, shares = viewer(**{f"c{c}": 1.0 + c for c in range(9)})
    state["pinned"] = [7, 1, 5, 0, 2, 6, 4, 3]
    assert sorted(of(state, shares, registry_of(graph=False))[0]) == [0, 2, 3, 4, 6]


def test_a_pinned_interest_takes_the_label_that_a_stronger_one_shares() -> None:
    state, shares = viewer(c4=10.0, c5=1.0)
    state["pinned"][0] = 5
    assert of(state.copy(), shares, registry_of(graph=False, **SHARED))[0] == [5]
    state["hidden"][0] = 4
    assert of(state, shares, registry_of(graph=False, **SHARED))[0] == [5]


def test_a_sensitive_interest_is_not_stated_pinned_or_not() -> None:
    state, shares = viewer(c0=10.0, c1=9.0)
    state["pinned"][0] = 1
    assert of(state, shares, registry_of(graph=False, c1={"sensitive": True}))[0] == [0]


@GRAPHS
@pytest.mark.parametrize("audience", [2, 3], ids=["teen", "kids"])
@pytest.mark.parametrize("cold", [False, True])
def test_teens_and_kids_get_topics_from_the_safe_list_alone(graph: bool, audience: int, cold: bool) -> None:
    registry = registry_of(graph, c0={"sensitive": True})
    watched = {} if cold else {"c0": 9.0, "c1": 8.0, "c2": 6.0}
    state, shares = viewer(**watched)
    everything = of(state.copy(), shares, registry)
    assert len(everything[1]) == 3
    state["audience"] = audience
    stated, novel, via, _ = of(state.copy(), shares, registry)
    assert (stated, novel, via) == (everything[0], [], [])
    assert stated == ([] if cold else [1, 2])
    registry.safe = frozenset({0, 5, 7})
    found = set(of(state, shares, registry)[1])
    assert found <= {5, 7}
    assert found
