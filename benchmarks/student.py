"""How many personas a second the student words on this machine, beside llama.cpp's own server; and what overload does.

    python -m benchmarks.student              # both, about 20 minutes; the first time llama.cpp is built, 10 to 20 more
    python -m benchmarks.student --quick      # a first look: one round of few texts
    python -m benchmarks.student --overload   # overload alone, without llama.cpp
    python -m benchmarks.student --write      # also rewrites benchmarks/student.md

The student is served as in production: Triton, its Python backend, OpenVINO, asked through the workers' own client.
llama.cpp's server has the same weights file, prompts, grammars and token limits. No wording cache is involved.
Ends with one JSON object; a missed bar is reported, and the exit status is 0. It is 1 if something failed.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from statistics import fmean, median
from types import FrameType
from typing import Any, Final, TypeVar

import aiohttp
import numpy as np

from agents.clusters.embedding import Embedder, MiniLM
from agents.evaluation.cases import Case
from agents.evaluation.stack import started_triton
from agents.evaluation.viewers import Platform, held_out_platforms, packaged_cases
from agents.localstack import LocalStackError
from agents.localstack.assets import assets_folder, student_weights_path, tokenizer_path
from agents.localstack.ports import Ports
from agents.localstack.progress import shown_progress
from agents.settings import Settings
from agents.student_client import Answer, StudentClient, StudentFailed, StudentUnavailable, TritonStudent
from benchmarks.llama_cpp import (
    BUILD_OPTIONS,
    PACKAGE,
    SERVER_OPTIONS,
    VERSION,
    LlamaCppError,
    LlamaCppStudent,
    ensure_server,
    started_server,
)
from benchmarks.throughput.command import publish
from benchmarks.throughput.report import machine
from streams.personas import content_keys, plan
from streams.prompts import Prompt, build_prompt
from streams.tasks import INTEREST_KEYS, SUMMARY_KEY, WordingTask, split_task, task_keys
from streams.wording import WordingRejected, parse_wording

T = TypeVar("T")

TEXTS: Final = {1: 24, 8: 96, 32: 192}
"""Texts a round, by how many are in flight."""
QUICK_TEXTS: Final = {1: 6, 8: 24, 32: 64}
WARM_UP: Final = 32
"""Texts worded before the first round, by each server."""
ROUNDS: Final = 3
BAR_AT: Final = (8, 32)
BAR: Final = 2.0
BAR_TEXT: Final = f"at least {BAR:g} times llama.cpp at {' and '.join(map(str, BAR_AT))} in flight"
VIEWERS: Final = 4
"""Simulated viewers of each held-out catalogue in a round: one of each slice."""
SEED: Final = 71
DEADLINE_SECONDS: Final = 300.0
READY_SECONDS: Final = 120.0
PACKAGES: Final = ("openvino-genai", "nvidia-pytriton", "tritonclient")
OURS: Final = "ours"
LLAMA_CPP: Final = "llama.cpp"

LIMIT: Final = 16
"""`maximum_in_flight` under which overload is measured: that of config.pbtxt."""
OFFERED: Final = 4 * LIMIT
OVERLOAD_TEXTS: Final = 160
RETRY_SECONDS: Final = 0.25
FREED_TRIES: Final = 3
EXPIRE_SECONDS: Final = 1.0
POLL_SECONDS: Final = 0.01
LONG_PROMPT: Final = Prompt("Tell a very long story about the sea. It began", "", 512, "")

FOLDER: Final = "bench-llama"
"""In the data folder: llama.cpp's source and build."""
RESULTS: Final = Path(__file__).parent / "student.md"


@dataclass(frozen=True, slots=True)
class Text:
    """One text to be worded. kind: summary, interest or topic."""

    kind: str
    piece: WordingTask
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Run:
    """A round of one server at one number in flight. seconds: from the first request to the last answer."""

    seconds: float
    answers: Sequence[tuple[Text, Answer]]

    @property
    def per_second(self) -> float:
        """Texts a second."""
        return len(self.answers) / self.seconds


