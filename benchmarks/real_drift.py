"""Real drift: the refresh rule and the estimator on a real event log, on viewers that calibration never saw.

    .venv/bin/python benchmarks/real_drift.py EVENTS CATALOGUE [--seed 1] [--splits 3] [--shuffles 40] [--write]

EVENTS is anything `personas import` reads, CATALOGUE what `personas clusters build` reads. The viewers are split in
halves; each half is measured with what `personas calibrate` finds on the other. Three questions, each for clusters that
are the first value of a field and for clusters that the product built:

1. Does the rule refresh more often on the log as it is than with each viewer's days in random order?
2. Two viewers swapped at a date: is the splice found, and how well does the stored persona then predict?
3. How well does the estimate predict the next watch, beside plain decayed counts?

Ends with one JSON object. `--write` rewrites real_drift.md and real_drift.png beside this file, but keeps the
conclusions at the end of the former.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from agents.artefacts import load_thresholds
from agents.calibration import (
    CalibrationError,
    Histories,
    best_decayed,
    calibrate_on_log,
    joined,
    log_losses,
    shares_of,
    with_shuffled_days,
)
from agents.clusters.catalogue import CatalogueError, read_field
from agents.clusters.files import load_registry
from agents.compiled import empty_states, kernel
from agents.settings import Settings
from streams.counting import QUALIFYING_WEIGHT
from streams.decoding import LATEST_TS, Rejected, decode_event
from streams.interests import watch_weight
from streams.mixture import Model
from streams.prequential import Rule
from streams.records import Traffic
from streams.trigger import Policy, Thresholds, read_thresholds

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

HERE: Final = Path(__file__).parent
CONCLUSIONS: Final = "## What this shows, and what it does not\n"
"""From this line on the result file is written by hand."""
FIRST: Final = Policy().first_persona_after
TARGET: Final = 1.4
FROM_LOG, PACKAGED = "learned from the log", "packaged"
CALIBRATIONS: Final = (FROM_LOG, PACKAGED)
GLOBAL, DECAYED = "population alone", "best decayed counts"
DRIFT_COLUMNS: Final = (("refreshes_per_1k", 2), ("refreshes_settled_per_1k", 2), ("drift_viewers", 3))
"""Figures of the shuffle test, and the digits shown."""
WINDOWS: Final = (30, 60)
FACTORS: Final = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0)
"""Times the threshold, for the curve of cost against bits."""
EVERY: Final = (5, 10, 20, 40, 80, 160, 320)
NULLS_OF_SPLICES: Final = 5
"""Shuffled logs that a splice is compared with."""
PHASES: Final = 10
"""Draws of the phases of an every-N rule at another rule's number of refreshes."""


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the log ---------------------------------------------------------------------------------------------------------


def personas(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "agents", *arguments], stdout=subprocess.PIPE, check=True, cwd=HERE.parent
    )
    return done.stdout.decode()


def qualifying(events: Path) -> dict[str, list[tuple[int, str]]]:
    """(ts, video) of each viewer's qualifying watches, in order."""
    watches: dict[str, list[tuple[int, str]]] = defaultdict(list)
    with events.open("rb") as lines:
        for line in lines:
            decoded = decode_event(line, orjson.loads(line)["user_id"].encode(), append_time=LATEST_TS)
            if isinstance(decoded, Rejected):
                continue
            event = decoded.record
            if event.traffic is Traffic.ORGANIC and watch_weight(event) >= QUALIFYING_WEIGHT:
                watches[event.user_id].append((event.ts, event.video_id))
    return {user: sorted(watches[user], key=lambda watch: watch[0]) for user in sorted(watches)}


def histories_of(watches: Mapping[str, Sequence[tuple[int, str]]], cluster_of: Mapping[str, int]) -> Histories:
    """The viewers' histories in the clusters of `cluster_of`; videos without one are left out."""
    histories = []
    for watched in watches.values():
        known = [(ts, cluster_of[video]) for ts, video in watched if video in cluster_of]
        if known:
            histories.append((np.array([ts for ts, _ in known]), np.array([cluster for _, cluster in known])))
    return joined(histories)


def field_clusters(catalogue: Path, field: str) -> dict[str, int]:
    """A cluster for each first value of the field."""
    values = {video: found[0] for video, found in read_field(catalogue, field).items()}
    ids = {value: number for number, value in enumerate(sorted(set(values.values())))}
    return {video: ids[value] for video, value in values.items()}


def registry_clusters(folder: Path, videos: set[str]) -> dict[str, int]:
    registry = load_registry(folder)
    found = {video: registry.cluster_of(video) for video in videos}
    return {video: cluster for video, cluster in found.items() if cluster in registry.cards}


# --- the estimator and the rule over histories -----------------------------------------------------------------------


