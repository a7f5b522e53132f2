"""The student's prompt and grammars: one text a prompt, in the chat form the model was trained on.

A prompt is one line of facts: how the sentence begins, what it is about, and a few titles:

    s. Mostly watches | sourdough baking 40%, trail running 25%
    1. Returns to | sourdough baking | steady | Feeding a starter / My 24 hour loaf
    a. May want to try | pottery | after sourdough baking | Throwing a first bowl

The core chooses the opening by the content, so that sentences differ between items and are the same for the same item.
The answer is one compact JSON object of one text, under a grammar that depends on its key alone, so that every grammar
is compiled before serving. What comes before the line never changes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import orjson

from streams.cleaning import clean_label, retellable
from streams.tasks import INTEREST_KEYS, NOVEL_KEYS, SUMMARY_KEY, InterestTask, NovelTask, WordingTask, task_keys
from streams.templates import enumerated

PROMPT_VERSION: Final = "2"
"""Changes with the form of prompts and with the grammars. What a prompt says is part of each content key."""

MAXIMUM_TOKENS: Final = 72
"""Of an answer, its JSON included."""

OWN_LABEL: Final = ""
"""An opening that is the item's own label."""
INTEREST_OPENINGS: Final = {
    0: (
        *("Enjoys", "Likes", "Follows", "Often watches", "Returns to", "Keeps up with", "Makes time for"),
        *("Regularly picks", "Has a lasting interest in", "Is fond of", "Comes back to", "Appreciates"),
        *(OWN_LABEL, OWN_LABEL, OWN_LABEL),
    ),
    1: (
        *("Watches more and more", "Is getting into", "Increasingly picks", "Shows a growing interest in"),
        *("Is turning to", "Has taken to", "Spends more and more time on", OWN_LABEL, OWN_LABEL),
    ),
    -1: (
        *("Still watches", "Now and then returns to", "Watches less", "Keeps a quieter interest in"),
        *("Occasionally picks", "Spends less time on", OWN_LABEL, OWN_LABEL),
    ),
}
"""How a description may begin, by trend."""
NOVEL_OPENINGS: Final = (
    *("Might enjoy", "Could like", "May want to try", "Might look into", "Could branch out into", "May find"),
    *(OWN_LABEL, OWN_LABEL, OWN_LABEL),
)
VIA_OPENINGS: Final = ("After", "With", "Liking", "From")
"""Further openings of a reason where some interest leads to the topic."""
SUMMARY_OPENINGS: Final = (
    *("Mostly watches", "Leans toward", "Comes mainly for", "Spends most time on", "Returns most often to"),
    *(OWN_LABEL, OWN_LABEL),
)

_SYSTEM: Final = "Write the line as one short sentence about a viewer."
_INTEREST_TITLES: Final = 3
_NOVEL_TITLES: Final = 2
_OVERVIEW: Final = 4
TRENDS: Final = {1: "rising", 0: "steady", -1: "falling"}
NEW: Final = "new"
"""Marks of an interest by its trend, and of a topic that no interest leads to."""
_NAMELESS: Final = "this topic"

# Words with at most one comma each, then the full stop. No quote, backslash or line's mark can occur.
_LETTERS: Final = r"A-Za-z0-9\u00C0-\u024F"
_MORE_WORDS: Final = "{1,32}"
_MORE_PARTS: Final = "{0,2}"
_MORE_LETTERS: Final = "{0,18}"
_RULES: Final = rf"""
text ::= word ","? (" " word ","?){_MORE_WORDS} " " word "."
word ::= part ("-" part){_MORE_PARTS}
part ::= [{_LETTERS}] [{_LETTERS}']{_MORE_LETTERS}
"""
_PART: Final = rf"[{_LETTERS}][{_LETTERS}']{_MORE_LETTERS}"
_WORD: Final = rf"{_PART}(?:-{_PART}){_MORE_PARTS}"
SAYABLE: Final = re.compile(rf"{_WORD},?(?: {_WORD},?){_MORE_WORDS} {_WORD}\.")
"""The texts that the grammars allow."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a student reads of one text.

    key: of the answer; opening: how the text begins; subject: a label, or for a summary labels with their shares; mark:
    an interest's trend, or where a topic comes from; titles: of the cluster.
    """

    key: str
    opening: str
    subject: str
    mark: str = ""
    titles: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The facts as one line, without the key."""
        return " | ".join(filter(None, (self.opening, self.subject, self.mark, " / ".join(self.titles))))


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is sent to the student. prompt_hash: of everything a task does not change, 16 hexadecimal digits."""

    text: str
    grammar: str
    maximum_tokens: int
    prompt_hash: str


def build_prompt(piece: WordingTask, variant: int = 0) -> Prompt:
    """The prompt of a piece of a task: see `split_task`. ValueError for a task that asks for more than one text.

    variant: of `facts_of`, for another try at the same facts.
    """
    facts = facts_of(piece, variant)
    return Prompt(
        text=f"{_PREFIX}<|im_start|>user\n{facts.key}. {facts.line}<|im_end|>\n<|im_start|>assistant\n",
        grammar=grammar_for(facts.key),
        maximum_tokens=MAXIMUM_TOKENS,
        prompt_hash=_PROMPT_HASH,
    )


def facts_of(piece: WordingTask, variant: int = 0) -> Facts:
    """The facts of a piece as the student reads them; ValueError unless it asks for one text.

    variant: another one has another opening, and begins with another title. What a student stumbles over in one line,
    such as a rare label that it has to begin with, it mostly says well in the next.
    """
    keys = task_keys(piece)
    if len(keys) > 1:
        raise ValueError(f"a prompt asks for one text, this task for {len(keys)}")
    if piece.overview:
        return _summary(piece.overview, variant)
    return _interest(piece.interests[0], variant) if piece.interests else _novel(piece.novel[0], variant)


