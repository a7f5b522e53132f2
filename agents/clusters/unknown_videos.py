"""Reads the videos that workers met and the registry lacks, from their topic to its present end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from agents.clusters.catalogue import Catalogue, catalogue_of
from agents.settings import Settings
from agents.topic_reader import TopicReader
from streams import topics


def read_unknown_videos(settings: Settings) -> Catalogue:
    """The noted videos; of a video noted twice the later record counts, records that cannot be used are reported.

    Raises KafkaUnavailable and KafkaRefused.
    """
    topic = settings.topic_prefix + topics.UNKNOWN_VIDEOS
    with TopicReader(settings) as reader:
        values = [message.value() for message in reader.read(topic)]
    return catalogue_of(topic, _rows(values))


def _rows(values: list[bytes | None]) -> Iterator[dict[str, Any]]:
    for value in values:
        if value is None:  # a tombstone: nothing to place
            continue
        try:
            row = orjson.loads(value)
        except orjson.JSONDecodeError:
            row = {}
        yield row if isinstance(row, dict) else {}
