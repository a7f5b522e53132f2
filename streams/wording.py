"""The words of a persona: what must be worded, what a model's answer must satisfy, and plain words without a model.

A model words items by position; ids, labels and numbers are attached by the core. `parse_wording` is the gate for
every model tier: it refuses an answer that is not exactly of the asked form, says what the facts do not hold, or
looks unsafe. `template_wording` passes the same gate for any task. Wording is English, whatever the task's language.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import Final, NamedTuple, TypeAlias

import orjson

MAXIMUM_INTERESTS: Final = 6
MAXIMUM_NOVEL: Final = 4
INTEREST_KEYS: Final = "123456"
NOVEL_KEYS: Final = "abcd"
SUMMARY_KEY: Final = "s"
"""Keys of the answer: one object: the summary, then interests by digit, then novel topics by letter."""

MAXIMUM_ANSWER_BYTES: Final = 8192
MAXIMUM_TITLE: Final = 80
MAXIMUM_RETOLD: Final = 64
MAXIMUM_LABEL: Final = 48
CLEANED: Final = 16_384
"""Labels and titles remembered in their cleaned form: those of the clusters come again and again."""
ITEM_WORDS: Final = (3, 26)
SUMMARY_WORDS: Final = (3, 40)
FRAME: Final = 3
"""Trigrams without a word of the facts that two texts of a persona may not share, if they are most of one's."""
UNKNOWN: Final = 1
"""Topical words of a text that may be none of its facts: a bridge between two titles."""
STYLED: Final = 3
"""Letters of a title that may be styled ones, as in an unusual name."""
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

