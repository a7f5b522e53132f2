"""`personas clusters`: build a registry from a catalogue, renew and extend it, show and evaluate what is in it."""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agents.clusters.files import (
    PACKAGED,
    RegistryError,
    load_registry,
    load_snapshot,
    read_manifest,
    verify,
    write_snapshot,
)
from agents.clusters.snapshot import FEWEST_VIEWERS, LEAST_VIEWERS, view
from agents.localstack.assets import AssetError, tokenizer_path
from agents.localstack.progress import Step, shown_progress
from agents.settings import Settings, load_settings
from streams.records import UNASSIGNED
from streams.registry import ClusterCard, Registry, Wording

if TYPE_CHECKING:
    from agents.clusters.catalogue import Catalogue

_SHOWN_BAD_LINES: Final = 5
_SECONDS_PER_RATE: Final = 10


def _viewing_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of the commands that put a catalogue's text on cards."""
    flag = click.option(
        "--text-from-viewing",
        is_flag=True,
        help="The titles and tags of CATALOGUE are not public but were learned from viewing; needs --events.",
    )
    least = click.option(
        "--least-viewers",
        type=click.IntRange(min=FEWEST_VIEWERS),
        default=LEAST_VIEWERS,
        show_default=True,
        help="With --text-from-viewing: viewers that must stand behind a title or label for it to be shown.",
    )
    return flag(least(command))


@click.group()
def clusters() -> None:
    """Build and show interest clusters.

    A registry is a folder with one version of the clusters and of the videos in them. Workers use the one that
    PERSONAS_REGISTRY names, or a packaged demo registry.
    """


