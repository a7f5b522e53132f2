"""Wording tasks for tests: everyday topics, in the shapes that personas have."""

from __future__ import annotations

from streams.tasks import InterestTask, NovelTask, WordingTask

TITLES = {
    "sourdough baking": ("Feeding a sourdough starter from scratch", "How to score bread so it opens in the oven"),
    "trail running": ("Trail running shoes for muddy hills", "Downhill technique on loose rock"),
    "houseplant care": ("Repotting a root bound monstera", "Why leaves turn yellow"),
    "jazz piano": ("Left hand voicings made simple", "Learn Autumn Leaves on piano"),
    "home espresso": ("Dialing in espresso at home", "Cheap grinder versus expensive grinder"),
    "chess openings": ("The Caro-Kann in ten minutes", "Traps in the Italian Game"),
    "birdwatching": ("Warblers of the spring migration", "Choosing binoculars for birding"),
    "retro video games": ("Restoring a Game Boy", "The history of the SNES"),
    "vegan cooking": ("Crispy tofu every time", "Weeknight lentil curry"),
    "science fiction, space, action": ("Gravity (2013)", "Oblivion (2013)"),
}


def sample_task(interests: int = 2, novel: int = 1, first: int = 0) -> WordingTask:
    """A task over consecutive topics, starting with the one at index `first`; the topics come after the interests."""
    labels = list(TITLES)
    labels = labels[first % len(labels) :] + labels[: first % len(labels)]
    watched = labels[: max(interests, 3)]
    return WordingTask(
        interests=tuple(
            InterestTask(label, 40 - 5 * i, (0, 1, -1)[i % 3], TITLES[label])
            for i, label in enumerate(labels[:interests])
        ),
        novel=tuple(
            NovelTask(label, (watched[i % len(watched)],), TITLES[label])
            for i, label in enumerate(labels[len(watched) : len(watched) + novel])
        ),
        overview=tuple((label, 40 - 5 * i) for i, label in enumerate(watched)),
    )
