"""The check of stored and published personas finds what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agents.stores.ports import StoredPersona
from streams.records import Command, Persona, Tier, encode, persona_version
from tests.chaos.personas import disagreement
from tests.persona_samples import sample_persona
from tests.request_samples import sample_request

REQUEST = sample_request("ann", 3)


def persona(tier: Tier = Tier.STUDENT, **changes: object) -> Persona:
    version = persona_version(REQUEST.sequence, tier)
    made = sample_persona("ann", REQUEST.sequence, request_id=REQUEST.request_id, tier=tier, version=version)
    return replace(made, **changes)  # type: ignore[arg-type]  # tests name any field


def row(of: Persona) -> StoredPersona:
    return StoredPersona(of.user_id, of.version, of.epoch, of.request_id, of.tier, encode(of))


TEMPLATE, STUDENT = persona(Tier.TEMPLATE), persona()
ROWS = [row(STUDENT), row(TEMPLATE)]
BODIES: list[bytes | None] = [encode(TEMPLATE), encode(STUDENT)]


def test_one_version_per_tier_the_same_everywhere_is_right() -> None:
    assert disagreement(REQUEST, ROWS, ROWS[0], BODIES) == ""
    assert disagreement(REQUEST, ROWS, ROWS[0], [*BODIES, BODIES[1]]) == ""  # published again, the same bytes
    superseded = row(persona(request_id="an earlier one", version=3))
    assert disagreement(REQUEST, [*ROWS, superseded], ROWS[0], BODIES) == ""


def test_what_was_published_before_a_removal_is_not_in_the_store() -> None:
    before = encode(persona(request_id="an earlier one", version=3))
    assert disagreement(REQUEST, ROWS, ROWS[0], [before, None, *BODIES]) == ""
    assert "is not the published one" in disagreement(REQUEST, ROWS, ROWS[0], [*BODIES, None])
    assert "other bytes than stored" in disagreement(REQUEST, ROWS, ROWS[0], [None, before, *BODIES])


@pytest.mark.parametrize(
    ("history", "latest", "published", "why"),
    [
        ([], None, [], "has no version"),
        ([row(persona(request_id="another"))], ROWS[0], BODIES, "has no version"),
        ([*ROWS, row(persona(version=99))], ROWS[0], BODIES, "two versions of one tier"),
        ([row(persona(version=99))], ROWS[0], BODIES, "another number"),
        (ROWS, ROWS[0], [BODIES[1], BODIES[0]], "latest persona is not the published one"),
        (ROWS, None, BODIES, "latest persona is not the published one"),
        (ROWS, ROWS[0], [encode(persona(summary="other")), *BODIES], "other bytes than stored"),
        (ROWS, ROWS[0], [BODIES[1]], "stored and not published"),
    ],
)
def test_what_disagrees_is_said(
    history: list[StoredPersona], latest: StoredPersona | None, published: list[bytes | None], why: str
) -> None:
    assert why in disagreement(REQUEST, history, latest, published)


def test_after_an_erasure_nothing_may_be_left() -> None:
    erasing = sample_request("ann", 4, epoch=1, command=Command.ERASE)
    assert disagreement(erasing, [], None, [BODIES[0], None]) == ""
    assert "is left" in disagreement(erasing, ROWS, ROWS[0], BODIES)
    assert "is left" in disagreement(erasing, [], None, BODIES)
