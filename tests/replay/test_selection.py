"""What viewers say reaches their personas, through the handlers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
import pytest

from agents.replay import Control, Event, ReplayDriver
from streams import topics
from streams.ageing import IDLE_DAYS
from streams.registry import Registry
from streams.topics import DAY_MS
from tests.builders import MINUTE, START, control, event, make_configuration, make_registry, watches


async def contexts(log: Sequence[Event | Control], registry: Registry) -> list[dict[str, list[dict[str, object]]]]:
    driver = ReplayDriver(make_configuration(registry), registry)
    await driver.run(log)
    outputs = [orjson.loads(output.value or b"") for output in driver.outputs(topics.REFRESH_REQUESTS)]
    return [output["context"] for output in outputs if output["context"]]


def ids(context: dict[str, list[dict[str, object]]], name: str) -> list[object]:
    return [each["cluster_id"] for each in context[name]]


async def test_a_pin_outlives_a_long_absence() -> None:
    """What was watched is forgotten by then, the list is not."""
    away = START + 200 * MINUTE + (IDLE_DAYS + 40) * DAY_MS
    log: list[Event | Control] = [
        *watches("ann", [0] * 3),
        control("ann", "pin", cluster_id=9),
        *watches("ann", [1, 2] * 20, away),
    ]
    found = await contexts(log, make_registry(clusters=12))
    assert found
    assert all(9 in ids(context, "interests") for context in found)
    assert not any(0 in ids(context, "interests") for context in found)


@pytest.mark.parametrize("audience", ["teen", "kids"])
async def test_teens_and_kids_are_proposed_safe_clusters_alone(audience: str) -> None:
    registry = make_registry(clusters=12)
    log = [event("ann", f"c{i % 3}v{i % 10}", START + i * 40 * MINUTE, audience=audience) for i in range(40)]
    found = await contexts(log, registry)
    assert found
    assert all(ids(context, "interests") and not context["novel"] for context in found)
    safe = make_registry(clusters=12)
    safe.safe = frozenset({2, 4})
    found = await contexts(log, safe)
    assert [ids(context, "novel") for context in found] == [[4]] * len(found)


async def test_adults_and_profiles_that_do_not_say_need_no_list() -> None:
    for fields in (dict[str, Any](), {"audience": "adult"}):
        log = [event("ann", f"c{i % 3}v{i % 10}", START + i * 40 * MINUTE, **fields) for i in range(40)]
        found = await contexts(log, make_registry(clusters=12))
        assert all(len(context["novel"]) >= 2 for context in found)
        assert found
