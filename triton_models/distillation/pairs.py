"""Pairs of a context and its wording, as files: one JSON object a line.

    {"catalogue": "calm", "task": {"interests": [...], "novel": [...], "overview": [...]}, "text": "Enjoys ..."}

A task asks for one text (see `streams.tasks.split_task`); the text is what the student should answer. A pair without
a text is a context: one that a teacher is to word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from streams.prompts import Facts, build_prompt, facts_of
from streams.tasks import InterestTask, NovelTask, WordingTask, task_keys
from streams.wording import parse_wording

PAIRS: Final = Path(__file__).parent / "pairs"


@dataclass(frozen=True, slots=True)
class Pair:
    """A task of one text, the text (None: still to be written), and the catalogue whose clusters it speaks of."""

    catalogue: str
    task: WordingTask
    text: str | None = None

    @property
    def answer(self) -> str:
        """The student's answer: compact JSON. ValueError where there is no text."""
        if self.text is None:
            raise ValueError("the pair has no text")
        (key,) = task_keys(self.task)
        return orjson.dumps({key: self.text}).decode()

    @property
    def prompt(self) -> str:
        """What the student reads."""
        return build_prompt(self.task).text

    @property
    def line(self) -> str:
        """The line of facts that the student reads, with its key: all that a text may come from."""
        return f"{self.facts.key}. {self.facts.line}"

    @property
    def facts(self) -> Facts:
        """The same, taken apart; the text begins with its opening, letter for letter."""
        return facts_of(self.task)


def read_pairs(paths: Iterable[Path]) -> Iterator[Pair]:
    """The pairs of files, and of the *.jsonl files of folders. Raises ValueError that names the file and line."""
    for path in paths:
        for file in json_lines(path):
            for number, line in enumerate(_content(file).split(b"\n"), 1):
                if not line:
                    continue
                try:
                    yield _pair(orjson.loads(line))
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"{file}:{number} is no pair: {error!r}") from error


def json_lines(path: Path) -> list[Path]:
    """The path, or the *.jsonl files of a folder by name. Raises ValueError for a folder without any."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise ValueError(f"the folder {path} has no *.jsonl file")
    return files


def write_pairs(path: Path, pairs: Iterable[Pair]) -> int:
    """Write pairs, a line each, all or nothing; how many there were. Raises OSError."""
    lines = [encoded(pair) for pair in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_bytes(b"".join(lines))
    unfinished.replace(path)
    return len(lines)


def encoded(pair: Pair) -> bytes:
    """A pair as its line."""
    task = {name: value for name, value in asdict(pair.task).items() if value and name != "language"}
    record = {"catalogue": pair.catalogue, "task": task} | ({"text": pair.text} if pair.text is not None else {})
    return orjson.dumps(record) + b"\n"


def check(pair: Pair) -> None:
    """Raises `streams.wording.WordingRejected` if the text may not be published for its task, so not learned either."""
    parse_wording(pair.answer, pair.task)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error


def _pair(record: dict[str, Any]) -> Pair:
    task = record["task"]
    text = record.get("text")
    wanted = WordingTask(
        interests=tuple(
            InterestTask(_text(i["label"]), _number(i["share_bucket"]), _number(i["trend"]), _texts(i["titles"]))
            for i in task.get("interests", ())
        ),
        novel=tuple(
            NovelTask(_text(n["label"]), _texts(n["via_labels"]), _texts(n["titles"])) for n in task.get("novel", ())
        ),
        overview=tuple((_text(label), _number(share)) for label, share in task.get("overview", ())),
    )
    if len(task_keys(wanted)) != 1:
        raise ValueError("its task asks for more than one text")
    return Pair(_text(record["catalogue"]), wanted, None if text is None else _text(text))


def _text(value: Any) -> str:  # noqa: ANN401
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _texts(values: Any) -> tuple[str, ...]:  # noqa: ANN401
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is no list of texts")
    return tuple(map(_text, values))


def _number(value: Any) -> int:  # noqa: ANN401
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value
