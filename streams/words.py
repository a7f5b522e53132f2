"""English words as the gate and the templates compare them: tokens, stems, and which of them carry no topic."""

from __future__ import annotations

import re
from typing import Final, TypeAlias

# Words that carry no topic: they neither ground a sentence nor count against it.
_NEUTRAL_TEXT: Final = """
a about across after again all along already also although always among an and another any are
around as at attention away back basics be because been before beginner beginners behind being best
better between beyond big both but by can clip clips close comes common could current currently day
days deep did different discover do does down during each easy either else enjoy enjoying enjoys
enough even ever every everyday everything explained explore explores exploring fan fans far favor
favorite favorites favourite few finally find first follow following follows for frequent frequently
fresh from full further gets give gives go goes good great ground guide had has have having he her
here hers him his home how idea if in inside instead interest interests into is it its itself just
keep keeps kind know last lately learn learning least less lesson let life like likes list little
long look looks lot lots love loves main mainly make makes many may maybe me might mind mix more
most mostly much my natural near need never new next nice no not now of off often on once one only
open or other others our out outside over own pace part parts pick picks place plain plus quite
rather really recent recently regular regularly return returns rich right same see seems set several
share shares she short should show shows side simple simply since small so some something sometimes
soon start starting starts steady step steps still such take takes taste tastes tend than that the
their them theme themes then there these they thing things this those through time times tips to
together too topic topics toward try trying turn turns two under until up upon use used using
various very via video videos view viewer viewers viewing want was watch watched watches watching
way ways we well were what when where which while who whose why wide will with within without works
world worth would year yet you your
"""
NEUTRAL: Final = frozenset(_NEUTRAL_TEXT.split())
Trigrams: TypeAlias = frozenset[tuple[str, str, str]]
_TOKEN: Final = re.compile(r"[^\W\d_]+|\d+")


def trigrams_of(text: str) -> Trigrams:
    """Runs of three words."""
    tokens = tokens_of(text)
    return frozenset(zip(tokens, tokens[1:], tokens[2:], strict=False))


def tokens_of(text: str) -> list[str]:
    """Words and numbers in small letters, in their order."""
    return [word.casefold() for word in words_of(text)]


def words_of(text: str) -> list[str]:
    """Words and numbers as they are written."""
    return _TOKEN.findall(text)


def stem_of(word: str) -> str:
    """A crude English stem, the same for the forms of one word: baking, bakes, baked, baker -> bak."""
    for ending in ("ings", "ing", "iers", "ies", "ier", "ers", "er", "ed", "es", "s", "y", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


NEUTRAL_STEMS: Final = frozenset(stem_of(word) for word in NEUTRAL)


def stems_of(text: str) -> frozenset[str]:
    """Stems of the topical words; a one-letter word or a number is none."""
    return frozenset(
        stem_of(t)
        for t in tokens_of(text)
        if t not in NEUTRAL and not t.isdecimal() and (len(t) > 1 or not t.isascii())
    )
