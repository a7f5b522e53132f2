"""Do viewers take up the topics proposed to them? Beside popularity, item-kNN and chance, in simulation and on a log.

    .venv/bin/python -m benchmarks.novelty [--seeds 5] [--first-seed 100] [--events FILE --catalogue FILE] [--write]

A proposal hits if the viewer first watches one of its three clusters within the following watches. The graph is learned
by streams/transitions.py from other viewers, and topics are chosen by the workers' own code (streams/counting.py,
streams/choosing.py) from the viewer's watches before the cut. Ends with one JSON object.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from agents.artefacts import load_thresholds
from agents.clusters.build import build
from agents.clusters.catalogue import read_catalogue
from agents.clusters.embedding import MiniLM
from agents.clusters.events import read_log
from agents.clusters.vectors import StoredVectors
from agents.compiled import empty_states, worker_kernel
from agents.localstack.assets import tokenizer_path
from agents.localstack.progress import shown_progress
from agents.settings import Settings, load_settings
from streams.choosing import MAXIMUM_NOVEL, NONE, catalogue
from streams.counting import EVENT, Log
from streams.mixture import Model
from streams.registry import ClusterCard, Neighbours, Registry, TextColumn, VideoTable, bucket_offsets
from streams.requesting import ASKED, Gates, Reason
from streams.state import EMPTY
from streams.transitions import Transitions, learn
from streams.watch import Kernel

HERE: Final = Path(__file__).parent
DAY_MS: Final = 86_400_000
SHARED: Final = HERE.parents[1] / "shared" / "data"
"""Where a log is looked for when none is named."""
CONCLUSIONS: Final = "## What this shows, and what it does not\n"
"""From this line on the result file is written by hand."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# --- what is compared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watches:
    """A log: (n,) viewers' numbers, cluster ids and times in ms, by viewer and then by time."""

    viewers: Ints
    clusters: Ints
    times: Ints

    def of(self, chosen: npt.NDArray[np.bool_]) -> Watches:
        return Watches(self.viewers[chosen], self.clusters[chosen], self.times[chosen])

    def places(self) -> Ints:
        """Each watch's place in its viewer's history, from 0."""
        begins = np.flatnonzero(np.append(True, np.diff(self.viewers) != 0)[: len(self.viewers)])
        return np.arange(len(self.viewers)) - np.repeat(begins, np.diff(np.append(begins, len(self.viewers))))


@dataclass(frozen=True)
class Case:
    """A registry without a graph, the log to learn one from, and viewers' watches before and after the cut."""

    registry: Registry
    learned: Watches
    before: Watches
    after: Watches
    least_viewers: int

    def watched(self, part: Watches) -> tuple[Ints, Floats]:
        """The viewers before the cut, and how often each watched each cluster id, (viewers, ids)."""
        viewers, rows = np.unique(self.before.viewers, return_inverse=True)
        counts = np.zeros((len(viewers), len(self.registry.prior_by_id)))
        if part is self.before:
            np.add.at(counts, (rows, part.clusters), 1)
            return viewers, counts
        places = np.searchsorted(viewers, part.viewers)
        np.add.at(counts, (places, part.clusters), 1)
        return viewers, counts


Proposer = Callable[[Case], Ints]
"""Proposed cluster ids, then NONE: (viewers before the cut, MAXIMUM_NOVEL)."""


def hits(case: Case, proposed: Ints) -> npt.NDArray[np.bool_]:
    """For each viewer whether they first watch a proposed cluster after the cut."""
    _, before = case.watched(case.before)
    _, after = case.watched(case.after)
    fresh = (after > 0) & (before == 0)
    rows = np.arange(len(proposed))[:, None]
    found: npt.NDArray[np.bool_] = (fresh[rows, np.maximum(proposed, 0)] & (proposed != NONE)).any(axis=1)
    return found


def ours(kernel: Kernel, *, graph: bool) -> Proposer:
    """The workers' choice, with a graph learned from the case's log or without any."""

    def propose(case: Case) -> Ints:
        registry = case.registry
        if graph:
            registry = with_graph(registry, learn_graph(case))
        return chosen_topics(kernel, registry, case.before)

    return propose


def learn_graph(case: Case) -> Transitions:
    log = case.learned
    return learn(log.viewers, log.clusters, log.times, case.registry.cluster_ids, least_viewers=case.least_viewers)


