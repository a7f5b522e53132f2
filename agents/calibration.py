"""Calibration: the estimator's constants from histories, and the refresh threshold from histories without any change.

Constants minimise the prequential log-loss (Dawid 1984): every watch is predicted before it is counted, so nothing is
fitted to what it is judged by, and no history needs labels. The threshold is the smallest at which viewers whose taste
does not change are refreshed as seldom as wanted. Histories without change are simulated, or a log with each viewer's
days in random order: what a viewer watches in all, and how a day goes, stays as it is; any order over the days is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agents.compiled import empty_states, kernel
from streams.mixture import Constants, Model
from streams.prequential import Rule
from streams.simulation import Kind, Purpose, Stream, Viewer, population
from streams.trigger import FORMAT

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Progress = Callable[[str], None]

STRIDE: Final = 4
MEMORY: Final = 0.9
COOL_DOWN: Final = 6
FIRST_AFTER: Final = 20
SETTLED: Final = 200
"""Watches after which a viewer's persona no longer needs refreshing for being young."""
LEARNED_FROM: Final = 250_000
"""Most watches that constants are learned from; more change nothing that matters."""
CHOICES: Final[Mapping[str, tuple[float, ...]]] = {
    "discount": (0.0, 0.2, 0.4, 0.65, 0.8),
    "history_half_life": (80.0, 160.0, 320.0, 640.0, 1280.0),
    "own_weight": (0.25, 0.5, 1.0, 2.0, 4.0),
    "population_weight": (10.0, 20.0, 40.0, 80.0, 160.0),
    "population_share": (0.1, 0.3, 0.5, 0.7, 0.9),
    "restart_every": (1.0, 2.0, 4.0, 8.0, 16.0),
    "hazard": (0.0003, 0.001, 0.003, 0.01, 0.02),
    "forget": (0.05, 0.1, 0.25, 0.5, 0.75, 1.0),
    "restart_weight_low": (1.0, 2.0, 4.0, 8.0, 16.0),
    "restart_weight_high": (4.0, 8.0, 16.0, 32.0, 64.0),
    "fresh": (1.0, 3.0, 6.0, 12.0, 30.0),
    "repeat": (0.1, 0.3, 1.0, 3.0, 7.0),
    "session": (0.1, 0.3, 1.0, 3.0),
    "session_half_life": (1.0, 2.0, 4.0, 8.0),
}
"""Values tried for each constant."""
START: Final = Constants(0.65, 320.0, 1.0, 80.0, 0.5, 2.0, 0.001, 0.5, 4.0, 8.0, 6.0, 1.0, 0.3, 2.0)
ROUNDS: Final = 4
NULL_SIZES: Final = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
"""Edges between which the null quantiles of the divergence are measured, in fresh draws."""
FEWEST_CHECKS: Final = 200
FEWEST_SETTLED: Final = 2_000
"""Watches of settled viewers below which a rate per 1,000 says too little."""
SHUFFLES: Final = 5
LEARNED_KINDS: Final = (
    Kind.DEFAULT,
    Kind.STICKINESS_0,
    Kind.STICKINESS_7,
    Kind.ANCHORED,
    Kind.BROAD,
    Kind.COMMON,
)
LEARNED_SHARE: Final = 0.1
"""Of the viewers, those that constants are learned from: one watch costs more there, and there are six kinds."""
HALF_LIVES: Final = (5.0, 7.0, 10.0, 14.0, 20.0, 40.0, 80.0, 160.0)
PRIOR_WEIGHTS: Final = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0)


class CalibrationError(ValueError):
    """The histories cannot be calibrated on."""


@dataclass(frozen=True, slots=True)
class Histories:
    """Viewers' watches, one after the other. ts (ms) and clusters: (watches,); begins: (users + 1,)."""

    ts: Ints
    clusters: Ints
    begins: Ints

    def __len__(self) -> int:
        """Number of viewers."""
        return len(self.begins) - 1

    def of(self, users: Iterable[int]) -> Histories:
        """The histories of these viewers, in this order."""
        every = self.each()
        return joined([every[user] for user in users])

    def each(self) -> list[tuple[Ints, Ints]]:
        """Every viewer's times and clusters."""
        return [(self.ts[part], self.clusters[part]) for part in map(self.part, range(len(self)))]

    def part(self, user: int) -> slice:
        """Where one viewer's watches are."""
        return slice(int(self.begins[user]), int(self.begins[user + 1]))


def joined(histories: Sequence[tuple[Ints, Ints]]) -> Histories:
    """Histories from each viewer's times and clusters."""
    if not histories:
        return Histories(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(1, np.int64))
    begins = np.cumsum([0, *(len(ts) for ts, _ in histories)], dtype=np.int64)
    return Histories(np.concatenate([ts for ts, _ in histories]), np.concatenate([c for _, c in histories]), begins)