@dataclass(frozen=True)
class Calibrated:
    """What a worker would run with."""

    model: Model
    thresholds: Thresholds

    def trace(self, histories: Histories, factor: float = 1.0) -> Floats:
        """(watches, 3) as `streams.prequential.trace_history` writes it; factor: times the threshold."""
        t = self.thresholds
        rule = Rule(factor * t.regret, t.stride, t.memory, FIRST, t.cool_down, maximum_age=0)
        trace = np.zeros((len(histories.clusters), 3))
        states = empty_states(len(histories))
        kernel().refreshes(states, histories.ts, histories.clusters, histories.begins, self.model, rule, trace)
        return trace

    def distributions(self, histories: Histories) -> Floats:
        """The estimate after each watch, (watches, clusters)."""
        shares = np.zeros((len(histories.clusters), len(self.model.priors)))
        states = empty_states(len(histories))
        for user in range(len(histories)):
            part = histories.part(user)
            kernel().distributions(states[user], histories.clusters[part], self.model, shares[part])
        return shares


@dataclass(frozen=True)
class Fold:
    """Half of the viewers, and what was calibrated without them.

    viewers: places in the whole log; settled: watches after which the calibration counts a viewer as settled;
    decayed: half-life and prior weight of plain decayed counts, tuned on the whole other half.
    """

    viewers: Ints
    histories: Histories
    settled: int
    calibrated: Mapping[str, Calibrated]
    decayed: tuple[float, float]


def folds(histories: Histories, clusters: int, seed: int) -> list[Fold]:
    """Both halves of one random split."""
    order = np.random.default_rng([seed, 1]).permutation(len(histories))
    halves = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    made = []
    for number, (held_out, others) in enumerate((halves, halves[::-1])):
        theirs = histories.of(others)
        priors = shares_of(theirs, clusters)
        found = calibrate_on_log("log", theirs, priors, seed, TARGET)
        thresholds = {FROM_LOG: read_thresholds(found.document), PACKAGED: load_thresholds(Settings().thresholds)}
        note(f"  split {seed}.{number}: threshold {thresholds[FROM_LOG].regret}, settled at {found.figures['settled']}")
        calibrated = {name: Calibrated(Model(t.constants, priors), t) for name, t in thresholds.items()}
        decayed = best_decayed(theirs, priors)
        made.append(Fold(held_out, histories.of(held_out), int(found.figures["settled"]), calibrated, decayed))
    return made


def positions_of(histories: Histories) -> Ints:
    """Each watch's place in its own history, from 0."""
    return np.arange(len(histories.clusters)) - np.repeat(histories.begins[:-1], np.diff(histories.begins))


def named_drift(trace: Floats, positions: Ints, thresholds: Thresholds) -> Flags:
    """Refreshes at whose latest check the divergence was above its null quantile; the first persona is none."""
    places = np.arange(len(trace))
    checked = np.maximum.accumulate(np.where(trace[:, 1] >= 0, places, -1))
    named = np.zeros(len(trace), np.bool_)
    for place in np.flatnonzero((trace[:, 0] > 0) & (positions >= FIRST)):
        divergence, size = trace[checked[place], 1:]
        named[place] = divergence > thresholds.null_quantile(float(size))
    return named


# --- 1. drift on the log ---------------------------------------------------------------------------------------------


def drift_counts(fold: Fold, calibrated: Calibrated, histories: Histories) -> Floats:
    """(viewers, 3): refreshes after the first persona, those of them once settled, any named drift."""
    trace, positions = calibrated.trace(histories), positions_of(histories)
    refreshed = (trace[:, 0] > 0) & (positions >= FIRST)
    late = refreshed & (positions >= fold.settled)
    named = named_drift(trace, positions, calibrated.thresholds)
    begins = histories.begins[:-1]
    counts = [np.add.reduceat(flags.astype(np.float64), begins) for flags in (refreshed, late, named)]
    counts[2] = np.minimum(counts[2], 1.0)
    return np.stack(counts, axis=1)


def drift_figures(splits: Sequence[Sequence[Fold]], shuffled: Sequence[Histories], which: str) -> dict[str, Any]:
    """Refreshes per 1,000 watches and viewers with drift, on the log and on the shuffled ones, means over splits.

    p: share of shuffled logs, the log itself among them, with at least as much: a permutation test.
    """
    rates = []
    for split in splits:
        totals, exposure = np.zeros((1 + len(shuffled), 3)), np.zeros(3)
        for fold in split:
            positions = positions_of(fold.histories)
            lengths = np.diff(fold.histories.begins)
            checked = lengths >= FIRST + fold.calibrated[which].thresholds.stride
            exposure += [np.sum(positions >= FIRST), np.sum(positions >= fold.settled), np.sum(checked)]
            logs = [fold.histories, *(log.of(fold.viewers) for log in shuffled)]
            totals += [drift_counts(fold, fold.calibrated[which], log).sum(axis=0) for log in logs]
        rates.append(totals / exposure * [1000.0, 1000.0, 1.0])
    mean = np.mean(rates, axis=0)
    thresholds = sorted(fold.calibrated[which].thresholds.regret for split in splits for fold in split)
    figures: dict[str, Any] = {"thresholds": thresholds}
    for column, name in enumerate(("refreshes_per_1k", "refreshes_settled_per_1k", "drift_viewers")):
        real, null = mean[0, column], mean[1:, column]
        figures[f"{name}_real"] = real
        figures[f"{name}_null"] = null.mean()
        figures[f"{name}_null_interval"] = np.quantile(null, [0.025, 0.975]).tolist()
        figures[f"{name}_p"] = (1 + np.sum(null >= real - 1e-12)) / (1 + len(null))
    return figures