@dataclass(frozen=True, slots=True)
class Figures:
    """What rounds come to. runs: by server and number in flight, one a round; mix: texts of each kind in a persona."""

    runs: Mapping[str, Mapping[int, Sequence[Run]]]
    mix: Mapping[str, float]

    @property
    def texts_per_persona(self) -> float:
        """Texts of a persona, on average."""
        return sum(self.mix.values())

    def per_second(self, server: str, in_flight: int) -> float:
        """Personas a second, the median of rounds."""
        return median(run.per_second for run in self.runs[server][in_flight]) / self.texts_per_persona

    def ratio(self) -> float:
        """Ours by llama.cpp's, the lower of those that the bar is about."""
        return min(self.per_second(OURS, n) / self.per_second(LLAMA_CPP, n) for n in BAR_AT)

    def answers(self, server: str, in_flight: int | None = None) -> list[tuple[Text, Answer]]:
        """Of all rounds; of one number in flight, or of all."""
        chosen = self.runs[server] if in_flight is None else {in_flight: self.runs[server][in_flight]}
        return [answer for runs in chosen.values() for run in runs for answer in run.answers]

    def passed(self, server: str) -> float:
        """Share of first answers that pass the gate."""
        return fmean(passes(text.piece, answer.text) for text, answer in self.answers(server))

    def tokens(self, server: str) -> tuple[float, float]:
        """Tokens in and out of a persona."""
        answers = [answer for _, answer in self.answers(server)]
        return (
            fmean(answer.tokens_in for answer in answers) * self.texts_per_persona,
            fmean(answer.tokens_out for answer in answers) * self.texts_per_persona,
        )

    def same(self, what: Callable[[Answer], object]) -> float:
        """Share of prompts about which both servers say the same."""
        theirs = {text.prompt.text: what(answer) for text, answer in self.answers(LLAMA_CPP)}
        return fmean(what(answer) == theirs[text.prompt.text] for text, answer in self.answers(OURS))

    def document(self) -> dict[str, Any]:
        """One JSON object."""
        rates = {
            server: {str(n): round(self.per_second(server, n), 3) for n in runs} for server, runs in self.runs.items()
        }
        ratio = round(self.ratio(), 3)
        return {
            "ours_per_s": rates[OURS],
            "llama_cpp_per_s": rates[LLAMA_CPP],
            "ratio": ratio,
            "bars_met": {BAR_TEXT: ratio >= BAR},
            "texts_per_persona": round(self.texts_per_persona, 2),
            "gate_passed": {server: round(self.passed(server), 4) for server in self.runs},
            "tokens_per_persona": {server: [round(t, 1) for t in self.tokens(server)] for server in self.runs},
            "latency_ms": {
                server: {str(n): _p50_p95([a.latency_ms for _, a in self.answers(server, n)]) for n in runs}
                for server, runs in self.runs.items()
            },
        }


@dataclass(frozen=True, slots=True)
class Overload:
    """What more requests than are admitted do. full: at the limit; over: with OFFERED callers, who try again.

    refusals_ms: how long each refusal took; cancelled_ms, expired_ms: from when all callers had gone, or had been told
    that their time was over, until the server had no request left, one a try.
    """

    full: Run
    over: Run
    refusals_ms: Sequence[float]
    cancelled_ms: Sequence[float]
    expired_ms: Sequence[float]

    def document(self) -> dict[str, Any]:
        """One JSON object."""
        refused50, refused99 = np.quantile(self.refusals_ms, (0.5, 0.99)) if self.refusals_ms else (np.nan, np.nan)
        return {
            "limit": LIMIT,
            "callers": OFFERED,
            "refusals": len(self.refusals_ms),
            "refused_p50_ms": round(float(refused50), 1),
            "refused_p99_ms": round(float(refused99), 1),
            "admitted_ms_full": _p50_p95([answer.latency_ms for _, answer in self.full.answers]),
            "admitted_ms_over": _p50_p95([answer.latency_ms for _, answer in self.over.answers]),
            "texts_per_s_full": round(self.full.per_second, 2),
            "texts_per_s_over": round(self.over.per_second, 2),
            "cancelled_freed_ms": [round(value) for value in self.cancelled_ms],
            "expired_freed_ms": [round(value) for value in self.expired_ms],
        }


# --- what is worded --------------------------------------------------------------------------------------------------


class TooFewTextsError(RuntimeError):
    """The contexts hold fewer different prompts than are asked for."""


