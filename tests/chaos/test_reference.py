"""The comparison finds what is wrong: results that were tampered with, one way each."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest

from streams.state import from_bytes, new_state, to_bytes
from tests.chaos.reference import Differences, Result, behind, compare


def sample() -> Result:
    states = {}
    for user, events in {"ann": 5, "bob": 7}.items():
        state = new_state()
        state["events"], state["watch_offset"] = events, events * 10
        states[user] = to_bytes(state)
    result = Result(states=states, letters={b"watch-events/0/3"}, controls={("controls", 0, 1)})
    result.requests["r1"].add(b'{"request_id": "r1"}')
    result.requests["r2"].add(b'{"request_id": "r2"}')
    return result


def recounted(result: Result, user: str, events: int) -> Result:
    state = from_bytes(result.states[user]).copy()
    state["events"] = int(state["events"]) + events
    result.states[user] = to_bytes(state)
    return result


TAMPERED: list[tuple[str, Callable[[Result], object], dict[str, int]]] = [
    ("too often", lambda r: recounted(r, "ann", 3), {"over": 3, "states_differing": 1}),
    ("lost", lambda r: recounted(r, "bob", -2), {"under": 2, "states_differing": 1}),
    (
        "both",
        lambda r: recounted(recounted(r, "ann", 1), "bob", -1),
        {"over": 1, "under": 1, "states_differing": 2},
    ),
    ("viewer gone", lambda r: r.states.pop("bob"), {"under": 7, "states_differing": 1}),
    ("stranger", lambda r: r.states.update(eve=r.states["ann"]), {"over": 5, "states_differing": 1}),
    ("request lost", lambda r: r.requests.pop("r1"), {"requests_missing": 1}),
    ("request invented", lambda r: r.requests["r3"].add(b"{}"), {"requests_extra": 1}),
    ("request twice, with other contents", lambda r: r.requests["r2"].add(b"{}"), {"requests_differing": 1}),
    ("letter lost", lambda r: r.letters.clear(), {"letters_missing": 1}),
    ("letter invented", lambda r: r.letters.add(b"watch-events/0/4"), {"letters_extra": 1}),
    ("control lost", lambda r: r.controls.clear(), {"controls_missing": 1}),
]


@pytest.mark.parametrize(("tamper", "shown"), [case[1:] for case in TAMPERED], ids=[case[0] for case in TAMPERED])
def test_what_was_tampered_with_is_found(tamper: Callable[[Result], object], shown: dict[str, int]) -> None:
    expected, found = sample(), sample()
    tamper(found)
    differences = compare(expected, found)
    assert differences
    assert {name: value for name, value in differences.figures().items() if value} == shown


def test_equal_results_have_no_differences() -> None:
    assert not compare(sample(), deepcopy(sample()))
    assert not any(Differences().figures().values())


def test_a_state_whose_count_is_right_but_not_its_bytes_is_found() -> None:
    found = sample()
    state = from_bytes(found.states["ann"]).copy()
    state["regret"] = 0.5
    found.states["ann"] = to_bytes(state)
    differences = compare(sample(), found)
    assert differences.states_differing == 1
    assert "regret 0.5 not 0.0" in differences.examples[0]


def test_viewers_committed_past_the_changelog_are_found() -> None:
    found = sample()
    assert behind(sample(), found) == []
    del found.states["ann"]
    assert behind(sample(), found) == ["ann"]
