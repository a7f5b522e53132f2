"""Words of texts: own rules, apart from those of the gate."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Final

from triton_models.distillation.pairs import PAIRS, read_pairs

_WORD: Final = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)?")
_SENTENCE: Final = re.compile(r"(?<=[.!?])\s+")
_VOWELS: Final = re.compile(r"[aeiouy]+")
_FUNCTION_TEXT: Final = """
a about after again all along also an and any are as at back be because been before but by can could day days do does
down during each even every fans few for from get gets go goes good has have how if in into is it its just keeps
lately less like likes may might more most mostly much not now of off often on one or other out over own pace quite
rather return returns same since so some someone sometimes still such than that the their them then there these they
this those through time times title titles to too try turn turns under until up very video videos viewer was watch
watches watching way well what when where which while who will with worth would you your
"""
FUNCTION_WORDS: Final = frozenset(_FUNCTION_TEXT.split())
"""Words of any sentence, that say nothing of a topic."""


def plain(text: str) -> str:
    """Compatibility forms folded, invisible characters dropped, lower case."""
    folded = unicodedata.normalize("NFKC", text)
    return "".join(c for c in folded if unicodedata.category(c) not in ("Cf", "Cc", "Mn") or c in "\n\t ").casefold()


def words(text: str) -> list[str]:
    """The words and numbers of a text, in plain form; an apostrophe inside a word belongs to it."""
    return [word.replace("\u2019", "'") for word in _WORD.findall(plain(text))]


def root(word: str) -> str:
    """What the forms of a word share, crudely: its first letters, without an ending."""
    word = word.removesuffix("'s")
    short = re.sub(r"(?:ies|ing|ers|er|es|ed|s|y|e)$", "", word) if len(word) > 4 else word.rstrip("s")
    short = short[:-1] if len(short) > 3 and short[-1] == short[-2] else short
    return short[:6]


def content_roots(text: str) -> frozenset[str]:
    """Roots of the words that are about something."""
    return frozenset(root(word) for word in words(text) if word not in FUNCTION_WORDS and len(word) > 1)


def ngrams(sequence: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Runs of `size` words, in order."""
    return [tuple(sequence[i : i + size]) for i in range(len(sequence) - size + 1)]


def sentences(text: str) -> list[str]:
    """A text taken apart at its full stops."""
    return [part for part in _SENTENCE.split(text.strip()) if part]


def distinct(texts: Iterable[str], size: int) -> float:
    """Different runs of `size` words as a share of all, 0..1 (distinct-n of Li et al. 2016); 0 for none."""
    found = [gram for text in texts for gram in ngrams(words(text), size)]
    return len(set(found)) / len(found) if found else 0.0


def entropy(items: Iterable[str]) -> float:
    """Shannon entropy in bits."""
    counts = Counter(items)
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values()) if total else 0.0


def syllables(word: str) -> int:
    """Syllables of an English word, at least 1: groups of vowels, a silent e apart."""
    groups = len(_VOWELS.findall(word))
    if word.endswith("e") and not word.endswith("le") and groups > 1:
        groups -= 1
    return max(1, groups)


def flesch(text: str) -> float:
    """Flesch reading ease (Flesch 1948): 206.835 - 1.015 words/sentences - 84.6 syllables/words; higher is easier."""
    found = words(text)
    if not found:
        return 0.0
    ease = 1.015 * len(found) / max(1, len(sentences(text))) + 84.6 * sum(map(syllables, found)) / len(found)
    return 206.835 - ease


@cache
def common_words() -> frozenset[str]:
    """Words that an editor wrote in lower case or at the beginning of a sentence: no names.

    Of the packaged texts that students learn from, which are written for other catalogues than those held out.
    """
    found: set[str] = set()
    for pair in read_pairs([PAIRS]):
        text = pair.text or ""
        tokens = _WORD.findall(text)
        found.update(token.replace("\u2019", "'") for token in tokens if token[0].islower())
        found.update(sentence.split()[0].casefold().strip(".,'") for sentence in sentences(text))
    return frozenset(found) | FUNCTION_WORDS
