"""Which of a viewer's clusters a persona states, and which others it proposes.

Statistics alone, on numbers: streams/selection.py puts the words to it. The set is stable: an interest enters at a
decayed count of 2.25 and 3% of the viewer's watches, and stays until it falls below two thirds of either. A watch
counts 1 at most, so what was watched fewer than three times never enters; at a count of 3 what was watched three times
would not either, once it has decayed a little.

A novel topic's score is the sum over the interests of share times cosine. Where the registry holds a graph of
transitions (streams/transitions.py), it is

    score(B) = 0.75 g(B) / sum of g + 0.25 c(B) / sum of c          g(B) = sum of share(A) pull(A -> B)
                                                                    c(B) = sum of share(A) cosine(A, B) popularity(B)

with the sums over the interests A, and in the denominators over all candidates. By closeness alone each topic comes
from another interest, or all would be like the strongest; the graph reaches further by itself, so there the next best
counts wherever it comes from.

What the viewer says goes before what was counted: a hidden interest never appears, nor another under its label; a
pinned one always does, liked or not, unless it is hidden or may not be named. Teens and kids are proposed clusters of
the registry's safe list only.

Like streams/mixture.py, everything works on scalars and on arrays of records, so that the same source runs as plain
Python and compiled, with the same result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from streams.mixture import Floats, Record, double, is_pinned
from streams.records import Audience
from streams.registry import Registry
from streams.state import EMPTY, EVIDENCE, HIDDEN, PINNED, SLOTS, STATED

MAXIMUM_INTERESTS: Final = STATED
MAXIMUM_NOVEL: Final = 3
ENTER_COUNT, ENTER_SHARE = 2.25, 0.03
STAY_FACTOR: Final = 2.0 / 3.0
INCUMBENT_BONUS: Final = 1.25
"""An interest already stated gives its place only to one a quarter stronger."""
DISLIKED: Final = 1.5
"""Negative mass from which a cluster that is disliked more than it is watched is avoided."""
MINIMUM_SIMILARITY: Final = 0.15
PINNED_SHARE: Final = 0.05
"""A pinned interest leads to novel topics as if it had at least this share."""
GRAPH_SHARE: Final = 0.75
"""Of a novel topic's score, where there is a graph; the rest is closeness in content times popularity."""
ADULT: Final = 1 + tuple(Audience).index(Audience.ADULT)
"""A state's audience above which topics come from the safe list."""
LEAST_COUNT: Final = 1e-9
"""Of which shares are taken."""
NONE: Final = -1
"""Stands for no slot, no row and no cluster."""

Whole = npt.NDArray[np.int64]


class Catalogue(NamedTuple):
    """What choosing asks of a registry version: arrays over its clusters, rows, ascending by cluster id.

    row_of: (ids,) row by cluster id, NONE for one that is not there; cluster: (rows,) id; label: (rows,) a number for
    each label; statable: (rows,) bool, as on the cards; safe: (rows,) bool, may be proposed to teens and kids; near,
    closeness: (rows, neighbours) rows of similar suggestible clusters, then NONE, and their cosines, times their
    popularity where there is a graph; next, pull: (rows, edges) rows of suggestible clusters taken up after this one,
    then NONE, and what that counts (`Transitions.pulls`), no columns without a graph; popular: rows of suggestible
    clusters, most watched first.
    """

    row_of: Whole
    cluster: Whole
    label: Whole
    statable: npt.NDArray[np.bool_]
    safe: npt.NDArray[np.bool_]
    near: Whole
    closeness: Floats
    next: Whole
    pull: Floats
    popular: Whole


