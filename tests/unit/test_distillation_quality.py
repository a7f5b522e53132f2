"""Each check of pairs finds the fault that it is for, and finds none in the shipped pairs."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.prompts import SAYABLE, grammar_for
from tests.distillation_samples import TITLES, contexts, interest, plain, summary, topic
from triton_models.distillation import quality
from triton_models.distillation.pairs import PAIRS, Pair, read_pairs, write_pairs
from triton_models.distillation.quality import (
    FEW,
    MOST_OF_ONE_FRAME,
    Variety,
    as_read,
    fault_of,
    faults_of,
    figures,
    frame_of,
    main,
    varieties,
)


def said(pair: Pair, rest: str) -> Pair:
    """The pair with a text that begins as it must."""
    return replace(pair, text=f"{pair.facts.opening}{rest}")


def reason(pair: Pair) -> str | None:
    fault = fault_of(pair)
    return fault.reason if fault else None


# One pair


@pytest.mark.parametrize("context", [interest(), topic(), topic(via=()), summary(), *contexts(6)])
def test_a_plain_sentence_has_no_fault(context: Pair) -> None:
    assert fault_of(plain(context)) is None


def test_a_context_has_no_text_yet() -> None:
    assert reason(interest()) == "no_text"


def test_a_text_must_begin_with_the_opening() -> None:
    good = plain(topic())
    assert good.text is not None
    assert reason(replace(good, text="Never " + good.text)) == "opening"
    assert reason(said(topic(), "ish pottery after sourdough baking at all times.")) == "opening"
    assert reason(replace(good, text="")) == "opening"


def test_a_text_must_have_the_right_length() -> None:
    opening = summary("sourdough baking", "trail running")
    assert reason(said(opening, " x.")) == "length"
    assert reason(said(opening, " sourdough baking" + " and more" * 11 + ".")) == "length"
    assert reason(said(opening, " sourdough baking " + "a" * 200 + ".")) == "length"


@pytest.mark.parametrize("mark", ["!", " - and", "; then", " \u2019n", "\u201c", "a-b-c-d", "  and", "&"])
def test_a_text_must_be_sayable_under_the_grammar(mark: str) -> None:
    good = plain(topic())
    assert good.text is not None
    assert reason(replace(good, text=good.text.replace(" at", f"{mark} at"))) == "grammar"


def test_the_gate_is_asked() -> None:
    good = plain(topic())
    assert good.text is not None
    assert reason(replace(good, text=good.text.replace(" at", " in Rome at"))) == "name"
    assert reason(replace(good, text=good.text.replace(" at", " and 12 more at"))) == "number"
    assert reason(replace(good, text=good.text.replace(" at", " with her at"))) == "personal_guess"


def test_a_text_must_not_say_what_the_student_does_not_read() -> None:
    titles = (*TITLES[:3], "Baking in Rome", "Ovens")
    pair = said(interest(titles=titles), " sourdough baking with a starter in Rome.")
    assert reason(replace(pair, text=f"{pair.facts.opening} is baking in Rome with a starter.")) == "name"
    assert reason(replace(pair, text=f"{pair.facts.opening} is baking with a starter at all times.")) is None
    assert as_read(pair).task.interests[0].titles == TITLES[:3]
    assert as_read(pair).line == pair.line


WORD = st.from_regex(r"[A-Za-z0-9\u00C0-\u024F]{1,4}(-[a-z]{1,3}){0,3}'?", fullmatch=True)


@given(st.lists(st.tuples(WORD, st.sampled_from(["", "", ",", ",,", ".", " "])), min_size=1, max_size=40))
def test_what_is_sayable_is_what_the_grammar_says(parts: list[tuple[str, str]]) -> None:
    text = " ".join(word + mark for word, mark in parts) + "."
    assert bool(SAYABLE.fullmatch(text)) == bool(re.fullmatch(as_expression(grammar_for("1")), text))


def as_expression(grammar: str) -> str:
    """The rule `text` of the grammar as a regular expression: quoted marks stand for themselves, spaces separate."""
    rules = dict(line.split(" ::= ") for line in grammar.splitlines() if " ::= " in line)

    def expression(rule: str) -> str:
        found = ""
        for token in re.findall(r'"[^"]*"|\[[^\]]*\]|\{[^}]*\}|[()?*+]|[a-z]+', rule):
            if token[0] == '"':
                # An optional quantifier after a mark must hold for all of it: each mark has one character.
                found += re.escape(token[1:-1])
            elif token in rules:
                found += f"(?:{expression(rules[token])})"
            else:
                found += token
        return found

    return expression(rules["text"])


# Pairs together


def test_the_second_pair_of_a_line_is_a_fault() -> None:
    first = plain(topic())
    second = said(topic(), " pottery with much joy after sourdough baking.")
    assert fault_of(second) is None
    assert [fault and fault.reason for fault in faults_of([first, second])] == [None, "same_line"]


def test_a_text_that_nearly_repeats_an_earlier_one_is_a_fault() -> None:
    one, other = interest(trend=1), interest("sourdough baking at home", trend=1)
    words = "feeding a starter, folding wet dough, scoring patterns in a long loaf and baking it in an old iron pot"
    first = replace(one, text=f"{one.facts.opening} {words}.")
    second = replace(other, text=f"{other.facts.opening} {words} more.")
    assert quality._Earlier().nearest(first.text or "") is None
    earlier = quality._Earlier()
    earlier.add(first.text or "")
    assert earlier.nearest(second.text or "") == first.text
    assert earlier.nearest("Enjoys sourdough baking, as in feeding a starter.") is None


def test_near_duplicates_are_told_of_pairs() -> None:
    long = "sourdough baking in old stone ovens and iron pots"
    pairs = [plain(topic("pottery", (long,))), plain(topic("pottery work", (long,)))]
    pairs = [replace(pair, text=f"{pair.facts.opening} pottery for fans of {long}.") for pair in pairs]
    faults = [fault.reason if fault else None for fault in map(fault_of, pairs)]
    assert faults == [None, None]
    assert [fault and fault.reason for fault in faults_of(pairs)] == [None, "near_duplicate"]
    # A text with a fault of its own does not make another one a duplicate.
    broken = replace(pairs[0], text=f"{pairs[0].text} Twice.")
    assert [fault and fault.reason for fault in faults_of([broken, pairs[1]])] == ["grammar", None]


# Variety


def variety(**changes: Any) -> Variety:
    values: dict[str, Any] = {
        "texts": FEW, "openings": {"Enjoys": 0.2}, "top_frame": ("Enjoys _", 0.05), "frames": 0.6, "distinct": 0.5,
    } | changes  # fmt: skip
    return Variety(**values)


def test_variety_is_judged_by_opening_and_frame() -> None:
    assert variety().problems == []
    assert "Likes" in variety(openings={"Likes": 0.5, "Enjoys": 0.5}).problems[0]
    assert "Likes _" in variety(top_frame=("Likes _", 0.2)).problems[0]
    assert "frames a text" in variety(frames=0.1).problems[0]
    assert variety(texts=FEW - 1, frames=0.1).problems == []


def test_a_frame_is_a_text_without_the_words_of_its_facts() -> None:
    pair = interest()
    opening = pair.facts.opening
    own = replace(pair, text=f"{opening} is there, with a long loaf and a starter being fed.")
    assert frame_of(own).endswith("is there with a _ and a _ being fed")
    same = replace(pair, text=f"{opening} is there, with a rye and a loaf being fed.")
    assert frame_of(same) == frame_of(own)


def test_texts_of_one_frame_are_too_uniform() -> None:
    pairs = [plain(context) for context in contexts(48)]
    found = figures(pairs, faults_of(pairs))
    assert found["kept"] == 48
    assert found["passed"] is False
    assert any("interest: " in problem for problem in found["too_uniform"])  # type: ignore[attr-defined]
    assert varieties(pairs)["interest"].top_frame[1] > MOST_OF_ONE_FRAME


def test_own_labels_count_as_one_opening() -> None:
    pairs = [plain(context) for context in contexts(48)]
    openings = varieties(pairs)["interest"].openings
    assert quality.OWN_LABEL in openings
    assert sum(openings.values()) == pytest.approx(1.0)
    assert list(openings.values()) == sorted(openings.values(), reverse=True)


# The command


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, Any]:
    monkeypatch.setattr(sys, "argv", ["quality", *map(str, arguments)])
    main()
    out = capsys.readouterr().out
    return out, orjson.loads(out.splitlines()[-1])


def test_the_command_reports_prints_and_drops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = plain(topic())
    write_pairs(tmp_path / "pairs.jsonl", [good, interest(), replace(plain(summary()), text="Never mind the opening.")])
    checked = tmp_path / "checked.jsonl"
    out, found = run(monkeypatch, capsys, tmp_path / "pairs.jsonl", "--report", "--drop", checked, "--print", 40)
    assert list(read_pairs([checked])) == [good]
    assert found["faults"] == {"no_text": 1, "opening": 1}
    assert (found["pairs"], found["kept"], found["passed"]) == (3, 1, False)
    assert "opening: it must begin with" in out
    assert "Never mind the opening." in out
    assert f"{good.line}\n    {good.text}\n" in out


def test_what_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quality", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: the folder"):
        main()
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(SystemExit, match="error: no pairs in"):
        main()


# The shipped pairs


def test_the_shipped_pairs_pass() -> None:
    pairs = list(read_pairs([PAIRS]))
    found = figures(pairs, faults_of(pairs))
    assert found["passed"], found
    assert len(pairs) > 2_900