def with_graph(registry: Registry, transitions: Transitions) -> Registry:
    """The registry with other transitions."""
    return Registry(
        version=registry.version,
        checksum=registry.checksum,
        lineage=registry.lineage,
        cards=list(registry.cards.values()),
        neighbours=registry._neighbours,
        videos=registry._videos,
        transitions=transitions,
    )


def chosen_topics(kernel: Kernel, registry: Registry, watches: Watches) -> Ints:
    """What a persona would propose to each viewer after their watches."""
    states = counted(kernel, registry, watches)
    model, gates, topics = model_of(registry), _no_requests(), catalogue(registry)
    requests, proposed = np.zeros(1, ASKED), np.full((len(states), MAXIMUM_NOVEL), NONE)
    for viewer in range(len(states)):
        kernel.ask(
            states[viewer : viewer + 1], Reason(0, 1.0, 1.0, template_only=False), model, gates, topics, requests
        )
        rows = requests["novel"][0]
        proposed[viewer] = np.where(rows == NONE, NONE, topics.cluster[rows])
    return proposed


def counted(kernel: Kernel, registry: Registry, watches: Watches) -> npt.NDArray[np.void]:
    """The viewers' states after their watches, by ascending number."""
    viewers, rows = np.unique(watches.viewers, return_inverse=True)
    states, events = empty_states(len(viewers)), np.zeros(len(rows), EVENT)
    events["row"], events["ts"], events["cluster"] = rows, watches.times, watches.clusters
    events["offset"] = events["key"] = events["video"] = np.arange(1, len(rows) + 1)
    events["weight"] = 1.0
    requests = np.zeros(1, ASKED)
    at, made = kernel.apply(
        states, events, 0, Log(np.uint64(1), 0), model_of(registry), _no_requests(), catalogue(registry), requests
    )
    if made or at != len(events):
        raise SystemExit(f"the kernel stopped at watch {at} of {len(events)}")
    return states


def model_of(registry: Registry) -> Model:
    return Model(load_thresholds(Settings().thresholds).constants, registry.prior_by_id)


def _no_requests() -> Gates:
    never = 2**31
    return Gates(never, 0, 0, 1e9, never, 0.9, never, 2**60, np.ones(1), np.ones(1))


def _best(scores: Floats, watched: Floats, registry: Registry) -> Ints:
    """The three ids of highest score that the viewer never watched and a persona may propose."""
    open_to = np.zeros(scores.shape[1], bool)
    open_to[[cluster for cluster, card in registry.cards.items() if card.suggestible]] = True
    masked = np.where(open_to & (watched == 0), scores, -np.inf)
    order = np.argsort(-masked, axis=1, kind="stable")[:, :MAXIMUM_NOVEL]
    found: Ints = np.where(np.take_along_axis(masked, order, 1) > -np.inf, order, NONE)
    return found


def _who_watched(case: Case) -> Floats:
    """(viewers of the log, ids), 1 where they watched it."""
    viewers, rows = np.unique(case.learned.viewers, return_inverse=True)
    seen = np.zeros((len(viewers), len(case.registry.prior_by_id)))
    seen[rows, case.learned.clusters] = 1.0
    return seen


def by_popularity(case: Case) -> Ints:
    """Clusters that most viewers of the log watched."""
    _, watched = case.watched(case.before)
    return _best(np.broadcast_to(_who_watched(case).sum(axis=0), watched.shape), watched, case.registry)


def by_popularity_remembering(kernel: Kernel) -> Proposer:
    """The same, leaving out what a worker's state knows was watched, and no more."""

    def propose(case: Case) -> Ints:
        held = counted(kernel, case.registry, case.before)["cluster"]
        known = np.zeros((len(held), len(case.registry.prior_by_id)))
        rows, slots = np.nonzero(held != EMPTY)
        known[rows, held[rows, slots]] = 1.0
        return _best(np.broadcast_to(_who_watched(case).sum(axis=0), known.shape), known, case.registry)

    return propose


def by_neighbours(case: Case) -> Ints:
    """Item-kNN: the cosine of who watched both, summed over the clusters that the viewer watched, by their share."""
    _, watched = case.watched(case.before)
    seen = _who_watched(case)
    length = np.sqrt(np.maximum(seen.sum(axis=0), 1.0))
    cosines = seen.T @ seen / length[:, None] / length
    return _best(watched / watched.sum(axis=1, keepdims=True) @ cosines, watched, case.registry)


def by_chance(case: Case) -> Ints:
    """Three at random."""
    _, watched = case.watched(case.before)
    return _best(np.random.default_rng(0).random(watched.shape), watched, case.registry)


# --- simulation ------------------------------------------------------------------------------------------------------

