"""What becomes of watch events and controls, one by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import orjson
import pytest

from agents.replay import AdoptRegistry, Crash, EndBootstrap, Event, Item, ReplayDriver, Step, as_bootstrap
from streams import topics
from streams.ageing import IDLE_DAYS, LATENESS_DAYS, free
from streams.columns import MAXIMUM_RECORD_BYTES
from streams.loading import ENDED
from streams.positions import Position, PositionKind, Recorded
from streams.state import OPTED_OUT, STATE, StateError, from_bytes, new_state, to_bytes
from streams.state_table import StateTable
from streams.topics import DAY_MS
from streams.watch import Batch, InputRecord, Outcome, WatchHandler, highest_marker
from tests.builders import MINUTE, START, control, event, make_configuration, make_registry, watches

DAY = 86_400_000
REGISTRY = make_registry()


async def run(script: Sequence[Item], **policy: Any) -> ReplayDriver:
    driver = ReplayDriver(make_configuration(REGISTRY, **policy), REGISTRY)
    await driver.run(script)
    return driver


def requests(driver: ReplayDriver) -> list[dict[str, Any]]:
    return [orjson.loads(output.value or b"") for output in driver.outputs(topics.REFRESH_REQUESTS)]


def count(driver: ReplayDriver, user: str, cluster: int, name: str = "long") -> float:
    state = from_bytes(driver.states[user])
    return float(state[name][state["cluster"] == cluster].sum())


async def test_the_first_persona_is_requested_at_the_gate_with_its_evidence() -> None:
    driver = await run(watches("ann", [0, 1] * 10))
    (request,) = requests(driver)
    assert (request["rule"], request["sequence"], request["user_id"]) == ("cold_start", 1, "ann")
    labels = [interest["label"] for interest in request["context"]["interests"]]
    assert sorted(labels) == ["sourdough baking", "trail running"]
    for interest in request["context"]["interests"]:
        assert interest["evidence"][0]["video_id"].startswith(f"c{interest['cluster_id']}v")
        assert interest["share_bucket"] % 5 == 0
    assert {novel["cluster_id"] for novel in request["context"]["novel"]}.isdisjoint({0, 1})


async def test_below_the_gate_a_template_is_requested_once_where_configured() -> None:
    assert requests(await run(watches("ann", [0] * 10))) == []
    driver = await run(watches("ann", [0, 1] * 5), template_after=5)
    (request,) = requests(driver)
    assert request["tier_limit"] == "template"
    assert request["context"]["maturity"] == "cold"


async def test_a_shift_of_taste_fires_and_names_what_rose_and_fell() -> None:
    driver = await run(watches("ann", [0, 1, 0, 1, 2] * 12 + [3, 4, 5, 3, 4] * 12))
    rules = [request["rule"] for request in requests(driver)]
    assert rules[0] == "cold_start"
    assert "drift" in rules
    drift = requests(driver)[rules.index("drift")]
    explanation = drift["context"]["explanation"]
    assert explanation["value"] > explanation["threshold"]
    assert {row[0] for row in explanation["risen"]} <= {3, 4, 5}
    assert {row[0] for row in explanation["fallen"]} <= {0, 1, 2}
    assert explanation["divergence"] > 0
    assert rules[rules.index("drift") + 1] == "follow_up"


async def test_maximum_age_fires_on_the_next_event() -> None:
    log = watches("ann", [0, 1] * 10)
    later = watches("ann", [0, 1] * 5, start=START + 40 * DAY)
    driver = await run([*log, *later])
    assert [request["rule"] for request in requests(driver)] == ["cold_start", "age"]
    without = await run([*log, *later], maximum_age_days=0)
    assert [request["rule"] for request in requests(without)] == ["cold_start"]


@pytest.mark.parametrize(
    ("late_days", "outcome"),
    [(0.001, Outcome.APPLIED), (1, Outcome.LATE), (29, Outcome.LATE), (31, Outcome.DEAD_LETTER)],
)
async def test_late_events(late_days: float, outcome: Outcome) -> None:
    late = event("ann", "c1v0", START + 40 * DAY - int(late_days * DAY), append=START + 40 * DAY)
    driver = await run([event("ann", "c0v0", START + 40 * DAY), late])
    assert driver.outcomes[outcome] == (2 if outcome is Outcome.APPLIED else 1)
    expected = 0.0 if outcome is Outcome.DEAD_LETTER else 2.0 ** (-late_days / 90)
    assert count(driver, "ann", 1) == pytest.approx(expected, rel=0.01)


async def test_an_event_from_the_future_is_clamped_to_its_append_time() -> None:
    driver = await run([event("ann", "c0v0", START + DAY, append=START)])
    assert driver.outcomes == {Outcome.CLAMPED: 1}
    assert int(from_bytes(driver.states["ann"])["last_ts"]) == START


async def test_bots_and_tests_are_counted_but_not_applied() -> None:
    driver = await run([event("ann", "c0v0", START, traffic="bot"), event("ann", "c0v0", START, traffic="test")])
    assert driver.outcomes == {Outcome.NOT_ORGANIC: 2}
    assert driver.states == {}


async def test_heartbeats_of_one_playback_collapse_to_their_maximum() -> None:
    beats = [event("ann", "c0v0", START + i, playback_id="p", watch_fraction=f) for i, f in enumerate([0.3, 0.9, 0.5])]
    driver = await run([*beats])
    state = from_bytes(driver.states["ann"])
    assert count(driver, "ann", 0) == pytest.approx(0.9, rel=0.01)
    assert (int(state["events"]), int(state["qualifying"])) == (1, 1)
    assert driver.outcomes == {Outcome.APPLIED: 2, Outcome.DUPLICATE: 1}


async def test_a_dislike_during_a_playback_is_not_taken_for_a_heartbeat() -> None:
    play = event("ann", "c0v0", START, playback_id="p", watch_fraction=0.9)
    dislike = event("ann", "c0v0", START + 1, playback_id="p", action="thumbs_down")
    driver = await run([play, dislike])
    assert count(driver, "ann", 0, "negative") == pytest.approx(1.0)


async def test_one_session_counts_a_cluster_at_most_four_times() -> None:
    driver = await run([event("ann", f"c0v{i}", START + i * MINUTE) for i in range(10)])
    assert 3.5 < count(driver, "ann", 0) <= 4.0
    spread = await run(watches("ann", [0] * 10))
    assert count(spread, "ann", 0) > 9


async def test_an_unknown_video_is_unassigned_and_noted_once() -> None:
    driver = await run([event("ann", "new", START + i, title="A title") for i in range(3)])
    (noted,) = driver.outputs(topics.UNKNOWN_VIDEOS)
    assert orjson.loads(noted.value or b"")["title"] == "A title"
    assert driver.unassigned == 3
    assert float(from_bytes(driver.states["ann"])["unassigned"]) == 3


async def test_the_events_own_cluster_wins_where_the_registry_has_it() -> None:
    driver = await run([event("ann", "c0v0", START, cluster_id=3), event("ann", "c1v0", START + 1, cluster_id=999)])
    assert count(driver, "ann", 3) > 0
    assert count(driver, "ann", 0) == 0
    assert count(driver, "ann", 1) > 0


async def test_a_new_registry_version_places_the_video_from_its_position_on() -> None:
    second = make_registry(version=2, extra={"new": 4})
    configuration = make_configuration(REGISTRY, second)
    driver = ReplayDriver(configuration, REGISTRY)
    await driver.run([event("ann", "new", START), AdoptRegistry(2), event("ann", "new", START + MINUTE)])
    assert driver.unassigned == 1
    assert count(driver, "ann", 4) == pytest.approx(1.0)


@pytest.mark.parametrize("value", [None, b"", b"{", b"[]", b"\xff", b"null", b'{"user_id": "ann"}'])
async def test_bad_records_are_dead_letters_and_the_partition_goes_on(value: bytes | None) -> None:
    driver = await run([Event(value, b"ann", START), event("ann", "c0v0", START)])
    assert driver.outcomes == {Outcome.DEAD_LETTER: 1, Outcome.APPLIED: 1}
    (letter,) = driver.outputs(topics.dead_letters_of(topics.WATCH_EVENTS))
    document = orjson.loads(letter.value or b"")
    assert (document["source_partition"], document["source_offset"]) == (0, 0)
    assert letter.key == b"watch-events/0/0"


async def test_an_oversized_record_is_a_dead_letter_with_its_length() -> None:
    huge = event("ann", "c0v0", START, title="x" * MAXIMUM_RECORD_BYTES)
    driver = await run([huge])
    assert driver.dead_letters == {"too_large": 1}
    (letter,) = driver.outputs(topics.dead_letters_of(topics.WATCH_EVENTS))
    assert orjson.loads(letter.value or b"")["length"] == len(huge.value or b"")


async def test_hidden_interests_leave_and_pinned_ones_stay() -> None:
    log = watches("ann", [0, 1] * 10)
    driver = await run([*log, control("ann", "hide", cluster_id=0), control("ann", "pin", START + 1, cluster_id=5)])
    hidden, pinned = requests(driver)[1:]
    assert [request["rule"] for request in (hidden, pinned)] == ["control", "control"]
    assert {interest["cluster_id"] for interest in hidden["context"]["interests"]} == {1}
    assert 0 in hidden["context"]["avoid"]
    assert {interest["cluster_id"] for interest in pinned["context"]["interests"]} == {1, 5}


async def test_forgetting_a_video_takes_its_watches_and_evidence_back() -> None:
    driver = await run([*watches("ann", [0, 1] * 4), control("ann", "forget_video", video_id="c0v0")])
    assert count(driver, "ann", 0) == pytest.approx(3, rel=0.05)
    fields = from_bytes(driver.states["ann"])
    kept = [REGISTRY.video_of(int(key)) for key in fields["evidence_video"].reshape(-1) if key]
    assert kept
    assert "c0v0" not in kept


async def test_opting_out_removes_everything_and_counts_nothing_until_opting_in() -> None:
    log = watches("ann", [0, 1] * 10)
    driver = await run([*log, control("ann", "opt_out"), *watches("ann", [2] * 3, start=START + 2 * DAY)])
    assert driver.outcomes[Outcome.OPTED_OUT] == 3
    state = from_bytes(driver.states["ann"])
    assert int(state["flags"]) & OPTED_OUT
    assert not state["long"].any()
    removal = requests(driver)[-1]
    assert (removal["command"], removal["epoch"], removal["context"]) == ("opt_out", 1, None)
    await driver.run([control("ann", "opt_in", START + 1), *watches("ann", [2], start=START + 3 * DAY)])
    assert count(driver, "ann", 2) == pytest.approx(1.0)


async def test_erasing_leaves_a_stub_without_content_and_raises_the_sequence() -> None:
    driver = await run([*watches("ann", [0, 1] * 10), control("ann", "erase")])
    removal = requests(driver)[-1]
    assert (removal["command"], removal["sequence"], removal["epoch"]) == ("erase", 2, 1)
    stub, empty = from_bytes(driver.states["ann"]), new_state()
    kept = {"epoch", "sequence", "watch_topic", "watch_offset", "control_topic", "control_offset"}
    for name in set(STATE.names or ()) - kept:
        assert np.array_equal(stub[name], empty[name]), name
    assert int(stub["watch_offset"]) == 19


async def test_clearing_the_history_keeps_what_was_hidden() -> None:
    script: list[Item] = [
        *watches("ann", [0] * 5),
        control("ann", "hide", cluster_id=2),
        control("ann", "clear_history", START + 1),
    ]
    driver = await run(script)
    state = from_bytes(driver.states["ann"])
    assert not state["long"].any()
    assert int(state["hidden"][0]) == 2


async def test_loaded_history_requests_one_persona_per_eligible_viewer_at_its_end() -> None:
    drifting = [0, 1, 2, 0] * 10 + [3, 4, 5] * 10
    history = [*watches("ann", drifting), *watches("bob", [0, 1] * 20), *watches("cat", [0] * 5)]
    driver = await run([as_bootstrap(item) for item in history])
    assert requests(driver) == []
    await driver.run([EndBootstrap()])
    found = requests(driver)
    assert [(request["user_id"], request["rule"]) for request in found] == [
        ("ann", "cold_start"),
        ("bob", "cold_start"),
    ]
    await driver.run([EndBootstrap()])
    assert len(requests(driver)) == 2


def loaded_handler(viewers: int, last: dict[int, int] | None = None) -> WatchHandler:
    """A handler of viewers whose history was loaded, and a marker behind it. last: days of a viewer's newest event."""
    registry = make_registry()
    handler = WatchHandler(make_configuration(registry, first_persona_after=5), 0, registry, StateTable())
    records: list[InputRecord] = []
    for number in range(viewers):
        key = f"viewer-{number:04}"
        for item in watches(key, [0, 1] * 5, START + (last or {}).get(number, 0) * DAY_MS):
            records.append(InputRecord(len(records), item.key, item.value, item.timestamp, (topics.BOOTSTRAP_HEADER,)))
    for batch in handler.handle(records):
        assert not batch.outputs
    marker = Position(PositionKind.BOOTSTRAP_END, len(records), "controls", 0)
    handler.schedule.add(Recorded(0, marker))
    return handler


