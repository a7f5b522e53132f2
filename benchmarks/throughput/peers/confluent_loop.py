"""confluent-kafka `consume(1000)` and orjson: events looked up and dropped. No state, nothing durable."""

from __future__ import annotations

import orjson
from confluent_kafka import Consumer
from counting import Marks, arguments

given = arguments()


def main() -> None:
    consumer = Consumer(
        {
            "bootstrap.servers": given.bootstrap,
            "group.id": given.group,
            "auto.offset.reset": "earliest",
        }
    )
    consumer.subscribe([given.topic])
    marks, totals = Marks(given.events), dict.fromkeys([-1, *given.clusters.values()], 0)
    done = False
    while not done:
        messages = consumer.consume(1000, 0.5)
        for message in messages:
            event = orjson.loads(message.value())
            totals[given.clusters.get(event["video_id"], -1)] += 1
        done = marks.add(len(messages))
    consumer.close()


if __name__ == "__main__":
    main()
