"""Asks a teacher for the texts of contexts: `python -m triton_models.distillation.teacher --help`."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import BinaryIO, Final

import orjson

from agents.settings import SettingsError, load_settings
from agents.student_client import Answer
from agents.teacher_client import TeacherClient, TeacherFailed, TeacherUnavailable, teacher_of
from streams.decoding import printable
from streams.tasks import task_keys
from streams.teaching import Chat, build_chat, compact_answer, corrected_chat
from triton_models.distillation.command import positive, say
from triton_models.distillation.pairs import Pair, encoded, read_pairs
from triton_models.distillation.quality import Fault, fault_of

ABSENCES: Final = 6
"""Times in a row that one context meets an absent teacher before the run ends."""
FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 60.0
PROGRESS: Final = 25
"""A line of progress after so many contexts."""


@dataclass(slots=True)
class Counts:
    """What became of the contexts of a run, and what it cost."""

    contexts: int = 0
    done_before: int = 0
    written: int = 0
    refused: int = 0
    """Contexts left without a text: each try was refused or failed."""
    tries: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Why tries were refused."""
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def left(self) -> int:
        """Contexts that were not come to."""
        return self.contexts - self.done_before - self.written - self.refused


class TeacherAway(RuntimeError):  # noqa: N818
    """The teacher did not answer for so long that the run ends; what is written stays."""


def main() -> None:
    """The command."""
    options = _arguments()
    try:
        contexts = list(read_pairs(options.contexts))
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        with opened(options.out) as (out, done):
            sys.exit(asyncio.run(_run(contexts, done, out, options)))
    except (OSError, ValueError, SettingsError) as error:
        sys.exit(f"error: {error}")


