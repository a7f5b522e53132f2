"""The persona app without a broker: what it makes of an assignment."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from faust.types import TP
from tritonclient.utils import InferenceServerException

from agents.persona_app import PersonaApp
from agents.persona_writer import PersonaWriter
from agents.settings import Settings
from agents.stores.memory import MemoryStore
from agents.student_client import TritonStudent
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


@dataclass
class Metadata:
    """What Triton says of a model."""

    name: str
    versions: list[str]


@dataclass
class Triton:
    """Triton's client: it answers with these, one after the other; the last one stays."""

    said: list[Metadata | Exception]
    asked: list[str] = field(default_factory=list)

    async def get_model_metadata(self, model: str, client_timeout: float) -> Metadata:
        self.asked.append(model)
        said = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        if isinstance(said, Exception):
            raise said
        return said

    async def close(self) -> None:
        return None


async def test_the_writer_is_told_which_student_it_has_once_that_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(PersonaWriter, "set_student", lambda writer, student_id: told.append(student_id))
    monkeypatch.setattr("agents.persona_app.HEALTH_SECONDS", 0.0)
    settings = Settings(student_model="small", data_folder=tmp_path)
    persona_app = PersonaApp(settings, MemoryStore(), create_telemetry({}))
    await persona_app._student.close()
    student = TritonStudent(settings)
    away, none_ready = InferenceServerException("refused"), Metadata("small", [])
    fake = Triton([away, none_ready, Metadata("small", ["2", "10", "9"])])
    await student._client.close()
    student._client = fake
    persona_app._student = student
    await persona_app._identify_student()
    assert told == ["small/10"]
    assert fake.asked == ["small"] * 3
    await student.close()
    assert await student.identity() is None
