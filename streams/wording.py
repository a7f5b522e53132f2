"""The gate that every worded text passes, whoever wrote it, and plain words that pass it for any task.

`parse_wording` refuses an answer that is not exactly of the asked form, says what the facts do not hold, or looks
unsafe. Wording is English, whatever the task's language.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import lru_cache
from itertools import pairwise
from typing import Final, NamedTuple

import orjson

from streams.cleaning import CLEANED, clean_label, sanitise_title, unsafe
from streams.tasks import INTEREST_KEYS, NOVEL_KEYS, SUMMARY_KEY, Wording, WordingTask, task_keys, wording_of
from streams.templates import FRAMES, candidates_of, filled
from streams.words import NEUTRAL, NEUTRAL_STEMS, Trigrams, stem_of, stems_of, tokens_of, trigrams_of, words_of

MAXIMUM_ANSWER_BYTES: Final = 8192
ITEM_WORDS: Final = (3, 26)
SUMMARY_WORDS: Final = (3, 40)
FRAME: Final = 3
"""Trigrams without a word of the facts that two texts of a persona may not share, if they are most of one's."""
UNKNOWN: Final = 1
"""Topical words of a text that may be none of its facts: a bridge between two titles."""
ITEM_CHARACTERS: Final = 180
SUMMARY_CHARACTERS: Final = 280


