"""Files of pairs: what is written is read back, and what is no pair is told with its file and line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from streams.prompts import build_prompt
from streams.wording import WordingRejected
from tests.distillation_samples import interest, plain, summary, topic
from triton_models.distillation.pairs import Pair, check, encoded, read_pairs, write_pairs

CONTEXTS = [interest(), topic(), topic(via=()), summary()]


def test_pairs_and_contexts_are_read_back(tmp_path: Path) -> None:
    pairs = [*CONTEXTS, *map(plain, CONTEXTS)]
    assert write_pairs(tmp_path / "deep" / "a.jsonl", pairs) == 8
    assert list(read_pairs([tmp_path / "deep" / "a.jsonl"])) == pairs
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.jsonl"]


def test_a_folder_is_read_by_the_names_of_its_files(tmp_path: Path) -> None:
    for name, pair in (("b", CONTEXTS[1]), ("a", CONTEXTS[0])):
        write_pairs(tmp_path / f"{name}.jsonl", [pair])
    (tmp_path / "notes.txt").write_text("no pair")
    assert list(read_pairs([tmp_path])) == CONTEXTS[:2]


def test_what_is_not_asked_for_is_not_written() -> None:
    record = orjson.loads(encoded(interest()))
    assert record.keys() == {"catalogue", "task"}
    assert record["task"].keys() == {"interests"}


@pytest.mark.parametrize("context", CONTEXTS)
def test_line_and_opening_are_what_the_student_reads(context: Pair) -> None:
    assert f"user\n{context.line}<" in build_prompt(context.task).text
    assert context.line.split(". ", 1)[1].startswith(f"{context.facts.opening} | ")


def test_the_answer_is_the_text_under_the_key_that_is_asked_for() -> None:
    assert [orjson.loads(plain(context).answer).keys() for context in CONTEXTS] == [{"1"}, {"a"}, {"a"}, {"s"}]
    with pytest.raises(ValueError, match="no text"):
        _ = interest().answer


def test_the_gate_checks_a_pair() -> None:
    check(plain(topic()))
    with pytest.raises(WordingRejected, match="ungrounded"):
        check(replace(topic(), text="May find nothing of the kind here."))


@pytest.mark.parametrize(
    "change",
    [
        {"catalogue": 5},
        {"text": ["Enjoys it."]},
        {"task": []},
        {"task": {}},
        {"task": {"interests": [{"label": "a", "share_bucket": 5, "trend": 0, "titles": []}] * 2}},
        {"task": {"interests": [{"label": 5, "share_bucket": 5, "trend": 0, "titles": []}]}},
        {"task": {"interests": [{"label": "a", "share_bucket": "5", "trend": 0, "titles": []}]}},
        {"task": {"interests": [{"label": "a", "share_bucket": 5, "trend": 0, "titles": "abc"}]}},
        {"task": {"interests": [{"label": "a", "share_bucket": 5, "trend": 0}]}},
        {"task": {"overview": [["a", 5, 6]]}},
    ],
)
def test_what_is_no_pair_is_told_with_file_and_line(tmp_path: Path, change: dict[str, object]) -> None:
    good = encoded(plain(interest()))
    broken = orjson.dumps(orjson.loads(good) | change)
    (tmp_path / "a.jsonl").write_bytes(good + broken + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2 is no pair"):
        list(read_pairs([tmp_path / "a.jsonl"]))


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*\.jsonl file"):
        list(read_pairs([tmp_path]))
    with pytest.raises(ValueError, match=r"cannot read .*missing: No such file"):
        list(read_pairs([tmp_path / "missing"]))
    (tmp_path / "a.jsonl").write_bytes(b'{"catalogue"')
    with pytest.raises(ValueError, match=r"a\.jsonl:1 is no pair"):
        list(read_pairs([tmp_path / "a.jsonl"]))
