"""What the tests with workers of their own share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agents.settings import Settings
from tests.workers import Workers


@pytest.fixture(scope="module")
def workers(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Worker processes under the module's own `settings`; they end with it."""
    workers = Workers(settings, tmp_path_factory.mktemp("workers"))
    yield workers
    workers.end()
