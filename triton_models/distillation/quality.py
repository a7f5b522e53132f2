"""Checks written pairs, one by one and as a set: `python -m triton_models.distillation.quality --help`.

A student learns what it is shown, faults included: a text that says more than its line of facts teaches it to invent,
texts that are all alike teach it one sentence.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from agents.evaluation.text import FUNCTION_WORDS, distinct, ngrams, root, words
from streams.prompts import INTEREST_OPENINGS, NEW, NOVEL_OPENINGS, SAYABLE, SUMMARY_OPENINGS, TRENDS, VIA_OPENINGS
from streams.tasks import INTEREST_KEYS, NOVEL_KEYS, SUMMARY_KEY, task_keys
from streams.wording import WordingRejected
from triton_models.distillation.command import say
from triton_models.distillation.pairs import PAIRS, Pair, check, read_pairs, write_pairs

WORDS: Final = (5, 24)
"""Fewest and most words of a text."""
CHARACTERS: Final = 180
"""Most characters of a text: with its JSON it stays within `streams.prompts.MAXIMUM_TOKENS`."""
NGRAM: Final = 4
"""Words of a run, for near-duplicates."""
NEAR: Final = 0.8
"""A text is a near-duplicate if so much of the runs of the shorter one of two are in both."""
MOST_OF_ONE_OPENING: Final = 0.45
"""Highest share that one opening may have of the texts of a kind; a text that begins with its label counts as one."""
MOST_OF_ONE_FRAME: Final = 0.1
"""Highest share that one frame, a text without the words of its facts, may have of the texts of a kind."""
LEAST_FRAMES: Final = 0.25
"""Least number of different frames of a kind, as a share of its texts."""
FEW: Final = 30
"""Below so many texts of a kind, nothing is said of their variety."""
OWN_LABEL: Final = "(own label)"

_MARKS: Final = frozenset({*TRENDS.values(), NEW})
_OPENINGS: Final = frozenset(
    opening
    for openings in (*INTEREST_OPENINGS.values(), NOVEL_OPENINGS, VIA_OPENINGS, SUMMARY_OPENINGS)
    for opening in openings
    if opening
)
_KINDS: Final = {SUMMARY_KEY: "summary", INTEREST_KEYS[0]: "interest", NOVEL_KEYS[0]: "topic"}


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a pair should not be learned. reason: a short code; detail: what exactly."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Variety:
    """How the texts of a kind differ. Shares are 0..1 of the texts.

    openings: share by opening, the most frequent first; top_frame: the most frequent frame and its share; frames:
    different frames; distinct: different runs of two words as a share of all (distinct-2 of Li et al. 2016).
    """

    texts: int
    openings: Mapping[str, float]
    top_frame: tuple[str, float]
    frames: float
    distinct: float

    @property
    def problems(self) -> list[str]:
        """What is too much of one thing; empty for a kind of few texts."""
        if self.texts < FEW:
            return []
        opening, share = next(iter(self.openings.items()))
        frame, framed = self.top_frame
        found = [
            (share > MOST_OF_ONE_OPENING, f"{share:.0%} begin with {opening!r}, more than {MOST_OF_ONE_OPENING:.0%}"),
            (framed > MOST_OF_ONE_FRAME, f"{framed:.0%} are {frame!r}, more than {MOST_OF_ONE_FRAME:.0%}"),
            (self.frames < LEAST_FRAMES, f"{self.frames:.2f} frames a text, fewer than {LEAST_FRAMES:.2f}"),
        ]
        return [text for wrong, text in found if wrong]


def main() -> None:
    """The command."""
    options = _arguments()
    try:
        pairs = list(read_pairs(options.pairs))
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not pairs:
        sys.exit(f"error: no pairs in {', '.join(map(str, options.pairs))}")
    say(f"checking {len(pairs)} pairs")
    faults = faults_of(pairs)
    kept = [pair for pair, fault in zip(pairs, faults, strict=True) if fault is None]
    if options.report:
        for pair, fault in zip(pairs, faults, strict=True):
            if fault is not None:
                print(f"{fault.reason}: {fault.detail}\n    {pair.line}\n    {pair.text or '(none)'}")
    for pair in random.Random(options.seed).sample(kept, min(options.print, len(kept))):
        print(f"{pair.line}\n    {pair.text}")
    if options.drop is not None:
        try:
            write_pairs(options.drop, kept)
        except OSError as error:
            sys.exit(f"error: cannot write {options.drop}: {error.strerror}")
        say(f"{options.drop}: {len(kept)} pairs")
    print(json.dumps(figures(pairs, faults)))


def fault_of(pair: Pair) -> Fault | None:
    """What is wrong with a pair by itself; None if nothing is."""
    if pair.text is None:
        return Fault("no_text", "a context that is still to be worded")
    opening = pair.facts.opening
    if not pair.text.startswith(opening) or pair.text[len(opening) : len(opening) + 1].isalnum():
        return Fault("opening", f"it must begin with {opening!r}")
    count = len(pair.text.split())
    if not WORDS[0] <= count <= WORDS[1] or len(pair.text) > CHARACTERS:
        return Fault(
            "length", f"{count} words, {len(pair.text)} characters; {WORDS[0]} to {WORDS[1]}, at most {CHARACTERS}"
        )
    if not SAYABLE.fullmatch(pair.text):
        return Fault("grammar", "the student cannot say it: letters, digits, commas, apostrophes, hyphens, a full stop")
    try:
        check(pair)
        check(as_read(pair))
    except WordingRejected as error:
        return Fault(error.reason, error.detail)
    return None


def as_read(pair: Pair) -> Pair:
    """The pair with the titles that the student reads and no others: what a text says must come from these."""
    titles = pair.facts.titles
    interests = tuple(replace(interest, titles=titles) for interest in pair.task.interests)
    novel = tuple(replace(topic, titles=titles) for topic in pair.task.novel)
    return replace(pair, task=replace(pair.task, interests=interests, novel=novel))


def faults_of(pairs: Sequence[Pair]) -> list[Fault | None]:
    """The fault of each pair, by position: its own, or that it repeats an earlier one without a fault."""
    faults: list[Fault | None] = []
    lines: set[str] = set()
    earlier = _Earlier()
    for pair in pairs:
        fault = fault_of(pair)
        if fault is None and pair.line in lines:
            fault = Fault("same_line", "an earlier pair has the same line of facts")
        if fault is None and (other := earlier.nearest(pair.text or "")) is not None:
            fault = Fault("near_duplicate", f"of {other!r}")
        if fault is None:
            lines.add(pair.line)
            earlier.add(pair.text or "")
        faults.append(fault)
    return faults


def varieties(pairs: Iterable[Pair]) -> dict[str, Variety]:
    """How the texts of each kind differ, by kind: interest, topic, summary. Pairs without a text do not count."""
    kinds: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.text is not None:
            kinds[_KINDS[task_keys(pair.task)[0]]].append(pair)
    return {kind: _variety(own) for kind, own in sorted(kinds.items())}


def frame_of(pair: Pair) -> str:
    """A text with a gap for each run of words of its facts: what is left is how it is said.

    Forms of one word are the same word here. An opening that is no label belongs to the frame.
    """
    text, read = pair.text or "", pair.facts
    opening = read.opening
    facts = frozenset(words(" ".join((read.subject, read.mark, *read.titles)))) - FUNCTION_WORDS - _MARKS
    known = frozenset(map(root, facts))
    named = opening in _OPENINGS
    rest = words(text.removeprefix(opening) if named else text)
    gaps = ["_" if root(word) in known else word for word in rest]
    frame = [word for i, word in enumerate(gaps) if word != "_" or i == 0 or gaps[i - 1] != "_"]
    return " ".join([opening, *frame] if named else frame)


def figures(pairs: Sequence[Pair], faults: Sequence[Fault | None]) -> dict[str, object]:
    """What the command prints at its end. `passed`: no fault, and enough variety in what has none."""
    kept = [pair for pair, fault in zip(pairs, faults, strict=True) if fault is None]
    found = varieties(kept)
    problems = [f"{kind}: {problem}" for kind, variety in found.items() for problem in variety.problems]
    lengths = sorted(len((pair.text or "").split()) for pair in kept)
    return {
        "pairs": len(pairs),
        "kept": len(kept),
        "faults": dict(Counter(fault.reason for fault in faults if fault is not None).most_common()),
        "catalogues": len({pair.catalogue for pair in kept}),
        "words": {"median": lengths[len(lengths) // 2], "most": lengths[-1]} if lengths else {},
        "kinds": {kind: _rounded(variety) for kind, variety in found.items()},
        "too_uniform": problems,
        "passed": bool(kept) and len(kept) == len(pairs) and not problems,
    }


class _Earlier:
    """Texts by their runs of words, to find the ones that are nearly the same."""

    def __init__(self) -> None:
        self._texts: list[tuple[str, int]] = []
        self._by_run: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def nearest(self, text: str) -> str | None:
        """An earlier text that shares enough runs with this one; None if there is none."""
        runs = _runs(text)
        shared = Counter(number for run in runs for number in self._by_run.get(run, ()))
        for number, count in shared.most_common():
            other, size = self._texts[number]
            if count >= NEAR * min(len(runs), size):
                return other
        return None

    def add(self, text: str) -> None:
        """Remember a text."""
        runs = _runs(text)
        for run in runs:
            self._by_run[run].append(len(self._texts))
        self._texts.append((text, len(runs)))


def _runs(text: str) -> frozenset[tuple[str, ...]]:
    found = words(text)
    return frozenset(ngrams(found, NGRAM) or [tuple(found)])


def _variety(pairs: Sequence[Pair]) -> Variety:
    openings = Counter(o if o in _OPENINGS else OWN_LABEL for o in (pair.facts.opening for pair in pairs))
    frames = Counter(map(frame_of, pairs))
    ((top, count),) = frames.most_common(1)
    return Variety(
        texts=len(pairs),
        openings={opening: n / len(pairs) for opening, n in openings.most_common()},
        top_frame=(top, count / len(pairs)),
        frames=len(frames) / len(pairs),
        distinct=distinct((pair.text or "" for pair in pairs), 2),
    )


def _rounded(variety: Variety) -> dict[str, object]:
    frame, share = variety.top_frame
    return {
        "texts": variety.texts,
        "openings": {opening: round(part, 3) for opening, part in variety.openings.items()},
        "top_frame": [frame, round(share, 3)],
        "frames": round(variety.frames, 3),
        "distinct_2": round(variety.distinct, 3),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m triton_models.distillation.quality",
        description=f"""\
