"""Videos that workers noted come out of Kafka as they went in."""

from __future__ import annotations

from dataclasses import replace

import pytest
from aiokafka import AIOKafkaProducer

from agents.clusters.catalogue import Video
from agents.clusters.unknown_videos import read_unknown_videos
from agents.kafka_admin import KafkaRefused, create_topics
from streams.records import UnknownVideo, encode
from streams.topics import TOPICS, UNKNOWN_VIDEOS
from tests.conftest import Stack


@pytest.mark.stack
async def test_noted_videos_are_read_to_the_end(kafka: Stack, topic_prefix: str) -> None:
    settings = replace(kafka.settings, topic_prefix=topic_prefix)
    topic = topic_prefix + UNKNOWN_VIDEOS
    with pytest.raises(KafkaRefused, match="personas init"):
        read_unknown_videos(settings)
    create_topics(settings, [known for known in TOPICS if known.name == UNKNOWN_VIDEOS])
    assert read_unknown_videos(settings).videos == ()

    noted = [UnknownVideo(f"v{number}", f"Title {number}", ("tag",), ("Food",)) for number in range(40)]
    values = [encode(video) for video in noted] + [encode(UnknownVideo("v7", None)), None, b"broken", b"[]"]
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap)
    await producer.start()
    try:
        for number, value in enumerate(values):
            key = b"v7" if number in (7, 40) else str(number).encode()
            await producer.send_and_wait(topic, value, key=key)
    finally:
        await producer.stop()
    read = read_unknown_videos(settings)
    assert len(read.videos) == 40
    assert Video("v3", "Title 3", ("tag",), ("Food",)) in read.videos
    assert Video("v7") in read.videos
    assert len(read.bad_lines) == 2
    assert read.name == topic
