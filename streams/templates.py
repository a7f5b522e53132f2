"""Plain sentences without a model, as candidates: `streams.wording` takes the first one that passes the gate."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Final

from streams.cleaning import clean_label, retellable
from streams.tasks import INTEREST_KEYS, NOVEL_KEYS, SUMMARY_KEY, WordingTask

# Template sentences: L is the label, V the labels it comes from, T a title. All other words are neutral or openers.
_DESCRIPTIONS: Final = (
    "Enjoys L and comes back to it often.",
    "Likes to spend time with L.",
    "Follows L with steady interest.",
    "Often picks videos about L.",
    "Returns to L again and again.",
    "Keeps L among the regular favorites.",
    "Watches a good deal of L.",
    "Finds time for L on most days.",
)
_DESCRIPTIONS_RISING: Final = (
    "Watches more L lately than before.",
    "Spends more and more time on L.",
    "Has turned to L more often of late.",
    "Leans toward L more with each day.",
    "Finds new room for L these days.",
    "Goes for L much more than it used to be.",
)
_DESCRIPTIONS_FALLING: Final = (
    "Still watches L, though less than before.",
    "Comes back to L now and then.",
    "Keeps up with L from time to time.",
    "Looks in on L less often these days.",
    "Has a lasting but calmer interest in L.",
    "Stays with L at a slower pace.",
)
_WITH_TITLE: Final = (
    "Enjoys L, with titles like T.",
    "Follows L, for example T.",
    "Likes L, such as T.",
    "Returns to L for videos like T.",
    "Keeps up with L, including T.",
)
_REASONS: Final = (
    "Because of V, it could be time to try L.",
    "L may well appeal after so much V.",
    "From V it is a short way to L.",
    "Fans of V often find something in L.",
    "With V already a favorite, L is worth a look.",
    "Since V goes down well, L might too.",
)
_REASONS_ALONE: Final = (
    "L could be worth a first look.",
    "It could be a good time to try L.",
    "There may be something new to find in L.",
    "There may be something to like in L.",
    "Worth a look next is L.",
)
_SUMMARIES: Final = (
    "Mostly watches L.",
    "Spends most of the time on L.",
    "Comes here mainly for L.",
    "Much of the viewing goes to L.",
)
FRAMES: Final = (
    *(*_DESCRIPTIONS, *_DESCRIPTIONS_RISING, *_DESCRIPTIONS_FALLING),
    *(*_WITH_TITLE, *_REASONS, *_REASONS_ALONE, *_SUMMARIES),
)


def candidates_of(key: str, task: WordingTask) -> Iterator[str]:
    """Sentences for `key`, best first; the last ones are plain enough to fit any facts."""
    if key == SUMMARY_KEY:
        yield from _summaries(task)
        return
    if key in INTEREST_KEYS:
        interest = task.interests[INTEREST_KEYS.index(key)]
        label = clean_label(interest.label) or "this topic"
        titles = [retellable(title, label) for title in interest.titles]
        titles = [title for title in titles if 1 < len(title.split()) <= 9]
        trend = {1: _DESCRIPTIONS_RISING, -1: _DESCRIPTIONS_FALLING}.get(interest.trend, ())
        pick = _picker(interest.label, *interest.titles)
        yield from (filled(frame, label) for frame in pick(trend))
        for title in titles:
            yield from (filled(frame, label, title=title) for frame in pick(_WITH_TITLE))
        # Where the label cannot be used, a title has to ground the sentence.
        fallback = [label, *filter(None, (clean_label(title) for title in interest.titles))]
        for name in fallback:
            yield from (
                filled(frame, name) for frame in pick((*_DESCRIPTIONS, *_DESCRIPTIONS_RISING, *_DESCRIPTIONS_FALLING))
            )
        return
    novel = task.novel[NOVEL_KEYS.index(key)]
    label = clean_label(novel.label) or "this topic"
    via = [name for name in map(clean_label, novel.via_labels) if name]
    pick = _picker(novel.label, *novel.via_labels)
    joined = [enumerated(via[:2])] if len(via) > 1 else []
    # Where the label cannot be used, a title has to name the topic.
    for name in [label, *filter(None, map(clean_label, novel.titles))]:
        for names in (*joined, *via):
            yield from (filled(frame, name, via=names) for frame in pick(_REASONS))
        yield from (filled(frame, name) for frame in pick(_REASONS_ALONE))


def _summaries(task: WordingTask) -> Iterator[str]:
    labels = list(dict.fromkeys(filter(None, (clean_label(label) for label, _ in task.overview))))
    pick = _picker(*labels)
    for count in range(min(3, len(labels)), 0, -1):
        yield from (filled(frame, enumerated(labels[:count])) for frame in pick(_SUMMARIES))
    for label in labels:
        yield from (filled(frame, label) for frame in pick(_SUMMARIES))
    yield from (filled(frame, "a mix of topics") for frame in pick(_SUMMARIES))


def _picker(*content: str) -> Callable[[tuple[str, ...]], list[str]]:
    """Rotates a tuple of frames by a hash of the content."""
    seed = int.from_bytes(blake2b("\x1f".join(content).encode("utf-8", "replace"), digest_size=4).digest(), "big")

    def pick(frames: tuple[str, ...]) -> list[str]:
        start = seed % len(frames) if frames else 0
        return [*frames[start:], *frames[:start]]

    return pick


def filled(frame: str, label: str, *, via: str = "", title: str = "") -> str:
    """Put the words in and begin with a capital. Single passes: what is put in is never searched again."""
    words = {"L": label, "V": via, "T": title}
    text = re.sub(r"\b[LVT]\b", lambda match: words[match.group()], frame)
    return text[0].upper() + text[1:]


def enumerated(labels: Sequence[str]) -> str:
    """One label or more as a phrase: `a, b and c`."""
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"
