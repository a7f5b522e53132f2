"""Measures the clusters of catalogues against a field held back from them; prints 20 clusters to be read.

    .venv/bin/python benchmarks/clusters_quality.py [CATALOGUE FIELD]... [--debian] [--result FILE]

The packaged demo catalogue is always measured, against the topics that its titles were written for. --debian adds 6,000
descriptions of Debian packages (`apt-cache dumpavail`), with their tags, against the archive's sections: the largest
labelled catalogue of short texts that a Debian machine holds. The 20 clusters come from the first CATALOGUE, else from
the demo; what a reader said of them in the result file, from its last heading on, is kept.
The form of the grab-bag test was chosen looking at these catalogues, so its purities are no held-out figures.
Ends with one JSON object.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import orjson
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_mutual_info_score
from sklearn.model_selection import cross_val_predict

from agents.clusters.build import build, centroids_of, default_cluster_count, means, nearest
from agents.clusters.catalogue import Catalogue, Video, catalogue_of, read_catalogue, read_field
from agents.clusters.coherence import coherence, pair_cosines
from agents.clusters.embedding import Embedder, MiniLM, Vectors, video_text
from agents.clusters.evaluate import evaluate
from agents.clusters.hierarchy import parent_centroids, parent_count, parents_of
from agents.clusters.vectors import StoredVectors
from agents.localstack.assets import tokenizer_path
from agents.settings import load_settings
from streams.records import UNASSIGNED
from streams.registry import ClusterCard

DEMO = Path(__file__).parent.parent / "agents" / "data" / "demo_catalogue.jsonl"
JUDGED = "## Read by hand"
SEEDS = (0, 1, 2)
RANDOM_GROUPS = 200
SAMPLED_CLUSTERS, SAMPLED_TITLES = 20, 5
DEBIAN_PACKAGES = 6_000
NOT_A_TOPIC = frozenset({"libs", "libdevel", "oldlibs", "doc", "debug", "metapackages", "localization", "misc"})
"""Sections that say what kind of file a package is, not what it is about."""


@dataclass(frozen=True)
class Source:
    name: str
    catalogue: Catalogue
    field: str
    reference: dict[str, tuple[str, ...]]


@dataclass
class Figures:
    clusters: dict[str, Any] = field(default_factory=dict)
    grab_bags: dict[str, Any] = field(default_factory=dict)
    parents: dict[str, Any] = field(default_factory=dict)


def debian(seed: int) -> Source:
    """A seeded sample of the packages that bear a tag; of those with one description the first."""
    listed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    rows = {str(row["title"]).casefold(): row for row in map(_package, listed.split("\n\n")) if row}
    ordered = sorted(rows.values(), key=lambda row: str(row["video_id"]))
    chosen = np.random.default_rng(seed).choice(len(ordered), min(DEBIAN_PACKAGES, len(ordered)), replace=False)
    made = [ordered[row] for row in chosen.tolist()]
    reference: dict[str, tuple[str, ...]] = {str(row["video_id"]): (str(row["section"]),) for row in made}
    return Source("Debian packages", catalogue_of("Debian packages", made), "section", reference)


def _package(text: str) -> dict[str, Any] | None:
    fields: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith(" "):
            fields[name] += line
        else:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    section = fields.get("Section", "").rpartition("/")[2]
    tags = [tag.strip().partition("::")[2] for tag in fields.get("Tag", "").split(",")]
    words = [tag.replace(":", " ").replace("-", " ") for tag in tags if tag]
    if not words or not section or section in NOT_A_TOPIC or "Description" not in fields:
        return None
    return {"video_id": fields["Package"], "title": fields["Description"], "tags": words, "section": section}


def held_back(source: Source) -> tuple[list[str], list[str]]:
    """Texts without the field, and its first values."""
    kept = [(_text(video, source.field), source.reference.get(video.video_id)) for video in source.catalogue.videos]
    usable = [(text, values[0]) for text, values in kept if text and values]
    return [text for text, _ in usable], [value for _, value in usable]


def _text(video: Video, field: str) -> str:
    return video_text(video.title, () if field == "tags" else video.tags, () if field == "category" else video.category)


def measure(source: Source, embedder: Embedder, figures: Figures) -> None:
    found = evaluate(source.catalogue, source.reference, source.field, embedder, seeds=SEEDS)
    figures.clusters[source.name] = {
        "videos": found.videos,
        "values": found.values,
        "clusters": found.clusters,
        **{name: _spread(each.first_value) for name, each in found.methods.items()},
    }
    texts, values = held_back(source)
    vectors = embedder.embed(texts)
    figures.clusters[source.name]["trained"] = trained(vectors, values)
    count = default_cluster_count(len(texts))
    centroids = centroids_of(vectors, count, 0.5, 0, means)
    members, _ = nearest(vectors, centroids)
    figures.grab_bags[source.name] = grab_bags(vectors, members, len(centroids), values)
    figures.parents[source.name] = parents(vectors, centroids, members, values)
    print(f"{source.name}: done", file=sys.stderr, flush=True)


def trained(vectors: Vectors, values: Sequence[str]) -> float:
    """What a classifier that is told the field agrees with it on videos it did not see: what the text holds of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # values of fewer videos than folds
        predicted = cross_val_predict(LogisticRegression(C=3, max_iter=300), vectors, values, cv=3)
    return round(float(adjusted_mutual_info_score(values, predicted)), 3)