async def ask(
    teacher: TeacherClient,
    contexts: Iterable[Pair],
    out: BinaryIO,
    counts: Counts,
    *,
    tries: int,
    concurrency: int,
    pause_seconds: float = FIRST_PAUSE_SECONDS,
) -> None:
    """Append a pair to `out` for each context that the teacher words well, `concurrency` at a time, and count.

    tries: of each context, each told why the one before was refused. Raises TeacherAway; a call that is cancelled
    leaves whole lines.
    """
    waiting = iter(contexts)

    async def work() -> None:
        # One iterator for all: who is done takes the next.
        for pair in waiting:
            text = await _worded(teacher, pair, counts, tries, pause_seconds)
            if text is None:
                counts.refused += 1
            else:
                out.write(encoded(replace(pair, text=text)))
                out.flush()
                counts.written += 1
            _progress(counts)

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, frozenset[str]]]:
    """A file of pairs to append to, and the prompts of the pairs in it. A line that was cut off is taken away.

    Raises ValueError if another run writes to it, or it holds what is no pair.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is writing to {path}") from error
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            say(f"{path}: the last line was cut off and is asked for again")
            os.truncate(path, whole)
        yield out, frozenset(pair.prompt for pair in read_pairs([path]))


async def _run(contexts: Sequence[Pair], done: frozenset[str], out: BinaryIO, options: argparse.Namespace) -> int:
    settings = load_settings(teacher_concurrency=options.concurrency)
    teacher = teacher_of(settings)
    if teacher is None:
        raise SettingsError("no teacher is set: PERSONAS_TEACHER_URL (and PERSONAS_TEACHER_MODEL, _API_KEY) say which")
    counts = Counts(len(contexts), sum(context.prompt in done for context in contexts))
    say(f"{counts.contexts} contexts, {counts.done_before} done; teacher {teacher.teacher_id}")
    left = (context for context in contexts if context.prompt not in done)
    asking = asyncio.create_task(
        ask(teacher, left, out, counts, tries=options.tries, concurrency=settings.teacher_concurrency)
    )
    stopped_by: list[signal.Signals] = []

    def stop(by: signal.Signals) -> None:
        stopped_by.append(by)
        asking.cancel()

    for sign in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sign, stop, sign)
    code = 0
    try:
        await asking
    except asyncio.CancelledError:
        code = 128 + (stopped_by or [signal.SIGTERM])[0]
        say("stopped: what is written stays, the same command goes on")
    except TeacherAway as error:
        code = 1
        say(f"error: {error}; what is written stays, the same command goes on")
    finally:
        await teacher.close()
    print(json.dumps(figures(counts, options.out)))
    return code


async def _worded(teacher: TeacherClient, pair: Pair, counts: Counts, tries: int, pause_seconds: float) -> str | None:
    """A text without a fault; None if no try gave one."""
    first = chat = build_chat(pair.task)
    for number in range(tries):
        counts.tries += 1
        try:
            answer = await _present(teacher, chat, number, pause_seconds)
        except TeacherFailed as error:
            counts.reasons["failed"] += 1
            say(f"{printable(pair.line)}: {error}")
            continue
        counts.tokens_in += answer.tokens_in
        counts.tokens_out += answer.tokens_out
        text = _text_in(answer.text, pair)
        fault = Fault("wrong_form", "it is not one JSON object with the asked key and a text") if text is None else None
        fault = fault or fault_of(replace(pair, text=text))
        if fault is None:
            return text
        counts.reasons[fault.reason] += 1
        chat = corrected_chat(first, text or answer.text, f"{fault.reason}, {fault.detail}")
    return None


async def _present(teacher: TeacherClient, chat: Chat, seed: int, pause_seconds: float) -> Answer:
    """An answer, however often the teacher is away in between. Raises TeacherAway at the last time."""
    for absence in count():
        try:
            return await teacher.word(chat, seed=seed)
        except TeacherUnavailable as error:
            if absence == ABSENCES - 1:
                raise TeacherAway(str(error)) from error
            pause = max(error.retry_after_seconds, min(LONGEST_PAUSE_SECONDS, pause_seconds * 2**absence))
            say(f"{error}; again in {pause:g} s")
        await asyncio.sleep(pause)
    raise AssertionError  # count() has no end


def figures(counts: Counts, out: Path) -> dict[str, object]:
    """What the command prints at its end."""
    return {
        "contexts": counts.contexts,
        "done_before": counts.done_before,
        "written": counts.written,
        "refused": counts.refused,
        "left": counts.left,
        "tries": counts.tries,
        "reasons": dict(counts.reasons.most_common()),
        "tokens_in": counts.tokens_in,
        "tokens_out": counts.tokens_out,
        "file": str(out),
    }


def _text_in(answer: str, pair: Pair) -> str | None:
    """The text of an answer with exactly the key that was asked for; None if it is anything else."""
    try:
        said = orjson.loads(compact_answer(answer))
    except orjson.JSONDecodeError:
        return None
    if not isinstance(said, dict) or tuple(said) != task_keys(pair.task):
        return None
    (text,) = said.values()
    return text if isinstance(text, str) else None


def _progress(counts: Counts) -> None:
    come_to = counts.written + counts.refused
    if come_to % PROGRESS == 0 or not counts.left:
        say(f"{counts.written} written, {counts.refused} refused, {counts.left} left, {counts.tries} tries")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m triton_models.distillation.teacher",
        description="""\
Ask the configured teacher for the text of each context and append the pairs to OUT as they come.

The teacher is the one that words live texts: PERSONAS_TEACHER_URL (http(s)://host/v1 for an OpenAI-compatible endpoint,
triton://host:port/model for Triton), PERSONAS_TEACHER_MODEL, PERSONAS_TEACHER_API_KEY. It gets the facts that the
student will read and the words to begin with. A text with a fault (see `quality --help`) is asked for again with the
reason; what no try mends is left out. Contexts that OUT has are skipped, so the same command goes on after a stop, and
asks once more for what was left out.""",
        epilog="""\
The last line is one JSON object: contexts written, refused and left, reasons, tokens paid. Exit codes: 0 all contexts
were come to, 1 the teacher stayed away or the arguments cannot be used, 130 or 143 stopped by a signal.

example:
  PERSONAS_TEACHER_URL=http://gpu-1:8000/v1 PERSONAS_TEACHER_MODEL=large-instruct \\
    python -m triton_models.distillation.teacher contexts/learned.jsonl pairs/learned.jsonl

next: python -m triton_models.distillation.quality pairs/learned.jsonl --drop pairs/checked.jsonl --print 40""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("contexts", type=Path, nargs="+", metavar="CONTEXTS", help="files or folders of contexts")
    parser.add_argument("out", type=Path, metavar="OUT", help="file of pairs to append to")
    parser.add_argument("--tries", type=positive, default=3, metavar="N", help="tries for each text (default: 3)")
    parser.add_argument(
        "--concurrency",
        type=positive,
        metavar="N",
        help="calls in flight (default: PERSONAS_TEACHER_CONCURRENCY)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
