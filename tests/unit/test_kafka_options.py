"""Connection options for each Kafka client, from one set of settings."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest

from agents.kafka_admin import (
    aiokafka_options,
    confluent_options,
    faust_brokers,
    faust_credentials,
    topic_config,
)
from agents.settings import Settings, SettingsError
from streams.topics import TOPICS

SASL = Settings(
    kafka_bootstrap="a:1, b:2",
    kafka_security_protocol="SASL_SSL",
    kafka_sasl_mechanism="SCRAM-SHA-512",
    kafka_username="user",
    kafka_password="hunter2",  # noqa: S106
)


def test_plaintext_needs_no_credentials() -> None:
    assert aiokafka_options(Settings()) == {
        "bootstrap_servers": Settings().kafka_bootstrap,
        "security_protocol": "PLAINTEXT",
    }
    assert "sasl.username" not in confluent_options(Settings())
    assert faust_credentials(Settings()) is None


def test_sasl_over_tls_reaches_every_client() -> None:
    options = aiokafka_options(SASL)
    assert options["sasl_mechanism"] == "SCRAM-SHA-512"
    assert (options["sasl_plain_username"], options["sasl_plain_password"]) == ("user", "hunter2")
    assert options["ssl_context"].verify_mode is ssl.CERT_REQUIRED

    confluent = confluent_options(SASL)
    assert confluent["security.protocol"] == "SASL_SSL"
    assert confluent["sasl.mechanism"] == "SCRAM-SHA-512"
    assert (confluent["sasl.username"], confluent["sasl.password"]) == ("user", "hunter2")

    credentials: Any = faust_credentials(SASL)
    assert credentials is not None
    assert credentials.protocol.value == "SASL_SSL"
    assert credentials.mechanism.value == "SCRAM-SHA-512"
    assert (credentials.username, credentials.password) == ("user", "hunter2")


def test_tls_without_log_in() -> None:
    settings = Settings(kafka_security_protocol="SSL")
    credentials = faust_credentials(settings)
    assert credentials is not None
    assert credentials.protocol.value == "SSL"
    assert "sasl_mechanism" not in aiokafka_options(settings)


def test_faust_gets_each_broker() -> None:
    assert faust_brokers(SASL) == ["kafka://a:1", "kafka://b:2"]


def test_an_unreadable_ca_file_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "ca.pem"
    broken.write_text("no certificate")
    for path in (broken, tmp_path / "absent.pem"):
        with pytest.raises(SettingsError, match="PERSONAS_KAFKA_CA_FILE"):
            aiokafka_options(Settings(kafka_security_protocol="SSL", kafka_ca_file=str(path)))


@pytest.mark.parametrize(
    ("settings", "variable"),
    [
        (Settings(kafka_security_protocol="TLS"), "PERSONAS_KAFKA_SECURITY_PROTOCOL"),
        (
            Settings(kafka_security_protocol="SASL_SSL", kafka_sasl_mechanism="GSSAPI"),
            "PERSONAS_KAFKA_SASL_MECHANISM",
        ),
        (Settings(kafka_security_protocol="SASL_SSL", kafka_username="user"), "PERSONAS_KAFKA_PASSWORD"),
    ],
)
def test_unusable_security_settings_are_refused(settings: Settings, variable: str) -> None:
    for options in (aiokafka_options, confluent_options, faust_credentials):
        with pytest.raises(SettingsError, match=variable):
            options(settings)


def test_every_topic_is_stamped_on_append() -> None:
    assert {topic_config(Settings(), topic)["message.timestamp.type"] for topic in TOPICS} == {"LogAppendTime"}


def test_only_compacted_topics_are_compacted_and_keep_tombstones_for_a_week() -> None:
    for topic in TOPICS:
        config = topic_config(Settings(), topic)
        assert (config["cleanup.policy"] == "compact") is topic.compacted
        assert config.get("delete.retention.ms") == ("604800000" if topic.compacted else None)
        assert config.get("retention.ms") == (None if topic.compacted else str(topic.retention_ms))


@pytest.mark.parametrize(("replicas", "in_sync"), [(1, "1"), (2, "1"), (3, "2")])
def test_one_replica_may_be_away(replicas: int, in_sync: str) -> None:
    config = topic_config(Settings(replication_factor=replicas), TOPICS[0])
    assert config["min.insync.replicas"] == in_sync
