"""Does the budget's order beat first come, first served? Simulated refreshes, the very code of streams/budget.py.

    .venv/bin/python benchmarks/budget.py [--seeds 20] [--first-seed 0] [--out benchmarks/budget.md]

Requests arrive as a Poisson process at 70% of what the budget pays for, with 20 minutes at 250% of it (burst), or at
130% for good (overload). Prints the tables and ends with one JSON object, of the burst.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import orjson
from numpy.random import Generator

from streams.budget import Budget, Priority, Standing, Ticket, priority
from streams.personas import context_of
from streams.records import Basis, Context, Explanation, Maturity, RefreshRequest, Rule

HOURS: Final = 4.0
TOKENS_PER_HOUR: Final = 1_000_000
EXPIRES_SECONDS: Final = 3600.0
WAITING_LIMIT: Final = 512
IN_FLIGHT: Final = 8
CALL_SECONDS: Final = 2.0
TOKENS_PER_TEXT: Final = 320.0
"""What a simulated text costs on average; the budget starts from another value and has to measure it."""
COLD_STARTS: Final = 0.1
DAY_MS: Final = 86_400_000
CLASSES: Final = ((0.7, 0.6), (4.0, 0.3), (30.0, 0.1))
"""Watches a day, and the share of viewers."""

Order = Callable[[RefreshRequest, int], Priority]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A simulated refresh. at: seconds; texts: those not cached; tokens: what they will cost."""

    at: float
    request: RefreshRequest
    texts: int
    tokens: int

    @property
    def bits(self) -> float | None:
        return context_of(self.request).explanation.divergence

    @property
    def rate(self) -> float:
        basis = context_of(self.request).basis
        return basis.events / (1 + (basis.last_ts - basis.first_ts) / DAY_MS)


@dataclass(frozen=True, slots=True)
class Scenario:
    """load: of the budget, by (start, end, factor) in hours."""

    name: str
    load: tuple[tuple[float, float, float], ...]


BURST: Final = Scenario("burst", ((0.0, 1.0, 0.7), (1.0, 4 / 3, 2.5), (4 / 3, HOURS, 0.7)))
OVERLOAD: Final = Scenario("overload", ((0.0, HOURS, 1.3),))


def draw_request(number: int, random: Generator) -> tuple[RefreshRequest, int]:
    """A request and the number of its texts that are not cached."""
    rates, shares = np.array(CLASSES).T
    # Viewers ask for refreshes in proportion to what they watch.
    rate = random.choice(rates, p=rates * shares / (rates * shares).sum()) * random.lognormal(0.0, 0.4)
    cold = random.random() < COLD_STARTS
    days = 20.0 / rate if cold else random.uniform(20.0, 200.0)
    divergence = None if cold else float(np.clip(random.lognormal(np.log(0.12), 0.6), 0.005, 0.9))
    rule = Rule.COLD_START if cold else Rule.DRIFT
    events = max(1, round(rate * days))
    context = Context(
        maturity=Maturity.FORMING,
        basis=Basis(events, float(events), 0, round(days * DAY_MS)),
        interests=(),
        novel=(),
        avoid=(),
        explanation=Explanation(rule, 1.0, 1.0, 20, divergence),
    )
    texts = int(random.binomial(random.integers(3, 10), 1.0 - random.beta(1.5, 1.5)))
    return RefreshRequest(f"r{number}", f"u{number}", 0, 1, 0, rule, 3_600_000, 1, context=context), texts


def draw(scenario: Scenario, random: Generator) -> list[Arrival]:
    texts = [draw_request(0, random)[1] for _ in range(2000)]
    a_second = TOKENS_PER_HOUR / 3600 / (np.mean(texts) * TOKENS_PER_TEXT)
    arrivals: list[Arrival] = []
    for start, end, load in scenario.load:
        number = random.poisson(load * a_second * (end - start) * 3600)
        for at in np.sort(random.uniform(start * 3600, end * 3600, number)):
            request, missing = draw_request(len(arrivals), random)
            tokens = max(0, round(random.normal(TOKENS_PER_TEXT * missing, 60 * np.sqrt(missing))))
            arrivals.append(Arrival(float(at), request, missing, tokens))
    return arrivals


@dataclass(frozen=True, slots=True)
class Answers:
    """When each arrival got its persona (seconds), and whether a template, before its upgrade."""

    at: Sequence[float]
    template: Sequence[bool]
    spent: int


