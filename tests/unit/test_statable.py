"""What a card forbids is counted all the same, and never stated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest

from agents.replay import ReplayDriver
from streams import topics
from streams.registry import ClusterCard, Registry, Wording
from streams.state import from_bytes
from tests.builders import make_configuration, make_registry, watches


def changed(cluster: int, **fields: Any) -> Registry:
    """The registry with other fields on one card."""
    registry = make_registry()
    registry.cards = {**registry.cards, cluster: replace(registry.cards[cluster], **fields)}
    return registry


async def context(registry: Registry, clusters: list[int]) -> tuple[dict[str, Any], ReplayDriver]:
    driver = ReplayDriver(make_configuration(registry), registry)
    await driver.run(watches("ann", clusters))
    request = orjson.loads(driver.outputs(topics.REFRESH_REQUESTS)[-1].value or b"")
    found: dict[str, Any] = request["context"]
    return found, driver


FORBIDDEN: list[dict[str, Any]] = [{"coherent": False}, {"sensitive": True}, {"wording": Wording.NONE}]


@pytest.mark.parametrize("fields", FORBIDDEN)
async def test_what_may_not_be_named_is_counted_and_neither_stated_nor_proposed(fields: dict[str, Any]) -> None:
    found, driver = await context(changed(0, **fields), [0, 1] * 10)
    assert [interest["cluster_id"] for interest in found["interests"]] == [1]
    state = from_bytes(driver.states["ann"])
    assert state["long"][state["cluster"] == 0].sum() > 3
    for watched in ([1] * 20, [2] * 20):
        found, _ = await context(changed(0, **fields), watched)
        assert 0 not in {novel["cluster_id"] for novel in found["novel"]}


async def test_a_card_in_its_parents_words_is_stated_and_not_proposed() -> None:
    rare = changed(0, wording=Wording.PARENT, label="baking", titles=(), terms=())
    found, _ = await context(rare, [0, 1] * 10)
    assert {interest["label"] for interest in found["interests"]} == {"baking", "trail running"}
    found, _ = await context(rare, [1] * 20)
    assert "baking" not in {novel["label"] for novel in found["novel"]}


async def test_two_clusters_in_the_same_words_are_stated_once() -> None:
    same = changed(0, wording=Wording.PARENT, label="trail running", titles=(), terms=())
    found, _ = await context(same, [0, 1] * 10)
    assert [interest["label"] for interest in found["interests"]] == ["trail running"]
    found, _ = await context(same, [0] * 20)
    assert "trail running" not in {novel["label"] for novel in found["novel"]}


@pytest.mark.parametrize(
    ("fields", "statable", "suggestible"),
    [
        ({}, True, True),
        ({"wording": Wording.PARENT}, True, False),
        *((fields, False, False) for fields in FORBIDDEN),
    ],
)
def test_cards_tell_what_may_be_done_with_them(fields: dict[str, Any], statable: bool, suggestible: bool) -> None:
    card: ClusterCard = changed(0, **fields).cards[0]
    assert (card.statable, card.suggestible) == (statable, suggestible)
