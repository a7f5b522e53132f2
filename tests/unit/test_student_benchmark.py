"""The arithmetic of the benchmark of the student, and what it says to llama.cpp."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import numpy as np
import pytest

from agents.evaluation.cases import Case
from agents.evaluation.viewers import Platform
from agents.student_client import Answer, ScriptedStudent, StudentFailed, StudentUnavailable
from benchmarks import llama_cpp, student
from benchmarks.llama_cpp import LlamaCppError, answer_of, ensure_server, request_body, started_server
from benchmarks.student import LLAMA_CPP, OURS, Figures, Overload, Patient, Pool, Run, Text, TooFewTextsError
from streams.prompts import Prompt, build_prompt, plain_answer
from streams.tasks import split_task
from tests.request_samples import sample_request
from tests.wording_samples import sample_task


def texts(first: int = 0) -> list[Text]:
    return [Text("interest", piece, build_prompt(piece)) for piece in split_task(sample_task(2, 1, first))]


def answered(text: Text, words: str | None = None, latency_ms: int = 100) -> tuple[Text, Answer]:
    said = plain_answer(text.prompt) if words is None else words
    return text, Answer(said, "stop", 70, 20, latency_ms, "student", "1")


def figures(ours: dict[int, list[float]], theirs: dict[int, list[float]], words: str | None = None) -> Figures:
    own = texts()

    def runs(seconds: dict[int, list[float]], said: str | None) -> dict[int, list[Run]]:
        return {n: [Run(s, [answered(text, said) for text in own]) for s in each] for n, each in seconds.items()}

    return Figures({OURS: runs(ours, None), LLAMA_CPP: runs(theirs, words)}, {"summary": 1.0, "interest": 3.0})


def test_personas_a_second_are_the_median_of_rounds_by_the_texts_of_a_persona() -> None:
    count = len(texts())
    found = figures({1: [2.0], 8: [1.0, 4.0, 2.0], 32: [1.0]}, {1: [2.0], 8: [8.0], 32: [3.0]})
    assert found.per_second(OURS, 8) == pytest.approx(count / 2.0 / 4)
    document = found.document()
    # The lower of the two; that of one in flight does not count.
    assert document["ratio"] == pytest.approx(3.0)
    assert document["bars_met"] == {student.BAR_TEXT: True}
    assert document["ours_per_s"].keys() == {"1", "8", "32"}
    assert document["tokens_per_persona"][OURS] == [280.0, 80.0]
    assert document["latency_ms"][OURS]["8"] == [100, 100]


def test_a_missed_bar_is_said() -> None:
    found = figures({8: [2.0], 32: [2.0]}, {8: [8.0], 32: [3.9]})
    assert found.document()["bars_met"] == {student.BAR_TEXT: False}


def test_both_pass_the_same_gate() -> None:
    found = figures({8: [1.0], 32: [1.0]}, {8: [1.0], 32: [1.0]}, words='{"s":"No."}')
    assert found.passed(OURS) == 1.0
    assert found.passed(LLAMA_CPP) == 0.0
    assert found.same(lambda answer: answer.tokens_in) == 1.0
    assert found.same(lambda answer: answer.text) == 0.0


def test_the_report_has_a_row_for_each_number_in_flight() -> None:
    over = Overload(Run(2.0, [answered(texts()[0])]), Run(1.0, [answered(texts()[0])]), [1.0, 3.0], [5.4], [7.0])
    found = figures({1: [1.0], 8: [1.0], 32: [1.0]}, {1: [1.0], 8: [2.0], 32: [4.0]})
    page = student.markdown(found, over, "python -m benchmarks.student")
    rows = [line.split(" | ")[:4] for line in page.splitlines() if line.startswith(("| 1 |", "| 8 |", "| 32 |"))]
    assert [row[3] for row in rows] == ["1.00", "2.00", "4.00"]
    assert over.document()["refused_p50_ms"] == 2.0
    assert "no request left 5 ms" in page


def test_parts_are_in_proportion_and_add_up() -> None:
    assert student.apportioned(10, {"a": 1.0, "b": 3.0, "c": 2.0}) == {"a": 2, "b": 5, "c": 3}
    for count in range(40):
        assert sum(student.apportioned(count, {"a": 1.0, "b": 4.3, "c": 2.7}).values()) == count


def test_no_prompt_is_drawn_twice() -> None:
    seen = set[str]()
    cases = [Case(sample_request(request_id=f"r{n}")) for n in range(3)]
    pool = Pool(cases, 1, seen)
    per_persona = student.texts_of_case(cases[0])
    assert sum(pool.mix.values()) == len(per_persona)
    assert len(seen) == len(per_persona)  # the three ask for the same
    drawn = pool.draw(len(per_persona))
    assert {text.prompt.text for text in drawn} == seen
    with pytest.raises(TooFewTextsError, match="are left"):
        pool.draw(len(per_persona))
    with pytest.raises(TooFewTextsError):
        Pool(cases, 1, seen).draw(len(per_persona))


def test_turned_titles_give_other_prompts() -> None:
    platform = Platform("one", ("baking",), (("a", "b", "c"),), (False,))
    assert student.turned(platform, 1).titles == (("b", "c", "a"),)
    assert student.turned(platform, 3) == platform


async def test_so_many_are_in_flight_as_asked_for() -> None:
    scripted = ScriptedStudent(concurrency=99, delay_seconds=0.01)
    many = [text for first in range(4) for text in texts(first)]
    done = await student.run(scripted, many, 3)
    assert scripted.most_in_flight == 3
    assert len(done.answers) == len(many)
    assert done.per_second == pytest.approx(len(many) / done.seconds)


async def test_a_failed_call_fails_the_round() -> None:
    def fails(prompt: Prompt, seed: int) -> str:
        raise StudentFailed("no")

    with pytest.raises(StudentFailed, match="no"):
        await student.run(ScriptedStudent(fails), texts(), 2)


async def test_rounds_are_on_the_same_texts_and_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "WARM_UP", 1)
    asked: list[tuple[str, str]] = []

    def scripted(name: str) -> ScriptedStudent:
        def script(prompt: Prompt, seed: int) -> str:
            asked.append((name, prompt.text))
            return plain_answer(prompt)

        return ScriptedStudent(script)

    class Drawn:
        """A pool of a few texts."""

        mix = {"interest": 2.0}  # noqa: RUF012

        def __init__(self, first: int) -> None:
            self._texts = [text for place in range(3) for text in texts(first + place)]

        def draw(self, count: int) -> list[Text]:
            return [self._texts.pop() for _ in range(count)]

    students = {OURS: scripted(OURS), LLAMA_CPP: scripted(LLAMA_CPP)}
    found = await student.compare(students, [Drawn(0), Drawn(3)], {2: 3}, lambda text: None)  # type: ignore[list-item]
    assert [name for name, _ in asked[2::3]] == [OURS, LLAMA_CPP, LLAMA_CPP, OURS]
    assert {p for n, p in asked if n == OURS} == {p for n, p in asked if n == LLAMA_CPP}
    assert found.texts_per_persona == 2.0
    assert [len(run.answers) for run in found.runs[OURS][2]] == [3, 3]


async def test_a_full_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "RETRY_SECONDS", 0.0)
    left = [True, True]

    def full_twice(prompt: Prompt, seed: int) -> str:
        if left:
            left.pop()
            raise StudentUnavailable("full")
        return plain_answer(prompt)

    patient = Patient(ScriptedStudent(full_twice))
    (text, *_) = texts()
    assert (await patient.word(text.prompt)).text == plain_answer(text.prompt)
    assert len(patient.refusals_ms) == 2


def test_the_gauge_is_read_from_the_metrics() -> None:
    metrics = '# TYPE student_in_flight gauge\nstudent_in_flight{model="student",version="1"} 16\n'
    assert student.in_flight_of(metrics) == 16
    with pytest.raises(ValueError, match="student_in_flight"):
        student.in_flight_of("other 1\n")


def test_llama_cpp_is_asked_for_the_same() -> None:
    (text, *_) = texts()
    body = request_body(text.prompt)
    assert (body["prompt"], body["grammar"]) == (text.prompt.text, text.prompt.grammar)
    assert (body["n_predict"], body["temperature"]) == (text.prompt.maximum_tokens, 0.0)


def test_its_answer_is_read_or_refused() -> None:
    body = {"content": "{}", "stop_type": "limit", "tokens_evaluated": 7, "tokens_predicted": 2}
    assert answer_of(body, 5) == Answer("{}", "length", 7, 2, 5, "llama.cpp", llama_cpp.VERSION)
    with pytest.raises(StudentFailed, match="stop_type"):
        answer_of({"content": ""}, 5)


def test_a_machine_without_a_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: None if tool == "g++" else f"/usr/bin/{tool}")
    with pytest.raises(LlamaCppError, match=r"g\+\+ is missing.*apt install"):
        ensure_server(tmp_path, lambda text: None)
    assert not list(tmp_path.iterdir())


def test_a_download_with_another_checksum_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: f"/usr/bin/{tool}")

    def downloads(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--require-hashes" in command
        (Path(command[-1]) / "llama_cpp_python.tar.gz").write_bytes(b"another")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", downloads)
    with pytest.raises(LlamaCppError, match="it was not used"):
        ensure_server(tmp_path, lambda text: None)
    assert not list(tmp_path.iterdir())


def test_a_server_that_ends_at_once_is_reported_with_its_last_words(tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho cannot load $2\nexit 1\n")
    program.chmod(0o755)
    with (
        pytest.raises(LlamaCppError, match=r"cannot load weights\.gguf"),
        started_server(program, Path("weights.gguf"), tmp_path / "server.log"),
    ):
        pass


def test_quantiles_are_of_whole_milliseconds() -> None:
    over = Overload(Run(1.0, [answered(texts()[0])]), Run(1.0, [answered(texts()[0])]), [], [], [])
    assert np.isnan(over.document()["refused_p50_ms"])
    assert asyncio.iscoroutinefunction(student.run)