CHOICE: Final = [
    # The interests, largest share first: cluster ids, then NONE.
    ("interest", "<i8", (MAXIMUM_INTERESTS,)),
    ("share", "<f8", (MAXIMUM_INTERESTS,)),  # posterior mean, 0..1
    ("short", "<f8", (MAXIMUM_INTERESTS,)),  # of all counts of the short horizon, 0..1
    ("long", "<f8", (MAXIMUM_INTERESTS,)),
    ("mass", "<f8", (MAXIMUM_INTERESTS,)),  # decayed watches
    ("since", "<i8", (MAXIMUM_INTERESTS,)),  # when it entered the set, ms
    ("pinned", "u1", (MAXIMUM_INTERESTS,)),
    ("evidence_video", "<u8", (MAXIMUM_INTERESTS, EVIDENCE)),
    ("evidence_ts", "<i8", (MAXIMUM_INTERESTS, EVIDENCE)),  # 0: none
    # The novel topics, best first: rows of the catalogue, then NONE.
    ("novel", "<i8", (MAXIMUM_NOVEL,)),
    ("via", "<i8", (MAXIMUM_NOVEL,)),  # place of the interest that it owes most to, NONE: it is popular
    ("score", "<f8", (MAXIMUM_NOVEL,)),  # 0..1
    ("mean", "<f8"),  # score of all candidates
    # Clusters that are hidden or disliked, the first `avoided` of them.
    ("avoid", "<i8", (HIDDEN + SLOTS,)),
    ("avoided", "<i8"),
]
"""Fields of a record that holds what was chosen for one viewer."""


def catalogue(registry: Registry) -> Catalogue:
    """The registry's clusters as arrays."""
    cards = [registry.cards[cluster] for cluster in sorted(registry.cards)]
    clusters = np.array([card.cluster_id for card in cards], np.int64)
    row_of = np.full(int(clusters.max(initial=-1)) + 1, NONE, np.int64)
    row_of[clusters] = np.arange(len(cards))
    suggestible = {card.cluster_id: row for row, card in enumerate(cards) if card.suggestible}
    numbers = {label: number for number, label in enumerate(dict.fromkeys(card.label for card in cards))}
    near, closeness = _padded(
        [
            [(suggestible[other], value) for other, value in registry.similar(card.cluster_id) if other in suggestible]
            for card in cards
        ],
        MINIMUM_SIMILARITY,
    )
    edges = [
        [(suggestible[other], value) for other, value in registry.leads_to(card.cluster_id) if other in suggestible]
        for card in cards
    ]
    after, pull = _padded(edges, 0.0)
    if after.shape[1]:
        # Popularity is of the population's watches; NONE picks the last, of closeness 0.
        closeness *= registry.prior[near]
    popular = sorted(suggestible.values(), key=lambda row: (-cards[row].prior, row))
    return Catalogue(
        row_of=row_of,
        cluster=clusters,
        label=np.array([numbers[card.label] for card in cards], np.int64),
        statable=np.array([card.statable for card in cards], bool),
        safe=np.array([card.cluster_id in registry.safe for card in cards], bool),
        near=near,
        closeness=closeness,
        next=after,
        pull=pull,
        popular=np.array(popular, np.int64),
    )


def _padded(lists: Sequence[Sequence[tuple[int, float]]], least: float) -> tuple[Whole, Floats]:
    """Rows, then NONE, and their values, then 0: those of at least a value, both (lists, longest list)."""
    rows = np.full((len(lists), max(map(len, lists), default=0)), NONE, np.int64)
    values = np.zeros(rows.shape)
    for place, each in enumerate(lists):
        for column, (row, value) in enumerate([item for item in each if item[1] >= least]):
            rows[place, column], values[place, column] = row, value
    return rows, values


def choose(state: Record, shares: Floats, catalogue: Catalogue, choice: Record) -> None:
    """Choose interests and novel topics; marks the interests in the state as stated. shares: (SLOTS,), 0..1.

    choice: one element of dtype CHOICE, to be filled.
    """
    slots = _interests(state, shares, catalogue)
    _state_them(state, slots)
    _describe_interests(state, shares, slots, choice)
    for place in range(MAXIMUM_NOVEL):
        choice["novel"][place] = NONE
        choice["via"][place] = NONE
        choice["score"][place] = 0.0
    choice["mean"] = 0.0
    if slots[0] == NONE:
        _popular(state, catalogue, choice)
    else:
        _novel(state, shares, slots, catalogue, choice)
    _avoid(state, choice)


