"""Faust as its documentation begins: a Record, a dict in a Table, an agent that takes one event after the other."""

from __future__ import annotations

import faust
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


class WatchEvent(faust.Record, serializer="json"):
    user_id: str
    video_id: str
    ts: int


events = app.topic(given.topic, value_type=WatchEvent)
interests = app.Table("interests", partitions=4)


@app.agent(events)
async def count(stream: faust.StreamT) -> None:
    async for event in stream:
        cluster = given.clusters.get(event.video_id, -1)
        interests[event.user_id] = updated(interests.get(event.user_id), cluster, event.ts)


if __name__ == "__main__":
    app.finalize()
    faust.Worker(app, loglevel="warning").execute_from_commandline()
