"""The watch app without a broker: what it makes of topics made anew, and of a registry recorded long ago."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import pytest

from agents.partition import PartitionStates
from agents.settings import Settings
from agents.telemetry import create_telemetry
from agents.watch_app import OWN_TOPICS, RENEW_MS, WatchApp, WorkerError, _Adopted, _Owned
from streams.positions import Position, PositionKind, decode_position
from streams.registry import Registry
from streams.state_table import StateTable
from streams.watch import WatchHandler
from tests.builders import make_configuration, make_registry

IDS = {name: f"id of {name}" for name in OWN_TOPICS}
END = 40


class States:
    """A partition's states of which only what is written to other topics is kept."""

    def __init__(self) -> None:
        self.recorded: list[Position] = []

    async def record(self, topic: str, value: bytes) -> int:
        assert topic == "x-watch-positions"
        self.recorded.append(decode_position(value))
        return len(self.recorded) - 1


class Ends:
    """A log that ends at END."""

    async def end(self, topic: str, partition: int) -> int:
        return END


def made(folder: Path, version: int = 2) -> tuple[WatchApp, Registry]:
    registry = make_registry(version=version)
    settings = Settings(topic_prefix="x-", data_folder=folder)
    app = WatchApp(
        settings, make_configuration(registry, make_registry(version=3)), registry, create_telemetry({}), IDS
    )
    app._log = cast(Any, Ends())
    return app, registry


def owned(registry: Registry, states: States, adopted: _Adopted, next_offset: int = 0) -> _Owned:
    handler = WatchHandler(make_configuration(registry), 0, registry, StateTable())
    return _Owned(handler, cast(PartitionStates, states), adopted, next_offset, next_offset, 1)


def days_ago(days: float) -> float:
    return time.time() * 1000 - days * 86_400_000


@pytest.mark.parametrize("name", OWN_TOPICS)
async def test_a_topic_made_anew_under_a_worker_ends_it(tmp_path: Path, name: str) -> None:
    app, _ = made(tmp_path)
    app._admin = cast(Any, type("Ids", (), {"read": staticmethod(lambda names: {n: IDS[n] for n in names})}))
    await app._refuse_another_log()
    other = {**IDS, name: "another id"}
    app._admin = cast(Any, type("Ids", (), {"read": staticmethod(lambda names: {n: other[n] for n in names})}))
    with pytest.raises(WorkerError, match=f"x-{name} was made anew"):
        await app._refuse_another_log()


@pytest.mark.parametrize(("version", "next_offset", "position"), [(2, 0, END), (3, 50, 50)])
async def test_the_registry_in_place_is_recorded_again_before_its_record_expires(
    tmp_path: Path, version: int, next_offset: int, position: int
) -> None:
    """Also where a later version than this worker's is in place: without a record the lineage would go unchecked."""
    app, registry = made(tmp_path)
    states = States()
    mine = owned(registry, states, _Adopted(version, "test", days_ago(13.9)), next_offset)
    await app._renew_registry(mine)
    assert states.recorded == []
    mine.adopted = _Adopted(version, "test", days_ago(14.1))
    await app._renew_registry(mine)
    await app._renew_registry(mine)
    (item,) = states.recorded
    assert (item.kind, item.position, item.watch_topic) == (PositionKind.REGISTRY, position, IDS["watch-events"])
    assert (item.registry_version, item.registry_lineage) == (version, "test")


@pytest.mark.parametrize(
    ("adopted", "recorded"),
    [
        (None, (2, 7)),
        (_Adopted(1, "test", days_ago(1)), (2, END)),
        (_Adopted(2, "test", days_ago(1)), None),
        (_Adopted(3, "test", days_ago(1)), None),
        (_Adopted(2, "test", days_ago(20)), (2, END)),
        (_Adopted(3, "test", days_ago(20)), (3, END)),
    ],
)
async def test_which_registry_an_opened_partition_gets(
    tmp_path: Path, adopted: _Adopted | None, recorded: tuple[int, int] | None
) -> None:
    app, registry = made(tmp_path)
    states = States()
    handler = WatchHandler(make_configuration(registry), 0, registry, StateTable())
    in_place = await app._adopt_registry(handler, cast(PartitionStates, states), adopted, 7, END)
    assert [(item.registry_version, item.position) for item in states.recorded] == ([recorded] if recorded else [])
    assert in_place.version == max(2, adopted.version if adopted else 0)
    assert time.time() * 1000 - in_place.at < RENEW_MS


async def test_a_registry_built_anew_is_refused(tmp_path: Path) -> None:
    app, registry = made(tmp_path)
    handler = WatchHandler(make_configuration(registry), 0, registry, StateTable())
    with pytest.raises(WorkerError, match="built anew"):
        await app._adopt_registry(handler, cast(PartitionStates, States()), _Adopted(1, "another", days_ago(0)), 0, END)
