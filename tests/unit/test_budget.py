"""The budget: who goes first, what a token bucket lets through, and that the order changes nothing else."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.budget import (
    BURST_SECONDS,
    FIRST_TOKENS_PER_TEXT,
    Budget,
    Priority,
    Standing,
    Ticket,
    priority,
)
from streams.records import Command, RefreshRequest, Rule
from tests.request_samples import NOON, sample_context, sample_request

DAY = 86_400_000
REFRESH = Priority(Standing.REFRESH, 1.0)


def request_of(
    divergence: float | None = 0.2, *, events: int = 100, days: float = 24.0, rule: Rule = Rule.DRIFT
) -> RefreshRequest:
    context = sample_context()
    basis = replace(context.basis, events=events, first_ts=NOON - round(days * DAY), last_ts=NOON)
    explanation = replace(context.explanation, divergence=divergence, rule=rule)
    return replace(sample_request(), rule=rule, context=replace(context, basis=basis, explanation=explanation))


def budget(tokens_per_hour: float = 3600, *, waiting: int = 100, running: int = 100) -> Budget:
    return Budget(tokens_per_hour, waiting_limit=waiting, running_limit=running, now=0.0)


# The order


def test_the_priority_is_bits_times_watches_a_day_for_each_text() -> None:
    assert priority(request_of(0.2, events=100, days=24.0), 5) == Priority(Standing.REFRESH, 0.2 * 4.0 / 5)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (priority(request_of(0.3), 2), priority(request_of(0.2), 2)),
        (priority(request_of(events=200), 2), priority(request_of(events=100), 2)),
        (priority(request_of(), 1), priority(request_of(), 2)),
        (priority(request_of(None, rule=Rule.COLD_START, events=20, days=60), 9), priority(request_of(0.9), 1)),
        (priority(request_of(0.0, rule=Rule.CONTROL), 9), priority(request_of(0.9), 1)),
        (priority(request_of(0.001), 9), priority(request_of(0.9), 1, upgrade=True)),
        (priority(request_of(None, events=20, days=1), 2), priority(request_of(None, events=20, days=30), 2)),
    ],
)
def test_what_goes_first(better: Priority, worse: Priority) -> None:
    assert better > worse
    line = budget(running=1)
    line.join(REFRESH, 1)
    line.let_on(0.0)
    second, first = line.join(worse, 1), line.join(better, 1)
    assert line.let_on(1e6) == []
    line.settle(Ticket(REFRESH, -1, 1), 0, 0)
    assert line.let_on(1e6) == [first]
    line.settle(first, 0, 0)
    assert line.let_on(1e6) == [second]


def test_a_first_evening_does_not_count_as_a_rate() -> None:
    evening = priority(request_of(None, events=20, days=0.1), 1)
    assert evening.removed == pytest.approx(20 / 1.1)


def test_clocks_that_went_back_do_not_turn_the_order_round() -> None:
    assert priority(request_of(0.5, events=10, days=-30), 1).removed == 5.0


def test_a_removal_has_no_priority_since_it_never_waits() -> None:
    with pytest.raises(ValueError, match="no context"):
        priority(sample_request(command=Command.ERASE), 1)


def test_equal_requests_go_in_their_order() -> None:
    line = budget()
    tickets = [line.join(REFRESH, 0) for _ in range(5)]
    assert line.let_on(0.0) == tickets


# The bucket


def test_it_starts_with_nothing_saved_and_lets_one_on_at_a_time() -> None:
    line = budget(3600)  # one token a second
    first, second = line.join(REFRESH, 1), line.join(REFRESH, 1)
    assert line.let_on(0.0) == [first]
    assert line.seconds_in_debt(0.0) == pytest.approx(FIRST_TOKENS_PER_TEXT)
    assert line.let_on(FIRST_TOKENS_PER_TEXT - 1) == []
    assert line.let_on(FIRST_TOKENS_PER_TEXT) == [second]


def test_it_saves_no_more_than_the_burst() -> None:
    line = budget(3600)
    for _ in range(20):
        line.join(REFRESH, 1)
    granted = len(line.let_on(1e9))
    assert granted == math.floor(BURST_SECONDS / FIRST_TOKENS_PER_TEXT) + 1


def test_a_request_larger_than_the_bucket_goes_and_is_paid_back() -> None:
    line = budget(3600)
    large = line.join(REFRESH, 1000)
    assert line.let_on(0.0) == [large]
    line.settle(large, 100_000, 0)
    assert line.seconds_in_debt(0.0) == pytest.approx(100_000)


def test_what_was_not_spent_is_given_back() -> None:
    line = budget(3600)
    ticket = line.join(REFRESH, 4)
    line.let_on(0.0)
    line.settle(ticket, 10, 0)
    assert line.seconds_in_debt(0.0) == pytest.approx(10)


def test_an_interrupted_request_has_cost_what_was_expected() -> None:
    line = budget(3600)
    ticket = line.join(REFRESH, 4)
    line.let_on(0.0)
    line.settle(ticket, 10, 1, interrupted=True)
    assert line.seconds_in_debt(0.0) == pytest.approx(4 * FIRST_TOKENS_PER_TEXT)
    assert line.tokens_per_text == FIRST_TOKENS_PER_TEXT, "not all of the cost is known"


def test_an_interrupted_request_that_cost_more_than_expected_is_charged_what_is_known() -> None:
    line = budget(3600)
    ticket = line.join(REFRESH, 4)
    line.let_on(0.0)
    line.settle(ticket, 2000, 4, interrupted=True)
    assert line.seconds_in_debt(0.0) == pytest.approx(2000)
    assert line.tokens_per_text == pytest.approx(500)


def test_leaving_gives_everything_back_before_or_after_the_turn() -> None:
    line = budget(3600)
    granted, waiting = line.join(REFRESH, 4), line.join(REFRESH, 4)
    assert line.let_on(0.0) == [granted]
    line.leave(waiting)
    line.leave(granted)
    line.leave(granted)
    assert line.waiting == 0
    assert line.seconds_in_debt(0.0) == 0.0


def test_the_cost_of_a_text_is_measured() -> None:
    line = budget(3600)
    for now, texts, tokens in ((1e6, 2, 800), (2e6, 8, 1600)):
        ticket = line.join(REFRESH, texts)
        line.let_on(now)
        line.settle(ticket, tokens, texts)
    assert line.tokens_per_text == pytest.approx(240)
    ticket = line.join(REFRESH, 1)
    line.let_on(3e6)
    line.settle(ticket, 0, 0)
    assert line.tokens_per_text == pytest.approx(240), "nothing was worded, so nothing is learned"


def test_the_measured_cost_follows_a_change_of_the_student() -> None:
    line, now = budget(3600), 0.0
    for tokens in (100, 1000):
        for _ in range(3000):
            now += 2000.0
            ticket = line.join(REFRESH, 1)
            line.let_on(now)
            line.settle(ticket, tokens, 1)
    assert line.tokens_per_text == pytest.approx(1000, rel=0.06)


def test_no_more_than_the_limit_are_worded_at_once() -> None:
    line = budget(running=2)
    tickets = [line.join(REFRESH, 0) for _ in range(4)]
    assert line.let_on(0.0) == tickets[:2]
    assert line.let_on(1e6) == []
    assert line.seconds_in_debt(1e6) == 0.0
    line.settle(tickets[1], 0, 0)
    assert line.let_on(1e6) == [tickets[2]]


def test_beyond_the_limit_the_worst_refreshes_are_turned_away_and_upgrades_never() -> None:
    line = budget(waiting=2, running=1)
    running = line.join(REFRESH, 1)
    line.let_on(0.0)
    upgrades = [line.join(Priority(Standing.UPGRADE, 0.0), 1) for _ in range(3)]
    tickets = [line.join(Priority(Standing.REFRESH, bits), 1) for bits in (0.3, 0.1, 0.4, 0.2)]
    assert line.turn_away() == [tickets[1], tickets[3]]
    assert line.turn_away() == []
    order = []
    for _ in range(5):
        line.settle(running, 0, 0)
        (running,) = line.let_on(1e6)
        order.append(running)
    assert order == [tickets[2], tickets[0], *upgrades]


def test_a_worker_spends_the_share_of_its_partitions() -> None:
    line = budget(3600)
    line.set_share(0.25, 0.0)
    line.join(REFRESH, 1)
    line.let_on(0.0)
    assert line.seconds_in_debt(0.0) == pytest.approx(4 * FIRST_TOKENS_PER_TEXT)
    line.set_share(0.0, 100.0)
    assert line.seconds_in_debt(1e9) == math.inf
    line.set_share(1.0, 1e9)
    assert line.seconds_in_debt(1e9) == pytest.approx(FIRST_TOKENS_PER_TEXT - 25)


# Properties

arrivals = st.lists(
    st.tuples(
        st.floats(0, 5000),  # seconds after the one before
        st.sampled_from(list(Standing)),
        st.floats(0, 10),
        st.integers(1, 9),
        st.integers(0, 5000),  # tokens it will cost
    ),
    min_size=1,
    max_size=40,
)


def served(steps: list[tuple[float, Standing, float, int, int]], *, ordered: bool) -> tuple[list[int], float, float]:
    """Serve all: who was served in which order, tokens spent, and seconds until the last was let on."""
    line, now = budget(36_000), 0.0
    numbers: dict[Ticket, int] = {}
    order: list[int] = []
    left = deque(enumerate(steps))
    while left or line.waiting:
        if left:
            number, (gap, standing, removed, texts, _) = left.popleft()
            now += gap
            place = Priority(standing, removed) if ordered else REFRESH
            numbers[line.join(place, texts)] = number
        else:
            now += line.seconds_in_debt(now)
        for ticket in line.let_on(now):
            order.append(numbers[ticket])
            line.settle(ticket, steps[numbers[ticket]][4], ticket.texts)
    return order, float(sum(steps[number][4] for number in order)), now


@given(arrivals)
def test_every_request_is_served_once_whatever_the_order(
    steps: list[tuple[float, Standing, float, int, int]],
) -> None:
    ours, spent, _ = served(steps, ordered=True)
    theirs, also_spent, _ = served(steps, ordered=False)
    assert sorted(ours) == sorted(theirs) == list(range(len(steps)))
    assert theirs == sorted(theirs)
    assert spent == also_spent


@given(arrivals)
def test_no_more_is_spent_than_earned_saved_and_one_request(
    steps: list[tuple[float, Standing, float, int, int]],
) -> None:
    _, spent, seconds = served(steps, ordered=True)
    largest = max(step[4] for step in steps)
    assert spent <= 10 * seconds + largest + 1e-3
