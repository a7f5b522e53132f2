"""Faust with `take`: raw bytes decoded by orjson, up to 1,000 events handled at once, one write per viewer of them."""

from __future__ import annotations

import faust
import orjson
from counting import arguments, updated

given = arguments()
app = faust.App(
    given.group,
    broker=f"kafka://{given.bootstrap}",
    datadir=str(given.folder),
    store="memory://",
    topic_disable_leader=True,
    topic_partitions=4,
    web_enabled=False,
    consumer_auto_offset_reset="earliest",
)
events = app.topic(given.topic, key_type=bytes, value_type=bytes, value_serializer="raw")
# Outside of a single event the changelog record's partition has to come from the key.
interests = app.Table("interests", partitions=4, use_partitioner=True)


@app.agent(events)
async def count(stream: faust.StreamT) -> None:
    async for values in stream.take(1000, within=0.1):
        changed = {}
        for value in values:
            event = orjson.loads(value)
            user = event["user_id"]
            state = changed[user] if user in changed else interests.get(user)
            changed[user] = updated(state, given.clusters.get(event["video_id"], -1), event["ts"])
        for user, state in changed.items():
            interests[user] = state


if __name__ == "__main__":
    app.finalize()
    faust.Worker(app, loglevel="warning").execute_from_commandline()
