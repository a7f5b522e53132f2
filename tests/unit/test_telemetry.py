"""Telemetry: what is recorded, what goes through Kafka headers, what off costs, what logs look like."""

from __future__ import annotations

import asyncio
import io
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agents import telemetry as t

Recorded = tuple[t.Telemetry, InMemorySpanExporter, InMemoryMetricReader]


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    spans, metrics = InMemorySpanExporter(), InMemoryMetricReader()
    telemetry = t.create_telemetry({}, span_processors=[SimpleSpanProcessor(spans)], metric_readers=[metrics])
    yield telemetry, spans, metrics
    telemetry.close()


def readings(reader: InMemoryMetricReader) -> dict[tuple[str, tuple[str, ...]], float]:
    data = reader.get_metrics_data()
    found: dict[tuple[str, tuple[str, ...]], float] = {}
    for resource in data.resource_metrics if data else ():
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    value = getattr(point, "value", None)
                    key = (metric.name, tuple(str(v) for v in (point.attributes or {}).values()))
                    found[key] = getattr(point, "sum", 0.0) if value is None else value
    return found


def test_names_are_unique_and_attributes_never_identify_a_viewer() -> None:
    names = [metric.name for metric in t.CATALOGUE]
    assert len(names) == len(set(names))
    for metric in t.CATALOGUE:
        assert not {"user_id", "user", "viewer", "video_id", "title"} & set(metric.attributes)
        assert (metric.kind is t.Kind.HISTOGRAM) == bool(metric.buckets)
        assert list(metric.buckets) == sorted(set(metric.buckets))


def test_every_metric_of_the_module_is_in_the_catalogue() -> None:
    declared = {value.name for value in vars(t).values() if isinstance(value, t.Metric)}
    assert declared == {metric.name for metric in t.CATALOGUE}


def test_counters_add_up_by_attribute(recorded: Recorded) -> None:
    telemetry, _, reader = recorded
    telemetry.count(t.EVENTS, 5, "applied")
    telemetry.count(t.EVENTS, 2, "late")
    telemetry.count(t.EVENTS, 1, "applied")
    telemetry.count(t.COALESCED)
    telemetry.observe(t.LAG, 17, "persona-watch")
    telemetry.observe(t.LAG, 4, "persona-watch")
    telemetry.observe(t.STORE_SECONDS, 0.25, "put", "ok")
    assert readings(reader) == {
        ("personas.events", ("applied",)): 6,
        ("personas.events", ("late",)): 2,
        ("personas.requests.coalesced", ()): 1,
        ("personas.lag", ("persona-watch",)): 4,
        ("personas.store.duration", ("put", "ok")): 0.25,
    }


def test_every_metric_of_the_catalogue_can_be_recorded(recorded: Recorded) -> None:
    telemetry, _, reader = recorded
    for metric in t.CATALOGUE:
        record = telemetry.count if metric.kind is t.Kind.COUNTER else telemetry.observe
        record(metric, 1, *("x" for _ in metric.attributes))
    assert {name for name, _ in readings(reader)} == {metric.name for metric in t.CATALOGUE}


def test_wrong_number_of_attributes_is_refused(recorded: Recorded) -> None:
    telemetry, _, _ = recorded
    with pytest.raises(TypeError, match=r"personas\.events"):
        telemetry.count(t.EVENTS, 1)


def test_a_flood_of_attribute_values_is_folded_into_other(recorded: Recorded) -> None:
    telemetry, _, reader = recorded
    for number in range(t.SERIES_LIMIT + 50):
        telemetry.count(t.DEAD_LETTERS, 1, "watch-events", f"reason-{number}")
    found = readings(reader)
    assert len(found) == t.SERIES_LIMIT + 1
    assert found["personas.dead_letters", (t.OTHER, t.OTHER)] == 50


def test_a_trace_goes_through_kafka_headers(recorded: Recorded) -> None:
    telemetry, spans, _ = recorded
    with telemetry.span("watch", attributes={"rule": "drift"}):
        headers = telemetry.inject([("tombstone", b"erased"), ("traceparent", b"of an earlier hop")])
    assert [name for name, _ in headers].count("traceparent") == 1
    assert ("tombstone", b"erased") in headers
    with telemetry.span("persona", parent=telemetry.extract(headers)):
        pass
    watch, persona = spans.get_finished_spans()
    assert watch.attributes == {"rule": "drift"}
    assert persona.parent is not None
    assert watch.context is not None
    assert persona.context is not None
    assert persona.parent.span_id == watch.context.span_id
    assert persona.context.trace_id == watch.context.trace_id


async def test_concurrent_tasks_keep_their_own_spans(recorded: Recorded) -> None:
    telemetry, spans, _ = recorded

    async def work(name: str) -> None:
        with telemetry.span(name):
            await asyncio.sleep(0)
            with telemetry.span(f"{name}.child"):
                await asyncio.sleep(0)

    await asyncio.gather(work("a"), work("b"))
    by_name = {span.name: span for span in spans.get_finished_spans()}
    for name in "ab":
        parent = by_name[f"{name}.child"].parent
        context = by_name[name].context
        assert parent is not None
        assert context is not None
        assert parent.span_id == context.span_id


