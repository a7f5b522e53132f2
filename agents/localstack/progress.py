"""How long-running work of the local stack tells what it does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


@dataclass(frozen=True, slots=True)
class Step:
    """State of one item, say `kafka` or `jars`: `done` of `total` units, or only a text when `total` is 0."""

    item: str
    text: str
    done: int = 0
    total: int = 0
    finished: bool = False


Report = Callable[[Step], None]
"""Takes steps from any thread."""


def silent(step: Step) -> None:
    """Shows nothing."""


@contextmanager
def shown_progress() -> Iterator[Report]:
    """Shows steps on stderr: one live row per item on a terminal, else one line per change of text."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.fields[item]:<10}", markup=False))
    texts = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, *texts, console=console) as bars:
        rows: dict[str, TaskID] = {}

        def report(step: Step) -> None:
            if step.item not in rows:
                rows[step.item] = bars.add_task(step.text, total=None, item=step.item)
            done, total = (1, 1) if step.finished else (step.done, step.total or None)
            bars.update(rows[step.item], description=step.text, completed=done, total=total)

        yield report


def _lines() -> Report:
    last: dict[str, str] = {}

    def report(step: Step) -> None:
        if last.get(step.item) == step.text:
            return
        last[step.item] = step.text
        # One write, newline included: several threads report.
        sys.stderr.write(f"{step.item}: {step.text}\n")
        sys.stderr.flush()

    return report
