"""The installed packages are ours, and a wheel holds all that the program reads at run time."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from agents.cli import personas

ROOT = Path(__file__).parents[2]
DISTRIBUTION = "viewer-personas"
PACKAGES = ("agents", "streams", "triton_models")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LEFT_OUT = frozenset({"Dockerfile", "README.md"})
"""Names of files that nothing reads at run time."""


# What is installed


@pytest.mark.parametrize("name", PACKAGES)
def test_the_package_comes_from_our_distribution_alone(name: str) -> None:
    """`agents` and `streams` are common names: another distribution of that name would be imported in silence."""
    assert set(importlib.metadata.packages_distributions()[name]) == {DISTRIBUTION}


@pytest.mark.parametrize("name", PACKAGES)
def test_the_package_is_imported_from_this_project(name: str) -> None:
    file = importlib.import_module(name).__file__
    assert file is not None
    site = Path(sysconfig.get_path("purelib"))
    assert Path(file).parent.resolve() in {(ROOT / name).resolve(), (site / name).resolve()}


def test_the_command_tells_the_version() -> None:
    result = CliRunner().invoke(personas, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"personas, version {PROJECT['version']}\n"
    assert importlib.metadata.version(DISTRIBUTION) == PROJECT["version"]


def test_the_installed_command_is_ours() -> None:
    (entry,) = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "personas"]
    assert entry.value == PROJECT["scripts"]["personas"]
    command = Path(sys.executable).with_name("personas")
    run = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout) == (0, f"personas, version {PROJECT['version']}\n")


def test_what_is_locked_satisfies_what_is_required() -> None:
    lock = (ROOT / "requirements" / "runtime.lock").read_text()
    locked = dict(re.findall(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==([^ ;\\]+)", lock, re.MULTILINE))
    versions = {normal(name): version for name, version in locked.items()}
    required = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["local"]]
    for requirement in map(Requirement, required):
        assert versions.get(normal(requirement.name)) is not None, f"{requirement} is not locked"
        assert requirement.specifier.contains(versions[normal(requirement.name)]), requirement


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of the sources as they are, built from a copy: a build writes beside them."""
    assert version_of("setuptools") >= (77,), "the build tool is not the locked one: run `make setup`"
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    built = subprocess.run(
        [*command, "--disable-pip-version-check", "--wheel-dir", str(target), str(source)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert built.returncode == 0, built.stderr[-3_000:]
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def version_of(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(name).split(".")[:2])


def test_the_wheel_holds_every_file_of_the_packages(wheel: zipfile.ZipFile) -> None:
    ours = {
        str(path.relative_to(ROOT))
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    missing = ours - set(wheel.namelist())
    assert [name for name in sorted(missing) if Path(name).name not in LEFT_OUT] == []


def test_the_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    folders = {name.split("/")[0] for name in wheel.namelist()}
    assert folders == {*PACKAGES, f"viewer_personas-{PROJECT['version']}.dist-info"}


@pytest.mark.parametrize(
    "name",
    [
        "agents/data/thresholds.json",
        "agents/data/demo_catalogue.jsonl",
        "agents/data/demo_registry/manifest.json",
        "agents/data/demo_registry/centroids.npy",
        "agents/page/index.html",
        "agents/page/page.css",
        "agents/page/page.js",
        "agents/stores/migrations/0001_personas.cql",
        "agents/stores/migrations/0002_wording_cache.cql",
        "agents/localstack/assets.json",
        "agents/localstack/weights.txt",
        "agents/localstack/kafka.properties",
        "agents/localstack/cassandra.yaml",
        "agents/localstack/cassandra.options",
        "agents/localstack/log4j2.xml",
        "agents/localstack/logback.xml",
        "streams/schemas/watch_event.json",
        "streams/schemas/persona.json",
        "triton_models/repository/student/config.pbtxt",
        "triton_models/repository/student/1/model.py",
        "triton_models/repository/student/1/model.yaml",
        "triton_models/repository/student/1/grammars.json",
    ],
)
def test_data_that_is_read_at_run_time_is_in_the_wheel(wheel: zipfile.ZipFile, name: str) -> None:
    assert wheel.read(name) == (ROOT / name).read_bytes()


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    folder = f"viewer_personas-{PROJECT['version']}.dist-info"
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert f"{folder}/licenses/LICENSE" in wheel.namelist()
    assert "personas = agents.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_the_wheel_runs_without_the_sources(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Unpacked somewhere else, it finds its registry, thresholds and schemas there."""
    wheel.extractall(tmp_path)
    script = (
        "import agents, streams\n"
        "from importlib.resources import files\n"
        "from pathlib import Path\n"
        "from agents.artefacts import load_thresholds\n"
        "from agents.clusters.files import packaged_registry\n"
        "from agents.stores.migrate import packaged_migrations\n"
        "print(Path(agents.__file__).parent.parent, Path(streams.__file__).parent.parent)\n"
        "print(len(packaged_registry().cards) > 1, load_thresholds(Path()).regret > 0)\n"
        "print(len(packaged_migrations()) >= 2, (files('streams') / 'schemas' / 'persona.json').is_file())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{script}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2_000:]
    assert run.stdout.splitlines() == [f"{tmp_path} {tmp_path}", "True True", "True True"]
