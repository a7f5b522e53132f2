"""`make setup` finds a Python that works, or says why none does."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_python", ROOT / "requirements" / "check_python.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_this_python_is_accepted(check: ModuleType) -> None:
    assert check.lacks() == ""


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 13, 0)])
def test_another_version_is_refused(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...]
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    assert "not 3.11 or 3.12" in check.lacks()


def test_a_python_without_its_shared_library_is_refused(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.sysconfig, "get_config_var", lambda _: "libpython-that-is-not-there.so")
    assert "apt install libpython3.1" in check.lacks()


def test_make_says_what_it_tried(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    (tmp_path / "pyproject.toml").touch()
    broken = tmp_path / "python3.11"
    broken.write_text("#!/bin/sh\necho 'no such version is installed' >&2\nexit 127\n")
    broken.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={broken}"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0
    assert "no such version is installed" in done.stderr
    assert "make setup PYTHON=/path/to/python3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()