def _describe_interests(state: Record, shares: Floats, slots: Whole, choice: Record) -> None:
    short, long = 0.0, 0.0
    for slot in range(SLOTS):
        short += double(state["short"][slot])
        long += double(state["long"][slot])
    for place in range(MAXIMUM_INTERESTS):
        slot = slots[place]
        choice["interest"][place] = NONE
        if slot == NONE:
            continue
        choice["interest"][place] = state["cluster"][slot]
        choice["share"][place] = shares[slot]
        choice["short"][place] = double(state["short"][slot]) / short if short > LEAST_COUNT else 0.0
        choice["long"][place] = double(state["long"][slot]) / long if long > LEAST_COUNT else 0.0
        choice["mass"][place] = state["long"][slot]
        choice["since"][place] = state["stated_from"][place]
        choice["pinned"][place] = 1 if is_pinned(state, int(state["cluster"][slot])) else 0
        for i in range(EVIDENCE):
            choice["evidence_video"][place, i] = state["evidence_video"][slot, i]
            choice["evidence_ts"][place, i] = state["evidence_ts"][slot, i]


def _avoid(state: Record, choice: Record) -> None:
    count = 0
    for i in range(HIDDEN):
        if state["hidden"][i] != EMPTY:
            choice["avoid"][count] = state["hidden"][i]
            count += 1
    for slot in range(SLOTS):
        if state["cluster"][slot] != EMPTY and _is_disliked(state, slot):
            choice["avoid"][count] = state["cluster"][slot]
            count += 1
    choice["avoided"] = count


def is_statable(state: Record, cluster: int, catalogue: Catalogue) -> bool:
    """Whether a persona of this viewer may name the cluster."""
    row = row_of(catalogue, cluster)
    if row == NONE or not catalogue.statable[row] or is_hidden(state, cluster):
        return False
    if is_pinned(state, cluster):
        return True
    if _is_hidden_label(state, int(catalogue.label[row]), catalogue):
        return False
    for slot in range(SLOTS):
        if state["cluster"][slot] == cluster:
            return not _is_disliked(state, slot)
    return True


def is_hidden(state: Record, cluster: int) -> bool:
    """Whether the viewer hid the cluster."""
    for i in range(HIDDEN):  # noqa: SIM110 - generators do not compile
        if state["hidden"][i] == cluster:
            return True
    return False


def _is_hidden_label(state: Record, label: int, catalogue: Catalogue) -> bool:
    """Whether the viewer hid a cluster of this label: under it they would meet again what they hid."""
    for i in range(HIDDEN):
        row = row_of(catalogue, int(state["hidden"][i]))
        if row != NONE and catalogue.label[row] == label:
            return True
    return False


def _is_disliked(state: Record, slot: int) -> bool:
    """Whether the viewer dislikes the slot's cluster more than they watch it, and did not pin it."""
    negative = double(state["negative"][slot])
    disliked = negative >= DISLIKED and negative > double(state["long"][slot])
    return disliked and not is_pinned(state, int(state["cluster"][slot]))


def row_of(catalogue: Catalogue, cluster: int) -> int:
    """Row of a cluster, NONE for one that the catalogue does not hold."""
    return int(catalogue.row_of[cluster]) if 0 <= cluster < len(catalogue.row_of) else NONE


def _interests(state: Record, shares: Floats, catalogue: Catalogue) -> Whole:
    """The strongest slots, one of each label: clusters that speak in their parent's words share one."""
    rank = np.full(SLOTS, math.inf)
    for slot in range(SLOTS):
        rank[slot] = _rank(state, slot, double(shares[slot]), catalogue)
    held, chosen, count = state["cluster"], np.full(MAXIMUM_INTERESTS, NONE), 0
    while count < MAXIMUM_INTERESTS:
        best = NONE
        for slot in range(SLOTS):
            if rank[slot] == math.inf:
                continue
            if best == NONE or rank[slot] < rank[best] or (rank[slot] == rank[best] and held[slot] < held[best]):
                best = slot
        if best == NONE:
            break
        rank[best] = math.inf
        label, taken = catalogue.label[row_of(catalogue, int(held[best]))], False
        for i in range(count):
            taken = taken or catalogue.label[row_of(catalogue, int(held[chosen[i]]))] == label
        if not taken:
            chosen[count] = best
            count += 1
    _sort(state, shares, chosen, count)
    return chosen


