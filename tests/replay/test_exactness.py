"""The same log gives the same bytes and the same requests, however it is split and wherever it crashes."""

from __future__ import annotations

import random

import numpy as np
import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.replay import AdoptRegistry, Crash, Duplicate, Event, Item, Reorder, ReplayDriver, Step
from streams import topics
from streams.state import STATE, from_bytes
from streams.watch import Outcome
from tests.builders import MINUTE, START, control, event, make_configuration, make_registry, watches

REGISTRY = make_registry()
REBUILT = make_registry(version=2, successors={1: 0, 2: 3, 4: -1})
CONFIGURATION = make_configuration(REGISTRY, REBUILT)


def mixed_log(seed: int, size: int = 160) -> list[Item]:
    """Three viewers with drifting tastes, bad lines, late and repeated events, dislikes, heartbeats and controls."""
    pick = random.Random(seed)
    log: list[Item] = []
    ts = START
    for i in range(size):
        ts += pick.randrange(20 * MINUTE)
        user = pick.choice("abc")
        taste = [0, 1] if i < size // 2 else [2, 3]
        video = f"c{pick.choice([*taste, *taste, pick.randrange(6)])}v{pick.randrange(10)}"
        kind = pick.random()
        if kind < 0.05:
            log.append(Event(b"not json", user.encode(), ts))
        elif kind < 0.1:
            log.append(event(user, video, ts - pick.randrange(20) * 86_400_000, append=ts))
        elif kind < 0.15:
            log.append(event(user, video, ts, action=pick.choice(["skip", "thumbs_down", "share"])))
        elif kind < 0.2:
            log.append(event(user, video, ts, playback_id=f"p{i // 4}", watch_fraction=pick.random()))
        elif kind < 0.24:
            log.append(Duplicate(2))
        elif kind < 0.27:
            kinds = ["hide", "pin", "forget_video", "opt_out", "opt_in", "clear_history", "erase"]
            log.append(control(user, pick.choice(kinds), ts, cluster_id=pick.randrange(6), video_id=video))
        else:
            log.append(event(user, video, ts, session_id=f"s{i // 5}"))
    return log


async def outcome_of(log: list[Item], batch: int = 500) -> tuple[dict[str, bytes], list[bytes | None]]:
    driver = ReplayDriver(CONFIGURATION, REGISTRY, batch_records=batch)
    await driver.run(log)
    return driver.states, [output.value for output in driver.outputs(topics.REFRESH_REQUESTS)]


@given(seed=st.integers(0, 10_000), batch=st.integers(1, 60))
@settings(max_examples=25, deadline=None)
async def test_any_split_into_batches_gives_the_same_bytes(seed: int, batch: int) -> None:
    log = mixed_log(seed)
    assert await outcome_of(log, batch) == await outcome_of(log)


@given(seed=st.integers(0, 10_000), places=st.lists(st.tuples(st.integers(0, 160), st.sampled_from(Step)), max_size=6))
@settings(max_examples=25, deadline=None)
async def test_crashes_change_nothing(seed: int, places: list[tuple[int, Step]]) -> None:
    log = mixed_log(seed)
    crashing = list(log)
    for place, step in sorted(places, reverse=True):
        crashing.insert(place, Crash(step))
    states, requests = await outcome_of(log)
    crashed_states, crashed_requests = await outcome_of(crashing, 150)
    assert crashed_states == states
    # A crash may repeat an output, with the same bytes; none is lost and none is new.
    assert list(dict.fromkeys(crashed_requests)) == requests


@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 60),
    change=st.integers(0, 160),
    places=st.lists(st.tuples(st.integers(0, 160), st.sampled_from(Step)), max_size=4),
)
@settings(max_examples=25, deadline=None)
async def test_a_rebuilt_registry_takes_effect_at_the_same_record_for_any_batches_and_crashes(
    seed: int, batch: int, change: int, places: list[tuple[int, Step]]
) -> None:
    """Clusters are renamed, merged and lost in the middle of the log."""
    log = mixed_log(seed)
    log.insert(min(change, len(log)), AdoptRegistry(2))
    crashing = list(log)
    for place, step in sorted(places, reverse=True):
        crashing.insert(place, Crash(step))
    states, requests = await outcome_of(log)
    assert await outcome_of(log, batch) == (states, requests)
    crashed_states, crashed_requests = await outcome_of(crashing, batch)
    assert crashed_states == states
    assert list(dict.fromkeys(crashed_requests)) == requests


async def test_a_crash_after_outputs_repeats_the_request_with_the_same_id() -> None:
    log = watches("ann", [0, 1] * 10)
    driver = ReplayDriver(CONFIGURATION, REGISTRY)
    await driver.run([*log, Crash(Step.OUTPUTS)])
    requests = [orjson.loads(output.value or b"") for output in driver.outputs(topics.REFRESH_REQUESTS)]
    assert [request["rule"] for request in requests] == ["cold_start", "cold_start"]
    assert requests[0] == requests[1]
    assert int(from_bytes(driver.states["ann"])["events"]) == 20


async def test_states_written_before_a_crash_are_not_counted_again() -> None:
    # Far more events than the ring of last events remembers, so only the offset marker can tell.
    log = watches("ann", [0, 1, 2] * 40)
    calm, crashed = ReplayDriver(CONFIGURATION, REGISTRY), ReplayDriver(CONFIGURATION, REGISTRY)
    await calm.run(log)
    await crashed.run([*log, Crash(Step.STATES)])
    assert crashed.outcomes == {Outcome.REPEATED: 120}
    assert crashed.states == calm.states
    assert int(from_bytes(crashed.states["ann"])["events"]) == 120


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
async def test_nothing_negative_nothing_infinite(seed: int) -> None:
    states, _ = await outcome_of(mixed_log(seed))
    assert set(states) <= set("abc")
    for value in states.values():
        state = from_bytes(value)
        for name in STATE.names or ():
            numbers = state[name]
            if numbers.dtype.kind == "f":
                assert np.isfinite(numbers).all(), name
                assert (numbers >= 0).all() or name in ("ring_weight", "ring_counted"), name


async def test_small_reordering_moves_counts_within_tolerance() -> None:
    log = watches("ann", [0, 1, 2, 0, 1, 0] * 20, gap=2000)
    ordered, reordered = ReplayDriver(CONFIGURATION, REGISTRY), ReplayDriver(CONFIGURATION, REGISTRY)
    await ordered.run(log)
    shuffled: list[Item] = []
    for i, entry in enumerate(log):
        shuffled += [Reorder(4), entry] if i % 8 == 0 else [entry]
    await reordered.run(shuffled)
    expected, found = (from_bytes(driver.states["ann"]) for driver in (ordered, reordered))
    assert reordered.outcomes[Outcome.APPLIED] == len(log)
    for cluster in range(3):
        wanted = float(expected["long"][expected["cluster"] == cluster][0])
        got = float(found["long"][found["cluster"] == cluster][0])
        assert abs(got - wanted) <= 0.05 * wanted


async def test_producer_duplicates_are_counted_once() -> None:
    log = watches("ann", [0, 1, 2] * 4)
    driver = ReplayDriver(CONFIGURATION, REGISTRY)
    await driver.run([*log, Duplicate(12)])
    assert driver.outcomes == {Outcome.APPLIED: 12, Outcome.DUPLICATE: 12}
    assert int(from_bytes(driver.states["ann"])["events"]) == 12
