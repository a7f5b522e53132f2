"""`personas export`: everything stored about a viewer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import click
import orjson
from aiokafka import AIOKafkaConsumer

from agents.artefacts import load_current_registry
from agents.cli.failures import one_line_errors
from agents.kafka_admin import aiokafka_options, prefixed
from agents.kafka_clients import partitions_of
from agents.settings import Settings, SettingsError, load_settings
from agents.stores.cassandra import CassandraStore
from streams import topics
from streams.identifiers import murmur2_partition
from streams.registry import Registry
from streams.state import BOOTSTRAPPED, OPTED_OUT, STATE, State, StateError, from_bytes, members

_SLOT_FIELDS = ("short", "long", "negative", "reference")
_ESTIMATOR = ("kinds", "recent", "expert_weight", "expert_prior", "total", "spread", "born", "count")
_RESHAPED = frozenset(
    {
        "flags",
        "hidden",
        "pinned",
        "stated",
        "stated_from",
        "cluster",
        "in_session",
        "evidence_video",
        "evidence_ts",
        *_ESTIMATOR,
        *_SLOT_FIELDS,
    }
    | {name for name in STATE.names or () if name.startswith("ring_")}
)


@click.command()
@click.argument("user")
@click.option("--json", "as_json", is_flag=True, help="One line instead of indented JSON.")
def export(user: str, as_json: bool) -> None:
    """Print everything stored about viewer USER as JSON: persona, its history, and the interest state.

    The state is what the persona is made from: decayed watches per interest, the last watches, hidden and pinned
    interests.
    Videos that the registry does not know are shown by their 64-bit key.

    \b
    personas export ann
    personas export ann --json > ann.json
    """
    settings = load_settings()
    with one_line_errors(settings):
        document = asyncio.run(_export(settings, user))
    click.echo(orjson.dumps(document, option=0 if as_json else orjson.OPT_INDENT_2))


async def _export(settings: Settings, user_id: str) -> dict[str, Any]:
    store = await CassandraStore.connect(settings)
    try:
        latest = await store.latest(user_id)
        history = await store.history(user_id, settings.history_versions)
    finally:
        await store.close()
    value = await _stored_state(settings, user_id)
    return {
        "user_id": user_id,
        "latest": orjson.loads(latest.body) if latest else None,
        "history": [orjson.loads(row.body) for row in history],
        "interests": _readable(value, _registry(settings)) if value is not None else None,
    }


async def _stored_state(settings: Settings, user_id: str) -> bytes | None:
    """The viewer's last changelog record: their partition is read from its beginning, as a recovery does."""
    key = user_id.encode()
    consumer = AIOKafkaConsumer(**aiokafka_options(settings), enable_auto_commit=False)
    try:
        await consumer.start()
        partitions = await partitions_of(consumer, [prefixed(settings, topics.INTERESTS_CHANGELOG)])
        tp = partitions[murmur2_partition(key, len(partitions))]
        consumer.assign([tp])
        await consumer.seek_to_beginning(tp)
        end = (await consumer.end_offsets([tp]))[tp]
        value: bytes | None = None
        while await consumer.position(tp) < end:
            for record in (await consumer.getmany(tp, timeout_ms=500)).get(tp, ()):
                if record.key == key:
                    value = record.value
        return value
    finally:
        await consumer.stop()


def _readable(value: bytes, registry: Registry | None) -> dict[str, Any]:
    try:
        return state_document(from_bytes(value), registry)
    except StateError as error:
        return {"unreadable": str(error), "bytes": value.hex()}


def state_document(state: State, registry: Registry | None) -> dict[str, Any]:
    """A viewer's interest state as JSON values: labels and video ids where the registry knows them."""
    flags = int(state["flags"])
    document = {name: state[name].item() for name in STATE.names or () if name not in _RESHAPED}
    return document | {
        "estimator": {name: state[name].tolist() for name in _ESTIMATOR},
        "opted_out": bool(flags & OPTED_OUT),
        "bootstrapped": bool(flags & BOOTSTRAPPED),
        "hidden": [_cluster(cluster, registry) for cluster in sorted(members(state["hidden"]))],
        "pinned": [_cluster(cluster, registry) for cluster in sorted(members(state["pinned"]))],
        "clusters": [_slot(state, slot, registry) for slot, cluster in enumerate(state["cluster"]) if cluster >= 0],
        "last_events": [_event(state, place, registry) for place in range(int(state["ring_used"]))],
    }


def _slot(state: State, slot: int, registry: Registry | None) -> dict[str, Any]:
    evidence = zip(state["evidence_video"][slot], state["evidence_ts"][slot], strict=True)
    return {
        **_cluster(int(state["cluster"][slot]), registry),
        **{name: state[name][slot].item() for name in _SLOT_FIELDS},
        "evidence": [{"video_id": _video(int(key), registry), "ts": int(ts)} for key, ts in evidence if ts],
    }


def _event(state: State, place: int, registry: Registry | None) -> Mapping[str, Any]:
    return {
        "video_id": _video(int(state["ring_video"][place]), registry),
        "ts": int(state["ring_ts"][place]),
        "cluster_id": int(state["ring_cluster"][place]),
        "weight": float(state["ring_weight"][place]),
    }


def _cluster(cluster: int, registry: Registry | None) -> dict[str, Any]:
    card = registry.cards.get(cluster) if registry else None
    return {"cluster_id": cluster, "label": card.label if card else None}


def _video(key: int, registry: Registry | None) -> str:
    return (registry.video_of(key) if registry else None) or f"key:{key:016x}"


def _registry(settings: Settings) -> Registry | None:
    """The registry for labels; the export is complete without it, so its absence is only said."""
    try:
        return load_current_registry(settings)
    except SettingsError as error:
        click.echo(f"labels are not shown: {error}", err=True)
        return None
