"""The page in a real browser, its numbers from a real Kafka, and `personas tail` on the same topics."""

from __future__ import annotations

import asyncio
import html
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from agents.kafka_admin import aiokafka_options
from agents.page import kafka as page_kafka
from agents.page.kafka import KafkaPageSource
from agents.page.server import create_page, serve_page
from agents.page.source import (
    Count,
    GroupLag,
    Health,
    MemoryPageSource,
    Overview,
    PageSource,
    TopicLag,
    viewer_card,
)
from agents.settings import Settings
from agents.stores.cassandra import CassandraStore
from agents.stores.memory import MemoryStore
from agents.stores.migrate import apply_migrations, packaged_migrations, schema_session
from agents.stores.ports import StoredPersona
from agents.telemetry import create_telemetry
from streams.records import Command, Persona, RefreshRequest, Rule, Tier, encode
from streams.topics import (
    PERSONA_APP,
    PERSONAS,
    REFRESH_REQUESTS,
    USER_CONTROLS,
    WATCH_APP,
    WATCH_EVENTS,
)
from tests.persona_samples import NOON, SampleRegistry, hostile_persona, sample_persona

if TYPE_CHECKING:
    from tests.conftest import Stack

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH: install one to run this test"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=6000",
    "--dump-dom",
)
BROWSER_SECONDS = 90


@asynccontextmanager
async def served(source: PageSource) -> AsyncIterator[str]:
    page = await serve_page(create_page(source), "127.0.0.1", 0)
    try:
        yield page.url
    finally:
        await page.stop()


