"""Settings of every process: read once from the environment, overridden by command-line flags, then immutable."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

ENVIRONMENT_PREFIX = "PERSONAS_"


class SettingsError(ValueError):
    """A setting has a value that cannot be used; the message names the variable and what it accepts."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings. Each field `name` is read from the environment variable `PERSONAS_NAME`.

    Secrets carry `secret=True` in their metadata and never appear in `shown()` or in logs.
    """

    kafka_bootstrap: str = field(default="127.0.0.1:29092", metadata={"help": "Kafka brokers, host:port,..."})
    kafka_security_protocol: str = field(
        default="PLAINTEXT", metadata={"help": "PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL"}
    )
    kafka_sasl_mechanism: str = field(default="PLAIN", metadata={"help": "PLAIN, SCRAM-SHA-256, SCRAM-SHA-512"})
    kafka_username: str = field(default="", metadata={"help": "SASL user name"})
    kafka_password: str = field(default="", repr=False, metadata={"help": "SASL password", "secret": True})
    kafka_ca_file: str = field(default="", metadata={"help": "PEM file of the certificate authority, for SSL"})
    topic_prefix: str = field(default="", metadata={"help": "put before every topic name and consumer group"})
    partitions: int = field(default=4, metadata={"help": "partitions of every per-user topic"})
    replication_factor: int = field(default=1, metadata={"help": "replicas of every topic that `init` creates"})
    cassandra_hosts: str = field(default="127.0.0.1", metadata={"help": "contact points, host,..."})
    cassandra_port: int = field(default=29042, metadata={"help": "native transport port"})
    cassandra_keyspace: str = field(default="personas", metadata={"help": "keyspace; `init` creates it"})
    cassandra_username: str = field(default="", metadata={"help": "user name, empty for none"})
    cassandra_password: str = field(default="", repr=False, metadata={"help": "password", "secret": True})
    cassandra_datacenter: str = field(
        default="", metadata={"help": "local data centre; empty takes the first contact point's"}
    )
    persona_ttl_days: int = field(default=90, metadata={"help": "days until an unrefreshed persona expires"})
    history_versions: int = field(default=5, metadata={"help": "persona versions kept per viewer"})
    triton_url: str = field(default="127.0.0.1:8001", metadata={"help": "Triton's gRPC address"})
    student_model: str = field(default="student", metadata={"help": "the student's model name in Triton"})
    student_concurrency: int = field(default=8, metadata={"help": "student calls in flight per worker"})
    student_deadline_seconds: float = field(default=60.0, metadata={"help": "time limit of one student call"})
    budget_tokens_per_hour: int = field(
        default=0,
        metadata={
            "help": "tokens, in and out, that the student may be paid an hour by all workers together; 0: no limit"
        },
    )
    teacher_url: str = field(
        default="",
        metadata={"help": "teacher: http(s)://host/v1 (OpenAI-compatible) or triton://host:port/model; empty: none"},
    )
    teacher_model: str = field(default="", metadata={"help": "the teacher's model name, for an http(s) teacher"})
    teacher_api_key: str = field(default="", repr=False, metadata={"help": "key of an http(s) teacher", "secret": True})
    teacher_concurrency: int = field(default=4, metadata={"help": "teacher calls in flight per worker"})
    teacher_deadline_seconds: float = field(
        default=20.0, metadata={"help": "time limit of one teacher call, waiting for a place included"}
    )
    teacher_share: float = field(
        default=0.0, metadata={"help": "share of requests, 0 to 1, that the teacher words at once; 0: none"}
    )
    teacher_interests: int = field(
        default=0, metadata={"help": "the teacher words mature viewers of so many interests at once; 0: none"}
    )
    registry: Path = field(
        default=Path(), metadata={"help": "folder of a registry snapshot; empty: the packaged demo registry"}
    )
    thresholds: Path = field(default=Path(), metadata={"help": "calibrated thresholds file; empty: the packaged one"})
    field_mapping: Path = field(
        default=Path(), metadata={"help": "JSON file mapping our event fields to yours; empty: none"}
    )
    event_decoder: str = field(
        default="", metadata={"help": "module:function from bytes to a JSON-like dict, for Avro or Protobuf"}
    )
    first_persona_after: int = field(
        default=20, metadata={"help": "qualifying watches before the first student persona"}
    )
    template_after: int = field(default=5, metadata={"help": "qualifying watches before a template persona; 0: none"})
    maximum_age_days: int = field(
        default=30, metadata={"help": "a persona older than this is refreshed at the next event; 0: never"}
    )
    request_expires_minutes: int = field(default=60, metadata={"help": "a request that waited longer gets a template"})
    intake: str = field(
        default="batch", metadata={"help": "how watch events come in: batch (whole fetches) or agent (a Faust agent)"}
    )
    state_store: str = field(
        default="memory", metadata={"help": "where states live beside the changelog: memory, or disk (RocksDB)"}
    )
    state_folder: Path = field(default=Path(), metadata={"help": "folder of the disk store; empty: in the data folder"})
    standby_replicas: int = field(
        default=0, metadata={"help": "workers beside the owner that keep a partition's disk store warm"}
    )
    flush_seconds: float = field(
        default=1.0, metadata={"help": "how often changed states are written to the changelog, and offsets committed"}
    )
    stalled_seconds: float = field(
        default=60.0, metadata={"help": "events waiting and none applied for so long fails /healthz; 0: never"}
    )
    dead_letters_per_minute: int = field(
        default=1000, metadata={"help": "a worker that dead-letters more stops and says why; 0: no limit"}
    )
    web_host: str = field(default="127.0.0.1", metadata={"help": "address of the worker's page and health checks"})
    web_port: int = field(default=0, metadata={"help": "port of the worker's page; 0: any free one, printed at start"})
    data_folder: Path = field(
        default=Path(".personas"), metadata={"help": "data of the local stack and discovery files"}
    )
    shutdown_seconds: float = field(default=20.0, metadata={"help": "limit of a graceful stop"})

    def shown(self) -> dict[str, Any]:
        """Every setting as a JSON value, secrets replaced by `***` where set."""
        return {f.name: _shown(getattr(self, f.name), secret=bool(f.metadata.get("secret"))) for f in fields(self)}

    def environment(self) -> dict[str, str]:
        """The variables that make another process load these settings, secrets included: never to be shown."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {ENVIRONMENT_PREFIX + name.upper(): str(value) for name, value in values.items() if value != Path()}