def asked(batches: Iterable[Batch]) -> list[list[str]]:
    return [[(output.key or b"").decode() for output in batch.outputs] for batch in batches]


def test_the_end_of_a_loaded_history_asks_for_a_bounded_number_of_personas_at_once() -> None:
    handler = loaded_handler(2 * ENDED + 100)
    found = asked(handler.handle([], 10**6))
    assert max(map(len, found)) == ENDED
    assert [user for part in found for user in part] == [f"viewer-{n:04}" for n in range(2 * ENDED + 100)]


def test_what_a_crash_left_of_a_loaded_history_is_asked_for_and_nothing_twice() -> None:
    handler = loaded_handler(ENDED + 100)
    before: list[str] = []
    for batch in handler.handle([], 10**6):
        before += asked([batch])[0]
        if before:
            break
    changes = handler.table.take_changed()
    table = StateTable()
    table.put(changes.keys, changes.values)
    again = WatchHandler(make_configuration(handler.registry, first_persona_after=5), 0, handler.registry, table)
    again.schedule.add(Recorded(0, Position(PositionKind.BOOTSTRAP_END, 0, "controls", 0)))
    after = [user for part in asked(again.handle([], 10**6)) for user in part]
    assert before + after == [f"viewer-{n:04}" for n in range(ENDED + 100)]
    assert len(before) < ENDED + 100


