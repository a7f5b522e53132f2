"""The stack's own behaviour, with small Python servers in the place of Kafka, Cassandra and Triton."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import pytest
from click.testing import CliRunner

from agents.cli import personas
from agents.localstack import processes
from agents.localstack import stack as stack_module
from agents.localstack.assets import Assets
from agents.localstack.parts import HOST, Command, StackError, _listens
from agents.localstack.ports import PARTS, PortError, Ports, free_ports
from agents.localstack.progress import Step
from agents.localstack.stack import LocalStack, PartStatus

SERVES = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(120)"
NEVER_ANSWERS = "import time; time.sleep(120)"
CRASHES = "import sys; print('first line'); print('cannot open [the] disk', flush=True); sys.exit(3)"


@dataclass
class FakePart:
    """A server that listens on its part's first port."""

    name: str
    ports: Ports
    folder: Path
    code: str = SERVES
    stop_seconds: float = 5.0
    cleaned: list[int] = field(default_factory=list)

    def prepare(self, assets: Assets) -> Command:
        port = next(iter(self.ports.of_part(self.name).values()))
        return Command((sys.executable, "-c", self.code, str(port)), dict(os.environ), self.folder)

    def is_ready(self) -> bool:
        return _listens(next(iter(self.ports.of_part(self.name).values())))

    def clean_up(self) -> None:
        self.cleaned.append(1)


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, FakePart]:
    ports = free_ports()
    monkeypatch.setattr(stack_module, "ensure_assets", lambda *_: None)
    return {name: FakePart(name, ports, tmp_path) for name in PARTS}


def _local(tmp_path: Path, fakes: dict[str, FakePart]) -> LocalStack:
    local = LocalStack(fakes["kafka"].ports, tmp_path / "data with a space")
    local._parts.update(fakes)
    return local


@pytest.fixture
def local(tmp_path: Path, fakes: dict[str, FakePart]) -> Iterator[LocalStack]:
    made = _local(tmp_path, fakes)
    yield made
    made.down()


def _states(local: LocalStack) -> dict[str, str]:
    return {s.part: s.state for s in local.status()}


def _of(local: LocalStack, name: str) -> PartStatus:
    return next(s for s in local.status() if s.part == name)


def test_up_starts_all_and_down_stops_all(local: LocalStack) -> None:
    steps: list[Step] = []
    local.up(progress=steps.append)
    assert _states(local) == dict.fromkeys(PARTS, "running")
    assert {step.item for step in steps if step.finished and "ready after" in step.text} == set(PARTS)
    status = _of(local, "cassandra")
    assert status.address == f"{HOST}:{local.ports.cassandra}"
    assert status.memory_bytes > 2**20
    assert local.down() == []
    assert _states(local) == dict.fromkeys(PARTS, "stopped")


def test_up_leaves_running_parts_alone(local: LocalStack) -> None:
    local.up(["kafka"])
    before = _of(local, "kafka").pid
    local.up(["kafka", "triton"])
    assert _of(local, "kafka").pid == before
    assert _states(local) == {"kafka": "running", "cassandra": "stopped", "triton": "running"}


def test_another_process_sees_and_stops_what_this_one_started(
    local: LocalStack, tmp_path: Path, fakes: dict[str, FakePart]
) -> None:
    local.up(["kafka"])
    other = _local(tmp_path, fakes)
    assert _states(other)["kafka"] == "running"
    other.down()
    assert _states(local)["kafka"] == "stopped"


def test_down_of_nothing_is_fine(local: LocalStack) -> None:
    assert local.down() == []


def test_a_killed_part_is_stale_and_up_brings_it_back(local: LocalStack) -> None:
    local.up(["kafka"])
    local.kill_part("kafka")
    assert _states(local)["kafka"] == "stale"
    local.start_part("kafka")
    assert _states(local)["kafka"] == "running"