class Pool:
    """Texts of contexts, each prompt once, in a random order, drawn in the mix that whole personas have."""

    def __init__(self, cases: Sequence[Case], seed: int, seen: set[str]) -> None:
        """seen: prompts that were worded already; those of this pool are added."""
        texts = [texts_of_case(case) for case in cases]
        counts = Counter(text.kind for own in texts for text in own)
        self.mix = {kind: count / len(cases) for kind, count in counts.items()}
        self._waiting: dict[str, list[Text]] = {kind: [] for kind in counts}
        for text in (text for own in texts for text in own):
            if text.prompt.text not in seen:
                seen.add(text.prompt.text)
                self._waiting[text.kind].append(text)
        self._random = np.random.default_rng(seed)
        for waiting in self._waiting.values():
            self._random.shuffle(waiting)  # type: ignore[arg-type]

    def draw(self, count: int) -> list[Text]:
        """So many texts that were not drawn before. Raises TooFewTextsError."""
        shares = apportioned(count, self.mix)
        for kind, wanted in shares.items():
            left = len(self._waiting[kind])
            if wanted > left:
                raise TooFewTextsError(f"{wanted} different prompts of kind {kind} are wanted, {left} are left")
        drawn = [self._waiting[kind].pop() for kind, wanted in shares.items() for _ in range(wanted)]
        self._random.shuffle(drawn)  # type: ignore[arg-type]
        return drawn


def texts_of_case(case: Case) -> list[Text]:
    """All that the student is asked for when nothing of a request is cached, as the cascade asks."""
    task = plan(case.request, content_keys(case.request, "student"), {}).task
    if task is None:
        return []
    return [Text(_kind(piece), piece, build_prompt(piece)) for piece in split_task(task)]


def apportioned(count: int, shares: Mapping[str, float]) -> dict[str, int]:
    """`count` split in proportion to `shares`, by largest remainders."""
    total = sum(shares.values())
    exact = {name: count * share / total for name, share in shares.items()}
    parts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: parts[name] - exact[name])
    for name in by_remainder[: count - sum(parts.values())]:
        parts[name] += 1
    return parts


def turned(platform: Platform, places: int) -> Platform:
    """The same platform with each cluster's titles in another order, as after a rebuild: other titles are shown."""
    titles = tuple(own[places % len(own) :] + own[: places % len(own)] for own in platform.titles)
    return replace(platform, titles=titles)


def gather(settings: Settings, embedder: Embedder, rounds: int, tell: Callable[[str], None]) -> list[Pool]:
    """A pool for each round; no prompt is in two."""
    platforms, seen, pools = held_out_platforms(), set[str](), []
    for number in range(rounds):
        tell(f"contexts of round {number + 1}: {VIEWERS} simulated viewers of each of {len(platforms)} catalogues")
        others = [turned(platform, number) for platform in platforms]
        cases = packaged_cases(settings, others, embedder, VIEWERS, SEED + number).cases
        pools.append(Pool(cases, SEED + number, seen))
    return pools


def passes(piece: WordingTask, text: str) -> bool:
    """Whether an answer passes the gate."""
    try:
        parse_wording(text, piece)
    except WordingRejected:
        return False
    return True


def _kind(piece: WordingTask) -> str:
    (key,) = task_keys(piece)
    if key == SUMMARY_KEY:
        return "summary"
    return "interest" if key in INTEREST_KEYS else "topic"


# --- how fast --------------------------------------------------------------------------------------------------------


async def run(student: StudentClient, texts: Sequence[Text], in_flight: int) -> Run:
    """Word all texts, always so many at the same time until none is left.

    Raises what the first call that failed raised: StudentUnavailable or StudentFailed.
    """
    waiting, answers = iter(texts), list[tuple[Text, Answer]]()

    async def words() -> None:
        for text in waiting:
            answers.append((text, await student.word(text.prompt)))

    began = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(words())
    except* (StudentFailed, StudentUnavailable) as failed:
        raise failed.exceptions[0] from None
    return Run(time.perf_counter() - began, answers)


async def compare(
    students: Mapping[str, StudentClient], pools: Sequence[Pool], texts: Mapping[int, int], tell: Callable[[str], None]
) -> Figures:
    """Rounds of all servers in turn, each on the same texts; which goes first alternates."""
    await asyncio.gather(*map(_until_ready, students.values()))
    warm_up = pools[0].draw(WARM_UP)
    for student in students.values():
        await run(student, warm_up, WARM_UP)
    runs: dict[str, dict[int, list[Run]]] = {name: {n: [] for n in texts} for name in students}
    for number, pool in enumerate(pools):
        for in_flight, count in texts.items():
            drawn = pool.draw(count)
            for name in list(students)[:: 1 if number % 2 == 0 else -1]:
                done = await run(students[name], drawn, in_flight)
                runs[name][in_flight].append(done)
                tell(f"round {number + 1}, {in_flight} in flight, {name}: {done.per_second:.2f} texts/s")
    total = Counter[str]()
    for pool in pools:
        total.update(pool.mix)
    return Figures(runs, {kind: value / len(pools) for kind, value in total.items()})


