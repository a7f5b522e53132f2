"""The student's prompt and grammars."""

from __future__ import annotations

import re

import orjson
import pytest

from streams.prompts import all_grammars, build_prompt, draft_answer, grammar_for
from streams.wording import InterestTask, WordingTask, answer_keys, parse_wording, split_task
from tests.unit.test_wording import HOSTILE
from tests.wording_samples import sample_task


def test_all_prompts_share_their_beginning_and_hash() -> None:
    prompts = [build_prompt(sample_task(i, n, i + n)) for i in range(5) for n in range(3)]
    beginnings = {prompt.text.rsplit("<|im_start|>user\n", 1)[0] for prompt in prompts}
    assert len(beginnings) == 1
    assert len({prompt.prompt_hash for prompt in prompts}) == 1
    assert len(beginnings.pop()) > 400


def test_the_last_turn_holds_the_facts_and_waits_for_the_answer() -> None:
    text = build_prompt(sample_task(2, 1)).text
    last = text.rsplit("<|im_start|>user\n", 1)[1]
    assert last.endswith("<|im_end|>\n<|im_start|>assistant\n")
    for fact in ("sourdough baking", "trail running", "feeding a sourdough starter", "jazz piano", "more and more"):
        assert fact in last


def test_grammars_depend_on_the_shape_alone() -> None:
    one, other = build_prompt(sample_task(2, 1, 0)), build_prompt(sample_task(2, 1, 4))
    assert one.grammar == other.grammar == grammar_for(2, 1)
    assert len(set(all_grammars())) == 7 * 5 * 2 - 1
    assert one.grammar in all_grammars()


@pytest.mark.parametrize(("interests", "novel"), [(i, n) for i in range(7) for n in range(5)])
def test_each_grammar_asks_for_the_keys_in_order(interests: int, novel: int) -> None:
    root = grammar_for(interests, novel).splitlines()[0]
    assert tuple(re.findall(r'\\"(\w)\\":', root)) == answer_keys(interests, novel)


def test_a_shape_beyond_the_limits_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 6 and 4"):
        grammar_for(7, 0)


@pytest.mark.parametrize("title", HOSTILE)
def test_a_hostile_title_cannot_end_its_line_or_turn(title: str) -> None:
    plain = WordingTask((InterestTask("bread", 40, 0, ("Kneading dough",)),), (), ())
    hostile = WordingTask((InterestTask("bread", 40, 0, (title, title)),), (), ())
    text, reference = build_prompt(hostile).text, build_prompt(plain).text
    assert text.count("<|im_") == reference.count("<|im_")
    assert text.count("\n") == reference.count("\n")
    assert len(text) < len(reference) + 120
    assert list(orjson.loads(draft_answer(build_prompt(hostile)))) == ["1"]


def test_a_hostile_label_makes_no_new_line() -> None:
    for label in HOSTILE:
        task = WordingTask((InterestTask(label, 40, 0, ()),), (), ((label, 40),))
        assert list(orjson.loads(draft_answer(build_prompt(task)))) == ["s", "1"]


def test_the_drafts_are_sentences_that_pass_the_gate() -> None:
    for first in range(10):
        for piece in split_task(sample_task(3, 2, first)):
            parse_wording(draft_answer(build_prompt(piece)), piece)


def test_caps_leave_room_for_one_sentence_a_key() -> None:
    for piece in split_task(sample_task(3, 2)):
        assert 32 <= build_prompt(piece).maximum_tokens <= 64
    assert build_prompt(sample_task(6, 4)).maximum_tokens <= 512
