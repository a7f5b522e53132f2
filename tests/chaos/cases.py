"""The cases: what fails while the events flow, in which intake and with which table store."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from confluent_kafka.admin import ResourceType  # type: ignore[attr-defined]  # re-exports without saying so

from streams import topics
from tests.chaos import personas
from tests.chaos.events import asked, bootstrap_ends
from tests.chaos.harness import REFUSING, SESSION_SECONDS, Run, alter, limit_of
from tests.workers import read, until

Script = Callable[[Run], Awaitable[None]]
TAKING_OVER = "for transactional id"
"""In a worker's log when it fences the last owner of its first partition."""


@dataclass(frozen=True)
class Case:
    """A script under one intake and store.

    alone: it hurts what other cases need, so none runs beside it. personas: the persona side takes part. standbys:
    workers that keep the store of a partition warm beside its owner.
    """

    script: Script
    intake: str
    store: str = "memory"
    alone: bool = False
    personas: bool = False
    standbys: int = 0

    @property
    def fault(self) -> str:
        """Name of the script."""
        return self.script.__name__.replace("_", "-")

    @property
    def name(self) -> str:
        """Unique: fault/intake/store."""
        return f"{self.fault}/{self.intake}/{self.store}"


async def killed_at_random_moments(run: Run) -> None:
    """One worker, SIGKILL at random moments, also while it starts."""
    run.fleet.start()
    for number in range(run.kills):
        feeding = asyncio.create_task(run.feed(0.9 / run.kills, 5))
        if run.random.random() < 0.8:
            await run.until_active()
        await asyncio.sleep(run.random.uniform(0, 3))
        await run.kill()
        await feeding
        run.say(f"kill {number + 1} of {run.kills}")


async def one_of_two_killed(run: Run) -> None:
    """Two workers share the partitions; one is killed and comes back, then the other."""
    run.fleet.start(0)
    run.fleet.start(1)
    for place in (0, 1):
        feeding = asyncio.create_task(run.feed(0.45, 12))
        await run.until_active()
        await asyncio.sleep(run.random.uniform(0, 4))
        await run.kill(place, again=False)
        await asyncio.sleep(run.random.uniform(0, SESSION_SECONDS + 4))
        run.fleet.start(place)
        await feeding


async def third_joins_and_leaves(run: Run) -> None:
    """Two workers; a third joins and leaves gracefully, joins again and is killed."""
    run.fleet.start(0)
    run.fleet.start(1)
    feeding = asyncio.create_task(run.feed(0.9, 35))
    await run.until_active()
    third = run.fleet.start(2)
    await until(lambda: "Setting newly assigned partitions" in third.text(), run.fleet.workers, 120)
    await asyncio.sleep(run.random.uniform(0, 6))
    if await run.fleet.stop(2) != 0:
        run.remarks.append("the third worker did not stop gracefully")
    run.fleet.start(2)
    await asyncio.sleep(run.random.uniform(3, 10))
    await run.kill(2, again=False)
    await feeding


async def frozen_past_the_session(run: Run) -> None:
    """One of two workers freezes until its partitions have moved and wakes up; then the changelog is compacted, and a
    worker that knows nothing rebuilds its table from what is left and goes on."""
    run.fleet.start(0)
    run.fleet.start(1)
    feeding = asyncio.create_task(run.feed(0.5, SESSION_SECONDS + 10))
    await run.until_active()
    await asyncio.sleep(run.random.uniform(0, 3))
    run.fleet.signal(signal.SIGSTOP, 0)
    await asyncio.sleep(SESSION_SECONDS + 4)
    run.fleet.signal(signal.SIGCONT, 0)
    await feeding
    await run.drain()
    await compact(run)
    await run.fleet.stop_all()
    run.fleet.start(2)
    await run.feed(0.3, 3)


async def frozen_while_opening(run: Run) -> None:
    """A worker freezes when it has just taken its partitions over, another owns them for a while, and it wakes up."""
    run.fleet.start(0)
    feeding = asyncio.create_task(run.feed(0.3, 4))
    await run.until_active()
    await feeding
    await run.fleet.stop(0)
    worker = run.fleet.start(1)
    feeding = asyncio.create_task(run.feed(0.6, 10))
    await until(lambda: TAKING_OVER in worker.text(), run.fleet.workers, 120, 0.01)
    await asyncio.sleep(run.random.uniform(0, 0.2))
    run.fleet.signal(signal.SIGSTOP, 1)
    run.fleet.start(0)
    await feeding
    await run.drain()
    await run.send(asked(run.messages, "pin"))  # due at the very offset that the sleeper will find committed
    await asyncio.sleep(3)
    run.fleet.signal(signal.SIGCONT, 1)


