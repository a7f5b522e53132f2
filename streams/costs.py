"""What the wording of personas costs: shares, tokens and prices of the tiers, multiplied out. Pure.

Prices are in any one currency. A text is a persona's summary, a description or a reason. Of all texts the cache has
`cache_hit_rate`; of the others the teacher words `teacher_share`, a template `template_share` and the student the rest.

    student's cost = texts x tokens / (tokens a second x busy x 3,600) x price of its machine's hour
    teacher's cost = texts x (tokens in x price in + tokens out x price out) / 10^6
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from streams.records import Persona, Tier

MONTH_DAYS: Final = 30
CACHE: Final = "cache"
_SHARE: Final = 1.0
_ROUNDING: Final = 1e-9


def _input(what: str, most: float | None = None) -> Any:  # noqa: ANN401 - a dataclass field
    return field(metadata={"what": what, "most": most})


@dataclass(frozen=True, slots=True)
class CostInputs:
    """What the arithmetic begins with. Raises ValueError for a value below 0, a share above 1, and a machine that does
    nothing. Each field says in its metadata what it is (`what`) and the most it may be (`most`).
    """

    viewers: float = _input("viewers")
    personas_per_day: float = _input("personas a day of each viewer")
    texts_per_persona: float = _input("texts of a persona: summary, descriptions, reasons")
    cache_hit_rate: float = _input("share of texts that the wording cache has", _SHARE)
    teacher_share: float = _input("share of the other texts that the teacher words", _SHARE)
    template_share: float = _input("share of the other texts that are plain", _SHARE)
    student_tokens_in: float = _input("tokens read by the student for a text of its own, all tries")
    student_tokens_out: float = _input("tokens written by the student for a text of its own, all tries")
    student_tokens_per_second: float = _input("tokens, in and out, that the student's machine takes a second")
    student_busy: float = _input("share of that rate that is used", _SHARE)
    student_hour_price: float = _input("price of an hour of the student's machine")
    teacher_tokens_in: float = _input("tokens read by the teacher for a text of its own, all tries")
    teacher_tokens_out: float = _input("tokens written by the teacher for a text of its own, all tries")
    teacher_price_in: float = _input("price of a million tokens that the teacher reads")
    teacher_price_out: float = _input("price of a million tokens that the teacher writes")

    def __post_init__(self) -> None:
        for known in fields(self):
            value, most = getattr(self, known.name), known.metadata["most"]
            # Not (a and b) rather than (not a or not b): nothing compares with what is not a number.
            if not (0.0 <= value < float("inf")):
                raise ValueError(f"{known.name} is {value}, not a number of 0 or more")
            if most is not None and value > most:
                raise ValueError(f"{known.name} is {value}, more than {most:g}")
        both = self.teacher_share + self.template_share
        if both > 1.0 + _ROUNDING:
            raise ValueError(f"teacher_share and template_share are {both:g} together, more than all there is")
        for name in ("student_tokens_per_second", "student_busy"):
            if not getattr(self, name):
                raise ValueError(f"{name} is 0: the student would never end")


@dataclass(frozen=True, slots=True)
class TierCost:
    """One tier's part, a day: texts, their share of all (0..1), tokens, and what they cost a day and a month."""

    tier: str
    texts: float
    share: float
    tokens_in: float
    tokens_out: float
    cost_day: float
    cost_month: float