def simulated(streams: Iterable[Stream]) -> Histories:
    """Histories of simulated viewers."""
    return joined([(np.array(s.ts, np.int64), np.array(s.cluster, np.int64)) for s in streams])


def with_shuffled_days(histories: Histories, random: np.random.Generator) -> Histories:
    """Each viewer's days (UTC) in random order, every day's watches in theirs. The times stay where they are."""
    clusters = histories.clusters.copy()
    for user in range(len(histories)):
        part = histories.part(user)
        days = np.unique(histories.ts[part] // 86_400_000, return_inverse=True)[1]
        place = random.permutation(int(days.max(initial=0)) + 1)
        clusters[part] = histories.clusters[part][np.argsort(place[days], kind="stable")]
    return Histories(histories.ts, clusters, histories.begins)


def shares_of(histories: Histories, clusters: int) -> Floats:
    """The population's shares by cluster id: of all watches, one added to each cluster, (clusters,)."""
    counts = np.bincount(histories.clusters, minlength=clusters) + 1.0
    shares: Floats = counts / counts.sum()
    return shares


def log_losses(histories: Histories, model: Model) -> Floats:
    """Bits of each viewer's watches, predicted one by one: (users, 2), by the whole model and by the taste alone."""
    losses = np.zeros((len(histories), 2))
    kernel().log_losses(empty_states(len(histories)), histories.clusters, histories.begins, model, losses)
    return losses


def decayed_log_loss(histories: Histories, half_life: float, prior_weight: float, priors: Floats) -> float:
    """Bits a watch of plain decayed counts with the population as prior: what the estimator has to beat."""
    bits = kernel().decayed_log_loss(histories.clusters, histories.begins, half_life, prior_weight, priors)
    return float(bits) / max(1, len(histories.clusters))


def best_decayed(histories: Histories, priors: Floats) -> tuple[float, float]:
    """Half-life in watches and prior weight with which plain decayed counts predict these histories best."""
    grid = [(half_life, weight) for half_life in HALF_LIVES for weight in PRIOR_WEIGHTS]
    return min(grid, key=lambda choice: decayed_log_loss(histories, choice[0], choice[1], priors))


@dataclass(frozen=True, slots=True)
class Calibration:
    """The artefact's document, and the figures that came of finding it."""

    document: Mapping[str, Any]
    figures: Mapping[str, Any]


def calibrate_on_simulation(seed: int, target: float, scale: float, progress: Progress = lambda _: None) -> Calibration:
    """Constants from viewers of every sort that may or may not change, the threshold from those who do not.

    scale: of the populations, 1 is 400 viewers a class. Raises CalibrationError.
    """
    groups = []
    for kind in LEARNED_KINDS:
        histories = simulated(population(kind, Purpose.CALIBRATION, seed, scale * LEARNED_SHARE))
        groups.append((histories, shares_of(histories, Viewer(1.0).clusters)))
    constants = learn(groups, progress)
    null = _unchanging(constants, Purpose.CALIBRATION, seed, scale)
    threshold = find_threshold(list(null.values()), target, SETTLED, progress)
    table = divergence_null([run(histories, model, threshold) for histories, model in null.values()])
    others = _unchanging(constants, Purpose.REPORTING, seed, scale)
    rates = {
        name: round(false_per_1k(histories, run(histories, model, threshold), SETTLED), 2)
        for name, (histories, model) in others.items()
    }
    figures = {"settled": SETTLED, "false_per_1k": rates, "watches": sum(len(h.clusters) for h, _ in groups)}
    source = {"source": "simulation", "seed": seed, "target": target, "scale": scale, **figures}
    name = f"simulated-{target:g}-per-1000"
    return Calibration(artefact(name, threshold, constants, table, source), figures)


def _unchanging(constants: Constants, purpose: Purpose, seed: int, scale: float) -> dict[str, tuple[Histories, Model]]:
    """Default viewers whose taste does not change, by class, and the model for them."""
    streams: dict[str, list[Stream]] = {}
    for stream in population(Kind.DEFAULT, purpose, seed, scale):
        if stream.viewer.shift_at is None:
            streams.setdefault(stream.viewer.rate_class, []).append(stream)
    groups = {name: simulated(group) for name, group in streams.items()}
    clusters = Viewer(1.0).clusters
    return {name: (histories, Model(constants, np.full(clusters, 1 / clusters))) for name, histories in groups.items()}


def calibrate_on_log(
    name: str, histories: Histories, priors: Floats, seed: int, target: float, progress: Progress = lambda _: None
) -> Calibration:
    """Constants from half of the viewers, reported on the others; the threshold from all, their days shuffled.

    priors: the population's shares by cluster id, as the workers will have them from the registry. The figures give
    bits a watch on the other half beside decayed counts tuned on the first, and refreshes per 1,000 watches of the log
    as it is, and shuffled anew. Raises CalibrationError.
    """
    if len(histories) < 2:
        raise CalibrationError(f"constants are learned from half of the viewers, and the log has {len(histories)}")
    random = np.random.default_rng([Purpose.CALIBRATION, seed])
    order = random.permutation(len(histories))
    half = len(order) // 2
    learned, held_out = histories.of(order[:half]), histories.of(order[half:])
    settled = _settled(histories)
    constants = learn([(_at_most(learned), priors)], progress)
    model = Model(constants, priors)
    null = _appended([with_shuffled_days(histories, random) for _ in range(SHUFFLES)])
    threshold = find_threshold([(null, model)], target, settled, progress)
    table = divergence_null([run(null, model, threshold)])
    losses = log_losses(held_out, model).sum(axis=0) / len(held_out.clusters)
    half_life, prior_weight = best_decayed(learned, priors)
    figures = {
        "viewers": len(histories),
        "watches": len(histories.clusters),
        "settled": settled,
        "false_per_1k": _held_out_rate((learned, held_out), model, target, settled, seed),
        "refreshes_per_1k": round(false_per_1k(histories, run(histories, model, threshold), settled), 2),
        "bits_model": round(float(losses[0]), 4),
        "bits_taste": round(float(losses[1]), 4),
        "bits_decayed": round(decayed_log_loss(held_out, half_life, prior_weight, priors), 4),
        "decayed_half_life": half_life,
        "decayed_prior_weight": prior_weight,
    }
    source = {"source": name, "seed": seed, "target": target, **figures}
    return Calibration(artefact(f"{name}-{target:g}-per-1000", threshold, constants, table, source), figures)


def _held_out_rate(
    halves: tuple[Histories, Histories], model: Model, target: float, settled: int, seed: int
) -> float | None:
    """False refreshes per 1,000 watches of each half of the viewers, at the threshold that the other half gives.

    None where half of the log is too little for one.
    """
    random = np.random.default_rng([Purpose.REPORTING, seed])
    null = [_appended([with_shuffled_days(half, random) for _ in range(SHUFFLES)]) for half in halves]
    rates = []
    for ours, theirs in (null, null[::-1]):
        try:
            threshold = find_threshold([(theirs, model)], target, settled)
            rates.append(false_per_1k(ours, run(ours, model, threshold), settled))
        except CalibrationError:
            return None
    return round(sum(rates) / len(rates), 2)


def _settled(histories: Histories) -> int:
    """The most watches to leave out of each history such that a fair number remains. Raises CalibrationError."""
    positions = _positions(histories)
    for settled in (SETTLED, 100, 60, 40, 30):
        if np.count_nonzero(positions >= settled) >= FEWEST_SETTLED:
            return settled
    raise CalibrationError(
        f"of {len(histories)} viewers, those with more than 30 watches have fewer than {FEWEST_SETTLED} beyond them; a "
        "longer log is needed, or the packaged thresholds"
    )


def _at_most(histories: Histories) -> Histories:
    """The first viewers, up to LEARNED_FROM watches."""
    users = int(np.searchsorted(histories.begins, LEARNED_FROM, side="right")) - 1
    return histories if users >= len(histories) else histories.of(range(max(1, users)))


def _appended(parts: Sequence[Histories]) -> Histories:
    return joined([history for part in parts for history in part.each()])


def learn(groups: Sequence[tuple[Histories, Floats]], progress: Progress = lambda _: None) -> Constants:
    """Constants that predict the groups' histories best; each group comes with its population's shares.

    Coordinate descent over CHOICES on the bits of the whole model. Of all constants tried that are within one standard
    error of the best (paired over viewers), those win whose taste alone, which is what a persona describes, predicts
    best: among models that predict equally well, the one that keeps most in the taste.
    """
    tried: dict[Constants, Floats] = {}

    def losses(constants: Constants) -> Floats:
        if constants not in tried:
            parts = [log_losses(histories, Model(constants, priors)) for histories, priors in groups]
            tried[constants] = np.concatenate(parts)
        return tried[constants]

    best = START
    for number in range(ROUNDS):
        before = best
        for name, values in CHOICES.items():
            options = [best._replace(**{name: value}) for value in values]
            options = [option for option in options if option.hazard * option.restart_every <= 0.5]
            best = min(options, key=lambda option: float(losses(option)[:, 0].sum()))
        watches = sum(len(histories.clusters) for histories, _ in groups)
        progress(f"round {number + 1}: {losses(best)[:, 0].sum() / watches:.4f} bits a watch")
        if best == before:
            break
    return _plainest(tried, best)


def _plainest(tried: Mapping[Constants, Floats], best: Constants) -> Constants:
    least = tried[best][:, 0]
    chosen = best
    for constants, losses in tried.items():
        excess = losses[:, 0] - least
        error = float(excess.std()) * np.sqrt(len(excess))
        if excess.sum() <= error and losses[:, 1].sum() < tried[chosen][:, 1].sum():
            chosen = constants
    return chosen


def run(histories: Histories, model: Model, threshold: float) -> Floats:
    """The rule's trace over the histories, (watches, 3), see streams.prequential.trace_history."""
    trace = np.zeros((len(histories.clusters), 3))
    rule = Rule(threshold, STRIDE, MEMORY, FIRST_AFTER, COOL_DOWN, 0)
    kernel().refreshes(
        empty_states(len(histories)), histories.ts, histories.clusters, histories.begins, model, rule, trace
    )
    return trace


def false_per_1k(histories: Histories, trace: Floats, settled: int) -> float:
    """Refreshes per 1,000 watches after each viewer's `settled` first ones.

    Raises CalibrationError if there are none.
    """
    late = _positions(histories) >= settled
    if not late.any():
        raise CalibrationError(f"no viewer has more than {settled} watches")
    return float(1000.0 * np.count_nonzero(trace[late, 0]) / np.count_nonzero(late))


def find_threshold(
    null: Sequence[tuple[Histories, Model]], target: float, settled: int, progress: Progress = lambda _: None
) -> float:
    """A threshold at which each group of unchanging viewers has at most `target` refreshes per 1,000 watches.

    The smallest, but for the unevenness of a rate counted on few viewers. Searched by bisection between .005 and 2.
    Raises CalibrationError where 2 does not suffice.
    """

    def worst(threshold: float) -> float:
        return max(false_per_1k(histories, run(histories, model, threshold), settled) for histories, model in null)

    low, high = 0.005, 2.0
    if worst(high) > target:
        raise CalibrationError(f"even a threshold of {high} gives more than {target} refreshes per 1,000 watches")
    while high / low > 1.01:
        middle = float(np.sqrt(low * high))
        rate = worst(middle)
        progress(f"threshold {middle:.4f}: {rate:.2f} refreshes per 1,000 watches of viewers who do not change")
        low, high = (middle, high) if rate > target else (low, middle)
    threshold = round(high, 4)
    while worst(threshold) > target:
        threshold = round(threshold + 0.0001, 4)
    return threshold


def divergence_null(traces: Sequence[Floats]) -> list[tuple[float, float]]:
    """(fresh draws, 99% quantile of the divergence in bits) over every check of unchanging viewers, falling."""
    checks = np.concatenate([trace[trace[:, 1] >= 0, 1:] for trace in traces])
    table = []
    for low, high in zip((0.0, *NULL_SIZES), (*NULL_SIZES, np.inf), strict=True):
        inside = checks[(checks[:, 1] >= low) & (checks[:, 1] < high)]
        if len(inside) >= FEWEST_CHECKS:
            table.append((round(float(np.median(inside[:, 1])), 2), float(np.quantile(inside[:, 0], 0.99))))
    if not table:
        raise CalibrationError(f"fewer than {FEWEST_CHECKS} checks in the histories: more or longer ones are needed")
    falling = np.maximum.accumulate([value for _, value in table][::-1])[::-1]
    return [(size, round(float(value), 4)) for (size, _), value in zip(table, falling, strict=True)]


def artefact(
    name: str,
    threshold: float,
    constants: Constants,
    null: Sequence[tuple[float, float]],
    calibrated_on: Mapping[str, Any],
) -> dict[str, Any]:
    """The document that `streams.trigger.read_thresholds` reads."""
    return {
        "format": FORMAT,
        "name": name,
        "regret": threshold,
        "stride": STRIDE,
        "memory": MEMORY,
        "cool_down": COOL_DOWN,
        "constants": constants._asdict(),
        "divergence_null": [list(row) for row in null],
        "calibrated_on": dict(calibrated_on),
    }


def _positions(histories: Histories) -> Ints:
    """Each watch's number in its own history, from 0."""
    lengths = np.diff(histories.begins)
    positions: Ints = np.arange(len(histories.clusters)) - np.repeat(histories.begins[:-1], lengths)
    return positions
