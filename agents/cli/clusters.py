"""`personas clusters`: build a registry from a catalogue, extend it by new videos, show what is in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

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
from agents.localstack.assets import AssetError, tokenizer_path
from agents.localstack.progress import Step, shown_progress
from agents.settings import Settings, load_settings
from streams.registry import ClusterCard, Registry

_SHOWN_BAD_LINES: Final = 5


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
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def build(
    catalogue: Path, out: Path | None, count: int | None, events: Path | None, seed: int, version: int, as_json: bool
) -> None:
    """Cluster the videos of CATALOGUE and name the clusters.

    CATALOGUE is JSON lines, CSV or TSV, .gz or not, with video_id, title, tags and category; other fields are
    ignored, lines that cannot be used are reported and left out. The same catalogue gives the same registry.

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
        with _embedding() as (embedder, progress):
            snapshot = build_registry(
                read, embedder, clusters=count, watches=watches, seed=seed, version=version, progress=progress
            )
        checksum = write_snapshot(snapshot, folder)
    bad_lines = [asdict(line) for line in read.bad_lines]
    for line in read.bad_lines[:_SHOWN_BAD_LINES]:
        click.echo(f"{catalogue} line {line.number} left out: {line.reason}", err=True)
    if len(bad_lines) > _SHOWN_BAD_LINES:
        click.echo(f"... and {len(bad_lines) - _SHOWN_BAD_LINES} more lines", err=True)
    if read.duplicates:
        numbers = ", ".join(map(str, read.duplicates[:_SHOWN_BAD_LINES]))
        click.echo(f"{len(read.duplicates)} lines replaced by a later one with the same video_id: {numbers}", err=True)
    summary = {
        "registry": str(folder),
        "version": version,
        "checksum": checksum,
        "clusters": len(snapshot.cards),
        "videos": len(read.videos),
        "threshold": snapshot.threshold,
        "sensitive": sum(card.sensitive for card in snapshot.cards),
        "bad_lines": bad_lines,
        "duplicates": list(read.duplicates),
    }
    text = f"{folder}: version {version}, {len(snapshot.cards)} clusters of {len(read.videos):,} videos"
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
        raise click.UsageError(f"{folder} has no cluster {cluster}; its ids are 0 to {max(opened.cards)}")
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
        parent = Path() if folder == PACKAGED else folder.parent
        target = out or parent / f"registry-v{snapshot.version + 1}"
        _refuse_existing(target)
        offered = read_catalogue(videos) if videos is not None else read_unknown_videos(settings)
        with _embedding() as (embedder, progress):
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
def _embedding() -> Iterator[tuple[Any, Callable[[int, int], None]]]:
    """An embedder, and its progress shown on stderr; downloads the tokenizer if it is missing."""
    from agents.clusters.embedding import MiniLM

    with shown_progress() as report:
        tokenizer = tokenizer_path(load_settings(), report)

        def progress(done: int, total: int) -> None:
            report(Step("videos", f"embedding {total:,}", done, total, finished=done == total))

        yield MiniLM(tokenizer), progress


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
        "counts": manifest["counts"],
        "history": manifest["history"],
        "clusters": [{**asdict(card), "similar": registry.similar(card.cluster_id)[:5]} for card in shown],
    }


def _show_all(console: Console, folder: Path, registry: Registry, manifest: dict[str, Any]) -> None:
    counts = manifest["counts"]
    console.print(
        Text(
            f"{folder}: version {registry.version}, {counts['clusters']} clusters, {counts['videos']:,} videos, "
            f"{counts['unassigned']:,} unassigned"
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
    return f"{card.label} (sensitive)" if card.sensitive else card.label


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
        "similar": near,
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(table)
