"""Says what a failure of a contract with a library means."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

LIBRARIES = {"test_faust_internals.py", "test_aiokafka_producer.py"}
ADVICE = (
    "faust-streaming, aiokafka or mode behaves otherwise than this project relies on. Before its version is raised,\n"
    "read docs/decisions/0010-whole-batches.md (what it leans on, and for what) next to the new version's code, and\n"
    "change agents/batch_intake.py, agents/changelog.py or agents/output_writer.py with it."
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Add the advice to a failure."""
    report = yield
    if report.failed and item.path.name in LIBRARIES:
        report.sections.append(("What this means", ADVICE))
    return report
