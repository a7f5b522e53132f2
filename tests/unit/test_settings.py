"""Settings: defaults, environment, overrides, errors, and what `personas config` shows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import orjson
import pytest
from click.testing import CliRunner

from agents.cli import main, personas
from agents.settings import Settings, SettingsError, load_settings


def test_defaults_without_an_environment() -> None:
    assert load_settings({}) == Settings()


def test_the_environment_is_read_by_type() -> None:
    settings = load_settings(
        {
            "PERSONAS_PARTITIONS": "12",
            "PERSONAS_SHUTDOWN_SECONDS": "2.5",
            "PERSONAS_REGISTRY": "/srv/registry",
            "PERSONAS_TOPIC_PREFIX": "staging.",
            "HOME": "/root",
        }
    )
    assert settings.partitions == 12
    assert settings.shutdown_seconds == 2.5
    assert settings.registry == Path("/srv/registry")
    assert settings.topic_prefix == "staging."


def test_an_override_wins_and_none_does_not_count() -> None:
    environment = {"PERSONAS_PARTITIONS": "12"}
    assert load_settings(environment, partitions=3).partitions == 3
    assert load_settings(environment, partitions=None).partitions == 12


@pytest.mark.parametrize("text", ["four", "", "4.5"])
def test_a_value_of_the_wrong_type_names_the_variable(text: str) -> None:
    with pytest.raises(SettingsError, match="PERSONAS_PARTITIONS"):
        load_settings({"PERSONAS_PARTITIONS": text})


def test_a_misspelt_variable_is_refused() -> None:
    with pytest.raises(SettingsError, match="PERSONAS_PARTITION;"):
        load_settings({"PERSONAS_PARTITION": "4"})


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().partitions = 5  # type: ignore[misc]


def test_secrets_are_redacted_and_unset_ones_empty() -> None:
    shown = Settings(kafka_password="hunter2").shown()  # noqa: S106
    assert shown["kafka_password"] == "***"  # noqa: S105
    assert shown["cassandra_password"] == ""
    assert "hunter2" not in str(shown)


def test_everything_called_password_is_a_secret() -> None:
    passwords = [field for field in dataclasses.fields(Settings) if "password" in field.name]
    assert len(passwords) == 2
    assert all(field.metadata.get("secret") for field in passwords)


def test_every_setting_says_what_it_is() -> None:
    assert [field.name for field in dataclasses.fields(Settings) if not field.metadata.get("help")] == []


def test_config_shows_value_and_origin_of_every_setting() -> None:
    environment = {"PERSONAS_PARTITIONS": "12", "PERSONAS_CASSANDRA_PASSWORD": "hunter2"}
    result = CliRunner().invoke(personas, ["config", "--json"], env=environment)
    assert result.exit_code == 0
    shown = orjson.loads(result.output)
    assert list(shown) == [field.name for field in dataclasses.fields(Settings)]
    assert shown["partitions"]["value"] == 12
    assert shown["partitions"]["origin"] == "environment"
    assert shown["topic_prefix"]["origin"] == "default"
    assert shown["cassandra_password"]["value"] == "***"
    assert "hunter2" not in result.output


def test_config_shows_hostile_values_as_they_are() -> None:
    result = CliRunner().invoke(personas, ["config"], env={"PERSONAS_TOPIC_PREFIX": "[red]a[/b]"})
    assert result.exit_code == 0
    assert "[red]a[/b]" in result.output


def test_an_unusable_setting_is_one_line_and_exit_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PERSONAS_PARTITIONS", "many")
    monkeypatch.setattr("sys.argv", ["personas", "config"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: PERSONAS_PARTITIONS='many' is not a valid int\n"
