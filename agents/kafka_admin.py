"""Kafka from the operator's side: client options, topic creation and verification, topic ids."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from confluent_kafka import KafkaError, KafkaException, TopicCollection, Uuid
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exports without saying so
    AdminClient,
    ConfigResource,
    NewTopic,
    ResourceType,
)

from agents.settings import Settings, SettingsError
from streams.topics import DAY_MS, TOPICS, WATCH_EVENTS, Topic

if TYPE_CHECKING:
    from faust.types.auth import CredentialsT

ABSENT: Final = "absent"
TOMBSTONE_MS: Final = 7 * DAY_MS
REQUEST_SECONDS: Final = 15.0
RETRY_SECONDS: Final = 1.0
_PROTOCOLS: Final = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_AT_LEAST: Final = frozenset({"retention.ms", "delete.retention.ms", "max.message.bytes", "min.insync.replicas"})
"""Topic settings of which more than asked for does no harm; -1 means unlimited."""


class KafkaUnavailable(Exception):  # noqa: N818 - a state of the brokers
    """The brokers do not answer; the message names them, the cause, and what to do."""


class KafkaRefused(Exception):  # noqa: N818 - the brokers' verdict
    """The brokers answered and refused; the message says what."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One way in which a topic is not what the program needs, and how to mend it."""

    topic: str
    what: str
    expected: str
    found: str
    remedy: str

    def __str__(self) -> str:
        if self.found == ABSENT:
            return f"{self.topic} is absent; {self.remedy}"
        return f"{self.topic}: {self.what} is {self.found}, needs {self.expected}; {self.remedy}"


def prefixed(settings: Settings, name: str) -> str:
    """A topic's or consumer group's name in Kafka, from its name in streams/topics.py."""
    return f"{settings.topic_prefix}{name}"


def aiokafka_options(settings: Settings) -> dict[str, Any]:
    """Connection arguments of aiokafka's consumer and producer. Raises SettingsError."""
    _check_security(settings)
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_bootstrap,
        "security_protocol": settings.kafka_security_protocol,
    }
    if _encrypted(settings):
        options["ssl_context"] = _ssl_context(settings)
    if _authenticated(settings):
        options["sasl_mechanism"] = settings.kafka_sasl_mechanism
        options["sasl_plain_username"] = settings.kafka_username
        options["sasl_plain_password"] = settings.kafka_password
    return options


def confluent_options(settings: Settings) -> dict[str, Any]:
    """Connection options of every confluent-kafka client. Raises SettingsError."""
    _check_security(settings)
    options: dict[str, Any] = {
        "bootstrap.servers": settings.kafka_bootstrap,
        "security.protocol": settings.kafka_security_protocol,
        "log_level": 1,  # errors reach callers as exceptions; librdkafka would print them as well
    }
    if _encrypted(settings) and settings.kafka_ca_file:
        options["ssl.ca.location"] = settings.kafka_ca_file
    if _authenticated(settings):
        options["sasl.mechanism"] = settings.kafka_sasl_mechanism
        options["sasl.username"] = settings.kafka_username
        options["sasl.password"] = settings.kafka_password
    return options


def faust_brokers(settings: Settings) -> list[str]:
    """Broker addresses as Faust's `broker` argument takes them."""
    return [f"kafka://{host.strip()}" for host in settings.kafka_bootstrap.split(",") if host.strip()]


def faust_credentials(settings: Settings) -> CredentialsT | None:
    """Faust's `broker_credentials` argument, None for PLAINTEXT. Raises SettingsError."""
    from faust.auth import SASLCredentials, SSLCredentials

    _check_security(settings)
    context = _ssl_context(settings) if _encrypted(settings) else None
    if _authenticated(settings):
        return SASLCredentials(
            username=settings.kafka_username,
            password=settings.kafka_password,
            ssl_context=context,
            mechanism=settings.kafka_sasl_mechanism,
        )
    return SSLCredentials(context) if context else None


def topic_ids(settings: Settings, names: Iterable[str]) -> dict[str, str]:
    """As `TopicIds.read`, once."""
    return TopicIds(settings).read(names)