class Run:
    """One worker's line of requests, in simulated time."""

    def __init__(self, arrivals: Sequence[Arrival], order: Order) -> None:
        self._arrivals = arrivals
        self._order = order
        self._budget = Budget(TOKENS_PER_HOUR, waiting_limit=WAITING_LIMIT, running_limit=IN_FLIGHT, now=0.0)
        self._tickets: dict[Ticket, int] = {}
        self._waiting: dict[int, Ticket] = {}
        self._answered = [float("nan")] * len(arrivals)
        self._template = [False] * len(arrivals)
        self._spent = 0
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._pushed = 0
        self._waking = False

    def answers(self) -> Answers:
        for i, arrival in enumerate(self._arrivals):
            self._later(arrival.at, self._arrive(i))
        while self._events:
            now, _, happen = heapq.heappop(self._events)
            happen(now)
            self._serve(now)
        return Answers(self._answered, self._template, self._spent)

    def _later(self, at: float, happen: Callable[[float], None]) -> None:
        self._pushed += 1
        heapq.heappush(self._events, (at, self._pushed, happen))

    def _arrive(self, i: int) -> Callable[[float], None]:
        def arrive(now: float) -> None:
            arrival = self._arrivals[i]
            if not arrival.texts:
                self._answered[i] = now
                return
            self._join(i, self._order(arrival.request, arrival.texts))
            self._later(now + EXPIRES_SECONDS, lambda at: self._expire(i, at))

        return arrive

    def _join(self, i: int, place: Priority) -> None:
        self._waiting[i] = self._budget.join(place, self._arrivals[i].texts)
        self._tickets[self._waiting[i]] = i

    def _expire(self, i: int, now: float) -> None:
        if i in self._waiting and not self._template[i]:
            self._budget.leave(self._waiting.pop(i))
            self._write_template(i, now)

    def _write_template(self, i: int, now: float) -> None:
        self._answered[i], self._template[i] = now, True
        self._join(i, priority(self._arrivals[i].request, self._arrivals[i].texts, upgrade=True))

    def _serve(self, now: float) -> None:
        for ticket in self._budget.let_on(now):
            i = self._tickets[ticket]
            del self._waiting[i]
            self._later(now + CALL_SECONDS, self._finish(i, ticket))
        for ticket in self._budget.turn_away():
            self._write_template(self._tickets[ticket], now)
        seconds = self._budget.seconds_in_debt(now) if self._budget.waiting else 0.0
        if seconds and not self._waking:
            self._waking = True
            self._later(now + seconds, self._wake)

    def _wake(self, now: float) -> None:
        self._waking = False

    def _finish(self, i: int, ticket: Ticket) -> Callable[[float], None]:
        def finish(now: float) -> None:
            arrival = self._arrivals[i]
            self._budget.settle(ticket, arrival.tokens, arrival.texts)
            self._spent += arrival.tokens
            if not self._template[i]:
                self._answered[i] = now

        return finish


def first_come(request: RefreshRequest, texts: int) -> Priority:
    return Priority(Standing.REFRESH, 0.0)


def cold_first(request: RefreshRequest, texts: int) -> Priority:
    return replace(priority(request, texts), removed=0.0)


def by_divergence(request: RefreshRequest, texts: int) -> Priority:
    return replace(priority(request, texts), removed=context_of(request).explanation.divergence or 0.0)


def by_divergence_and_cost(request: RefreshRequest, texts: int) -> Priority:
    return replace(by_divergence(request, texts), removed=by_divergence(request, texts).removed / texts)


def by_divergence_and_rate(request: RefreshRequest, texts: int) -> Priority:
    return replace(priority(request, texts), removed=priority(request, texts).removed * texts)


ORDERS: Final[dict[str, Order]] = {
    "first come": first_come,
    "cold starts, then first come": cold_first,
    "divergence": by_divergence,
    "divergence / tokens": by_divergence_and_cost,
    "divergence x watching": by_divergence_and_rate,
    "divergence x watching / tokens (ours)": priority,
}
OURS: Final = "divergence x watching / tokens (ours)"
DOCUMENT: Final = """# The order of a budget that binds

    .venv/bin/python benchmarks/budget.py --seeds {seeds} --first-seed {first_seed} --out benchmarks/budget.md

Simulated refreshes through the code of `streams/budget.py`: {hours:.0f} hours, {tokens:,} tokens an hour,
{seeds} seeds, the same requests for every order. Burst: arrivals at 70% of what the budget pays for, and 20 minutes
at 250%. Overload: 130% for good. Viewers watch 0.7, 4 or 30 times a day (60, 30 and 10% of them, spread by a factor
e^0.4) and ask for refreshes in proportion; a tenth are first personas; divergences are log-normal around .12 bits; of 3
to 9 texts a share drawn from Beta(1.5, 1.5) is cached. These are assumptions, not measurements.

Bits off: the divergence that the persona has while its refresh waits, as a mean over viewers and the {hours:.0f}
hours, or over the watches in them. A first persona has no such divergence: its wait is apart. A request ends with its
first answer, template or student; at most {limit} wait, and none more than an hour.

{tables}

Every order spends the same. Weighing by watching lowers what is met at watches, which is what a viewer sees and what
the other benchmarks average over, at the price of viewers who rarely come; without it the mean over viewers is lower.
First personas come at once in either case, and that alone would cost the others.
"""
COLUMNS: Final = ("viewers", "watches", "cold", "template", "tokens")