def test_the_end_of_a_loaded_history_leaves_stored_viewers_stored_whose_history_was_not_loaded() -> None:
    loaded, live = loaded_handler(2), StateTable()
    live.state(b"zoe")["last_ts"] = START
    live.mark([b"zoe"])
    stored: dict[bytes, bytes] = {}
    for changes in loaded.table.take_changed(), live.take_changed():
        stored |= {key: value for key, value in zip(changes.keys, changes.values, strict=True) if value is not None}
    table = StateTable(stored.get)
    handler = WatchHandler(
        make_configuration(loaded.registry, first_persona_after=5),
        0,
        loaded.registry,
        table,
        lambda: iter(stored.items()),
    )
    handler.schedule.add(Recorded(0, Position(PositionKind.BOOTSTRAP_END, 0, "controls", 0)))
    assert [user for part in asked(handler.handle([], 10**6)) for user in part] == ["viewer-0000", "viewer-0001"]
    assert b"zoe" not in table


def test_of_a_loaded_viewer_who_was_away_for_long_no_persona_is_asked_for() -> None:
    """The next sweep forgets them: their persona would come behind their tombstone."""
    handler = loaded_handler(3, {0: 0, 1: IDLE_DAYS + LATENESS_DAYS - 1, 2: IDLE_DAYS + LATENESS_DAYS + 1})
    assert [user for part in asked(handler.handle([], 10**6)) for user in part] == ["viewer-0001", "viewer-0002"]
    free(handler.table, START + (IDLE_DAYS + LATENESS_DAYS + 1) * DAY_MS, 10**6)
    assert [key for key, _ in handler.table.packed()] == [b"viewer-0000"]


