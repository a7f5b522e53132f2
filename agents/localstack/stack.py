"""Start, stop and look at the local stack."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import triton_models
from agents.localstack import processes
from agents.localstack.assets import Assets, ensure_assets
from agents.localstack.parts import HOST, Cassandra, Kafka, Part, StackError, Triton
from agents.localstack.ports import PARTS, Ports, check_free
from agents.localstack.processes import ProcessRecord
from agents.localstack.progress import Report, Step, silent

START_SECONDS: Final = 240.0
"""Limit for one part to answer; quiet machines need 5 to 15 s, a loaded one can take a minute."""
_ASSETS_OF_PART: Final[Mapping[str, str]] = {"kafka": "kafka", "cassandra": "cassandra", "triton": "student"}
_LOG_LINES: Final = 15


@dataclass(frozen=True, slots=True)
class PartStatus:
    """`state`: running, paused (SIGSTOP), stopped, or stale (a pid file or left-over children without their server)."""

    part: str
    state: str
    pid: int | None
    address: str
    memory_bytes: int
    log: Path


class LocalStack:
    """Kafka, Cassandra and Triton of one data folder. Safe to use from several processes; methods block.

    Everything is below `data_folder`: assets, each part's data, pid files in run/, logs/.
    """

    def __init__(
        self,
        ports: Ports,
        data_folder: Path,
        *,
        model_repository: Path | None = None,
        models: Sequence[str] = ("student",),
        triton_environment: Mapping[str, str] | None = None,
    ) -> None:
        self.ports = ports
        self.data_folder = data_folder.absolute()
        repository = model_repository or Path(triton_models.__file__).parent / "repository"
        self._parts: dict[str, Part] = {
            "kafka": Kafka(ports, self.data_folder),
            "cassandra": Cassandra(ports, self.data_folder),
            "triton": Triton(
                ports, self.data_folder, repository.absolute(), tuple(models), dict(triton_environment or {})
            ),
        }
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def up(self, parts: Collection[str] = PARTS, progress: Report = silent) -> None:
        """Start what does not run yet and wait until all of `parts` answer; parts that run are left alone.

        Raises PortError before anything is started if a port is taken, AssetError if a download fails, and StackError
        if a part does not come up. Then, and on KeyboardInterrupt, what this call started is stopped again.
        """
        chosen = self._chosen(parts)
        with self._one_at_a_time(progress):
            missing = [name for name in chosen if not self._runs(name)]
            for name in chosen:
                self._check_ports(name)
            for name in missing:
                self._clear(name)
            check_free(self.ports, missing)
            assets = ensure_assets(self.data_folder / "assets", [_ASSETS_OF_PART[name] for name in missing], progress)
            self._start_all(chosen, missing, assets, progress)

    def down(self, parts: Collection[str] = PARTS, progress: Report = silent) -> list[str]:
        """Stop `parts`, gracefully if possible; returns those that had to be killed. What does not run is fine."""
        chosen = self._chosen(parts)
        with ThreadPoolExecutor(len(chosen) or 1) as pool:
            graceful = list(pool.map(lambda name: self._stop(name, progress), chosen))
        return [name for name, ended in zip(chosen, graceful, strict=True) if not ended]

    def status(self) -> list[PartStatus]:
        """State of every part, from pid files and the processes themselves."""
        return [self._status(name) for name in self._parts]

    def start_part(self, name: str) -> None:
        """Start one part and wait until it answers."""
        self.up([name])

    def stop_part(self, name: str) -> None:
        """Stop one part as `down` does."""
        self.down([name])

    def kill_part(self, name: str) -> None:
        """SIGKILL one part, as a crash would end it: its pid file stays."""
        processes.kill(self._mark(name))
        self._reap(name)

    def pause_part(self, name: str) -> None:
        """SIGSTOP one part: its sockets stay open and nothing is answered."""
        processes.pause(self._mark(name))

    def resume_part(self, name: str) -> None:
        """Undo `pause_part`."""
        processes.signal_marked(self._mark(name), signal.SIGCONT)

    def _start_all(self, chosen: list[str], missing: list[str], assets: Assets, progress: Report) -> None:
        cancelled = threading.Event()
        starts: list[Future[None]] = []
        with ThreadPoolExecutor(len(chosen) or 1) as pool:
            try:
                starts.extend(
                    pool.submit(self._start, name, name in missing, assets, cancelled, progress) for name in chosen
                )
                _wait_for_all(starts)
            except BaseException:
                cancelled.set()
                with _uninterrupted():
                    wait(starts)
                    self.down(missing, progress)
                raise

    def _start(self, name: str, missing: bool, assets: Assets, cancelled: threading.Event, progress: Report) -> None:
        part, began = self._parts[name], time.monotonic()
        if missing:
            progress(Step(name, "starting"))
            self._launch(part, assets, cancelled)
        else:
            self.resume_part(name)
        while not cancelled.is_set():
            if part.is_ready():
                how = f"ready after {time.monotonic() - began:.1f} s" if missing else "already running"
                progress(Step(name, f"{how}, {_address(self.ports.of_part(name))}", finished=True))
                return
            if not self._runs(name):
                raise StackError(f"{name} ended while starting{self._last_words(name)}")
            if time.monotonic() - began > START_SECONDS:
                raise StackError(f"{name} does not answer after {START_SECONDS:.0f} s{self._last_words(name)}")
            cancelled.wait(0.2)

    def _launch(self, part: Part, assets: Assets, cancelled: threading.Event) -> None:
        command = part.prepare(assets)
        log = self._log(part.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():
            log.replace(log.with_suffix(".log.1"))
        if cancelled.is_set():
            return
        child = processes.start_detached(
            command.arguments,
            mark=self._mark(part.name),
            environment=command.environment,
            folder=command.folder,
            log=log,
        )
        self._children[part.name] = child
        try:
            processes.write_record(self._pid_file(part.name), child.pid, self.ports.of_part(part.name))
        except ProcessLookupError as error:
            raise StackError(f"{part.name} ended at once{self._last_words(part.name)}") from error

    def _stop(self, name: str, progress: Report) -> bool:
        record = self._record(name)
        if record is None or not processes.is_alive(record):
            self._clear(name)
            progress(Step(name, "not running", finished=True))
            return True
        progress(Step(name, "stopping"))
        graceful = processes.end(record, self._mark(name), self._parts[name].stop_seconds)
        self._clear(name)
        progress(Step(name, "stopped" if graceful else "killed: it did not stop by itself", finished=True))
        return graceful

    def _clear(self, name: str) -> None:
        """Remove what is left of a part that does not run: its children, pid file and shared memory."""
        processes.kill(self._mark(name))
        self._reap(name)
        self._pid_file(name).unlink(missing_ok=True)
        self._parts[name].clean_up()

    def _reap(self, name: str) -> None:
        child = self._children.pop(name, None)
        if child is not None:
            child.wait()

    def _status(self, name: str) -> PartStatus:
        record = self._record(name)
        state = "stopped"
        if record is not None and processes.is_alive(record):
            state = "paused" if processes.is_paused(record.pid) else "running"
        elif record is not None or processes.marked(self._mark(name)):
            state = "stale"
        alive = record is not None and state in ("running", "paused")
        return PartStatus(
            part=name,
            state=state,
            pid=record.pid if record and alive else None,
            address=_address(record.ports) if record and alive else "",
            memory_bytes=processes.memory(self._mark(name)) if alive else 0,
            log=self._log(name),
        )

    def _check_ports(self, name: str) -> None:
        record, wanted = self._record(name), self.ports.of_part(name)
        if record is not None and processes.is_alive(record) and record.ports != wanted:
            raise StackError(
                f"{name} already runs on {_listed(record.ports)}, not on {_listed(wanted)}: "
                f"ask for those ports, or stop it first (`personas down --only {name}`)"
            )

    @contextmanager
    def _one_at_a_time(self, progress: Report) -> Iterator[None]:
        run = self.data_folder / "run"
        run.mkdir(parents=True, exist_ok=True)
        with (run / "up.lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress(Step("stack", "another `personas up` is at work here; waiting for it"))
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _chosen(self, parts: Collection[str]) -> list[str]:
        if unknown := sorted(set(parts) - set(self._parts)):
            raise StackError(f"no part {unknown[0]!r}: choose from {', '.join(self._parts)}")
        return [name for name in self._parts if name in parts]

    def _runs(self, name: str) -> bool:
        record = self._record(name)
        return record is not None and processes.is_alive(record)

    def _record(self, name: str) -> ProcessRecord | None:
        return processes.read_record(self._pid_file(name))

    def _pid_file(self, name: str) -> Path:
        return self.data_folder / "run" / f"{name}.pid"

    def _log(self, name: str) -> Path:
        return self.data_folder / "logs" / f"{name}.log"

    def _mark(self, name: str) -> str:
        return f"{name}:{self.data_folder}"

    def _last_words(self, name: str) -> str:
        log = self._log(name)
        if not log.exists():
            return ""
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        return f"; the end of {log}:\n" + "\n".join(f"  {line}" for line in lines)


def _address(ports: Mapping[str, int]) -> str:
    return f"{HOST}:{next(iter(ports.values()))}"


def _listed(ports: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {port}" for name, port in ports.items())


def _wait_for_all(starts: Sequence[Future[None]]) -> None:
    """Wait until all are done; raises what the first that failed raised.

    In steps: a signal that arrives just before a wait without limit begins is only seen when that wait ends.
    """
    pending = set(starts)
    while pending:
        done, pending = wait(pending, timeout=1.0, return_when=FIRST_EXCEPTION)
        for start in done:
            start.result()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not cut the clean-up short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
