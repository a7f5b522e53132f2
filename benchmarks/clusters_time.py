"""Clusters over time: which ids survive a rebuild, and where videos that come later are placed.

    .venv/bin/python benchmarks/clusters_time.py [CATALOGUE:FIELD ...] [--seeds 101,102,103]
        [--result benchmarks/clusters_time.md]

FIELD is the reference, by default `agents/data/demo_catalogue.jsonl:topic`; where it is a category it is part of the
text that is clustered, as in a build (benchmarks/clusters_quality.py holds it back). A sixth of the
videos, or of the topics, is held out at random and then comes back (a growth by 20%). Ends with one JSON object.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from sklearn.metrics import adjusted_mutual_info_score

from agents.clusters.build import build, nearest
from agents.clusters.catalogue import Catalogue, Video, catalogue_of, read_catalogue
from agents.clusters.embedding import Embedder, MiniLM, Vectors, unit_length, video_text
from agents.clusters.files import PACKAGED
from agents.clusters.placement import WANTED_REJECTED, place
from agents.clusters.rebuild import Rebuild, rebuild
from agents.clusters.snapshot import RegistrySnapshot
from agents.clusters.vectors import StoredVectors
from agents.localstack.assets import tokenizer_path
from agents.settings import load_settings

DEMO = f"{PACKAGED.parent / 'demo_catalogue.jsonl'}:topic"
HELD_OUT = 1 / 6
UNSEEN_TOPICS = 1 / 5
FOLDS = 5


@dataclass(frozen=True)
class Sample:
    """A catalogue with the reference of each video."""

    catalogue: Catalogue
    reference: dict[str, str]

    def part(self, wanted: Callable[[Video], bool]) -> Catalogue:
        return catalogue_of(self.catalogue.name, [asdict(video) for video in self.catalogue.videos if wanted(video)])

    def agreement(self, snapshot: RegistrySnapshot) -> float:
        """Adjusted mutual information of clusters and reference: 1 the same, 0 chance."""
        ids = [video.video_id for video in self.catalogue.videos]
        clusters = snapshot.registry().clusters_of(ids)
        return round(float(adjusted_mutual_info_score([self.reference[name] for name in ids], clusters)), 4)


def sample_of(argument: str) -> Sample:
    """A sample from PATH:FIELD; of a list the first entry is the reference."""
    path, _, field = argument.rpartition(":")
    catalogue = read_catalogue(Path(path))
    with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as lines:
        rows = [orjson.loads(line) for line in lines]
    reference = {row["video_id"]: first(row.get(field)) for row in rows}
    return Sample(catalogue, reference)


def first(value: Any) -> str:  # noqa: ANN401
    return str(value[0] if value else "") if isinstance(value, list) else str(value or "")


def rebuilds(sample: Sample, embedder: Embedder, seed: int) -> dict[str, dict[str, Any]]:
    """Rebuilding after three kinds of growth, from the old centroids and independently of them."""
    chance = np.random.default_rng(seed)
    ids = np.array([video.video_id for video in sample.catalogue.videos])
    later = set(chance.choice(ids, round(len(ids) * HELD_OUT), replace=False).tolist())
    new_topics = set(held_out_topics(sample, chance, HELD_OUT))
    found: dict[str, dict[str, Any]] = {}
    for name, old in (
        ("videos", sample.part(lambda video: video.video_id not in later)),
        ("topics", sample.part(lambda video: sample.reference[video.video_id] not in new_topics)),
    ):
        before = build(old, embedder)
        fresh = build(sample.catalogue, embedder)
        # Without a common model there are no old centroids to start from: clustered anew, then matched.
        alone = rebuild(replace(before, embedding="unknown"), sample.catalogue, embedder)
        again = rebuild(before, sample.catalogue, embedder)
        figures = of_rebuild(again, before)
        found[f"grown by {name}"] = figures | {
            "independent_kept_share": of_rebuild(alone, before)["kept_share"],
            "agreement": sample.agreement(again.snapshot),
            "agreement_built_fresh": sample.agreement(fresh),
        }
        if name == "videos":
            same = rebuild(before, old, embedder)
            checksums = {rebuild(before, old, embedder).snapshot.registry().checksum, same.snapshot.registry().checksum}
            found["same catalogue"] = of_rebuild(same, before) | {"deterministic": len(checksums) == 1}
    return found


def of_rebuild(result: Rebuild, before: RegistrySnapshot) -> dict[str, Any]:
    return {
        "clusters": len(before.cards),
        "kept_share": round(len(result.persisted) / len(before.cards), 4),
        "retired": len(result.retired),
        "added": len(result.added),
        "relabelled": len(result.relabelled),
        "stayed_share": result.stayed,
        "prior_mapped_share": result.prior_mapped,
    }


def held_out_topics(sample: Sample, chance: np.random.Generator, share: float) -> list[str]:
    """Topics at random until they hold this share of the videos; none that would alone hold more."""
    topics, counts = np.unique(list(sample.reference.values()), return_counts=True)
    chosen: list[str] = []
    held = 0
    for row in chance.permutation(len(topics)).tolist():
        if held >= share * counts.sum():
            break
        if counts[row] <= share * counts.sum():
            chosen.append(str(topics[row]))
            held += int(counts[row])
    return chosen


def new_videos(sample: Sample, embedder: Embedder, seed: int) -> dict[str, float]:
    """Where held-out videos of known topics go, and how many of unseen topics are accepted."""
    chance = np.random.default_rng(seed)
    unseen_topics = set(held_out_topics(sample, chance, UNSEEN_TOPICS))
    known = sample.part(lambda video: sample.reference[video.video_id] not in unseen_topics)
    held = set(chance.choice(len(known.videos), round(len(known.videos) * HELD_OUT), replace=False).tolist())
    later = [video for row, video in enumerate(known.videos) if row in held]
    earlier = {video.video_id for row, video in enumerate(known.videos) if row not in held}
    before = build(sample.part(lambda video: video.video_id in earlier), embedder)
    unseen = [video for video in sample.catalogue.videos if sample.reference[video.video_id] in unseen_topics]
    known_vectors, unseen_vectors = embedded(later, embedder), embedded(unseen, embedder)
    rows, scores = place(known_vectors, before.centroids)
    accepted = scores >= before.threshold
    registry = before.registry()
    topics = majority(before, sample)
    own = [(cluster, before.videos.ids[row]) for row, cluster in enumerate(before.videos.clusters.tolist())]
    pure = np.array([topics[cluster] == sample.reference[video_id] for cluster, video_id in own])
    right = np.array([topics.get(row) == sample.reference[v.video_id] for row, v in zip(rows, later, strict=True)])
    would = rebuild(before, known, embedder).snapshot.registry().clusters_of([video.video_id for video in later])
    ids = registry.cluster_ids[rows]
    cosine_bar = cosine_threshold(before, sample, embedder)
    return {
        "rejected_known": share(~accepted),
        "accepted_unseen": share(place(unseen_vectors, before.centroids)[1] >= before.threshold),
        "right_topic_of_built": share(pure),
        "right_topic": share(right),
        "right_topic_of_accepted": share(right[accepted]),
        "cluster_after_a_rebuild_of_accepted": share((ids == would)[accepted]),
        "calibrated_rejected": before.history[0]["placement"]["rejected"],
        "calibrated_accepted_elsewhere": before.history[0]["placement"]["accepted_elsewhere"],
        "cosine_alone_rejected_known": share(nearest(known_vectors, before.centroids)[1] < cosine_bar),
        "cosine_alone_accepted_unseen": share(nearest(unseen_vectors, before.centroids)[1] >= cosine_bar),
    }


def embedded(videos: Sequence[Video], embedder: Embedder) -> Vectors:
    return embedder.embed([video_text(video.title, video.tags, video.category) for video in videos])


def majority(snapshot: RegistrySnapshot, sample: Sample) -> dict[int, str]:
    """The reference that most videos of each cluster have, by row."""
    of_row: dict[int, list[str]] = {}
    for row, cluster in enumerate(snapshot.videos.clusters.tolist()):
        of_row.setdefault(cluster, []).append(sample.reference[snapshot.videos.ids[row]])
    return {cluster: max(sorted(set(values)), key=values.count) for cluster, values in of_row.items()}


def cosine_threshold(snapshot: RegistrySnapshot, sample: Sample, embedder: Embedder) -> float:
    """The plain alternative: the same quantile, over folds, of the cosine to the nearest centroid."""
    clusters = {snapshot.videos.ids[row]: int(c) for row, c in enumerate(snapshot.videos.clusters.tolist())}
    videos = [video for video in sample.catalogue.videos if video.video_id in clusters]
    vectors = embedded(videos, embedder)
    members = np.array([clusters[video.video_id] for video in videos])
    folds = np.random.default_rng(0).permutation(len(videos)) % FOLDS
    cosines = np.empty(len(videos))
    for fold in range(FOLDS):
        sums = np.zeros(snapshot.centroids.shape)
        np.add.at(sums, members[folds != fold], vectors[folds != fold])
        cosines[folds == fold] = nearest(vectors[folds == fold], unit_length(sums))[1]
    return float(np.quantile(cosines, WANTED_REJECTED))


def share(flags: npt.NDArray[np.bool_]) -> float:
    return round(float(flags.mean()), 4)


def mean_of(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds; of a flag whether it held for all."""
    return {
        name: all(r[name] for r in results) if isinstance(value, bool) else round(fmean(r[name] for r in results), 4)
        for name, value in results[0].items()
    }


