"""Titles and labels from catalogues, made safe to enter prompts and sentences; what may stand in neither."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from typing import Final

from streams.words import NEUTRAL, stem_of, stems_of, tokens_of

MAXIMUM_TITLE: Final = 80
MAXIMUM_RETOLD: Final = 64
MAXIMUM_LABEL: Final = 48
CLEANED: Final = 16_384
"""Labels and titles remembered in their cleaned form: those of the clusters come again and again."""
STYLED: Final = 3
"""Letters of a title that may be styled ones, as in an unusual name."""
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
    return "" if unsafe(text, text) or not tokens_of(text) else text


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
        subject = stems_of(label)
        sentences = [sentence for sentence in sentences if not subject.isdisjoint(stems_of(sentence))]
    first = sentences[0] if sentences else ""
    if _shouts(first, label):
        return ""
    clause = first.partition(",")[0]
    text = sanitise_title(clause if " " in clause else first, MAXIMUM_RETOLD)
    return "" if _FOREIGN.search(text) or _CODED.search(text) or _drones(title) else text


def _drones(title: str) -> bool:
    """Whether a topical word comes again and again."""
    topical = (word for word in tokens_of(title[: 8 * MAXIMUM_TITLE]) if word not in NEUTRAL)
    return any(count > 2 for count in Counter(topical).values())


def _shouts(title: str, label: str) -> bool:
    """Whether a word stands in capitals in a title that has others in small letters, and the label lacks it."""
    shouted = stems_of(" ".join(_SHOUTED.findall(title)))
    return any(word.islower() for word in title.split()) and not shouted <= stems_of(label)


def unsafe(text: str, own: str) -> tuple[str, str] | None:
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
    tokens, given = tokens_of(text), [tokens_of(part) for part in re.split(r" [.,] ", own)]
    if _commands(tokens):
        return "command", "it reads like an order to a model"
    # A title's "her first marathon" may be retold; "in her free time" is a guess, though the title has the word.
    pairs = {pair for part in given for pair in pairwise(["", *map(stem_of, part), ""])}
    around = zip(["", *map(stem_of, tokens)], tokens, [*map(stem_of, tokens[1:]), ""], strict=False)
    guess = {
        word
        for before, word, after in around
        if word in _PERSONAL and not {(before, stem_of(word)), (stem_of(word), after)} & pairs
    }
    guess -= {part[0] for part in given if len(part) == 1}
    guess |= _SENSITIVE & set(tokens).difference(*given)
    if guess:
        return "personal_guess", f"{', '.join(sorted(guess))}"
    return None


def _commands(tokens: list[str]) -> bool:
    """Whether words read like an order to a model."""
    flat = f" {' '.join(tokens)} "
    return not _COMMANDING.isdisjoint(tokens) or any(f" {phrase} " in flat for phrase in _COMMANDING_PHRASES)


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
    return "" if _commands(tokens_of(text)) else unicodedata.normalize("NFC", text)


def _shortened(text: str, maximum: int) -> str:
    if len(text) <= maximum:
        return text
    cut = text[: maximum + 1].rsplit(" ", 1)[0] if " " in text[: maximum + 1] else text[:maximum]
    return cut[:maximum].rstrip(" .,'\u2019-&!?+%")