def _rank(state: Record, slot: int, share: float, catalogue: Catalogue) -> float:
    """Order in which slots are chosen, lowest first; infinite for one that may not be stated."""
    cluster = int(state["cluster"][slot])
    if not is_statable(state, cluster, catalogue):
        return math.inf
    for i in range(PINNED):
        # The last pinned first, before all shares, which are below 2: there may be more pins than places.
        if state["pinned"][i] == cluster:
            return -2.0 - i
    stated = False
    for i in range(STATED):
        stated = stated or state["stated"][i] == cluster
    bar = STAY_FACTOR if stated else 1.0
    mass = double(state["long"][slot]) - double(state["negative"][slot])
    if mass < ENTER_COUNT * bar or share < ENTER_SHARE * bar:
        return math.inf
    return -share * (INCUMBENT_BONUS if stated else 1.0)


def _sort(state: Record, shares: Floats, chosen: Whole, count: int) -> None:
    """Largest share first; ties, such as rounding makes, go to the smaller cluster id."""
    for i in range(1, count):
        slot, at = chosen[i], i
        share = math.floor(double(shares[slot]) * 1e6 + 0.5)
        while at > 0:
            other = chosen[at - 1]
            above = math.floor(double(shares[other]) * 1e6 + 0.5)
            if above > share or (above == share and state["cluster"][other] < state["cluster"][slot]):
                break
            chosen[at] = other
            at -= 1
        chosen[at] = slot


def _state_them(state: Record, slots: Whole) -> None:
    """Note in the state what is stated, and since when."""
    stated, since = state["stated"].copy(), state["stated_from"].copy()
    for place in range(STATED):
        state["stated"][place] = EMPTY
        state["stated_from"][place] = 0
        if slots[place] == NONE:
            continue
        cluster = state["cluster"][slots[place]]
        state["stated"][place] = cluster
        state["stated_from"][place] = state["last_ts"]
        for i in range(STATED):
            if stated[i] == cluster:
                state["stated_from"][place] = since[i]


def _popular(state: Record, catalogue: Catalogue, choice: Record) -> None:
    """What many viewers watch, for one of whom too little is known to go by."""
    count = 0
    for row in catalogue.popular:
        if not _is_known(state, catalogue.cluster[row]) and _is_offered(state, row, catalogue):
            choice["novel"][count] = row
            count += 1
            if count == MAXIMUM_NOVEL:
                return


def _is_known(state: Record, cluster: int) -> bool:
    """Whether the viewer watched the cluster, or hid it."""
    for slot in range(SLOTS):
        if state["cluster"][slot] == cluster:
            return True
    return is_hidden(state, cluster)


def _is_offered(state: Record, row: int, catalogue: Catalogue) -> bool:
    """Whether a topic suits the viewer's audience, and is not called as one they hid."""
    if state["audience"] > ADULT and not catalogue.safe[row]:
        return False
    return not _is_hidden_label(state, int(catalogue.label[row]), catalogue)


def _novel(state: Record, shares: Floats, slots: Whole, catalogue: Catalogue, choice: Record) -> None:
    """Clusters that what the viewer likes leads to and they never watched, best first."""
    rows, weights, count = np.full(MAXIMUM_INTERESTS, NONE), np.zeros(MAXIMUM_INTERESTS), 0
    near, after = np.zeros(len(catalogue.cluster)), np.zeros(len(catalogue.cluster))
    for i in range(MAXIMUM_INTERESTS):
        if slots[i] == NONE:
            break
        count += 1
        rows[i] = row_of(catalogue, int(state["cluster"][slots[i]]))
        weights[i] = _weight(state, int(slots[i]), double(shares[slots[i]]))
        _add_up(near, catalogue.near[rows[i]], catalogue.closeness[rows[i]], weights[i])
        _add_up(after, catalogue.next[rows[i]], catalogue.pull[rows[i]], weights[i])
    _leave_out(state, near, rows[:count], catalogue)
    _leave_out(state, after, rows[:count], catalogue)
    of_near, of_next = 1.0, 0.0
    if catalogue.next.shape[1] > 0:
        of_near, of_next = _part(near, 1.0 - GRAPH_SHARE), _part(after, GRAPH_SHARE)
    scores = np.zeros(len(near))
    for row in range(len(scores)):
        scores[row] = of_near * near[row] + of_next * after[row]
    candidates, total = _candidates(scores)
    if len(candidates) == 0:
        return
    choice["mean"] = total / len(candidates)
    found, used = 0, np.zeros(MAXIMUM_INTERESTS, np.bool_)
    while found < MAXIMUM_NOVEL:
        best = _best(scores, candidates)
        if best == NONE:
            break
        row = candidates[best]
        candidates[best] = NONE
        gains = _gains(row, rows[:count], weights, of_near, of_next, catalogue)
        if of_next > 0.0:
            source = _source(gains, used)
        else:
            source = _source(gains, np.zeros(MAXIMUM_INTERESTS, np.bool_))
            if used[source] and count >= MAXIMUM_NOVEL:
                continue
        used[source] = True
        choice["novel"][found] = row
        choice["via"][found] = source
        choice["score"][found] = scores[row]
        found += 1


