"""`personas replay`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from agents.settings import Settings, load_settings

if TYPE_CHECKING:
    from agents.event_log import EventLog
    from agents.student_client import StudentClient

COMPILE_FROM: Final = 20_000
"""Events from which compiling the kernel, which may take half a minute, pays."""


@click.command()
@click.argument("events", type=click.Path(path_type=Path, allow_dash=True, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the results.")
@click.option(
    "--registry", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Registry to use as is."
)
@click.option(
    "--controls", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="User controls, JSON lines."
)
@click.option(
    "--student",
    type=click.Choice(["none", "triton"]),
    default="none",
    show_default=True,
    help="none words with templates, deterministically; triton asks the model at PERSONAS_TRITON_URL, and the teacher "
    "at PERSONAS_TEACHER_URL if that is set.",
)
@click.option(
    "--bootstrap", is_flag=True, help="Treat all events as history: one request per eligible viewer at the end."
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def replay(
    events: Path,
    out: Path,
    registry: Path | None,
    controls: Path | None,
    student: str,
    bootstrap: bool,
    as_json: bool,
) -> None:
    """Run an event file (JSON lines, .gz or - for standard input) through the workers' own handlers, with no broker.

    Writes requests.jsonl, personas.jsonl, dead_letters.jsonl and summary.json to the folder. Every input line is in
    exactly one class of the summary, whose `wording` has what each tier of the cascade worded and took. Two runs over
    the same file write the same bytes, unless a model words the personas.

    Without --registry (or PERSONAS_REGISTRY) the packaged demo registry is extended by the videos of the file: each is
    placed at the cluster nearest to its title.

    A line has no append time, so the log's own times stand for it: the latest time seen so far.

    \b
    personas replay events.jsonl --out out/
    personas replay history.jsonl.gz --out out/ --bootstrap --json
    """
    from agents.compiled import worker_kernel
    from agents.event_log import UnreadableFile, load_event_log, read_lines

    settings = load_settings()
    if registry is not None:
        settings = replace(settings, registry=registry)
    try:
        lines = read_lines(events)
        control_lines = read_lines(controls) if controls else []
    except UnreadableFile as error:
        raise click.ClickException(str(error)) from error
    log = load_event_log(lines, settings)
    if len(lines) >= COMPILE_FROM:
        click.echo("compiling the kernel, or reading it from where it is kept", err=True)
        try:
            kernel = worker_kernel(settings.data_folder / "kernel")
        except OSError as error:
            click.echo(f"going on without, which takes many times as long: {error}", err=True)
        else:
            log = replace(log, configuration=replace(log.configuration, kernel=kernel))
    summary = asyncio.run(_run(settings, log, control_lines, student == "triton", bootstrap, out))
    if as_json:
        click.echo(json.dumps(summary))
        return
    for name, value in summary.items():
        click.echo(f"{name:24} {value}")
    click.echo(f"written to {out}/", err=True)


async def _run(
    settings: Settings,
    log: EventLog,
    control_lines: Sequence[bytes],
    use_student: bool,
    bootstrap: bool,
    out: Path,
) -> dict[str, object]:
    from rich.console import Console
    from rich.progress import Progress

    from agents.replay_file import controls_of, replay_events
    from agents.student_client import TritonStudent
    from agents.teacher_client import policy_of, teacher_of

    teacher = teacher_of(settings) if use_student else None
    student: StudentClient | None = TritonStudent(settings) if use_student else None
    try:
        if student is not None and not await student.ready():
            raise click.ClickException(f"no student at {settings.triton_url}; `personas up --only triton` starts one")
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
            task = progress.add_task("replaying", total=len(log.records))
            replayed = await replay_events(
                log,
                controls_of(control_lines),
                student=student,
                teacher=teacher,
                policy=policy_of(settings),
                bootstrap=bootstrap,
                progress=lambda done: progress.advance(task, done),
            )
    finally:
        if student is not None:
            await student.close()
        if teacher is not None:
            await teacher.close()
    try:
        replayed.write(out)
    except OSError as error:
        raise click.ClickException(f"cannot write to {out}: {error}") from error
    return replayed.summary
