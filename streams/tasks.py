"""What must be worded, by position, and the words for it: ids, labels and numbers are attached by the core."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

MAXIMUM_INTERESTS: Final = 6
MAXIMUM_NOVEL: Final = 4
INTEREST_KEYS: Final = "123456"
NOVEL_KEYS: Final = "abcd"
SUMMARY_KEY: Final = "s"
"""Keys of the answer: one object: the summary, then interests by digit, then novel topics by letter."""


@dataclass(frozen=True, slots=True)
class InterestTask:
    """An interest to describe. share_bucket: percent in steps of 5; trend: -1, 0, +1; titles: of its cluster."""

    label: str
    share_bucket: int
    trend: int
    titles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NovelTask:
    """A topic to give a reason for. via_labels: own interests that lead to it."""

    label: str
    via_labels: tuple[str, ...]
    titles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WordingTask:
    """What must be worded now: 0 to 6 interests, 0 to 4 topics, and a summary of `overview` (label, share_bucket)."""

    interests: tuple[InterestTask, ...]
    novel: tuple[NovelTask, ...]
    overview: tuple[tuple[str, int], ...]
    language: str = "en"


@dataclass(frozen=True, slots=True)
class Wording:
    """The words, by the positions of the task."""

    summary: str
    descriptions: tuple[str, ...]
    reasons: tuple[str, ...]


def answer_keys(interests: int, novel: int, *, summary: bool = True) -> tuple[str, ...]:
    """Keys of the answer, in order. interests: 0 to 6; novel: 0 to 4. ValueError beyond, or if nothing is asked."""
    if not (0 <= interests <= MAXIMUM_INTERESTS and 0 <= novel <= MAXIMUM_NOVEL):
        raise ValueError(f"{interests} interests and {novel} topics; at most {MAXIMUM_INTERESTS} and {MAXIMUM_NOVEL}")
    keys = (*(SUMMARY_KEY if summary else ""), *INTEREST_KEYS[:interests], *NOVEL_KEYS[:novel])
    if not keys:
        raise ValueError("the task asks for nothing: no interest, no topic and no overview")
    return keys


def task_keys(task: WordingTask) -> tuple[str, ...]:
    """Keys of the answer to `task`, in their order; a task without an overview asks for no summary."""
    return answer_keys(len(task.interests), len(task.novel), summary=bool(task.overview))


def split_task(task: WordingTask) -> tuple[WordingTask, ...]:
    """The same task in pieces of one text each, in the order of its keys.

    A small model words one item at a time far better than many at once, and what it says of an item then depends on
    that item alone.
    """
    summary = (replace(task, interests=(), novel=()),) if task.overview else ()
    interests = (replace(task, interests=(i,), novel=(), overview=()) for i in task.interests)
    novel = (replace(task, interests=(), novel=(n,), overview=()) for n in task.novel)
    return (*summary, *interests, *novel)


def wording_of(task: WordingTask, texts: list[str]) -> Wording:
    """Texts in the order of the task's keys, taken apart."""
    summary, items = (texts[0], texts[1:]) if task.overview else ("", texts)
    interests = len(task.interests)
    return Wording(summary, tuple(items[:interests]), tuple(items[interests:]))
