"""aiokafka `getmany`, orjson and numpy: events looked up and dropped. No state, nothing durable."""

from __future__ import annotations

import asyncio

import numpy as np
import orjson
from aiokafka import AIOKafkaConsumer
from counting import Marks, arguments

given = arguments()


async def main() -> None:
    consumer = AIOKafkaConsumer(
        given.topic,
        bootstrap_servers=given.bootstrap,
        group_id=given.group,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    marks, totals = Marks(given.events), np.zeros(max(given.clusters.values()) + 2)
    done = False
    while not done:
        count = 0
        for records in (await consumer.getmany(timeout_ms=500)).values():
            events = [orjson.loads(record.value) for record in records]
            clusters = [given.clusters.get(event["video_id"], -1) for event in events]
            totals += np.bincount(np.array(clusters) + 1, minlength=len(totals))
            count += len(records)
        done = marks.add(count)
    await consumer.stop()


if __name__ == "__main__":
    asyncio.run(main())
