"""Answers refresh requests: coalesces per viewer, words, stores, publishes, and only then lets an offset go.

    request ─> newest per viewer ─> cache ──> budget ──> student ──> teacher ──> text ──┐
                                      └─────────┴───────────┴───────────┴──> template ──┴──> store ──> personas ──> done

The teacher, if there is one, words what the student cannot; a chosen request goes to it first: see `agents.cascade`.
Plain asyncio over small ports: the Faust app and the replay driver feed the same object. A persona is stored before it
is published, so a restart publishes the very bytes that were stored.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Final, TypeAlias, TypeVar

from agents.budget_gate import BudgetGate
from agents.cascade import Cascade, Written
from agents.stores.ports import PersonaStore, StoredPersona, StoreError, StoreRejected, StoreUnavailable
from agents.student_client import StudentClient
from agents.teacher_client import TeacherClient
from agents.telemetry import (
    COALESCED,
    DEAD_LETTERS,
    PERSONA_SECONDS,
    PERSONAS,
    REMOVALS,
    STORE_SECONDS,
    AttributeValue,
    Telemetry,
)
from agents.writer_configuration import WriterConfiguration, pause_seconds
from streams import topics
from streams.budget import Ticket, priority
from streams.columns import Headers
from streams.dead_letters import dead_letter
from streams.decoding import Rejected, RejectReason, UnreadableRecordError, decode_persona, decode_request, printable
from streams.personas import (
    ErasureReceipt,
    compose,
    receipt_key,
)
from streams.records import Command, Persona, RefreshRequest, Tier, encode, removal_version
from streams.tasks import MAXIMUM_INTERESTS, MAXIMUM_NOVEL
from streams.watch import InputRecord, Output

MAXIMUM_PERSONA_BYTES: Final = 1_000_000
"""A larger one would be refused by the broker after it was stored."""
VERSIONS_PER_SEQUENCE: Final = 8
ERASED_STORES: Final = ("personas_by_user", "persona_history", topics.PERSONAS)
REMOVED: Final = ("reason", b"removed")
_REASONS: Final = {Command.ERASE: "erased", Command.OPT_OUT: "opted_out"}

logger = logging.getLogger(__name__)

T = TypeVar("T")
Publish: TypeAlias = Callable[[Sequence[Output]], Awaitable[None]]
"""Produces outputs in order; returns when every one is acknowledged, raises what failed."""
Done: TypeAlias = Callable[[str, int, int], None]
"""(topic without prefix, partition, offset): this record and every earlier one of its partition are finished."""


class WriterStopped(Exception):  # noqa: N818 - a state of the writer
    """The writer takes no more records: it was stopped."""


class Outcome(StrEnum):
    """What became of a request; each has exactly one."""

    STUDENT = "student"
    TEACHER = "teacher"
    TEMPLATE = "template"
    REPUBLISHED = "republished"  # stored by an earlier attempt; the same bytes went out again
    SUPERSEDED = "superseded"
    REMOVED = "removed"
    UPGRADED = "upgraded"
    NOT_UPGRADED = "not_upgraded"  # the template is gone, or stays
    DEAD_LETTER = "dead_letter"


_OUTCOMES: Final = {
    Tier.TEMPLATE: Outcome.TEMPLATE,
    Tier.STUDENT: Outcome.STUDENT,
    Tier.TEACHER: Outcome.TEACHER,
}


class OrderedAcks:
    """One partition's records: they finish in any order and are reported in offset order. Offsets may have gaps."""

    def __init__(self, report: Callable[[int], None]) -> None:
        """`report` is called with each offset once it and every earlier one are finished."""
        self._report = report
        self._finished: dict[int, bool] = {}  # in offset order
        self._last = -1
        self.next_offset: int | None = None
        """First offset that may not be committed yet; None before the first report."""

    def start(self, offset: int) -> None:
        """Take a record. Raises ValueError unless its offset is above all before it."""
        if offset <= self._last:
            raise ValueError(f"offset {offset} after {self._last}")
        self._finished[offset] = False
        self._last = offset

    def finish(self, offset: int) -> None:
        """Mark a record as finished, and report what is no longer waiting for an earlier one."""
        self._finished[offset] = True
        while self._finished:
            first = next(iter(self._finished))
            if not self._finished[first]:
                return
            del self._finished[first]
            self.next_offset = first + 1
            self._report(first)

    @property
    def first(self) -> int | None:
        """The earliest offset that is not finished; None if all are."""
        return next(iter(self._finished), None)

    @property
    def held(self) -> int:
        """Offsets taken and not reported."""
        return len(self._finished)

    def started(self, offset: int) -> bool:
        """Whether this offset, or a later one, was taken."""
        return offset <= self._last


