"""The words of a persona: what must be worded, what a model's answer must satisfy, and plain words without a model.

A model words items by position; ids, labels and numbers are attached by the core. `parse_wording` is the gate for
every model tier: it refuses an answer that is not exactly of the asked form, says what the facts do not hold, or
looks unsafe. `template_wording` passes the same gate for any task. Wording is English, whatever the task's language.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from itertools import combinations, pairwise
from typing import Final, TypeAlias

import orjson

MAXIMUM_INTERESTS: Final = 6
MAXIMUM_NOVEL: Final = 4
INTEREST_KEYS: Final = "123456"
NOVEL_KEYS: Final = "abcd"
SUMMARY_KEY: Final = "s"
"""Keys of the answer: one object: the summary, then interests by digit, then novel topics by letter."""

MAXIMUM_ANSWER_BYTES: Final = 8192
MAXIMUM_TITLE: Final = 80
MAXIMUM_LABEL: Final = 48
CLEANED: Final = 16_384
"""Labels and titles remembered in their cleaned form: those of the clusters come again and again."""
ITEM_WORDS: Final = (3, 26)
SUMMARY_WORDS: Final = (3, 40)
ITEM_CHARACTERS: Final = 180
SUMMARY_CHARACTERS: Final = 280


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


class WordingRejected(ValueError):  # noqa: N818
    """An answer that must not be published. reason: a short code; detail: where and what."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


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
_NEUTRAL: Final = frozenset(_NEUTRAL_TEXT.split())

_PERSONAL_TEXT: Final = """
he her hers herself him himself his i me mine my myself our ours she us we
"""
_PERSONAL: Final = frozenset(_PERSONAL_TEXT.split())
"""Words that would speak for the viewer or guess at who they are."""

_SENSITIVE_TEXT: Final = """
addict addiction alcoholic atheist bisexual cancer catholic christian depressed depression diabetes
disabled divorced ethnic ethnicity fuck gay gender hindu hitler homosexual idiot immigrant jew
jewish kill lesbian muslim naked nazi overweight porn pregnancy pregnant race racist rape religion
religious sex sexual sexy shit slut stupid suicidal suicide terrorist transgender ugly
"""
_SENSITIVE: Final = frozenset(_SENSITIVE_TEXT.split())
"""Words that may appear only where the item's own label or titles hold them."""

_COMMANDING_TEXT: Final = """
chatbot disregard ignore ignored ignores ignoring instruction instructions jailbreak json override
prompt prompts
"""
_COMMANDING: Final = frozenset(_COMMANDING_TEXT.split())
_COMMANDING_PHRASES: Final = (
    "system message",
    "as an ai",
    "language model",
    "you are now",
    "you must",
    "act as",
    "pretend to be",
    "respond with",
    "reply with",
    "previous messages",
)
"""Text that reads like an order to a model: such a title is left out of prompts, such an answer is refused."""

_OPENERS_TEXT: Final = """
picks studies should a after again also an and another anyone as at because both comes could curious drawn enjoys
especially explores fans finds follows for from gives goes has if in interested into is it keeps
leans learns likes looks loves mainly many may might most mostly much often picks on one prefers regularly
returns since some sometimes spends stays still such that the there these this through time tunes
turns viewing watches when where while with worth would
"""
_OPENERS: Final = frozenset(_OPENERS_TEXT.split())
"""First words of a sentence that are no names."""

_Trigrams: TypeAlias = frozenset[tuple[str, str, str]]

_TOKEN: Final = re.compile(r"[^\W\d_]+|\d+")
_CHAT: Final = re.compile(r"<\|.{0,40}?\|>|\[/?INST\]|<</?SYS>>|</?s>|\b(?:im_start|im_end|endoftext)\b", re.IGNORECASE)
_LINK: Final = re.compile(
    r"\b(?:https?|ftp)\b\S*|\bwww\.\S*|\S+@\S+|\b[\w-]+\.(?:com|net|org|io|tv|me|co|info|ru|de)\b\S*", re.I
)
_PHONE: Final = re.compile(r"\d(?:[^\w]*\d){6,}")
_YEAR: Final = re.compile(r"\s*[(\[]\s*(?:1[89]|20)\d\d\s*[)\]]\s*$")
_TEXT_CHARACTERS: Final = frozenset(" .,'\u2019-&!?+%")
_LABEL_CHARACTERS: Final = frozenset(" ,'\u2019-&+")


