"""`personas eval` from its arguments to its last line, with a scripted student in place of Triton."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest
from click.testing import CliRunner, Result

from agents.cli import eval as command
from agents.cli import personas
from agents.evaluation import run, stack
from agents.evaluation.hostile import packaged_twins
from agents.evaluation.viewers import Platform, held_out_platforms
from agents.settings import Settings
from agents.student_client import ScriptedStudent
from streams.prompts import Prompt, plain_answer
from streams.records import encode
from tests.evaluation_samples import WordEmbedder, sample_case

KEYS = [
    "contexts", "format", "faithfulness", "main_missed", "sporadic", "outdated", "repeated", "novel_consumed",
    "churn_auc", "leaks", "hostile", "breakouts", "tokens_mean",
]  # fmt: skip
BARS = [
    "at least 300", "at least .995", "at least .99", "below .02", "0", "below .02", "0", "0",
    "at least .9", "0", "at least 100", "0", "",
]  # fmt: skip
TWINS = 6


class Student(ScriptedStudent):
    """In place of the Triton client; made from settings as it is."""

    say = staticmethod(lambda prompt, seed: plain_answer(prompt))

    def __init__(self, settings: Settings) -> None:
        super().__init__(lambda prompt, seed: Student.say(prompt, seed))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is started or downloaded, and little is worded. Gives what was started and stopped."""
    happened: list[str] = []

    @contextmanager
    def started(settings: Settings, weights: Path | None = None) -> Iterator[Settings]:
        name = "student" if weights is None else weights.name
        happened.append(f"start {name}")
        try:
            yield settings
        finally:
            happened.append(f"stop {name}")

    monkeypatch.setattr(stack, "started_student", started)
    monkeypatch.setattr("agents.student_client.TritonStudent", Student)
    monkeypatch.setattr(Student, "say", staticmethod(lambda prompt, seed: plain_answer(prompt)))
    monkeypatch.setattr(command, "_embedder", lambda settings: WordEmbedder())
    monkeypatch.setattr(run, "STREAM_VIEWERS", 20)
    monkeypatch.setattr(run, "STREAM_EDGES", (10, 20))
    monkeypatch.setattr(run, "held_out_platforms", lambda: run_platforms())
    monkeypatch.setattr(run, "packaged_twins", lambda: packaged_twins()[:TWINS])
    monkeypatch.setattr("agents.evaluation.viewers.held_out_platforms", lambda: run_platforms())
    return happened


PLATFORMS = held_out_platforms()[:3]


def run_platforms() -> list[Platform]:
    return PLATFORMS


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(personas, ["eval", *arguments])


def last_line(result: Result) -> dict[str, float]:
    assert result.exit_code == 0, result.output
    found = orjson.loads(result.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def tables(page: str) -> list[list[list[str]]]:
    """The cells of every table of a page, its head included."""
    found: list[list[list[str]]] = [[]]
    for line in page.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [rows for rows in found if rows]


def test_the_last_line_is_the_figures(tmp_path: Path, quick: list[str]) -> None:
    out, answers = tmp_path / "page.md", tmp_path / "answers.jsonl"
    before = signal.getsignal(signal.SIGTERM)
    figures = last_line(invoke("--viewers", "3", "--json", "--out", str(out), "--answers", str(answers)))
    assert list(figures) == KEYS
    assert figures["contexts"] >= 10
    assert figures["hostile"] == TWINS
    assert 0 < figures["format"] <= 1
    assert figures["faithfulness"] > 0.8
    assert figures["novel_consumed"] == 0
    assert figures["leaks"] == 0
    assert 0 <= figures["churn_auc"] <= 1
    assert figures["tokens_mean"] > 0
    assert quick == ["start student", "stop student"]
    assert signal.getsignal(signal.SIGTERM) == before
    page = out.read_text()
    assert [(row[0], row[2]) for row in tables(page)[0][2:]] == list(zip(KEYS, BARS, strict=True))
    for heading in ("Slices", "Failure modes", "Reading", "Hostile titles", "Incremental wording", "Sample personas"):
        assert f"## {heading}" in page
    assert page.count("**good:") == page.count("**bad:") == 10
    lines = answers.read_bytes().splitlines()
    assert len(lines) == figures["contexts"]
    assert orjson.loads(lines[0])["calls"]


def test_a_bad_student_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def invent(prompt: Prompt, seed: int) -> str:
        key = next(iter(orjson.loads(plain_answer(prompt))))
        return orjson.dumps({key: "Lives with Aunt Marguerite in Rome since 1999."}).decode()

    monkeypatch.setattr(Student, "say", staticmethod(invent))
    figures = last_line(invoke("--viewers", "1", "--json"))
    assert figures["format"] == 0.0


def test_own_contexts_need_no_truth(tmp_path: Path) -> None:
    path, out = tmp_path / "requests.jsonl", tmp_path / "page.md"
    path.write_bytes(b"".join(encode(sample_case(user_id=f"u{n}").request) + b"\n" for n in range(3)))
    figures = last_line(invoke("--contexts", str(path), "--json", "--out", str(out)))
    assert figures["contexts"] == 3
    assert figures["faithfulness"] is not None
    assert figures["main_missed"] is figures["churn_auc"] is figures["novel_consumed"] is None
    assert "nothing but the requests is known" in out.read_text()


def test_contexts_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b"{}\n")
    result = invoke("--contexts", str(path))
    assert result.exit_code == 1
    assert "line 1 is no refresh request" in result.output


