"""A Triton with a student for as long as an evaluation runs: on free ports, in a folder of its own."""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from agents.localstack.assets import assets_folder
from agents.localstack.ports import Ports, free_ports
from agents.localstack.progress import shown_progress
from agents.localstack.stack import LocalStack
from agents.settings import Settings

STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end an evaluation."""
BASE_WEIGHTS: Final = "base.gguf"
"""The model that the student was distilled from, beside the student's own weights."""


def base_weights(settings: Settings) -> Path | None:
    """The base model's weights, None if they are not there."""
    path = assets_folder(settings) / BASE_WEIGHTS
    return path if path.is_file() else None


@contextmanager
def started_student(settings: Settings, weights: Path | None = None) -> Iterator[Settings]:
    """Settings that reach a student of one's own, stopped at the end. weights: others than the student's.

    Downloads what is missing into the settings' data folder. Raises LocalStackError.
    """
    with started_triton(settings, {} if weights is None else {"STUDENT_WEIGHTS": str(weights)}) as ports:
        yield ports.settings(settings)


@contextmanager
def started_triton(settings: Settings, environment: Mapping[str, str]) -> Iterator[Ports]:
    """The ports of a Triton of one's own, stopped at the end. environment: STUDENT_ variables of the model.

    Downloads what is missing into the settings' data folder. Raises LocalStackError.
    """
    assets = assets_folder(settings)
    assets.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="personas-eval-"))
    (folder / "assets").symlink_to(assets)
    ports = free_ports()
    local = LocalStack(ports, folder, triton_environment=environment)
    try:
        with shown_progress() as progress:
            local.up(["triton"], progress)
        yield ports
    finally:
        with _to_the_end():
            local.down()
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _to_the_end() -> Iterator[None]:
    """A second signal does not cut short what is run here, such as the end of a server that the first one asked for."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    before = {number: signal.signal(number, lambda *_: None) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
