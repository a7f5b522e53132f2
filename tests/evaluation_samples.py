"""Cases and worded personas for tests of the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import orjson
from xxhash import xxh32_intdigest

from agents.clusters.embedding import Progress, Vectors, unit_length
from agents.evaluation.answers import Call, Worded, task_of, templated
from agents.evaluation.cases import Case, Slice, Truth, Watch
from streams.prompts import build_prompt
from streams.records import (
    Basis,
    Context,
    Evidence,
    Explanation,
    Horizon,
    Interest,
    Maturity,
    NovelCandidate,
    RefreshRequest,
    Rule,
    Tier,
)
from streams.tasks import split_task, task_keys

START = 1_767_225_600_000
MINUTE = 60_000
CLUSTERS = ("sourdough baking", "trail running", "chess openings", "jazz piano", "beekeeping")
TITLES = (
    ("Feeding a starter from scratch", "Scoring a loaf so it opens"),
    ("Shoes for muddy hills", "Downhill on loose rock"),
    ("The Caro-Kann in ten minutes", "Traps in the Italian Game"),
    ("Left hand voicings made simple", "Comping behind a singer"),
    ("First hive inspection of spring", "Catching a swarm"),
)


class WordEmbedder:
    """Texts are close to each other where they share words."""

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        rows = np.zeros((len(texts), 64))
        for row, text in zip(rows, texts, strict=True):
            for word in text.casefold().split():
                row[xxh32_intdigest(word.strip(".,").encode()) % 64] += 1.0
        return unit_length(rows)


def watches(clusters: Sequence[int], first: int = 0) -> tuple[Watch, ...]:
    """One watch of each cluster in turn, an hour apart, counted from the start."""
    return tuple(
        Watch(f"video-{c}-{n % 2}", c, TITLES[c][n % 2], START + (first + n) * 60 * MINUTE)
        for n, c in enumerate(clusters)
    )


def sample_case(
    past: Sequence[int] = (0, 1, 0, 1, 0, 1, 2, 0),
    future: Sequence[int] = (1, 0, 2),
    *,
    stated: tuple[int, ...] = (0, 1),
    novel: Sequence[int] = (3,),
    taste: Sequence[float] = (0.5, 0.4, 0.05, 0.03, 0.02),
    before: Sequence[float] | None = None,
    since_shift: int | None = None,
    user_id: str = "ann",
    sequence: int = 1,
    trend: int = 0,
) -> Case:
    """A viewer who watched `past` and is said to like `stated`."""
    seen = watches(past)
    now = seen[-1].ts
    interests = tuple(
        Interest(
            interest_id=f"{cluster:016x}",
            cluster_id=cluster,
            label=CLUSTERS[cluster],
            share=0.4 - 0.1 * place,
            share_bucket=40 - 10 * place,
            horizon=Horizon.LONG,
            trend=trend,
            confidence=0.5,
            valid_from=START,
            query=f"{CLUSTERS[cluster]} videos",
            titles=TITLES[cluster],
            evidence=tuple(Evidence(w.video_id, w.ts) for w in seen if w.cluster_id == cluster)[-2:],
        )
        for place, cluster in enumerate(stated)
    )
    topics = tuple(
        NovelCandidate(
            c, CLUSTERS[c], f"{CLUSTERS[c]} videos", 1.2, 0.3, (stated[0],), (CLUSTERS[stated[0]],), TITLES[c]
        )
        for c in novel
    )
    context = Context(
        Maturity.MATURE, Basis(100, 30.0, START, now), interests, topics, (), Explanation(Rule.DRIFT, 0.1, 0.05, 20)
    )
    request = RefreshRequest(
        f"{user_id}-{sequence}", user_id, 0, sequence, now, Rule.DRIFT, 3_600_000, 1, context=context
    )
    truth = Truth(
        tuple(taste),
        None if before is None else tuple(before),
        len(past) if since_shift is None else since_shift,
    )
    clusters = range(len(CLUSTERS))
    after = watches(future, len(past))
    return Case(request, "kitchen", seen, after, (), truth, clusters, frozenset(clusters), Slice.HEAVY)


def said(case: Case, *texts: str) -> Worded:
    """The case with these texts, in the order summary, interests, novel, as the student's own first answers."""
    pieces = split_task(task_of(case.request))
    assert len(texts) == len(pieces)
    calls = []
    for piece, text in zip(pieces, texts, strict=True):
        (key,) = task_keys(piece)
        calls.append(Call(build_prompt(piece).text, 0, orjson.dumps({key: text}).decode(), 100, 20, 50))
    interests, count = case.context.interests, len(case.context.interests)
    persona = templated(case).persona
    persona = replace(
        persona,
        tier=Tier.STUDENT,
        summary=texts[0],
        interests=tuple(replace(i, description=t) for i, t in zip(persona.interests, texts[1:], strict=False)),
        novel=tuple(replace(n, reason=t) for n, t in zip(persona.novel, texts[1 + count :], strict=True)),
    )
    assert len(persona.interests) == len(interests)
    return Worded(case, persona, tuple(calls))


def well_said(case: Case | None = None) -> Worded:
    """The sample in good words."""
    return said(
        case or sample_case(),
        "Mostly watches sourdough baking and trail running.",
        "Enjoys sourdough baking, from feeding a starter to scoring a loaf.",
        "Follows trail running, such as shoes for muddy hills.",
        "Might like jazz piano after so much sourdough baking.",
    )