def figures(arrivals: Sequence[Arrival], answers: Answers) -> dict[str, float]:
    """viewers: bits off for waiting, averaged over viewers with a persona and time; watches: over their watches; cold:
    seconds that a first persona waits; template: share of requests answered by one first; tokens: spent.
    """
    waited = np.array(answers.at) - [arrival.at for arrival in arrivals]
    cold = np.array([arrival.bits is None for arrival in arrivals])
    bits = np.array([arrival.bits or 0.0 for arrival in arrivals])[~cold]
    rates = np.array([arrival.rate for arrival in arrivals])[~cold]
    hours = waited[~cold] / 3600
    return {
        "viewers": float((bits * hours).mean() / HOURS),
        "watches": float((bits * rates * hours).sum() / (rates.sum() * HOURS)),
        "cold": float(waited[cold].mean()),
        "template": float(np.mean(answers.template)),
        "tokens": float(answers.spent),
    }


def interval(values: Sequence[float], random: Generator) -> tuple[float, float]:
    """95% bootstrap interval of the mean."""
    means = random.choice(np.array(values), size=(2000, len(values))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def measure(scenario: Scenario, seeds: Sequence[int]) -> dict[str, list[dict[str, float]]]:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ORDERS}
    for seed in seeds:
        arrivals = draw(scenario, np.random.default_rng(seed))
        for name, order in ORDERS.items():
            results[name].append(figures(arrivals, Run(arrivals, order).answers()))
    return results


def table(scenario: Scenario, results: dict[str, list[dict[str, float]]]) -> str:
    random = np.random.default_rng(0)
    lines = [
        f"## {scenario.name.capitalize()}",
        "",
        "| order | bits off, viewers x time | ratio to first come (95%) | bits off, at watches | ratio (95%) "
        "| first persona waits, s | templates first | tokens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = results["first come"]
    for name, rows in results.items():
        mean = {column: float(np.mean([row[column] for row in rows])) for column in COLUMNS}
        ratios = []
        for column in ("viewers", "watches"):
            values = [row[column] / first[column] for row, first in zip(rows, base, strict=True)]
            low, high = interval(values, random)
            ratios.append(f"{np.mean(values):.2f} ({low:.2f} to {high:.2f})")
        lines.append(
            f"| {name} | {mean['viewers']:.5f} | {ratios[0]} | {mean['watches']:.5f} | {ratios[1]} "
            f"| {mean['cold']:.0f} | {mean['template']:.1%} | {mean['tokens']:,.0f} |"
        )
    return "\n".join(lines)


def summary(results: dict[str, list[dict[str, float]]]) -> dict[str, float | int]:
    def mean(name: str, column: str) -> float:
        return float(np.mean([row[column] for row in results[name]]))

    first, ours = mean("first come", "viewers"), mean(OURS, "viewers")
    watched, ours_watched = mean("first come", "watches"), mean(OURS, "watches")
    return {
        "first_come": round(first, 6),
        "ordered": round(ours, 6),
        "ratio": round(ours / first, 3),
        "seeds": len(results[OURS]),
        "cold_start_wait_first_come_seconds": round(mean("first come", "cold"), 1),
        "cold_start_wait_ordered_seconds": round(mean(OURS, "cold"), 1),
        "first_come_at_watches": round(watched, 6),
        "ordered_at_watches": round(ours_watched, 6),
        "ratio_at_watches": round(ours_watched / watched, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="number of simulated streams of each scenario")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the tables here as well")
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    measured = {scenario: measure(scenario, seeds) for scenario in (BURST, OVERLOAD)}
    tables = "\n\n".join(table(scenario, results) for scenario, results in measured.items())
    print(tables)
    if arguments.out:
        text = DOCUMENT.format(
            seeds=arguments.seeds,
            first_seed=arguments.first_seed,
            hours=HOURS,
            tokens=TOKENS_PER_HOUR,
            limit=WAITING_LIMIT,
            tables=tables,
        )
        arguments.out.write_text(text)
    print(orjson.dumps(summary(measured[BURST])).decode())


if __name__ == "__main__":
    main()
