"""A viewer's personas for tests that show them: realistic, and every optional part present."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from streams.records import (
    Basis,
    Changes,
    Evidence,
    Explanation,
    Horizon,
    Maturity,
    Model,
    Persona,
    PersonaInterest,
    PersonaNovel,
    Rule,
    Tier,
)

NOON = 1_795_348_800_000  # 2026-11-22T12:00:00Z
DAY = 86_400_000
TITLES: Mapping[str, str] = MappingProxyType(
    {
        "v-pasta": "Hand-rolled tagliatelle in one hour",
        "v-sauce": "Five sauces from one pot of tomatoes",
        "v-gravel": "Gravel bikes under 1,000: an honest test",
    }
)


@dataclass(frozen=True)
class SampleCard:
    label: str


@dataclass(frozen=True)
class SampleRegistry:
    cards: Mapping[int, SampleCard] = field(default_factory=lambda: {9: SampleCard("true crime")})
    titles: Mapping[str, str] = field(default_factory=lambda: TITLES)

    def title_of(self, video_id: str) -> str | None:
        return self.titles.get(video_id)


def sample_persona(user_id: str = "ann", sequence: int = 5, **changes: object) -> Persona:
    persona = Persona(
        user_id=user_id,
        epoch=0,
        version=sequence * 8 + 2,
        previous_version=(sequence - 1) * 8 + 2,
        request_id=f"request-{user_id}-{sequence}",
        as_of=NOON,
        generated_at=NOON + 2_400,
        tier=Tier.STUDENT,
        cached=False,
        language="en",
        maturity=Maturity.MATURE,
        basis=Basis(events=214, n_eff=63.5, first_ts=NOON - 60 * DAY, last_ts=NOON),
        model=Model("student", "smollm2-135m", "0f3a", 412, 96, 1_830),
        summary="Cooks Italian at weekends and has lately taken to riding gravel bikes.",
        interests=(
            PersonaInterest(
                "i-cook", 3, "italian cooking", 0.41, Horizon.LONG, -1,
                "Watches fresh pasta and slow sauces from start to finish.", "fresh pasta at home", 0.9,
                (Evidence("v-pasta", NOON - 2 * DAY), Evidence("v-sauce", NOON - DAY)), NOON - 50 * DAY,
            ),
            PersonaInterest(
                "i-bike", 7, "gravel cycling", 0.28, Horizon.SHORT, 1,
                "Compares bikes and tyres for unpaved roads.", "gravel bike review", 0.7,
                (Evidence("v-gravel", NOON - 3_600_000), Evidence("v-unknown", NOON)), NOON - DAY, pinned=True,
            ),
        ),
        novel=(
            PersonaNovel(
                12, "bikepacking trips", "Longer rides follow from testing bikes.", "bikepacking", (7,), 3.2, 0.6
            ),
        ),
        avoid=(9,),
        changes=Changes(added=("i-bike",), reworded=("i-cook",)),
        rule=Rule.DRIFT,
        registry_version=1,
        explanation=Explanation(
            Rule.DRIFT, 2.314, 1.9, 37, 0.212, 0.142,
            ((7, "gravel cycling", 0.03, 0.28),), ((3, "italian cooking", 0.62, 0.41),),
        ),
    )  # fmt: skip
    return replace(persona, **changes)  # type: ignore[arg-type]  # tests name any field


def hostile_persona(user_id: str, text: str) -> Persona:
    """The sample with `text` wherever text from outside can stand."""
    persona = sample_persona(user_id)
    why = persona.explanation
    assert why is not None
    return replace(
        persona,
        summary=text,
        language=text,
        request_id=text,
        model=replace(persona.model, name=text, version=text),
        interests=tuple(
            replace(
                interest,
                label=text,
                description=text,
                evidence=tuple(replace(watch, video_id=text) for watch in interest.evidence),
            )
            for interest in persona.interests
        ),
        novel=tuple(replace(topic, label=text, reason=text) for topic in persona.novel),
        explanation=replace(why, risen=((7, text, 0.1, 0.2),), fallen=((3, text, 0.2, 0.1),)),
    )