async def _until_ready(student: StudentClient) -> None:
    limit = time.monotonic() + READY_SECONDS
    while not await student.ready():
        if time.monotonic() > limit:
            raise StudentUnavailable(f"a server is not ready after {READY_SECONDS:.0f} s")
        await asyncio.sleep(0.2)


async def _with_both(
    settings: Settings, url: str, use: Callable[[dict[str, StudentClient]], Coroutine[Any, Any, T]]
) -> T:
    students: dict[str, StudentClient] = {
        OURS: TritonStudent(settings),
        LLAMA_CPP: LlamaCppStudent(url, DEADLINE_SECONDS),
    }
    try:
        return await use(students)
    finally:
        for student in students.values():
            await student.close()


# --- overload --------------------------------------------------------------------------------------------------------


async def overload(settings: Settings, ports: Ports, pool: Pool, count: int, tell: Callable[[str], None]) -> Overload:
    """What the server does with more than its limit. `settings` reach it; its metrics are on `ports`."""
    student, hasty = TritonStudent(settings), TritonStudent(replace(settings, student_deadline_seconds=EXPIRE_SECONDS))
    try:
        await _until_ready(student)
        await run(student, pool.draw(LIMIT), LIMIT)
        full = await run(student, pool.draw(count), LIMIT)
        tell(f"{LIMIT} in flight: {full.per_second:.2f} texts/s")
        patient = Patient(student)
        over = await run(patient, pool.draw(count), OFFERED)
        tell(f"{OFFERED} callers: {over.per_second:.2f} texts/s, {len(patient.refusals_ms)} refusals")
        async with aiohttp.ClientSession() as session:
            gauge = Gauge(session, f"http://127.0.0.1:{ports.triton_metrics}/metrics")
            cancelled = [await _freed_by_cancelling(student, gauge) for _ in range(FREED_TRIES)]
            expired = [await _freed_by_expiry(hasty, gauge) for _ in range(FREED_TRIES)]
        tell("places of cancelled and expired requests are free again")
        return Overload(full, over, patient.refusals_ms, cancelled, expired)
    finally:
        await student.close()
        await hasty.close()


class Patient:
    """A student that is asked again, after RETRY_SECONDS, when it is full; how long each refusal took is kept."""

    def __init__(self, student: StudentClient) -> None:
        self._student = student
        self.refusals_ms: list[float] = []

    async def word(self, prompt: Prompt, *, seed: int = 0) -> Answer:
        """See `StudentClient.word`."""
        while True:
            began = time.perf_counter()
            try:
                return await self._student.word(prompt, seed=seed)
            except StudentUnavailable:
                self.refusals_ms.append(1000 * (time.perf_counter() - began))
                await asyncio.sleep(RETRY_SECONDS)

    async def ready(self) -> bool:
        """See `StudentClient.ready`."""
        return await self._student.ready()

    async def close(self) -> None:
        """The student belongs to whoever made it."""