@dataclass(frozen=True, slots=True)
class Costs:
    """The tiers in the order of the cascade, and the whole. machines: of the student, at all times; the blended figures
    are of all personas, whatever their tier.
    """

    tiers: tuple[TierCost, ...]
    personas_day: float
    machines: float
    cost_day: float
    cost_month: float
    cost_per_thousand_personas: float
    cost_month_per_million_viewers: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Sums over persona records. texts: by tier, `cache` among them.

    New texts of a template that does not say how many are plain, as older ones, count as plain.
    """

    personas: int
    texts: dict[str, int]
    student_tokens_in: int
    student_tokens_out: int
    teacher_tokens_in: int
    teacher_tokens_out: int

    def inputs(self) -> dict[str, float]:
        """The inputs that these records state, by name: shares always, tokens of a tier only if it worded any text.

        Raises ValueError without a persona that has texts.
        """
        texts = sum(self.texts.values())
        if not texts:
            raise ValueError("no persona with texts: there is nothing to measure")
        worded = texts - self.texts[CACHE]
        found = {"texts_per_persona": texts / self.personas, "cache_hit_rate": self.texts[CACHE] / texts}
        if worded:
            found["teacher_share"] = self.texts[Tier.TEACHER] / worded
            found["template_share"] = self.texts[Tier.TEMPLATE] / worded
        for tier in (Tier.STUDENT, Tier.TEACHER):
            if own := self.texts[tier]:
                found[f"{tier}_tokens_in"] = getattr(self, f"{tier}_tokens_in") / own
                found[f"{tier}_tokens_out"] = getattr(self, f"{tier}_tokens_out") / own
        return found


def measure(personas: Iterable[Persona]) -> Measured:
    """Sums of the `model` blocks of personas, each counted as often as it comes."""
    count = 0
    texts = {CACHE: 0, str(Tier.STUDENT): 0, str(Tier.TEACHER): 0, str(Tier.TEMPLATE): 0}
    tokens_in = tokens_out = teacher_in = teacher_out = 0
    for persona in personas:
        model = persona.model
        count += 1
        new = max(0, model.items - model.items_cached - model.items_teacher)
        plain = min(new, model.items_plain or new) if persona.tier is Tier.TEMPLATE else 0
        texts[CACHE] += model.items_cached
        texts[Tier.TEACHER] += model.items_teacher
        texts[Tier.TEMPLATE] += plain
        texts[Tier.STUDENT] += new - plain
        tokens_in += model.tokens_in
        tokens_out += model.tokens_out
        teacher_in += model.teacher_tokens_in
        teacher_out += model.teacher_tokens_out
    return Measured(count, texts, tokens_in - teacher_in, tokens_out - teacher_out, teacher_in, teacher_out)


def costs(inputs: CostInputs) -> Costs:
    """The arithmetic of this module's first lines."""
    personas = inputs.viewers * inputs.personas_per_day
    texts = personas * inputs.texts_per_persona
    worded = texts * (1.0 - inputs.cache_hit_rate)
    taught, plain = worded * inputs.teacher_share, worded * inputs.template_share
    own = max(0.0, worded - taught - plain)
    hours = (
        own
        * (inputs.student_tokens_in + inputs.student_tokens_out)
        / (inputs.student_tokens_per_second * inputs.student_busy * 3600)
    )
    teaching = inputs.teacher_tokens_in * inputs.teacher_price_in + inputs.teacher_tokens_out * inputs.teacher_price_out

    def tier(name: str, count: float, tokens_in: float, tokens_out: float, cost: float) -> TierCost:
        share = count / texts if texts else 0.0
        return TierCost(name, count, share, count * tokens_in, count * tokens_out, cost, cost * MONTH_DAYS)

    tiers = (
        tier(CACHE, texts - worded, 0.0, 0.0, 0.0),
        tier(Tier.STUDENT, own, inputs.student_tokens_in, inputs.student_tokens_out, hours * inputs.student_hour_price),
        tier(Tier.TEACHER, taught, inputs.teacher_tokens_in, inputs.teacher_tokens_out, taught * teaching / 1e6),
        tier(Tier.TEMPLATE, plain, 0.0, 0.0, 0.0),
    )
    day = sum(part.cost_day for part in tiers)
    return Costs(
        tiers=tiers,
        personas_day=personas,
        machines=hours / 24,
        cost_day=day,
        cost_month=day * MONTH_DAYS,
        cost_per_thousand_personas=1000 * day / personas if personas else 0.0,
        cost_month_per_million_viewers=1e6 * day * MONTH_DAYS / inputs.viewers if inputs.viewers else 0.0,
    )


def as_dict(found: Costs) -> dict[str, Any]:
    """The costs as JSON has them: tiers by name."""
    whole = asdict(found)
    whole["tiers"] = {str(part.pop("tier")): part for part in whole["tiers"]}
    return whole
