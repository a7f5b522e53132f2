"""The figures as markdown and as one JSON object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.drift.figures import MASSES, Figures
from benchmarks.drift.policies import BLIND, OURS, OURS_WITH_AGE, every_80
from benchmarks.drift.traces import DECAYED, MIXTURE
from streams.simulation import RATES, Kind

SAME_ESTIMATOR_BAR: Final = frozenset({Kind.STICKINESS_0, Kind.STICKINESS_7, Kind.ANCHORED, Kind.BROAD})
REFRESH_RATIO: Final = 0.7


@dataclass(frozen=True)
class Results:
    """Of one run. figures: by kind of simulator, then by policy."""

    seed: int
    command: str
    seconds: float
    figures: Mapping[Kind, Mapping[str, Figures]]


@dataclass(frozen=True)
class Bar:
    """What is asked of the product: its worst value over classes, and whether it holds."""

    name: str
    asked: str
    value: float
    met: bool


def bars(ours: Figures) -> list[Bar]:
    def at_most(name: str, value: float | None, limit: float) -> Bar:
        value = float("nan") if value is None else value
        return Bar(name, f"at most {limit:g}", value, value <= limit)

    found = min(ours.detected_50_within_60.values(), default=float("nan"))
    return [
        at_most("refreshes per 1,000 events", ours.refreshes_per_1k, 6),
        at_most("staleness", ours.staleness_mean, 0.05),
        at_most("staleness after a shift", ours.staleness_after_shift, 0.08),
        at_most("false refreshes per 1,000 events, worst class", max(ours.false_per_1k.values()), 3),
        Bar("50% shifts refreshed within 60 events, worst class", "at least .9", found, found >= 0.9),
        at_most("stable viewers refreshed in 60 events, worst class", max(ours.stable_any_60.values()), 0.2),
    ]


def beats_every_80(ours: Figures, every: Figures) -> bool:
    """Less stale on average and after a shift, at no more than 70% of the refreshes."""
    if ours.staleness_after_shift is None or every.staleness_after_shift is None:
        return False
    return (
        ours.staleness_mean < every.staleness_mean
        and ours.staleness_after_shift < every.staleness_after_shift
        and ours.refreshes_per_1k <= REFRESH_RATIO * every.refreshes_per_1k
    )


def document(results: Results) -> dict[str, Any]:
    """The run as one JSON object; the product's own figures are at its top."""
    by_policy = results.figures.get(Kind.DEFAULT, {})
    own = {}
    if by_policy:
        own = by_policy[OURS].document() | {
            "bars": {bar.name: bar.met for bar in bars(by_policy[OURS])},
            "maximum_age_30_days_costs_per_1k": _age_cost(by_policy),
            "baselines": {name: f.document() for name, f in by_policy.items() if name != OURS},
        }
    others = {
        str(kind): {
            "ours": figures[OURS].document(),
            "every_80": figures[every_80(MIXTURE)].document(),
            "refresh_ratio": round(figures[OURS].refreshes_per_1k / figures[every_80(MIXTURE)].refreshes_per_1k, 4),
            "beats_every_80": beats_every_80(figures[OURS], figures[every_80(MIXTURE)]),
        }
        for kind, figures in results.figures.items()
        if kind is not Kind.DEFAULT
    }
    return {"seed": results.seed, **own, "other_simulators": others}


def markdown(results: Results) -> str:
    by_policy = results.figures.get(Kind.DEFAULT, {})
    parts = [
        "# When to refresh a persona",
        f"`{results.command}`, {results.seconds:.0f} seconds. Written by that command; the definitions are at the end.",
    ]
    if by_policy:
        parts += _default_parts(by_policy)
    others = [(kind, figures) for kind, figures in results.figures.items() if kind is not Kind.DEFAULT]
    if others:
        parts += ["## Other simulators", OTHERS, _others(others)]
    return "\n\n".join([*parts, DEFINITIONS]) + "\n"


def _default_parts(by_policy: Mapping[str, Figures]) -> list[str]:
    twice = {f"{DECAYED}, {name}" for name in BLIND}  # refresh when the same policy does over the other estimator
    timings = {name: f for name, f in by_policy.items() if name not in twice}
    return [
        "## Bars",
        _table(
            ("asked of the product", "bar", "measured", "met"),
            [
                (bar.name, bar.asked, _number(bar.value), "yes" if bar.met else "**no**")
                for bar in bars(by_policy[OURS])
            ],
        ),
        "## Cost and staleness",
        "![Refreshes against staleness](tradeoff.png)",
        _by_policy(
            by_policy,
            {
                "viewers": lambda f: f"{f.viewers:,}",
                "refreshes per 1,000": lambda f: f"{f.refreshes_per_1k:.1f}",
                "staleness": lambda f: _number(f.staleness_mean),
                "stable viewers": lambda f: _number(f.staleness_stable),
                "shifted viewers": lambda f: _number(f.staleness_shifted),
                "after the shift": lambda f: _number(f.staleness_after_shift),
            },
        ),
        "## Stable viewers",
        "![False refreshes by class](false.png)",
        "False refreshes per 1,000 events with 95% intervals; the last columns are what chance finds in 60 events.",
        _by_policy(
            timings,
            {name: _false_column(name) for name in RATES} | {f"{name}, any 60": _any_column(name) for name in RATES},
        ),
        "## Shifts found",
        "![Shifts refreshed by delay](delay.png)",
        "Shares refreshed within 60 events: light / medium / heavy viewers; delay: median / 90% quantile, in events.",
        _by_policy(
            timings,
            {f"{mass:.0%}": _found_column(mass) for mass in MASSES}
            | {f"delay at {mass:.0%}": _delay_column(mass) for mass in MASSES},
        ),
        "## The maximum age",
        "Off above. Refreshing at the next event once a persona is 30 days old adds, per 1,000 events: "
        + ", ".join(f"{name} {cost:.1f}" for name, cost in _age_cost(by_policy).items())
        + ".",
    ]


