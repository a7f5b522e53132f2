"""The persona side: workers, stores and the student fail while requests are answered."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from functools import partial

import orjson

from agents.kafka_log import KafkaLog
from agents.settings import Settings
from agents.stores.cassandra import CassandraStore
from agents.stores.ports import StoredPersona
from streams import topics
from streams.decoding import decode_persona, decode_request
from streams.records import Command, RefreshRequest, persona_version
from tests.builders import START
from tests.chaos.events import Message, asked
from tests.chaos.harness import REFUSING, SESSION_SECONDS, Run, limit_of
from tests.workers import by_key, finished, read, until

GATE = 20
HOUR = 3_600_000
ANSWERED_SECONDS = 400.0
HISTORY = 50
"""Versions kept of each viewer: more than a case makes, so that every one is compared."""
WATCH, FIRST, SECOND = 0, 1, 2
"""Places of the watch worker and of two persona workers."""


def persona_messages(seed: int, viewers: int, start: int = START) -> list[Message]:
    """Watches of two topics that no other viewer has together, enough for a template and for the student's persona.

    start: time of the first ones, ms.
    """
    messages = []
    for viewer in range(viewers):
        user = f"viewer-{viewer}"
        topic = (seed + viewer * 2) % 113
        other = (topic + 37 + viewer) % 113
        for i in range(GATE):
            event = {
                "user_id": user,
                "video_id": f"v{23 * (other if i % 2 else topic) + 1 + i:04}",
                "ts": start + i * HOUR,
                "event_id": f"{user}/{start}/{i}",
            }
            messages.append(Message(topics.WATCH_EVENTS, user.encode(), orjson.dumps(event)))
    return messages


async def persona_workers_killed(run: Run) -> None:
    """Two persona workers answer; each is killed at random moments and comes back."""
    await _start(run, FIRST, SECOND)
    feeding = asyncio.create_task(run.feed(1.0, 12))
    for number in range(max(2, run.kills // 3)):
        await _until_published(run, 1)
        await asyncio.sleep(run.random.uniform(0, 4))
        await run.kill(FIRST + number % 2)
    await feeding


async def persona_worker_frozen(run: Run) -> None:
    """One of two persona workers freezes until its requests have moved, all viewers ask anew, and it wakes up."""
    await _start(run, FIRST, SECOND)
    await run.feed(1.0, 6)
    await _until_published(run, 1)
    await asyncio.sleep(run.random.uniform(0, 2))
    run.fleet.signal(signal.SIGSTOP, FIRST)
    await run.send(asked(run.messages, "pin"))
    await asyncio.sleep(SESSION_SECONDS + 10)
    run.fleet.signal(signal.SIGCONT, FIRST)


async def personas_refused(run: Run) -> None:
    """The topic of personas takes none for a while."""
    await _start(run, FIRST)
    feeding = asyncio.create_task(run.feed(1.0, 12))
    await _until_published(run, 1)
    await asyncio.to_thread(run.alter_topic, topics.PERSONAS, max_message_bytes=REFUSING)
    await asyncio.sleep(12)
    await asyncio.to_thread(run.alter_topic, topics.PERSONAS, max_message_bytes=limit_of(topics.PERSONAS))
    await feeding


async def personas_removed(run: Run) -> None:
    """Viewers erase all or opt out while personas are written, a worker is killed, and some of them come back."""
    await _start(run, FIRST)
    await run.feed(1.0, 6)
    await _until_published(run, 2)
    half = len(run.messages) // 2
    gone = START + 2 * GATE * HOUR
    await run.send([*asked(run.messages[:half], "erase", gone), *asked(run.messages[half:], "opt_out", gone)])
    await asyncio.sleep(run.random.uniform(0, 2))
    await run.kill(FIRST)
    await run.send(persona_messages(run.random.randrange(113), 2, gone + HOUR))


async def cassandra_restarted(run: Run) -> None:
    """Cassandra stops while personas are stored, a persona worker is killed meanwhile, and Cassandra comes back."""
    await _part_fails(run, lambda: run.local.stop_part("cassandra"), lambda: run.local.start_part("cassandra"))


async def triton_restarted(run: Run) -> None:
    """Triton is killed while it words, a persona worker is killed meanwhile, and Triton comes back."""
    await _part_fails(run, lambda: run.local.kill_part("triton"), lambda: run.local.start_part("triton"))


async def broker_paused_under_personas(run: Run) -> None:
    """The broker does not answer for 10 s while personas are published."""

    def paused() -> None:
        run.local.pause_part("kafka")

    await _part_fails(run, paused, lambda: run.local.resume_part("kafka"), kill=False)


async def _part_fails(run: Run, fail: Callable[[], None], mend: Callable[[], None], *, kill: bool = True) -> None:
    await _start(run, FIRST)
    feeding = asyncio.create_task(run.feed(1.0, 12, transactions=False))
    await _until_published(run, 2)
    await asyncio.sleep(run.random.uniform(0, 2))
    await asyncio.to_thread(fail)
    await asyncio.sleep(5)
    if kill:
        await run.kill(FIRST)
    await asyncio.sleep(5)
    await asyncio.to_thread(mend)
    await feeding


async def _start(run: Run, *places: int) -> None:
    run.fleet.start(WATCH)
    for place in places:
        run.fleet.start(place, "persona")


async def _until_published(run: Run, more: int) -> None:
    """Wait for so many more personas; where nothing is left to answer, go on."""
    before = len(await asyncio.to_thread(read, run.settings, topics.PERSONAS))

    async def enough() -> bool:
        now = len(await asyncio.to_thread(read, run.settings, topics.PERSONAS))
        return now >= before + more or await _answered(run.settings)

    await until(enough, run.fleet.workers, ANSWERED_SECONDS, 0.5)


async def _answered(settings: Settings) -> bool:
    log = KafkaLog(settings)
    try:
        if not await finished(settings, log, topics.WATCH_APP, topics.WATCH_EVENTS):
            return False
        requested = len(await asyncio.to_thread(read, settings, topics.REFRESH_REQUESTS)) > 0
        names = (topics.REFRESH_REQUESTS, topics.UPGRADE_REQUESTS)
        return requested and all([await finished(settings, log, topics.PERSONA_APP, name) for name in names])
    finally:
        await log.close()


async def until_answered(run: Run) -> None:
    """Wait until every request, upgrades included, is committed."""
    await until(partial(_answered, run.settings), run.fleet.workers, ANSWERED_SECONDS, 1.0)


async def disagreements(settings: Settings) -> list[str]:
    """Viewers whose stored and published personas are not what their requests ask for, and why."""
    newest: dict[str, RefreshRequest] = {}
    for message in read(settings, topics.REFRESH_REQUESTS):
        request = decode_request(message.value())
        assert isinstance(request, RefreshRequest)
        known = newest.get(request.user_id)
        if known is None or (known.epoch, known.sequence) <= (request.epoch, request.sequence):
            newest[request.user_id] = request
    published = by_key(read(settings, topics.PERSONAS))
    store = await CassandraStore.connect(settings)
    try:
        found = [f"{user}: published without a request" for user in sorted(published.keys() - newest.keys())]
        for user, request in sorted(newest.items()):
            history, latest = await store.history(user, HISTORY), await store.latest(user)
            why = disagreement(request, history, latest, published.get(user, []))
            if why:
                found.append(f"{user}: {why}")
        return found
    finally:
        await store.close()


def disagreement(
    request: RefreshRequest, history: list[StoredPersona], latest: StoredPersona | None, published: list[bytes | None]
) -> str:
    """Why a viewer's newest request lacks exactly one version per tier, the same everywhere; "" if it does not.

    Of what was published only that behind the last removal counts: what was before is deleted from the store.
    """
    if request.command is not Command.REFRESH:
        left = latest is not None or bool(history) or not published or published[-1] is not None
        return f"{request.command}, but a persona is left" if left else ""
    published = published[len(published) - published[::-1].index(None) :] if None in published else published
    bodies = {row.version: row.body for row in history}
    answers = [
        persona for body in bodies.values() if (persona := decode_persona(body)).request_id == request.request_id
    ]
    if not answers:
        return f"request {request.sequence} has no version"
    if len({persona.tier for persona in answers}) < len(answers):
        return f"request {request.sequence} has two versions of one tier"
    if any(persona.version != persona_version(request.sequence, persona.tier) for persona in answers):
        return f"request {request.sequence} has a version of another number"
    if latest is None or not published or latest.body != published[-1]:
        return "the latest persona is not the published one"
    for body in published:
        persona = decode_persona(body or b"")
        if bodies.get(persona.version) != body:
            return f"version {persona.version} was published with other bytes than stored"
    out = {decode_persona(body or b"").version for body in published}
    if not {persona.version for persona in answers} <= out:  # an earlier request may be superseded once it is stored
        return "versions were stored and not published"
    return ""
