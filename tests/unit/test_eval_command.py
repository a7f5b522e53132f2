"""`personas eval` from its arguments to its last line, with a scripted student in place of Triton."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from click.testing import CliRunner, Result

from agents.cli import eval as command
from agents.cli import personas
from agents.evaluation import run, stack
from agents.evaluation.hostile import Trial, packaged_twins
from agents.evaluation.run import Measured
from agents.evaluation.viewers import Platform, held_out_platforms, packaged_cases, registry_of
from agents.settings import Settings
from agents.student_client import ScriptedStudent, StudentUnavailable
from streams.prompts import Prompt, plain_answer
from streams.records import encode
from tests.evaluation_samples import WordEmbedder, sample_case, well_said

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
    assert r"Made by personas eval --viewers 3 --out page.md --answers answers.jsonl --json, seed 1." in page
    assert [(row[0], row[2]) for row in tables(page)[0][2:]] == list(zip(KEYS, BARS, strict=True))
    (tiers,) = [rows[2:] for rows in tables(page) if rows[0][1] == "tier"]
    shares = {(row[0], row[1]): float(row[2]) for row in tiers}
    assert 0 < shares["with the cache", "cache"] < 1
    assert shares["with the cache", "cache"] + shares["with the cache", "student"] == pytest.approx(1, abs=0.1)
    assert all(float(row[3]) == 0 for row in tiers if row[1] == "cache" or row[0] == "templates alone")
    assert all(0 <= float(row[4]) <= 1 for row in tiers)
    for heading in ("Slices", "Failure modes", "Reading", "Hostile titles", "Incremental wording", "Sample personas"):
        assert f"## {heading}" in page
    assert page.count("**good:") == page.count("**bad:") == 10
    lines = answers.read_bytes().splitlines()
    assert len(lines) == figures["contexts"]
    assert orjson.loads(lines[0])["calls"]


def test_equal_facts_are_asked_for_once_but_for_twins_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[str] = Counter()

    def say(prompt: Prompt, seed: int) -> str:
        asked[prompt.text] += seed == 0
        return plain_answer(prompt)

    monkeypatch.setattr(Student, "say", staticmethod(say))
    monkeypatch.setattr(run, "AGAIN", TWINS)  # one twin is worded once more: its summary, interest and topic
    last_line(invoke("--viewers", "1", "--json"))
    assert sorted(asked.values())[-4:] == [1, 2, 2, 2]


def test_the_hostile_personas_and_the_shared_cache_are_searched_for_leaks() -> None:
    worded = well_said()
    leaking = replace(worded, persona=replace(worded.persona, summary="Is at 12 Mill Lane."))
    clean = Measured([worded], [], [], [], [], [])
    assert run.all_leaks(clean) == []
    trial = Trial(packaged_twins()[0], leaking, worded)
    assert len(run.all_leaks(replace(clean, trials=[trial]))) == 1
    assert len(run.all_leaks(replace(clean, canaries_in_turn=[leaking]))) == 1


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


def test_own_contexts_are_judged_by_own_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_of(PLATFORMS[0], WordEmbedder(), [])
    monkeypatch.setattr("agents.event_log.load_current_registry", lambda settings: registry)
    case = next(
        case
        for case in packaged_cases(Settings(), PLATFORMS[:1], WordEmbedder(), 3, 1).cases
        if len(case.future) > 20 and len(case.past) > 60
    )
    contexts, events, out = tmp_path / "requests.jsonl", tmp_path / "events.jsonl", tmp_path / "page.md"
    contexts.write_bytes(encode(case.request) + b"\n")
    watches = [watch for watch in (*case.past, *case.future) if registry.knows(watch.video_id)]
    lines = [{"user_id": case.user_id, "video_id": w.video_id, "ts": w.ts, "title": w.title} for w in watches]
    lines += [lines[-1], {"user_id": case.user_id, "video_id": "nowhere", "ts": watches[0].ts}]
    events.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    arguments = ("--contexts", str(contexts), "--json", "--out", str(out))
    bare = last_line(invoke(*arguments))
    assert bare["sporadic"] is bare["novel_consumed"] is None
    figures = last_line(invoke(*arguments, "--events", str(events)))
    assert figures["sporadic"] == figures["novel_consumed"] == 0
    assert figures["main_missed"] == figures["outdated"] == 0
    page = out.read_text()
    assert "nothing but the requests and the watches is known" in page
    assert "## What a persona tells of the next watches" in page
    assert "are simulated" not in page
    assert "288 clusters" not in page
    assert "a video of their own" not in page
    assert invoke("--events", str(events)).exit_code == 2


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
    assert all(0 <= float(row[2]) <= 1 for row in beside[2:])


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


def test_the_form_holds_what_the_base_model_itself_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the templates that the writer would put in its place."""
    monkeypatch.setenv("PERSONAS_DATA_FOLDER", str(tmp_path))
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "base.gguf").write_bytes(b"weights")
    seen: Counter[str] = Counter()

    def say(prompt: Prompt, seed: int) -> str:
        seen[prompt.text] += seed == 0
        return plain_answer(prompt) if seen[prompt.text] == 1 and seed == 0 else "Sure! Here you go"

    monkeypatch.setattr(Student, "say", staticmethod(say))
    result = invoke("--pairs", "1", "--viewers", "1", "--base")
    assert result.exit_code == 0, result.output
    (item,) = [orjson.loads(line) for line in result.stdout.splitlines()]
    raw = [letter for letter in "ABC" if set(item[letter]) == {"Sure! Here you go"}]
    assert len(raw) == 1


