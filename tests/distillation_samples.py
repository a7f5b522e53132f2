"""Contexts and pairs for tests of the distillation."""

from __future__ import annotations

from dataclasses import replace

import orjson

from streams.prompts import build_prompt, plain_answer
from streams.tasks import InterestTask, NovelTask, WordingTask, task_keys
from triton_models.distillation.pairs import Pair

TITLES = ("Feeding a starter", "My day long loaf", "Rye and spelt", "Folding wet dough", "Scoring patterns")


def interest(label: str = "sourdough baking", trend: int = 0, titles: tuple[str, ...] = TITLES) -> Pair:
    """A context of an interest."""
    return Pair("bakery", WordingTask((InterestTask(label, 20, trend, titles),), (), ()))


def topic(label: str = "pottery", via: tuple[str, ...] = ("sourdough baking",)) -> Pair:
    """A context of a topic."""
    titles = ("Throwing a first bowl", "Glazes for beginners")
    return Pair("bakery", WordingTask((), (NovelTask(label, via, titles),), ()))


def summary(*labels: str) -> Pair:
    """A context of a summary of these labels."""
    shares = range(45, 0, -5)
    overview = tuple(zip(labels or ("sourdough baking", "trail running"), shares, strict=False))
    return Pair("bakery", WordingTask((), (), overview))


def contexts(count: int) -> list[Pair]:
    """So many contexts of interests, each with a line of its own."""
    crafts = ("basket weaving", "lace making", "wood turning", "stone carving", "glass blowing", "rope splicing")
    places = ("harbors", "villages", "castles", "islands", "valleys", "deserts", "markets", "forests")
    labels = [f"{craft} in {place}" for place in places for craft in crafts]
    return [interest(label, titles=()) for label in labels[:count]]


def plain(context: Pair) -> Pair:
    """The pair of a context and a plain sentence of its facts."""
    return replace(context, text=text_of(context))


def text_of(context: Pair) -> str:
    """A plain sentence of a context's facts."""
    (key,) = task_keys(context.task)
    text: str = orjson.loads(plain_answer(build_prompt(context.task)))[key]
    return f"{text.removesuffix('.')} at all times."