CLUSTERS: Final = 64
GROUPS: Final = 8
"""Of clusters near each other in content."""
WAYS: Final = 2
FOLLOWED: Final = 0.75
"""Share of take-ups that follow a common way, where there are any."""
BACKGROUND: Final = 0.04
STICKY: Final = 0.3
TAKE_UP_EVERY: Final = 40
LENGTH: Final = 280
TRAINING, TESTED = 4000, 1000
WATCHES_A_DAY: Final = 4.0
FOLLOWING: Final = 60
"""Watches after the cut in which a first watch is a hit: two weeks in simulation."""


def simulated(seed: int, *, structure: bool) -> Case:
    """Viewers who take up clusters by common ways, or by popularity alone.

    A viewer starts with 2 to 5 clusters and takes up another every 40 watches on average: with `structure` in 75% of
    cases one that a cluster they like leads to (each leads to 2, one of them of its own group of content, the other
    anywhere), else one drawn by popularity, which falls as 1 / rank. 4% of watches are of any cluster, 30% repeat the
    one before. The cut is anywhere between watches 80 and 240.
    """
    random = np.random.default_rng([seed, 7])
    popularity = 1.0 / (1.0 + random.permutation(CLUSTERS)) ** 0.8
    popularity /= popularity.sum()
    vectors = random.normal(size=(GROUPS, 24))[np.arange(CLUSTERS) % GROUPS] + 0.8 * random.normal(size=(CLUSTERS, 24))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ways = np.array([_ways(cluster, random) for cluster in range(CLUSTERS)])
    histories = [_history(random, popularity, ways if structure else None) for _ in range(TRAINING + TESTED)]
    watches = Watches(
        np.repeat(np.arange(len(histories)), LENGTH),
        np.concatenate(histories),
        np.concatenate([_times(random) for _ in histories]),
    )
    training = watches.viewers < TRAINING
    learned = watches.of(training)
    cut = random.integers(80, 240, len(histories))[watches.viewers]
    places = watches.places()
    return Case(
        registry=synthetic_registry(vectors, np.bincount(learned.clusters, minlength=CLUSTERS)),
        learned=learned,
        before=watches.of(~training & (places < cut)),
        after=watches.of(~training & (places >= cut) & (places < cut + FOLLOWING)),
        least_viewers=50,
    )


def _ways(cluster: int, random: np.random.Generator) -> Ints:
    near = [other for other in range(CLUSTERS) if other != cluster and other % GROUPS == cluster % GROUPS]
    rest = [other for other in range(CLUSTERS) if other % GROUPS != cluster % GROUPS]
    return np.append(random.choice(near, 1), random.choice(rest, WAYS - 1, replace=False))


def _history(random: np.random.Generator, popularity: Floats, ways: Ints | None) -> Ints:
    liked = random.choice(CLUSTERS, random.integers(2, 6), replace=False, p=popularity).tolist()
    weights = random.gamma(2.0, 1.0, len(liked)).tolist()
    found = np.zeros(LENGTH, np.int64)
    at = 0
    while at < LENGTH:
        until = min(LENGTH, at + 1 + int(random.exponential(TAKE_UP_EVERY)))
        chance = np.array(weights) / sum(weights)
        found[at:until] = random.choice(liked, until - at, p=chance)
        at = until
        fresh = _next(random, liked, chance, popularity, ways)
        if fresh not in liked:
            liked.append(fresh)
            weights.append(float(random.gamma(2.0, 1.0)))
    noise = random.random(LENGTH) < BACKGROUND
    found[noise] = random.integers(0, CLUSTERS, int(noise.sum()))
    for i in np.flatnonzero(random.random(LENGTH) < STICKY).tolist():
        found[i] = found[max(0, i - 1)]
    return found


def _next(
    random: np.random.Generator, liked: Sequence[int], chance: Floats, popularity: Floats, ways: Ints | None
) -> int:
    if ways is not None and random.random() < FOLLOWED:
        return int(random.choice(ways[random.choice(liked, p=chance)]))
    return int(random.choice(CLUSTERS, p=popularity))


def _times(random: np.random.Generator) -> Ints:
    gaps = random.exponential(DAY_MS / WATCHES_A_DAY, LENGTH)
    times: Ints = (1_767_225_600_000 + np.cumsum(gaps)).astype(np.int64)
    return times