async def test_the_highest_marker_of_a_topic_is_found() -> None:
    driver = await run([*watches("ann", [0] * 3), *watches("bob", [1] * 2)])
    states = np.stack([from_bytes(value) for value in driver.states.values()])
    assert highest_marker(states, "watch-events", 0) == 4
    assert highest_marker(states, "watch-events", 1) == -1
    assert highest_marker(states, "another topic id", 0) == -1


def test_a_state_survives_its_bytes_and_refuses_others() -> None:
    state = new_state()
    state["events"] = 7
    assert to_bytes(from_bytes(to_bytes(state))) == to_bytes(state)
    with pytest.raises(StateError, match="this version reads"):
        from_bytes(b"short")
    with pytest.raises(StateError, match="layout 99"):
        from_bytes(b"\x63" + to_bytes(state)[1:])
    assert STATE.itemsize < 2500


async def test_a_pin_without_any_watch_gives_an_interest_and_no_division_by_zero() -> None:
    hidden: list[Item] = [
        *watches("ann", [3] * 8),
        control("ann", "hide", cluster_id=3),
        control("ann", "pin", START + 1, cluster_id=5),
    ]
    driver = await run(hidden, template_after=5)
    last = requests(driver)[-1]
    assert [interest["cluster_id"] for interest in last["context"]["interests"]] == [5]
    assert all(novel["lift"] > 0 for novel in last["context"]["novel"])


