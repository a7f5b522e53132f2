"""The short form of `python -m tests.chaos`: few events and kills, some cases of each kind, in both intakes and stores.

The cases run beside each other, since most of their time is waiting; each test awaits one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.chaos.cases import CASES
from tests.chaos.harness import quiet_clients
from tests.chaos.personas import GATE
from tests.chaos.runner import Outcome, Scale, run_cases
from tests.conftest import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

SEED = 5
SCALE = Scale(events=900, kills=2, viewers=4)
LANES = 4
NAMES = (
    "triton-restarted/batch/memory",
    "killed-at-random-moments/batch/memory",
    "one-of-two-killed/agent/disk",
    "frozen-past-the-session/batch/disk",
    "frozen-while-opening/agent/memory",
    "third-joins-and-leaves/batch/memory",
    "changelog-refuses/batch/memory",
    "requests-refused/agent/memory",
    "topic-made-anew-between-runs/agent/memory",
    "topic-made-anew-under-a-worker/batch/memory",
    "controls-interleaved/agent/memory",
    "disk-stale/agent/disk",
    "disk-left-behind/batch/disk",
    "broker-paused/batch/memory",
)
Running = dict[str, asyncio.Future[Outcome]]


@pytest.fixture(scope="module")
async def running(unstarted_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """The outcome of every case, as it comes."""
    loop = asyncio.get_running_loop()
    outcomes: Running = {name: loop.create_future() for name in NAMES}
    folder = tmp_path_factory.mktemp("chaos")

    def done(outcome: Outcome) -> None:
        outcomes[outcome.name].set_result(outcome)

    quiet_clients()
    cases = sorted((case for case in CASES if case.name in outcomes), key=lambda case: NAMES.index(case.name))
    task = asyncio.create_task(run_cases(cases, SEED, SCALE, unstarted_stack.local, folder, LANES, print, done))

    def ended(task: asyncio.Task[list[Outcome]]) -> None:
        """What ended the run early ends every test that still waits."""
        for outcome in outcomes.values():
            if not outcome.done():
                outcome.cancel(f"the run ended: {None if task.cancelled() else task.exception()!r}")

    task.add_done_callback(ended)
    yield outcomes
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize("name", NAMES)
async def test_nothing_is_lost_or_counted_twice(name: str, running: Running) -> None:
    outcome = await running[name]
    assert outcome.exact, outcome.reasons()
    assert outcome.events >= (SCALE.viewers * GATE if name.startswith("triton") else SCALE.events)
