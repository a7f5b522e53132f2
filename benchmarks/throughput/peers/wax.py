"""bytewax: its Kafka source, `stateful_map`, and its recovery store with one snapshot an epoch (10 s by default)."""

from __future__ import annotations

from typing import Any

import bytewax.operators as op
import orjson
from bytewax.connectors.kafka import KafkaSource, KafkaSourceMessage
from bytewax.dataflow import Dataflow
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.run import cli_main
from confluent_kafka import OFFSET_BEGINNING
from counting import Marks, arguments, updated

given = arguments()


def decoded(message: KafkaSourceMessage) -> tuple[str, tuple[int, int]]:
    event = orjson.loads(message.value)
    return event["user_id"], (given.clusters.get(event["video_id"], -1), event["ts"])


def count(state: dict[str, Any] | None, event: tuple[int, int]) -> tuple[dict[str, Any], int]:
    state = updated(state, *event)
    return state, state["events"]


class Counter(StatelessSinkPartition[Any]):
    """Counts what comes out."""

    def __init__(self) -> None:
        self._marks = Marks(given.events)

    def write_batch(self, items: list[Any]) -> None:
        self._marks.add(len(items))


class Counted(DynamicSink[Any]):
    """One counter per worker."""

    def build(self, step_id: str, worker_index: int, worker_count: int) -> Counter:
        return Counter()


flow = Dataflow("interests")
source = KafkaSource([given.bootstrap], [given.topic], starting_offset=OFFSET_BEGINNING, batch_size=1000)
keyed = op.map("decode", op.input("events", flow, source), decoded)
op.output("count", op.stateful_map("interests", keyed, count), Counted())

if __name__ == "__main__":
    store = given.folder / "recovery"
    store.mkdir(parents=True)
    init_db_dir(store, 1)
    cli_main(flow, recovery_config=RecoveryConfig(str(store)))