@dataclass(frozen=True)
class Bits:
    """bits: a watch; less: than what it is compared with; error: paired standard error of that over viewers."""

    bits: float
    less: float
    error: float


def paired(values: Floats, against: Floats, watches: Floats) -> Bits:
    """Per watch, over viewers; the error is that of a ratio of sums."""
    less = against - values
    mean = less.sum() / watches.sum()
    error = np.sqrt(np.sum((less - mean * watches) ** 2)) / watches.sum()
    return Bits(float(values.sum() / watches.sum()), float(mean), float(error))


# --- what the stored persona predicts --------------------------------------------------------------------------------


def stored_bits(shares: Floats, clusters: Ints, positions: Ints, refreshed: Flags) -> Floats:
    """Bits of each watch under the estimate that was stored before it; nan before there is one."""
    places = np.arange(len(clusters))
    last = np.maximum.accumulate(np.where(refreshed, places, -1))
    stored = np.concatenate([[-1], last[:-1]])
    known = stored >= places - positions  # in the same history
    bits = np.full(len(clusters), np.nan)
    bits[known] = -np.log2(shares[stored[known], clusters[known]])
    return bits


def every(positions: Ints, begins: Ints, watches: float, phase: Floats | None = None) -> Flags:
    """The first persona, then a refresh every so many watches. phase: (histories,), 0..1, how far into the first gap
    each history begins; None: all at 0. `watches` need not be whole, and may be infinite.
    """
    first: Flags = positions == FIRST - 1
    if np.isinf(watches):
        return first
    ahead = np.zeros(len(begins) - 1) if phase is None else phase
    gaps = (positions - (FIRST - 1)) / watches + np.repeat(ahead, np.diff(begins))
    refreshed: Flags = first | ((positions >= FIRST) & (np.floor(gaps) > np.floor(gaps - 1.0 / watches)))
    return refreshed


def doubling(positions: Ints) -> Flags:
    """The first persona, then one whenever the history has doubled."""
    times = (positions + 1) / FIRST
    doubled: Flags = (times >= 1) & (np.exp2(np.round(np.log2(times))) == times)
    return doubled


@dataclass(frozen=True)
class Cost:
    """refreshes: per 1,000 watches after the first persona; bits: per watch among those that are judged."""

    refreshes: float
    bits: float


@dataclass(frozen=True)
class Costs:
    """Costs of policies by name, and curves of them by the number of refreshes."""

    table: Mapping[str, Cost]
    curves: Mapping[str, Sequence[Cost]]


def mean_costs(parts: Sequence[Costs]) -> Costs:
    """Means over parts with the same policies; empty if there are none."""
    if not parts:
        return Costs({}, {})
    curves = {
        name: [mean_cost(points) for points in zip(*(part.curves[name] for part in parts), strict=True)]
        for name in parts[0].curves
    }
    return Costs({name: mean_cost([part.table[name] for part in parts]) for name in parts[0].table}, curves)