@dataclass(slots=True)
class _Intake:
    """A request topic: its free places, its partitions, and how often each was given up."""

    topic: str
    slots: asyncio.Semaphore
    partitions: dict[int, OrderedAcks] = field(default_factory=dict)
    revocations: Counter[int] = field(default_factory=Counter)


@dataclass(eq=False, slots=True)
class _Job:
    """A request being answered. landing: past the point where a newer request may cancel it.

    waiting: ends the wait for the budget, while there is one.
    """

    request: RefreshRequest
    record: InputRecord
    partition: int
    intake: _Intake
    acks: OrderedAcks
    landing: bool = False
    superseded: bool = False
    waiting: asyncio.Timeout | None = None
    task: asyncio.Task[Outcome] | None = None

    @property
    def is_upgrade(self) -> bool:
        return self.intake.topic == topics.UPGRADE_REQUESTS

    def yields_to(self, newer: RefreshRequest) -> bool:
        """A removal never yields: what it removes must go."""
        return self.request.command is Command.REFRESH and self.request.sequence <= newer.sequence


@dataclass(slots=True)
class _Lane:
    """One viewer's requests: at most one is being answered."""

    waiting: deque[_Job] = field(default_factory=deque)
    running: _Job | None = None


class PersonaWriter:
    """Answers requests. Make it inside a running loop; feed it with `submit`, await `run` beside it, end with `stop`.

    Errors that no retry mends stop it: `run`, `submit` and `idle` raise them, and nothing further is reported as done.
    """

    def __init__(
        self,
        store: PersonaStore,
        student: StudentClient | None,
        publish: Publish,
        configuration: WriterConfiguration,
        clock: Callable[[], int],
        telemetry: Telemetry,
        on_done: Done,
        teacher: TeacherClient | None = None,
    ) -> None:
        """`student` None writes templates only, whatever the teacher; `clock` gives milliseconds UTC."""
        self.counts: Counter[Outcome] = Counter()
        self._store = store
        self._publish = publish
        self._configuration = configuration
        self._clock = clock
        self._telemetry = telemetry
        self._on_done = on_done
        self._cascade = Cascade(self._wordings, student, teacher, configuration, telemetry)
        self._gate = _gate_of(configuration, telemetry) if student else None
        # Those that wait for the budget take no place from the others: a removal behind them is read and done.
        places = configuration.look_ahead + (configuration.budget_look_ahead if self._gate else 0)
        self._refreshes = _Intake(topics.REFRESH_REQUESTS, asyncio.Semaphore(places))
        self._upgrades = _Intake(topics.UPGRADE_REQUESTS, asyncio.Semaphore(configuration.upgrade_look_ahead))
        self._lanes: dict[str, _Lane] = {}
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._ended_event = asyncio.Event()
        self._failure: BaseException | None = None
        self._stopping = False
        self._store_failing = 0

    # Intake

    async def submit(self, record: InputRecord, partition: int) -> None:
        """Take a record of the refresh requests; waits while too many are unfinished. Call it in offset order.

        Raises WriterStopped, or what the writer failed with.
        """
        await self._submit(self._refreshes, record, partition)

    async def submit_upgrade(self, record: InputRecord, partition: int) -> None:
        """Take a record of the upgrade requests, as `submit` does. Upgrades wait as long as the student is away."""
        await self._submit(self._upgrades, record, partition)

    def next_offset(self, topic: str, partition: int) -> int | None:
        """First offset of a request topic's partition that may not be committed yet; None if none was finished."""
        acks = self._intake(topic).partitions.get(partition)
        return acks.next_offset if acks else None

    @property
    def student_available(self) -> bool:
        """False while the student does not answer. True without a student: templates need none."""
        return self._cascade.student_available

    @property
    def wording_figures(self) -> Mapping[str, int]:
        """What each tier worded and took since the start: see `Cascade.figures`."""
        return self._cascade.figures

    @property
    def store_available(self) -> bool:
        """False while a store operation is being retried."""
        return not self._store_failing

    def set_share(self, share: float) -> None:
        """Spend only this share (0..1) of the budget from now on: that of the partitions that are read here."""
        if self._gate is not None:
            self._gate.set_share(share)

    def set_student(self, student_id: str) -> None:
        """Look cached texts up as those of this student (name/version), unless an answer told its name already."""
        self._cascade.set_student(student_id)

    async def run(self) -> None:
        """Wait until the writer ends: returns after `stop`, raises what it failed with."""
        await self._ended_event.wait()
        self._raise_failure()

    async def idle(self) -> None:
        """Wait until everything submitted is finished. Raises what the writer failed with."""
        await self._quiet.wait()
        self._raise_failure()

    async def revoke(self, topic: str, partitions: Iterable[int]) -> None:
        """Give up partitions: their requests are cancelled and not reported; the next owner answers them."""
        intake, gone = self._intake(topic), set(partitions)
        for partition in gone:
            intake.revocations[partition] += 1
            intake.partitions.pop(partition, None)
        await self._abandon([job for job in self._jobs() if job.intake is intake and job.partition in gone])

    async def stop(self, deadline_seconds: float) -> None:
        """Take nothing more, let what was taken finish until the deadline, cancel the rest: it is not reported."""
        self._stopping = True
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_seconds):
                await self._quiet.wait()
        await self._abandon(self._jobs())
        self._ended_event.set()

    async def _submit(self, intake: _Intake, record: InputRecord, partition: int) -> None:
        acks = intake.partitions.get(partition)
        if acks is not None and acks.started(record.offset):
            # Delivered again from the last commit, as after a rebalance: all of the partition starts over.
            await self.revoke(intake.topic, [partition])
        self._require_running()
        revocations = intake.revocations[partition]
        await intake.slots.acquire()
        kept = False
        try:
            self._require_running()
            if intake.revocations[partition] != revocations:
                return  # given up while this waited: the next owner reads it
            acks = intake.partitions.setdefault(partition, OrderedAcks(partial(self._on_done, intake.topic, partition)))
            acks.start(record.offset)
            request = read_request(record.value)
            if isinstance(request, Rejected):
                await self._reject(intake, record, partition, request)
                acks.finish(record.offset)
                return
            self._enqueue(_Job(request, record, partition, intake, acks))
            kept = True
            if intake is self._refreshes and acks.held > self._configuration.budget_holds_back:
                self._hurry(acks)
        finally:
            if not kept:
                intake.slots.release()

    def _enqueue(self, job: _Job) -> None:
        lane = self._lanes.setdefault(job.request.user_id, _Lane())
        self._quiet.clear()
        if not job.is_upgrade:
            self._supersede(lane, job.request)
        lane.waiting.append(job)
        self._start_next(lane)

    def _supersede(self, lane: _Lane, newer: RefreshRequest) -> None:
        for job in [job for job in lane.waiting if job.yields_to(newer)]:
            lane.waiting.remove(job)
            self._finish(job, Outcome.SUPERSEDED)
        running = lane.running
        if running is not None and running.task is not None and not running.landing and running.yields_to(newer):
            running.superseded = True
            running.task.cancel()

    def _hurry(self, acks: OrderedAcks) -> None:
        """Let the request that holds back its partition's offsets wait for the budget no longer."""
        for job in self._jobs():
            first = job.acks is acks and job.record.offset == acks.first
            if first and job.waiting is not None and not job.waiting.expired():
                job.waiting.reschedule(asyncio.get_running_loop().time())

    def _start_next(self, lane: _Lane) -> None:
        if lane.running is not None or not lane.waiting:
            return
        job = lane.running = lane.waiting.popleft()
        job.landing = job.request.command is not Command.REFRESH
        job.task = asyncio.create_task(self._handle(job))
        job.task.add_done_callback(partial(self._on_ended, lane, job))

    def _on_ended(self, lane: _Lane, job: _Job, task: asyncio.Task[Outcome]) -> None:
        lane.running = None
        if not task.cancelled() and (error := task.exception()) is not None:
            job.intake.slots.release()
            self._fail(error)
        elif not task.cancelled():
            self._finish(job, task.result())
        elif job.superseded:
            self._finish(job, Outcome.SUPERSEDED)
        else:
            job.intake.slots.release()
        self._start_next(lane)
        if lane.running is None:
            self._lanes.pop(job.request.user_id, None)
        if not self._lanes:
            self._quiet.set()

    def _finish(self, job: _Job, outcome: Outcome) -> None:
        self.counts[outcome] += 1
        if outcome is Outcome.SUPERSEDED:
            self._telemetry.count(COALESCED)
        job.intake.slots.release()
        # A partition that was given up has other acknowledgements, or none.
        if self._failure is not None or job.intake.partitions.get(job.partition) is not job.acks:
            return
        try:
            job.acks.finish(job.record.offset)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self._failure is not None:
            return
        self._failure = error
        self._ended_event.set()
        for job in self._jobs():
            self._drop(job)

    async def _abandon(self, jobs: Sequence[_Job]) -> None:
        tasks = [job.task for job in jobs if job.task is not None]
        for job in jobs:
            self._drop(job)
        if tasks:
            await asyncio.wait(tasks)

    def _drop(self, job: _Job) -> None:
        if job.task is not None:
            job.superseded = False
            job.task.cancel()
            return
        lane = self._lanes[job.request.user_id]
        lane.waiting.remove(job)
        job.intake.slots.release()

    def _jobs(self) -> list[_Job]:
        """Every unfinished job, waiting ones first."""
        waiting = [job for lane in self._lanes.values() for job in lane.waiting]
        return waiting + [lane.running for lane in self._lanes.values() if lane.running is not None]

    def _intake(self, topic: str) -> _Intake:
        for intake in (self._refreshes, self._upgrades):
            if intake.topic == topic:
                return intake
        raise ValueError(f"{topic!a} is not a request topic")

    def _require_running(self) -> None:
        self._raise_failure()
        if self._stopping:
            raise WriterStopped("the persona writer was stopped")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    # One request

    async def _handle(self, job: _Job) -> Outcome:
        request = job.request
        attributes: dict[str, AttributeValue] = {
            "rule": str(request.rule),
            "command": str(request.command),
            "upgrade": job.is_upgrade,
        }
        parent = self._telemetry.extract(job.record.headers)
        with self._telemetry.span("persona.request", parent, attributes):
            try:
                if request.command is not Command.REFRESH:
                    return await self._remove(job)
                if job.is_upgrade:
                    return await self._upgrade(job)
                return await self._refresh(job)
            except StoreRejected as error:
                rejected = Rejected(RejectReason.TOO_LARGE, printable(str(error)))
                await self._reject(job.intake, job.record, job.partition, rejected)
                return Outcome.DEAD_LETTER

    async def _refresh(self, job: _Job) -> Outcome:
        request = job.request
        latest = await self._latest(request.user_id)
        if latest is not None and _answers(latest, request):
            return await self._republish(job, latest)
        if latest is not None and _stands_above(latest, request):
            return Outcome.SUPERSEDED
        written = await self._write(job)
        landed = await self._land(job, written, _previous(latest))
        await self._cache(written.rows)
        return _OUTCOMES[written.tier] if landed else Outcome.SUPERSEDED

    async def _upgrade(self, job: _Job) -> Outcome:
        request = job.request
        latest = await self._latest(request.user_id)
        if latest is None or not _answers(latest, request) or not self._cascade.wants_student(request):
            return Outcome.NOT_UPGRADED
        if latest.tier != Tier.TEMPLATE:
            return await self._republish(job, latest)
        written = await self._within_budget(job, None)
        landed = written.tier is not Tier.TEMPLATE and await self._land(job, written, _previous(latest))
        await self._cache(written.rows)
        return Outcome.UPGRADED if landed else Outcome.NOT_UPGRADED

    async def _republish(self, job: _Job, stored: StoredPersona) -> Outcome:
        """Publish stored bytes again: it is not known whether they went out before the last stop."""
        job.landing = True
        again = stored.tier == Tier.TEMPLATE and self._cascade.wants_student(job.request)
        await self._publish_persona(job, stored.body, upgrade=again)
        await self._settle(job, stored.body)
        return Outcome.REPUBLISHED

    async def _remove(self, job: _Job) -> Outcome:
        request = job.request
        version = removal_version(request.sequence)
        await self._stored("remove_user", lambda: self._store.remove_user(request.user_id, version))
        left = await self._latest(request.user_id)
        if left is not None and left.epoch < request.epoch:
            # Sequences started over, as when Kafka's topics were deleted: a removal must still remove.
            version = removal_version(left.version // VERSIONS_PER_SEQUENCE)
            logger.warning("request %s removes a persona of a later sequence", request.request_id)
            await self._stored("remove_user", lambda: self._store.remove_user(request.user_id, version))
        reason = _REASONS[request.command]
        key = request.user_id.encode()
        headers = (("reason", reason.encode()), *self._trace())
        outputs = [Output(topics.PERSONAS, key, None, headers, job.partition)]
        if request.command is Command.ERASE:
            outputs.append(self._receipt(request, version))
        await self._publish(outputs)
        await self._settle(job, None)
        self._telemetry.count(REMOVALS, 1, reason)
        return Outcome.REMOVED

    def _receipt(self, request: RefreshRequest, version: int) -> Output:
        key = receipt_key(request.user_id)
        receipt = ErasureReceipt(key, request.epoch, version, request.request_id, self._clock(), ERASED_STORES)
        return Output(topics.ERASURE_RECEIPTS, key.encode(), encode(receipt))

    # Wording

    async def _write(self, job: _Job) -> Written:
        request = job.request
        if not self._cascade.wants_student(request):
            return self._cascade.plain(request)
        remaining_ms = job.record.timestamp + request.expires_after_ms - self._clock()
        return await self._within_budget(job, remaining_ms / 1000)

    async def _within_budget(self, job: _Job, remaining_seconds: float | None) -> Written:
        """A model's texts once the budget lets the student word them, plain ones if it does not in time.

        What needs no tokens of the student does not wait.
        """
        request, loop = job.request, asyncio.get_running_loop()
        deadline = None if remaining_seconds is None else loop.time() + remaining_seconds

        def left() -> float | None:
            return None if deadline is None else deadline - loop.time()

        answers = await self._cascade.taught(request, remaining_seconds)
        # Now, as the request may wait for hours and be superseded, and these are paid.
        await self._cache(answers.taught_rows)
        texts = await self._cascade.texts_to_pay(request, answers) if self._gate is not None else 0
        if self._gate is None or not texts:
            return await self._cascade.worded(request, left(), answers)
        ticket = await self._turn_of(job, self._gate, texts, deadline)
        if ticket is None:
            return await self._cascade.worded(request, 0.0, answers)
        interrupted = True
        try:
            # The cache is read again: others may have worded the same texts meanwhile.
            written = await self._cascade.worded(request, left(), answers)
            # A template may have run out of time: what the student worked for beyond its answers is not known then.
            interrupted = written.tier is Tier.TEMPLATE
            return written
        finally:
            tokens = answers.student.tokens_in + answers.student.tokens_out
            self._gate.leave(ticket, tokens, len(answers.asked), interrupted=interrupted)

    async def _turn_of(self, job: _Job, gate: BudgetGate, texts: int, deadline: float | None) -> Ticket | None:
        """The ticket that lets a request on to the student; None if none came in time."""
        try:
            async with asyncio.timeout_at(deadline) as job.waiting:
                return await gate.enter(priority(job.request, texts, upgrade=job.is_upgrade), texts)
        except TimeoutError:
            return None
        finally:
            job.waiting = None

    # Storing and publishing

    async def _land(self, job: _Job, written: Written, previous: Persona | None) -> bool:
        """Store and publish. False if a removal or a newer persona stands above this one."""
        request = written.request
        persona = compose(
            request,
            written.texts,
            previous,
            tier=written.tier,
            model=written.model,
            cached=written.cached,
            generated_at=self._clock(),
        )
        body = encode(persona)
        if len(body) > MAXIMUM_PERSONA_BYTES:
            raise StoreRejected(f"persona of {len(body)} bytes, more than {MAXIMUM_PERSONA_BYTES}")
        row = StoredPersona(
            request.user_id, persona.version, request.epoch, request.request_id, str(persona.tier), body
        )
        job.landing = True
        latest = await self._latest(request.user_id)
        # Another owner of the partition may have answered while this worker was frozen: what is stored stays.
        if latest is None or latest.version != row.version or not _answers(latest, request):
            with self._telemetry.span("store.write"):
                await self._stored("put", lambda: self._store.put(row))
            latest = await self._latest(request.user_id)
        if latest is None or latest.version != row.version:
            return False
        await self._publish_persona(job, latest.body, upgrade=written.upgrade)
        await self._settle(job, latest.body)
        self._telemetry.count(PERSONAS, 1, row.tier)
        delay = max(0, self._clock() - job.record.timestamp) / 1000
        self._telemetry.observe(PERSONA_SECONDS, delay, row.tier)
        return True

    async def _publish_persona(self, job: _Job, body: bytes, *, upgrade: bool) -> None:
        key = job.request.user_id.encode()
        trace = self._trace()
        outputs = [Output(topics.PERSONAS, key, body, trace, job.partition)]
        if upgrade:
            outputs.append(Output(topics.UPGRADE_REQUESTS, key, job.record.value, trace, job.partition))
        await self._publish(outputs)

    async def _settle(self, job: _Job, published: bytes | None) -> None:
        """Publish what is stored by now, if it is not what was published.

        This worker may have been frozen before it published, and another one gone on with its partitions meanwhile.
        Everyone stores, publishes and then looks, so the last record of a viewer is what is stored of them.
        """
        while (body := _body(await self._latest(job.request.user_id))) != published:
            headers = self._trace() if body is not None else (REMOVED, *self._trace())
            await self._publish([Output(topics.PERSONAS, job.request.user_id.encode(), body, headers, job.partition)])
            published = body

    async def _cache(self, rows: Mapping[str, bytes]) -> None:
        """Cache wordings, at most once: no persona waits for it, and a text that is not cached is only worded again."""
        if not rows:
            return
        try:
            await self._store.put_wordings(rows)
        except StoreError as error:
            logger.warning("%d wordings were not cached: %s", len(rows), error)

    async def _latest(self, user_id: str) -> StoredPersona | None:
        return await self._stored("latest", lambda: self._store.latest(user_id))

    async def _wordings(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        return await self._stored("wordings", lambda: self._store.wordings(keys))

    async def _stored(self, operation: str, call: Callable[[], Awaitable[T]]) -> T:
        """A store operation, tried again while the store is unavailable. Raises StoreUnavailable past the patience."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._configuration.store_patience_seconds
        failures = 0
        try:
            while True:
                started = loop.time()
                try:
                    result = await call()
                except StoreUnavailable as error:
                    self._telemetry.observe(STORE_SECONDS, loop.time() - started, operation, "unavailable")
                    if not failures:
                        self._store_failing += 1
                    failures += 1
                    pause = pause_seconds(failures, self._configuration)
                    if loop.time() + pause > give_up:
                        raise
                    logger.warning("%s is tried again in %.1f s: %s", operation, pause, error)
                    await asyncio.sleep(pause)
                else:
                    self._telemetry.observe(STORE_SECONDS, loop.time() - started, operation, "ok")
                    return result
        finally:
            if failures:
                self._store_failing -= 1

    async def _reject(self, intake: _Intake, record: InputRecord, partition: int, rejected: Rejected) -> None:
        topic = self._configuration.topic_prefix + intake.topic
        letter = dead_letter(rejected, topic, partition, record.offset, record.key, record.value)
        key = f"{topic}/{partition}/{record.offset}".encode()
        await self._publish([Output(topics.dead_letters_of(topics.REFRESH_REQUESTS), key, encode(letter))])
        self._telemetry.count(DEAD_LETTERS, 1, intake.topic, rejected.reason)
        logger.warning("%s is a dead letter: %s: %s", key.decode(), rejected.reason, rejected.detail)

    def _trace(self) -> Headers:
        return tuple(self._telemetry.inject())


def read_request(value: bytes | None) -> RefreshRequest | Rejected:
    """A request that can be answered: decoded strictly, with no more items than a persona has."""
    request = decode_request(value)
    if isinstance(request, Rejected) or request.context is None:
        return request
    interests, novel = len(request.context.interests), len(request.context.novel)
    if interests > MAXIMUM_INTERESTS or novel > MAXIMUM_NOVEL:
        detail = f"{interests} interests and {novel} topics, at most {MAXIMUM_INTERESTS} and {MAXIMUM_NOVEL}"
        return Rejected(RejectReason.OUT_OF_RANGE, detail)
    return request


def _gate_of(configuration: WriterConfiguration, telemetry: Telemetry) -> BudgetGate | None:
    if not configuration.budget_tokens_per_hour:
        return None
    return BudgetGate(
        configuration.budget_tokens_per_hour,
        waiting_limit=configuration.budget_look_ahead,
        running_limit=configuration.budget_in_flight,
        telemetry=telemetry,
    )


def _answers(stored: StoredPersona, request: RefreshRequest) -> bool:
    return stored.request_id == request.request_id and stored.epoch == request.epoch


def _stands_above(stored: StoredPersona, request: RefreshRequest) -> bool:
    """Whether a stored persona is of a later epoch or request. One of the same sequence would tie: it stays as well."""
    return stored.epoch > request.epoch or stored.version // VERSIONS_PER_SEQUENCE >= request.sequence


def _body(stored: StoredPersona | None) -> bytes | None:
    return None if stored is None else stored.body


def _previous(stored: StoredPersona | None) -> Persona | None:
    if stored is None:
        return None
    try:
        return decode_persona(stored.body)
    except UnreadableRecordError as error:
        logger.warning("the stored persona of request %s is taken as absent: %s", stored.request_id, error)
        return None
