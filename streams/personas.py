"""From a refresh request to wording and back: what must be worded, what is known, and the persona that results.

The core owns ids, labels and numbers; wording comes by position. Texts are cached per item under a key of all that
they were worded from and nothing that belongs to one viewer, so equal contexts give equal bytes for every viewer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Final

import orjson

from streams.identifiers import content_hash
from streams.prompts import PROMPT_VERSION, content_of
from streams.records import (
    SCHEMA_VERSION,
    Changes,
    Context,
    Interest,
    Model,
    NovelCandidate,
    Persona,
    PersonaInterest,
    PersonaNovel,
    RefreshRequest,
    Tier,
    persona_version,
)
from streams.tasks import InterestTask, NovelTask, Wording, WordingTask

NO_INTERESTS: Final = "No clear interest stands out yet."
"""Summary of a persona without interests: there is nothing to word."""
TEMPLATE_MODEL: Final = Model("template", PROMPT_VERSION, "", 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Keys:
    """Cache keys of a persona's texts: its summary, and by position its interests and novel topics."""

    summary: str
    interests: tuple[str, ...]
    novel: tuple[str, ...]

    def __iter__(self) -> Iterator[str]:
        yield self.summary
        yield from self.interests
        yield from self.novel


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known and what must be worded.

    known: texts by key, for keys of this persona only; missing: the other keys, in the order of the task's texts; task:
    what is missing, None if nothing is.
    """

    keys: Keys
    known: Mapping[str, str]
    missing: tuple[str, ...]
    task: WordingTask | None


@dataclass(frozen=True, slots=True)
class Difference:
    """Interests by what became of them between two versions; reworded and kept ones as (before, after)."""

    added: tuple[PersonaInterest, ...]
    removed: tuple[PersonaInterest, ...]
    reworded: tuple[tuple[PersonaInterest, PersonaInterest], ...]
    kept: tuple[tuple[PersonaInterest, PersonaInterest], ...]


@dataclass(frozen=True, slots=True)
class ErasureReceipt:
    """Says that a viewer's personas were removed, without saying whose: `user_sha256` is the id's SHA-256, hex.

    version: removal version; erased_at: ms; stores: what was emptied.
    """

    user_sha256: str
    epoch: int
    version: int
    request_id: str
    erased_at: int
    stores: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION


def receipt_key(user_id: str) -> str:
    """The `user_sha256` of a viewer's erasure receipts, which is also their record key."""
    return sha256(user_id.encode()).hexdigest()


def content_keys(request: RefreshRequest, model_id: str) -> Keys:
    """Cache keys of the texts that a student `model_id` (name and version) would write for this request.

    By what its prompts may say: contexts that differ in what none of them holds share their texts. Raises ValueError
    for a request without a context.
    """
    context = context_of(request)
    common = (context.language, model_id, PROMPT_VERSION)
    interests = [WordingTask((_interest_task(interest),), (), ()) for interest in context.interests]
    novel = [WordingTask((), (_novel_task(topic),), ()) for topic in context.novel]
    overview = _overview(context)
    return Keys(
        summary=_key("summary", *common, *(content_of(WordingTask((), (), overview)) if overview else ())),
        interests=tuple(_key("interest", *common, *content_of(task)) for task in interests),
        novel=tuple(_key("novel", *common, *content_of(task)) for task in novel),
    )


def plan(request: RefreshRequest, keys: Keys, cached: Mapping[str, bytes]) -> Plan:
    """Split a request's texts into those that the cache has and a task for the others.

    A cached text that is not UTF-8 counts as missing. Raises ValueError for a request without a context.
    """
    context = context_of(request)
    known = {key: text for key in keys if (text := _text(cached.get(key)))}
    if not context.interests:
        known[keys.summary] = NO_INTERESTS
    missing = tuple(key for key in keys if key not in known)
    if not missing:
        return Plan(keys, known, (), None)
    interests = zip(keys.interests, context.interests, strict=True)
    novel = zip(keys.novel, context.novel, strict=True)
    task = WordingTask(
        interests=tuple(_interest_task(interest) for key, interest in interests if key not in known),
        novel=tuple(_novel_task(candidate) for key, candidate in novel if key not in known),
        overview=() if keys.summary in known else _overview(context),
        language=context.language,
    )
    return Plan(keys, known, missing, task)


def without_unworded_topics(request: RefreshRequest, completed: Plan) -> RefreshRequest:
    """The request without the novel topics that have no text, if nothing else is missing; otherwise the request.

    A topic that the student finds no usable words for is better left out than worded by a template: there are others.
    """
    context = context_of(request)
    unworded = set(completed.missing)
    if not unworded or not unworded <= set(completed.keys.novel):
        return request
    worded = zip(completed.keys.novel, context.novel, strict=True)
    return replace(
        request, context=replace(context, novel=tuple(topic for key, topic in worded if key not in unworded))
    )


