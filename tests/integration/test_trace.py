"""One trace from a watch event's headers to the Cassandra write, across two processes, as an OTLP collector sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import orjson
import pytest
from aiohttp import web
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import NumberDataPoint
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from agents.settings import Settings
from agents.telemetry import CATALOGUE, EVENTS, LAG, PERSONAS, REQUESTS, STUDENT_CALLS, STUDENT_TOKENS
from streams import topics
from tests.builders import START
from tests.conftest import Stack
from tests.workers import Workers, read, send, until, with_topics_and_schema

pytestmark = pytest.mark.stack

USER = "viewer-whose-id-is-nobodys-business"
WATCHES = 20
ORDINARY, CAUSE = "0af7651916cd43dd8448eb211c80319c", "4bf92f3577b34da6a3ce929d0e0e4736"
PRODUCER_SPAN = "00f067aa0ba902b7"


@dataclass
class Collector:
    """What was exported to it."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    metrics: list[ExportMetricsServiceRequest] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    async def traces(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return web.Response()

    async def measurements(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.bodies.append(body)
        self.metrics.append(ExportMetricsServiceRequest.FromString(body))
        return web.Response()

    def trace(self, trace_id: str) -> dict[str, list[Span]]:
        """Spans of one trace by name."""
        found: dict[str, list[Span]] = {}
        for span in self.spans:
            if span.trace_id.hex() == trace_id:
                found.setdefault(span.name, []).append(span)
        return found

    def totals(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Last value of each counter and gauge, and count of each histogram, by the values of its attributes."""
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for request in self.metrics:
            for resource in request.resource_metrics:
                for scope in resource.scope_metrics:
                    for metric in scope.metrics:
                        kind = metric.WhichOneof("data")
                        assert kind is not None
                        for point in getattr(metric, kind).data_points:
                            key = tuple(sorted(item.value.string_value for item in point.attributes))
                            found.setdefault(metric.name, {})[key] = _value(point)
        return found


def _value(point: object) -> float:
    if isinstance(point, NumberDataPoint):
        return point.as_double or point.as_int
    return float(point.count)  # type: ignore[attr-defined]  # a histogram's


@pytest.fixture(scope="module")
async def collector() -> AsyncIterator[Collector]:
    """An OTLP/HTTP collector on a free port."""
    collector = Collector()
    app = web.Application()
    app.add_routes([web.post("/v1/traces", collector.traces), web.post("/v1/metrics", collector.measurements)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield collector
    await runner.cleanup()


@pytest.fixture(scope="module")
def settings(stack: Stack, topic_prefix: str, keyspace: str) -> Settings:
    made = replace(
        stack.settings, topic_prefix=topic_prefix, cassandra_keyspace=keyspace, partitions=1, template_after=0
    )
    return with_topics_and_schema(made)


def watches(first: int, number: int) -> list[tuple[bytes, bytes]]:
    return [
        (USER.encode(), orjson.dumps({"user_id": USER, "video_id": f"v{i:04}", "ts": START + i * 3_600_000}))
        for i in range(first, first + number)
    ]


def headers(trace_id: str) -> list[tuple[str, bytes]]:
    return [("traceparent", f"00-{trace_id}-{PRODUCER_SPAN}-01".encode())]


@pytest.fixture(scope="module")
async def exported(settings: Settings, workers: Workers, collector: Collector) -> Collector:
    """What both workers have exported after one persona and a graceful stop."""
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_METRIC_EXPORT_INTERVAL": "1000"}
    workers.start("watch", environment=environment)
    workers.start("persona", page=True, environment=environment)
    await send(settings, topics.WATCH_EVENTS, watches(1, WATCHES - 1), headers(ORDINARY))
    await send(settings, topics.WATCH_EVENTS, watches(WATCHES, 1), headers(CAUSE))
    await until(lambda: len(read(settings, topics.PERSONAS)) > 0, workers, 240)
    await until(lambda: LAG.name in collector.totals(), workers)
    statuses = await asyncio.gather(*(asyncio.to_thread(worker.stop) for worker in workers.all))
    assert statuses == [0, 0], workers.logs()
    return collector


async def test_one_trace_follows_the_refresh(exported: Collector) -> None:
    trace = exported.trace(CAUSE)
    assert {"watch.request", "persona.request", "student.call", "store.write"} == trace.keys()
    (watch,) = trace["watch.request"]
    assert watch.parent_span_id.hex() == PRODUCER_SPAN
    # Where the student worded a text unusably, an upgrade follows: it continues the trace from the first request.
    (persona,) = (span for span in trace["persona.request"] if span.parent_span_id == watch.span_id)
    calls = [span for span in trace["student.call"] if span.parent_span_id == persona.span_id]
    (write,) = (span for span in trace["store.write"] if span.parent_span_id == persona.span_id)
    assert calls
    assert persona.start_time_unix_nano <= min(span.start_time_unix_nano for span in calls)
    assert max(span.end_time_unix_nano for span in calls) <= write.start_time_unix_nano
    assert write.end_time_unix_nano <= persona.end_time_unix_nano
    assert watch.end_time_unix_nano <= persona.start_time_unix_nano


async def test_watches_that_cause_nothing_are_not_traced(exported: Collector) -> None:
    assert exported.trace(ORDINARY) == {}


async def test_the_trace_goes_on_in_the_published_records(settings: Settings, exported: Collector) -> None:
    trace = exported.trace(CAUSE)
    for topic, name in ((topics.REFRESH_REQUESTS, "watch.request"), (topics.PERSONAS, "persona.request")):
        parents = {f"00-{CAUSE}-{span.span_id.hex()}-01".encode() for span in trace[name]}
        found = [dict(message.headers())["traceparent"] for message in read(settings, topic)]
        assert found
        assert set(found) <= parents


async def test_metrics_arrive(exported: Collector) -> None:
    totals = exported.totals()
    assert totals.keys() <= {metric.name for metric in CATALOGUE}
    assert totals[EVENTS.name] == {("applied",): WATCHES}
    assert totals[REQUESTS.name] == {("cold_start",): 1}
    assert sum(totals[PERSONAS.name].values()) >= 1
    calls = totals[STUDENT_CALLS.name]
    assert sum(calls.values()) == len(exported.trace(CAUSE)["student.call"])
    assert totals[STUDENT_TOKENS.name][("in",)] > totals[STUDENT_TOKENS.name][("out",)] > 0
    assert {("persona-watch",), ("persona-writer",)} == {
        tuple(name[name.index("persona-") :] for name in names) for names in totals[LAG.name]
    }


async def test_no_viewer_is_named(exported: Collector) -> None:
    assert exported.bodies
    assert not any(USER.encode() in body for body in exported.bodies)
