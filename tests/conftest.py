"""Shared fixtures: one real local stack for the whole session, started part by part when a test first asks for it."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil
import pytest

from agents.localstack import processes
from agents.localstack.assets import ensure_assets
from agents.localstack.ports import PARTS, free_ports
from agents.localstack.stack import LocalStack
from agents.settings import Settings

ASSETS = Path(__file__).parent.parent / ".personas" / "assets"
"""Downloads are shared with `make demo`."""

TEST_MARK = "VIEWER_PERSONAS_TESTS"
"""Every process that a test starts inherits this variable, so that none can be left running unnoticed."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Addresses of the running stack; `local` starts, stops, kills and pauses its parts.

    A test that kills or pauses a part must bring it back (`local.start_part`), since later tests share it.
    """

    settings: Settings
    local: LocalStack

    @property
    def kafka_bootstrap(self) -> str:
        return self.settings.kafka_bootstrap

    @property
    def cassandra_port(self) -> int:
        return self.settings.cassandra_port

    @property
    def triton_grpc(self) -> str:
        return self.settings.triton_url

    @property
    def triton_http(self) -> str:
        return f"127.0.0.1:{self.local.ports.triton_http}"


def pytest_configure(config: pytest.Config) -> None:
    # A developer's own settings and telemetry must not decide what the tests see.
    for name in [name for name in os.environ if name.startswith(("PERSONAS_", "OTEL_"))]:
        del os.environ[name]
    os.environ[TEST_MARK] = uuid.uuid4().hex
    # So that a terminated run tears its fixtures down, as an interrupted one does.
    signal.signal(signal.SIGTERM, _interrupt)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # They leave many topics behind, which slows every restart of the broker that other tests ask for.
    items.sort(key=lambda item: item.path.stem in ("test_bad_input", "test_faults", "test_trace"))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="session", autouse=True)
def _no_process_left_running() -> Iterator[None]:
    """Fails the run if anything that a test started outlives it. Set up first, so torn down last."""
    yield
    limit = time.monotonic() + 5
    while left := _started_by_tests():
        if time.monotonic() > limit:
            break
        time.sleep(0.1)
    names = [f"{process.pid}: {' '.join(process.cmdline())[:200]}" for process in left]
    for process in left:
        process.kill()
    assert not names, "left running by a test:\n" + "\n".join(names)


def _started_by_tests() -> list[psutil.Process]:
    found = processes.marked(os.environ[TEST_MARK], variable=TEST_MARK)
    # Python's own helper of multiprocessing lives as long as this process and ends with it.
    return [
        p for p in found if p.pid != os.getpid() and "multiprocessing.resource_tracker" not in " ".join(p.cmdline())
    ]


@pytest.fixture(scope="session")
def unstarted_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The session's stack with no part started yet, on free ports and in a folder of its own."""
    ASSETS.mkdir(parents=True, exist_ok=True)
    folder = tmp_path_factory.mktemp("stack")
    (folder / "assets").symlink_to(ASSETS)
    ports = free_ports()
    local = LocalStack(ports, folder)
    try:
        yield Stack(ports.settings(Settings(data_folder=folder)), local)
    finally:
        local.down()


@pytest.fixture(scope="session")
def stack(unstarted_stack: Stack) -> Stack:
    """Kafka, Cassandra and Triton with the student, all ready."""
    unstarted_stack.local.up(PARTS)
    return unstarted_stack


@pytest.fixture(scope="session")
def kafka(unstarted_stack: Stack) -> Stack:
    """The stack with at least Kafka ready."""
    unstarted_stack.local.up(["kafka"])
    return unstarted_stack


@pytest.fixture(scope="session")
def cassandra(unstarted_stack: Stack) -> Stack:
    """The stack with at least Cassandra ready."""
    unstarted_stack.local.up(["cassandra"])
    return unstarted_stack


@pytest.fixture(scope="session")
def triton(unstarted_stack: Stack) -> Stack:
    """The stack with at least Triton and the student ready."""
    unstarted_stack.local.up(["triton"])
    return unstarted_stack


@pytest.fixture(scope="session")
def tokenizer() -> Path:
    """The sentence encoder's tokenizer.json."""
    return ensure_assets(ASSETS, ["tokenizer"]).tokenizer


@pytest.fixture(scope="module")
def topic_prefix(request: pytest.FixtureRequest) -> str:
    """A prefix of this test module alone, for `Settings.topic_prefix` and group names: modules share one Kafka."""
    return f"{request.module.__name__.rpartition('.')[2].replace('_', '-')}-{uuid.uuid4().hex[:8]}-"


@pytest.fixture(scope="module")
def keyspace(request: pytest.FixtureRequest) -> str:
    """A Cassandra keyspace name of this test module alone; for `Settings.cassandra_keyspace`."""
    return f"t_{request.module.__name__.rpartition('.')[2][-20:]}_{uuid.uuid4().hex[:8]}"