def test_a_failed_span_has_the_error_type_but_not_its_text(recorded: Recorded) -> None:
    telemetry, spans, _ = recorded
    with pytest.raises(ValueError, match="ann"), telemetry.span("store"):
        raise ValueError("row of viewer ann")
    (span,) = spans.get_finished_spans()
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.attributes == {"error.type": "ValueError"}
    assert "ann" not in span.to_json()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["traceparent", "tracestate", "x"]),
            st.one_of(
                st.binary(max_size=600),
                st.none(),
                st.integers(),
                st.text().map(str.encode),
                st.just(b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01"),
                st.just(b"ff-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"),
            ),
        )
    )
)
def test_hostile_headers_neither_raise_nor_join_a_trace(headers: list[tuple[str, bytes]]) -> None:
    telemetry = t.create_telemetry({}, span_processors=[SimpleSpanProcessor(InMemorySpanExporter())])
    context = telemetry.extract(headers)
    with telemetry.span("x", parent=context) as span:
        assert span.get_span_context().is_valid
    telemetry.close()


def test_off_records_nothing_and_loads_no_sdk() -> None:
    code = """
import sys
from agents import telemetry as t
off = t.create_telemetry({})
off.count(t.EVENTS, 1, "applied"); off.observe(t.LAG, 1, "g")
assert not off.measures and not off.traces
with off.span("x", attributes={"a": 1}) as span:
    assert not span.get_span_context().is_valid
    span.set_attribute("b", 2)
assert off.inject([("a", b"b")]) == [("a", b"b")]
assert off.extract([("traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01")]) == {}
off.close()
assert not any(name.startswith("opentelemetry.sdk") for name in sys.modules), "the SDK was imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_off_is_one_shared_span() -> None:
    off = t.create_telemetry({})
    assert off.span("a") is off.span("b")


def test_the_disabling_variable_wins() -> None:
    off = t.create_telemetry({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"})
    assert not off.measures
    assert not off.traces


@pytest.mark.parametrize(
    ("environment", "traces", "measures"),
    [
        ({}, False, False),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none"}, False, False),
        ({"OTEL_TRACES_EXPORTER": "console"}, True, False),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:1/v1/metrics"}, False, True),
    ],
)
def test_each_signal_is_switched_by_its_variables(environment: dict[str, str], traces: bool, measures: bool) -> None:
    telemetry = t.create_telemetry(environment)
    assert (telemetry.traces, telemetry.measures) == (traces, measures)
    # Not closed: nothing was recorded, and an exporter without a collector would retry for its whole time limit.


@pytest.mark.parametrize(
    "environment",
    [
        {"OTEL_TRACES_EXPORTER": "zipkin"},
        {"OTEL_METRICS_EXPORTER": "prometheus"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
    ],
)
def test_an_exporter_that_is_not_there_is_named(environment: dict[str, str]) -> None:
    with pytest.raises(t.TelemetryError, match="OTEL_"):
        t.create_telemetry(environment)


def test_otlp_reaches_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    received: dict[str, bytes] = {}

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("OTEL_SERVICE_NAME", "name-from-the-environment")
    try:
        telemetry = t.create_telemetry({"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}"})
        with telemetry.span("persona"):
            telemetry.count(t.PERSONAS, 1, "student")
        telemetry.close()
        telemetry.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert set(received) == {"/v1/traces", "/v1/metrics"}
    assert b"name-from-the-environment" in received["/v1/traces"]
    assert b"personas.personas" in received["/v1/metrics"]


@pytest.fixture
def log() -> Iterator[tuple[logging.Logger, io.StringIO, logging.Handler]]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("test.telemetry")
    logger.propagate = False
    logger.addHandler(handler)
    yield logger, stream, handler
    logger.removeHandler(handler)
    logger.propagate = True


Log = tuple[logging.Logger, io.StringIO, logging.Handler]


def test_json_logs_carry_the_trace_and_stay_on_one_line(recorded: Recorded, log: Log) -> None:
    telemetry, _, _ = recorded
    logger, stream, handler = log
    handler.setFormatter(t.JsonFormatter(secrets=["hunter2", ""]))
    with telemetry.span("x") as span:
        try:
            raise RuntimeError("cannot log in with hunter2")
        except RuntimeError:
            logger.exception("line one\nline two: %s", 'quote " \udcff hunter2')
        expected = trace.format_trace_id(span.get_span_context().trace_id)
    logger.warning("after")
    first, second = stream.getvalue().splitlines()
    record = orjson.loads(first)
    assert record["trace_id"] == expected
    assert record["level"] == "error"
    assert record["message"] == 'line one\nline two: quote " \\udcff ***'
    assert record["exception"].endswith("RuntimeError: cannot log in with ***")
    assert "hunter2" not in stream.getvalue()
    assert set(orjson.loads(second)) == {"ts", "level", "logger", "message"}


def test_text_logs_show_control_characters(log: Log) -> None:
    logger, stream, handler = log
    handler.setFormatter(t.TextFormatter(secrets=["hunter2"]))
    logger.warning("title %s", "\x1b[2Jx\n12:00:00 error root: forged hunter2")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("warning test.telemetry: title \\x1b[2Jx\\x0a12:00:00 error root: forged ***")


def test_configured_logging_reaches_standard_error() -> None:
    code = """
import logging
from agents.telemetry import configure_logging
configure_logging(json=True, secrets=["s3cret"])
logging.getLogger("a.b").info("password s3cret")
logging.getLogger("a.b").debug("not shown")
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert orjson.loads(line)["message"] == "password ***"
