"""quixstreams with State: RocksDB, changelog topic and checkpoints as they are by default (every 5 s)."""

from __future__ import annotations

from typing import Any

from counting import arguments, updated
from quixstreams import Application, State

given = arguments()
app = Application(
    broker_address=given.bootstrap,
    consumer_group=given.group,
    auto_offset_reset="earliest",
    state_dir=given.folder / "state",
    loglevel="WARNING",
)


def count(event: dict[str, Any], state: State) -> None:
    cluster = given.clusters.get(event["video_id"], -1)
    state.set("interests", updated(state.get("interests"), cluster, event["ts"]))


frame = app.dataframe(app.topic(given.topic, value_deserializer="json"))
frame.update(count, stateful=True)

if __name__ == "__main__":
    app.run()