def test_a_stale_pid_file_does_not_endanger_the_process_with_that_pid(local: LocalStack, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stranger:
        (local.data_folder / "run").mkdir(parents=True)
        record = processes.ProcessRecord(stranger.pid, 1, "boot of yesterday", {"kafka": 1})
        content = {name: getattr(record, name) for name in ("pid", "started", "boot", "ports")}
        (local.data_folder / "run" / "kafka.pid").write_bytes(orjson.dumps(content))
        assert _states(local)["kafka"] == "stale"
        local.up(["kafka"])
        local.down()
        assert stranger.poll() is None
        stranger.kill()


def test_pause_and_resume(local: LocalStack) -> None:
    local.up(["kafka"])
    local.pause_part("kafka")
    assert _states(local)["kafka"] == "paused"
    local.resume_part("kafka")
    assert _states(local)["kafka"] == "running"


def test_a_part_that_crashes_shows_its_last_words_and_stops_the_others(
    local: LocalStack, fakes: dict[str, FakePart]
) -> None:
    fakes["triton"].code = CRASHES
    fakes["cassandra"].code = NEVER_ANSWERS
    with pytest.raises(StackError, match=r"(?s)triton ended.*triton\.log.*cannot open \[the\] disk"):
        local.up()
    assert _states(local) == dict.fromkeys(PARTS, "stopped")


def test_a_failed_start_leaves_what_ran_before(local: LocalStack, fakes: dict[str, FakePart]) -> None:
    local.up(["kafka"])
    fakes["triton"].code = CRASHES
    with pytest.raises(StackError):
        local.up()
    assert _states(local) == {"kafka": "running", "cassandra": "stopped", "triton": "stopped"}


def test_a_part_that_never_answers_is_given_up(
    local: LocalStack, fakes: dict[str, FakePart], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack_module, "START_SECONDS", 0.5)
    fakes["kafka"].code = NEVER_ANSWERS
    with pytest.raises(StackError, match="kafka does not answer"):
        local.up(["kafka"])
    assert _states(local)["kafka"] == "stopped"


def test_ctrl_c_while_waiting_stops_what_was_started(local: LocalStack, fakes: dict[str, FakePart]) -> None:
    fakes["cassandra"].code = NEVER_ANSWERS
    pid_file = local.data_folder / "run" / "cassandra.pid"

    def interrupt() -> None:
        while not pid_file.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        local.up()
    thread.join()
    assert _states(local) == dict.fromkeys(PARTS, "stopped")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_taken_port_is_reported_before_anything_starts(local: LocalStack) -> None:
    code = SERVES.replace("time.sleep(120)", "print('up', flush=True); time.sleep(120)")
    command = [sys.executable, "-c", code, str(local.ports.triton_metrics)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(PortError, match=rf"{local.ports.triton_metrics} \(triton_metrics\).*process {holder.pid}"):
            local.up()
        holder.kill()
    assert _states(local) == dict.fromkeys(PARTS, "stopped")
    assert not (local.data_folder / "logs").exists()


def test_running_on_other_ports_is_said_not_waited_for(
    local: LocalStack, tmp_path: Path, fakes: dict[str, FakePart]
) -> None:
    local.up(["kafka"])
    elsewhere = LocalStack(free_ports(), local.data_folder)
    with pytest.raises(StackError, match=f"kafka already runs on kafka {local.ports.kafka}"):
        elsewhere.up(["kafka"])


def test_an_unknown_part_is_refused(local: LocalStack) -> None:
    with pytest.raises(StackError, match="no part 'kafak': choose from kafka, cassandra, triton"):
        local.up(["kafak"])


def test_the_log_of_the_start_before_is_kept(local: LocalStack, fakes: dict[str, FakePart]) -> None:
    fakes["kafka"].code = CRASHES
    with pytest.raises(StackError):
        local.up(["kafka"])
    fakes["kafka"].code = SERVES
    local.up(["kafka"])
    assert "cannot open" in (local.data_folder / "logs" / "kafka.log.1").read_text()
    assert (local.data_folder / "logs" / "kafka.log").read_text() == ""


def test_status_command_on_an_empty_folder(tmp_path: Path) -> None:
    result = CliRunner().invoke(personas, ["status", "--json", "--data-folder", str(tmp_path / "none")])
    assert result.exit_code == 0
    assert {p["part"]: p["state"] for p in orjson.loads(result.stdout)["parts"]} == dict.fromkeys(PARTS, "stopped")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--only", "kafak"], 2, "'kafak' is none of kafka, cassandra, triton"),
        (["--kafka-port", "70000"], 1, "70000 is not a port"),
        (["--port-offset", "1", "--only", "kafka", "--controller-port", "29093"], 1, "29093 is given to two servers"),
    ],
)
def test_up_command_refuses_what_cannot_be(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    result = CliRunner().invoke(personas, ["up", "--data-folder", str(tmp_path / "none"), *arguments])
    assert result.exit_code == code
    assert words in result.stderr
    assert not (tmp_path / "none").exists()


def test_down_command_on_an_empty_folder(tmp_path: Path) -> None:
    result = CliRunner().invoke(personas, ["down", "--json", "--data-folder", str(tmp_path)])
    assert result.exit_code == 0
    assert orjson.loads(result.stdout)["killed"] == []


def test_nothing_remains_when_up_is_interrupted_in_a_terminal(tmp_path: Path) -> None:
    """SIGINT to the whole foreground group while the server boots, as a terminal sends it."""
    code = textwrap.dedent(
        """
        import os, sys
        from pathlib import Path
        sys.path.insert(0, os.getcwd())
        from tests.unit.test_localstack_stack import NEVER_ANSWERS, FakePart, _local
        from agents.localstack import stack
        from agents.localstack.ports import free_ports
        stack.ensure_assets = lambda *_: None
        folder, ports = Path(sys.argv[1]), free_ports()
        local = _local(folder, {name: FakePart(name, ports, folder, NEVER_ANSWERS) for name in ("kafka", "triton")})
        local.up(["kafka", "triton"])
        """
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    run = tmp_path / "data with a space" / "run"
    limit = time.monotonic() + 20
    while not ((run / "kafka.pid").exists() and (run / "triton.pid").exists()):
        assert time.monotonic() < limit
        assert starter.poll() is None
        time.sleep(0.05)
    os.killpg(starter.pid, signal.SIGINT)
    _, errors = starter.communicate(timeout=30)
    assert b"KeyboardInterrupt" in errors
    assert processes.marked(f"kafka:{tmp_path / 'data with a space'}") == []
    assert processes.marked(f"triton:{tmp_path / 'data with a space'}") == []