@clusters.command()
@click.argument("catalogue", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write; must not exist.  [registry-v1]")
@click.option("-k", "count", type=click.IntRange(min=2), help="Number of clusters; by default one per 22 videos.")
@click.option(
    "--events",
    type=click.Path(path_type=Path),
    help="Event file (user_id, video_id): adds viewers per cluster, and the prior becomes the mean viewer's shares.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the samples that large catalogues start from.")
@click.option(
    "--registry-version",
    "version",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Version to give; above the one in use, if there is one.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder to keep the vectors in, also for later builds.  [OUT.work, removed at the end]",
)
@_viewing_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def build(
    catalogue: Path,
    out: Path | None,
    count: int | None,
    events: Path | None,
    seed: int,
    version: int,
    work: Path | None,
    text_from_viewing: bool,
    least_viewers: int,
    as_json: bool,
) -> None:
    """Cluster the videos of CATALOGUE and name the clusters.

    CATALOGUE is JSON lines, CSV or TSV, .gz or not, with video_id, title, tags and category; other fields are
    ignored, lines that cannot be used are reported and left out. The same catalogue gives the same registry. A build
    that was stopped goes on where it was when the same command is given again.

    \b
    personas clusters build videos.jsonl.gz --out registry-v1
    personas clusters build films.tsv -k 64 --events watches.jsonl --json
    """
    from agents.clusters.build import build as build_registry
    from agents.clusters.catalogue import read_catalogue
    from agents.clusters.events import read_watches

    folder = out or Path(f"registry-v{version}")
    with _one_line_errors():
        _refuse_existing(folder)
        read = read_catalogue(catalogue)
        watches = read_watches(events) if events else None
        with _embedding(work or _work_beside(folder), keep=work is not None) as (embedder, progress):
            snapshot = build_registry(
                read,
                embedder,
                clusters=count,
                watches=watches,
                seed=seed,
                version=version,
                progress=progress,
                least_viewers=least_viewers if text_from_viewing else None,
            )
            checksum = write_snapshot(snapshot, folder)
    _show_left_out(catalogue, read)
    summary = {
        "registry": str(folder),
        "version": version,
        "checksum": checksum,
        "clusters": len(snapshot.cards),
        "videos": len(read.videos),
        "threshold": snapshot.threshold,
        "sensitive": sum(card.sensitive for card in snapshot.cards),
        "incoherent": sum(not card.coherent for card in snapshot.cards),
        "in_parents_words": sum(card.wording is Wording.PARENT for card in snapshot.cards),
        "without_words": sum(card.wording is Wording.NONE for card in snapshot.cards),
        "parents": len(snapshot.parents),
        "bad_lines": [asdict(line) for line in read.bad_lines],
        "duplicates": list(read.duplicates),
    }
    statable = sum(card.statable for card in snapshot.cards)
    text = (
        f"{folder}: version {version}, {len(snapshot.cards)} clusters of {len(read.videos):,} videos; personas may name"
        f" {statable} of them"
    )
    _print(summary, text, as_json=as_json)


@clusters.command()
@click.argument("registry", type=click.Path(path_type=Path))
@click.argument("catalogue", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write; must not exist.  [beside REGISTRY]")
@click.option("-k", "count", type=click.IntRange(min=2), help="Number of clusters; by default it grows as CATALOGUE.")
@click.option("--events", type=click.Path(path_type=Path), help="Event file, as for `build`.")
@click.option("--seed", type=int, default=0, show_default=True, help="As for `build`.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder to keep the vectors in: with that of an earlier build only new videos are embedded.",
)
@_viewing_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def rebuild(
    registry: Path,
    catalogue: Path,
    out: Path | None,
    count: int | None,
    events: Path | None,
    seed: int,
    work: Path | None,
    text_from_viewing: bool,
    least_viewers: int,
    as_json: bool,
) -> None:
    """Cluster CATALOGUE anew as the next version of REGISTRY: clusters that persist keep their ids.

    The new version holds the videos of CATALOGUE. A cluster that shares enough of its videos with an old one is that
    one, with its id and, if little changed, its label. Others get new ids; retired ids are never used again, and
    the registry names for each the cluster that took over most of its videos. Transitions and the safe list are of the
    clusters as they were, so the new version has neither. Point PERSONAS_REGISTRY at the new folder and restart the
    workers; keep the old folder beside it.

    \b
    personas clusters rebuild registry-v1 videos.jsonl.gz
    personas clusters rebuild registry-v2 videos.jsonl.gz --events watches.jsonl --out registry-v3 --json
    """
    from agents.clusters.catalogue import read_catalogue
    from agents.clusters.events import read_watches
    from agents.clusters.rebuild import rebuild as rebuild_registry

    with _one_line_errors():
        previous = load_snapshot(registry)
        folder = out or _next_folder(registry, previous.version)
        _refuse_existing(folder)
        read = read_catalogue(catalogue)
        watches = read_watches(events) if events else None
        with _embedding(work or _work_beside(folder), keep=work is not None) as (embedder, progress):
            result = rebuild_registry(
                previous,
                read,
                embedder,
                clusters=count,
                watches=watches,
                seed=seed,
                progress=progress,
                least_viewers=least_viewers if text_from_viewing else None,
            )
            checksum = write_snapshot(result.snapshot, folder)
    _show_left_out(catalogue, read)
    summary = {
        "registry": str(folder),
        "version": result.snapshot.version,
        "checksum": checksum,
        "clusters": len(result.snapshot.cards),
        "videos": len(read.videos),
        "persisted": len(result.persisted),
        "retired": {str(cluster): result.snapshot.successors[cluster] for cluster in result.retired},
        "added": result.added,
        "relabelled": result.relabelled,
        "videos_before_and_after": result.common,
        "stayed_share": result.stayed,
        "prior_mapped_share": result.prior_mapped,
        "transitions_dropped": previous.transitions is not None,
        "safe_dropped": list(previous.safe),
        "threshold": result.snapshot.threshold,
        "bad_lines": [asdict(line) for line in read.bad_lines],
        "duplicates": list(read.duplicates),
    }
    text = (
        f"{folder}: version {result.snapshot.version}, {len(result.snapshot.cards)} clusters of {len(read.videos):,} "
        f"videos; {len(result.persisted)} clusters persist, {len(result.retired)} retired, {len(result.added)} added; "
        f"{result.stayed:.1%} of the videos kept their cluster"
    )
    if previous.transitions is not None:
        click.echo("its transitions were dropped: learn them again with `personas clusters transitions`", err=True)
    if previous.safe:
        dropped = ", ".join(map(str, previous.safe))
        click.echo(f"its safe list was emptied ({dropped}): set it again with `personas clusters safe`", err=True)
    _print(summary, text, as_json=as_json)


@clusters.command()
@click.argument("registry", required=False, type=click.Path(path_type=Path))
@click.option("--cluster", type=int, help="Show this cluster alone, with its terms and neighbours.")
@click.option("--verify", "check", is_flag=True, help="First compare the checksum of every file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(registry: Path | None, cluster: int | None, check: bool, as_json: bool) -> None:
    """Show the clusters of REGISTRY, by default of the one in use.

    \b
    personas clusters show
    personas clusters show registry-v2 --cluster 12
    personas clusters show --json | jq '.clusters[].label'
    """
    folder = registry or _current(load_settings())
    with _one_line_errors():
        if check:
            verify(folder)
        opened = load_registry(folder)
        manifest = read_manifest(folder)
    if cluster is not None and cluster not in opened.cards:
        raise click.UsageError(f"{folder} has no cluster {cluster}; {_instead(opened, cluster)}")
    if as_json:
        click.echo(orjson.dumps(_document(folder, opened, manifest, cluster), option=orjson.OPT_INDENT_2))
        return
    console = Console()
    if cluster is None:
        _show_all(console, folder, opened, manifest)
    else:
        _show_one(console, opened, opened.cards[cluster])


@clusters.command()
@click.argument("registry", required=False, type=click.Path(path_type=Path))
@click.option("--videos", type=click.Path(path_type=Path), help="File of new videos, read as a catalogue.")
@click.option("--topic", is_flag=True, help="Take the videos that workers noted in the unknown-videos topic.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write; must not exist.  [beside REGISTRY]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def extend(registry: Path | None, videos: Path | None, topic: bool, out: Path | None, as_json: bool) -> None:
    """Write the next version of REGISTRY, by default of the one in use: the same clusters, holding new videos.

    A video joins the cluster nearest to its text, or stays unassigned if none is near enough. Without anything to
    add, no version is written. Point PERSONAS_REGISTRY at the new folder and restart the workers; keep the old
    folder beside it.

    \b
    personas clusters extend registry-v1 --topic
    personas clusters extend registry-v1 --videos new.jsonl --out registry-v2
    """
    from agents.clusters.catalogue import read_catalogue
    from agents.clusters.extend import extend as extend_registry
    from agents.clusters.unknown_videos import read_unknown_videos

    if topic == (videos is not None):
        raise click.UsageError("give either --videos FILE or --topic")
    settings = load_settings()
    folder = registry or _current(settings)
    with _one_line_errors():
        snapshot = load_snapshot(folder)
        target = out or _next_folder(folder, snapshot.version)
        _refuse_existing(target)
        offered = read_catalogue(videos) if videos is not None else read_unknown_videos(settings)
        with _embedding(_work_beside(target)) as (embedder, progress):
            result = extend_registry(snapshot, offered, embedder, progress)
        changed = result.placed + result.unassigned > 0
        if changed:
            write_snapshot(result.snapshot, target)
    for line in offered.bad_lines[:_SHOWN_BAD_LINES]:
        click.echo(f"{offered.name} line {line.number} left out: {line.reason}", err=True)
    summary = {
        "registry": str(target if changed else folder),
        "version": result.snapshot.version if changed else snapshot.version,
        "offered": len(offered.videos),
        "known": result.known,
        "placed": result.placed,
        "unassigned": result.unassigned,
        "bad_lines": [asdict(line) for line in offered.bad_lines],
    }
    counts = f"of {len(offered.videos):,} videos {result.placed:,} placed, {result.unassigned:,} unassigned"
    text = f"{target}: version {result.snapshot.version}; {counts}, {result.known:,} known before"
    _print(summary, text if changed else f"nothing to add: {folder} knows all {result.known:,}", as_json=as_json)


@clusters.command()
@click.argument("events", type=click.Path(path_type=Path))
@click.argument("registry", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write; must not exist.  [beside REGISTRY]")
@click.option(
    "--least-viewers",
    type=click.IntRange(min=FEWEST_VIEWERS),
    default=LEAST_VIEWERS,
    show_default=True,
    help="Viewers that must stand behind a transition for it to be kept.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def transitions(events: Path, registry: Path | None, out: Path | None, least_viewers: int, as_json: bool) -> None:
    """Learn from EVENTS what viewers take up after what, and write it as the next version of REGISTRY.

    With it, three quarters of what ranks a persona's novel topics is where other viewers of the same interests went
    next. EVENTS is JSON lines, CSV or TSV, .gz or not, with user_id, video_id and ts in ms. One viewer counts with the
    first 24 clusters that they watched twice, and once for each transition. REGISTRY is by default the one in use; it
    stays as it is. Point PERSONAS_REGISTRY at the new folder and restart the workers; keep the old folder beside it.

    \b
    personas clusters transitions watches.jsonl.gz registry-v1
    personas clusters transitions watches.tsv --least-viewers 100 --out registry-v2 --json
    """
    from agents.clusters.events import read_log
    from agents.clusters.graph import with_transitions

    folder = registry or _current(load_settings())
    with _one_line_errors(), shown_progress() as report:
        snapshot = load_snapshot(folder)
        target = out or _next_folder(folder, snapshot.version)
        _refuse_existing(target)

        def progress(lines: int) -> None:
            report(Step("events", f"read {lines:,} lines"))

        log = read_log(events, view(snapshot, ""), progress)
        report(Step("events", f"{len(log.viewers):,} watches of videos in clusters", finished=True))
        report(Step("graph", "counting transitions"))
        result = with_transitions(snapshot, log, least_viewers)
        checksum = write_snapshot(result, target)
        report(Step("graph", "written", finished=True))
    summary = {"registry": str(target), "version": result.version, "checksum": checksum, **result.history[-1]}
    summary |= {"unplaced": log.unplaced, "bad_lines": log.bad_lines}
    left_out = f"{log.unplaced:,} watches of videos in no cluster and {log.bad_lines:,} bad lines left out"
    text = (
        f"{target}: version {result.version}, {summary['edges']:,} transitions from {len(log.viewers):,} watches of "
        f"{summary['viewers']:,} viewers; {left_out}"
    )
    _print(summary, text, as_json=as_json)


@clusters.command()
@click.argument("registry", required=False, type=click.Path(path_type=Path))
@click.option("--add", "added", multiple=True, metavar="CLUSTER", help="Id or label to put on the list; repeatable.")
@click.option("--remove", "removed", multiple=True, metavar="CLUSTER", help="Id or label to take off; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write; must not exist.  [beside REGISTRY]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def safe(
    registry: Path | None, added: tuple[str, ...], removed: tuple[str, ...], out: Path | None, as_json: bool
) -> None:
    """List the clusters of REGISTRY that may be proposed to teens and kids, or change them in its next version.

    No cluster is on the list by default, and without any, profiles whose events say `teen` or `kids` get no novel
    topics. What they watch is stated all the same. REGISTRY is by default the one in use; a change is written as its
    next version, if it is one. An extension keeps the list, a rebuild empties it.

    \b
    personas clusters safe
    personas clusters safe registry-v1 --add 12 --add "jazz guitar"
    personas clusters safe registry-v2 --remove 12 --out registry-v3 --json
    """
    from agents.clusters.graph import named_clusters, with_safe

    folder = registry or _current(load_settings())
    with _one_line_errors():
        snapshot = load_snapshot(folder)
        put, taken = named_clusters(snapshot.cards, added), named_clusters(snapshot.cards, removed)
        if set(put) & set(taken):
            raise click.UsageError(f"cluster {min(set(put) & set(taken))} is both to be added and removed")
        result = with_safe(snapshot, put, taken)
        if result is not snapshot:
            target = out or _next_folder(folder, snapshot.version)
            write_snapshot(result, target)
            folder = target
    labels = {card.cluster_id: card.label for card in result.cards}
    summary = {
        "registry": str(folder),
        "version": result.version,
        "written": result is not snapshot,
        "safe": [{"cluster_id": cluster, "label": labels[cluster]} for cluster in result.safe],
    }
    lines = [f"{folder}: version {result.version}, {len(result.safe)} of {len(labels)} clusters are safe for all ages"]
    lines += [f"{cluster:>6}  {labels[cluster]}" for cluster in result.safe]
    _print(summary, "\n".join(lines), as_json=as_json)


@clusters.command()
@click.argument("catalogue", type=click.Path(path_type=Path))
@click.option("--against", "field", required=True, help="Field or column to hold back and compare with: category, ...")
@click.option("--k", "-k", "count", type=click.IntRange(min=2), default=64, show_default=True, help="Clusters to make.")
@click.option("--seed", type=int, default=0, show_default=True, help="The first of the seeds.")
@click.option("--seeds", type=click.IntRange(1, 20), default=3, show_default=True, help="How many seeds in a row.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder to keep the vectors in, also for a build.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def evaluate(catalogue: Path, field: str, count: int, seed: int, seeds: int, work: Path | None, as_json: bool) -> None:
    """Compare clusters of CATALOGUE with a field that they were not shown.

    The text of a video is its title, tags and category without FIELD. The measure is adjusted mutual information: 1 if
    the clusters are the field's values, 0 for chance. Of a field with several values the first counts; the second
    column counts each video once for every value. Beside the clusters of `clusters build` stand k-means on the same
    MiniLM vectors and on TF-IDF reduced by SVD, with the same number of clusters.

    \b
    personas clusters evaluate videos.jsonl.gz --against category
    personas clusters evaluate films.tsv --against genre -k 32 --seeds 5 --json
    """
    from agents.clusters.catalogue import read_catalogue, read_field
    from agents.clusters.evaluate import evaluate as measure

    with _one_line_errors(), tempfile.TemporaryDirectory() as temporary:
        read = read_catalogue(catalogue)
        reference = read_field(catalogue, field)
        with _embedding(work or Path(temporary) / "vectors", keep=work is not None) as (embedder, progress):
            found = measure(
                read,
                reference,
                field,
                embedder,
                clusters=count,
                seeds=range(seed, seed + seeds),
                progress=progress,
                step=lambda name: click.echo(f"clustering: {name}", err=True),
            )
    summary = {
        "catalogue": str(catalogue),
        "against": field,
        "videos": found.videos,
        "values": found.values,
        "clusters": found.clusters,
        "seeds": found.seeds,
        "ami": {name: _spread(each.first_value) for name, each in found.methods.items()},
        "ami_all_values": {name: _spread(each.all_values) for name, each in found.methods.items()},
    }
    if as_json:
        click.echo(orjson.dumps(summary))
        return
    console = Console()
    heading = f"{found.videos:,} videos, {found.clusters} clusters, {found.values} values of {field} held back"
    console.print(Text(f"{catalogue}: {heading}"), soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for name in ("method", "agreement", "from - to", "all values", "from - to"):
        table.add_column(name, no_wrap=True, justify="left" if name == "method" else "right")
    for name in found.methods:
        cells = [name]
        for kind in ("ami", "ami_all_values"):
            spread = summary[kind][name]  # type: ignore[index]
            cells += [f"{spread['mean']:.3f}", f"{spread['least']:.3f} - {spread['most']:.3f}"]
        table.add_row(*cells)
    console.print(table)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": round(statistics.fmean(values), 4), "least": min(values), "most": max(values)}


@contextmanager
def _one_line_errors() -> Iterator[None]:
    from agents.clusters.catalogue import CatalogueError
    from agents.kafka_admin import KafkaRefused, KafkaUnavailable

    try:
        yield
    except (RegistryError, CatalogueError, AssetError, KafkaRefused, KafkaUnavailable) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


@contextmanager
def _embedding(work: Path, *, keep: bool = False) -> Iterator[tuple[Any, Callable[[int, int], None]]]:
    """An embedder that stores its vectors in `work`, and its progress shown on stderr.

    The folder is removed at the end unless it is to be kept or the work was stopped. Downloads the tokenizer if it is
    missing.
    """
    from agents.clusters.embedding import MiniLM
    from agents.clusters.vectors import MODEL_FILE, StoredVectors

    with shown_progress() as report:
        tokenizer = tokenizer_path(load_settings(), report)
        try:
            yield StoredVectors(work, MiniLM(tokenizer)), _shown_rate(report)
        except BaseException:
            if any(work.glob("part-*")):
                click.echo(f"the vectors so far are in {work}: the same command goes on from there", err=True)
            elif not keep and (work / MODEL_FILE).exists():
                shutil.rmtree(work, ignore_errors=True)
            raise
    if not keep:
        shutil.rmtree(work, ignore_errors=True)


def _shown_rate(report: Callable[[Step], None]) -> Callable[[int, int], None]:
    """Progress with the rate of this run and the time left, put into words every ten seconds."""
    first: tuple[float, int] | None = None
    shown = 0.0
    words = ""

    def progress(done: int, total: int) -> None:
        nonlocal first, shown, words
        now = time.monotonic()
        if first is None:
            first, shown = (now, done), now
        seconds, embedded = now - first[0], done - first[1]
        if embedded and (done == total or now - shown >= _SECONDS_PER_RATE):
            rate = embedded / seconds
            left = f", {(total - done) / rate / 60:.1f} minutes left" if done < total else ""
            shown, words = now, f", {rate:,.0f} a second{left}"
        report(Step("videos", f"embedding {total:,}{words}", done, total, finished=done == total))

    return progress


def _show_left_out(path: Path, read: Catalogue) -> None:
    for line in read.bad_lines[:_SHOWN_BAD_LINES]:
        click.echo(f"{path} line {line.number} left out: {line.reason}", err=True)
    if len(read.bad_lines) > _SHOWN_BAD_LINES:
        click.echo(f"... and {len(read.bad_lines) - _SHOWN_BAD_LINES} more lines", err=True)
    if read.duplicates:
        numbers = ", ".join(map(str, read.duplicates[:_SHOWN_BAD_LINES]))
        click.echo(f"{len(read.duplicates)} lines replaced by a later one with the same video_id: {numbers}", err=True)


def _instead(registry: Registry, cluster: int) -> str:
    if cluster not in registry.successors:
        return f"its ids are {min(registry.cards)} to {max(registry.cards)}"
    heir = registry.successors[cluster]
    return "it was retired, with no successor" if heir == UNASSIGNED else f"it was retired, its successor is {heir}"


def _work_beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.work")


def _next_folder(registry: Path, version: int) -> Path:
    parent = Path() if registry == PACKAGED else registry.parent
    return parent / f"registry-v{version + 1}"


def _refuse_existing(folder: Path) -> None:
    """Before the long work, not after it."""
    if folder.exists():
        raise RegistryError(f"{folder} exists; a registry never changes, so give another --out or remove it")


def _current(settings: Settings) -> Path:
    return PACKAGED if settings.registry == Path() else settings.registry


def _print(summary: dict[str, Any], text: str, *, as_json: bool) -> None:
    click.echo(orjson.dumps(summary) if as_json else text)


def _document(folder: Path, registry: Registry, manifest: dict[str, Any], cluster: int | None) -> dict[str, Any]:
    shown = registry.cards.values() if cluster is None else [registry.cards[cluster]]
    return {
        "registry": str(folder),
        "version": registry.version,
        "checksum": registry.checksum,
        "lineage": registry.lineage,
        "successors": {str(retired): live for retired, live in registry.successors.items()},
        "counts": manifest["counts"],
        "history": manifest["history"],
        "transitions": None if registry.transitions is None else len(registry.transitions),
        "clusters": [
            {
                **asdict(card),
                "statable": card.statable,
                "similar": registry.similar(card.cluster_id)[:5],
                "safe": card.cluster_id in registry.safe,
                "leads_to": _edges(registry, card.cluster_id),
            }
            for card in shown
        ],
        "parents": [asdict(parent) for parent in registry.parents.values()],
    }


def _edges(registry: Registry, cluster: int) -> list[dict[str, Any]]:
    """Transitions from a cluster, the strongest first."""
    if registry.transitions is None:
        return []
    edges = registry.transitions.of([*registry.cards].index(cluster))
    return [
        {"cluster_id": target, "viewers": viewers, "rate": round(rate, 4), "lift": round(lift, 3)}
        for target, viewers, rate, lift in zip(
            edges.targets.tolist(), edges.viewers.tolist(), edges.rates.tolist(), edges.lifts.tolist(), strict=True
        )
    ]


def _show_all(console: Console, folder: Path, registry: Registry, manifest: dict[str, Any]) -> None:
    counts = manifest["counts"]
    console.print(
        Text(
            f"{folder}: version {registry.version}, {counts['clusters']} clusters, {counts['videos']:,} videos, "
            f"{counts['unassigned']:,} unassigned"
            + ("" if registry.transitions is None else f", {len(registry.transitions):,} transitions")
            + (f", {len(registry.safe)} safe for all ages" if registry.safe else "")
        ),
        soft_wrap=True,
    )
    label_width = max(len(_label(card)) for card in registry.cards.values())
    table = Table(box=None, pad_edge=False)
    table.add_column("id", justify="right", no_wrap=True)
    table.add_column("label", no_wrap=True)
    table.add_column("videos", justify="right", no_wrap=True)
    table.add_column("cohesion", justify="right", no_wrap=True)
    # What is left of the line; a longer column would squeeze the others out.
    table.add_column("titles", no_wrap=True, overflow="ellipsis", max_width=max(10, console.width - label_width - 32))
    for card in registry.cards.values():
        titles = " · ".join(card.titles)
        cells = (str(card.cluster_id), _label(card), f"{card.support:,}", f"{card.cohesion:.2f}", titles)
        # Titles are the catalogue's text: shown as they are, never read as markup.
        table.add_row(*map(Text, cells))
    console.print(table)


def _label(card: ClusterCard) -> str:
    marks = {
        "sensitive": card.sensitive,
        "grab-bag": not card.coherent,
        "parent's label": card.wording is Wording.PARENT,
        "no label": card.wording is Wording.NONE,
    }
    shown = ", ".join(mark for mark, applies in marks.items() if applies)
    return f"{card.label} ({shown})" if shown else card.label


def _show_one(console: Console, registry: Registry, card: ClusterCard) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    near = ", ".join(
        f"{registry.cards[other].label} {cosine:.2f}" for other, cosine in registry.similar(card.cluster_id)[:5]
    )
    rows = {
        "cluster": str(card.cluster_id),
        "label": card.label,
        "query": card.query,
        "terms": ", ".join(card.terms),
        "titles": "\n".join(card.titles),
        "videos": f"{card.support:,}",
        "viewers": "not counted" if card.viewers is None else f"{card.viewers:,}",
        "prior": f"{card.prior:.2%}",
        "cohesion": f"{card.cohesion:.2f}",
        "sensitive": "yes" if card.sensitive else "no",
        "grab-bag": "no" if card.coherent else "yes",
        "parent": registry.parents[card.parent].label,
        "words": {Wording.OWN: "its own", Wording.PARENT: "its parent's", Wording.NONE: "none"}[card.wording],
        "stated": "yes" if card.statable else "no",
        "similar": near,
        "safe": "yes" if card.cluster_id in registry.safe else "no",
    }
    if registry.transitions is not None:
        leads_to = [
            f"{registry.cards[edge['cluster_id']].label} {edge['rate']:.1%}, lift {edge['lift']:.1f}"
            for edge in _edges(registry, card.cluster_id)[:5]
        ]
        rows["leads to"] = "\n".join(leads_to) or "nothing with enough viewers"
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(table)
