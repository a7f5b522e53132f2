"""Writes contexts, the pairs that a teacher is to word: `python -m triton_models.distillation.contexts --help`.

They come from catalogues of clusters, with viewers that are simulated, or from the requests of real ones. What is held
out is decided by a hash of each cluster's label, never at random: a cluster is in one part in every catalogue, in every
run, and as the interest that leads to a topic too.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import orjson

from agents.evaluation.cases import UnreadableContexts, read_cases
from streams.cleaning import clean_label
from streams.personas import content_keys, plan
from streams.tasks import InterestTask, NovelTask, WordingTask, split_task
from triton_models.distillation.command import positive, say
from triton_models.distillation.pairs import Pair, json_lines, write_pairs

CATALOGUES: Final = Path(__file__).parent / "catalogues" / "learned"
LEARNED: Final = "learned.jsonl"
HELD_OUT: Final = "held_out.jsonl"
KINDS: Final = {"interest": 53, "topic": 34, "summary": 13}
"""How often a text of each kind is drawn: about as often as a persona holds them."""
FEWER_TITLES: Final = 0.1
"""Share of the interests and topics that come with fewer titles than the cluster has, down to none."""
SUMMARY_INTERESTS: Final = (1, 5)
VIA_WEIGHTS: Final = (3, 9, 2)
"""How often no interest, one or two of them lead to a topic."""
TRIES: Final = 60
"""Draws in a row that give nothing new after which a catalogue is taken to be exhausted."""
_HASH_RANGE: Final = 2**64

HeldOut = Callable[[str], bool]
"""Whether a cluster is held out, by its label."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a catalogue knows of a cluster that texts may speak of."""

    label: str
    titles: tuple[str, ...]


@dataclass(slots=True)
class Contexts:
    """The contexts of both parts, and what was left out."""

    learned: list[Pair] = field(default_factory=list)
    held_out: list[Pair] = field(default_factory=list)
    duplicates: int = 0
    mixed: int = 0
    """Of requests, those that speak of clusters of both parts: they belong to neither."""
    _lines: set[str] = field(default_factory=set)

    def add(self, pair: Pair, held_out: HeldOut) -> bool:
        """Put a context into its part; False if there is one with the same line, or it belongs to neither."""
        parts = {held_out(label) for label in labels_of(pair.task)}
        if len(parts) > 1:
            self.mixed += 1
            return False
        if pair.line in self._lines:
            self.duplicates += 1
            return False
        self._lines.add(pair.line)
        (self.held_out if parts == {True} else self.learned).append(pair)
        return True


def main() -> None:
    """The command."""
    options = _arguments()
    contexts = Contexts()
    try:
        held_out = _held_out(options.hold_out)
        for path in options.requests:
            say(f"{path}: reading requests")
            for pair in requested(path):
                contexts.add(pair, held_out)
        for path in [] if options.requests and not options.catalogues else options.catalogues or [CATALOGUES]:
            for file in json_lines(path):
                clusters = read_catalogue(file)
                found = simulate(contexts, file.stem, clusters, options.count, options.seed, held_out)
                say(f"{file.stem}: {found} contexts of {len(clusters)} clusters")
        write_pairs(options.out / LEARNED, contexts.learned)
        write_pairs(options.out / HELD_OUT, contexts.held_out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(_figures(contexts, options.out)))


def simulate(
    contexts: Contexts, catalogue: str, clusters: Sequence[Cluster], count: int, seed: int, held_out: HeldOut
) -> int:
    """Add `count` contexts of simulated viewers of a catalogue, fewer where it holds no more; how many were added.

    Each part gets as many as it has of the clusters. The same seed gives the same contexts, and a larger count the same
    ones first.
    """
    added = 0
    for held in (False, True):
        own = [cluster for cluster in clusters if held_out(cluster.label) is held]
        wanted = round(count * len(own) / len(clusters)) if clusters else 0
        draw = random.Random(f"{seed}/{catalogue}/{held}")
        left = TRIES
        while own and wanted and left:
            if contexts.add(Pair(catalogue, drawn(own, draw)), held_out):
                added, wanted, left = added + 1, wanted - 1, TRIES
            else:
                left -= 1
    return added


