"""compose.yaml and the Dockerfiles: valid, bound to this machine, limited, without secrets, built from the locks."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from agents.localstack.assets import LOCK_FILE, WEIGHTS_LOCK
from agents.localstack.ports import ports_of
from agents.settings import ENVIRONMENT_PREFIX, Settings, load_settings
from tests.compose_file import (
    COMPOSE_FILE,
    ROOT,
    Dockerfile,
    container_of,
    default_environment,
    environment_of,
    interpolate,
    load_compose,
    seconds,
    started,
)

COMPOSE = load_compose()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]
WORKERS = ["watch", "persona"]
STUDENTS = ["triton", "triton-gpu"]
ONE_SHOT = "init"
DOCKERFILES = [Dockerfile.read(ROOT / "Dockerfile"), Dockerfile.read(ROOT / "triton_models" / "Dockerfile")]
FILE_SETTINGS = {"kafka_ca_file", "registry", "thresholds", "field_mapping", "state_folder"}
"""Paths: a file of the host needs a mount, so they are set in an override file."""

each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda d: str(d.path.relative_to(ROOT)))
each_service = pytest.mark.parametrize("name", SERVICES)
each_of_ours = pytest.mark.parametrize("name", OURS)


def test_the_file_is_valid_by_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE_FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_variables_are_replaced_as_compose_does() -> None:
    given = {"A": "1", "EMPTY": ""}
    text = "$A ${A} ${A:-x} ${B:-x} ${B-y} ${EMPTY:-x} ${EMPTY-y}. ${B} $$A"
    assert interpolate(text, given) == "1 1 1 x y x .  $A"
    with pytest.raises(LookupError, match="B: is needed"):
        interpolate("${B:?is needed}", given)
    assert seconds("1m30s") == 90


def test_plain_up_starts_the_cpu_student_and_the_gpu_profile_the_other_one_alone() -> None:
    default = default_environment()["COMPOSE_PROFILES"]
    assert set(started(COMPOSE, default)) & set(STUDENTS) == {"triton"}
    assert set(started(COMPOSE, "gpu")) & set(STUDENTS) == {"triton-gpu"}
    rest = set(SERVICES) - set(STUDENTS)
    assert rest <= set(started(COMPOSE, default))
    assert rest <= set(started(COMPOSE, "gpu"))


def test_either_student_answers_at_the_address_that_workers_call() -> None:
    host, port = SERVICES["persona"]["environment"]["PERSONAS_TRITON_URL"].split(":")
    for name in STUDENTS:
        assert SERVICES[name]["networks"]["default"]["aliases"] == [host]
        assert f"127.0.0.1:{port}:{port}" in SERVICES[name]["ports"]


@each_service
def test_published_ports_are_bound_to_this_machine(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), f"{name} publishes {port}"
    assert SERVICES[name].get("network_mode") is None


def test_the_command_line_reaches_the_published_ports_by_its_defaults() -> None:
    ports = ports_of(Settings())
    published = {
        port.rsplit(":", 1)[0].removeprefix("127.0.0.1:") for s in SERVICES.values() for port in s.get("ports", [])
    }
    assert {str(ports.kafka), str(ports.cassandra), str(ports.triton_grpc)} <= published
    advertised = SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"].split(",")
    assert f"HOST://{Settings().kafka_bootstrap}" in advertised
    assert f"INTERNAL://{SERVICES['watch']['environment']['PERSONAS_KAFKA_BOOTSTRAP']}" in advertised


@each_service
def test_every_service_is_pinned_limited_and_restarted(name: str) -> None:
    service = SERVICES[name]
    assert re.search(r":[\w.-]*\d[\w.-]*$", service["image"]), f"{name}: {service['image']} names no version"
    assert {"cpus", "memory"} <= set(service["deploy"]["resources"]["limits"])
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert service["restart"] == ("no" if name == ONE_SHOT else "unless-stopped")
    if name != ONE_SHOT:
        health = service["healthcheck"]
        assert health["test"][0] in ("CMD", "CMD-SHELL")
        assert seconds(health["timeout"]) <= seconds(health["interval"])
        assert seconds(service["stop_grace_period"]) > 10


@each_of_ours
def test_our_containers_hold_no_privilege(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["tmpfs"] == ["/tmp"]  # noqa: S108 - inside the container
    assert service["init"] is True
    assert not service.get("privileged")
    assert not any("docker.sock" in str(volume) for volume in service.get("volumes", []))
    version = importlib.metadata.version("viewer-personas")
    assert service["image"].rsplit(":", 1)[1] == version


@each_service
def test_what_a_service_waits_for_exists_and_can_say_so(name: str) -> None:
    for other, wait in SERVICES[name].get("depends_on", {}).items():
        if other == ONE_SHOT:
            assert wait["condition"] == "service_completed_successfully"
        else:
            assert wait["condition"] == "service_healthy"
            assert "healthcheck" in SERVICES[other]
        # Compose refuses a needed service that the profile leaves out.
        assert wait.get("required", True) is not bool(SERVICES[other].get("profiles"))


def test_workers_wait_for_what_they_need() -> None:
    assert set(SERVICES[ONE_SHOT]["depends_on"]) == {"kafka", "cassandra"}
    assert set(SERVICES["watch"]["depends_on"]) == {"kafka", "cassandra", ONE_SHOT}
    assert set(SERVICES["persona"]["depends_on"]) == {"kafka", "cassandra", ONE_SHOT, *STUDENTS}


@each_service
def test_no_secret_is_written_down(name: str) -> None:
    secret = re.compile(r"password|secret|token|_key$|headers", re.IGNORECASE)
    written = {k: v for k, v in SERVICES[name].get("environment", {}).items() if secret.search(k) and v is not None}
    assert written == {}


@pytest.mark.parametrize("name", [ONE_SHOT, *WORKERS])
def test_settings_come_from_the_file_or_from_the_shell(name: str) -> None:
    """Every setting is one of the two, so that none that the operator sets is ignored in silence."""
    environment: dict[str, str | None] = SERVICES[name]["environment"]
    known = {f"{ENVIRONMENT_PREFIX}{field.name.upper()}" for field in dataclasses.fields(Settings)}
    files = {f"{ENVIRONMENT_PREFIX}{setting.upper()}" for setting in FILE_SETTINGS}
    assert {key for key in environment if key.startswith(ENVIRONMENT_PREFIX)} == known - files

    shell = {"PERSONAS_CASSANDRA_PASSWORD": "s3cret", "PERSONAS_PARTITIONS": "7", "PERSONAS_KAFKA_BOOTSTRAP": "else:1"}
    settings = load_settings(environment_of(SERVICES[name], shell))
    assert (settings.cassandra_password, settings.partitions) == ("s3cret", 7)
    assert settings.kafka_bootstrap == "kafka:9092"  # an address of the host means nothing in a container
    assert load_settings(environment_of(SERVICES[name], {})).partitions == Settings().partitions


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_may_finish_before_it_is_killed(name: str) -> None:
    container = container_of(SERVICES[name], {})
    settings = load_settings({k: v for k, v in container.environment.items() if k.startswith(ENVIRONMENT_PREFIX)})
    assert container.grace > settings.shutdown_seconds + 10
    assert settings.web_host == "0.0.0.0"  # noqa: S104 - inside the container; compose publishes it on 127.0.0.1
    assert settings.web_port == 8080
    assert '"127.0.0.1", 8080' in container.health[-1]


def test_the_page_port_can_be_moved() -> None:
    assert SERVICES["persona"]["ports"] == ["127.0.0.1:8080:8080"]
    moved = load_compose({"PAGE_PORT": "9000-9003"})
    assert moved["services"]["persona"]["ports"] == ["127.0.0.1:9000-9003:8080"]


def test_servers_keep_their_data_in_named_volumes() -> None:
    mounted = {
        v.split(":")[0] for s in SERVICES.values() for v in s.get("volumes", []) if isinstance(v, str) and v[0] != "."
    }
    assert mounted == set(COMPOSE["volumes"])
    kafka = SERVICES["kafka"]
    assert f"kafka-data:{kafka['environment']['KAFKA_LOG_DIRS']}" in kafka["volumes"]


def test_kafka_creates_no_topics_and_stamps_arrival() -> None:
    environment = SERVICES["kafka"]["environment"]
    assert environment["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"
    assert environment["KAFKA_LOG_MESSAGE_TIMESTAMP_TYPE"] == "LogAppendTime"


def test_the_gpu_student_has_what_tensorrt_llm_needs() -> None:
    service = SERVICES["triton-gpu"]
    assert service["shm_size"] == "2gb"
    assert service["ulimits"] == {"memlock": -1, "stack": 67108864}
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert service["environment"]["STUDENT_ENGINE"] == "tensorrt_llm"
    assert service["healthcheck"]["test"][0:2] == ["CMD", "curl"]
    assert service["healthcheck"]["test"][-1].endswith("/v2/models/student/ready")
    source, target, _ = service["volumes"][0].split(":")
    assert (ROOT / source / "student" / "config.pbtxt").is_file()
    assert f"--model-repository={target}" in service["command"]
    weights = service["volumes"][1]
    assert weights["source"] == "./.personas/student-hf"
    assert weights["target"] == service["environment"]["STUDENT_WEIGHTS"]
    assert weights["bind"] == {"create_host_path": False}, "an empty folder would be made and fail inside the container"
    mounted = load_compose({"STUDENT_FOLDER": "/models/mine"})["services"]["triton-gpu"]["volumes"][1]
    assert mounted["source"] == "/models/mine"


@each_dockerfile
def test_images_are_built_from_files_that_are_sent_to_the_builder(dockerfile: Dockerfile) -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]
    assert dockerfile.copied()
    for source in dockerfile.copied():
        assert (ROOT / source).exists(), f"COPY {source}: there is no such file"
        assert any(source == entry or source.startswith(f"{entry}/") for entry in sent), f".dockerignore hides {source}"


@each_dockerfile
def test_images_install_locked_packages_only_and_run_without_root(dockerfile: Dockerfile) -> None:
    assert all(re.fullmatch(r"python:3\.11-slim-bookworm( AS \w+)?", line) for line in dockerfile.all("FROM"))
    fetches = [
        command
        for line in dockerfile.all("RUN")
        for command in line.split("&&")
        if re.search(r"pip (install|download)", command)
    ]
    assert fetches
    for command in fetches:
        assert "--require-hashes" in command or ("--no-deps" in command and "--no-build-isolation" in command), command
    assert dockerfile.all("ADD") == []
    user = dockerfile.final("USER")[-1]
    assert any(f"--uid {user.split(':')[0]}" in line for line in dockerfile.final("RUN"))
    assert user.split(":")[0] != "0"


def test_the_worker_image_is_the_personas_command() -> None:
    assert json.loads(DOCKERFILES[0].final("ENTRYPOINT")[-1]) == ["personas"]


def test_the_student_image_merges_the_locked_weights() -> None:
    text = " ".join(DOCKERFILES[1].all("RUN"))
    weights = next(entry for entry in json.loads(LOCK_FILE.read_bytes())["weights"] if entry["file"] == "base.gguf")
    package, _ = weights["package"].split("==")
    assert f"/^{package}==/" in text
    assert f"weights/{weights['member']} /build/{weights['file']}" in text
    served = DOCKERFILES[1].environment["STUDENT_WEIGHTS"]
    assert f"-m triton_models.distillation.merge /build/{weights['file']} {served}" in text
    assert "triton_models/distillation" in DOCKERFILES[1].copied()
    assert str(WEIGHTS_LOCK.relative_to(ROOT)) in DOCKERFILES[1].copied()


def test_the_image_locks_agree_with_the_runtime_lock() -> None:
    runtime, worker, student = (
        _locked(ROOT / "requirements" / f"{name}.lock") for name in ("runtime", "worker", "student")
    )
    assert worker.items() <= runtime.items()
    assert student.items() <= runtime.items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = {_name(requirement) for requirement in project["dependencies"]}
    local = {_name(requirement) for requirement in project["optional-dependencies"]["local"]}
    assert wanted <= worker.keys()
    assert not local & worker.keys(), "the worker image carries the local stack"


@pytest.mark.skipif(
    int(importlib.metadata.version("setuptools").split(".")[0]) < 77,
    reason="the build tool of requirements/build.lock is not installed (`make setup`)",
)
def test_an_installed_copy_has_every_file_of_the_packages(tmp_path: Path) -> None:
    """The images install the project, and do not run it from the checkout as the other tests do."""
    for source in DOCKERFILES[0].copied():
        if source.startswith("requirements/"):
            continue
        if (ROOT / source).is_dir():
            hidden = shutil.ignore_patterns("__pycache__", "Dockerfile")
            shutil.copytree(ROOT / source, tmp_path / "source" / source, ignore=hidden)
        else:
            (tmp_path / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / source, tmp_path / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", tmp_path, tmp_path / "source"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    packages = ("streams", "agents", "triton_models")
    files = {
        str(path.relative_to(tmp_path / "source"))
        for package in packages
        for path in (tmp_path / "source" / package).rglob("*")
        if path.is_file() and "build" not in path.parts
    }
    assert len(files) > 50
    assert sorted(files - packed) == []


def _locked(path: Path) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==([^ ;]+)", path.read_text("utf-8"), re.MULTILINE)
    assert found
    return {_name(name): version for name, version in found}


def _name(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match
    return re.sub(r"[-_.]+", "-", match[0]).lower()
