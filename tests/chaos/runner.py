"""Runs cases and adds up what they show."""

from __future__ import annotations

import asyncio
import shutil
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from agents.compiled import worker_kernel
from agents.kafka_admin import create_topics
from agents.localstack.ports import PARTS
from agents.localstack.stack import LocalStack
from agents.settings import Settings
from tests.chaos import personas, stores
from tests.chaos.cases import KEEPING, Case
from tests.chaos.events import generate
from tests.chaos.harness import Fleet, Run
from tests.chaos.reference import Differences
from tests.workers import Workers, with_topics_and_schema

Say = Callable[[str], None]
FLUSH_SECONDS = (0.1, 1.0, 3.0)
"""How long states may wait for the changelog: the longer, the more is done again after a kill."""


@dataclass(frozen=True)
class Scale:
    """How much a case does. events: of a case; kills: of those that kill at random; viewers: of the persona side."""

    events: int
    kills: int
    viewers: int


@dataclass(frozen=True)
class Outcome:
    """What one case showed. events: in its log; disagreements, remarks, error: why it failed beside the figures."""

    name: str
    seed: int
    events: int = 0
    kills: int = 0
    restarts: int = 0
    seconds: float = 0.0
    differences: Differences = field(default_factory=Differences)
    disagreements: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    error: str = ""

    @property
    def exact(self) -> bool:
        """Whether nothing was missed."""
        return not (self.differences or self.disagreements or self.remarks or self.error)

    def reasons(self) -> str:
        """Everything that was missed, for people."""
        lines = [f"{name} {value}" for name, value in self.differences.figures().items() if value]
        return "\n".join(
            [*lines, *self.differences.examples, *self.disagreements, *self.remarks, *self.error.splitlines()]
        )


async def run_case(
    case: Case, seed: int, scale: Scale, settings: Settings, local: LocalStack, folder: Path, say: Say
) -> Outcome:
    """Run one case under topics (and a keyspace) of its own, deleted afterwards. Errors become its outcome."""
    began = time.monotonic()
    identity = uuid.uuid4().hex[:8]
    # A script that runs in two intakes meets the same events and moments in both.
    random = Random(f"{seed} {case.fault}")
    own = replace(
        settings,
        topic_prefix=f"chaos-{identity}-",
        cassandra_keyspace=f"chaos_{identity}",
        template_after=3,
        first_persona_after=personas.GATE if case.personas else 8,
        history_versions=personas.HISTORY,
        student_deadline_seconds=30.0,
        intake=case.intake,
        state_store=case.store,
        standby_replicas=case.standbys,
        flush_seconds=random.choice(FLUSH_SECONDS),
        dead_letters_per_minute=0,  # a few in a hundred cannot be read here, and every restart reads some again
    )
    messages = (
        personas.persona_messages(random.randrange(113), scale.viewers)
        if case.personas
        else generate(
            random.randrange(2**32), scale.events, controls=0.1 if case.fault == "controls-interleaved" else 0.015
        )
    )
    place = folder / f"{case.name.replace('/', '-')}-{identity}"
    place.mkdir(parents=True)
    workers = Workers(own, place)
    fleet = Fleet(workers, place)
    run = Run(own, local, fleet, random, messages, scale.kills, lambda text: say(f"{case.name}: {text}"))
    supervising = asyncio.create_task(fleet.supervise())
    found: dict[str, Any] = {}
    try:
        await asyncio.to_thread(with_topics_and_schema if case.personas else create_topics, own)
        found = await _run(case, run)
    except Exception as error:
        (place / "error.txt").write_text(traceback.format_exc())
        found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}; logs are in {place}"
    finally:
        supervising.cancel()
        await run.close()
        await asyncio.to_thread(workers.end)
        with suppress(Exception):
            await asyncio.to_thread(run.delete_topics)
    outcome = Outcome(
        case.name,
        seed,
        kills=run.killed,
        restarts=fleet.restarts,
        seconds=time.monotonic() - began,
        remarks=tuple(run.remarks),
        **found,
    )
    if outcome.exact:
        shutil.rmtree(place)
    return outcome


async def _run(case: Case, run: Run) -> dict[str, Any]:
    await case.script(run)
    await run.feed(1.0, 1.0)
    differences = await run.settled()
    disagreements: tuple[str, ...] = ()
    if case.personas:
        await personas.until_answered(run)
        disagreements = tuple(await personas.disagreements(run.settings))
    statuses = await run.fleet.stop_all()
    if any(statuses):
        run.remarks.append(f"at SIGTERM workers ended with {statuses}")
    if not differences:  # what a stop wrote counts as well
        differences = await asyncio.to_thread(run.differences)
    if case.store == "disk":
        run.remarks += await asyncio.to_thread(stores.disagreements, run.settings, run.fleet.state_folders())
    if case.fault in KEEPING and (lines := run.fleet.lines("is built anew")):
        run.remarks.append(f"a store was to be used and was not: {lines[0]}")
    logs = await asyncio.to_thread(run.logs)
    events = sum(len(records) for each in logs for records in each.records.values())
    return {"differences": differences, "disagreements": disagreements, "events": events}


async def run_cases(
    cases: Sequence[Case],
    seed: int,
    scale: Scale,
    local: LocalStack,
    folder: Path,
    lanes: int,
    say: Say,
    done: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """Run cases, so many at once where they allow it, on a stack that is started where it does not run.

    `done` is told each outcome as soon as it is there.
    """
    settings = local.ports.settings(Settings(data_folder=local.data_folder))
    parts = PARTS if any(case.personas for case in cases) else ("kafka",)
    await asyncio.to_thread(local.up, parts)
    # Otherwise the first workers would all compile it at once.
    await asyncio.to_thread(worker_kernel, local.data_folder / "kernel")
    free, wording = asyncio.Semaphore(lanes), asyncio.Lock()

    async def one(case: Case) -> Outcome:
        # Cassandra and Triton are hurt by one case at a time.
        async with wording if case.personas else nullcontext(), free:
            say(f"{case.name} begins")
            outcome = await run_case(case, seed, scale, settings, local, folder, say)
            say(f"{case.name}: {'exact' if outcome.exact else 'NOT EXACT'} after {outcome.seconds:.0f} s")
            if not outcome.exact:
                say(f"{case.name}: {outcome.reasons()}")
            done(outcome)
            return outcome

    together = await asyncio.gather(*(one(case) for case in cases if not case.alone))
    apart = []
    for case in cases:
        if case.alone:
            await asyncio.to_thread(local.up, parts)  # whatever a case left broken is back for the next one
            apart.append(await one(case))
    return [*together, *apart]


def figures(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """The sums over all cases, by the names of the last line. A case that failed otherwise counts under `failed`."""
    names = Differences().figures()
    sums = {name: sum(outcome.differences.figures()[name] for outcome in outcomes) for name in names}
    return {
        "cases": len(outcomes),
        "events": sum(outcome.events for outcome in outcomes),
        "kills": sum(outcome.kills for outcome in outcomes),
        "over": sums.pop("over"),
        "under": sums.pop("under"),
        "requests_missing": sums.pop("requests_missing"),
        "requests_extra": sums.pop("requests_extra"),
        "versions_disagreeing": sum(len(outcome.disagreements) for outcome in outcomes),
        **sums,
        "failed": sum(bool(outcome.error or outcome.remarks) for outcome in outcomes),
    }