def drawn(clusters: Sequence[Cluster], draw: random.Random) -> WordingTask:
    """The task of one text about a viewer who watches some of the clusters: an interest, a topic or a summary."""
    (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
    if kind == "summary":
        count = min(draw.randint(*SUMMARY_INTERESTS), len(clusters))
        watched = draw.sample(clusters, count)
        return WordingTask((), (), tuple(zip((c.label for c in watched), _shares(count, draw), strict=True)))
    if kind == "interest":
        cluster = draw.choice(clusters)
        share = draw.choice(_shares(draw.randint(*SUMMARY_INTERESTS), draw))
        return WordingTask((InterestTask(cluster.label, share, draw.randint(-1, 1), _titles(cluster, draw)),), (), ())
    (via,) = draw.choices(range(len(VIA_WEIGHTS)), VIA_WEIGHTS)
    topic, *watched = draw.sample(clusters, min(1 + via, len(clusters)))
    return WordingTask((), (NovelTask(topic.label, tuple(c.label for c in watched), _titles(topic, draw)),), ())


def requested(path: Path) -> Iterator[Pair]:
    """The contexts of a file of refresh requests as `personas replay` writes it; no viewer's id is in them.

    Raises ValueError that names the file.
    """
    try:
        cases = read_cases(path.read_bytes().splitlines())
    except (OSError, UnreadableContexts) as error:
        raise ValueError(f"cannot use {path}: {error}") from error
    for case in cases:
        task = plan(case.request, content_keys(case.request, ""), {}).task
        for piece in split_task(task) if task is not None else ():
            yield Pair(path.stem, piece)


def read_catalogue(path: Path) -> list[Cluster]:
    """The clusters of a catalogue without the sensitive ones and those without a usable label, by their order in it.

    A line is `{"label": "...", "sensitive": false, "titles": ["...", ...]}`. Raises ValueError with file and line.
    """
    return [Cluster(label, titles) for label, sensitive, titles in _entries(path) if not sensitive]


def labels_of(task: WordingTask) -> list[str]:
    """The labels that a task speaks of, the interests that lead to a topic included."""
    via = [label for topic in task.novel for label in topic.via_labels]
    return [
        *(i.label for i in task.interests),
        *(n.label for n in task.novel),
        *via,
        *(label for label, _ in task.overview),
    ]


def held_out_by_hash(share: float, label: str) -> bool:
    """Whether a label is in the held-out share (0..1) of all labels; upper and lower case are the same label."""
    digest = blake2b(_name(label).encode("utf-8", "replace"), digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "big") < share * _HASH_RANGE


def _held_out(text: str) -> HeldOut:
    """From the value of `--hold-out`: a share, or catalogues whose labels are held out, the sensitive ones too."""
    try:
        share = float(text)
    except ValueError:
        files = json_lines(Path(text))
        names = frozenset(_name(label) for file in files for label, _, _ in _entries(file))
        return lambda label: _name(label) in names
    if not 0 <= share < 1:
        raise ValueError(f"--hold-out {text}: a share is from 0 to below 1")
    return partial(held_out_by_hash, share)


def _name(label: str) -> str:
    return (clean_label(label) or label).casefold()


def _entries(path: Path) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield _entry(orjson.loads(line))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f'{path}:{number} is no cluster: {error!r}; expected {{"label": "...", "sensitive": false, '
                '"titles": ["...", ...]}'
            ) from error


def _entry(entry: Any) -> tuple[str, bool, tuple[str, ...]]:  # noqa: ANN401
    label, sensitive, titles = entry["label"], entry["sensitive"], entry["titles"]
    if not isinstance(label, str) or not clean_label(label):
        raise ValueError(f"the label {label!r} has no words that a text may use")
    if not isinstance(sensitive, bool):
        raise TypeError(f"sensitive is {sensitive!r}, it must be true or false")
    if not isinstance(titles, list) or not all(isinstance(title, str) for title in titles):
        raise TypeError("titles must be a list of texts")
    return label, sensitive, tuple(titles)


def _titles(cluster: Cluster, draw: random.Random) -> tuple[str, ...]:
    """Titles in random order, now and then only some: a real cluster may have few that may be shown."""
    count = len(cluster.titles)
    if count and draw.random() < FEWER_TITLES:
        count = draw.randrange(count)
    return tuple(draw.sample(cluster.titles, count))


def _shares(count: int, draw: random.Random) -> list[int]:
    """Shares of so many interests and of a rest that no interest holds: percent in steps of 5, the largest first."""
    weights = [draw.expovariate(1.0) for _ in range(count + 1)]
    total = sum(weights)
    shares = sorted((weight / total for weight in weights[:count]), reverse=True)
    return [max(5, 5 * round(20 * share)) for share in shares]


def _figures(contexts: Contexts, out: Path) -> dict[str, object]:
    return {
        "learned": len(contexts.learned),
        "held_out": len(contexts.held_out),
        "labels_learned": len(_names(contexts.learned)),
        "labels_held_out": len(_names(contexts.held_out)),
        "duplicates": contexts.duplicates,
        "of_both_parts": contexts.mixed,
        "folder": str(out),
    }


def _names(pairs: Iterable[Pair]) -> set[str]:
    return {_name(label) for pair in pairs for label in labels_of(pair.task)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m triton_models.distillation.contexts",
        description=f"""\
Write the contexts that a teacher is to word, as JSON lines: OUT/{LEARNED} to learn from, OUT/{HELD_OUT} to judge by.

With nothing said they come from the catalogues of this folder, with simulated viewers: interests with any trend, topics
with and without an interest that leads to them, summaries of one to five interests. With --requests they come from your
own viewers; no viewer's id gets into them. No two contexts have the same line of facts. The same arguments write the
same bytes, and a larger --count the same contexts and more.""",
        epilog="""\
examples:
  python -m triton_models.distillation.contexts contexts --hold-out 0.1
  personas replay events.jsonl --out replayed
  python -m triton_models.distillation.contexts contexts --requests replayed/requests.jsonl --hold-out 0.1

next: python -m triton_models.distillation.teacher contexts/learned.jsonl pairs/learned.jsonl""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the contexts")
    parser.add_argument(
        "--catalogues",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="catalogues, or folders of them: a line a cluster, with label, sensitive and titles; sensitive clusters "
        "are left out (default without --requests: the learned ones of this folder)",
    )
    parser.add_argument(
        "--requests",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="refresh requests: the requests.jsonl of `personas replay`",
    )
    parser.add_argument(
        "--hold-out",
        default="0",
        metavar="SHARE|PATH",
        help="what to set apart: a share of the clusters by their labels, such as 0.1, or catalogues whose clusters it "
        "is (default: nothing)",
    )
    parser.add_argument(
        "--count", type=positive, default=92, metavar="N", help="contexts a catalogue, at most (default: 92)"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the simulated viewers (default: 1)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
