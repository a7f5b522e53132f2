"""Stock Faust with a Table of bytes: prints how many viewers it has when the table is recovered."""

from __future__ import annotations

import faust
from counting import arguments

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
interests = app.Table("interests", partitions=4, key_type=bytes, value_type=bytes)


@app.agent(events)
async def count(stream: faust.StreamT) -> None:
    async for event in stream.events():
        interests[event.key] = event.value


async def recovered() -> None:
    print(len(interests), flush=True)


interests.on_recover(recovered)

if __name__ == "__main__":
    app.finalize()
    faust.Worker(app, loglevel="info", redirect_stdouts=False).execute_from_commandline()