class WordingRejected(ValueError):  # noqa: N818
    """An answer that must not be published. reason: a short code; detail: where and what."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


_NUMBER_TEXT: Final = """
two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty thirty forty fifty
sixty seventy eighty ninety hundred hundreds thousand thousands million millions billion dozen dozens
half halves third thirds quarter quarters fifth fifths tenth tenths double twice triple thrice
"""
_NUMBERS: Final = frozenset(_NUMBER_TEXT.split())
"""Numbers in words, which need the same support as digits; one, first and second are as often no numbers."""
_GAINS: Final = re.compile(r" (?:more and more|increasingly|more often|growing interest) ")
_LOSES: Final = re.compile(r" (?:less (?:than|often|now|time)|though less|watch(?:es|ed) less|quieter|fading) ")
"""What says that an interest gains or loses."""
_DISLIKE: Final = re.compile(r" (?:hates?|dislikes?|avoids?|not (?:at all|into|interested|like)|no interest|never) ")
_WATCHING: Final = frozenset(("enjoys", "follows", "likes", "loves", "often", "returns", "spends", "watches"))
"""First words that say that something is watched: none may begin the reason of a topic that is new."""
_OPENERS_TEXT: Final = """
appreciates branching divides has increasingly is liking makes now occasionally shows spends
picks studies should a after again also an and another anyone as at because both comes could curious drawn enjoys
especially explores fans finds follows for from gives goes has if in interested into is it keeps
leans learns likes looks loves mainly many may might most mostly much often picks on one prefers regularly
returns since some sometimes spends stays still such that the there these this through time tunes
turns viewing watches when where while with worth would
"""
_OPENERS: Final = frozenset(_OPENERS_TEXT.split())
"""First words of a sentence that are no names."""
_FRAME_WORDS: Final = """
perhaps especially choice branch lead grow clear alongside increasingly appreciates suit occasionally taken
question fond amount fair second nearly quiet quieter instance
closely reward remains whether equally useful change ahead besides help
"""
_FRAME_STEMS: Final = frozenset(map(stem_of, _FRAME_WORDS.split())).union(
    *(map(stem_of, tokens_of(frame)) for frame in FRAMES)
)
"""Words that no fact has to hold: those of plain sentences, and further ones that carry no topic."""
_CONTRACTED: Final = re.compile(r"['\u2019](?:s|t|d|m)\b")


def parse_wording(text: str, task: WordingTask) -> Wording:
    """Check a model's answer against its task and take it apart. Raises WordingRejected with a reason code.

    Form: compact JSON with exactly the keys of `answer_keys`. Each text: right length, one sentence (the summary one
    or two), plain characters, no link, address, number, name or personal guess that the task does not hold. Grounding:
    a description shares a word stem with its own label or titles; a reason names its topic and one of the interests
    that lead to it; of the topical words all but one come from the task; no trend against the facts, no dislike. No
    text repeats itself or another one. Where a task asks for several texts, none speaks of another's item.
    """
    answer = _parsed(text, task_keys(task))
    facts = _Facts(task)
    texts = {key: unicodedata.normalize("NFC", value) for key, value in answer.items()}
    for key, value in texts.items():
        problem = facts.problem(key, value)
        if problem is not None:
            raise WordingRejected(problem[0], f"{key}: {problem[1]}")
    _refuse_repetition(task, texts)
    return wording_of(task, list(texts.values()))


def distinct_texts(task: WordingTask, candidates: Sequence[Sequence[str]]) -> tuple[str | None, ...]:
    """For each text of `task` the first candidate that says the same as none before it; None where none is left.

    candidates: for each of `task_keys`, best first. A summary may repeat what the items say. Raises ValueError if they
    are not as many as the task asks for.
    """
    said = _Said(task)
    chosen: list[str | None] = []
    for key, texts in zip(task_keys(task), candidates, strict=True):
        chosen.append(next((text for text in texts if said.repeated(key, text) is None), None))
        said.add(key, chosen[-1])
    return tuple(chosen)


def template_wording(task: WordingTask) -> Wording:
    """Plain sentences without a model: varied by the content, equal for equal content, valid under `parse_wording`."""
    facts, said = _Facts(task), _Said(task)
    texts = []
    for key in task_keys(task):
        texts.append(facts.first_valid(key, candidates_of(key, task), said))
        said.add(key, texts[-1])
    return wording_of(task, texts)


def _refuse_repetition(task: WordingTask, texts: Mapping[str, str]) -> None:
    """Raises WordingRejected if two items say the same. A summary may repeat what the items say."""
    said = _Said(task)
    for key, text in texts.items():
        other = said.repeated(key, text)
        if other is not None:
            raise WordingRejected("repetition", f"{other} and {key} say the same")
        said.add(key, text)


class _Given(NamedTuple):
    """What the text of an item may share with another one: trigrams of its labels and titles, stems of their words."""

    trigrams: Trigrams
    stems: frozenset[str]


class _Said:
    """The texts of a persona so far, but for its summary, which may repeat them and be repeated."""

    def __init__(self, task: WordingTask) -> None:
        interests = {key: ((i.label,), i.titles) for key, i in zip(INTEREST_KEYS, task.interests, strict=False)}
        novel = {key: ((n.label, *n.via_labels), n.titles) for key, n in zip(NOVEL_KEYS, task.novel, strict=False)}
        self._facts: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {**interests, **novel}
        self._texts: dict[str, str] = {}

    def repeated(self, key: str, text: str) -> str | None:
        """The key of an earlier text that says the same as this one would; None if there is none."""
        if key == SUMMARY_KEY or not self._texts:
            return None
        own = _given(*self._facts[key])
        for other, earlier in self._texts.items():
            its = _given(*self._facts[other])
            if _same(text, earlier, _Given(own.trigrams | its.trigrams, own.stems | its.stems)):
                return other
        return None

    def add(self, key: str, text: str | None) -> None:
        """Remember a text, if there is one."""
        if text is not None and key != SUMMARY_KEY:
            self._texts[key] = text


def _same(first: str, second: str, given: _Given) -> bool:
    """Whether more than half of the shorter text's word trigrams, `given` ones apart, are in the other one.

    Also if that is so of the trigrams without any given word, and there are FRAME of them: the frame is the same.
    """
    if first == second:
        return True
    a, b = trigrams_of(first) - given.trigrams, trigrams_of(second) - given.trigrams
    frames = [{t for t in own if given.stems.isdisjoint(map(stem_of, t))} for own in (a, b)]
    return _overlap(a, b, 1) or _overlap(frames[0], frames[1], FRAME)


def _overlap(a: Set[tuple[str, str, str]], b: Set[tuple[str, str, str]], least: int) -> bool:
    shared = len(a & b)
    return shared >= least and 2 * shared > min(len(a), len(b))


@lru_cache(CLEANED)
def _given(labels: tuple[str, ...], titles: tuple[str, ...]) -> _Given:
    given = [clean_label(label) for label in labels]
    given += [form(title) for title in titles for form in (sanitise_title, clean_label)]
    return _Given(frozenset().union(*map(trigrams_of, given)), frozenset().union(*map(stems_of, given)))


class _Facts:
    """What each text of a task may and must say."""

    def __init__(self, task: WordingTask) -> None:
        interests = {key: (i.label, i.titles) for key, i in zip(INTEREST_KEYS, task.interests, strict=False)}
        novel = {key: (n.label, n.titles) for key, n in zip(NOVEL_KEYS, task.novel, strict=False)}
        overview = " , ".join(clean_label(label) for label, _ in task.overview)
        items = interests | novel
        self._labels = {key: clean_label(label) for key, (label, _) in items.items()} | {SUMMARY_KEY: overview}
        self._own = {
            key: " . ".join(
                [self._labels[key], *(form(title) for title in titles for form in (sanitise_title, clean_label))]
            )
            for key, (_, titles) in items.items()
        } | {SUMMARY_KEY: overview}
        self._via = {
            key: " , ".join(clean_label(label) for label in n.via_labels)
            for key, n in zip(NOVEL_KEYS, task.novel, strict=False)
        }
        titles_of = {key: " . ".join(map(sanitise_title, titles)) for key, (_, titles) in items.items()}
        self._drafts = {
            key: " . ".join((label, self._via.get(key, ""), titles_of.get(key, "")))
            for key, label in self._labels.items()
        }
        self._trends = {key: i.trend for key, i in zip(INTEREST_KEYS, task.interests, strict=False)}

    def problem(self, key: str, text: str) -> tuple[str, str] | None:
        """What is wrong with the text at `key`, as (reason, detail), or None."""
        allowed = f"{self._own[key]} . {self._via.get(key, '')}"
        return (
            _misformed(text, summary=key == SUMMARY_KEY)
            or unsafe(text, allowed)
            or self._contrary(key, text, allowed)
            or self._invented(text, allowed)
            or self._ungrounded(key, text, allowed)
            or _repetitive(text, self._drafts[key])
        )

    def first_valid(self, key: str, candidates: Iterable[str], said: _Said) -> str:
        """The first candidate without a problem that does not repeat what is said already."""
        for candidate in candidates:
            if said.repeated(key, candidate) is None and self.problem(key, candidate) is None:
                return candidate
        # Not reached by any input we know of; a plain sentence without a foreign word is safe, a crash is not.
        return filled("Comes back to L from time to time.", "this topic")

    def _contrary(self, key: str, text: str, allowed: str) -> tuple[str, str] | None:
        said, given = f" {' '.join(tokens_of(text))} ", f" {' '.join(tokens_of(allowed))} "
        for words, direction in ((_GAINS, 1), (_LOSES, -1)):
            found = words.search(said)
            if found and self._trends.get(key, direction) != direction and not words.search(given):
                return "trend", f"{found.group()!r} is not what the facts say"
        if _DISLIKE.search(said) and not _DISLIKE.search(given):
            return "dislike", "it speaks of a dislike"
        if key in self._via and said.split()[0] in _WATCHING - set(given.split()):
            return "consumed", "it says that a topic is watched already"
        return None

    def _invented(self, text: str, allowed: str) -> tuple[str, str] | None:
        known = frozenset(tokens_of(allowed))
        for number in re.findall(r"\d+", text):
            if number not in known:
                return "number", f"{number} is not in the facts"
        counted = _NUMBERS & set(tokens_of(text)) - known
        if counted:
            return "number", f"{', '.join(sorted(counted))}: not in the facts"
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            for position, word in enumerate(words_of(sentence)):
                folded = word.casefold()
                if word[0].isupper() and folded not in known and not (position == 0 and folded in _OPENERS):
                    return "name", f"{word} is not in the facts"
        return None

    def _ungrounded(self, key: str, text: str, allowed: str) -> tuple[str, str] | None:
        said = stems_of(text)
        own = stems_of(self._own[key])
        if own and not said & own:
            return "ungrounded", "it shares no word with its own label or titles"
        label, via = stems_of(self._labels[key]), stems_of(self._via.get(key, ""))
        if key in self._via and label and not said & label:
            return "ungrounded", "it does not name its topic"
        if via - label and not said & via:
            return "ungrounded", "it names none of the interests that lead to the topic"
        known = stems_of(allowed)
        foreign_labels, foreign_titles = self._foreign(key, known)
        if said & foreign_labels or len(said & foreign_titles) > 1:
            return "other_item", "it speaks of another item"
        letters = {token for token in tokens_of(_CONTRACTED.sub("", text)) if len(token) == 1 and token.isalpha()}
        stray = letters - {"a", *tokens_of(allowed)}
        if stray:
            return "not_a_sentence", f"a stray letter: {', '.join(sorted(stray))}"
        topical = said - NEUTRAL_STEMS - _FRAME_STEMS
        unknown = topical - known
        if len(unknown) > UNKNOWN:
            return "ungrounded", f"not in the facts: {', '.join(sorted(unknown))}"
        return None

    def _foreign(self, key: str, known: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
        others = [k for k in self._own if k != key]
        labels = stems_of(" . ".join(self._labels[k] for k in others))
        titles = stems_of(" . ".join(self._own[k] for k in others))
        if key == SUMMARY_KEY:
            # A summary may use any word of the interests; only topics that are not watched are foreign to it.
            known |= stems_of(" . ".join(self._own[k] for k in others if k in INTEREST_KEYS))
        return labels - known, titles - known


def _parsed(text: str, keys: tuple[str, ...]) -> dict[str, str]:
    if len(text.encode("utf-8", "surrogatepass")) > MAXIMUM_ANSWER_BYTES:
        raise WordingRejected("too_long", f"the answer has more than {MAXIMUM_ANSWER_BYTES} bytes")
    try:
        answer = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise WordingRejected("not_json", str(error)) from error
    if not isinstance(answer, dict) or tuple(answer) != keys:
        raise WordingRejected("wrong_form", f"the answer must be one object with the keys {', '.join(keys)}")
    if not all(isinstance(value, str) for value in answer.values()):
        raise WordingRejected("wrong_form", "every value must be a text")
    if orjson.dumps(answer) != text.encode():
        raise WordingRejected("wrong_form", "whitespace, escapes or a key twice")
    return answer


def _misformed(text: str, *, summary: bool) -> tuple[str, str] | None:
    low, high = SUMMARY_WORDS if summary else ITEM_WORDS
    words = len(text.split())
    if not low <= words <= high or len(text) > (SUMMARY_CHARACTERS if summary else ITEM_CHARACTERS):
        return "length", f"{words} words, {len(text)} characters"
    if not text.endswith(".") or text[0].islower() or not text[0].isalnum():
        return "not_a_sentence", "it must begin with a capital and end with a full stop"
    if len(re.findall(r"[.!?]+", text)) > (2 if summary else 1):
        return "not_a_sentence", "too many sentences"
    if re.search(r"\w-\w+-\w+-\w", text):
        return "not_a_sentence", "words run together"
    if re.search(r"[,'\u2019&+-]\s*[.,]|\s[.,]|\s\s", text):
        return "not_a_sentence", "stray punctuation"
    return None


def _repetitive(text: str, facts: str) -> tuple[str, str] | None:
    """Topical words and word pairs may come as often as in the facts, at least twice and once."""
    tokens, given = tokens_of(text), tokens_of(facts)
    pairs, given_pairs = Counter(pairwise(tokens)), Counter(pairwise(given))
    for pair, count in pairs.items():
        if count > max(1, given_pairs[pair]) and any(word not in NEUTRAL for word in pair):
            return "repetition", f"{' '.join(pair)!r} comes {count} times"
    runs = Counter(zip(tokens, tokens[1:], tokens[2:], strict=False))
    for run, count in runs.items():
        if count > 1 and f" {' '.join(run)} " not in f" {' '.join(given)} ":
            return "repetition", f"{' '.join(run)!r} comes {count} times"
    given_words = Counter(given)
    for word, count in Counter(tokens).items():
        if word not in NEUTRAL and count > max(2, given_words[word]):
            return "repetition", f"{word!r} comes {count} times"
    return None
