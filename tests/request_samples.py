"""Refresh requests for tests, and a student's answers to them."""

from __future__ import annotations

import orjson

from streams.records import (
    Basis,
    Command,
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
from streams.tasks import INTEREST_KEYS, NOVEL_KEYS, SUMMARY_KEY, Wording, WordingTask, task_keys

NOON = 1_795_348_800_000  # 2026-11-22T12:00:00Z
HOUR = 3_600_000


def sample_context() -> Context:
    """Two interests, two topics."""
    return Context(
        maturity=Maturity.FORMING,
        basis=Basis(events=60, n_eff=31.5, first_ts=NOON - 40 * 24 * HOUR, last_ts=NOON),
        interests=(
            Interest(
                "i-cook", 3, "italian cooking", 0.41, 40, Horizon.LONG, 0, 0.9, NOON - 30 * 24 * HOUR, "fresh pasta",
                titles=("Hand-rolled tagliatelle in one hour", "Five sauces from one pot of tomatoes"),
                evidence=(Evidence("v-pasta", NOON - HOUR),),
            ),
            Interest(
                "i-bike", 7, "gravel cycling", 0.28, 30, Horizon.SHORT, 1, 0.7, NOON - HOUR, "gravel bike review",
                titles=("Gravel bikes put to an honest test",),
                evidence=(Evidence("v-gravel", NOON),),
            ),
        ),
        novel=(
            NovelCandidate(12, "bikepacking trips", "bikepacking", 3.2, 0.6, (7,), ("gravel cycling",)),
            NovelCandidate(15, "sourdough bread", "sourdough", 2.1, 0.5, (3,), ("italian cooking",)),
        ),
        avoid=(9,),
        explanation=Explanation(Rule.DRIFT, 2.3, 1.9, 37, 0.21, 0.14, ((7, "gravel cycling", 0.03, 0.28),)),
    )  # fmt: skip


def sample_request(
    user_id: str = "ann",
    sequence: int = 1,
    *,
    epoch: int = 0,
    request_id: str | None = None,
    command: Command = Command.REFRESH,
    tier_limit: Tier | None = None,
    expires_after_ms: int = HOUR,
) -> RefreshRequest:
    """A request as the watch app emits it."""
    return RefreshRequest(
        request_id=request_id or f"request-{user_id}-{epoch}-{sequence}",
        user_id=user_id,
        epoch=epoch,
        sequence=sequence,
        as_of=NOON,
        rule=Rule.DRIFT if command is Command.REFRESH else Rule.CONTROL,
        expires_after_ms=expires_after_ms,
        registry_version=1,
        command=command,
        tier_limit=tier_limit,
        context=sample_context() if command is Command.REFRESH else None,
    )


def answer_of(task: WordingTask, wording: Wording) -> str:
    """A wording as the student writes it."""
    texts = dict(zip(INTEREST_KEYS, wording.descriptions, strict=False))
    texts |= dict(zip(NOVEL_KEYS, wording.reasons, strict=False))
    texts[SUMMARY_KEY] = wording.summary
    return orjson.dumps({key: texts[key] for key in task_keys(task)}).decode()
