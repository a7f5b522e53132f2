"""The compiled kernel gives the bytes of the plain one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agents.compiled import worker_kernel
from agents.replay import ReplayDriver
from streams import topics
from streams.state import WORD, WORDS, from_bytes, pack
from streams.watch import Kernel
from tests.builders import make_configuration, make_registry
from tests.replay.test_exactness import mixed_log

REGISTRY = make_registry(clusters=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernel")


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Kernel:
    return worker_kernel(folder)


@pytest.mark.parametrize("seed", range(6))
async def test_states_requests_and_outcomes_are_the_same(kernel: Kernel, seed: int) -> None:
    plain = ReplayDriver(make_configuration(REGISTRY), REGISTRY, batch_records=40)
    compiled = ReplayDriver(replace(make_configuration(REGISTRY), kernel=kernel), REGISTRY, batch_records=70)
    log = mixed_log(seed, size=400)
    await plain.run(log)
    await compiled.run(log)
    assert compiled.states == plain.states
    for topic in (topics.REFRESH_REQUESTS, topics.dead_letters_of(topics.WATCH_EVENTS), topics.UNKNOWN_VIDEOS):
        assert sorted(o.value or b"" for o in compiled.outputs(topic)) == sorted(
            o.value or b"" for o in plain.outputs(topic)
        )
    assert compiled.outcomes == plain.outcomes
    assert sum(int(from_bytes(value)["events"]) for value in plain.states.values()) > 100


async def test_packing_is_the_same(kernel: Kernel) -> None:
    driver = ReplayDriver(make_configuration(REGISTRY), REGISTRY)
    await driver.run(mixed_log(1))
    for value in driver.states.values():
        records = from_bytes(value).reshape(1).view(WORD).reshape(1, WORDS)
        assert kernel.pack(records) == pack(records) == [value]


def test_the_machine_code_is_kept(kernel: Kernel, folder: Path) -> None:
    held = {path: path.stat().st_mtime_ns for path in folder.rglob("*.nbc")}
    assert len(held) == 3
    worker_kernel(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.nbc")} == held
