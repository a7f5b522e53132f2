"""The compiled kernel gives the bytes of the plain one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from agents.compiled import compiled, worker_kernel
from agents.replay import ReplayDriver
from streams import topics
from streams.requesting import ASKED
from streams.selection import Chosen
from streams.state import WORD, WORDS, from_bytes, pack
from streams.topics import DAY_MS
from streams.watch import PLAIN, Kernel
from tests.builders import START, event, make_configuration, make_registry
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


async def test_a_request_for_age_alone_is_the_same(kernel: Kernel) -> None:
    """Months of one taste, a few watches a week."""
    log = [event("ann", f"c{i % 2}v{i % 7}", START + i * 3 * DAY_MS) for i in range(60)]
    outputs = []
    for each in (PLAIN, kernel):
        driver = ReplayDriver(replace(make_configuration(REGISTRY), kernel=each), REGISTRY)
        await driver.run(log)
        outputs.append([output.value for output in driver.outputs(topics.REFRESH_REQUESTS)])
    assert outputs[0] == outputs[1]
    assert any(b'"rule":"age"' in (value or b"") for value in outputs[0])


def test_two_modules_may_not_use_one_name_for_different_things() -> None:
    with pytest.raises(ValueError, match="has another APPLIED"):
        compiled(SimpleNamespace(__name__="one", APPLIED=1), SimpleNamespace(__name__="two", APPLIED=2))  # type: ignore[arg-type]


def test_requests_unpack_into_the_names_they_were_written_under() -> None:
    assert Chosen._fields == ASKED.names


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