def load_settings(environment: Mapping[str, str] | None = None, **overrides: Any) -> Settings:  # noqa: ANN401
    """Read settings from `environment` (default: the process's), then apply the overrides that are not None.

    Raises SettingsError for a value of the wrong type, and for a `PERSONAS_` variable that no setting has.
    """
    environment = os.environ if environment is None else environment
    types = get_type_hints(Settings)
    known = {ENVIRONMENT_PREFIX + name.upper(): name for name in types}
    unknown = sorted(key for key in environment if key.startswith(ENVIRONMENT_PREFIX) and key not in known)
    if unknown:
        raise SettingsError(f"unknown setting {unknown[0]}; `personas config` lists the known ones")
    values = {name: _parsed(key, environment[key], types[name]) for key, name in known.items() if key in environment}
    return replace(Settings(**values), **{k: v for k, v in overrides.items() if v is not None})


def _parsed(variable: str, text: str, kind: type) -> Any:  # noqa: ANN401
    try:
        return kind(text)
    except ValueError as error:
        raise SettingsError(f"{variable}={text!r} is not a valid {kind.__name__}") from error


def _shown(value: object, *, secret: bool) -> Any:  # noqa: ANN401
    if secret:
        return "***" if value else ""
    if isinstance(value, Path):
        return "" if value == Path() else str(value)
    return value