class Gauge:
    """How many requests the server has admitted and not answered, by its own metrics."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def becomes(self, wanted: int) -> None:
        """Return when it is so many. Raises TimeoutError."""
        async with asyncio.timeout(READY_SECONDS):
            while await self._value() != wanted:  # noqa: ASYNC110 - the state is another process's
                await asyncio.sleep(POLL_SECONDS)

    async def _value(self) -> int:
        async with self._session.get(self._url) as response:
            return in_flight_of(await response.text())


def in_flight_of(metrics: str) -> int:
    """The student's gauge among Triton's metrics. Raises ValueError if it is not there."""
    found = re.search(r"^student_in_flight\{.*?\} (\S+)$", metrics, re.MULTILINE)
    if found is None:
        raise ValueError("Triton's metrics have no student_in_flight")
    return int(float(found[1]))


async def _freed_by_cancelling(student: StudentClient, gauge: Gauge) -> float:
    calls = [asyncio.create_task(student.word(LONG_PROMPT)) for _ in range(LIMIT)]
    await gauge.becomes(LIMIT)
    for call in calls:
        call.cancel()
    began = time.perf_counter()
    await asyncio.gather(*calls, return_exceptions=True)
    await gauge.becomes(0)
    return 1000 * (time.perf_counter() - began)


async def _freed_by_expiry(hasty: StudentClient, gauge: Gauge) -> float:
    calls = [asyncio.create_task(hasty.word(LONG_PROMPT)) for _ in range(LIMIT)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    began = time.perf_counter()
    if not any(isinstance(result, StudentUnavailable) for result in results):
        raise RuntimeError(f"no request took longer than {EXPIRE_SECONDS:g} s: nothing expired")
    await gauge.becomes(0)
    return 1000 * (time.perf_counter() - began)


# --- report ----------------------------------------------------------------------------------------------------------


def markdown(figures: Figures, over: Overload, command: str) -> str:
    """The result file."""
    found = figures.document()
    rows = []
    for n in figures.runs[OURS]:
        ours, theirs = figures.per_second(OURS, n), figures.per_second(LLAMA_CPP, n)
        cells = [str(n), f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.2f}"]
        for server in (OURS, LLAMA_CPP):
            cells.append(" ".join(f"{r.per_second / figures.texts_per_persona:.2f}" for r in figures.runs[server][n]))
            cells.append(" / ".join(f"{value:,}" for value in found["latency_ms"][server][str(n)]))
        rows.append(f"| {' | '.join(cells)} |")
    sides = []
    for server in (OURS, LLAMA_CPP):
        tokens_in, tokens_out = figures.tokens(server)
        sides.append(f"| {server} | {tokens_in:.0f} | {tokens_out:.0f} | {figures.passed(server):.1%} |")
    bars = "\n".join(f"| {bar} | {'yes' if met else '**no**'} |" for bar, met in found["bars_met"].items())
    mix = ", ".join(f"{value:.1f} of kind {kind}" for kind, value in figures.mix.items())
    table, kinds = "\n".join(rows), "\n".join(sides)
    head = f"| in flight | {OURS}, personas/s | {LLAMA_CPP}, personas/s | ratio"
    head += f" | {OURS}, by round | p50 / p95, ms | {LLAMA_CPP}, by round | p50 / p95, ms |"
    rounds, limit = len(next(iter(figures.runs[OURS].values()))), max(figures.runs[OURS])
    same_length, same_text = figures.same(lambda a: a.tokens_in), figures.same(lambda a: a.text)
    return f"""# Personas a second, beside llama.cpp

`{command}`. Written by that command.

{machine()} {versions()}

{head}
| --- | --- | --- | --- | --- | --- | --- | --- |
{table}

| bar | met |
| --- | --- |
{bars}

| | tokens in, a persona | tokens out, a persona | first answers that pass the gate |
| --- | --- | --- | --- |
{kinds}

Median of rounds: {rounds}. In flight are requests, one text each: a caller sends its next text when one is answered,
until none is left. A persona is {figures.texts_per_persona:.2f} texts on average ({mix}), which the workers ask for all
at once; personas/s are texts/s by that number, and latencies are those of single texts. Nothing is cached: there is no
wording cache here, and no prompt is sent twice to a server. Prompts come from simulated viewers of the held-out
catalogues, in the mix of kinds of whole personas; both servers get the same, and which goes first alternates by round.

Ours is what production runs: Triton's gRPC address through the workers' client, the Python backend, OpenVINO GenAI; at
most {limit} requests are admitted here. llama.cpp's server has the same weights file, prompts, grammars and token
limits, at temperature 0, over HTTP: `{" ".join(SERVER_OPTIONS)}`, and prompts kept in their slots. It is built with
`{" ".join(BUILD_OPTIONS)}`.

Prompts have as many tokens on both in {same_length:.1%} of cases, and {same_text:.1%} of texts are the same: the
two round weights and sums differently. Servers and callers share the cores; a server that is not asked idles.