Check pairs before a student learns from them. A pair has a fault if

  opening         its text does not begin with the words that its line of facts gives
  length          it has fewer than {WORDS[0]} or more than {WORDS[1]} words, or more than {CHARACTERS} characters
  grammar         it has a character or a word that the student's grammar does not hold
  same_line       an earlier pair has the same line of facts
  near_duplicate  {NEAR:.0%} of its runs of {NGRAM} words are in the text of an earlier pair
  no_text         it is still to be worded

and for what the gate refuses in live texts too, such as ungrounded, name or number: said of all titles, and of those
alone that the student reads. The set is too uniform if one opening begins more than {MOST_OF_ONE_OPENING:.0%} of the
texts of a kind, one frame (a text without the words of its facts) makes more than {MOST_OF_ONE_FRAME:.0%}, or there are
fewer frames than {LEAST_FRAMES:.2f} a text.""",
        epilog="""\
The last line is one JSON object of figures; `passed` says whether there is nothing to do. The exit code is 0 all the
same, and 1 where the pairs cannot be read.

examples:
  python -m triton_models.distillation.quality
  python -m triton_models.distillation.quality pairs/learned.jsonl --report --drop pairs/checked.jsonl --print 40

next: python -m triton_models.distillation.train --pairs pairs/checked.jsonl""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "pairs", type=Path, nargs="*", default=[PAIRS], metavar="PATH", help="files or folders (default: the shipped)"
    )
    parser.add_argument("--report", action="store_true", help="print each pair that has a fault, and the fault")
    parser.add_argument("--drop", type=Path, metavar="OUT", help="write the pairs without a fault to this file")
    parser.add_argument("--print", type=int, default=0, metavar="N", help="print so many random pairs, to be read")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="which ones (default: 1)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
