"""Server processes: found by pid and start time, ended with their children, strangers left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agents.localstack import processes

Start = Callable[[str], subprocess.Popen[bytes]]

IGNORES_SIGTERM = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
)
SLEEPS = "import time; print('up', flush=True); time.sleep(60)"
HAS_A_CHILD = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    "print('up', flush=True); time.sleep(60)"
)


@pytest.fixture
def mark() -> Iterator[str]:
    name = f"test:{uuid.uuid4().hex}"
    yield name
    processes.kill(name)


@pytest.fixture
def start(mark: str, tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def run(code: str) -> subprocess.Popen[bytes]:
        log = tmp_path / "log"
        child = processes.start_detached(
            [sys.executable, "-c", code], mark=mark, environment=os.environ, folder=tmp_path, log=log
        )
        started.append(child)
        limit = time.monotonic() + 20
        while "up" not in log.read_text():
            assert time.monotonic() < limit, "the process did not start"
            time.sleep(0.02)
        return child

    yield run
    for child in started:
        child.kill()
        child.wait()


def _record(child: subprocess.Popen[bytes], tmp_path: Path) -> processes.ProcessRecord:
    processes.write_record(tmp_path / "pid", child.pid, {"main": 1})
    record = processes.read_record(tmp_path / "pid")
    assert record is not None
    return record


def test_a_record_finds_its_process_until_it_ends(start: Start, tmp_path: Path) -> None:
    child = start(SLEEPS)
    record = _record(child, tmp_path)
    assert processes.is_alive(record)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not processes.is_alive(record), "a zombie counts as ended"


def test_a_stale_record_does_not_name_the_process_that_got_its_pid(start: Start, mark: str, tmp_path: Path) -> None:
    child = start(SLEEPS)
    record = _record(child, tmp_path)
    for stale in (replace(record, started=record.started - 1), replace(record, boot="another boot")):
        assert not processes.is_alive(stale)
        assert processes.end(stale, "test:nobody", 1)
    assert child.poll() is None
    assert processes.is_alive(record)


@pytest.mark.parametrize("content", [b"", b"4711\n", b'{"pid": 1}', b"[]"])
def test_a_damaged_pid_file_is_like_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pid").write_bytes(content)
    assert processes.read_record(tmp_path / "pid") is None


def test_ending_is_graceful_and_takes_the_children_along(start: Start, mark: str, tmp_path: Path) -> None:
    record = _record(start(HAS_A_CHILD), tmp_path)
    assert len(processes.marked(mark)) == 2
    assert processes.end(record, mark, 10)
    assert processes.marked(mark) == []


def test_children_of_a_killed_server_are_still_found(start: Start, mark: str) -> None:
    child = start(HAS_A_CHILD)
    child.kill()
    child.wait()
    assert len(processes.marked(mark)) == 1
    processes.kill(mark)
    assert processes.marked(mark) == []


def test_what_ignores_sigterm_is_killed_after_the_limit(start: Start, mark: str, tmp_path: Path) -> None:
    record = _record(start(IGNORES_SIGTERM), tmp_path)
    began = time.monotonic()
    assert not processes.end(record, mark, 0.5)
    assert 0.5 <= time.monotonic() - began < 5
    assert not processes.is_alive(record)


def test_a_paused_process_still_ends_gracefully(start: Start, mark: str, tmp_path: Path) -> None:
    child = start(SLEEPS)
    record = _record(child, tmp_path)
    processes.pause(mark)
    assert processes.is_paused(child.pid)
    assert processes.end(record, mark, 10)


def test_memory_counts_the_whole_family(start: Start, mark: str) -> None:
    start(HAS_A_CHILD)
    alone = max(p.memory_info().rss for p in processes.marked(mark))
    assert processes.memory(mark) > alone > 0