def content_of(piece: WordingTask) -> tuple[str, ...]:
    """All that the prompts of a piece say, whichever the variant: key, line, and each title that one may show."""
    facts = facts_of(piece)
    titles = [title for interest in piece.interests for title in interest.titles]
    titles += [title for topic in piece.novel for title in topic.titles]
    return facts.key, facts.line, *_usable(tuple(titles), facts.subject)


def plain_answer(prompt: Prompt) -> str:
    """The facts of a prompt as a plain sentence, what a student says that learned nothing: for tests."""
    key, line = prompt.text.rsplit("<|im_start|>user\n", 1)[1].split("<|im_end|>", 1)[0].split(". ", 1)
    opening, subject, *rest = line.split(" | ")
    if key == SUMMARY_KEY:
        labels = enumerated([share.rsplit(" ", 1)[0] for share in subject.split(", ")])
        text = f"{opening} {labels}." if opening in SUMMARY_OPENINGS else f"{opening} leads before all others."
    elif key in INTEREST_KEYS:
        trend, titles = rest[0], rest[1:]
        moved = {"rising": " more and more", "falling": " less than before"}.get(trend, "")
        named = any(opening in openings for openings in INTEREST_OPENINGS.values())
        detail = f", as in {titles[0].split(' / ')[0]}" if titles else ""
        text = f"{opening} {subject}{detail}." if named else f"{opening} is watched{moved}{detail}."
    else:
        via = rest[0].removeprefix("after ")
        text = {
            "After": f"After {via}, {subject} may be worth a try.",
            "With": f"With {via} among the favorites, {subject} may be worth a try.",
            "Liking": f"Liking {via} may lead to {subject}.",
            "From": f"From {via} it is a short way to {subject}.",
        }.get(opening, f"{opening} {subject}{f' {rest[0]}' if via != 'new' else ''}.")
        if opening not in NOVEL_OPENINGS and opening not in VIA_OPENINGS:
            text = f"{opening} may suit{f' {rest[0]}' if via != 'new' else ' as well'}."
    return orjson.dumps({key: text}).decode()


def grammar_for(key: str) -> str:
    """The grammar, in the GBNF form that xgrammar reads, of an answer of one text under `key`.

    All interests share one grammar, and so do all topics: a prompt's key is the first of its kind.
    """
    return rf'root ::= "{{\"{key}\":\"" text "\"}}"{_RULES}'


def all_grammars() -> list[str]:
    """Every grammar that a request can carry: what a server compiles before it serves."""
    return [grammar_for(key) for key in (SUMMARY_KEY, INTEREST_KEYS[0], NOVEL_KEYS[0])]


def _summary(overview: tuple[tuple[str, int], ...], variant: int) -> Facts:
    shares = {label: share for label, share in ((clean_label(name), share) for name, share in overview) if label}
    named = [(label.replace(",", ""), share) for label, share in shares.items()][:_OVERVIEW] or [(_NAMELESS, 0)]
    content = [f"{label}{share}" for label, share in named]
    opening = _picked(SUMMARY_OPENINGS, variant, *content) or _capitalised(named[0][0])
    return Facts(SUMMARY_KEY, opening, ", ".join(f"{label} {share}%" for label, share in named))


def _interest(interest: InterestTask, variant: int) -> Facts:
    label = clean_label(interest.label) or _NAMELESS
    openings = INTEREST_OPENINGS.get(interest.trend, INTEREST_OPENINGS[0])
    opening = _picked(openings, variant, label, str(interest.trend)) or _capitalised(label)
    titles = _titles(interest.titles, _INTEREST_TITLES, variant, label)
    return Facts(INTEREST_KEYS[0], opening, label, TRENDS.get(interest.trend, TRENDS[0]), titles)


def _novel(novel: NovelTask, variant: int) -> Facts:
    label = clean_label(novel.label) or _NAMELESS
    via = [name for name in map(clean_label, novel.via_labels) if name][:2]
    openings = (*NOVEL_OPENINGS, *VIA_OPENINGS) if via else NOVEL_OPENINGS
    opening = _picked(openings, variant, label, *via) or _capitalised(label)
    titles = _titles(novel.titles, _NOVEL_TITLES, variant, label)
    return Facts(NOVEL_KEYS[0], opening, label, f"after {enumerated(via)}" if via else NEW, titles)


def _picked(openings: tuple[str, ...], variant: int, *content: str) -> str:
    digest = blake2b("\x1f".join(content).encode("utf-8", "replace"), digest_size=2).digest()
    chosen, distinct = openings[int.from_bytes(digest, "big") % len(openings)], list(dict.fromkeys(openings))
    return distinct[(distinct.index(chosen) + variant) % len(distinct)]


def _titles(titles: tuple[str, ...], count: int, variant: int, label: str) -> tuple[str, ...]:
    """The first titles that a text may retell."""
    usable = _usable(titles, label)
    start = variant % len(usable) if usable else 0
    return tuple([*usable[start:], *usable[:start]][:count])


def _usable(titles: tuple[str, ...], label: str) -> list[str]:
    return [retold for retold in (retellable(title, label) for title in titles) if retold]


def _capitalised(label: str) -> str:
    return label[0].upper() + label[1:]


_PREFIX: Final = f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n"
_PROMPT_HASH: Final = blake2b("\n".join([PROMPT_VERSION, _PREFIX, *all_grammars()]).encode(), digest_size=8).hexdigest()