def synthetic_registry(vectors: Floats, counts: Ints) -> Registry:
    """Clusters 0..K-1 of these centroids and counts of watches, without videos."""
    cosines = (vectors @ vectors.T).astype(np.float32)
    np.fill_diagonal(cosines, -2)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :-1]
    shares = (counts + 1.0) / (counts + 1.0).sum()
    cards = [
        ClusterCard(c, f"topic {c}", f"topic {c} videos", (), (), 1, float(shares[c]), 0.5, sensitive=False)
        for c in range(len(vectors))
    ]
    none = TextColumn(np.zeros(0, np.uint8), np.zeros(1, np.int64))
    keys = np.zeros(0, np.uint64)
    return Registry(
        version=1,
        checksum="simulated",
        lineage="simulated",
        cards=cards,
        neighbours=Neighbours(order.astype(np.int32), np.take_along_axis(cosines, order, 1)),
        videos=VideoTable(keys, np.zeros(0, np.int32), none, none, bucket_offsets(keys)),
    )


# --- a real log ------------------------------------------------------------------------------------------------------

REAL_CLUSTERS: Final = 64
REAL_LEAST_VIEWERS: Final = 20
FOLDS: Final = 5
FIRST: Final = 20
"""Watches before the cut of a viewer of the log: their first persona."""
WEEKS: Final = 4


def real_cases(events: Path, films: Path, note: Callable[[str], None]) -> dict[str, list[Case]]:
    """A log split twice: by viewers, the graph from others; and at a day, the graph from all that came before."""
    settings = load_settings()
    note("clustering the catalogue")
    with tempfile.TemporaryDirectory() as folder, shown_progress() as report:
        embedder = StoredVectors(Path(folder) / "vectors", MiniLM(tokenizer_path(settings, report)))
        registry = build(read_catalogue(films), embedder, clusters=REAL_CLUSTERS).registry()
    log = read_log(events, registry)
    order = np.lexsort((log.times, log.viewers))
    watches = Watches(log.viewers[order], log.clusters[order], log.times[order])
    return {"other viewers": _by_viewers(registry, watches), "the log until a day": [_by_day(registry, watches)]}


def _by_viewers(registry: Registry, watches: Watches) -> list[Case]:
    """Cut after the first 20 watches; the following 4 weeks; viewers in fifths, each with a graph from the rest."""
    fold = np.random.default_rng(0).integers(0, FOLDS, int(watches.viewers.max()) + 1)[watches.viewers]
    places = watches.places()
    cases = []
    for number in range(FOLDS):
        tested = fold == number
        before = watches.of(tested & (places < FIRST))
        last = np.zeros(int(watches.viewers.max()) + 1, np.int64)
        np.maximum.at(last, before.viewers, before.times)
        soon = (places >= FIRST) & (watches.times <= last[watches.viewers] + WEEKS * 7 * DAY_MS)
        learned = watches.of(~tested)
        cases.append(_with_both(counted_registry(registry, learned), learned, before, watches.of(tested & soon)))
    return cases


def _by_day(registry: Registry, watches: Watches) -> Case:
    """Cut at the day before which 60% of the log lies; viewers with 20 watches by then; the following 4 weeks."""
    day = int(np.quantile(watches.times, 0.6))
    early = watches.times < day
    enough = np.bincount(watches.viewers[early], minlength=int(watches.viewers.max()) + 1) >= FIRST
    tested = enough[watches.viewers]
    soon = ~early & (watches.times <= day + WEEKS * 7 * DAY_MS)
    learned = watches.of(early)
    return _with_both(
        counted_registry(registry, learned), learned, watches.of(tested & early), watches.of(tested & soon)
    )


def counted_registry(registry: Registry, watches: Watches) -> Registry:
    """The registry with the shares of these watches as its prior."""
    counts = np.bincount(watches.clusters, minlength=len(registry.prior_by_id)) + 1.0
    cards = [replace(card, prior=float(counts[c] / counts.sum())) for c, card in registry.cards.items()]
    return Registry(
        version=registry.version,
        checksum=registry.checksum,
        lineage=registry.lineage,
        cards=cards,
        neighbours=registry._neighbours,
        videos=registry._videos,
    )


def _with_both(registry: Registry, learned: Watches, before: Watches, after: Watches) -> Case:
    """Of the viewers who watched on both sides of the cut."""
    both = np.intersect1d(before.viewers, after.viewers)
    return Case(
        registry=registry,
        learned=learned,
        before=before.of(np.isin(before.viewers, both)),
        after=after.of(np.isin(after.viewers, both)),
        least_viewers=REAL_LEAST_VIEWERS,
    )


# --- the run ---------------------------------------------------------------------------------------------------------