_WRITING: Final = (
    r"(?:write|writes|say|says|answer|answers|print|output|outputs|reply|respond|mention|repeat|copy|name|call|begin|"
    r"start|end|state|claim|add|insert|include|use|pretend|decode|obey|follow|stop|list|reveal|show)"
)
_WRITTEN: Final = (
    r"(?:only|exactly|instead|answer|answers|answering|sentence|sentences|word for word|personas?|viewers?|labels?|"
    r"titles?|lines?|items?|keys?|interests|reader|rules?|text|it|her|him|this|that|with|in capitals)"
)
_MARKED: Final = (
    r"(?:system|assistant|user|developer|human|admin|input|output|action|thought|instruction|response|label|answer|note|"
    r"correction|sponsored|canary|secret|api.?key|password)"
)
_URGING: Final = (
    r"(?:please|kindly|you (?:are|must|should|will now|would)|do not|don't|never|always|unless you|from now on|"
    r"from the next)"
)
_IGNORING: Final = (
    # To ignore, to write, in other languages.
    r"\b(?:ignor\w*\s+\w*|negeer|schreib(?:e|t)?\b|escrib(?:e|a|an|ir|iendo)\b|scriv(?:i|ete|a|ere)\b|\u00e9cri(?:s|vez|re)\b|ecri(?:s|vez|re)\b|"
    r"escrev(?:a|e|am|er)\b|skriv\b|napisz|napi\u0161\w*|"
    r"napishi|yaz\u0131n|tulis(?:kan|lah)\b|abaikan|ignorir\w*)|\u5ffd\u7565|\u65e0\u89c6|\u7121\u8996|\u66f8\u3044\u3066|"
    r"\ubb34\uc2dc|\u0438\u0433\u043d\u043e\u0440\w*|\u043d\u0430\u043f\u0438\u0448\w*|\u062a\u062c\u0627\u0647\u0644|"
    r"\u0627\u0643\u062a\u0628|\u0905\u0928\u0926\u0947\u0916\u093e|\u05d4\u05ea\u05e2\u05dc\u05dd"
)
_ORDERING: Final = re.compile(
    # Verbs of an order to a writer, then what is to be written or who is to be written about.
    rf"\b{_WRITING}\b[^.!?]{{0,40}}?\b{_WRITTEN}\b"
    r"|\bviewers?\b|\b(?:the|this|every|each|your|all|as)\s+(?:personas?|answers?|sentences?|labels?|outputs?|ai|reply)\b"
    rf"|\b{_MARKED}\s*[:=\]]"
    rf"|\b{_URGING}\s+(?:\w+\s+){{0,3}}?(?:write|say|answer|reply|respond|mention|obey|ignore|name|call|output)\b"
    r"|\b(?:write|say|answer|print|output|reply|respond|echo|type|spell)\s+(?:only\s+|just\s+|with\s+|the word\s+)?"
    r"(?:[\"'\u201c\u2018(\[]|[A-Z]{3})"
    r"|\b(?:item|line)\s+\d|\bnext line\b|\bstate your\b|\btranslate (?:the|this)\b|\b(?:dear|the|your) model\b"
    r"|\bretry with\b|\btodo\s*:|\brespond(?:s|ed|ing)?\b|\bremember (?:for|this)\b|\bnever (?:buy|watch)\b"
    r"|\buse code\b|\b(?:forget|overlook|disobey|disregard)\b[^.!?]{0,20}"
    r"\b(?:above|before|earlier|everything|previous|prior|rules?)\b"
    r"|\bthe (?:above|previous|foregoing) (?:and|text|rules?|orders?|lines?)\b|\bmust contain\b"
    r"|\bP\.\s?S\b|\bfootnote\b|\bwhatever is (?:said|written)\b"
    r"|\b(?:the|this|each|every|any) (?:blurb|caption|paragraph|phrase|noun|word|description|profile)s?\b"
    r"|(?:\b[^\W\d_]\s){5,}\w\b"
    rf"|\bsend (?:coins|money)\b|{_IGNORING}"
    # A sentence that a persona might begin with, in a title.
    r"|^\W*(?:has|enjoys|likes|follows|watches|returns|keeps|spends|prefers|appreciates|mostly|increasingly|"
    r"often (?:watches|picks)|now (?:watches|prefers|enjoys|likes)|is (?:fond|getting|turning|into|now))\s",
    re.IGNORECASE,
)
"""What reads like an order in a title. It is left out: a cluster has other titles, and a missed one costs a detail."""
_STRUCTURE: Final = re.compile(
    r"[{}<>\\^~`=\n\r\t\v\f\x85\u2028\u2029\u2044\u2215\uff0f\uff5c\u29f8\uff1c\uff1e]"
    r"|--|##|/\*|\*/|//|\*\*|\$\w|%\w\w|&#|&\w+;|\.\./|\[/|\w_|_\w|::|\"\s*[:,}\]]|^\s*\"[^\"]*$|';"
    r"|\bhttps?\b|www\.|@\w|[^\W\d_]{2}\.[^\W\d_]\w|\d:\d\d\b.*\d:\d\d\b|%.*%|^\s*[a-ds]\.\s"
)
"""Marks of markup, programs and data, which no title for people needs: one that has them is left out of prompts."""

_FOREIGN: Final = re.compile(r"[^\W\dA-Za-z\u00C0-\u024F]")
_CODED: Final = re.compile(r"\w*(?:[^\W\d_]\d+[^\W\d_]|\d[^\W\d_x]+\d)\w*|\b[A-Za-z0-9]{20,}\b")
_ABBREVIATED: Final = "".join(rf"(?<!\b{short}\.)" for short in ("[Ee]p", "[Vv]s", "[Nn]o", "[DMJS]r", "[SFPM]t"))
_SENTENCES: Final = re.compile(rf"(?:(?<=[^\W\d_]{{2}}\.){_ABBREVIATED}|(?<=[!?]))\s+")
_BRACKETED: Final = re.compile(r"\([^()]*\)|\[[^\[\]]*\]|\u3010[^\u3011]*\u3011")
_SHOUTED: Final = re.compile(r"\b[A-Z]{5,}\b")
_GROUPED: Final = re.compile(r"(?<=\d),(?=\d{3}\b)")
"""The comma of 24,000, which is no comma between clauses."""

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

_Trigrams: TypeAlias = frozenset[tuple[str, str, str]]

