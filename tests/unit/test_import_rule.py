"""Imports: `streams` is pure, `agents` stands on it, what serves the student on neither; importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PURE_MODULES = frozenset({
    "__future__", "abc", "array", "base64", "bisect", "collections", "contextlib", "copy", "dataclasses",
    "datetime", "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "itertools", "json",
    "keyword", "math", "mmap", "numbers", "operator", "re", "statistics", "string", "struct", "textwrap", "types",
    "typing", "unicodedata", "numpy", "orjson", "msgspec", "xxhash", "streams",
})  # fmt: skip
"""What `streams` may import: no network, disk, clock, process, environment or randomness."""

IMPURE_CALLS = frozenset({
    "open", "input", "print", "eval", "exec", "__import__", "breakpoint", "datetime.now", "datetime.utcnow",
    "datetime.today", "date.today", "np.load", "np.save", "np.savez", "np.savez_compressed", "np.memmap",
    "np.fromfile", "np.loadtxt", "np.savetxt", "np.genfromtxt", "numpy.load", "numpy.save", "numpy.memmap",
    "numpy.fromfile",
})  # fmt: skip
"""Calls through which an allowed module would read the clock or touch the disk, by their last two names."""

SEEDED_RANDOM = "default_rng"


DISTILLING = frozenset({"contexts", "pairs", "quality", "teacher", "train"})
"""Modules of `triton_models.distillation` that write, check and learn pairs: they know prompts, gate and teacher. They
run offline; what merges and serves the weights uses none of them."""


def modules_of(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no modules in {package}"
    return found


def served_modules() -> list[Path]:
    distilling = {ROOT / "triton_models" / "distillation" / f"{name}.py" for name in DISTILLING}
    return [path for path in modules_of("triton_models") if path not in distilling]


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of all modules imported anywhere in a module; relative imports give `.`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield "." if node.level else module if module == "numpy.random" else module.split(".")[0]


def violations(source: str) -> list[str]:
    """What a module of `streams` must not do, as text, one entry each."""
    tree = ast.parse(source)
    found = [f"imports {name}" for name in imports(tree) if name not in PURE_MODULES]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func).split(".")
        if ".".join(called[-2:]) in IMPURE_CALLS:
            found.append(f"calls {'.'.join(called)}")
        drawn = called[:2] in (["np", "random"], ["numpy", "random"])
        if drawn and (called[2:] != [SEEDED_RANDOM] or not (node.args or node.keywords)):
            found.append(f"draws unseeded: {'.'.join(called)}")
    return found


@pytest.mark.parametrize("path", modules_of("streams"), ids=lambda path: path.name)
def test_streams_is_pure(path: Path) -> None:
    assert violations(path.read_text()) == []


@pytest.mark.parametrize("path", served_modules(), ids=lambda path: path.name)
def test_what_serves_the_student_stands_alone(path: Path) -> None:
    source = path.read_text()
    names = set(imports(ast.parse(source)))
    assert names.isdisjoint({"agents", "streams", "tests"})
    assert not any(f"triton_models.distillation.{name}" in source.replace(" import ", ".") for name in DISTILLING)


@pytest.mark.parametrize("name", sorted(DISTILLING))
def test_distilling_uses_no_tests(name: str) -> None:
    path = ROOT / "triton_models" / "distillation" / f"{name}.py"
    assert "tests" not in imports(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", modules_of("agents"), ids=lambda path: str(path.relative_to(ROOT)))
def test_agents_do_not_use_tests(path: Path) -> None:
    assert "tests" not in imports(ast.parse(path.read_text()))


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "from os import environ",
        "import random",
        "import asyncio",
        "def f():\n    import socket",
        "from agents.settings import Settings",
        "from . import records",
        "from datetime import datetime\ndatetime.now()",
        "import datetime\ndatetime.datetime.now(datetime.UTC)",
        "open('x')",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.random.default_rng()",
        "import numpy as np\nnp.random.normal(0, 1)",
        "from numpy.random import normal",
        "__import__('time').time()",
    ],
)
def test_the_rule_sees_a_breach(source: str) -> None:
    assert violations(source)


@pytest.mark.parametrize(
    "source",
    [
        "from datetime import datetime\ndatetime.fromisoformat('2026-01-01')",
        "import numpy as np\nnp.random.default_rng(7)",
        "import numpy as np\ndef draw(random: np.random.Generator) -> float:\n    return random.normal()",
        "from streams.records import WatchEvent",
    ],
)
def test_the_rule_lets_pure_code_be(source: str) -> None:
    assert violations(source) == []


IMPORT_EVERYTHING = """
import importlib, sys
from pathlib import Path

sys.dont_write_bytecode = True
import aiohttp.web, faust, cassandra.cluster, aiokafka, tritonclient.grpc.aio
import numpy.testing  # asks lscpu about this machine when it is imported, which is not our doing

forbidden = {"socket.connect", "socket.bind", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.fork"}

def watch(event, arguments):
    if event in forbidden:
        raise RuntimeError(f"{event} {arguments} while importing")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        raise RuntimeError(f"opens {arguments[0]} for writing while importing")

def refuse(kind):
    def made(self, *arguments, **keywords):
        raise RuntimeError(f"a {kind.__name__} is made while importing")
    kind.__init__ = made

for kind in (faust.App, aiohttp.web.Application, cassandra.cluster.Cluster, aiokafka.AIOKafkaProducer,
             aiokafka.AIOKafkaConsumer, tritonclient.grpc.aio.InferenceServerClient):
    refuse(kind)
sys.addaudithook(watch)
for path in sorted(Path("streams").rglob("*.py")) + sorted(Path("agents").rglob("*.py")):
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    if not name.endswith("__main__"):
        importlib.import_module(name)
        print(name)
"""


def test_importing_connects_to_nothing_and_makes_no_app() -> None:
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr[-2_000:]
    assert {"streams.decoding", "agents.settings"} <= set(run.stdout.split())