{overload_markdown(over)}"""


def overload_markdown(over: Overload) -> str:
    """The section about overload."""
    found = over.document()
    rows = (
        ("texts answered a second", found["texts_per_s_full"], found["texts_per_s_over"]),
        ("latency of answered requests, p50 / p95, ms", *(_pair(found[f"admitted_ms_{k}"]) for k in ("full", "over"))),
        ("refusals", 0, f"{found['refusals']:,}"),
        ("time to a refusal, p50 / p99, ms", "-", f"{found['refused_p50_ms']} / {found['refused_p99_ms']}"),
    )
    table = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
    cancelled, expired = (", ".join(map(str, found[f"{why}_freed_ms"])) for why in ("cancelled", "expired"))
    return f"""## Overload

The server admits {LIMIT} requests (`maximum_in_flight` as packaged) and refuses the others with UNAVAILABLE.

| | {LIMIT} callers | {OFFERED} callers |
| --- | --- | --- |
{table}

A refused caller tries again after {RETRY_SECONDS:g} s. With all {LIMIT} places taken by requests of up to
{LONG_PROMPT.maximum_tokens} tokens, the server had no request left {cancelled} ms after all callers had cancelled, and
{expired} ms after their deadline of {EXPIRE_SECONDS:g} s had passed; each was tried {FREED_TRIES} times.
"""


def versions() -> str:
    """What was compared."""
    own = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    return f"Ours: {own}. llama.cpp as in {PACKAGE} {VERSION}."


def _pair(values: Sequence[float]) -> str:
    return " / ".join(f"{value:,}" for value in values)


def _p50_p95(values: Sequence[float]) -> list[int]:
    return [round(float(value)) for value in np.quantile(values, (0.5, 0.95))]


# --- command ---------------------------------------------------------------------------------------------------------


def tell(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def main(command_line: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.student", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of few texts")
    parser.add_argument("--overload", action="store_true", help="overload alone, without llama.cpp")
    parser.add_argument("--write", action="store_true", help=f"rewrite benchmarks/{RESULTS.name}")
    arguments = parser.parse_args(command_line)
    if arguments.write and arguments.overload:
        parser.error("--write needs both parts: leave --overload out")
    command = "python -m benchmarks.student" + " --quick" * arguments.quick + " --write" * arguments.write
    try:
        with _interruptible():
            figures, over = _measured(quick=arguments.quick, compares=not arguments.overload)
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
    except (LlamaCppError, LocalStackError, StudentFailed, StudentUnavailable, RuntimeError, TimeoutError) as error:
        raise SystemExit(f"error: {error}") from error
    if figures is None:
        publish(overload_markdown(over), {"overload": over.document()}, None)
        return 0
    text = markdown(figures, over, command)
    publish(text, figures.document() | {"overload": over.document()}, RESULTS if arguments.write else None)
    return 0


def _measured(*, quick: bool, compares: bool) -> tuple[Figures | None, Overload]:
    settings = Settings(student_concurrency=OFFERED, student_deadline_seconds=DEADLINE_SECONDS)
    texts, rounds = (QUICK_TEXTS, 1) if quick else (TEXTS, ROUNDS)
    # Built first: it takes longest and fails on a machine without a compiler.
    program = ensure_server((settings.data_folder / FOLDER).absolute(), tell) if compares else None
    with shown_progress() as progress:
        weights = student_weights_path(settings, progress)
        embedder = MiniLM(tokenizer_path(settings, progress))
    *pools, spare = gather(settings, embedder, (rounds if compares else 0) + 1, tell)
    figures = _compared(settings, program, weights, pools, texts) if program is not None else None
    with started_triton(settings, {"STUDENT_MAXIMUM_IN_FLIGHT": str(LIMIT)}) as ports:
        count = OVERLOAD_TEXTS // 4 if quick else OVERLOAD_TEXTS
        over = _run(overload(ports.settings(settings), ports, spare, count, tell))
    return figures, over


def _compared(
    settings: Settings, program: Path, weights: Path, pools: Sequence[Pool], texts: Mapping[int, int]
) -> Figures:
    log = assets_folder(settings).parent / FOLDER / "server.log"
    admitted = {"STUDENT_MAXIMUM_IN_FLIGHT": str(max(texts))}
    with started_triton(settings, admitted) as ports, started_server(program, weights, log) as url:
        work = _with_both(ports.settings(settings), url, lambda students: compare(students, pools, texts, tell))
        return _run(work)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end. Raises KeyboardInterrupt on SIGINT and SIGTERM, after all calls ended."""

    async def cancelled_by_signals() -> T:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - this runs in one
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await work

    try:
        return asyncio.run(cancelled_by_signals())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM end what was started."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
