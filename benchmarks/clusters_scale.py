"""Clusters at scale: build a large catalogue in bounded memory, stopped once by SIGKILL; open and ask a large snapshot.

    .venv/bin/python benchmarks/clusters_scale.py [--videos 100000] [--snapshot-videos 10000000] [--seed 0]
        [--result benchmarks/clusters_scale.md]

The catalogue is made of the packaged demo titles, recombined within their topic; every text is distinct. Stages run in
processes of their own, so that their peak memory is theirs. Files go to a temporary folder and are removed. Ends with
one JSON object.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from agents.clusters.catalogue import read_catalogue
from agents.clusters.embedding import MiniLM, video_text
from agents.clusters.files import PACKAGED, load_registry, load_snapshot, write_snapshot
from agents.localstack.assets import tokenizer_path
from agents.settings import load_settings
from streams.identifiers import video_key
from streams.registry import Registry, TextColumn, VideoTable, bucket_offsets

DEMO = PACKAGED.parent / "demo_catalogue.jsonl"
KILLED_AT = 0.3
"""Share of the texts stored when the build is killed."""
BATCHES = (1_000, 100_000)
KNOWN = 0.9
LOOKUPS = 300_000
"""Of each kind, so that the median is that of a process at work; the first batch meets an unread file."""


def recombined(videos: int, seed: int) -> Iterator[dict[str, Any]]:
    """Videos with the head of one demo title and the tail of another of its topic, and tags of both."""
    topics: dict[str, list[dict[str, Any]]] = {}
    for line in DEMO.read_bytes().splitlines():
        row = orjson.loads(line)
        topics.setdefault(row["topic"], []).append(row)
    names = sorted(topics)
    chance = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < videos:
        rows = topics[chance.choice(names)]
        first, second = chance.choice(rows), chance.choice(rows)
        head, tail = first["title"].split(), second["title"].split()
        title = " ".join([*head[: -(-len(head) // 2)], *tail[len(tail) // 2 :]])
        tags = sorted({*first["tags"], *second["tags"]})
        tags = chance.sample(tags, min(len(tags), chance.randint(1, 4)))
        text = video_text(title, tags, first["category"])
        if text in seen:
            continue
        seen.add(text)
        yield {"video_id": f"r{len(seen):08}", "title": title, "tags": tags, "category": first["category"]}


def build_stage(catalogue: Path, work: Path, out: Path) -> dict[str, Any]:
    """Build and write a registry, its vectors kept in `work`; figures of this process."""
    from agents.clusters.build import build
    from agents.clusters.vectors import StoredVectors

    started = time.perf_counter()
    read = read_catalogue(catalogue)
    reading = time.perf_counter() - started
    embedder = StoredVectors(work, MiniLM(tokenizer_path(load_settings())))
    texts = [video_text(video.title, video.tags, video.category) for video in read.videos]
    already: list[int] = []
    started, processor = time.perf_counter(), time.process_time()
    embedder.embed(texts, lambda done, _: already.append(done) if not already else None)
    embedding, embedding_processor = time.perf_counter() - started, time.process_time() - processor
    after_embedding = peak_rss_mb()
    started, processor = time.perf_counter(), time.process_time()
    snapshot = build(read, embedder)
    write_snapshot(snapshot, out)
    return {
        "videos": len(read.videos),
        "distinct_texts": len(set(texts)),
        "read_seconds": round(reading, 1),
        "already_embedded": already[0],
        "embed_seconds": round(embedding, 1),
        "embed_per_second": round((len(texts) - already[0]) / embedding, 1),
        "embed_per_cpu_second": round((len(texts) - already[0]) / embedding_processor, 1),
        "cluster_seconds": round(time.perf_counter() - started, 1),
        "cluster_cpu_seconds": round(time.process_time() - processor, 1),
        "clusters": len(snapshot.cards),
        "placement": snapshot.history[0]["placement"],
        "peak_rss_mb_embedding": after_embedding,
        "peak_rss_mb": peak_rss_mb(),
    }


def ask_stage(folder: Path) -> dict[str, Any]:
    """Open a snapshot with nothing of it in memory, then look up batches; figures of this process."""
    for path in folder.iterdir():
        forget(path)
    started = time.perf_counter()
    registry = load_registry(folder)
    opened = time.perf_counter() - started
    started = time.perf_counter()
    load_registry(folder)
    again = time.perf_counter() - started
    chance = np.random.default_rng(1)
    figures: dict[str, Any] = {"open_seconds": round(opened, 3), "open_again_seconds": round(again, 3)}
    for size in BATCHES:
        for hashed in (False, True):
            lookups = [lookup(registry, size, chance, hashed=hashed) for _ in range(max(15, LOOKUPS // size))]
            name = f"lookup{'_with_hash' if hashed else ''}_us_{size}"
            figures |= {f"{name}_first": round(lookups[0], 3), name: round(float(np.median(lookups[1:])), 3)}
    return figures | {"peak_rss_mb": peak_rss_mb()}


def lookup(registry: Registry, size: int, chance: np.random.Generator, *, hashed: bool) -> float:
    """Microseconds a video for one batch of videos never asked before, nine of ten known."""
    numbers = chance.integers(0, round(len(registry) / KNOWN), size)
    ids = [f"v{number:09}" for number in numbers.tolist()]
    keys = np.fromiter(map(video_key, ids), np.uint64, size)
    ask: Callable[[], npt.NDArray[np.int32]]
    ask = partial(registry.clusters_of, ids) if hashed else partial(registry.clusters_of_keys, keys)
    started = time.perf_counter()
    found = ask()
    microseconds = (time.perf_counter() - started) / size * 1e6
    if not np.array_equal(found >= 0, numbers < len(registry)):
        raise SystemExit("the snapshot lost videos, or holds some that nobody gave it")
    return microseconds


def forget(path: Path) -> None:
    """Ask the system to drop a file's pages from memory."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def synthetic_snapshot(folder: Path, videos: int) -> None:
    """The packaged clusters with `videos` videos v000000000 onwards, each with a title of 40 bytes."""
    base = load_snapshot(PACKAGED)
    keys = np.fromiter((video_key(f"v{number:09}") for number in range(videos)), np.uint64, videos)
    order = np.argsort(keys)
    digits = (order[:, None] // 10 ** np.arange(8, -1, -1)) % 10 + ord("0")
    ids = np.concatenate([np.full((videos, 1), ord("v"), np.uint8), digits.astype(np.uint8)], axis=1)
    titles = np.full((videos, 40), ord("t"), np.uint8)
    clusters = (order % len(base.cards)).astype(np.int32)
    keys = keys[order]
    columns = [TextColumn(text.ravel(), np.arange(videos + 1) * text.shape[1]) for text in (ids, titles)]
    table = VideoTable(keys, clusters, columns[0], columns[1], bucket_offsets(keys))
    write_snapshot(replace(base, videos=table), folder)


def peak_rss_mb() -> int:
    """Largest resident memory so far, mapped files included (`VmHWM`)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) // 1024


def stage(name: str, *arguments: Path) -> dict[str, Any]:
    """Run a stage in a process of its own."""
    done = subprocess.run(command(name, *arguments), stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = orjson.loads(done.stdout)
    print(f"{name} {arguments[0].name}: {orjson.dumps(result).decode()}", flush=True)
    return result


def command(name: str, *arguments: Path) -> list[str]:
    return [sys.executable, __file__, "--stage", name, *map(str, arguments)]


def killed_build(catalogue: Path, work: Path, out: Path, videos: int) -> dict[str, int]:
    """Start a build, kill it without warning, and return the files it left with their times of change."""
    process = subprocess.Popen(command("build", catalogue, work, out))
    try:
        while process.poll() is None and stored(work) < KILLED_AT * videos:
            time.sleep(0.2)
        if process.poll() is not None:
            raise SystemExit("the build ended before it could be killed; give more --videos")
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    print(f"killed after {stored(work):,} of {videos:,} texts were stored", flush=True)
    return times_of(work)


def stored(work: Path) -> int:
    """Texts stored so far."""
    return sum(len(np.load(path, mmap_mode="r")) for path in work.glob("part-*.npy"))


def times_of(work: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in work.glob("part-*.npy")}


def measure(videos: int, snapshot_videos: int, seed: int, folder: Path) -> dict[str, Any]:
    catalogue, work = folder / "catalogue.jsonl", folder / "work"
    lines = [orjson.dumps(row) for row in recombined(videos, seed)]
    catalogue.write_bytes(b"\n".join(lines))
    before = killed_build(catalogue, work, folder / "registry", videos)
    built = stage("build", catalogue, work, folder / "registry")
    after = times_of(work)
    half = folder / "half.jsonl"
    half.write_bytes(b"\n".join(lines[: videos // 2]))
    smaller = stage("build", half, work, folder / "half")
    resumed = bool(before) and all(after.get(name) == changed for name, changed in before.items())
    started = time.perf_counter()
    synthetic_snapshot(folder / "snapshot", snapshot_videos)
    written = time.perf_counter() - started
    asked = stage("ask", folder / "snapshot")
    million = 1_000_000 / videos
    hours = (1_000_000 / built["embed_per_second"] + million * built["cluster_seconds"]) / 3600
    per_video = (built["peak_rss_mb"] - smaller["peak_rss_mb"]) / (videos - videos // 2)
    return {
        "videos": built["videos"],
        "distinct_texts": built["distinct_texts"],
        "clusters": built["clusters"],
        "embed_per_second": built["embed_per_second"],
        "embed_per_cpu_second": built["embed_per_cpu_second"],
        "embed_seconds_resumed": built["embed_seconds"],
        "texts_kept_from_killed_build": built["already_embedded"],
        "cluster_seconds": built["cluster_seconds"],
        "cluster_cpu_seconds": built["cluster_cpu_seconds"],
        "peak_rss_mb": built["peak_rss_mb"],
        "peak_rss_mb_half": smaller["peak_rss_mb"],
        "rss_kb_per_video": round(per_video * 1024, 1),
        "extrapolated_1m_hours": round(hours, 2),
        "extrapolated_1m_rss_mb": round(built["peak_rss_mb"] + per_video * (1_000_000 - videos)),
        "resumed": resumed and built["already_embedded"] > 0,
        "snapshot_videos": snapshot_videos,
        "snapshot_mb": sum(path.stat().st_size for path in (folder / "snapshot").iterdir()) // 2**20,
        "snapshot_write_seconds": round(written, 1),
        "open_seconds": asked["open_seconds"],
        "lookup_us": asked[f"lookup_us_{BATCHES[0]}"],
        "lookup_with_hash_us": asked[f"lookup_with_hash_us_{BATCHES[0]}"],
        "lookups": asked,
        "seed": seed,
    }


def report(figures: dict[str, Any], arguments: Sequence[str]) -> str:
    """The result as markdown."""
    asked = figures["lookups"]
    rows = [
        ("texts embedded a second", f"{figures['embed_per_second']:,}"),
        ("the same a second of processor time", f"{figures['embed_per_cpu_second']:,}"),
        ("kept from the killed build", f"{figures['texts_kept_from_killed_build']:,} texts"),
        ("clusters", f"{figures['clusters']:,}"),
        ("clustering, naming, calibration, writing", f"{figures['cluster_seconds']:,} s"),
        ("the same in processor time", f"{figures['cluster_cpu_seconds']:,} s"),
        ("peak resident memory, mapped files included", f"{figures['peak_rss_mb']:,} MB"),
        ("the same for half of the videos", f"{figures['peak_rss_mb_half']:,} MB"),
        ("a million videos, extrapolated in a line", f"{figures['extrapolated_1m_hours']} hours"),
        (f"snapshot of {figures['snapshot_videos']:,} videos", f"{figures['snapshot_mb']:,} MB"),
        ("opened, nothing of it in memory", f"{figures['open_seconds']} s"),
    ]
    for size in BATCHES:
        for words, name in (("", f"lookup_us_{size}"), (", ids hashed too", f"lookup_with_hash_us_{size}")):
            value = f"{asked[name]} µs a video, first batch {asked[f'{name}_first']}"
            rows.append((f"look-up in batches of {size:,}{words}", value))
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"""# Clusters at scale

`{" ".join(["python", "benchmarks/clusters_scale.py", *arguments])}` on {os.cpu_count()} cores of {platform.machine()}.

| {figures["videos"]:,} videos | |
| --- | --- |
{table}

The build was killed by SIGKILL and started again: what was stored before was not computed again
(resumed: {figures["resumed"]}).

What grows with the catalogue: the videos (title, tags, categories as Python objects), their texts, the terms that
clusters are named by and the mapped vectors (1.5 KB a video, read from the file; the system may page them out),
together {figures["rss_kb_per_video"]} KB a video between half and all. What does not: k-means copies 200,000 videos at
most, Ward's clustering 6,000 or four a cluster, similarities are computed 8,192 videos at a time. Other processes
share the machine: where wall time and processor time part, the processor time is the build's own.

```json
{orjson.dumps(figures, option=orjson.OPT_INDENT_2).decode()}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=100_000)
    parser.add_argument("--snapshot-videos", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path, help="write the result as markdown")
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if given.stage:
        name, *paths = given.stage
        stages: dict[str, Callable[..., dict[str, Any]]] = {"build": build_stage, "ask": ask_stage}
        print(orjson.dumps(stages[name](*map(Path, paths))).decode())
        return
    with tempfile.TemporaryDirectory(prefix="clusters-scale-") as folder:
        figures = measure(given.videos, given.snapshot_videos, given.seed, Path(folder))
    if given.result:
        given.result.write_text(report(figures, sys.argv[1:]))
    print(orjson.dumps(figures).decode())


if __name__ == "__main__":
    main()
