"""A state carried over to a registry version with retired clusters: nothing that was counted is lost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.replay import AdoptRegistry, ReplayDriver
from streams import topics
from streams.counting import advance, count_watch, draw
from streams.mixture import Model, Record, describe, estimate, fresh_draws
from streams.prequential import share_of
from streams.registry import Registry
from streams.remap import adopt_registry
from streams.state import EMPTY, EVIDENCE, SLOTS, State, from_bytes, members, new_state, slot_of, to_bytes
from tests.builders import MINUTE, START, control, make_configuration, make_model, make_registry, watches

OLD = make_registry(clusters=12)
MERGED = make_registry(clusters=12, version=2, successors={1: 0, 2: 0, 3: 4, 5: -1})
"""1 and 2 went into 0; 3 into 4; 5 is gone with its videos."""
MODEL, AFTER = make_model(OLD), make_model(MERGED)
CONSTANTS = MODEL.constants


def watched(clusters: Sequence[int]) -> State:
    """A viewer of these clusters, one watch each, in turn and an hour apart; each watch of another video."""
    state = new_state()
    adopt_registry(state, OLD, CONSTANTS)
    for i, cluster in enumerate(clusters):
        ts = START + i * 60 * MINUTE
        advance(state, ts)
        state["in_session"] = 0
        slot, counted = count_watch(state, cluster, 1.0, ts, i + 1, MODEL, True)
        draw(state, slot, counted, MODEL, False)
    describe(state, *estimate(state, MODEL))
    return state


def adopted(state: State, registry: Registry = MERGED) -> State:
    carried = from_bytes(to_bytes(state))
    adopt_registry(carried, registry, CONSTANTS)
    return carried


def mass(state: State, name: str, cluster: int) -> float:
    slot = slot_of(state, cluster)
    return float(state[name][slot]) if slot >= 0 else 0.0


def share(record: Record, cluster: int, model: Model) -> float:
    return float(share_of(record, cluster, *estimate(record, model), model.priors))


def test_counts_move_to_the_successors_and_add_up() -> None:
    before = watched([0, 1, 2, 3, 1, 5, 6] * 4)
    after = adopted(before)
    assert int(after["registry"]) == 2
    assert members(after["cluster"]) == {0, 4, 5, 6}
    for name in ("short", "long", "reference"):
        assert mass(after, name, 0) == pytest.approx(sum(mass(before, name, c) for c in (0, 1, 2)))
        assert mass(after, name, 4) == mass(before, name, 3)
        for cluster in (5, 6):
            assert mass(after, name, cluster) == mass(before, name, cluster)
    counts = after["count"][:, slot_of(after, 0)]
    expected = sum(before["count"][:, slot_of(before, cluster)] for cluster in (0, 1, 2))
    assert counts.tolist() == pytest.approx(np.asarray(expected).tolist())


def test_dislikes_and_the_session_s_weight_follow_too() -> None:
    state = watched([0, 1, 2, 3])
    slot, _ = count_watch(state, 1, -1.0, int(state["last_ts"]), 99, MODEL, evidence=False)
    assert mass(state, "negative", 1) > 0
    after = adopted(state)
    assert mass(after, "negative", 0) == mass(state, "negative", 1)
    gained = sum(mass(state, "in_session", cluster) for cluster in (0, 1, 2))
    assert mass(after, "in_session", 0) == gained > 0
    state["in_session"][slot] = 65_535
    assert mass(adopted(state), "in_session", 0) == 65_535


@given(st.lists(st.integers(0, 11), min_size=1, max_size=60))
@settings(max_examples=25, deadline=None)
def test_nothing_is_lost_and_the_estimate_stays_a_distribution(clusters: list[int]) -> None:
    before = watched(clusters)
    after = adopted(before)
    for name in ("count", "short", "long", "total"):
        assert float(after[name].sum()) == pytest.approx(float(before[name].sum()), rel=1e-5), name
    assert fresh_draws(after) == pytest.approx(fresh_draws(before), rel=1e-5)
    discounted = np.minimum(after["count"], CONSTANTS.discount).sum(axis=1)
    assert after["spread"].tolist() == pytest.approx(discounted.tolist(), abs=1e-4)
    whole = sum(share(after, cluster, AFTER) for cluster in range(12))
    assert whole == pytest.approx(1.0, abs=1e-5)
    assert share(after, 0, AFTER) >= max(share(before, cluster, MODEL) for cluster in (0, 1, 2)) - 0.05
    again = adopted(after)
    assert to_bytes(again) == to_bytes(after)
    held = [cluster for cluster in after["cluster"].tolist() if cluster != EMPTY]
    assert len(held) == len(set(held))
    assert not {1, 2, 3} & {*held, *after["recent"].tolist(), *after["stated"].tolist()}


def test_a_freed_slot_is_empty_in_every_field() -> None:
    after, fresh = adopted(watched([0, 1, 2, 3, 4] * 3)), new_state()
    (free, *_) = [slot for slot in range(3) if after["cluster"][slot] == EMPTY]
    for name in ("cluster", "short", "long", "negative", "reference", "in_session", "evidence_video", "evidence_ts"):
        assert np.array_equal(after[name][free], fresh[name][free]), name
    assert not after["count"][:, free].any()


def test_evidence_keeps_the_newest_videos_each_once() -> None:
    state = watched([0, 1, 2, 1, 0, 6])  # videos 1 to 6; the newest of 0, 1 and 2 are 5, 4 and 3
    after = adopted(state)
    slot = slot_of(after, 0)
    assert after["evidence_video"][slot].tolist() == [5, 4]
    assert after["evidence_ts"][slot].tolist() == [START + 4 * 60 * MINUTE, START + 3 * 60 * MINUTE]
    # The same video in both: it is kept once, at its newest time.
    state["evidence_video"][slot_of(state, 1), 0] = 5
    both = adopted(state)["evidence_video"][slot].tolist()
    assert both == [5, 3]
    assert len(both) == EVIDENCE


def test_what_a_viewer_hid_and_pinned_and_what_was_stated_follow() -> None:
    state = watched([0, 1, 2, 3, 5, 6])
    state["hidden"][:3] = [1, 2, 7]
    state["pinned"][:3] = [3, 4, 5]
    state["stated"][:4] = [6, 2, 0, 5]
    state["stated_from"][:4] = [40, 30, 20, 10]
    state["ring_cluster"][:3] = [1, 5, 6]
    after = adopted(state)
    assert members(after["hidden"]) == {0, 7}
    assert members(after["pinned"]) == {4, 5}
    stated = dict(zip(after["stated"].tolist(), after["stated_from"].tolist(), strict=True))
    assert stated == {6: 40, 0: 20, 5: 10, EMPTY: 0}
    assert after["ring_cluster"][:4].tolist() == [0, 5, 6, EMPTY]


def test_full_slots_stay_full_where_every_cluster_moves() -> None:
    many = make_registry(clusters=2 * SLOTS)
    renamed = make_registry(clusters=2 * SLOTS, version=2, successors={c: c + SLOTS for c in range(SLOTS)})
    state = new_state()
    model = make_model(many)
    for cluster in range(SLOTS):
        slot, counted = count_watch(state, cluster, 1.0, START, cluster + 1, model, evidence=True)
        draw(state, slot, counted, model, autoplay=False)
    after = adopted(state, renamed)
    assert after["cluster"].tolist() == list(range(SLOTS, 2 * SLOTS))
    for name in ("count", "long", "evidence_video"):
        assert np.array_equal(after[name], state[name]), name


def test_versions_may_be_skipped_and_a_new_viewer_just_notes_the_version() -> None:
    third = make_registry(clusters=12, version=3, successors={1: 6, 2: 6, 0: 6, 3: 4, 5: -1})
    state = watched([0, 1, 2, 3, 4])
    assert to_bytes(adopted(state, third)) == to_bytes(adopted(adopted(state), third))
    fresh = adopted(new_state())
    assert int(fresh["registry"]) == 2
    fresh["registry"] = 0
    assert to_bytes(fresh) == to_bytes(new_state())


# The workers


async def test_a_persona_after_the_change_speaks_of_the_live_clusters_alone() -> None:
    driver = ReplayDriver(make_configuration(OLD, MERGED), OLD)
    log = watches("ann", [1, 3, 5, 1, 3, 5] * 8)
    hide, pin = control("ann", "hide", cluster_id=2), control("ann", "pin", START + 1, cluster_id=6)
    await driver.run([*log, hide, AdoptRegistry(2), pin])
    old, *_, new = [orjson.loads(output.value or b"") for output in driver.outputs(topics.REFRESH_REQUESTS)]
    assert (old["registry_version"], new["registry_version"]) == (1, 2)
    assert {interest["cluster_id"] for interest in old["context"]["interests"]} == {1, 3, 5}
    # 1 is now 0, which stands for 2 that the viewer hid; 5 has no cluster any more.
    assert {interest["cluster_id"] for interest in new["context"]["interests"]} == {4, 6}
    assert new["context"]["avoid"] == [0]
    state = from_bytes(driver.states["ann"])
    assert mass(state, "long", 5) > 1
    assert {int(c) for c in state["cluster"] if c != EMPTY} == {0, 4, 5, 6}


async def test_a_video_forgotten_after_the_change_is_taken_from_the_cluster_that_stands_for_its_own() -> None:
    driver = ReplayDriver(make_configuration(OLD, MERGED), OLD)
    log = watches("ann", [1, 3] * 4)
    await driver.run([*log, AdoptRegistry(2)])
    await driver.run([control("ann", "forget_video", video_id="c1v0")])
    state = from_bytes(driver.states["ann"])
    assert mass(state, "long", 0) == pytest.approx(3, rel=0.05)
    assert mass(state, "long", 4) == pytest.approx(4, rel=0.1)