def _add_up(scores: Floats, rows: Whole, values: Floats, weight: float) -> None:
    for place in range(len(rows)):
        if rows[place] == NONE:
            break
        scores[rows[place]] += values[place] * weight


def _part(scores: Floats, share: float) -> float:
    """What scores are to be multiplied by to sum to a share; 0 where they are all 0."""
    total = 0.0
    for row in range(len(scores)):
        total += scores[row]
    return share / total if total > 0.0 else 0.0


def _weight(state: Record, slot: int, share: float) -> float:
    return max(share, PINNED_SHARE) if is_pinned(state, int(state["cluster"][slot])) else share


def _leave_out(state: Record, scores: Floats, interests: Whole, catalogue: Catalogue) -> None:
    """Set to 0 what is known to the viewer, not for them, or called as one of their interests."""
    for slot in range(SLOTS):
        row = row_of(catalogue, int(state["cluster"][slot]))
        if row != NONE:
            scores[row] = 0.0
    for row in range(len(scores)):
        if scores[row] <= 0.0:
            continue
        offered = _is_offered(state, row, catalogue)
        for i in range(len(interests)):
            offered = offered and catalogue.label[row] != catalogue.label[interests[i]]
        if not offered:
            scores[row] = 0.0


def _candidates(scores: Floats) -> tuple[Whole, float]:
    """Rows with a score, and the sum of their scores."""
    candidates, count, total = np.empty(len(scores), np.int64), 0, 0.0
    for row in range(len(scores)):
        if scores[row] > 0.0:
            candidates[count] = row
            count += 1
            total += scores[row]
    return candidates[:count], total


def _best(scores: Floats, candidates: Whole) -> int:
    """Place of the candidate with the highest score; ties, such as rounding makes, go to the smaller id."""
    best, highest = NONE, -1.0
    for i in range(len(candidates)):
        if candidates[i] == NONE:
            continue
        score = math.floor(double(scores[candidates[i]]) * 1e9 + 0.5)
        if score > highest:
            best, highest = i, score
    return best


def _source(gains: Floats, used: npt.NDArray[np.bool_]) -> int:
    """The interest that a candidate owes most to; before one that is used, another to which it owes half as much."""
    source, most = 0, 0.0
    for i in range(len(gains)):
        gain = gains[i] * (0.5 if used[i] else 1.0)
        if gain > most:
            source, most = i, gain
    return source


def _gains(row: int, interests: Whole, weights: Floats, of_near: float, of_next: float, catalogue: Catalogue) -> Floats:
    """What a candidate owes to each interest. of_near, of_next: what closeness and pull count."""
    gains = np.zeros(len(interests))
    for i in range(len(interests)):
        near = _value_of(row, catalogue.near[interests[i]], catalogue.closeness[interests[i]]) * weights[i]
        after = _value_of(row, catalogue.next[interests[i]], catalogue.pull[interests[i]]) * weights[i]
        gains[i] = of_near * near + of_next * after
    return gains


def _value_of(row: int, rows: Whole, values: Floats) -> float:
    for place in range(len(rows)):
        if rows[place] == row:
            return double(values[place])
    return 0.0