def grab_bags(
    vectors: Vectors, members: np.ndarray[Any, np.dtype[np.int32]], count: int, values: Sequence[str]
) -> dict[str, Any]:
    """How pure marked and other clusters are, and how many groups drawn at random are marked."""
    found = coherence(vectors, members, count)
    marked = ~found.coherent[members]
    random = np.random.default_rng(1)
    size = max(2, len(vectors) // count)
    drawn = np.stack([random.choice(len(vectors), size, replace=False) for _ in range(RANDOM_GROUPS)])
    groups = np.repeat(np.arange(RANDOM_GROUPS, dtype=np.int32), size)
    by_chance = pair_cosines(vectors[drawn.ravel()], groups, RANDOM_GROUPS)
    of_cluster: list[Counter[str]] = [Counter() for _ in range(count)]
    for cluster, value in zip(members.tolist(), values, strict=True):
        of_cluster[cluster][value] += 1
    common = [max(counter.values(), default=0) for counter in of_cluster]
    sizes = np.bincount(members, minlength=count)
    bags = ~found.coherent

    def purity(chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> float | None:
        return round(float(np.array(common)[chosen].sum() / sizes[chosen].sum()), 3) if chosen.any() else None

    return {
        "clusters": count,
        "marked": int(bags.sum()),
        "videos_in_marked": round(float(marked.mean()), 3),
        "purity_marked": purity(bags),
        "purity_others": purity(~bags),
        "random_groups_marked": round(float((by_chance < found.level).mean()), 3),
    }


def parents(
    vectors: Vectors,
    centroids: Vectors,
    members: np.ndarray[Any, np.dtype[np.int32]],
    values: Sequence[str],
) -> dict[str, Any]:
    """Ward's cut of the centroids beside the first code of their residual quantisation, with as many parents."""
    count = parent_count(len(centroids))
    sizes = np.bincount(members, minlength=len(centroids))

    def judged(of_cluster: np.ndarray[Any, np.dtype[np.int32]]) -> tuple[float, float]:
        roots = parent_centroids(centroids, sizes, of_cluster)
        of_video = of_cluster[members]
        cosine = float(np.einsum("ij,ij->i", vectors, roots[of_video]).mean())
        return float(adjusted_mutual_info_score(values, of_video)), cosine

    cut = judged(parents_of(centroids, count))
    coded, shared = [], []
    for seed in SEEDS:
        first = KMeans(count, n_init=4, random_state=seed).fit(centroids, sample_weight=sizes)
        residuals = centroids - first.cluster_centers_[first.labels_]
        second = KMeans(count, n_init=4, random_state=seed).fit(residuals, sample_weight=sizes)
        codes = Counter(zip(first.labels_.tolist(), second.labels_.tolist(), strict=True))
        coded.append(judged(first.labels_.astype(np.int32)))
        shared.append(sum(times for times in codes.values() if times > 1) / len(centroids))
    return {
        "clusters": len(centroids),
        "parents": count,
        "ward_cut": {"ami": round(cut[0], 3), "cosine": round(cut[1], 3)},
        "residual_quantisation": {
            "ami": round(fmean(ami for ami, _ in coded), 3),
            "cosine": round(fmean(cosine for _, cosine in coded), 3),
            "clusters_sharing_both_codes": round(fmean(shared), 3),
        },
    }


def sample(source: Source, embedder: Embedder) -> Iterator[str]:
    """Markdown of clusters drawn at random from the registry as it is built, with titles drawn at random."""
    snapshot = build(source.catalogue, embedder)
    registry = snapshot.registry()
    titles: dict[int, list[str]] = {}
    for video in source.catalogue.videos:
        cluster = registry.cluster_of(video.video_id)
        if cluster != UNASSIGNED:
            titles.setdefault(cluster, []).append(video.title)
    random = np.random.default_rng(20)
    drawn = np.sort(random.choice(registry.cluster_ids, min(SAMPLED_CLUSTERS, len(registry.cards)), replace=False))
    bags = sum(not card.coherent for card in snapshot.cards)
    yield f"{source.name}: {len(snapshot.cards)} clusters, {bags} marked as grab-bags; clusters and titles at random."
    yield ""
    yield "| | label | parent | cohesion | titles |"
    yield "| --- | --- | --- | --- | --- |"
    for number, cluster in enumerate(drawn.tolist(), start=1):
        own = titles[cluster]
        shown = [own[row] for row in random.choice(len(own), min(SAMPLED_TITLES, len(own)), replace=False).tolist()]
        yield _row(number, registry.cards[cluster], registry.parents[registry.cards[cluster].parent].label, shown)


def _row(number: int, card: ClusterCard, parent: str, titles: Iterable[str]) -> str:
    label = card.label if card.coherent else f"{card.label} (grab-bag)"
    cells = (str(number), label, parent, f"{card.cohesion:.2f}", "; ".join(titles))
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": round(fmean(values), 3), "least": round(min(values), 3), "most": round(max(values), 3)}


def report(figures: Figures, lines: Iterable[str], command: str) -> str:
    def range_of(spread: dict[str, float]) -> str:
        return f"{spread['mean']:.3f} ({spread['least']:.3f} to {spread['most']:.3f})"

    out = ["# Quality of the clusters", "", f"    {command}", "", "## Agreement with a field that was held back", ""]
    out += [
        "Adjusted mutual information with the field's first value (1 the same, 0 chance); the same text and number of",
        "clusters for all; mean of three seeds (least to most). Last, for what the text holds of the field at all: the",
        "predictions of a logistic regression on the same vectors, trained on the field, for videos it did not see.",
        "",
        "| catalogue | videos | values | clusters | registry | MiniLM, k-means | TF-IDF, SVD, k-means | trained |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in figures.clusters.items():
        methods = (range_of(row[method]) for method in ("registry", "minilm_kmeans", "tfidf_svd_kmeans"))
        cells = (f"{row['videos']:,}", row["values"], row["clusters"], *methods, row["trained"])
        out.append(f"| {name} | {' | '.join(map(str, cells))} |")
    out += [
        "",
        "## Grab-bags",
        "",
        "Purity: share of videos whose value is the commonest of their cluster. Random groups have the average size.",
        "",
        "| catalogue | clusters | marked | videos in them | purity there | purity elsewhere | random groups marked |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in figures.grab_bags.items():
        out.append(f"| {name} | {' | '.join('-' if value is None else str(value) for value in row.values())} |")
    out += [
        "",
        "## Parents",
        "",
        "Agreement of the parents with the field, and mean cosine of the videos to their parent's centroid.",
        "Last: share of clusters whose pair of codes is another's too.",
        "",
        "| catalogue | clusters | parents | Ward's cut | cosine | residual quantisation | cosine | codes shared |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in figures.parents.items():
        cells = (
            row["clusters"],
            row["parents"],
            *row["ward_cut"].values(),
            *row["residual_quantisation"].values(),
        )
        out.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return "\n".join([*out, "", "## A sample of clusters", "", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", nargs="*", metavar="CATALOGUE FIELD", help="pairs")
    parser.add_argument("--debian", action="store_true", help="add packages of the Debian archive")
    parser.add_argument("--seed", type=int, default=0, help="of the sample of Debian packages")
    parser.add_argument("--work", type=Path, help="folder to keep the vectors in")
    parser.add_argument("--result", type=Path, help="file to write")
    arguments = parser.parse_args()
    if len(arguments.given) % 2:
        parser.error("give each CATALOGUE with its FIELD")
    pairs = [(Path(path), name) for path, name in zip(arguments.given[::2], arguments.given[1::2], strict=True)]
    sources = [
        Source(path.name, read_catalogue(path), name, read_field(path, name))
        for path, name in [*pairs, (DEMO, "topic")]
    ]
    if arguments.debian:
        sources.append(debian(arguments.seed))
    figures = Figures()
    with tempfile.TemporaryDirectory() as temporary:
        embedder = StoredVectors(arguments.work or Path(temporary) / "vectors", MiniLM(tokenizer_path(load_settings())))
        for source in sources:
            measure(source, embedder, figures)
        lines = list(sample(sources[0], embedder))
    shown = [f"{path.name} {name}" for path, name in pairs] + ["--debian"] * arguments.debian
    text = report(figures, lines, f".venv/bin/python benchmarks/clusters_quality.py {' '.join(shown)}")
    print(text)
    if arguments.result:
        before = arguments.result.read_text() if arguments.result.exists() else ""
        judged = JUDGED + before.partition(JUDGED)[2] if JUDGED in before else ""
        arguments.result.write_text(f"{text}\n{judged}" if judged else text)
    print(orjson.dumps({"ami": figures.clusters, "grab_bags": figures.grab_bags, "parents": figures.parents}).decode())


if __name__ == "__main__":
    main()