def sanitise_title(title: str, maximum: int = MAXIMUM_TITLE) -> str:
    """A title as it may enter a prompt: one line of letters, digits and light punctuation, at most `maximum` long.

    Control, bidirectional and zero-width characters, markup, chat markers, links, addresses, phone numbers and a
    trailing year are dropped. Empty if nothing is left, or if the title reads like an order to a model.
    """
    return _cleaned(title, maximum, _TEXT_CHARACTERS)


@lru_cache(CLEANED)
def clean_label(label: str) -> str:
    """A label as it may enter a prompt or a sentence: see `sanitise_title`; no full stops, no word twice."""
    words: dict[str, str] = {}
    for word in _cleaned(label, MAXIMUM_LABEL, _LABEL_CHARACTERS).split():
        words.setdefault(word.casefold().strip(",'\u2019-&+"), word)
    words.pop("", None)
    text = " ".join(words.values()).strip(" ,'\u2019-&+")
    return "" if _unsafe(text, frozenset(_tokens(text))) or not _tokens(text) else text


def parse_wording(text: str, task: WordingTask) -> Wording:
    """Check a model's answer against its task and take it apart. Raises WordingRejected with a reason code.

    Form: compact JSON with exactly the keys of `answer_keys`. Each text: right length, one sentence (the summary one
    or two), plain characters, no link, address, number, name or personal guess that the task does not hold. Grounding:
    a description shares a word stem with its own label or titles and speaks of no other item; a reason names its
    topic and one of the interests that lead to it; at least half of the topical words come from the task. No text
    repeats itself or another one.
    """
    answer = _parsed(text, task_keys(task))
    facts = _Facts(task)
    texts = {key: unicodedata.normalize("NFC", value) for key, value in answer.items()}
    for key, value in texts.items():
        problem = facts.problem(key, value)
        if problem is not None:
            raise WordingRejected(problem[0], f"{key}: {problem[1]}")
    _refuse_repetition(task, texts)
    return _wording(task, list(texts.values()))


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


def join_wordings(task: WordingTask, pieces: Sequence[Wording]) -> Wording:
    """The wording of `task` from those of its pieces, in the order of `split_task`.

    Raises WordingRejected if two pieces say the same, ValueError if they are not as many texts as the task asks for.
    """
    texts = [text for piece in pieces for text in (piece.summary, *piece.descriptions, *piece.reasons) if text]
    keys = task_keys(task)
    if len(texts) != len(keys):
        raise ValueError(f"{len(texts)} texts for a task of {len(keys)}")
    _refuse_repetition(task, dict(zip(keys, texts, strict=True)))
    return _wording(task, texts)


def template_wording(task: WordingTask) -> Wording:
    """Plain sentences without a model: varied by the content, equal for equal content, valid under `parse_wording`."""
    facts = _Facts(task)
    said: list[str] = []
    for key in task_keys(task):
        said.append(facts.first_valid(key, _candidates(key, task), said[bool(task.overview) :]))
    return _wording(task, said)


def _wording(task: WordingTask, texts: list[str]) -> Wording:
    """Texts in the order of the task's keys, taken apart."""
    summary, items = (texts[0], texts[1:]) if task.overview else ("", texts)
    interests = len(task.interests)
    return Wording(summary, tuple(items[:interests]), tuple(items[interests:]))


def _refuse_repetition(task: WordingTask, texts: Mapping[str, str]) -> None:
    """Raises WordingRejected if two items say the same. A summary may repeat what the items say."""
    given = _given_trigrams(task)
    items = [(key, text) for key, text in texts.items() if key != SUMMARY_KEY]
    for (key, first), (other, second) in combinations(items, 2):
        if _same(first, second, given):
            raise WordingRejected("repetition", f"{key} and {other} say the same")


def _same(first: str, second: str, given: _Trigrams) -> bool:
    """Whether more than half of the shorter text's word trigrams, `given` ones apart, are in the other one."""
    a, b = _trigrams(first) - given, _trigrams(second) - given
    return first == second or bool(a and b and 2 * len(a & b) > min(len(a), len(b)))


