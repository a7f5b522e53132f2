"""Traces, metrics and logs: one catalogue of metrics, and one object through which everything is measured.

`create_telemetry` reads the standard `OTEL_*` variables. With none of them set telemetry is off: no SDK
object exists, and every call returns at its first line. Attribute values are names from closed sets (outcomes,
reasons, rules); user ids, video ids and titles never become attributes.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import socket
import sys
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import orjson
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter, Setter
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    # The SDK is imported only when telemetry is on: off must cost neither time nor memory.
    from opentelemetry.metrics import Meter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

Header = tuple[str, bytes]
"""A Kafka record header as aiokafka has it."""

AttributeValue = str | bool | int | float

SERIES_LIMIT: Final = 100
"""Attribute combinations per metric; further ones become `other`, so a mistake cannot flood the collector."""
OTHER: Final = "other"
HEADER_LIMIT: Final = 512
"""Bytes of a trace header that are looked at: W3C asks for at least 512 of tracestate."""

_NOTHING: Final = Context()
_SHORT_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG_SECONDS: Final = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


class TelemetryError(ValueError):
    """An `OTEL_*` variable asks for what is not there; the message names it and what is accepted."""


class Kind(StrEnum):
    """How a metric's values add up."""

    COUNTER = "counter"
    HISTOGRAM = "histogram"
    GAUGE = "gauge"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `attributes` are its attribute keys; values are given in their order, none left out.

    buckets: upper bounds of a histogram, in `unit`.
    """

    name: str
    kind: Kind
    unit: str
    description: str
    attributes: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _counter(name: str, unit: str, description: str, *attributes: str) -> Metric:
    return Metric(f"personas.{name}", Kind.COUNTER, unit, description, attributes)


def _seconds(name: str, description: str, buckets: tuple[float, ...], *attributes: str) -> Metric:
    return Metric(f"personas.{name}", Kind.HISTOGRAM, "s", description, attributes, buckets)


EVENTS: Final = _counter("events", "{event}", "Watch events read, by what became of them", "outcome")
DEAD_LETTERS: Final = _counter("dead_letters", "{record}", "Records nobody could use", "topic", "reason")
CONTROLS: Final = _counter("controls", "{control}", "Viewer controls applied", "kind")
UNKNOWN_VIDEOS: Final = _counter("unknown_videos", "{video}", "Watched videos that the registry lacks")
REQUESTS: Final = _counter("requests", "{request}", "Refresh requests emitted", "rule")
COALESCED: Final = _counter("requests.coalesced", "{request}", "Requests superseded by a newer one")
PERSONAS: Final = _counter("personas", "{persona}", "Personas published", "tier")
REMOVALS: Final = _counter("removals", "{persona}", "Tombstones published", "reason")
STUDENT_CALLS: Final = _counter("student.calls", "{call}", "Calls of the student model", "outcome")
STUDENT_TOKENS: Final = _counter("student.tokens", "{token}", "Tokens of student calls", "direction")
TEACHER_CALLS: Final = _counter("teacher.calls", "{call}", "Calls of the teacher model", "outcome")
TEACHER_TOKENS: Final = _counter("teacher.tokens", "{token}", "Tokens of teacher calls", "direction")
TEXTS: Final = _counter("texts", "{text}", "Texts of requests that were worded, by where they came from", "tier")
FIRST_TRIES: Final = _counter(
    "first_tries", "{text}", "First answers for a text, by whether they passed the checks", "tier", "outcome"
)
WORDINGS: Final = _counter("wordings", "{item}", "Items worded, by whether the cache had them", "cache")
STUDENT_SECONDS: Final = _seconds("student.duration", "Time of one student call", _LONG_SECONDS, "outcome")
TEACHER_SECONDS: Final = _seconds("teacher.duration", "Time of one teacher call", _LONG_SECONDS, "outcome")
STORE_SECONDS: Final = _seconds("store.duration", "One store operation", _SHORT_SECONDS, "operation", "outcome")
PERSONA_SECONDS: Final = _seconds("persona.delay", "From request to published persona", _LONG_SECONDS, "tier")
FLUSH_SECONDS: Final = _seconds("flush.duration", "Awaiting acknowledgements", _SHORT_SECONDS, "step")
BUDGET_BOUND: Final = _counter("budget.bound", "ms", "Time in which requests waited for the budget to earn tokens")
BUDGET_WAITING: Final = Metric(
    "personas.budget.waiting",
    Kind.GAUGE,
    "{request}",
    "Requests that wait for the budget; each worker reports its own, so take the sum",
)
LAG: Final = Metric(
    "personas.lag",
    Kind.GAUGE,
    "{record}",
    "Records a consumer group has not committed; each worker reports the whole group's, so take the maximum",
    ("group",),
)

CATALOGUE: Final = (
    EVENTS,
    DEAD_LETTERS,
    CONTROLS,
    UNKNOWN_VIDEOS,
    REQUESTS,
    COALESCED,
    PERSONAS,
    REMOVALS,
    STUDENT_CALLS,
    STUDENT_TOKENS,
    TEACHER_CALLS,
    TEACHER_TOKENS,
    TEXTS,
    FIRST_TRIES,
    WORDINGS,
    STUDENT_SECONDS,
    TEACHER_SECONDS,
    STORE_SECONDS,
    PERSONA_SECONDS,
    FLUSH_SECONDS,
    BUDGET_BOUND,
    BUDGET_WAITING,
    LAG,
)
"""Every metric there is. What is not here is not measured."""


class _Off(contextlib.AbstractContextManager[Span]):
    """The span of telemetry that is off: one shared object, entered as often as one likes."""

    def __enter__(self) -> Span:
        return INVALID_SPAN

    def __exit__(self, *_: object) -> None:
        return None


_OFF: Final = _Off()


class Telemetry:
    """Measures. Safe to call from any thread; never raises for what it is given to carry.

    Everything is recorded through `count`, `observe`, `span`, `inject` and `extract`. `close` ends it.
    """

    def __init__(self, tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None) -> None:
        self._tracers = tracer_provider
        self._meters = meter_provider
        self._tracer = tracer_provider.get_tracer("viewer-personas") if tracer_provider else None
        self._series: dict[str, _Series] = {}
        if meter_provider is not None:
            meter = meter_provider.get_meter("viewer-personas")
            self._series = {metric.name: _Series(metric, meter) for metric in CATALOGUE}

    @property
    def measures(self) -> bool:
        """Whether metrics are recorded: lets a hot loop skip gathering what nobody reads."""
        return self._meters is not None

    @property
    def traces(self) -> bool:
        """Whether spans are recorded."""
        return self._tracer is not None

    def count(self, metric: Metric, amount: int = 1, *values: str) -> None:
        """Add `amount` to a counter; `values` are the attribute values in the metric's order."""
        if self._meters is not None:
            self._series[metric.name].record(amount, values)

    def observe(self, metric: Metric, value: float, *values: str) -> None:
        """Record one value of a histogram (in the metric's unit) or the present value of a gauge."""
        if self._meters is not None:
            self._series[metric.name].record(value, values)

    def span(
        self,
        name: str,
        parent: Context | None = None,
        attributes: Mapping[str, AttributeValue] | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> AbstractContextManager[Span]:
        """A span as a context manager, current inside it; `parent` None continues the current one.

        An exception is recorded with its type only: its text may quote a viewer's data.
        """
        if self._tracer is None:
            return _OFF
        return self._recorded(name, parent, attributes, kind)

    @contextlib.contextmanager
    def _recorded(
        self,
        name: str,
        parent: Context | None,
        attributes: Mapping[str, AttributeValue] | None,
        kind: SpanKind,
    ) -> Iterator[Span]:
        assert self._tracer is not None  # noqa: S101
        with self._tracer.start_as_current_span(
            name, parent, kind, attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield span
            except BaseException as error:
                span.set_attribute("error.type", type(error).__qualname__)
                span.set_status(Status(StatusCode.ERROR))
                raise

    def inject(self, headers: Sequence[Header] = (), context: Context | None = None) -> list[Header]:
        """Those headers with the trace of `context` (None: the current one) in place of any they carried."""
        if self._tracer is None:
            return list(headers)
        kept = [header for header in headers if header[0] not in _PROPAGATOR.fields]
        _PROPAGATOR.inject(kept, context, _HEADERS)
        return kept

    def extract(self, headers: Sequence[Header] | None) -> Context:
        """The trace context in Kafka headers; an empty one for headers that are absent, broken or hostile."""
        if self._tracer is None or not headers:
            return _NOTHING
        return _PROPAGATOR.extract(headers, _NOTHING, _HEADERS)

    def close(self) -> None:
        """Flush what is pending, within the exporters' time limits, and stop. A second call does nothing."""
        if self._tracers is not None:
            self._tracers.shutdown()
            self._tracers = None
        if self._meters is not None:
            meters, self._meters = self._meters, None
            meters.shutdown()
        self._tracer = None


class _Series:
    """One metric's instrument and the attribute sets it has been recorded with."""

    def __init__(self, metric: Metric, meter: Meter) -> None:
        self._metric = metric
        self._sets: dict[tuple[str, ...], dict[str, str]] = {}
        name, unit, description = metric.name, metric.unit, metric.description
        match metric.kind:
            case Kind.COUNTER:
                self._record = meter.create_counter(name, unit, description).add
            case Kind.HISTOGRAM:
                self._record = meter.create_histogram(
                    name, unit, description, explicit_bucket_boundaries_advisory=metric.buckets
                ).record
            case Kind.GAUGE:
                self._record = meter.create_gauge(name, unit, description).set

    def record(self, value: float, values: tuple[str, ...]) -> None:
        attributes = self._sets.get(values)
        self._record(value, attributes if attributes is not None else self._new_set(values))

    def _new_set(self, values: tuple[str, ...]) -> dict[str, str]:
        keys = self._metric.attributes
        if len(values) != len(keys):
            raise TypeError(f"{self._metric.name} takes attributes {keys}, not {len(values)} values")
        if len(self._sets) >= SERIES_LIMIT:
            return dict.fromkeys(keys, OTHER)
        attributes = self._sets[values] = dict(zip(keys, map(str, values), strict=True))
        return attributes


class _Headers(Getter[Sequence[Header]], Setter[list[Header]]):
    """Kafka headers as a carrier of text. What is not short ASCII counts as absent."""

    def get(self, carrier: Sequence[Header], key: str) -> list[str] | None:
        for name, value in carrier:
            if name == key and isinstance(value, bytes) and len(value) <= HEADER_LIMIT and value.isascii():
                return [value.decode("ascii")]
        return None

    def keys(self, carrier: Sequence[Header]) -> list[str]:
        return [name for name, _ in carrier]

    def set(self, carrier: list[Header], key: str, value: str) -> None:
        carrier.append((key, value.encode("ascii")))


_PROPAGATOR: Final = TraceContextTextMapPropagator()
_HEADERS: Final = _Headers()


def create_telemetry(
    environment: Mapping[str, str] | None = None,
    *,
    span_processors: Sequence[SpanProcessor] = (),
    metric_readers: Sequence[MetricReader] = (),
) -> Telemetry:
    """Telemetry as the standard variables ask for it (default: the process's environment).

    OTEL_SDK_DISABLED=true turns all off. OTEL_TRACES_EXPORTER and OTEL_METRICS_EXPORTER are `otlp`, `console`
    or `none`; unset means `otlp` where OTEL_EXPORTER_OTLP_ENDPOINT (or the signal's own) is set, else none. OTLP
    goes over http/protobuf. The SDK reads service name, sampler, headers, time limits and intervals from the
    process's own variables. `span_processors` and `metric_readers` are added to what the variables ask for.

    Raises TelemetryError for an exporter or protocol that is not there.
    """
    environment = os.environ if environment is None else environment
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return Telemetry(None, None)
    processors = [*_span_processors(environment), *span_processors]
    readers = [*_metric_readers(environment), *metric_readers]
    return Telemetry(
        _tracer_provider(processors) if processors else None,
        _meter_provider(readers) if readers else None,
    )


def _tracer_provider(processors: Sequence[SpanProcessor]) -> TracerProvider:
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
    for processor in processors:
        provider.add_span_processor(processor)
    return provider


def _meter_provider(readers: Sequence[MetricReader]) -> MeterProvider:
    from opentelemetry.sdk.metrics import MeterProvider

    return MeterProvider(readers, resource=_resource(), shutdown_on_exit=False)


def _resource() -> Resource:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    try:
        version = importlib.metadata.version("viewer-personas")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        version = "unknown"
    ours = {
        "service.name": "viewer-personas",
        "service.version": version,
        "service.instance.id": f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}",
    }
    return Resource.create(ours).merge(OTELResourceDetector().detect())


def _span_processors(environment: Mapping[str, str]) -> list[SpanProcessor]:
    exporter = _exporter_name(environment, "TRACES")
    if exporter == "none":
        return []
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    if exporter == "console":
        return [BatchSpanProcessor(ConsoleSpanExporter(out=sys.stderr))]
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return [BatchSpanProcessor(OTLPSpanExporter(endpoint=_endpoint(environment, "TRACES")))]


def _metric_readers(environment: Mapping[str, str]) -> list[MetricReader]:
    exporter = _exporter_name(environment, "METRICS")
    if exporter == "none":
        return []
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader

    if exporter == "console":
        return [PeriodicExportingMetricReader(ConsoleMetricExporter(out=sys.stderr))]
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    return [PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=_endpoint(environment, "METRICS")))]