def merge(plan: Plan, wording: Wording | None) -> Wording:
    """All texts of the persona: known ones byte for byte, the others from the wording of `plan.task`.

    Raises ValueError if the wording does not fit the task, or is absent though there is one.
    """
    if plan.task is not None and wording is None:
        raise ValueError("texts are missing and there is no wording")
    worded = texts_of(wording) if plan.task is not None and wording is not None else ()
    texts = {**plan.known, **dict(zip(plan.missing, worded, strict=True))}
    return Wording(
        summary=texts[plan.keys.summary],
        descriptions=tuple(texts[key] for key in plan.keys.interests),
        reasons=tuple(texts[key] for key in plan.keys.novel),
    )


def texts_of(wording: Wording) -> tuple[str, ...]:
    """The texts that a wording has, in the order of `Plan.missing`."""
    return (*([wording.summary] if wording.summary else []), *wording.descriptions, *wording.reasons)


def compose(
    request: RefreshRequest,
    texts: Wording,
    previous: Persona | None,
    *,
    tier: Tier,
    model: Model,
    cached: bool,
    generated_at: int,
) -> Persona:
    """The persona: ids, labels and numbers of the request's context, `texts` by position.

    previous: the version it replaces; one of another epoch is ignored. cached: no model was asked. Raises ValueError if
    the number of texts is not the context's.
    """
    context = context_of(request)
    before = previous if previous is not None and previous.epoch == request.epoch else None
    interests = tuple(
        _persona_interest(interest, text) for interest, text in zip(context.interests, texts.descriptions, strict=True)
    )
    return Persona(
        user_id=request.user_id,
        epoch=request.epoch,
        version=persona_version(request.sequence, tier),
        previous_version=before.version if before else None,
        request_id=request.request_id,
        as_of=request.as_of,
        generated_at=generated_at,
        tier=tier,
        cached=cached,
        language=context.language,
        maturity=context.maturity,
        basis=context.basis,
        model=model,
        summary=texts.summary,
        interests=interests,
        novel=tuple(_persona_novel(topic, text) for topic, text in zip(context.novel, texts.reasons, strict=True)),
        avoid=context.avoid,
        changes=_changes(difference(before.interests if before else (), interests)),
        rule=request.rule,
        registry_version=request.registry_version,
        explanation=context.explanation,
    )


def difference(before: Sequence[PersonaInterest], after: Sequence[PersonaInterest]) -> Difference:
    """What became of the interests between two versions of one epoch, each list in its version's order."""
    old = {interest.interest_id: interest for interest in before}
    new = {interest.interest_id: interest for interest in after}
    pairs = [(old[key], interest) for key, interest in new.items() if key in old]
    return Difference(
        added=tuple(interest for key, interest in new.items() if key not in old),
        removed=tuple(interest for key, interest in old.items() if key not in new),
        reworded=tuple(pair for pair in pairs if pair[0].description != pair[1].description),
        kept=tuple(pair for pair in pairs if pair[0].description == pair[1].description),
    )


def context_of(request: RefreshRequest) -> Context:
    """The request's context. Raises ValueError if it has none (a removal)."""
    if request.context is None:
        raise ValueError(f"request {request.request_id!a} has no context")
    return request.context


def _changes(moved: Difference) -> Changes:
    return Changes(
        added=tuple(interest.interest_id for interest in moved.added),
        removed=tuple(interest.interest_id for interest in moved.removed),
        reworded=tuple(after.interest_id for _, after in moved.reworded),
    )


def _overview(context: Context) -> tuple[tuple[str, int], ...]:
    return tuple((interest.label, interest.share_bucket) for interest in context.interests)


def _interest_task(interest: Interest) -> InterestTask:
    return InterestTask(interest.label, interest.share_bucket, interest.trend, interest.titles)


def _novel_task(candidate: NovelCandidate) -> NovelTask:
    return NovelTask(candidate.label, candidate.via_labels, candidate.titles)


def _persona_interest(interest: Interest, description: str) -> PersonaInterest:
    return PersonaInterest(
        interest_id=interest.interest_id,
        cluster_id=interest.cluster_id,
        label=interest.label,
        share=interest.share,
        horizon=interest.horizon,
        trend=interest.trend,
        description=description,
        query=interest.query,
        confidence=interest.confidence,
        evidence=interest.evidence,
        valid_from=interest.valid_from,
        pinned=interest.pinned,
    )


def _persona_novel(candidate: NovelCandidate, reason: str) -> PersonaNovel:
    return PersonaNovel(
        cluster_id=candidate.cluster_id,
        label=candidate.label,
        reason=reason,
        query=candidate.query,
        via=candidate.via,
        lift=candidate.lift,
        confidence=candidate.confidence,
    )


def _key(*parts: object) -> str:
    return content_hash(orjson.dumps(parts))


def _text(stored: bytes | None) -> str | None:
    try:
        return stored.decode() if stored else None
    except UnicodeDecodeError:
        return None