def test_the_base_model_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: list[str]) -> None:
    monkeypatch.setenv("PERSONAS_DATA_FOLDER", str(tmp_path))
    page = tmp_path / "page.md"
    arguments = ("--viewers", "1", "--base", "--json", "--out", str(page))
    result = invoke(*arguments)
    assert result.exit_code == 0
    assert "the base model is left out" in result.stderr
    assert "was not run beside it" in page.read_text()
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "base.gguf").write_bytes(b"weights")
    quick.clear()
    last_line(invoke(*arguments))
    assert quick == ["start student", "stop student", "start base.gguf", "stop base.gguf"]
    rows = tables(page.read_text())
    assert all(len(row) == len(table[0]) for table in rows for row in table)
    (beside,) = [table for table in rows if "first answers taken" in table[0]]
    assert [row[0] for row in beside[2:]] == ["student", "base model"]
    assert all(0 <= float(row[3]) <= 1 for row in beside[2:])


def test_a_form_is_printed_and_scored(tmp_path: Path) -> None:
    result = invoke("--pairs", "4", "--viewers", "1")
    assert result.exit_code == 0, result.output
    items = [orjson.loads(line) for line in result.stdout.splitlines()]
    assert [item["item"] for item in items] == [1, 2, 3, 4]
    assert all({"A", "B", "facts", "best"} <= item.keys() for item in items)
    for item in items[:3]:
        item["best"] = "A"
    path = tmp_path / "form.jsonl"
    path.write_bytes(b"\n".join(orjson.dumps(item) for item in items))
    scored = last_line(invoke("--score", str(path), "--json"))
    assert (scored["judged"], scored["skipped"]) == (3, 1)
    path.write_bytes(b"nothing")
    assert invoke("--score", str(path)).exit_code == 1


def test_a_running_student_is_used(quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = []
    original = Student.__init__

    def noted(self: Student, settings: Settings) -> None:
        addresses.append(settings.triton_url)
        original(self, settings)

    monkeypatch.setattr(Student, "__init__", noted)
    last_line(invoke("--viewers", "1", "--student", "triton:8001", "--json"))
    assert (addresses, quick) == (["triton:8001"], [])


def test_an_interrupt_stops_what_was_started(quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(prompt: Prompt, seed: int) -> str:
        if not asked:
            asked.append(prompt)
            signal.raise_signal(signal.SIGTERM)
        return plain_answer(prompt)

    asked: list[Prompt] = []

    monkeypatch.setattr(Student, "say", staticmethod(interrupted))
    before = signal.getsignal(signal.SIGTERM)
    result = invoke("--viewers", "1", "--json")
    assert result.exit_code == 130
    assert quick == ["start student", "stop student"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_folder_that_is_not_there_is_refused_at_once(tmp_path: Path, quick: list[str]) -> None:
    result = invoke("--out", str(tmp_path / "none" / "page.md"))
    assert result.exit_code == 1
    assert "no such folder" in result.output
    assert quick == []
