"""The persona app without a broker: what it makes of an assignment."""

from __future__ import annotations

from pathlib import Path

import pytest
from faust.types import TP

from agents.persona_app import PersonaApp
from agents.persona_writer import PersonaWriter
from agents.settings import Settings
from agents.stores.memory import MemoryStore
from agents.telemetry import create_telemetry
from streams import topics


async def test_each_partition_of_the_requests_brings_its_share_of_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    monkeypatch.setattr(PersonaWriter, "set_share", lambda writer, share: shares.append(share))
    settings = Settings(budget_tokens_per_hour=1000, partitions=4, topic_prefix="x-", data_folder=tmp_path)
    persona_app = PersonaApp(settings, MemoryStore(), create_telemetry({}))
    requests, upgrades = "x-" + topics.REFRESH_REQUESTS, "x-" + topics.UPGRADE_REQUESTS
    for assigned in ({TP(requests, 0), TP(requests, 3), TP(upgrades, 0)}, set(), {TP(requests, n) for n in range(4)}):
        await persona_app.app.on_partitions_assigned.send(assigned)
    assert shares == [0.5, 0.0, 1.0]
    await persona_app._student.close()
