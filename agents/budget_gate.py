"""Where requests wait for the budget: `streams.budget` on the event loop's clock."""

from __future__ import annotations

import asyncio

from agents.telemetry import BUDGET_BOUND, BUDGET_WAITING, Telemetry
from streams.budget import Budget, Priority, Ticket


class BudgetGate:
    """Lets requests on one by one, the best first, as the budget allows. Make it inside the running loop."""

    def __init__(self, tokens_per_hour: int, *, waiting_limit: int, running_limit: int, telemetry: Telemetry) -> None:
        """See `Budget`; it earns all of the budget until `set_share` says otherwise."""
        self._loop = asyncio.get_running_loop()
        self._budget = Budget(
            tokens_per_hour, waiting_limit=waiting_limit, running_limit=running_limit, now=self._loop.time()
        )
        self._telemetry = telemetry
        self._turns: dict[Ticket, asyncio.Future[bool]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._bound_since: float | None = None

    def set_share(self, share: float) -> None:
        """Earn only this share (0..1) of the budget from now on."""
        self._budget.set_share(share, self._loop.time())
        self._serve()

    async def enter(self, priority: Priority, texts: int) -> Ticket | None:
        """Wait for the turn of a request that needs `texts` worded; None: no turn, as too many better ones wait.

        Whoever gets a ticket gives it back through `leave`. Cancelling leaves the line.
        """
        ticket = self._budget.join(priority, texts)
        turn = self._turns[ticket] = self._loop.create_future()
        self._serve()
        try:
            return ticket if await turn else None
        except asyncio.CancelledError:
            self._budget.leave(ticket)
            self._serve()
            raise
        finally:
            del self._turns[ticket]

    def leave(self, ticket: Ticket, tokens: int, texts: int, *, interrupted: bool) -> None:
        """End a turn; see `Budget.settle`."""
        self._budget.settle(ticket, tokens, texts, interrupted=interrupted)
        self._serve()

    def _serve(self) -> None:
        now = self._loop.time()
        for ticket in self._budget.let_on(now):
            self._answer(ticket, granted=True)
        for ticket in self._budget.turn_away():
            self._answer(ticket, granted=False)
        self._wake_later(now)

    def _answer(self, ticket: Ticket, *, granted: bool) -> None:
        turn = self._turns[ticket]
        if not turn.cancelled():  # else `enter` is about to take the ticket back
            turn.set_result(granted)

    def _wake_later(self, now: float) -> None:
        """Come back when the bucket is out of debt. A place among the running ones comes free through `leave`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        seconds = self._budget.seconds_in_debt(now) if self._budget.waiting else 0.0
        self._measure(now, bound=seconds > 0.0)
        if 0.0 < seconds < float("inf"):
            self._timer = self._loop.call_later(seconds, self._serve)

    def _measure(self, now: float, *, bound: bool) -> None:
        self._telemetry.observe(BUDGET_WAITING, self._budget.waiting)
        if self._bound_since is not None:
            self._telemetry.count(BUDGET_BOUND, round(1000 * now) - round(1000 * self._bound_since))
        self._bound_since = now if bound else None