class Stored:
    """Policies over histories: what they cost, and how well what they stored predicts the watches in `judged`."""

    def __init__(
        self, histories: Histories, calibrated: Calibrated, judged: Flags, random: np.random.Generator
    ) -> None:
        self._histories, self._calibrated, self._random = histories, calibrated, random
        self._positions = positions_of(histories)
        self._shares = calibrated.distributions(histories)
        self._judged = judged & (self._positions >= FIRST)

    def cost(self, refreshed: Flags) -> Cost:
        bits = stored_bits(self._shares, self._histories.clusters, self._positions, refreshed)
        later = self._positions >= FIRST
        return Cost(1000.0 * float(refreshed[later].mean()), float(bits[self._judged].mean()))

    def ours(self, factor: float = 1.0) -> Cost:
        return self.cost(self._calibrated.trace(self._histories, factor)[:, 0] > 0)

    def every(self, watches: float) -> Cost:
        return self.cost(every(self._positions, self._histories.begins, watches))

    def at_any_phase(self, refreshes: float) -> Cost:
        """Every N watches at this many refreshes per 1,000, at random phases."""
        watches = 1000.0 / refreshes if refreshes else np.inf
        phases = self._random.random((PHASES, len(self._histories)))
        return mean_cost([self.cost(every(self._positions, self._histories.begins, watches, p)) for p in phases])

    def against_regular(self) -> tuple[Floats, Floats, Floats]:
        """(histories,) bits of the judged watches under ours, under every N watches at as many refreshes, and their
        number.
        """

        def sums(refreshed: Flags) -> Floats:
            bits = stored_bits(self._shares, self._histories.clusters, self._positions, refreshed)
            return np.add.reduceat(np.where(self._judged, bits, 0.0), self._histories.begins[:-1])

        refreshed = self._calibrated.trace(self._histories)[:, 0] > 0
        refreshes = self.cost(refreshed).refreshes
        watches = 1000.0 / refreshes if refreshes else np.inf
        phases = self._random.random((PHASES, len(self._histories)))
        regular = [sums(every(self._positions, self._histories.begins, watches, p)) for p in phases]
        number = np.add.reduceat(self._judged.astype(np.float64), self._histories.begins[:-1])
        return sums(refreshed), np.mean(regular, axis=0), number

    def costs(self) -> Costs:
        ours = self.ours()
        table = {
            "never again": self.every(np.inf),
            "every 80 watches": self.every(80),
            "every 20 watches": self.every(20),
            "at 40, 80, 160 watches": self.cost(doubling(self._positions)),
            "ours": ours,
            "every N, as many refreshes as ours": self.at_any_phase(ours.refreshes),
            "every watch": self.every(1),
        }
        curves = {
            "ours": [self.ours(factor) for factor in FACTORS],
            "every N": [self.at_any_phase(1000.0 / watches) for watches in EVERY],
        }
        return Costs(table, curves)


def mean_cost(costs: Sequence[Cost]) -> Cost:
    return Cost(float(np.mean([c.refreshes for c in costs])), float(np.mean([c.bits for c in costs])))


# --- 2. two viewers spliced ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splice:
    """The watches of viewer `before` until a date, and of viewer `after` from it. at: watches of the first."""

    before: int
    after: int
    date: int
    at: int


def splices(histories: Histories, window: int, count: int, random: np.random.Generator) -> list[Splice]:
    """Pairs of viewers who both have FIRST watches before a date and `window` from it on, at random dates.

    Fewer than `count`, even none, if few viewers have.
    """
    if not len(histories.ts):
        return []
    times = [histories.ts[histories.part(user)] for user in range(len(histories))]
    found: list[Splice] = []
    for date in random.integers(histories.ts.min(), histories.ts.max() + 1, size=5 * count):
        at = np.array([np.searchsorted(ts, date) for ts in times])
        fit = np.flatnonzero((at >= FIRST) & (np.diff(histories.begins) - at >= window))
        if len(fit) >= 2:
            before, after = random.choice(fit, size=2, replace=False)
            found.append(Splice(int(before), int(after), int(date), int(at[before])))
        if len(found) == count:
            break
    return found


def spliced(histories: Histories, found: Sequence[Splice], window: int) -> Histories:
    """The spliced histories, to `window` watches after the splice."""
    parts = []
    for splice in found:
        first, second = histories.part(splice.before), histories.part(splice.after)
        start = second.start + int(np.searchsorted(histories.ts[second], splice.date))
        chosen = np.r_[first.start : first.start + splice.at, start : start + window]
        parts.append((histories.ts[chosen], histories.clusters[chosen]))
    return joined(parts)


def unspliced(histories: Histories, found: Sequence[Splice], window: int) -> Histories:
    """The first viewers' own histories as long: what a splice is compared with."""
    parts = [slice(begin, begin + s.at + window) for s in found for begin in (int(histories.begins[s.before]),)]
    return joined([(histories.ts[part], histories.clusters[part]) for part in parts])


def delays(calibrated: Calibrated, histories: Histories, window: int) -> Floats:
    """(histories,) watches from `window` before the end to the first refresh, that watch included; inf: none."""
    refreshed = calibrated.trace(histories)[:, 0] > 0
    found = []
    for user in range(len(histories)):
        hits = np.flatnonzero(refreshed[histories.begins[user + 1] - window : histories.begins[user + 1]])
        found.append(hits[0] + 1.0 if len(hits) else np.inf)
    return np.array(found)


def divergence(p: Floats, q: Floats) -> Floats:
    """Jensen-Shannon divergence of rows, in bits."""
    middle = (p + q) / 2

    def relative(x: Floats) -> Floats:
        terms: Floats = np.where(x > 0, x * np.log2(np.where(x > 0, x, 1.0) / middle), 0.0).sum(axis=1)
        return terms

    return (relative(p) + relative(q)) / 2


