"""What the wording cache saves, by its own keys: nothing is worded here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agents.evaluation.answers import Worded, form_of
from streams.personas import content_keys
from streams.records import RefreshRequest

PARTS = ("summary", "interest", "novel")


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a stream of personas. first, last: numbers of its personas.

    hits: share of texts in the cache, by part; tokens: mean per persona with the cache; without: mean if every text
    were asked for.
    """

    first: int
    last: int
    hits: Mapping[str, float]
    hit_rate: float
    tokens: float
    without: float


def tokens_by_part(worded: Sequence[Worded]) -> dict[str, float]:
    """Mean tokens that a text of each part cost, all its answers counted; parts share evenly in each persona's cost."""
    spent: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for one in worded:
        texts = form_of(one).asked
        context = one.case.context
        parts = {
            "summary": int(bool(context.interests)),
            "interest": len(context.interests),
            "novel": len(context.novel),
        }
        for part, count in parts.items():
            spent[part] += one.tokens * count / texts  # type: ignore[assignment]
            asked[part] += count
    return {part: spent[part] / asked[part] if asked[part] else 0.0 for part in PARTS}


def windows(requests: Sequence[RefreshRequest], tokens: Mapping[str, float], edges: Sequence[int]) -> list[Window]:
    """Follow a stream of requests through an empty cache that keeps everything; edges: where windows end, ascending.

    Every text is taken to be worded well; one that is not is asked for again, which costs more than is said here.
    """
    cache: set[str] = set()
    found = []
    start = 0
    for edge in (e for e in edges if e <= len(requests)):
        hits: Counter[str] = Counter()
        asked: Counter[str] = Counter()
        for request in requests[start:edge]:
            keys = content_keys(request, "student/1")
            parts = {"interest": keys.interests, "novel": keys.novel}
            if keys.interests:
                parts["summary"] = (keys.summary,)
            for part, own in parts.items():
                asked[part] += len(own)
                hits[part] += sum(key in cache for key in own)
                cache.update(own)
        count = edge - start
        found.append(
            Window(
                first=start + 1,
                last=edge,
                hits={part: hits[part] / asked[part] if asked[part] else 0.0 for part in PARTS},
                hit_rate=sum(hits.values()) / max(1, sum(asked.values())),
                tokens=sum((asked[part] - hits[part]) * tokens[part] for part in PARTS) / count,
                without=sum(asked[part] * tokens[part] for part in PARTS) / count,
            )
        )
        start = edge
    return found
