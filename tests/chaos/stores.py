"""What workers left on their disks, against the changelog that each store is a copy of."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from agents.changelog import Bounds
from agents.disk_store import DiskStore
from agents.kafka_admin import prefixed, topic_ids
from agents.settings import Settings
from agents.topic_reader import TopicReader
from streams import topics

Newest = Mapping[bytes, tuple[int, bytes | None]]
"""The newest record of each key: its offset and value."""


def disagreements(settings: Settings, folders: Sequence[Path]) -> list[str]:
    """What is wrong with the stores below these folders. Their workers must have stopped.

    A store must hold what the changelog says up to the offset that the store names, and one store of each partition,
    the last owner's, must reach the changelog's end.
    """
    newest: dict[int, dict[bytes, tuple[int, bytes | None]]] = defaultdict(dict)
    with TopicReader(settings) as reader:
        for message in reader.read(prefixed(settings, topics.INTERESTS_CHANGELOG)):
            newest[message.partition() or 0][message.key() or b""] = (message.offset() or 0, message.value())
    ids = topic_ids(settings, [topics.INTERESTS_CHANGELOG, topics.WATCH_EVENTS])
    reached: dict[int, int] = defaultdict(int)
    found = []
    for folder in [mark.parent for root in folders for mark in sorted(root.rglob("CURRENT"))]:
        partition = int(folder.name)
        everything = Bounds(0, sys.maxsize)
        store = DiskStore.open(folder, ids[topics.INTERESTS_CHANGELOG], ids[topics.WATCH_EVENTS], everything)
        try:
            offset, items = store.offset or 0, dict(store.items())
        finally:
            store.close()
        reached[partition] = max(reached[partition], offset)
        found += [f"store {folder}: {why}" for why in disagreement(items, offset, newest[partition])]
    for partition, records in sorted(newest.items()):
        end = max(offset + 1 for offset, _ in records.values())
        if reached[partition] < end:
            found.append(f"no store of partition {partition} reaches changelog offset {end}, only {reached[partition]}")
    return found


def disagreement(items: Mapping[bytes, bytes], offset: int, newest: Newest) -> list[str]:
    """What a store that reaches to a changelog offset holds against these records, as far as they can tell.

    Of a viewer who was written again behind the offset, compaction may have taken the earlier value.
    """
    found = [f"{key!r} was never written to the changelog" for key in items.keys() - newest.keys()]
    for key, (at, value) in newest.items():
        if key and at < offset and items.get(key) != value:
            found.append(f"{key!r} is not what changelog offset {at} says")
    return sorted(found)
