"""The student's prompt: the task's lines after worked examples, in the chat form the model was trained on.

The part that never changes comes first, so that a server with a prefix cache reads it once. Each line of a task is a
plain draft; the model turns it into a sentence. The answer is one compact JSON object under a grammar that depends
only on how many interests and topics there are, never on what they are, so that every grammar can be compiled before
serving. An untuned small model is best asked for one text at a time (`split_task`): with many items in one prompt it
mixes them up.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import orjson

from streams.wording import (
    EXAMPLES,
    INTEREST_KEYS,
    MAXIMUM_INTERESTS,
    MAXIMUM_NOVEL,
    NOVEL_KEYS,
    SUMMARY_KEY,
    Example,
    InterestTask,
    NovelTask,
    WordingTask,
    answer_keys,
    clean_label,
    sanitise_title,
    task_keys,
)

PROMPT_VERSION: Final = "1"
"""Changes with anything that changes prompts or grammars."""

_SYSTEM: Final = "Write each line as one short, smooth sentence about a viewer."
_INTEREST_HEADS: Final = ("Enjoys", "Follows", "Likes", "Returns to", "Often watches", "Keeps up with")
_NOVEL_HEADS: Final = ("Might like", "Could enjoy", "May try", "Might explore")
_SUMMARY_HEAD: Final = "Mostly watches"
_TITLES: Final = 2
_TITLE_CHARACTERS: Final = 40
_OVERVIEW: Final = 4
_TRENDS: Final = {1: " more and more", 0: "", -1: " less than before"}


# A sentence after its head: words with at most one comma each, then the full stop. No quote or backslash can occur.
def _alternatives(heads: tuple[str, ...]) -> str:
    return " | ".join(f'"{head}"' for head in heads)


_RULES: Final = rf"""
interest ::= ({_alternatives(_INTEREST_HEADS)}) rest
novel ::= ({_alternatives(_NOVEL_HEADS)}) rest
summary ::= "{_SUMMARY_HEAD}" rest
rest ::= (" " word ","?){{1,19}} " " word "."
word ::= part ("-" part)?
part ::= [A-Za-z0-9\u00C0-\u024F] [A-Za-z0-9\u00C0-\u024F']{{0,15}}
"""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is sent to the student. prompt_hash: of everything a task does not change, 16 hexadecimal digits."""

    text: str
    grammar: str
    maximum_tokens: int
    prompt_hash: str


def build_prompt(task: WordingTask) -> Prompt:
    """The prompt of a task, or better of a piece of one (`split_task`).

    ValueError beyond 6 interests or 4 topics, and for a task that asks for nothing.
    """
    return Prompt(
        text=f"{_PREFIX}{_turn('user', _lines(task))}<|im_start|>assistant\n",
        grammar=grammar_for(len(task.interests), len(task.novel), summary=bool(task.overview)),
        maximum_tokens=8 + 40 * len(task_keys(task)),
        prompt_hash=_PROMPT_HASH,
    )


def draft_answer(prompt: Prompt) -> str:
    """The drafts of the prompt as its answer, what a student says that words nothing anew: for tests and replays."""
    turn = prompt.text.rsplit("<|im_start|>user\n", 1)[1].split("<|im_end|>", 1)[0]
    return orjson.dumps(dict(line.split(". ", 1) for line in turn.splitlines())).decode()


def grammar_for(interests: int, novel: int, *, summary: bool = True) -> str:
    """The grammar, in the GBNF form that xgrammar reads, of the answer to a task of that shape. See `answer_keys`."""
    parts = [
        '"' + ("," if i else "{") + rf'\"{key}\":\""' + f" {_rule(key)} " + r'"\""'
        for i, key in enumerate(answer_keys(interests, novel, summary=summary))
    ]
    return f'root ::= {" ".join(parts)} "}}"{_RULES}'


def all_grammars() -> list[str]:
    """Every grammar that a request can carry: what a server compiles before it serves."""
    shapes = [
        (interests, novel, summary)
        for interests in range(MAXIMUM_INTERESTS + 1)
        for novel in range(MAXIMUM_NOVEL + 1)
        for summary in (True, False)
        if interests or novel or summary
    ]
    return [grammar_for(interests, novel, summary=summary) for interests, novel, summary in shapes]


def _rule(key: str) -> str:
    if key == SUMMARY_KEY:
        return "summary"
    return "interest" if key in INTEREST_KEYS else "novel"


def _lines(task: WordingTask) -> str:
    labels = [clean_label(label) for label, _ in task.overview[:_OVERVIEW]]
    shown = [label for label in labels if label]
    lines = [f"{SUMMARY_KEY}. {_SUMMARY_HEAD} {_enumerated(shown)}."] if task.overview else []
    heads = _picked(_INTEREST_HEADS, [i.label for i in task.interests])
    lines += [f"{key}. {h} {_interest(i)}" for key, h, i in zip(INTEREST_KEYS, heads, task.interests, strict=False)]
    heads = _picked(_NOVEL_HEADS, [n.label for n in task.novel])
    lines += [f"{key}. {h} {_novel(n)}" for key, h, n in zip(NOVEL_KEYS, heads, task.novel, strict=False)]
    return "\n".join(lines)


def _picked(heads: tuple[str, ...], labels: list[str]) -> list[str]:
    """A head for each label: by the label alone unless an earlier one took it, so that single items differ too."""
    left = list(heads)
    picked = []
    for label in labels:
        wanted = heads[blake2b(label.encode("utf-8", "replace"), digest_size=1).digest()[0] % len(heads)]
        picked.append(left.pop(left.index(wanted) if wanted in left else 0))
    return picked


def _interest(interest: InterestTask) -> str:
    label = clean_label(interest.label) or "this topic"
    titles = _titles(interest.titles)
    detail = f", from {titles[0]} to {titles[1]}" if len(titles) > 1 else "".join(f", such as {t}" for t in titles)
    return f"{label}{_TRENDS.get(interest.trend, '')}{detail}."


def _novel(novel: NovelTask) -> str:
    label = clean_label(novel.label) or "this topic"
    via = [name for name in map(clean_label, novel.via_labels) if name]
    after = f" after {_enumerated(via[:2])}" if via else ""
    return f"{label}{after}{''.join(f', starting with {t}' for t in _titles(novel.titles)[:1])}."


def _titles(titles: tuple[str, ...]) -> list[str]:
    cleaned = [_main_clause(sanitise_title(title)) for title in titles]
    return [_lowered(title) for title in cleaned if title][:_TITLES]


def _main_clause(title: str) -> str:
    """A title up to its first comma if that is more than one word, as short as a sentence can take it."""
    clause = title.partition(",")[0]
    return sanitise_title(clause if " " in clause else title, _TITLE_CHARACTERS)


def _lowered(title: str) -> str:
    """Begin with a small letter, as inside a sentence, where the title is a phrase and not a name."""
    first, _, rest = title.partition(" ")
    return title[0].lower() + title[1:] if first.istitle() and rest[:1].islower() else title


def _enumerated(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}" if labels else "many topics"


def _turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def _answer(example: Example) -> str:
    values = (example.wording.summary, *example.wording.descriptions, *example.wording.reasons)
    return orjson.dumps(dict(zip(task_keys(example.task), filter(None, values), strict=True))).decode()


_PREFIX: Final = _turn("system", _SYSTEM) + "".join(
    _turn("user", example.draft) + _turn("assistant", _answer(example)) for example in EXAMPLES
)
_PROMPT_HASH: Final = blake2b("\n".join([PROMPT_VERSION, _PREFIX, *all_grammars()]).encode(), digest_size=8).hexdigest()
