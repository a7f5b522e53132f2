"""The product's estimator and refresh rule on a simulated stream: the only place that calls them."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from agents.artefacts import load_thresholds
from agents.compiled import empty_states, kernel
from agents.settings import Settings
from streams.mixture import Model
from streams.prequential import Rule
from streams.simulation import SimulatedStream, Viewer, simulate
from streams.topics import DAY_MS
from streams.trigger import Policy

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def estimates(stream: SimulatedStream) -> Floats:
    """The viewer's distribution after each event, (events, clusters)."""
    model, _ = product(stream.viewer.clusters)
    shares = np.zeros((len(stream.cluster), stream.viewer.clusters))
    kernel().distributions(empty_states(1)[0], np.array(stream.cluster), model, shares)
    return shares


def refreshes(stream: SimulatedStream, threshold_factor: float = 1.0, maximum_age_days: float = 0.0) -> Integers:
    """The events, from 0, after which a refresh is due.

    threshold_factor: times the threshold that ships; maximum_age_days: 0 for none.
    """
    model, rule = product(stream.viewer.clusters)
    rule = rule._replace(threshold=threshold_factor * rule.threshold, maximum_age=round(maximum_age_days * DAY_MS))
    steps = np.zeros((len(stream.cluster), 3))
    kernel().trace_history(empty_states(1)[0], np.array(stream.ts), np.array(stream.cluster), model, rule, steps)
    return np.flatnonzero(steps[:, 0])


@functools.cache
def product(clusters: int) -> tuple[Model, Rule]:
    """The estimator's constants and the refresh rule that ship, with equal shares as the population's."""
    thresholds = load_thresholds(Settings().thresholds)
    rule = Rule(
        thresholds.regret,
        thresholds.stride,
        thresholds.memory,
        Policy().first_persona_after,
        thresholds.cool_down,
        maximum_age=0,
    )
    return Model(thresholds.constants, np.full(clusters, 1.0 / clusters)), rule


def compile_once() -> None:
    """Compile the kernel, which takes some seconds: processes forked after this need not."""
    stream = simulate(Viewer(1.0, events=30), np.random.default_rng(0))
    estimates(stream)
    refreshes(stream)
