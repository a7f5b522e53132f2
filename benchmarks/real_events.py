"""Run the workers over a real event log: import, clusters, history load, a persona for every eligible viewer.

    .venv/bin/python benchmarks/real_events.py EVENTS CATALOGUE [--clusters 64] [--out benchmarks/real_events.json]

EVENTS is anything `personas import` reads, CATALOGUE what `personas clusters build` reads. Starts the local stack and
stops what it started. Prints five persona cards as they came out and ends with one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from agents.kafka_admin import prefixed
from agents.kafka_log import KafkaLog
from agents.localstack.ports import PARTS, ports_of
from agents.localstack.progress import shown_progress
from agents.localstack.stack import LocalStack
from agents.settings import ENVIRONMENT_PREFIX, Settings, load_settings
from agents.topic_reader import TopicReader
from streams import topics
from streams.decoding import decode_persona
from streams.records import Tier
from streams.state import from_bytes

PROGRESS_SECONDS = 15


def personas(settings: Settings, *arguments: str) -> str:
    command = [sys.executable, "-m", "agents", *arguments]
    done = subprocess.run(command, env=environment(settings), stdout=subprocess.PIPE, check=True)
    return done.stdout.decode()


def environment(settings: Settings) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
    return own | settings.environment()


async def until_done(settings: Settings, workers: Sequence[subprocess.Popen[bytes]]) -> None:
    log = KafkaLog(settings)
    groups = (
        (topics.WATCH_APP, topics.WATCH_EVENTS),
        (topics.WATCH_APP, topics.USER_CONTROLS),
        (topics.PERSONA_APP, topics.REFRESH_REQUESTS),
    )
    try:
        while True:
            left = [await log.lag(prefixed(settings, group), topic) for group, topic in groups]
            print(f"still to read: events {left[0]:,}, controls {left[1]}, requests {left[2]:,}", file=sys.stderr)
            if not any(left):
                return
            for worker in workers:
                if worker.poll() is not None:
                    raise SystemExit(f"a worker ended with status {worker.returncode}")
            await asyncio.sleep(PROGRESS_SECONDS)
    finally:
        await log.close()


def report(settings: Settings, lines: int, eligible_after: int) -> dict[str, Any]:
    with TopicReader(settings) as reader:

        def values(topic: str) -> list[tuple[bytes | None, bytes | None]]:
            return [(m.key(), m.value()) for m in reader.read(prefixed(settings, topic))]

        requests = {
            orjson.loads(v or b"")["request_id"]: orjson.loads(v or b"") for _, v in values(topics.REFRESH_REQUESTS)
        }
        latest = {k: v for k, v in values(topics.PERSONAS) if v is not None}
        states = [from_bytes(v) for v in dict(values(topics.INTERESTS_CHANGELOG)).values() if v]
        letters = len({k for k, _ in values(topics.dead_letters_of(topics.WATCH_EVENTS))})
        log_records = len(values(topics.WATCH_EVENTS))
    written = [decode_persona(v) for v in latest.values()]
    counted = sum(int(state["events"]) for state in states)
    items = sum(p.model.items for p in written)
    students = [p for p in written if p.tier is Tier.STUDENT]
    return {
        "lines": lines,
        "records": log_records,
        "counted": counted,
        "dead_letters": letters,
        "unaccounted": log_records - counted - letters,
        "users": len(states),
        "eligible_users": sum(int(state["qualifying"]) >= eligible_after for state in states),
        "requests_by_rule": dict(Counter(r["rule"] for r in requests.values())),
        "personas": len(written),
        "by_tier": dict(Counter(str(p.tier) for p in written)),
        "tokens_per_persona": round(
            sum(p.model.tokens_in + p.model.tokens_out for p in written) / max(1, len(written)), 1
        ),
        "tokens_out_per_persona": round(sum(p.model.tokens_out for p in written) / max(1, len(written)), 1),
        "cache_hit_rate": round(sum(p.model.items_cached for p in written) / max(1, items), 3),
        "mean_interests": round(sum(len(p.interests) for p in students) / max(1, len(students)), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("events", type=Path)
    parser.add_argument("catalogue", type=Path)
    parser.add_argument("--clusters", type=int, default=64)
    parser.add_argument("--out", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    base = load_settings()
    run = str(int(time.time()))
    folder = base.data_folder.absolute() / "real-events" / run
    folder.mkdir(parents=True)
    settings = replace(
        base,
        topic_prefix=f"real.{run}.",
        cassandra_keyspace=f"real_{run}",
        registry=folder / "registry-v1",
        template_after=0,
        request_expires_minutes=600,
    )
    events = folder / "events.jsonl"
    with ExitStack() as cleanup:
        stack = LocalStack(ports_of(base), base.data_folder)
        running = {part.part for part in stack.status() if part.state == "running"}
        with shown_progress() as progress:
            stack.up(PARTS, progress)
        cleanup.callback(stack.down, [part for part in PARTS if part not in running])
        started = time.monotonic()
        personas(
            settings, "import", str(arguments.events), "--catalogue", str(arguments.catalogue), "--out", str(events)
        )
        build = ["clusters", "build", str(arguments.catalogue), "-k", str(arguments.clusters)]
        personas(settings, *build, "--events", str(events), "--out", str(settings.registry))
        personas(settings, "init")
        prepared = time.monotonic()
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", "agents", "worker", "--role", role, "--no-page"],
                env=environment(settings),
                stderr=cleanup.enter_context((folder / f"{role}.log").open("wb")),
            )
            for role in ("watch", "persona")
        ]
        for worker in workers:
            cleanup.callback(worker.wait)
            cleanup.callback(worker.terminate)
        personas(settings, "produce", str(events), "--bootstrap", "--json")
        asyncio.run(until_done(settings, workers))
        finished = time.monotonic()
        lines = events.read_bytes().count(b"\n")
        figures = report(settings, lines, settings.first_persona_after)
        figures |= {"prepare_seconds": round(prepared - started, 1), "run_seconds": round(finished - prepared, 1)}
        with TopicReader(settings) as reader:
            keys = sorted({m.key() or b"" for m in reader.read(prefixed(settings, topics.PERSONAS))})
        shown = [key.decode() for key in keys[:: max(1, len(keys) // 5)][:5]]
        print(personas(settings, "get", *shown))
    if arguments.out:
        arguments.out.write_bytes(orjson.dumps(figures, option=orjson.OPT_INDENT_2) + b"\n")
    print(orjson.dumps(figures).decode())


if __name__ == "__main__":
    main()