def how_unlike(histories: Histories, found: Sequence[Splice], calibrated: Calibrated) -> Floats:
    """(splices,) divergence of both tastes, from the watches that the spliced history leaves out: nothing that the
    rule sees decides which pairs count as unlike.
    """
    left_out = []
    for splice in found:
        first, second = histories.part(splice.before), histories.part(splice.after)
        stop = second.start + int(np.searchsorted(histories.ts[second], splice.date))
        parts = slice(first.start + splice.at, first.stop), slice(second.start, stop)
        left_out += [(histories.ts[part], histories.clusters[part]) for part in parts]
    rest = joined(left_out)
    last = calibrated.distributions(rest)[rest.begins[1:] - 1]
    return divergence(last[0::2], last[1::2])


def splice_figures(
    splits: Sequence[Sequence[Fold]],
    shuffled: Sequence[Histories],
    which: str,
    window: int,
    count: int,
    seed: int,
) -> tuple[dict[str, Any], Costs]:
    """What the rule finds, against the same viewers unspliced, as they are and with shuffled days; and the costs of
    policies, judged on the watches after the splice, means over folds.
    """
    waits: dict[str, list[Floats]] = defaultdict(list)
    unlike: list[Floats] = []
    costs: list[Costs] = []
    viewers: set[int] = set()
    for number, fold in enumerate(fold for split in splits for fold in split):
        calibrated = fold.calibrated[which]
        found = splices(fold.histories, window, count, np.random.default_rng([seed, 4, number, window]))
        if not found:
            continue
        viewers.update(int(fold.viewers[user]) for s in found for user in (s.before, s.after))
        apart = how_unlike(fold.histories, found, calibrated)
        unlike.append(apart)
        mixed = spliced(fold.histories, found, window)
        waits["spliced"].append(delays(calibrated, mixed, window))
        waits["spliced_unlike"].append(waits["spliced"][-1][most_unlike(apart)])
        waits["as_is"].append(delays(calibrated, unspliced(fold.histories, found, window), window))
        for log in shuffled[:NULLS_OF_SPLICES]:
            null = unspliced(log.of(fold.viewers), found, window)
            waits["chance"].append(delays(calibrated, null, window))
            waits["chance_unlike"].append(waits["chance"][-1][most_unlike(apart)])
        lengths = np.repeat(np.diff(mixed.begins), np.diff(mixed.begins))
        random = np.random.default_rng([seed, 5, number, window])
        costs.append(Stored(mixed, calibrated, positions_of(mixed) >= lengths - window, random).costs())
    if not costs:
        return {"pairs": 0, "spliced_viewers": 0}, mean_costs(costs)
    delay = {name: np.concatenate(parts) for name, parts in waits.items()}
    found_of = {name: float(np.mean(values <= window)) for name, values in delay.items()}
    figures = {
        "pairs": sum(map(len, unlike)),
        "spliced_viewers": len(viewers),
        "spliced_found": found_of["spliced"],
        "as_is": found_of["as_is"],
        "chance": found_of["chance"],
        "spliced_found_unlike": found_of["spliced_unlike"],
        "chance_unlike": found_of["chance_unlike"],
        "delay_p50": quantile(delay["spliced"], 0.5),
        "delay_p90": quantile(delay["spliced"], 0.9),
        "chance_delay_p50": quantile(delay["chance"], 0.5),
        "divergence": float(np.concatenate(unlike).mean()),
        "divergence_unlike": float(np.concatenate([apart[most_unlike(apart)] for apart in unlike]).mean()),
    }
    return figures, mean_costs(costs)


def most_unlike(apart: Floats) -> Flags:
    """The quarter of pairs that are furthest apart."""
    flags: Flags = apart >= np.quantile(apart, 0.75)
    return flags


def quantile(values: Floats, share: float) -> float | None:
    value = float(np.quantile(values, share, method="higher"))
    return value if np.isfinite(value) else None


def log_costs(splits: Sequence[Sequence[Fold]], which: str, viewers: int, seed: int) -> tuple[Costs, Bits]:
    """Policies over the log as it is, judged on every watch after the first persona, means over folds; and ours against
    every N watches at as many refreshes, paired over viewers.
    """
    parts = []
    ours, regular, watches = np.zeros(viewers), np.zeros(viewers), np.zeros(viewers)
    for number, fold in enumerate(fold for split in splits for fold in split):
        judged = np.ones(len(fold.histories.clusters), np.bool_)
        random = np.random.default_rng([seed, 3, number])
        stored = Stored(fold.histories, fold.calibrated[which], judged, random)
        parts.append(stored.costs())
        sums = stored.against_regular()
        ours[fold.viewers] += sums[0] / len(splits)
        regular[fold.viewers] += sums[1] / len(splits)
        watches[fold.viewers] = sums[2]
    return mean_costs(parts), paired(ours, regular, watches)


# --- 3. prediction ---------------------------------------------------------------------------------------------------


