"""`personas eval`."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import orjson
from click.core import ParameterSource

from agents.settings import Settings, load_settings

if TYPE_CHECKING:
    from agents.clusters.embedding import Embedder
    from agents.evaluation.answers import Worded
    from agents.evaluation.cases import Case, Cases
    from agents.evaluation.run import Material, Measured
    from agents.student_client import StudentClient

T = TypeVar("T")
VIEWERS = 7


@click.command()
@click.option(
    "--contexts",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Your own: the requests.jsonl that `personas replay EVENTS --out DIR` writes.",
)
@click.option(
    "--events",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="With --contexts: the event file that was replayed, to judge by what the viewers watched.",
)
@click.option(
    "--viewers",
    type=click.IntRange(1, 1000),
    default=VIEWERS,
    show_default=True,
    help="Simulated viewers of each of the 12 packaged catalogues; the default gives more than 300 contexts.",
)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of viewers and of the form.")
@click.option("--student", metavar="HOST:PORT", help="A student that runs; by default one is started and stopped.")
@click.option("--base", is_flag=True, help="Word some contexts with the base model too, if base.gguf is in the assets.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write a report page, Markdown.")
@click.option("--answers", type=click.Path(path_type=Path, dir_okay=False), help="Write every answer, JSON lines.")
@click.option("--pairs", type=click.IntRange(min=1), metavar="N", help="Print a blind form of N contexts instead.")
@click.option(
    "--score",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Score a filled-in form of --pairs; nothing is started.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object, the last line.")
def eval(
    contexts: Path | None,
    events: Path | None,
    viewers: int,
    seed: int,
    student: str | None,
    base: bool,
    out: Path | None,
    answers: Path | None,
    pairs: int | None,
    score: Path | None,
    as_json: bool,
) -> None:
    """Measure personas: form, truth to the facts, failure modes, novelty, churn, reading, leaks, hostile titles.

    Simulated viewers of held-out catalogues watch, the real handlers ask for personas, and the real writer has them
    worded by a real student, which is started on free ports and stopped at the end. What is true of the viewers is
    known, and judged by rules of its own, not by the gate that answers pass. Takes 10 to 20 minutes on two cores;
    progress is on stderr. The exit status is 0 whatever the figures are.

    With --contexts nothing but the requests is known, and with --events what the viewers watched, the last 60 watches
    telling their main interest and what is outdated: what needs more is null. The registry is the one that `personas
    replay` takes with the same settings.

    \b
    personas eval --json
    personas eval --out evaluation.md --answers answers.jsonl
    personas eval --contexts out/requests.jsonl --events events.jsonl --student triton:8001
    personas eval --pairs 50 --base > form.jsonl     # then set each `best`, and
    personas eval --score form.jsonl
    """
    from agents.evaluation.answers import StudentGone
    from agents.localstack import LocalStackError

    if score is not None:
        _print_score(score, as_json)
        return
    if events is not None and contexts is None:
        raise click.UsageError("--events needs --contexts: the requests that these events led to")
    for path in (out, answers):
        if path is not None:
            _check_writable(path)
    settings = load_settings()
    with _interruptible():
        try:
            own = None if contexts is None else _read(contexts, events, settings)
            if pairs is not None:
                _print_pairs(settings, own, viewers, seed, student, pairs, base=base)
                return
            figures, kept = _evaluate(settings, own, viewers, seed, student, out, answers, base=base)
        except (LocalStackError, StudentGone) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            sys.exit(130)
    if as_json:
        click.echo(orjson.dumps(figures))
    else:
        for name, value in figures.items():
            click.echo(f"{name:16} {'not known' if value is None else value}")
    if not kept:
        sys.exit(1)


def _check_writable(path: Path) -> None:
    """Before minutes of work whose result could not be kept."""
    if not path.resolve().parent.is_dir():
        raise click.ClickException(f"cannot write {path}: there is no such folder")
    if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
        raise click.ClickException(f"cannot write {path}: permission denied")


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP end what was started; the handlers that were there come back."""
    from agents.cli.stack import interrupt
    from agents.evaluation.stack import STOPPING

    before = {number: signal.signal(number, interrupt) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _evaluate(
    settings: Settings,
    own: Cases | None,
    viewers: int,
    seed: int,
    address: str | None,
    out: Path | None,
    answers: Path | None,
    *,
    base: bool,
) -> tuple[dict[str, Any], bool]:
    """The figures, and whether all files that were asked for are written."""
    from agents.evaluation.run import figures, gather, measure

    embedder = _embedder(settings)
    page = out is not None
    material = gather(settings, embedder, viewers, seed, own, _say, page=page)
    with _served(settings, address) as served:
        measured = _ask(served, lambda client: measure(material, client, _say, page=page))
    measured = replace(measured, base=_base(settings, material) if base else None)
    _say("judging")
    found = figures(measured)
    try:
        _keep(measured, material, found, embedder, seed, out, answers)
    except Exception as error:  # the figures cost minutes: whatever becomes of the files, they are printed
        _say(f"Error: {error if isinstance(error, OSError) else repr(error)}")
        return found, False
    return found, True


def _keep(
    measured: Measured,
    material: Material,
    found: dict[str, Any],
    embedder: Embedder,
    seed: int,
    out: Path | None,
    answers: Path | None,
) -> None:
    """Write the answers and the page, if they were asked for. Raises OSError."""
    from agents.evaluation.answers import answer_lines
    from agents.evaluation.report import report

    if answers is not None:
        answers.write_bytes(b"".join(line + b"\n" for line in answer_lines(measured.worded)))
    if out is not None:
        command = _typed(click.get_current_context())
        out.write_bytes(report(measured, material, found, embedder, seed, command).encode())


def _typed(context: click.Context) -> str:
    """The command as it was typed; of files the names alone."""
    words = ["personas", "eval"]
    for option in context.command.params:
        value = context.params.get(option.name or "")
        if context.get_parameter_source(option.name or "") is not ParameterSource.COMMANDLINE:
            continue
        words.append(option.opts[0])
        if value is not True:
            words.append(value.name if isinstance(value, Path) else str(value))
    return shlex.join(words)


def _print_pairs(
    settings: Settings,
    own: Cases | None,
    viewers: int,
    seed: int,
    address: str | None,
    count: int,
    *,
    base: bool,
) -> None:
    from agents.evaluation.answers import templated, word_each
    from agents.evaluation.pairs import form
    from agents.evaluation.run import spread
    from agents.evaluation.viewers import held_out_platforms, packaged_cases

    if own is None:
        own = packaged_cases(settings, held_out_platforms(), _embedder(settings), viewers, seed)
    chosen = spread(own.cases, count)
    with _served(settings, address) as served:
        worded = _ask(served, lambda client: word_each(chosen, client, _counted))
    items = [{"student": one, "template": templated(one.case)} for one in worded]
    others = _base_worded(settings, chosen) if base else None
    for item, other in zip(items, others or [], strict=False):
        item["base"] = other
    click.echo(b"\n".join(form(items, seed)))


def _base(settings: Settings, material: Material) -> list[Worded] | None:
    from agents.evaluation.run import BASE_CASES, spread

    return _base_worded(settings, spread(material.cases, BASE_CASES))


def _base_worded(settings: Settings, cases: Sequence[Case]) -> list[Worded] | None:
    """The cases in the base model's own first answers; None, and a word about it, if its weights are not there."""
    from agents.evaluation.answers import ask_once
    from agents.evaluation.stack import BASE_WEIGHTS, base_weights, started_student
    from agents.localstack.assets import assets_folder

    weights = base_weights(settings)
    if weights is None:
        _say(f"no {BASE_WEIGHTS} in {assets_folder(settings)}: the base model is left out")
        return None
    with started_student(settings, weights) as served:
        return _ask(served, lambda client: ask_once(cases, client, _counted))


def _served(settings: Settings, address: str | None) -> AbstractContextManager[Settings]:
    """Settings of a student that answers: the one that runs, or one that is started."""
    from agents.evaluation.stack import started_student

    return started_student(settings) if address is None else nullcontext(replace(settings, triton_url=address))


def _ask(settings: Settings, use: Callable[[StudentClient], Awaitable[T]]) -> T:
    """Run `use` with a client of the student. Raises KeyboardInterrupt on SIGINT and SIGTERM, after all calls ended."""
    try:
        return asyncio.run(_with_student(settings, use))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _with_student(settings: Settings, use: Callable[[StudentClient], Awaitable[T]]) -> T:
    from agents.student_client import TritonStudent

    client = TritonStudent(settings)
    try:
        if not await client.ready():
            raise click.ClickException(f"no student at {settings.triton_url}; leave --student out to have one started")
        with _cancelled_by_signals():
            return await use(client)
    finally:
        await client.close()


@contextmanager
def _cancelled_by_signals() -> Iterator[None]:
    """A handler that raises would do so anywhere inside the event loop; these cancel the running task."""
    from agents.evaluation.stack import STOPPING

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None  # noqa: S101 - this runs in one
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number in before:
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


def _read(path: Path, events: Path | None, settings: Settings) -> Cases:
    """The cases of a file of requests, with their viewers' watches if there is a file of events."""
    from agents.evaluation.cases import UnreadableContexts, cases_of, read_requests
    from agents.evaluation.history import with_watches
    from agents.event_log import UnreadableFile, load_event_log, read_lines

    try:
        cases = cases_of(read_requests(read_lines(path)))
        return cases if events is None else with_watches(cases, load_event_log(read_lines(events), settings))
    except UnreadableContexts as error:
        raise click.ClickException(f"{path}: {error}") from error
    except UnreadableFile as error:
        raise click.ClickException(str(error)) from error


def _embedder(settings: Settings) -> Embedder:
    from agents.clusters.embedding import MiniLM
    from agents.localstack.assets import tokenizer_path
    from agents.localstack.progress import shown_progress

    with shown_progress() as progress:
        return MiniLM(tokenizer_path(settings, progress))


def _print_score(path: Path, as_json: bool) -> None:
    from agents.evaluation.pairs import UnreadableForm, score
    from agents.event_log import UnreadableFile, read_lines

    try:
        scored = score(read_lines(path))
    except (UnreadableForm, UnreadableFile) as error:
        raise click.ClickException(f"{path}: {error}") from error
    if as_json:
        click.echo(orjson.dumps(scored))
        return
    for name, wins in scored.wins.items():
        click.echo(f"{name:10} best in {wins} of {scored.judged} ({scored.low[name]:.0%} to {scored.high[name]:.0%})")
    click.echo(f"no difference in {scored.ties}; {scored.skipped} left blank")


def _counted(count: int, of: int) -> None:
    if count == of or count % 10 == 0:
        _say(f"worded {count} of {of}")


def _say(text: str) -> None:
    click.echo(text, err=True)