_TOKEN: Final = re.compile(r"[^\W\d_]+|\d+")
_CONTRACTED: Final = re.compile(r"['\u2019](?:s|t|d|m)\b")
_CHAT: Final = re.compile(r"<\|.{0,40}?\|>|\[/?INST\]|<</?SYS>>|</?s>|\b(?:im_start|im_end|endoftext)\b", re.IGNORECASE)
_LINK: Final = re.compile(
    r"\b(?:https?|ftp)\b\S*|\bwww\.\S*|\S+@\S+|\b[\w-]+\.(?:com|net|org|io|tv|me|co|info|ru|de)\b\S*", re.I
)
_DOTTED: Final = re.compile(r"[^\W\d_]{2}\.[^\W\d_]{2}")
_PHONE: Final = re.compile(r"\d(?:[^\w]*\d){6,}")
_YEAR: Final = re.compile(r"\s*[(\[]\s*(?:1[89]|20)\d\d\s*[)\]]\s*$")
_HIDDEN: Final = frozenset(("Cc", "Cf", "Co", "Cs", "Cn", "Me"))
_UNSEEN: Final = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
_SELECTORS: Final = re.compile("[\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Characters that are not seen, or that cover others: by category, fillers, and those that choose another's form."""
_MARKED_UP: Final = re.compile("[A-Za-z][\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff]")
_EMOJI: Final = re.compile("(?<=[^\\w\\s])[\ufe0e\ufe0f]")
_TEXT_CHARACTERS: Final = frozenset(" .,'\u2019-&!?+%")
_LABEL_CHARACTERS: Final = frozenset(" ,'\u2019-&+")


@lru_cache(CLEANED)
def sanitise_title(title: str, maximum: int = MAXIMUM_TITLE) -> str:
    """A title as it may enter a prompt: one line of letters, digits and light punctuation, at most `maximum` long.

    Links, phone numbers and a trailing year are dropped, and of clauses parted by a bar only the first that says
    something stays. Empty if nothing is left, if the title reads like an order to a model, or if it has control,
    bidirectional or zero-width characters or the marks of markup, programs or data.
    """
    if _is_suspicious(title[: 8 * maximum]):
        return ""
    clauses = [clause for clause in title[: 8 * maximum].split("|") if clause.strip()]
    return _cleaned(next((c for c in clauses if len(c.split()) > 1), "".join(clauses[:1])), maximum, _TEXT_CHARACTERS)


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN or character in _UNSEEN or _SELECTORS.match(character) is not None


def _is_styled(character: str) -> bool:
    """Whether it is a Latin letter in fancy dress, such as a bold or a circled one."""
    return not character.isascii() and re.fullmatch("[A-Za-z]", unicodedata.normalize("NFKC", character)) is not None


@lru_cache(CLEANED)
def _is_suspicious(title: str) -> bool:
    # A selector after a symbol is an emoji's; after a letter it hides something, as a mark does that no letter has.
    if _MARKED_UP.search(unicodedata.normalize("NFC", title)):
        return True
    if any(_is_hidden(c) for c in _EMOJI.sub("", title)):
        return True
    folded = unicodedata.normalize("NFKC", title)
    if sum(_is_styled(c) for c in title) > STYLED:
        return True
    return any(rule.search(text) for rule in (_STRUCTURE, _ORDERING) for text in (title, folded))


@lru_cache(CLEANED)
def clean_label(label: str) -> str:
    """A label as it may enter a prompt or a sentence: see `sanitise_title`; no full stops, no word twice.

    Empty if it reads like an order to a model: catalogues' tags become labels.
    """
    words: dict[str, str] = {}
    if _ORDERING.search(unicodedata.normalize("NFKC", label[: 8 * MAXIMUM_LABEL])):
        return ""
    for word in _cleaned(label, MAXIMUM_LABEL, _LABEL_CHARACTERS).split():
        words.setdefault(word.casefold().strip(",'\u2019-&+"), word)
    words.pop("", None)
    text = " ".join(words.values()).strip(" ,'\u2019-&+")
    return "" if _unsafe(text, text) or not _tokens(text) else text


@lru_cache(CLEANED)
def retellable(title: str, label: str) -> str:
    """What a text may retell of a title of the cluster `label`: one clause in Latin letters; empty if that is nothing.

    Most titles are one sentence. Of several only the first that has a word of the label is taken: what is no part of
    the subject is an aside, at times to a model, and so is what stands in brackets. Titles whose words mix letters and
    digits, or come again and again, are no language, and a title that shouts one word apart from its subject wants it
    said.
    """
    if not sanitise_title(title):
        return ""
    sentences = _SENTENCES.split(sanitise_title(_BRACKETED.sub(" ", title)))
    if len(sentences) > 1:
        subject = _stems(label)
        sentences = [sentence for sentence in sentences if not subject.isdisjoint(_stems(sentence))]
    first = sentences[0] if sentences else ""
    if _shouts(first, label):
        return ""
    clause = first.partition(",")[0]
    text = sanitise_title(clause if " " in clause else first, MAXIMUM_RETOLD)
    return "" if _FOREIGN.search(text) or _CODED.search(text) or _drones(title) else text


def _drones(title: str) -> bool:
    """Whether a topical word comes again and again."""
    topical = (word for word in _tokens(title[: 8 * MAXIMUM_TITLE]) if word not in _NEUTRAL)
    return any(count > 2 for count in Counter(topical).values())


def _shouts(title: str, label: str) -> bool:
    """Whether a word stands in capitals in a title that has others in small letters, and the label lacks it."""
    shouted = _stems(" ".join(_SHOUTED.findall(title)))
    return any(word.islower() for word in title.split()) and not shouted <= _stems(label)


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
        texts.append(facts.first_valid(key, _candidates(key, task), said))
        said.add(key, texts[-1])
    return _wording(task, texts)


def _wording(task: WordingTask, texts: list[str]) -> Wording:
    """Texts in the order of the task's keys, taken apart."""
    summary, items = (texts[0], texts[1:]) if task.overview else ("", texts)
    interests = len(task.interests)
    return Wording(summary, tuple(items[:interests]), tuple(items[interests:]))


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

    trigrams: _Trigrams
    stems: frozenset[str]


class _Said:
    """The texts of a persona so far, but for its summary, which may repeat them and be repeated."""

    def __init__(self, task: WordingTask) -> None:
        interests = {key: _given([i.label], i.titles) for key, i in zip(INTEREST_KEYS, task.interests, strict=False)}
        novel = {
            key: _given([n.label, *n.via_labels], n.titles) for key, n in zip(NOVEL_KEYS, task.novel, strict=False)
        }
        self._given = interests | novel
        self._texts: dict[str, str] = {}

    def repeated(self, key: str, text: str) -> str | None:
        """The key of an earlier text that says the same as this one would; None if there is none."""
        if key == SUMMARY_KEY:
            return None
        own = self._given[key]
        for other, earlier in self._texts.items():
            its = self._given[other]
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
    a, b = _trigrams(first) - given.trigrams, _trigrams(second) - given.trigrams
    frames = [{t for t in own if given.stems.isdisjoint(map(_stem, t))} for own in (a, b)]
    return _overlap(a, b, 1) or _overlap(frames[0], frames[1], FRAME)


def _overlap(a: Set[tuple[str, str, str]], b: Set[tuple[str, str, str]], least: int) -> bool:
    shared = len(a & b)
    return shared >= least and 2 * shared > min(len(a), len(b))


def _given(labels: Sequence[str], titles: Sequence[str]) -> _Given:
    given = [clean_label(label) for label in labels]
    given += [form(title) for title in titles for form in (sanitise_title, clean_label)]
    return _Given(frozenset().union(*map(_trigrams, given)), frozenset().union(*map(_stems, given)))


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
            or _unsafe(text, allowed)
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
        return _filled("Comes back to L from time to time.", "this topic")

    def _contrary(self, key: str, text: str, allowed: str) -> tuple[str, str] | None:
        said, given = f" {' '.join(_tokens(text))} ", f" {' '.join(_tokens(allowed))} "
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
        known = frozenset(_tokens(allowed))
        for number in re.findall(r"\d+", text):
            if number not in known:
                return "number", f"{number} is not in the facts"
        counted = _NUMBERS & set(_tokens(text)) - known
        if counted:
            return "number", f"{', '.join(sorted(counted))}: not in the facts"
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
        letters = {token for token in _tokens(_CONTRACTED.sub("", text)) if len(token) == 1 and token.isalpha()}
        stray = letters - {"a", *_tokens(allowed)}
        if stray:
            return "not_a_sentence", f"a stray letter: {', '.join(sorted(stray))}"
        topical = said - _NEUTRAL_STEMS - _FRAME_STEMS
        unknown = topical - known
        if len(unknown) > UNKNOWN:
            return "ungrounded", f"not in the facts: {', '.join(sorted(unknown))}"
        return None

    def _foreign(self, key: str, known: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
        others = [k for k in self._own if k != key]
        labels = _stems(" . ".join(self._labels[k] for k in others))
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


def _unsafe(text: str, own: str) -> tuple[str, str] | None:
    """Markup, links, personal data and words that are refused unless the item's own facts (`own`) hold them."""
    for character in text:
        if _is_hidden(character) or (
            character not in _TEXT_CHARACTERS
            and unicodedata.category(character)[0] not in "LM"
            and not character.isdecimal()
        ):
            return "characters", f"U+{ord(character):04X} is not allowed"
    if _LINK.search(text) or _PHONE.search(text) or _CHAT.search(text) or _DOTTED.search(text):
        return "personal_or_link", "a link, an address, a phone number or a chat marker"
    tokens, given = _tokens(text), [_tokens(part) for part in re.split(r" [.,] ", own)]
    flat = f" {' '.join(tokens)} "
    if _COMMANDING & set(tokens) or any(f" {phrase} " in flat for phrase in _COMMANDING_PHRASES):
        return "command", "it reads like an order to a model"
    # A title's "her first marathon" may be retold; "in her free time" is a guess, though the title has the word.
    pairs = {pair for part in given for pair in pairwise(["", *map(_stem, part), ""])}
    around = zip(["", *map(_stem, tokens)], tokens, [*map(_stem, tokens[1:]), ""], strict=False)
    guess = {
        word
        for before, word, after in around
        if word in _PERSONAL and not {(before, _stem(word)), (_stem(word), after)} & pairs
    }
    guess -= {part[0] for part in given if len(part) == 1}
    guess |= _SENSITIVE & set(tokens).difference(*given)
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
    runs = Counter(zip(tokens, tokens[1:], tokens[2:], strict=False))
    for run, count in runs.items():
        if count > 1 and f" {' '.join(run)} " not in f" {' '.join(given)} ":
            return "repetition", f"{' '.join(run)!r} comes {count} times"
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
    text = "".join(" " if c.isspace() else c for c in text if c.isspace() or not _is_hidden(c))
    text = _YEAR.sub("", text)
    for pattern in (_CHAT, _LINK, _PHONE):
        text = pattern.sub(" ", text)
    text = _GROUPED.sub("", text).replace("\u2019", "'").replace(":", ",").replace(";", ",")
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


_FRAME_WORDS: Final = """
perhaps especially choice branch lead grow clear alongside increasingly appreciates suit occasionally taken
question fond amount fair second nearly quiet quieter instance
closely reward remains whether equally useful change ahead besides help
"""
_FRAME_STEMS: Final = frozenset(map(_stem, _FRAME_WORDS.split())).union(
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
        titles = [retellable(title, label) for title in interest.titles]
        titles = [title for title in titles if 1 < len(title.split()) <= 9]
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
    joined = [enumerated(via[:2])] if len(via) > 1 else []
    # Where the label cannot be used, a title has to name the topic.
    for name in [label, *filter(None, map(clean_label, novel.titles))]:
        for names in (*joined, *via):
            yield from (_filled(frame, name, via=names) for frame in pick(_REASONS))
        yield from (_filled(frame, name) for frame in pick(_REASONS_ALONE))


def _summaries(task: WordingTask) -> Iterator[str]:
    labels = list(dict.fromkeys(filter(None, (clean_label(label) for label, _ in task.overview))))
    pick = _picker(*labels)
    for count in range(min(3, len(labels)), 0, -1):
        yield from (_filled(frame, enumerated(labels[:count])) for frame in pick(_SUMMARIES))
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


def enumerated(labels: Sequence[str]) -> str:
    """One label or more as a phrase: `a, b and c`."""
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"
