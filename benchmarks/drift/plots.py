"""The plots of the committed run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.drift.figures import Figures, Outcome, delays, of_mass, within
from benchmarks.drift.policies import EVERY, FACTORS, FIRST_FORM, OURS, every_80, ours_times
from benchmarks.drift.traces import DECAYED, MIXTURE
from streams.simulation import RATES

COMPARED: Final = {
    OURS: "C3",
    every_80(MIXTURE): "C0",
    FIRST_FORM: "C1",
    f"{MIXTURE}, Page-Hinkley, delta .15, threshold 20 + x4": "C4",
    f"{MIXTURE}, ADWIN, delta .2, clock 1 + x4": "C2",
}
POINTS: Final = {
    "daily": ("daily", (-26, 4)),
    "visit, 7 days old": ("visit, 7 days", (4, 3)),
    "visit, 30 days old": ("visit, 30 days", (4, 3)),
    "JSD > .3": ("JSD > .3", (5, -2)),
    "JSD > .4": ("JSD > .4", (5, -2)),
    "maturity": ("maturity", (-44, -7)),
    "ADWIN, delta .2, clock 1 + x4": ("ADWIN + x4", (5, 0)),
    "KSWIN + x4": ("KSWIN + x4", (-58, 4)),
    "Page-Hinkley, delta .15, threshold 20 + x4": ("Page-Hinkley + x4", (5, -4)),
}
"""Short names, and where they stand beside their point."""
LONGEST_DELAY: Final = 150


def write_plots(folder: Path, by_policy: Mapping[str, Figures], outcomes: Mapping[str, Sequence[Outcome]]) -> None:
    """tradeoff.png, delay.png and false.png of the default simulator."""
    figure, panels = plt.subplots(1, 2, figsize=(14, 6.5), layout="constrained")
    _tradeoff(panels[0], "staleness, all events (bits)", {n: f.staleness_mean for n, f in by_policy.items()}, by_policy)
    after = {name: f.staleness_after_shift or float("nan") for name, f in by_policy.items()}
    _tradeoff(panels[1], "staleness after a shift (bits)", after, by_policy)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(folder / "tradeoff.png", dpi=110)

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    _delay(axes, outcomes)
    figure.savefig(folder / "delay.png", dpi=110)

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    _false(axes, by_policy)
    figure.savefig(folder / "false.png", dpi=110)
    plt.close("all")


def _tradeoff(axes: Axes, label: str, stale: Mapping[str, float], by_policy: Mapping[str, Figures]) -> None:
    cost = {name: figures.refreshes_per_1k for name, figures in by_policy.items()}

    def curve(names: Sequence[str], style: str, name: str) -> None:
        names = sorted(names, key=cost.__getitem__)
        axes.plot([cost[n] for n in names], [stale[n] for n in names], style, label=name)

    for estimator, colour in ((DECAYED, "C7"), (MIXTURE, "C0")):
        curve([f"{estimator}, every {n} events" for n in EVERY], f"{colour}.-", f"{estimator}, every N events")
        others = [f"{estimator}, {name}" for name in POINTS]
        axes.plot(
            [cost[n] for n in others], [stale[n] for n in others], f"{colour}x", label=f"{estimator}, other rules"
        )
        for other, (short, place) in zip(others, POINTS.values(), strict=True):
            axes.annotate(
                short, (cost[other], stale[other]), place, textcoords="offset points", fontsize=7, color=colour
            )
    curve([OURS, *map(ours_times, FACTORS)], "C3.-", "ours, by threshold")
    axes.plot(cost[OURS], stale[OURS], "C3o", markersize=9)
    axes.plot(cost[FIRST_FORM], stale[FIRST_FORM], "C1s", label=FIRST_FORM)
    axes.set_xscale("log")
    axes.set_xticks([2, 3, 5, 10, 20, 50, 100, 200], ["2", "3", "5", "10", "20", "50", "100", "200"])
    axes.minorticks_off()
    axes.set_xlabel("refreshes per 1,000 events")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def _delay(axes: Axes, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
    """50% shifts, solid; dashed: what chance finds, as the stable viewers show it."""
    events = np.arange(1, LONGEST_DELAY + 1)
    for name, colour in COMPARED.items():
        delay = delays(of_mass(outcomes[name], 0.5))
        stable = [outcome for outcome in outcomes[name] if outcome.viewer.shift_at is None]
        axes.plot(events, [(delay <= count).mean() for count in events], colour, label=name)
        windows = events[9::10]
        axes.plot(windows, [within(stable, int(window)) for window in windows], f"{colour}--", linewidth=1)
    axes.axvline(60, color="black", linewidth=0.5)
    axes.set_xlabel("events since a shift of half the taste (dashed: since any event of a stable viewer)")
    axes.set_ylabel("share of viewers refreshed")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _false(axes: Axes, by_policy: Mapping[str, Figures]) -> None:
    width = 0.8 / len(COMPARED)
    for number, (name, colour) in enumerate(COMPARED.items()):
        rates = np.array([by_policy[name].false_per_1k[of_class] for of_class in RATES])
        low, high = np.array([by_policy[name].false_interval[of_class] for of_class in RATES]).T
        at = np.arange(len(RATES)) + (number - (len(COMPARED) - 1) / 2) * width
        axes.bar(at, rates, width * 0.9, yerr=(rates - low, high - rates), color=colour, capsize=2, label=name)
    axes.axhline(3, color="black", linewidth=0.5)
    axes.set_xticks(range(len(RATES)), [f"{name}, {rate:g} events a day" for name, rate in RATES.items()])
    axes.set_ylabel("refreshes of stable viewers per 1,000 events")
    axes.legend(fontsize=8)