async def browse(url: str, folder: Path) -> tuple[str, str]:
    """The page's DOM after some seconds of its own time, and what the browser logged."""
    assert CHROMIUM is not None
    browser = await asyncio.create_subprocess_exec(
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        url,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        dom, log = await asyncio.wait_for(browser.communicate(), BROWSER_SECONDS)
    finally:
        if browser.returncode is None:
            os.killpg(browser.pid, signal.SIGKILL)
            await browser.wait()
    return dom.decode(), log.decode(errors="replace")


def section(dom: str, element_id: str) -> str:
    """The text below an element, tags removed, one space between texts."""
    start = dom.index(f'id="{element_id}"')
    tag = re.search(r"<(\w+)[^<]*$", dom[:start])
    assert tag is not None
    end = dom.index(f"</{tag[1]}>", start)
    body = dom[dom.index(">", start) + 1 : end]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


OVERVIEW = Overview(
    at=NOON,
    events=184_223,
    arriving=312.4,
    applied=309.8,
    history=(290.0, 310.0, 312.0),
    groups=(
        GroupLag("persona-watch", 1_148, (TopicLag("watch-events", 1_148),)),
        GroupLag("persona-writer", 6, (TopicLag("persona-refresh-requests", 6),)),
    ),
    rules=(Count("drift", 60), Count("cold_start", 15)),
    tiers=(Count("student", 70), Count("template", 5)),
    removed=1,
    delay_p50=2.44,
    delay_p95=7.9,
)


@in_browser
async def test_the_page_shows_numbers_bars_and_a_viewers_card(tmp_path: Path) -> None:
    card = viewer_card([sample_persona(), sample_persona(sequence=4, summary="Cooks.")], SampleRegistry())
    async with served(MemoryPageSource(OVERVIEW, cards={"ann": card})) as url:
        dom, log = await browse(f"{url}#viewer=ann", tmp_path)
    assert section(dom, "state") == "Live, 2026-11-22 12:00:00 UTC"
    assert section(dom, "arriving") == "312"
    assert section(dom, "events-note") == "310 per second applied, 184,223 in all"
    assert section(dom, "waiting") == "1,154"
    assert section(dom, "groups") == "persona-watch 1,148 persona-writer 6"
    assert section(dom, "delay") == "2.4"
    assert section(dom, "rules") == "drift 60 cold start 15"
    assert section(dom, "tiers") == "student 70 template 5"
    assert "1 removed" in section(dom, "removed")
    assert "<polyline" in dom
    # Bars: rules relative to the largest, interests and what moved by their share.
    for width in ("100%", "25%", "41%", "28%", "3%", "62%"):
        assert f'<i style="width: {width}' in dom
    # Marks: the threshold and what chance explains, on scales that end a fifth beyond the larger value.
    for left in (1.9 / (1.2 * 2.314), 0.142 / (1.2 * 0.212)):
        assert f'<b style="left: {left:.1%}' in dom
    shown = html.unescape(re.sub(r"<[^>]+>", "|", dom))
    for text in (
        "Cooks Italian at weekends and has lately taken to riding gravel bikes.",
        "↓ falling",
        "Hand-rolled tagliatelle in one hour",
        "v-pasta · 2026-11-20",
        "bikepacking trips",
        "through gravel cycling",
        "true crime",
        "The interests have moved further than chance explains.",
        "Rule drift, 37 watches since the last request.",
        "accumulated regret 2.314 of 1.900",
        "threshold 1.900",
        "divergence 0.212 bits, beyond what chance explains (0.142)",
        "chance 0.142",
        "Risen",
        "Fallen",
        "42 · student · drift · 2026-11-22 12:00:02",
        "34 · student · drift · 2026-11-22 12:00:02",
        "added gravel cycling; reworded italian cooking",
    ):
        assert text in shown
    assert "CONSOLE" not in log, log


@in_browser
async def test_hostile_text_is_shown_and_not_run(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&lt;b&gt;"
    card = viewer_card([hostile_persona(hostile, hostile)], SampleRegistry(titles={hostile: hostile}))
    overview = replace(OVERVIEW, problem=hostile, rules=(Count(hostile, 1),), groups=(GroupLag(hostile, 1, ()),))
    source = MemoryPageSource(overview, cards={hostile: card})
    fragment = "viewer=" + "".join(f"%{byte:02x}" for byte in hostile.encode())
    async with served(source) as url:
        dom, log = await browse(f"{url}#{fragment}", tmp_path)
    assert "<title>Viewer personas</title>" in dom
    assert "<img" not in dom
    assert dom.count("<script") == 1
    escaped = hostile.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert dom.count(escaped) > 15
    assert "CONSOLE" not in log, log


@in_browser
async def test_an_unknown_viewer_and_a_problem_are_said(tmp_path: Path) -> None:
    overview = Overview(at=NOON, problem="Kafka at nowhere:1: KafkaConnectionError")
    async with served(MemoryPageSource(overview)) as url:
        dom, _ = await browse(f"{url}#viewer=nobody", tmp_path)
    assert section(dom, "state") == "Kafka at nowhere:1: KafkaConnectionError"
    assert section(dom, "persona") == "nobody: no persona is stored for this viewer"
    assert "None yet" in section(dom, "latest")


class BrokenSource(MemoryPageSource):
    async def overview(self) -> Overview:
        raise RuntimeError("broken")


@in_browser
async def test_a_worker_that_fails_is_said_and_logged(tmp_path: Path) -> None:
    async with served(BrokenSource(OVERVIEW)) as url:
        dom, log = await browse(url, tmp_path)
    assert "does not answer" in section(dom, "state")
    assert "CONSOLE" in log  # so that its absence, which other tests ask for, means something


# ---- with Kafka


def request(persona: Persona) -> bytes:
    return encode(
        RefreshRequest(
            persona.request_id, persona.user_id, 0, persona.version // 8, NOON, persona.rule, 1, 1, Command.ERASE
        )
    )


@pytest.fixture(scope="module")
async def settings(kafka: Stack, topic_prefix: str) -> Settings:
    """A Kafka with 100 events (60 of them committed), 4 requests, 3 personas and a tombstone."""
    settings = replace(kafka.settings, topic_prefix=topic_prefix)
    admin = AIOKafkaAdminClient(**aiokafka_options(settings))
    await admin.start()
    topics = [topic_prefix + name for name in (WATCH_EVENTS, USER_CONTROLS, REFRESH_REQUESTS, PERSONAS)]
    configs = {"message.timestamp.type": "LogAppendTime"}
    await admin.create_topics([NewTopic(topic, 2, 1, topic_configs=configs) for topic in topics])
    await admin.close()
    ann, bob, cid = sample_persona("ann"), sample_persona("bob", 2, rule=Rule.MATURITY), sample_persona("cid", 1)
    async with AIOKafkaProducer(**aiokafka_options(settings)) as producer:

        async def send(topic: str, user: str, value: bytes | None, **more: list[tuple[str, bytes]]) -> None:
            await producer.send_and_wait(topic_prefix + topic, value, key=user.encode(), **more)

        for number in range(100):
            await producer.send(topic_prefix + WATCH_EVENTS, b"{}", partition=number % 2)
        await producer.flush()
        for persona in (ann, bob, cid):
            await send(REFRESH_REQUESTS, persona.user_id, request(persona))
        await send(REFRESH_REQUESTS, "eve", b"not ours")
        await send(PERSONAS, "cid", encode(cid))
        await send(PERSONAS, "ann", encode(ann))
        await send(PERSONAS, "bob", encode(replace(bob, tier=Tier.TEMPLATE)))
        await send(PERSONAS, "cid", None, headers=[("reason", b"erased")])
    committer = AIOKafkaConsumer(
        **aiokafka_options(settings), group_id=topic_prefix + WATCH_APP, enable_auto_commit=False
    )
    await committer.start()
    committer.assign([TopicPartition(topic_prefix + WATCH_EVENTS, number) for number in (0, 1)])
    await committer.commit({TopicPartition(topic_prefix + WATCH_EVENTS, number): 30 for number in (0, 1)})
    await committer.stop()
    return settings


async def store_with_ann() -> MemoryStore:
    store = MemoryStore()
    for persona in (sample_persona(sequence=4, summary="Cooks."), sample_persona()):
        row = StoredPersona("ann", persona.version, 0, persona.request_id, persona.tier, encode(persona))
        await store.put(row)
    return store


async def until(check: Callable[[], Awaitable[bool]], seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not await check():
        assert time.monotonic() < limit, "waited too long"
        await asyncio.sleep(0.1)


async def complete(source: KafkaPageSource) -> bool:
    now = await source.overview()
    return now.problem is None and sum(tier.count for tier in now.tiers) >= 3 and now.removed == 1


@pytest.mark.stack
async def test_numbers_come_from_kafka(settings: Settings) -> None:
    reader = InMemoryMetricReader()
    telemetry = create_telemetry({}, metric_readers=[reader])
    source = KafkaPageSource(settings, await store_with_ann(), SampleRegistry(), telemetry)
    await source.start()
    try:
        await until(lambda: complete(source))
        overview = await source.overview()
        prefix = settings.topic_prefix
        assert overview.events == 100
        assert overview.groups == (
            GroupLag(prefix + WATCH_APP, 40, (TopicLag(prefix + WATCH_EVENTS, 40),)),
            GroupLag(prefix + PERSONA_APP, 4, (TopicLag(prefix + REFRESH_REQUESTS, 4),)),
        )
        assert overview.rules == (Count("drift", 2), Count("maturity", 1))
        assert overview.tiers == (Count("student", 2), Count("template", 1))
        assert overview.unreadable == 1
        assert {latest.user_id for latest in await source.latest()} == {"ann", "bob"}
        assert (await source.health())["kafka"] is Health.OK
        assert b'"personas.lag"' in orjson.dumps(orjson.loads(reader.get_metrics_data().to_json()))  # type: ignore[union-attr]

        async with AIOKafkaProducer(**aiokafka_options(settings)) as producer:
            await producer.send_and_wait(settings.topic_prefix + WATCH_EVENTS, b"{}", partition=0)
            fresh = sample_persona("dee", 1, rule=Rule.AGE)
            await producer.send_and_wait(settings.topic_prefix + REFRESH_REQUESTS, request(fresh), key=b"dee")

            async def requested() -> bool:
                return Count("age", 1) in (await source.overview()).rules

            await until(requested)
            await producer.send_and_wait(settings.topic_prefix + PERSONAS, encode(fresh), key=b"dee")

        async def live() -> bool:
            now = await source.overview()
            return now.events == 101 and now.arriving > 0 and now.delay_p50 is not None

        await until(live)
        assert (await source.latest())[0].user_id == "dee"
    finally:
        await source.stop()
        telemetry.close()


@pytest.mark.stack
async def test_missing_topics_are_a_problem_with_its_remedy(kafka: Stack) -> None:
    settings = replace(kafka.settings, topic_prefix="nothing-here-")
    source = KafkaPageSource(settings, MemoryStore(), SampleRegistry())
    await source.start()
    try:

        async def said() -> bool:
            problem = (await source.overview()).problem
            return problem is not None and "personas init" in problem and "nothing-here-" in problem

        await until(said)
    finally:
        await source.stop()


@pytest.mark.stack
async def test_brokers_that_stop_answering_are_said_and_come_back(kafka: Stack, settings: Settings) -> None:
    source = KafkaPageSource(settings, MemoryStore(), SampleRegistry())
    await source.start()
    try:
        await until(lambda: complete(source))
        kafka.local.pause_part("kafka")
        try:

            async def said() -> bool:
                problem = (await source.overview()).problem
                return problem is not None and settings.kafka_bootstrap in problem

            await until(said)
            assert (await source.health())["kafka"] is Health.DOWN
        finally:
            kafka.local.resume_part("kafka")
        await until(lambda: complete(source))
        assert (await source.health())["kafka"] is Health.OK
    finally:
        await source.stop()


@pytest.mark.stack
@in_browser
async def test_the_page_over_kafka_in_a_browser(settings: Settings, tmp_path: Path) -> None:
    source = KafkaPageSource(settings, await store_with_ann(), SampleRegistry())
    async with served(source) as url:
        await until(lambda: complete(source))
        dom, log = await browse(f"{url}#viewer=ann", tmp_path)
    assert section(dom, "state").startswith("Live, "), log
    assert re.search(r"1\d\d in all", section(dom, "events-note"))
    assert f"{settings.topic_prefix}{WATCH_APP}" in section(dom, "groups")
    assert section(dom, "rules").startswith("drift 2")
    assert "template 1" in section(dom, "tiers")
    assert "bob" in section(dom, "latest")
    assert "Cooks Italian at weekends" in dom


@pytest.mark.stack
async def test_nobody_looks_nothing_is_kept(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    source = KafkaPageSource(settings, MemoryStore(), SampleRegistry())
    await source.start()
    try:
        await until(lambda: complete(source))
        monkeypatch.setattr(page_kafka, "FOLLOW_SECONDS", 1.0)

        async def forgotten() -> bool:
            return not await source.latest()

        await until(forgotten)
        monkeypatch.undo()
        await until(lambda: complete(source))
        assert "bob" in {latest.user_id for latest in await source.latest()}
    finally:
        await source.stop()


async def command(settings: Settings, *arguments: str) -> asyncio.subprocess.Process:
    environment = os.environ | {
        "PERSONAS_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
        "PERSONAS_TOPIC_PREFIX": settings.topic_prefix,
        "PERSONAS_CASSANDRA_PORT": str(settings.cassandra_port),
        "PERSONAS_CASSANDRA_KEYSPACE": settings.cassandra_keyspace,
        "COLUMNS": "300",
    }
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from agents.cli import main; main()",
        *arguments,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.mark.stack
async def test_tail_shows_personas_and_removals(settings: Settings) -> None:
    process = await command(settings, "tail", "--from-beginning", "--max", "4")
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors
    text = output.decode()
    assert "ann  student, drift, version 42  Cooks Italian" in text
    assert "cid  removed (erased)" in text


@pytest.mark.stack
async def test_tail_as_json_lines(settings: Settings) -> None:
    process = await command(settings, "tail", "--from-beginning", "--max", "4", "--json")
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors
    lines = [orjson.loads(line) for line in output.splitlines()]
    assert {"user_id": "cid", "removed": "erased"} in lines
    assert {line["user_id"] for line in lines if "summary" in line} == {"ann", "bob", "cid"}


@pytest.mark.stack
async def test_tail_stops_gracefully_when_told(settings: Settings) -> None:
    process = await command(settings, "tail", "--from-beginning", "--json")
    assert process.stdout is not None
    await asyncio.wait_for(process.stdout.readline(), 60)
    process.send_signal(signal.SIGTERM)
    _, errors = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0
    assert not errors


# ---- with Cassandra


@pytest.fixture(scope="module")
async def stored(cassandra: Stack, keyspace: str) -> Settings:
    """A Cassandra with two versions of ann's persona."""
    settings = replace(cassandra.settings, cassandra_keyspace=keyspace)
    with schema_session(settings, 60) as session:
        apply_migrations(session, settings, packaged_migrations())
    store = await CassandraStore.connect(settings)
    for persona in (sample_persona(sequence=4, summary="Cooks."), sample_persona()):
        row = StoredPersona("ann", persona.version, 0, persona.request_id, persona.tier, encode(persona))
        await store.put(row)
    await store.close()
    return settings


@pytest.mark.stack
async def test_get_reads_the_card_from_cassandra(stored: Settings) -> None:
    process = await command(stored, "get", "ann", "nobody", "--history")
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors
    assert "Cooks Italian at weekends and has lately taken" in output.decode()
    assert "Cooks." in output.decode()
    assert b"no persona is stored for 'nobody'" in errors


@pytest.mark.stack
async def test_get_json_is_the_stored_bytes(stored: Settings) -> None:
    process = await command(stored, "get", "ann", "--json")
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors
    assert output == encode(sample_persona()) + b"\n"


@pytest.mark.stack
async def test_why_reads_the_measurement_from_cassandra(stored: Settings) -> None:
    process = await command(stored, "why", "ann", "--json")
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors
    assert orjson.loads(output)["explanation"]["value"] == 2.314
    process = await command(stored, "why", "nobody")
    _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert errors == b"no persona is stored for 'nobody'\n"