async def compact(run: Run) -> None:
    """Make the broker clean the changelog, and wait until it has."""
    alter(run.settings, ResourceType.BROKER, "1", {"log_cleaner_backoff_ms": "500"})
    run.alter_topic(
        topics.INTERESTS_CHANGELOG,
        segment_ms="1000",
        min_cleanable_dirty_ratio="0.001",
        max_compaction_lag_ms="1000",
    )

    ends = {message.partition(): message.offset() for message in await asyncio.to_thread(_changelog, run)}

    async def overwritten() -> int:
        """States before those ends that a later one, also before them, replaces."""
        log = await asyncio.to_thread(_changelog, run)
        keys = [(m.partition(), m.key()) for m in log if m.offset() <= ends.get(m.partition(), -1)]
        return len(keys) - len(set(keys))

    async def cleaned() -> bool:
        await run.drain()  # a segment ends when something is appended after its time
        return await overwritten() == 0

    before = await overwritten()
    if not before:
        raise AssertionError("no state was overwritten, so this case shows nothing")
    await until(cleaned, run.fleet.workers, 90, 1.5)
    run.say(f"changelog compacted: {before} overwritten states are gone")


def _changelog(run: Run) -> list[Any]:
    return read(run.settings, topics.INTERESTS_CHANGELOG)


async def broker_paused(run: Run) -> None:
    """The broker does not answer for 10 s, longer than a session."""
    await _broker_fails(run, lambda: run.local.pause_part("kafka"), lambda: run.local.resume_part("kafka"), 10)


async def broker_restarted(run: Run) -> None:
    """The broker stops and starts again."""
    await _broker_fails(run, lambda: run.local.stop_part("kafka"), lambda: run.local.start_part("kafka"), 2)


async def broker_killed(run: Run) -> None:
    """The broker is killed and starts again."""
    await _broker_fails(run, lambda: run.local.kill_part("kafka"), lambda: run.local.start_part("kafka"), 1)


async def _broker_fails(run: Run, fail: Callable[[], None], mend: Callable[[], None], seconds: float) -> None:
    run.fleet.start(0)
    run.fleet.start(1)
    feeding = asyncio.create_task(run.feed(0.8, 20, transactions=False))
    await run.until_active()
    await asyncio.sleep(run.random.uniform(0, 3))
    await asyncio.to_thread(fail)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(mend)
    await feeding


async def changelog_refuses(run: Run) -> None:
    """The changelog takes no record for a while: the worker stops with an error, and nothing is committed past it."""
    await _topic_refuses(run, topics.INTERESTS_CHANGELOG)


async def requests_refused(run: Run) -> None:
    """The topic of refresh requests takes no record for a while."""
    await _topic_refuses(run, topics.REFRESH_REQUESTS)


async def _topic_refuses(run: Run, topic: str) -> None:
    worker = run.fleet.start()
    feeding = asyncio.create_task(run.feed(0.3, 4))
    await run.until_active()
    await feeding
    async with run.fleet.unsupervised():
        await asyncio.to_thread(run.alter_topic, topic, max_message_bytes=REFUSING)
        await run.feed(0.3, 4)
        await until(lambda: not worker.running, run.fleet.workers, 120)
        if worker.process.returncode != 1:
            run.remarks.append(f"the worker ended with {worker.process.returncode}, not with 1")
        await run.uncommitted_is_all_that_is_missing()
        await asyncio.to_thread(run.alter_topic, topic, max_message_bytes=limit_of(topic))


async def disk_deleted(run: Run) -> None:
    """The disk folder is gone when a killed worker comes back."""
    run.fleet.start()
    await _killed_amid(run)
    _check_disk(run)
    shutil.rmtree(run.fleet.state_folder(0))
    run.fleet.start()


async def disk_stale(run: Run) -> None:
    """An old copy of the disk folder stands in its place when a killed worker comes back."""
    folder = run.fleet.state_folder(0)
    run.fleet.start()
    await run.feed(0.3, 5)
    await run.drain()
    await run.fleet.stop()
    _check_disk(run)
    shutil.copytree(folder, folder.with_name("copy"))
    run.fleet.start()
    await _killed_amid(run)
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)
    run.fleet.start()


def _check_disk(run: Run) -> None:
    if not any(run.fleet.state_folder(0).rglob("*")):
        raise AssertionError("the worker left no disk store, so this case shows nothing")