def _exporter_name(environment: Mapping[str, str], signal: str) -> str:
    variable = f"OTEL_{signal}_EXPORTER"
    default = "otlp" if _endpoint(environment, signal) else "none"
    name = environment.get(variable, "").strip().lower() or default
    if name not in ("otlp", "console", "none"):
        raise TelemetryError(f"{variable}={name!r} is not known; use otlp, console or none")
    variable = "OTEL_EXPORTER_OTLP_PROTOCOL"
    protocol = environment.get(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL") or environment.get(variable)
    if name == "otlp" and protocol not in (None, "", "http/protobuf"):
        raise TelemetryError(f"OTLP over {protocol!r} is not installed; set {variable}=http/protobuf")
    return name


def _endpoint(environment: Mapping[str, str], signal: str) -> str | None:
    own = environment.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    if own:
        return own
    base = environment.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    return f"{base.rstrip('/')}/v1/{signal.lower()}" if base else None


_CONTROL: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
"""Control characters as visible escapes: a title must not forge a log line or drive a terminal."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts, level, logger, message; trace_id, span_id, exception where there are."""

    def __init__(self, secrets: Collection[str] = ()) -> None:
        super().__init__()
        self._secrets = _longest_first(secrets)

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _redacted(record.getMessage(), self._secrets),
        }
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            line["trace_id"] = trace.format_trace_id(context.trace_id)
            line["span_id"] = trace.format_span_id(context.span_id)
        if record.exc_info:
            line["exception"] = _redacted(self.formatException(record.exc_info), self._secrets)
        # A message may quote input with lone surrogates, which are not UTF-8: show them, keep the line.
        safe = {key: text.encode("utf-8", "backslashreplace").decode() for key, text in line.items()}
        return orjson.dumps(safe).decode()


class TextFormatter(logging.Formatter):
    """For people: time, level, logger and message on one line, a traceback below it."""

    def __init__(self, secrets: Collection[str] = ()) -> None:
        super().__init__()
        self._secrets = _longest_first(secrets)

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        time = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S")
        message = _redacted(record.getMessage(), self._secrets).translate(_CONTROL)
        line = f"{time} {record.levelname.lower():<7} {record.name}: {message}"
        if record.exc_info:
            line += "\n" + _redacted(self.formatException(record.exc_info), self._secrets)
        return line


def configure_logging(*, json: bool, level: str = "INFO", secrets: Collection[str] = ()) -> None:
    """Send every log record to standard error, as JSON lines or as text.

    `secrets` (passwords) are shown as `***` wherever they would appear. Replaces handlers set before.
    Raises ValueError for a level that logging does not know.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(secrets) if json else TextFormatter(secrets))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("aiokafka.consumer.consumer", "aiokafka.consumer.subscription_state"):
        # They tell of each assignment of a consumer that joins no group, and the worker reads logs with such a one.
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


def _longest_first(secrets: Collection[str]) -> list[str]:
    return sorted(filter(None, secrets), key=len, reverse=True)


def _redacted(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