def _false_column(name: str) -> Callable[[Figures], str]:
    def cell(figures: Figures) -> str:
        if name not in figures.false_per_1k:
            return "-"
        low, high = figures.false_interval[name]
        return f"{figures.false_per_1k[name]:.1f} ({low:.1f} to {high:.1f})"

    return cell


def _any_column(name: str) -> Callable[[Figures], str]:
    return lambda f: _number(f.stable_any_60.get(name), 2)


def _found_column(mass: float) -> Callable[[Figures], str]:
    return lambda f: " / ".join(_number(share, 2) for share in f.detected_within_60(mass).values())


def _delay_column(mass: float) -> Callable[[Figures], str]:
    return lambda f: " / ".join(
        "-" if delay is None else f"{delay:.0f}"
        for delay in (f.delay_p50.get(f"{mass:.0%}"), f.delay_p90.get(f"{mass:.0%}"))
    )


def _age_cost(by_policy: Mapping[str, Figures]) -> dict[str, float]:
    """Extra refreshes per 1,000 events by class."""
    without, with_age = by_policy[OURS].refreshes_per_1k_of, by_policy[OURS_WITH_AGE].refreshes_per_1k_of
    return {name: round(with_age[name] - without[name], 2) for name in without}


def _others(by_kind: Iterable[tuple[Kind, Mapping[str, Figures]]]) -> str:
    rows = []
    for kind, figures in by_kind:
        own, every = figures[OURS], figures[every_80(MIXTURE)]
        verdict = ("yes" if beats_every_80(own, every) else "**no**") if kind in SAME_ESTIMATOR_BAR else ""
        rows.append(
            (
                str(kind),
                f"{own.refreshes_per_1k:.1f}",
                f"{every.refreshes_per_1k:.1f}",
                f"{own.refreshes_per_1k / every.refreshes_per_1k:.0%}",
                *(_number(value) for value in (own.staleness_mean, every.staleness_mean)),
                *(_number(value) for value in (own.staleness_after_shift, every.staleness_after_shift)),
                verdict,
            )
        )
    header = (
        "simulator",
        "ours per 1,000",
        "every 80",
        "ratio",
        "ours stale",
        "every 80",
        "ours after",
        "every 80",
        "met",
    )
    return _table(header, rows)


def _by_policy(by_policy: Mapping[str, Figures], columns: Mapping[str, Callable[[Figures], str]]) -> str:
    rows = [
        (f"**{name}**" if name == OURS else name, *(column(figures) for column in columns.values()))
        for name, figures in by_policy.items()
    ]
    return _table(("policy", *columns), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


OTHERS: Final = """\
Ours against a refresh every 80 events with the same estimator. The bar: less stale on average and after a shift, at
70% of the refreshes or fewer. After: from the shift, or from the start of the drift or binge, on. Kinds without a
verdict have no bar."""

DEFINITIONS: Final = """\
## How it was measured

- Default simulator: `population(Kind.DEFAULT, Purpose.REPORTING, seed)` of streams/simulation.py: 400 viewers each of
  0.7, 4 and 30 events a day, 600 events, 64 clusters, stickiness .4; of 400, 280 never shift, and 40 each change 30, 50
  or 80% of their taste at an event between 150 and 350. With 40 viewers the standard error of a share by class is up to
  .08.
- Calibration draws from the same simulators for another purpose, which is part of each seed: no seed gives both.
- Every policy writes the first persona after the 20th event. Refreshes are counted after it, per 1,000 events after it.
- Staleness: Jensen-Shannon divergence in bits between the stored distribution and the true taste, averaged over every
  event after the 20th.
- False: every refresh of a stable viewer from event 200 on, whatever its reason. Intervals: percentile bootstrap, 1,000
  draws over viewers.
- A shift is found if a refresh comes within its first 60 events, for whatever reason: compare with what chance finds.
- *mixture*: the product's estimator; *ours*: its refresh rule over that. *decayed blend*: half-lives of 80 events or 90
  days and, for a quarter of the weight, 12 events or 14 days; one pseudo-count of a uniform prior.
- *every N events*: counted from the first persona. *daily*, *weekly*: at the next event once the persona is that old.
  *visit*: the same, only at an event that follows a gap of 30 minutes (the published system refreshes a stale persona
  at a visit); at these rates most events do.
- *JSD*: divergence between the snapshot and decayed recent counts (half-life 12 events or 14 days, or 3 days alone),
  with 6 events of cool-down.
- *ADWIN*, *KSWIN*, *Page-Hinkley*: `river` at its defaults (and two more sensitive) on -ln p of each event under
  the snapshot, consecutive repeats of a cluster left out, begun anew at each refresh. *+ x4*: also refreshed when the
  evidence has grown fourfold, after events 80 and 320, as under *maturity*. KSWIN is slow: every tenth viewer.
- *Page-Hinkley + x4 + follow-up*: on surprise scaled to 0..1, calibrated to 2 alarms and follow-ups per 1,000 events;
  an alarm divides the old long counts by ten, and 16 events later the persona is refreshed again.
- What a persona should say: a binge of 15 events leaves the truth alone; of two alternating tastes it is the
  average."""