def measured(cases: Sequence[Case], proposers: Mapping[str, Proposer]) -> dict[str, Any]:
    """Hit rate of each proposer over the viewers of all cases, with its standard error, and that against ours."""
    found = {name: np.concatenate([hits(case, propose(case)) for case in cases]) for name, propose in proposers.items()}
    own = found[OURS].astype(float)
    figures: dict[str, Any] = {"viewers": len(own), "cases": len(cases)}
    figures["edges"] = round(float(np.mean([len(learn_graph(case)) for case in cases])))
    for name, hit in found.items():
        difference = own - hit
        figures[name] = {
            "hit_rate": round(float(hit.mean()), 4),
            "error": round(float(hit.std() / np.sqrt(len(hit))), 4),
            "ours_minus_it": round(float(difference.mean()), 4),
            "error_of_difference": round(float(difference.std() / np.sqrt(len(hit))), 4),
        }
    return figures


OURS: Final = "graph and content (ours)"
WITHOUT: Final = "content alone (a registry without a graph)"


def proposers(kernel: Kernel) -> dict[str, Proposer]:
    return {
        OURS: ours(kernel, graph=True),
        WITHOUT: ours(kernel, graph=False),
        "popularity": by_popularity,
        "popularity, with a worker's memory": by_popularity_remembering(kernel),
        "item-kNN": by_neighbours,
        "random": by_chance,
    }


def rendered(figures: Mapping[str, Any], command: str) -> str:
    """The measured part of the result file."""
    lines = ["# Novel topics that viewers take up", "", f"    {command}", "", _INTRODUCTION, ""]
    for name, found in figures["worlds"].items():
        lines += [f"## {name}", "", f"{found['viewers']:,} viewers, {found['edges']:,} edges.", ""]
        lines += ["| proposals | hit rate | standard error | ours minus it | its standard error |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for label, row in found.items():
            if isinstance(row, dict):
                cells = (f"{row['hit_rate']:.3f}", f"{row['error']:.3f}", f"{row['ours_minus_it']:+.3f}")
                lines.append(f"| {label} | {' | '.join(cells)} | {row['error_of_difference']:.3f} |")
        lines.append("")
    return "\n".join(lines)


_INTRODUCTION: Final = """\
A proposal hits if the viewer first watches one of its three clusters after the cut: within 60 watches (two weeks) in
simulation, within 4 weeks on the log. The graph and the counts of the others come from other viewers, or from before
the cut. A worker's state knows the last 20 clusters that a viewer watched, so ours may propose one that was watched
long ago, which never hits; the others know all, but for the one said to have the same memory. In simulation an edge
needs 50 viewers, on the log, which is small, 20. benchmarks/novelty.py tells how viewers are simulated."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="simulated worlds of each kind")
    parser.add_argument("--first-seed", type=int, default=100, help="those below 100 served to choose constants")
    parser.add_argument("--events", type=Path, default=SHARED / "watch_events.tsv.gz")
    parser.add_argument("--catalogue", type=Path, default=SHARED / "catalogue.jsonl.gz")
    parser.add_argument("--write", action="store_true", help=f"write {HERE / 'novelty.md'}")
    arguments = parser.parse_args()
    started = time.perf_counter()

    def note(text: str) -> None:
        print(f"{time.perf_counter() - started:5.0f} s  {text}", file=sys.stderr, flush=True)

    note("compiling")
    compared = proposers(worker_kernel(load_settings().data_folder / "kernel"))
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    worlds: dict[str, Any] = {}
    for name, structure in (("Simulated, common ways", True), ("Simulated, no structure", False)):
        note(name)
        worlds[name] = measured([simulated(seed, structure=structure) for seed in seeds], compared)
    if arguments.events.exists() and arguments.catalogue.exists():
        for name, cases in real_cases(arguments.events, arguments.catalogue, note).items():
            note(f"log: {name}")
            worlds[f"Real log, from {name}"] = measured(cases, compared)
    else:
        note(f"no {arguments.events}: simulation alone")
    figures = {"seeds": list(seeds), "seconds": round(time.perf_counter() - started), "worlds": worlds}
    text = rendered(figures, "make bench-novelty")
    print(text)
    if arguments.write:
        path = HERE / "novelty.md"
        kept = path.read_text().partition(CONCLUSIONS)[2] if path.exists() else ""
        path.write_text(f"{text}\n{CONCLUSIONS}{kept}")
    print(orjson.dumps(figures).decode())


if __name__ == "__main__":
    main()
