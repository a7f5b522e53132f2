"""Runs `personas` commands in this process, with the settings of a test in the environment."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from agents.cli import personas
from agents.settings import ENVIRONMENT_PREFIX, Settings


def environment_of(settings: Settings) -> dict[str, str | None]:
    """The variables that make `load_settings` give these settings."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {
        ENVIRONMENT_PREFIX + name.upper(): str(value)
        for name, value in values.items()
        if value != Path() and value != getattr(Settings(), name)
    }


def run(settings: Settings, *arguments: str) -> Result:
    """Run `personas ARGUMENTS`; an exception other than an exit fails the test."""
    result = CliRunner().invoke(personas, arguments, env=environment_of(settings))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        pytest.fail(f"personas {' '.join(arguments)} raised {result.exception!r}\n{result.output}")
    return result