def report(figures: dict[str, Any], arguments: Sequence[str]) -> str:
    """The result as markdown."""
    text = [
        "# Clusters over time\n",
        f"`{' '.join(['python', 'benchmarks/clusters_time.py', *arguments])}`: means over seeds {figures['seeds']}.\n",
        "## Rebuilding\n",
        "| catalogue | growth | clusters | ids kept | clustered independently, then matched | videos with the same id "
        "| old prior on live clusters | retired | added | relabelled | AMI | AMI of a fresh build |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in figures["catalogues"].items():
        for growth, f in result["rebuild"].items():
            independent = f"{f['independent_kept_share']:.1%}" if "independent_kept_share" in f else ""
            agreement = (f"{f['agreement']:.3f}", f"{f['agreement_built_fresh']:.3f}") if independent else ("", "")
            shares = [f"{f['stayed_share']:.1%}", f"{f['prior_mapped_share']:.1%}"]
            counts = [f"{f[what]:.1f}" for what in ("retired", "added", "relabelled")]
            cells = [name, growth, f"{f['clusters']:.0f}", f"{f['kept_share']:.1%}", independent]
            cells += [*shares, *counts, *agreement]
            text.append(f"| {' | '.join(cells)} |")
    text += [
        "\n## Videos that come later\n",
        f"The threshold aims at wrongly rejecting {WANTED_REJECTED:.0%} of the videos of known topics. Where the"
        " field's values blend into each other (a film's first genre), unseen ones are not foreign: accepting them is"
        " right.\n",
        "| | " + " | ".join(figures["catalogues"]) + " |",
        "| --- |" + " --- |" * len(figures["catalogues"]),
    ]
    words = {
        "rejected_known": "videos of known topics rejected",
        "accepted_unseen": "videos of unseen topics accepted",
        "cosine_alone_rejected_known": "with the cosine alone: known rejected",
        "cosine_alone_accepted_unseen": "with the cosine alone: unseen accepted",
        "right_topic": "the nearest cluster's majority is their topic",
        "right_topic_of_accepted": "the same of those accepted",
        "right_topic_of_built": "the same of the videos that the clusters were built from",
        "cluster_after_a_rebuild_of_accepted": "accepted into the cluster that a rebuild with them gives",
        "calibrated_rejected": "what the registry itself records: rejected",
        "calibrated_accepted_elsewhere": "and accepted elsewhere without their own cluster",
    }
    for key, what in words.items():
        values = (f"{result['new_videos'][key]:.1%}" for result in figures["catalogues"].values())
        text.append(f"| {what} | {' | '.join(values)} |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalogues", nargs="*", metavar="CATALOGUE:FIELD", default=[DEMO])
    parser.add_argument("--seeds", default="101,102,103")
    parser.add_argument("--result", type=Path, help="write the result as markdown")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    catalogues: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="clusters-time-") as folder:
        embedder = StoredVectors(Path(folder), MiniLM(tokenizer_path(load_settings())))
        for argument in given.catalogues:
            sample = sample_of(argument)
            by_seed = [rebuilds(sample, embedder, seed) for seed in seeds]
            catalogues[sample.catalogue.name] = {
                "rebuild": {growth: mean_of([found[growth] for found in by_seed]) for growth in sorted(by_seed[0])},
                "new_videos": mean_of([new_videos(sample, embedder, seed) for seed in seeds]),
            }
            print(f"{sample.catalogue.name}: {orjson.dumps(catalogues[sample.catalogue.name]).decode()}", flush=True)
    figures = {"seeds": seeds, "wanted_rejected": WANTED_REJECTED, "catalogues": catalogues}
    if given.result:
        given.result.write_text(report(figures, [Path(a).name for a in sys.argv[1:]]))
    print(orjson.dumps(figures).decode())


if __name__ == "__main__":
    main()
