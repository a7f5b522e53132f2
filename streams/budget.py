"""The budget of the persona app: how many tokens the student may be paid, and which waiting request gets them first.

A token bucket says when the next request may go on; the order says which. While a request waits, its viewer is served
a persona that is D bits off (the divergence that the request carries) at each of r watches a day, so a day of waiting
costs D r. To lower the sum of such costs over all that wait, serve by cost per unit of work, the highest first
(weighted shortest processing time: Smith, 1956, "Various optimizers for single-stage production"; the c-mu rule):

    staleness removed per token = D r / (texts to be worded x mean tokens of a text)

The budget orders requests. It never makes, changes or drops one.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from streams.personas import context_of
from streams.records import RefreshRequest, Rule

HOUR_SECONDS: Final = 3600.0
BURST_SECONDS: Final = 600.0
"""What the bucket holds at most is what it earns in this time: an hour's tokens are at most 7/6 of the budget."""
FIRST_TOKENS_PER_TEXT: Final = 100.0
"""Tokens of a text, prompt and answer, until the first is measured."""
MEAN_OVER_TEXTS: Final = 1000
"""The mean tokens of a text follow about as many of the latest texts: prompts and students change."""
UNKNOWN_BITS: Final = 1.0
"""Divergence where none was measured: the most there is, as nothing yet describes the viewer."""
_ROUNDING_TOKENS: Final = 1e-6
"""A debt this small is none: what is earned until a given time is known no better."""
_DAY_MS: Final = 86_400_000


class Standing(IntEnum):
    """What is served while a request waits; a higher one goes first whatever it costs.

    UPGRADE: a template with the right interests. REFRESH: a persona that is out of date. FIRST: nothing yet, or what
    the viewer has just asked to be changed.
    """

    UPGRADE = 0
    REFRESH = 1
    FIRST = 2


@dataclass(frozen=True, slots=True, order=True)
class Priority:
    """Place of a request in the order; the greatest goes first. removed: bits x watches a day, for each text to pay."""

    standing: Standing
    removed: float


@dataclass(frozen=True, slots=True, order=True)
class Ticket:
    """A request's place in the line. Of equal priorities the earlier goes first: `order` falls with each ticket."""

    priority: Priority
    order: int
    texts: int


def priority(request: RefreshRequest, texts: int, *, upgrade: bool = False) -> Priority:
    """Priority of a refresh for which `texts` (at least 1) must be worded.

    Texts stand for tokens here: the mean tokens of a text are the same for all that wait. upgrade: the request's
    template is stored already, so only wording is gained; upgrades go in their order. Raises ValueError for a request
    without a context: a removal, which never waits.
    """
    if upgrade:
        return Priority(Standing.UPGRADE, 0.0)
    divergence = context_of(request).explanation.divergence
    bits = UNKNOWN_BITS if divergence is None else divergence
    removed = bits * _watches_a_day(request) / texts
    first = divergence is None or request.rule in (Rule.COLD_START, Rule.CONTROL)
    return Priority(Standing.FIRST if first else Standing.REFRESH, removed)


def _watches_a_day(request: RefreshRequest) -> float:
    """Mean rate since the first watch. The day added keeps the watches of a first evening from counting as hundreds."""
    basis = context_of(request).basis
    return basis.events / (1.0 + max(0, basis.last_ts - basis.first_ts) / _DAY_MS)


class Budget:
    """A token bucket, and the line of requests that wait for it. Times are seconds of any clock that never goes back.

    A request goes on while the bucket is not in debt. It is charged the expected tokens at once and what it really cost
    when it ends, so the bucket can fall below zero and earns that back first: no request is too large for it, and over
    time no more is spent than earned. It begins empty: restarting a worker earns nothing.
    """

    def __init__(self, tokens_per_hour: float, *, waiting_limit: int, running_limit: int, now: float) -> None:
        """tokens_per_hour: of the whole budget, above 0, see `set_share`; waiting_limit: requests that may wait,
        upgrades not counted; running_limit: requests that may be worded at once, at least 1.
        """
        self._full_rate = tokens_per_hour / HOUR_SECONDS
        self._rate = self._full_rate
        self._level = 0.0
        self._now = now
        self._waiting_limit = waiting_limit
        self._running_limit = running_limit
        self._line: list[Ticket] = []  # ascending: the next to go on is the last
        self._charged: dict[Ticket, float] = {}
        self._tickets = 0
        self._texts_measured = 0
        self.tokens_per_text = FIRST_TOKENS_PER_TEXT
        """Measured mean, retries included."""

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return len(self._line)

    def set_share(self, share: float, now: float) -> None:
        """Earn only this share (0..1) of the budget from `now` on: that of the partitions that are read here."""
        self._earn(now)
        self._rate = self._full_rate * share
        self._level = min(self._level, self._rate * BURST_SECONDS)

    def join(self, priority: Priority, texts: int) -> Ticket:
        """Put a request that needs `texts` worded into the line."""
        self._tickets += 1
        ticket = Ticket(priority, -self._tickets, texts)
        insort(self._line, ticket)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Take back a request that waits, or that was let on and asked for nothing. Unknown tickets are ignored."""
        place = bisect_left(self._line, ticket)
        if place < len(self._line) and self._line[place] == ticket:
            del self._line[place]
        self._level += self._charged.pop(ticket, 0.0)

    def let_on(self, now: float) -> list[Ticket]:
        """Take from the line, best first, those that may be worded now. Each ends by `settle`, or `leave` if unused."""
        self._earn(now)
        going: list[Ticket] = []
        while self._line and not self._in_debt and len(self._charged) < self._running_limit:
            ticket = self._line.pop()
            self._charged[ticket] = ticket.texts * self.tokens_per_text
            self._level -= self._charged[ticket]
            going.append(ticket)
        return going

    def turn_away(self) -> list[Ticket]:
        """Take from the line, worst first, the refreshes beyond the limit: they get a template, later an upgrade."""
        upgrades = bisect_left(self._line, Standing.REFRESH, key=lambda ticket: ticket.priority.standing)
        beyond = max(0, len(self._line) - upgrades - self._waiting_limit)
        turned_away = self._line[upgrades : upgrades + beyond]
        del self._line[upgrades : upgrades + beyond]
        return turned_away

    def settle(self, ticket: Ticket, tokens: int, texts: int, *, interrupted: bool = False) -> None:
        """Charge what a request really cost.

        texts: those that the tokens were paid for; 0 teaches nothing about the cost of a text. interrupted: more may
        have been spent than is known, so what was expected stays charged if that is more.
        """
        charged = self._charged.pop(ticket)
        if interrupted and tokens < charged:
            return
        self._level += charged - tokens
        if texts:
            self._texts_measured = min(self._texts_measured + texts, MEAN_OVER_TEXTS)
            weight = min(1.0, texts / self._texts_measured)
            self.tokens_per_text += weight * (tokens / texts - self.tokens_per_text)

    def seconds_in_debt(self, now: float) -> float:
        """Time until the bucket is out of debt: 0 if it is, infinite if nothing is earned."""
        self._earn(now)
        if not self._in_debt:
            return 0.0
        return -self._level / self._rate if self._rate else math.inf

    @property
    def _in_debt(self) -> bool:
        return self._level < -_ROUNDING_TOKENS

    def _earn(self, now: float) -> None:
        self._level = min(self._level + self._rate * (now - self._now), self._rate * BURST_SECONDS)
        self._now = now