def viewer_bits(fold: Fold) -> dict[str, Floats]:
    """Bits of each held-out viewer's watches, each predicted before it was counted, (viewers,)."""
    histories, priors = fold.histories, fold.calibrated[FROM_LOG].model.priors
    bits = {GLOBAL: np.add.reduceat(-np.log2(priors[histories.clusters]), histories.begins[:-1])}
    half_life, weight = fold.decayed
    bits[DECAYED] = np.array(
        [
            kernel().decayed_log_loss(h.clusters, h.begins, half_life, weight, priors)
            for h in (histories.of([user]) for user in range(len(histories)))
        ]
    )
    for name, calibrated in fold.calibrated.items():
        losses = log_losses(histories, calibrated.model)
        bits[f"model, {name}"], bits[f"taste, {name}"] = losses.T
    return bits


def prediction(splits: Sequence[Sequence[Fold]], viewers: int) -> dict[str, Bits]:
    """Every viewer is held out once in each split; means over splits."""
    bits: dict[str, Floats] = {}
    watches = np.zeros(viewers)
    for split in splits:
        for fold in split:
            watches[fold.viewers] = np.diff(fold.histories.begins)
            for name, values in viewer_bits(fold).items():
                bits.setdefault(name, np.zeros(viewers))[fold.viewers] += values / len(splits)
    return {name: paired(values, bits[DECAYED], watches) for name, values in bits.items()}


# --- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Everything measured with one set of clusters. By calibration, and for splices by window."""

    name: str
    clusters: int
    histories: Histories
    drift: Mapping[str, dict[str, Any]]
    costs: Mapping[str, tuple[Costs, Bits]]
    splices: Mapping[tuple[str, int], tuple[dict[str, Any], Costs]]
    bits: Mapping[str, Bits]


def measure(name: str, histories: Histories, clusters: int, arguments: argparse.Namespace) -> Result:
    note(f"{name}: {len(histories.clusters):,} watches of {len(histories):,} viewers in {clusters} clusters")
    splits = [folds(histories, clusters, arguments.seed + number) for number in range(arguments.splits)]
    shuffled = [
        with_shuffled_days(histories, np.random.default_rng([arguments.seed, 2, number]))
        for number in range(arguments.shuffles)
    ]
    drift, costs, pairs = {}, {}, {}
    for which in CALIBRATIONS:
        drift[which] = drift_figures(splits, shuffled, which)
        note(f"  {which}: {drift[which]['refreshes_per_1k_real']:.2f} refreshes per 1,000 watches")
        costs[which] = log_costs(splits, which, len(histories), arguments.seed)
        for window in WINDOWS:
            pairs[which, window] = splice_figures(splits, shuffled, which, window, arguments.pairs, arguments.seed)
            note(f"  {which}, {window} watches after a splice: {pairs[which, window][0]}")
    return Result(name, clusters, histories, drift, costs, pairs, prediction(splits, len(histories)))


def document(results: Sequence[Result], calibrate: Mapping[str, Any]) -> dict[str, Any]:
    """The figures; a curve holds (refreshes per 1,000 watches, bits a watch).

    Those at the top are of the first clusters, with constants learned from the log.
    """
    by = {result.name: {which: figures(result, which) for which in CALIBRATIONS} for result in results}
    return {**by[results[0].name][FROM_LOG], "by": by, "calibrate": dict(calibrate)}


def figures(result: Result, which: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "viewers": len(result.histories),
        "watches": len(result.histories.clusters),
        "clusters": result.clusters,
        "bits_taste": result.bits[f"taste, {which}"].bits,
        "bits_model": result.bits[f"model, {which}"].bits,
        "bits_decayed": result.bits[DECAYED].bits,
        "bits_global": result.bits[GLOBAL].bits,
        "taste_less_than_decayed": result.bits[f"taste, {which}"].less,
        "taste_less_error": result.bits[f"taste, {which}"].error,
        **result.drift[which],
        "bits_stored": {name: cost.bits for name, cost in result.costs[which][0].table.items()},
        "curves_stored": {
            name: [[cost.refreshes, cost.bits] for cost in points]
            for name, points in result.costs[which][0].curves.items()
        },
        "stored_less_than_every_n": result.costs[which][1].less,
        "stored_less_error": result.costs[which][1].error,
        "spliced_pairs": result.splices[which, WINDOWS[-1]][0]["pairs"],
    }
    for window in WINDOWS:
        spliced, costs = result.splices[which, window]
        found |= {f"{name}_{window}": value for name, value in spliced.items()}
        found[f"bits_stored_after_splice_{window}"] = {name: cost.bits for name, cost in costs.table.items()}
    return dict(rounded(found))


def rounded(value: Any) -> Any:  # noqa: ANN401 - any JSON
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(float(value), 4) if isinstance(value, float) else value