def _given_trigrams(task: WordingTask) -> _Trigrams:
    """Trigrams of the task's own labels and titles, which several items may well share."""
    items: list[InterestTask | NovelTask] = [*task.interests, *task.novel]
    labels = [i.label for i in items] + [name for n in task.novel for name in n.via_labels]
    given = [clean_label(label) for label in labels]
    given += [form(title) for i in items for title in i.titles for form in (sanitise_title, clean_label)]
    return frozenset[tuple[str, str, str]]().union(*map(_trigrams, given))


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
        self._given_trigrams = _given_trigrams(task)
        self._shares = {str(share) for _, share in task.overview}

    def problem(self, key: str, text: str) -> tuple[str, str] | None:
        """What is wrong with the text at `key`, as (reason, detail), or None."""
        allowed = f"{self._own[key]} . {self._via.get(key, '')}"
        return (
            _misformed(text, summary=key == SUMMARY_KEY)
            or _unsafe(text, frozenset(_tokens(allowed)))
            or self._invented(key, text, allowed)
            or self._ungrounded(key, text, allowed)
            or _repetitive(text, self._drafts[key])
        )

    def first_valid(self, key: str, candidates: Iterable[str], said: list[str]) -> str:
        """The first candidate without a problem that does not repeat what is said already."""
        for candidate in candidates:
            repeated = any(_same(candidate, other, self._given_trigrams) for other in said)
            if not repeated and self.problem(key, candidate) is None:
                return candidate
        # Not reached by any input we know of; a plain sentence without a foreign word is safe, a crash is not.
        return _filled("Comes back to L from time to time.", "this topic")

    def _invented(self, key: str, text: str, allowed: str) -> tuple[str, str] | None:
        known = frozenset(_tokens(allowed))
        numbers = known | self._shares if key == SUMMARY_KEY else known
        for number in re.findall(r"\d+", text):
            if number not in numbers:
                return "number", f"{number} is not in the facts"
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            for position, word in enumerate(_TOKEN.findall(sentence)):
                folded = word.casefold()
                if word[0].isupper() and folded not in known and not (position == 0 and folded in _OPENERS):
                    return "name", f"{word} is not in the facts"
        return None

    def _ungrounded(self, key: str, text: str, allowed: str) -> tuple[str, str] | None:
        said = _stems(text)
        own = _stems(self._own[key])
        if own and not said & own:
            return "ungrounded", "it shares no word with its own label or titles"
        label, via = _stems(self._labels[key]), _stems(self._via.get(key, ""))
        if key in self._via and label and not said & label:
            return "ungrounded", "it does not name its topic"
        if via - label and not said & via:
            return "ungrounded", "it names none of the interests that lead to the topic"
        known = _stems(allowed)
        foreign_labels, foreign_titles = self._foreign(key, known)
        if said & foreign_labels or len(said & foreign_titles) > 1:
            return "other_item", "it speaks of another item"
        stray = {token for token in _tokens(text) if len(token) == 1 and token.isalpha()} - {"a", *_tokens(allowed)}
        if stray:
            return "not_a_sentence", f"a stray letter: {', '.join(sorted(stray))}"
        example = said & (EXAMPLE_STEMS - known)
        if len(example) > 1:
            return "example_echo", f"it repeats an example of the prompt: {', '.join(sorted(example))}"
        topical = said - _NEUTRAL_STEMS - _FRAME_STEMS
        if topical and 2 * len(topical & known) < len(topical):
            return "ungrounded", "most of its words are not in the facts"
        return None

    def _foreign(self, key: str, known: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
        others = [k for k in self._own if k != key]
        labels = _stems(" . ".join(self._labels[k] for k in others if k != SUMMARY_KEY or key != SUMMARY_KEY))
        titles = _stems(" . ".join(self._own[k] for k in others))
        if key == SUMMARY_KEY:
            # A summary may use any word of the interests; only topics that are not watched are foreign to it.
            known |= _stems(" . ".join(self._own[k] for k in others if k in INTEREST_KEYS))
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


def _unsafe(text: str, own: frozenset[str]) -> tuple[str, str] | None:
    """Markup, links, personal data and words that are refused unless the item's own facts (`own`) hold them."""
    for character in text:
        if (
            character not in _TEXT_CHARACTERS
            and unicodedata.category(character)[0] not in "LM"
            and not character.isdecimal()
        ):
            return "characters", f"U+{ord(character):04X} is not allowed"
    if _LINK.search(text) or _PHONE.search(text) or _CHAT.search(text):
        return "personal_or_link", "a link, an address, a phone number or a chat marker"
    tokens = _tokens(text)
    flat = f" {' '.join(tokens)} "
    if _COMMANDING & set(tokens) or any(f" {phrase} " in flat for phrase in _COMMANDING_PHRASES):
        return "command", "it reads like an order to a model"
    guess = (_PERSONAL | _SENSITIVE) & set(tokens) - own
    if guess:
        return "personal_guess", f"{', '.join(sorted(guess))}"
    return None


def _repetitive(text: str, facts: str) -> tuple[str, str] | None:
    """Topical words and word pairs may come as often as in the facts, at least twice and once."""
    tokens, given = _tokens(text), _tokens(facts)
    pairs, given_pairs = Counter(pairwise(tokens)), Counter(pairwise(given))
    for pair, count in pairs.items():
        if count > max(1, given_pairs[pair]) and any(word not in _NEUTRAL for word in pair):
            return "repetition", f"{' '.join(pair)!r} comes {count} times"
    given_words = Counter(given)
    for word, count in Counter(tokens).items():
        if word not in _NEUTRAL and count > max(2, given_words[word]):
            return "repetition", f"{word!r} comes {count} times"
    return None


def _trigrams(text: str) -> _Trigrams:
    tokens = _tokens(text)
    return frozenset(zip(tokens, tokens[1:], tokens[2:], strict=False))


def _tokens(text: str) -> list[str]:
    return [token.casefold() for token in _TOKEN.findall(text)]


def _stem(word: str) -> str:
    """A crude English stem, the same for the forms of one word: baking, bakes, baked, baker -> bak."""
    for ending in ("ings", "ing", "iers", "ies", "ier", "ers", "er", "ed", "es", "s", "y", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


_NEUTRAL_STEMS: Final = frozenset(_stem(word) for word in _NEUTRAL)


def _stems(text: str) -> frozenset[str]:
    """Stems of the topical words; a one-letter word or a number is none."""
    return frozenset(
        _stem(t) for t in _tokens(text) if t not in _NEUTRAL and not t.isdecimal() and (len(t) > 1 or not t.isascii())
    )


@lru_cache(CLEANED)
def _cleaned(text: str, maximum: int, allowed: frozenset[str]) -> str:
    # The cap before normalisation bounds the work; some characters normalise to many.
    text = unicodedata.normalize("NFKC", text[: 8 * maximum])[: 8 * maximum]
    text = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    text = _YEAR.sub("", text)
    for pattern in (_CHAT, _LINK, _PHONE):
        text = pattern.sub(" ", text)
    text = text.replace("\u2019", "'").replace(":", ",").replace(";", ",")
    text = "".join(c if c in allowed or unicodedata.category(c)[0] in "LM" or c.isdecimal() else " " for c in text)
    text = re.sub(r"\s*,[\s,]*", ", ", " ".join(text.split()))
    text = re.sub(r"([.'&!?+%-])(?:\s*[.'&!?+%-])+", r"\1", text)
    text = re.sub(r"\s*[.'&!?+%-]?\s*,(?:\s*[.,'&!?+%-])*\s*", ", ", text)
    text = _shortened(text.strip(" .,'\u2019-&!?+%"), maximum)
    tokens = _tokens(text)
    flat = f" {' '.join(tokens)} "
    if _COMMANDING & set(tokens) or any(f" {phrase} " in flat for phrase in _COMMANDING_PHRASES):
        return ""
    return unicodedata.normalize("NFC", text)


def _shortened(text: str, maximum: int) -> str:
    if len(text) <= maximum:
        return text
    cut = text[: maximum + 1].rsplit(" ", 1)[0] if " " in text[: maximum + 1] else text[:maximum]
    return cut[:maximum].rstrip(" .,'\u2019-&!?+%")


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
    "Watches L, among others T.",
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


_FRAME_STEMS: Final = frozenset[str]().union(
    *(
        frozenset(_stem(token) for token in _tokens(frame))
        for frames in (
            _DESCRIPTIONS,
            _DESCRIPTIONS_RISING,
            _DESCRIPTIONS_FALLING,
            _WITH_TITLE,
            _REASONS,
            _REASONS_ALONE,
            _SUMMARIES,
        )
        for frame in frames
    )
)


def _candidates(key: str, task: WordingTask) -> Iterator[str]:
    """Sentences for `key`, best first; the last ones are plain enough to fit any facts."""
    if key == SUMMARY_KEY:
        yield from _summaries(task)
        return
    if key in INTEREST_KEYS:
        interest = task.interests[INTEREST_KEYS.index(key)]
        label = clean_label(interest.label) or "this topic"
        titles = [title for title in map(sanitise_title, interest.titles) if 1 < len(title.split()) <= 9]
        trend = {1: _DESCRIPTIONS_RISING, -1: _DESCRIPTIONS_FALLING}.get(interest.trend, ())
        pick = _picker(interest.label, *interest.titles)
        yield from (_filled(frame, label) for frame in pick(trend))
        for title in titles:
            yield from (_filled(frame, label, title=title) for frame in pick(_WITH_TITLE))
        # Where the label cannot be used, a title has to ground the sentence.
        fallback = [label, *filter(None, (clean_label(title) for title in interest.titles))]
        for name in fallback:
            yield from (
                _filled(frame, name) for frame in pick((*_DESCRIPTIONS, *_DESCRIPTIONS_RISING, *_DESCRIPTIONS_FALLING))
            )
        return
    novel = task.novel[NOVEL_KEYS.index(key)]
    label = clean_label(novel.label) or "this topic"
    via = [name for name in map(clean_label, novel.via_labels) if name]
    pick = _picker(novel.label, *novel.via_labels)
    joined = [_joined(via[:2])] if len(via) > 1 else []
    # Where the label cannot be used, a title has to name the topic.
    for name in [label, *filter(None, map(clean_label, novel.titles))]:
        for names in (*joined, *via):
            yield from (_filled(frame, name, via=names) for frame in pick(_REASONS))
        yield from (_filled(frame, name) for frame in pick(_REASONS_ALONE))


def _summaries(task: WordingTask) -> Iterator[str]:
    labels = list(dict.fromkeys(filter(None, (clean_label(label) for label, _ in task.overview))))
    pick = _picker(*labels)
    for count in range(min(3, len(labels)), 0, -1):
        yield from (_filled(frame, _joined(labels[:count])) for frame in pick(_SUMMARIES))
    for label in labels:
        yield from (_filled(frame, label) for frame in pick(_SUMMARIES))
    yield from (_filled(frame, "a mix of topics") for frame in pick(_SUMMARIES))


def _picker(*content: str) -> Callable[[tuple[str, ...]], list[str]]:
    """Rotates a tuple of frames by a hash of the content."""
    seed = int.from_bytes(blake2b("\x1f".join(content).encode("utf-8", "replace"), digest_size=4).digest(), "big")

    def pick(frames: tuple[str, ...]) -> list[str]:
        start = seed % len(frames) if frames else 0
        return [*frames[start:], *frames[:start]]

    return pick


def _filled(frame: str, label: str, *, via: str = "", title: str = "") -> str:
    """Put the words in and begin with a capital. Single passes: what is put in is never searched again."""
    words = {"L": label, "V": via, "T": title}
    text = re.sub(r"\b[LVT]\b", lambda match: words[match.group()], frame)
    return text[0].upper() + text[1:]


def _joined(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"


@dataclass(frozen=True, slots=True)
class Example:
    """A worked example of a prompt: the task, the draft that the model reads, the words that it should answer."""

    task: WordingTask
    draft: str
    wording: Wording


# Their sentences begin otherwise than any that is asked for, so that a model does not slip into an example.
EXAMPLES: Final = (
    Example(
        WordingTask((), (), (("bread baking", 40), ("stamp collecting", 25), ("weather", 10))),
        "s. Has an eye for bread baking, stamp collecting and weather.",
        Wording("Has an eye for bread baking, stamp collecting and weather.", (), ()),
    ),
    Example(
        WordingTask((InterestTask("bread baking", 40, 0, ("Shaping a tight loaf", "Rye for beginners")),), (), ()),
        "1. Loves bread baking, from shaping a tight loaf to rye for beginners.",
        Wording("", ("Loves bread baking, from shaping a tight loaf to rye.",), ()),
    ),
    Example(
        WordingTask((), (NovelTask("pottery", ("bread baking",), ("Throwing a first bowl on the wheel",)),), ()),
        "a. Should see pottery after bread baking, starting with throwing a first bowl on the wheel.",
        Wording("", (), ("Should see pottery after bread baking, starting with throwing a first bowl.",)),
    ),
    Example(
        WordingTask(
            (InterestTask("stamp collecting", 25, 1, ("Sorting old envelopes", "Reading a faded postmark")),), (), ()
        ),
        "1. Studies stamp collecting more and more, from sorting old envelopes to reading a faded postmark.",
        Wording(
            "", ("Studies stamp collecting more and more, from sorting envelopes to reading a faded postmark.",), ()
        ),
    ),
)
"""Worked examples for prompts. Each passes `parse_wording`; an answer that repeats their words is refused."""

EXAMPLE_STEMS: Final = frozenset[str]().union(
    *(_stems(" . ".join((i.label, *i.titles))) for example in EXAMPLES for i in example.task.interests),
    *(_stems(" . ".join((n.label, *n.titles))) for example in EXAMPLES for n in example.task.novel),
)