async def test_what_was_watched_while_opted_out_stays_out_through_a_crash() -> None:
    """Opting out and in lies within one batch that was written and not committed."""
    away = watches("ann", [2] * 6, start=START + DAY)
    log: list[Item] = [
        *watches("ann", [0] * 3),
        control("ann", "opt_out"),
        *away,
        control("ann", "opt_in", START + 1),
    ]
    calm, crashed = await run(log), await run([*log, Crash(Step.STATES)])
    assert crashed.states == calm.states
    assert count(crashed, "ann", 2) == 0


async def test_a_late_event_before_an_erasure_stays_out_through_a_crash() -> None:
    log: list[Item] = [
        event("ann", "c0v0", START + 60 * DAY),
        event("ann", "c1v0", START, append=START + 60 * DAY),
        control("ann", "erase"),
    ]
    calm, crashed = await run(log), await run([*log, Crash(Step.STATES)])
    assert crashed.states == calm.states
    assert count(crashed, "ann", 1) == 0


async def test_heartbeats_become_evidence_when_together_they_qualify() -> None:
    beats = [event("ann", "c0v0", START + i, playback_id="p", watch_fraction=(i + 1) / 10) for i in range(10)]
    state = from_bytes((await run([*beats])).states["ann"])
    assert [REGISTRY.video_of(int(key)) for key in state["evidence_video"].reshape(-1) if key] == ["c0v0"]


async def test_forgetting_takes_back_only_what_was_counted_and_dislikes_too() -> None:
    evening = [event("ann", f"c0v{i % 10}", START + i * MINUTE) for i in range(12)]
    forgotten = control("ann", "forget_video", video_id="c0v9")
    assert count(await run([*evening, forgotten]), "ann", 0) > 3
    dislike = event("ann", "c1v0", START, action="not_interested")
    driver = await run([dislike, control("ann", "forget_video", video_id="c1v0")])
    assert count(driver, "ann", 1, "negative") == 0


async def test_the_next_heartbeat_of_a_forgotten_playback_adds_only_what_is_new() -> None:
    first = event("ann", "c0v0", START, playback_id="p", watch_fraction=0.8)
    second = event("ann", "c0v0", START + 1, playback_id="p", watch_fraction=0.9)
    driver = await run([first, control("ann", "forget_video", video_id="c0v0"), second])
    assert count(driver, "ann", 0) == pytest.approx(0.1, abs=0.01)
    assert int(from_bytes(driver.states["ann"])["qualifying"]) == 1


async def test_a_viewer_who_got_a_persona_during_the_load_is_not_requested_again() -> None:
    history = [as_bootstrap(item) for item in watches("ann", [0, 1] * 12)]
    live = watches("ann", [0, 1], start=START + 2 * DAY)
    driver = await run([*history, *live, EndBootstrap()])
    assert [request["rule"] for request in requests(driver)] == ["cold_start"]


async def test_pins_keep_their_place_among_many_clusters() -> None:
    registry = make_registry(clusters=40)
    driver = ReplayDriver(make_configuration(registry), registry)
    await driver.run(watches("ann", list(range(30))))
    await driver.run([control("ann", "pin", cluster_id=38), control("ann", "pin", START + 1, cluster_id=39)])
    await driver.run(watches("ann", [31, 32, 33], start=START + 30 * 40 * MINUTE))
    assert {38, 39} <= set(from_bytes(driver.states["ann"])["cluster"].tolist())


async def test_what_a_persona_may_not_state_is_not_named_in_its_explanation() -> None:
    driver = await run([*watches("ann", [0, 1, 0, 1, 2] * 12), control("ann", "hide", START + 100 * DAY, cluster_id=4)])
    await driver.run(watches("ann", [3, 4, 5, 3, 4] * 12, start=START + 60 * 40 * MINUTE))
    named = {row[0] for request in requests(driver) for row in request["context"]["explanation"]["risen"]}
    assert named
    assert 4 not in named


async def test_controls_and_events_of_a_retired_cluster_go_to_its_successor() -> None:
    old, new = make_registry(), make_registry(version=2, clusters=5, successors={5: 1})
    driver = ReplayDriver(make_configuration(old, new), old)
    await driver.run([*watches("ann", [0, 5] * 10), AdoptRegistry(2)])
    later = START + 100 * DAY
    await driver.run([event("ann", "c0v0", later, cluster_id=5), control("ann", "hide", later, cluster_id=5)])
    state = from_bytes(driver.states["ann"])
    assert 5 not in state["cluster"]
    assert 1 in state["hidden"]
    assert int(state["ring_cluster"][int(state["ring_next"]) - 1]) == 1