def markdown(results: Sequence[Result], calibrate: Mapping[str, Any], arguments: argparse.Namespace) -> str:
    command = f"benchmarks/real_drift.py EVENTS CATALOGUE --seed {arguments.seed} --splits {arguments.splits}"
    command += f" --shuffles {arguments.shuffles} --pairs {arguments.pairs} -k {arguments.clusters} --write"
    histories = results[0].histories
    lengths = np.diff(histories.begins)
    lines = [
        "# Drift in a real event log",
        "",
        f"    .venv/bin/python {command}",
        "",
        f"EVENTS: `{arguments.events.name}`, {len(histories.clusters):,} watches of {len(lengths):,} viewers; "
        f"{np.sum(lengths >= FIRST):,} have the {FIRST} of a first persona, {np.sum(lengths >= 60):,} have 60 and "
        f"{np.sum(lengths >= 100):,} have 100. CATALOGUE: `{arguments.catalogue.name}`. Written by that command, but "
        "not the conclusions at the end.",
        "",
        f"{arguments.splits} random splits into halves; each half is measured with what was calibrated on the other, "
        "so every viewer is held out once a split. *Learned from the log*: constants and threshold by the function "
        f"behind `personas calibrate EVENTS --target {TARGET:g}`; *packaged*: those that ship, from simulation. In "
        "both the population's shares are the other half's. No maximum age.",
        "",
        *(line for result in results for line in section(result, arguments)),
        "![Refreshes against bits](real_drift.png)",
        "",
        "## `personas calibrate` on this log",
        "",
        f"    personas import {arguments.events.name} --catalogue {arguments.catalogue.name} --out events.jsonl",
        f"    personas clusters build {arguments.catalogue.name} -k {arguments.clusters} --out registry-v1",
        f"    personas calibrate events.jsonl --registry registry-v1 --target {TARGET:g} --json",
        "",
        *(f"    {name:22} {value}" for name, value in calibrate.items()),
        "",
    ]
    return "\n".join(lines) + "\n"


def section(result: Result, arguments: argparse.Namespace) -> list[str]:
    lines = [f"## {result.name.capitalize()} clusters ({result.clusters})", "", "### The log against shuffled days", ""]
    lines += table("", "refreshes per 1,000 watches", "once settled", "viewers with a refresh named drift")
    for which in CALIBRATIONS:
        drift = result.drift[which]
        lines.append(row(f"{which}: the log", *(f"{drift[f'{name}_real']:.{d}f}" for name, d in DRIFT_COLUMNS)))
        null = (
            f"{drift[f'{name}_null']:.{d}f} ({' to '.join(f'{v:.{d}f}' for v in drift[f'{name}_null_interval'])})"
            for name, d in DRIFT_COLUMNS
        )
        lines.append(row("days shuffled, mean (95%)", *null))
        lines.append(row("as much by chance, p", *(f"{drift[f'{name}_p']:.3f}" for name, _ in DRIFT_COLUMNS)))
    lines += [
        "",
        f"{arguments.shuffles} shuffles. After the first persona; a viewer is settled as the calibration says. "
        f"Thresholds learned by half: {', '.join(f'{t:.3f}' for t in result.drift[FROM_LOG]['thresholds'])}; packaged: "
        f"{result.drift[PACKAGED]['thresholds'][0]:.3f}.",
        "",
    ]
    lines += ["### What the stored persona predicts, on the log as it is", ""]
    lines += cost_lines({which: result.costs[which][0].table for which in CALIBRATIONS})
    gains = (f"{which} {b.less:+.4f} bits a watch ({b.error:.4f})" for which, (_, b) in result.costs.items())
    lines += [
        f"Ours less than every N at as many refreshes (paired standard error over viewers): {', '.join(gains)}.",
        "",
    ]
    for window in WINDOWS:
        lines += splice_lines(result, window)
    lines += ["### Bits a watch of held-out viewers", ""]
    lines += table("", "bits", "less than decayed counts", "standard error")
    lines += [row(name, f"{b.bits:.4f}", f"{b.less:+.4f}", f"{b.error:.4f}") for name, b in result.bits.items()]
    return [*lines, "", "Every watch of every viewer, the first included; the error is paired, over viewers.", ""]


def splice_lines(result: Result, window: int) -> list[str]:
    lines = [f"### Two viewers spliced, {window} watches after", ""]
    found = {which: result.splices[which, window] for which in CALIBRATIONS}
    pairs = found[FROM_LOG][0]
    if not pairs["pairs"]:
        return [*lines, "No two viewers have enough watches on both sides of a date.", ""]
    lines += [
        f"{pairs['pairs']:,} splices of {pairs['spliced_viewers']:,} viewers, who recur. Unlike: the quarter whose "
        f"tastes are furthest apart in the watches left out, {pairs['divergence_unlike']:.3f} bits against "
        f"{pairs['divergence']:.3f} of all. A delay of - is beyond the {window} watches.",
        "",
        *table(
            "", "found", "unlike pairs", "delay p50, p90", "the viewer unspliced", "and days shuffled", "its delay p50"
        ),
    ]
    for which, (f, _) in found.items():
        shown = [f"{f[name]:.3f}" for name in ("spliced_found", "spliced_found_unlike", "as_is", "chance")]
        wait = ["-" if f[name] is None else f"{f[name]:.0f}" for name in ("delay_p50", "delay_p90", "chance_delay_p50")]
        lines.append(row(which, shown[0], shown[1], f"{wait[0]}, {wait[1]}", shown[2], shown[3], wait[2]))
    return [*lines, "", *cost_lines({which: costs.table for which, (_, costs) in found.items()})]


