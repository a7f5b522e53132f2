"""A blind form: the same personas by several writers in random order, for a person or a model to judge."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import orjson

from agents.evaluation.answers import Worded

QUESTION: Final = (
    "Which description of this viewer would you rather read: true to the facts, clear, and not worded by rote? "
    "Set `best` to its letter, or to = if you see no difference."
)
LETTERS: Final = "ABCDEFGH"
TIE: Final = "="


class UnreadableForm(ValueError):  # noqa: N818 - a state of the file
    """A filled-in form cannot be scored; the message says which line and why."""


@dataclass(frozen=True, slots=True)
class Score:
    """How often each writer was the best, of `judged` items; ties were no writer's. skipped: items left blank.

    low, high: 95% interval of each share (Wilson 1927).
    """

    judged: int
    ties: int
    skipped: int
    wins: Mapping[str, int]
    low: Mapping[str, float]
    high: Mapping[str, float]


def form(items: Sequence[Mapping[str, Worded]], seed: int) -> list[bytes]:
    """One JSON line for each item: the facts, the texts under letters, and an empty `best`.

    items: personas for one case by writer; all items have the same writers, in the same order.
    """
    lines = []
    for number, item in enumerate(items, 1):
        order = order_of(seed, number, list(item))
        first = next(iter(item.values())).case.context
        facts = {
            "interests": [
                {"label": i.label, "share": i.share_bucket, "trend": i.trend, "titles": i.titles}
                for i in first.interests
            ],
            "topics": [{"label": n.label, "because_of": n.via_labels, "titles": n.titles} for n in first.novel],
        }
        texts = {letter: [t.text for t in item[name].texts] for letter, name in zip(LETTERS, order, strict=False)}
        lines.append(
            orjson.dumps(
                {
                    "item": number,
                    "seed": seed,
                    "writers": sorted(item),
                    "question": QUESTION,
                    "facts": facts,
                    **texts,
                    "best": "",
                }
            )
        )
    return lines


def order_of(seed: int, number: int, writers: Sequence[str]) -> list[str]:
    """Whose texts stand under A, B, ... in an item."""
    names = sorted(writers)
    return [names[i] for i in np.random.default_rng([seed, number]).permutation(len(names))]


def score(lines: Sequence[bytes]) -> Score:
    """Read a filled-in form. Raises UnreadableForm."""
    wins: Counter[str] = Counter()
    ties = skipped = 0
    writers: list[str] = []
    for number, line in enumerate(lines, 1):
        item = _item(line, number)
        writers = writers or item["writers"]
        letters = LETTERS[: len(item["writers"])]
        best = item["best"].strip().upper()
        if item["writers"] != writers or (best and best != TIE and (len(best) > 1 or best not in letters)):
            raise UnreadableForm(
                f"line {number}: `best` must be one of {', '.join(letters)}, {TIE} or empty, not {best!r}"
            )
        if best == TIE:
            ties += 1
        elif best:
            wins[order_of(item["seed"], item["item"], item["writers"])[letters.index(best)]] += 1
        else:
            skipped += 1
    judged = sum(wins.values()) + ties
    intervals = {name: wilson(wins[name], judged) for name in writers}
    return Score(
        judged=judged,
        ties=ties,
        skipped=skipped,
        wins={name: wins[name] for name in writers},
        low={name: low for name, (low, _) in intervals.items()},
        high={name: high for name, (_, high) in intervals.items()},
    )


def wilson(count: int, of: int) -> tuple[float, float]:
    """95% score interval of a share (Wilson 1927); 0 to 1 of nothing."""
    if not of:
        return 0.0, 1.0
    z, share = 1.959964, count / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def _item(line: bytes, number: int) -> dict[str, Any]:
    try:
        item = orjson.loads(line)
        writers, best = item["writers"], item["best"]
        int(item["seed"]), int(item["item"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UnreadableForm(
            f"line {number} is no item of a form that `personas eval --pairs N` prints: {error}"
        ) from error
    if not isinstance(best, str) or not isinstance(writers, list) or not all(isinstance(w, str) for w in writers):
        raise UnreadableForm(f"line {number}: `best` must be a text and `writers` a list of texts")
    return dict(item)