def test_a_running_student_is_used(quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = []
    original = Student.__init__

    def noted(self: Student, settings: Settings) -> None:
        addresses.append(settings.triton_url)
        original(self, settings)

    monkeypatch.setattr(Student, "__init__", noted)
    last_line(invoke("--viewers", "1", "--student", "triton:8001", "--json"))
    assert (addresses, quick) == (["triton:8001"], [])


def test_the_figures_are_printed_though_the_page_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise ValueError("no page")

    monkeypatch.setattr("agents.evaluation.report.report", fail)
    result = invoke("--viewers", "1", "--json", "--out", str(tmp_path / "page.md"))
    assert result.exit_code == 1
    assert "no page" in result.stderr
    assert list(orjson.loads(result.stdout.splitlines()[-1])) == KEYS


def test_what_cannot_be_written_is_refused_at_once(tmp_path: Path, quick: list[str]) -> None:
    result = invoke("--answers", str(tmp_path / "none" / "answers.jsonl"))
    assert result.exit_code == 1
    assert "no such folder" in result.output
    assert quick == []


def test_a_student_that_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch, quick: list[str]) -> None:
    def away(prompt: Prompt, seed: int) -> str:
        raise StudentUnavailable("connection refused")

    monkeypatch.setattr("agents.evaluation.answers.GONE_SECONDS", 0.2)
    monkeypatch.setattr(Student, "say", staticmethod(away))
    result = invoke("--viewers", "1", "--json")
    assert result.exit_code == 1
    assert "no answer of the student" in result.output
    assert quick == ["start student", "stop student"]


def test_a_second_signal_does_not_cut_the_clean_up_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Local:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def up(self, *_: object) -> None:
            pass

        def down(self) -> None:
            happened.append("down")
            signal.raise_signal(signal.SIGTERM)
            happened.append("stopped")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    happened: list[str] = []
    monkeypatch.setattr(stack, "LocalStack", Local)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with stack.started_triton(Settings(data_folder=tmp_path), {}):
            pass
        assert signal.getsignal(signal.SIGTERM) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)
    assert happened == ["down", "stopped"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_stops_what_was_started(
    quick: list[str], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def interrupted(prompt: Prompt, seed: int) -> str:
        if not asked:
            asked.append(prompt)
            signal.raise_signal(number)
        return plain_answer(prompt)

    asked: list[Prompt] = []

    monkeypatch.setattr(Student, "say", staticmethod(interrupted))
    before = signal.getsignal(number)
    result = invoke("--viewers", "1", "--json")
    assert result.exit_code == 130
    assert quick == ["start student", "stop student"]
    assert signal.getsignal(number) == before


def test_a_folder_that_is_not_there_is_refused_at_once(tmp_path: Path, quick: list[str]) -> None:
    result = invoke("--out", str(tmp_path / "none" / "page.md"))
    assert result.exit_code == 1
    assert "no such folder" in result.output
    assert quick == []