def cost_lines(costs: Mapping[str, Mapping[str, Cost]]) -> list[str]:
    lines = table("refreshed", *(f"{which}: {what}" for which in costs for what in ("per 1,000", "bits a watch")))
    for name in costs[FROM_LOG]:
        cells = (
            cell
            for which in costs
            for cell in (f"{costs[which][name].refreshes:.1f}", f"{costs[which][name].bits:.4f}")
        )
        lines.append(row(name, *cells))
    return [*lines, ""]


def table(*heads: str) -> list[str]:
    return [row(*heads), row(*("---" for _ in heads))]


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def plot(results: Sequence[Result], path: Path) -> None:
    """Refreshes against bits of what is stored: on the log, and after a splice. One row for each set of clusters."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        len(results), 2, figsize=(12, 4.2 * len(results)), layout="constrained", squeeze=False
    )
    for result, (left, right) in zip(results, panels, strict=True):
        after = result.splices[FROM_LOG, WINDOWS[0]][1]
        for axes, costs, where in (
            (left, result.costs[FROM_LOG][0], "the log as it is"),
            (right, after, f"{WINDOWS[0]} watches after a splice"),
        ):
            for (name, points), style in zip(costs.curves.items(), ("o-C3", "s-C0"), strict=False):
                axes.plot([p.refreshes for p in points], [p.bits for p in points], style, label=name)
            for name, style in (("never again", "C7:"), ("every watch", "C7--")):
                if name in costs.table:
                    axes.axhline(costs.table[name].bits, color=style[:2], linestyle=style[2:], label=name)
            if "ours" in costs.table:
                ours = costs.table["ours"]
                axes.plot(ours.refreshes, ours.bits, "*C3", markersize=16, label="ours as calibrated")
            axes.set(
                title=f"{result.name} clusters, {where}", xlabel="refreshes per 1,000 watches", ylabel="bits a watch"
            )
            axes.set_xscale("symlog", linthresh=1)
            axes.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write(text: str, path: Path) -> None:
    """Replace the result file, but for the conclusions at its end."""
    old = path.read_text() if path.exists() else ""
    kept = old[old.index(CONCLUSIONS) :] if CONCLUSIONS in old else CONCLUSIONS
    path.write_text(text + kept)


def positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("events", type=Path)
    parser.add_argument("catalogue", type=Path)
    parser.add_argument("--field", default="category", help="of the catalogue; its first values are the first clusters")
    parser.add_argument("-k", dest="clusters", type=positive, default=24, help="of the product's clusters (24)")
    parser.add_argument("--registry", type=Path, help="a registry that was built already")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--splits", type=positive, default=3)
    parser.add_argument("--shuffles", type=positive, default=40, help="of the days, for what chance gives (40)")
    parser.add_argument("--pairs", type=positive, default=300, help="splices in each half (300)")
    parser.add_argument("--write", action="store_true", help="rewrite real_drift.md and real_drift.png")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except subprocess.CalledProcessError as error:
        parser.exit(1, f"stopped: personas {' '.join(error.cmd[3:5])} failed\n")
    except (CalibrationError, CatalogueError) as error:
        parser.exit(1, f"{error}\n")


def run(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        events, registry = Path(folder, "events.jsonl"), Path(folder, "registry-v1")
        source, catalogue = str(arguments.events.absolute()), str(arguments.catalogue.absolute())
        personas("import", source, "--catalogue", catalogue, "--out", str(events))
        if arguments.registry:
            registry = arguments.registry.absolute()
        else:
            personas("clusters", "build", catalogue, "-k", str(arguments.clusters), "--out", str(registry))
        options = ["--registry", str(registry), "--target", str(TARGET), "--out", str(Path(folder, "thresholds.json"))]
        calibrate = orjson.loads(personas("calibrate", str(events), *options, "--json"))
        calibrate["thresholds"] = "thresholds.json"
        watches = qualifying(events)
        videos = {video for watched in watches.values() for _, video in watched}
        clusters_of = {
            f"field {arguments.field}": field_clusters(arguments.catalogue, arguments.field),
            "product": registry_clusters(registry, videos),
        }
    results = []
    for name, cluster_of in clusters_of.items():
        count = 1 + max(cluster_of.values())
        results.append(measure(name, histories_of(watches, cluster_of), count, arguments))
    text = markdown(results, calibrate, arguments)
    print(text)
    if arguments.write:
        write(text, HERE / "real_drift.md")
        plot(results, HERE / "real_drift.png")
    print(orjson.dumps(document(results, calibrate)).decode())


if __name__ == "__main__":
    main()