class TopicIds:
    """Asks for the ids of topics, as often as needed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client: AdminClient | None = None

    def read(self, names: Iterable[str]) -> dict[str, str]:
        """Kafka's id of each topic as its own tools show it, by the names given (without prefix).

        A recreated topic has another id. Raises KafkaUnavailable, and KafkaRefused for a topic that does not exist.
        """
        if self._client is None:
            self._client = _admin(self._settings)
        settings, wanted = self._settings, list(names)
        found = _described(self._client, settings, [prefixed(settings, name) for name in wanted])
        missing = [prefixed(settings, name) for name in wanted if prefixed(settings, name) not in found]
        if missing:
            raise KafkaRefused(f"topic {missing[0]} does not exist at {_address(settings)}; run `personas init`")
        return {name: _shown_id(found[prefixed(settings, name)].topic_id) for name in wanted}


def wait_for_kafka(settings: Settings, wait_seconds: float, waiting: Callable[[str], None] = lambda _: None) -> None:
    """Return once a broker answers; tells `waiting` why it waits. Raises KafkaUnavailable after the time."""
    causes: list[str] = []
    watched: dict[str, Any] = {
        "error_cb": lambda error: causes.append(error.str()),
        "reconnect.backoff.max.ms": 1_000,
    }
    admin = AdminClient(confluent_options(settings) | watched)
    deadline = time.monotonic() + wait_seconds
    while True:
        left = deadline - time.monotonic()
        try:
            # One topic, present or not: the metadata of a large cluster can take long.
            admin.list_topics(prefixed(settings, WATCH_EVENTS), timeout=max(min(left, 2.0), 0.1))
            return
        except KafkaException as error:
            admin.poll(0)
            cause = _latest_cause(causes) or error.args[0].str()
        message = f"Kafka at {_address(settings)} does not answer ({cause})"
        if time.monotonic() + RETRY_SECONDS >= deadline:
            raise KafkaUnavailable(
                f"{message}; waited {wait_seconds:.0f} s. Start Kafka (`personas up` starts a local one) "
                "or set PERSONAS_KAFKA_BOOTSTRAP"
            )
        waiting(message)
        time.sleep(RETRY_SECONDS)


def create_topics(settings: Settings, topics: Iterable[Topic] = TOPICS) -> list[str]:
    """Create the topics that are missing; returns their names in Kafka. Existing ones are left as they are.

    Raises KafkaUnavailable and KafkaRefused.
    """
    admin = _admin(settings)
    wanted = {prefixed(settings, topic.name): topic for topic in topics}
    present = _described(admin, settings, list(wanted))
    missing = [name for name in wanted if name not in present]
    if not missing:
        return []
    futures = admin.create_topics(
        [
            NewTopic(
                name,
                num_partitions=_partitions(settings, wanted[name]),
                replication_factor=settings.replication_factor,
                config=topic_config(settings, wanted[name]),
            )
            for name in missing
        ],
        operation_timeout=REQUEST_SECONDS,
    )
    created = [name for name, future in futures.items() if _created(settings, name, future)]
    _wait_until_described(admin, settings, missing)
    return created


def verify_topics(settings: Settings, topics: Iterable[Topic] = TOPICS) -> list[Mismatch]:
    """Compare the topics in Kafka with what the program needs; an empty list means that all is well.

    Partition counts of per-user topics must be the setting's, since equal keys must meet in equal partitions.
    Replicas, retention and sizes may be larger. Raises KafkaUnavailable and KafkaRefused.
    """
    admin = _admin(settings)
    wanted = {prefixed(settings, topic.name): topic for topic in topics}
    described = _described(admin, settings, list(wanted))
    configs = _configs(admin, settings, list(described))
    mismatches: list[Mismatch] = []
    for name, topic in wanted.items():
        if name not in described:
            mismatches.append(Mismatch(name, "topic", "present", ABSENT, "run `personas init`"))
            continue
        mismatches += _layout_mismatches(settings, topic, described[name])
        mismatches += _config_mismatches(settings, topic, name, configs[name])
    return mismatches


def topic_config(settings: Settings, topic: Topic) -> dict[str, str]:
    """Kafka's settings of a topic.

    The append time is the timestamp: with the event's own, a broker deletes years-old events at once.
    """
    config = {
        "message.timestamp.type": "LogAppendTime",
        "cleanup.policy": "compact" if topic.compacted else "delete",
        "max.message.bytes": str(topic.maximum_message_bytes),
        # One replica may be away without stopping writes that wait for all in-sync replicas.
        "min.insync.replicas": str(max(1, settings.replication_factor - 1)),
    }
    if topic.compacted:
        return {**config, "delete.retention.ms": str(TOMBSTONE_MS)}
    return {**config, "retention.ms": str(topic.retention_ms)}


def _shown_id(topic_id: Uuid) -> str:
    """Kafka writes ids in the URL-safe alphabet, librdkafka in the standard one."""
    return str(topic_id).translate(str.maketrans("+/", "-_"))


def _layout_mismatches(settings: Settings, topic: Topic, description: Any) -> Iterator[Mismatch]:  # noqa: ANN401
    name = description.name
    partitions = len(description.partitions)
    if topic.per_user and partitions != settings.partitions:
        yield Mismatch(
            name,
            "partition count",
            str(settings.partitions),
            str(partitions),
            f"set PERSONAS_PARTITIONS={partitions} if all per-user topics have that many, else "
            "see `personas repartition` (adding partitions by other means moves viewers away from their states)",
        )
    replicas = min((len(partition.replicas) for partition in description.partitions), default=0)
    if replicas < settings.replication_factor:
        yield Mismatch(
            name,
            "replication factor",
            str(settings.replication_factor),
            str(replicas),
            "reassign its partitions with kafka-reassign-partitions.sh or lower PERSONAS_REPLICATION_FACTOR",
        )


def _config_mismatches(settings: Settings, topic: Topic, name: str, found: dict[str, str]) -> Iterator[Mismatch]:
    for key, expected in topic_config(settings, topic).items():
        value = found.get(key, "unknown")
        if not _satisfies(key, expected, value):
            at_least = "at least " if key in _AT_LEAST and expected != "-1" else ""
            yield Mismatch(
                name,
                key,
                f"{at_least}{expected}",
                value,
                f"run kafka-configs.sh --bootstrap-server {settings.kafka_bootstrap} --alter "
                f"--entity-type topics --entity-name {name} --add-config {key}={expected}",
            )


def _satisfies(key: str, expected: str, found: str) -> bool:
    if key == "cleanup.policy":
        return set(found.split(",")) == {expected}
    if key not in _AT_LEAST or found == expected:
        return found == expected
    if not found.lstrip("-").isdigit() or expected == "-1":
        return False
    return found == "-1" or int(found) >= int(expected)


def _partitions(settings: Settings, topic: Topic) -> int:
    return settings.partitions if topic.per_user else 1


def _created(settings: Settings, name: str, future: Any) -> bool:  # noqa: ANN401
    """Whether this call created the topic; False if another one did meanwhile."""
    try:
        future.result()
    except KafkaException as error:
        if error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
            return False
        raise _kafka_error(settings, f"creating topic {name}", error) from error
    return True


def _wait_until_described(admin: AdminClient, settings: Settings, names: list[str]) -> None:
    """Brokers learn of a new topic a moment after it was created."""
    deadline = time.monotonic() + REQUEST_SECONDS
    while len(_described(admin, settings, names)) < len(names):
        if time.monotonic() >= deadline:
            raise KafkaUnavailable(f"new topics do not appear at {_address(settings)}; try again")
        time.sleep(0.1)


def _described(admin: AdminClient, settings: Settings, names: list[str]) -> dict[str, Any]:
    """Descriptions of the topics that exist, by name."""
    if not names:
        return {}
    found = {}
    futures = admin.describe_topics(TopicCollection(names), request_timeout=REQUEST_SECONDS)
    for name, future in futures.items():
        try:
            found[name] = future.result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise _kafka_error(settings, f"describing topic {name}", error) from error
    return found


def _configs(admin: AdminClient, settings: Settings, names: list[str]) -> dict[str, dict[str, str]]:
    if not names:
        return {}
    resources = [ConfigResource(ResourceType.TOPIC, name) for name in names]
    found = {}
    for resource, future in admin.describe_configs(resources, request_timeout=REQUEST_SECONDS).items():
        try:
            found[resource.name] = {key: str(entry.value) for key, entry in future.result().items()}
        except KafkaException as error:
            raise _kafka_error(settings, f"reading the settings of topic {resource.name}", error) from error
    return found


def _kafka_error(settings: Settings, doing: str, error: KafkaException) -> Exception:
    cause: KafkaError = error.args[0]
    message = f"{doing} at {_address(settings)}: {cause.str()}"
    if cause.retriable() or cause.code() < 0:  # negative codes are the client's own: transport, time-out
        return KafkaUnavailable(f"{message}; check PERSONAS_KAFKA_BOOTSTRAP and that the brokers run")
    return KafkaRefused(message)


def _latest_cause(causes: list[str]) -> str:
    """The last error that says more than that all brokers are down."""
    telling = [cause for cause in causes if "brokers are down" not in cause]
    return telling[-1] if telling else ""


def _admin(settings: Settings) -> AdminClient:
    return AdminClient(confluent_options(settings))


def _address(settings: Settings) -> str:
    return settings.kafka_bootstrap


def _encrypted(settings: Settings) -> bool:
    return settings.kafka_security_protocol in ("SSL", "SASL_SSL")


def _authenticated(settings: Settings) -> bool:
    return settings.kafka_security_protocol.startswith("SASL_")


def _ssl_context(settings: Settings) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=settings.kafka_ca_file or None)
    except OSError as error:  # ssl.SSLError is one
        raise SettingsError(f"PERSONAS_KAFKA_CA_FILE={settings.kafka_ca_file!r} cannot be used: {error}") from error


def _check_security(settings: Settings) -> None:
    if settings.kafka_security_protocol not in _PROTOCOLS:
        raise SettingsError(
            f"PERSONAS_KAFKA_SECURITY_PROTOCOL={settings.kafka_security_protocol!r} is none of " + ", ".join(_PROTOCOLS)
        )
    if not _authenticated(settings):
        return
    if settings.kafka_sasl_mechanism not in _MECHANISMS:
        raise SettingsError(
            f"PERSONAS_KAFKA_SASL_MECHANISM={settings.kafka_sasl_mechanism!r} is none of " + ", ".join(_MECHANISMS)
        )
    if not settings.kafka_username or not settings.kafka_password:
        raise SettingsError("PERSONAS_KAFKA_USERNAME and PERSONAS_KAFKA_PASSWORD are needed for SASL")
