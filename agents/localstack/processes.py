"""Detached server processes: started, found again by another process, and ended without ever touching a stranger.

A process is known by its pid *and* its start time, so a pid file that outlived its process (crash, reboot) names
nobody. All that a server starts inherits a mark in its environment, by which its children are found even when the
server itself is gone. Linux only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import orjson
import psutil

MARK: Final = "VIEWER_PERSONAS_PART"


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """Content of a pid file. `started` is in clock ticks since boot, which no clock adjustment moves; ports by name."""

    pid: int
    started: int
    boot: str
    ports: dict[str, int]


def start_detached(
    command: Sequence[str], *, mark: str, environment: Mapping[str, str], folder: Path, log: Path
) -> subprocess.Popen[bytes]:
    """Start a server in a session of its own, out of reach of Ctrl-C and a closed terminal; output goes to `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            list(command),
            cwd=folder,
            env={**environment, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def write_record(path: Path, pid: int, ports: Mapping[str, int]) -> None:
    """Write the pid file of a process that was just started. Raises ProcessLookupError if it is gone already."""
    started = _started(pid)
    if started is None:
        raise ProcessLookupError(pid)
    temporary = path.with_suffix(".new")
    temporary.write_bytes(orjson.dumps(asdict(ProcessRecord(pid, started, _boot(), dict(ports)))))
    temporary.rename(path)


def read_record(path: Path) -> ProcessRecord | None:
    """The pid file's content, or None if there is none or it is damaged (which is like a stale one)."""
    try:
        return ProcessRecord(**orjson.loads(path.read_bytes()))
    except (FileNotFoundError, orjson.JSONDecodeError, TypeError):
        return None


def is_alive(record: ProcessRecord) -> bool:
    """Whether that very process still runs: not another one with its pid, and not a zombie."""
    return record.boot == _boot() and _started(record.pid) == record.started


def is_paused(pid: int) -> bool:
    """Whether the process is stopped by SIGSTOP."""
    return _stat(pid)[0] == "T"


def marked(mark: str, *, variable: str = MARK) -> list[psutil.Process]:
    """Every living process of this user that inherited `variable=mark`."""
    wanted = f"{variable}={mark}".encode()
    found = []
    for pid in psutil.pids():
        try:
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") and _started(pid) is not None:
                found.append(psutil.Process(pid))
        except (OSError, psutil.NoSuchProcess):
            continue
    return found


def signal_marked(mark: str, number: signal.Signals) -> None:
    """Send a signal to every process of the mark."""
    for process in marked(mark):
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def pause(mark: str) -> None:
    """SIGSTOP to every process of the mark; returns when they have stopped."""
    signal_marked(mark, signal.SIGSTOP)
    limit = time.monotonic() + 10
    while not all(is_paused(process.pid) for process in marked(mark)) and time.monotonic() < limit:
        time.sleep(0.01)


def end(record: ProcessRecord, mark: str, seconds: float) -> bool:
    """Ask the recorded process to end (SIGTERM), wait up to `seconds`, then kill it and all that carries its mark.

    Returns False if it had to be killed.
    """
    if is_alive(record):
        os.kill(record.pid, signal.SIGTERM)
        signal_marked(mark, signal.SIGCONT)  # a paused process acts on SIGTERM only after it goes on
    limit = time.monotonic() + seconds
    while is_alive(record) and time.monotonic() < limit:
        time.sleep(0.05)
    graceful = not is_alive(record)
    kill(mark)
    return graceful


def kill(mark: str) -> None:
    """SIGKILL to all that carries the mark; returns when they are gone, or after 10 s if the kernel holds one."""
    limit = time.monotonic() + 10
    while found := {process.pid: _started(process.pid) for process in marked(mark)}:
        signal_marked(mark, signal.SIGKILL)
        # A dying process has lost its mark already while its threads still hold its ports.
        while any(started is not None and _started(pid) == started for pid, started in found.items()):
            if time.monotonic() > limit:
                return
            time.sleep(0.01)


def memory(mark: str) -> int:
    """Resident memory in bytes of all processes of the mark."""
    total = 0
    for process in marked(mark):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _started(pid: int) -> int | None:
    """Start time in clock ticks since boot; None if there is no such process or only its zombie."""
    state, threads, started = _stat(pid)
    # The first thread of a dying server is a zombie while others still run and hold its ports: not gone yet.
    gone = state == "X" or (state == "Z" and threads <= 1)
    return None if gone else started


def _stat(pid: int) -> tuple[str, int, int]:
    """State letter, number of threads, start time (proc_pid_stat(5))."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0, 0
    # The second field is the program's name in brackets and may itself hold brackets and spaces.
    values = text.rpartition(")")[2].split()
    return values[0], int(values[17]), int(values[19])


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