async def _killed_amid(run: Run) -> None:
    feeding = asyncio.create_task(run.feed(0.3, 6))
    await run.until_active()
    await asyncio.sleep(run.random.uniform(1, 4))
    await run.kill(again=False)
    await feeding


async def disk_left_behind(run: Run) -> None:
    """A partition moves away from its disk, is worked on elsewhere, and comes back to the old disk."""
    run.fleet.start(0)
    feeding = asyncio.create_task(run.feed(0.3, 5))
    await run.until_active()
    await feeding
    await run.kill(0, again=False)
    run.fleet.start(1)
    feeding = asyncio.create_task(run.feed(0.3, 8))
    await run.until_active()
    await feeding
    await run.kill(1, again=False)
    run.fleet.start(0)
    feeding = asyncio.create_task(run.feed(0.2, 4))
    await run.until_active()
    await feeding


async def owner_killed_beside_a_standby(run: Run) -> None:
    """Two workers keep each other's stores warm; they are killed in turn, so that partitions go to a warm store."""
    run.fleet.start(0)
    run.fleet.start(1)
    for number in range(max(2, run.kills // 5)):
        feeding = asyncio.create_task(run.feed(0.8 / max(2, run.kills // 5), 8))
        await run.until_active()
        await asyncio.sleep(run.random.uniform(1, 4))
        await run.kill(number % 2, again=False)
        await run.until_active()
        run.fleet.start(number % 2)
        await feeding


async def topic_made_anew_between_runs(run: Run) -> None:
    """The watch topic is deleted and made again while no worker runs: counts go on, offsets begin at 0."""
    run.fleet.start()
    await run.feed(0.5, 5)
    await run.settled()
    await run.fleet.stop_all()
    await run.renew_topic(topics.WATCH_EVENTS)
    run.fleet.start()
    await run.feed(0.4, 4)


async def topic_made_anew_under_a_worker(run: Run) -> None:
    """The same while a worker runs: it must not take the new topic's offsets for those of the old one."""
    await _renewed_under_a_worker(run, topics.WATCH_EVENTS)


async def controls_made_anew_under_a_worker(run: Run) -> None:
    """The topic of controls is deleted and made again while a worker runs: none of the new ones may be passed over."""
    await _renewed_under_a_worker(run, topics.USER_CONTROLS)


async def _renewed_under_a_worker(run: Run, topic: str) -> None:
    run.fleet.start()
    await run.feed(0.5, 5)
    await run.settled()
    await run.renew_topic(topic)
    await run.feed(0.4, 12)


async def controls_interleaved(run: Run) -> None:
    """Many controls and ends of loaded histories among the events, while two workers are killed in turn."""
    run.fleet.start(0)
    run.fleet.start(1)
    for number in range(max(2, run.kills // 4)):
        feeding = asyncio.create_task(run.feed(0.2, 6))
        await run.until_active()
        await run.send(list(bootstrap_ends(run.settings.partitions)))
        await asyncio.sleep(run.random.uniform(0, 3))
        await run.kill(number % 2)
        await feeding


_EVERYWHERE = (
    killed_at_random_moments,
    one_of_two_killed,
    frozen_past_the_session,
)
_MEMORY = (
    frozen_while_opening,
    third_joins_and_leaves,
    changelog_refuses,
    requests_refused,
    topic_made_anew_between_runs,
    topic_made_anew_under_a_worker,
    controls_made_anew_under_a_worker,
    controls_interleaved,
)
_BROKER = (broker_paused, broker_restarted, broker_killed)
_DISK = (disk_deleted, disk_stale, disk_left_behind)
KEEPING = ("disk-stale", "disk-left-behind", "owner-killed-beside-a-standby")
"""Faults that show something only if the store that is there is gone on with."""

_PERSONAS = (
    personas.persona_workers_killed,
    personas.persona_worker_frozen,
    personas.personas_refused,
    personas.personas_removed,
    personas.cassandra_restarted,
    personas.triton_restarted,
)

CASES = [
    *(Case(s, intake, store) for s in _EVERYWHERE for intake in ("batch", "agent") for store in ("memory", "disk")),
    *(Case(s, intake) for s in _MEMORY for intake in ("batch", "agent")),
    *(Case(s, intake, "disk") for s in _DISK for intake in ("batch", "agent")),
    *(Case(owner_killed_beside_a_standby, intake, "disk", standbys=1) for intake in ("batch", "agent")),
    *(Case(s, intake, alone=True) for s in _BROKER for intake in ("batch", "agent")),
    *(Case(s, "batch", personas=True) for s in _PERSONAS),
    Case(personas.broker_paused_under_personas, "batch", alone=True, personas=True),
]
