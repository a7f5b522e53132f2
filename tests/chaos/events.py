"""A seeded set of watch events and controls in which every kind that a log can hold occurs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Any

import orjson

from agents.producing import MARKER_VALUE
from streams import topics
from streams.identifiers import murmur2_partition
from tests.builders import START

MINUTE, DAY = 60_000, 86_400_000
VIDEOS = 2600
"""Ids that the packaged registry knows: v0001 to this."""
EVENTS_PER_USER = 60
CONTROL_KINDS = (
    "hide", "unhide", "pin", "unpin", "forget_video", "clear_history", "opt_out", "opt_in", "opt_in", "erase",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Message:
    """A record to send. partition: None lets the key decide."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()
    partition: int | None = None


@dataclass(slots=True)
class _Viewer:
    user_id: str
    clock: int
    taste: list[int]
    watched: int = 0
    playback: dict[str, Any] | None = None


def generate(seed: int, events: int, *, controls: float = 0.015, name: str = "user") -> list[Message]:
    """So many watch events, and among them `controls` per event.

    Drifting tastes, skips and thumbs, heartbeats of playbacks, sessions, autoplay, repeats, late and far too late
    events, bots, unknown videos, histories being loaded with their end markers, and records that nobody can read.
    """
    random = Random(seed)
    viewers = [
        _Viewer(f"{name}-{i}", START + random.randrange(DAY), random.sample(range(115), 4))
        for i in range(max(8, events // EVENTS_PER_USER))
    ]
    weights = [random.lognormvariate(0.0, 1.0) for _ in viewers]
    messages: list[Message] = []
    numbers = count()
    sent = 0
    while sent < events:
        viewer = random.choices(viewers, weights)[0]
        if random.random() < controls:
            messages.append(_control(random, viewer, next(numbers)))
        messages.append(_event(random, viewer, next(numbers), messages))
        sent += 1
    return messages


def bootstrap_ends(partitions: int) -> Iterator[Message]:
    """The marker of a loaded history, on every partition of the controls."""
    for partition in range(partitions):
        yield Message(topics.USER_CONTROLS, None, MARKER_VALUE, (topics.BOOTSTRAP_END_HEADER,), partition)


def asked(messages: Sequence[Message], kind: str, ts: int = START) -> list[Message]:
    """A control of this kind of every viewer of these; of one that names a cluster, always the same."""
    keys = {message.key for message in messages if message.topic == topics.WATCH_EVENTS and message.key is not None}
    control = {"control_id": f"{kind}-of-all", "kind": kind, "ts": ts, "cluster_id": 2}
    return [
        Message(topics.USER_CONTROLS, key, orjson.dumps({**control, "user_id": key.decode()})) for key in sorted(keys)
    ]


def closing(partitions: int, number: int) -> list[Message]:
    """One watch and one control of each partition, to be sent outside any transaction.

    A log that ends with a transaction's marker is never committed to its end.
    """
    found: dict[int, list[Message]] = {}
    for i in count():
        user = f"closing-{i}"
        partition = murmur2_partition(user.encode(), partitions)
        if partition not in found:
            ts = START + number * DAY
            event = {"user_id": user, "video_id": "v0001", "ts": ts, "event_id": f"{user}/{number}"}
            control = {"user_id": user, "control_id": f"pin-{number}", "kind": "pin", "ts": ts, "cluster_id": 1}
            found[partition] = [
                Message(topics.WATCH_EVENTS, user.encode(), orjson.dumps(event)),
                Message(topics.USER_CONTROLS, user.encode(), orjson.dumps(control)),
            ]
        if len(found) == partitions:
            return [message for messages in found.values() for message in messages]
    raise AssertionError("count() does not end")


def ghosts(messages: list[Message], number: int) -> list[Message]:
    """Events like these under ids of their own, for a transaction that is aborted."""
    found = []
    for i, message in enumerate(messages):
        if message.topic == topics.WATCH_EVENTS and message.key is not None:
            user = message.key.decode()
            event = {"user_id": user, "video_id": "v0002", "ts": START, "event_id": f"ghost-{number}-{i}"}
            found.append(Message(message.topic, message.key, orjson.dumps(event)))
    return found


def _event(random: Random, viewer: _Viewer, number: int, before: list[Message]) -> Message:
    kind = random.random()
    key = viewer.user_id.encode()
    if kind < 0.04:
        return random.choice(_unusable(random, viewer))
    if kind < 0.09 and before:
        again = random.choice(before[-200:])
        if again.topic == topics.WATCH_EVENTS:
            return again
    if viewer.watched == 30:
        viewer.taste = random.sample(range(115), 4)
    viewer.clock += round(random.expovariate(1 / (40 * MINUTE)))
    event: dict[str, Any] = {
        "user_id": viewer.user_id,
        "video_id": _video(random, viewer),
        "ts": viewer.clock,
        "event_id": f"{viewer.user_id}/{number}",
        "session_id": f"s{viewer.clock // (60 * MINUTE)}",
    }
    headers: tuple[tuple[str, bytes], ...] = ()
    if kind < 0.14:
        event["action"] = random.choice(["skip", "thumbs_down", "thumbs_up", "share", "not_interested", "bookmark"])
    elif kind < 0.24:
        return _heartbeat(random, viewer, event)
    elif kind < 0.28:
        event["ts"] -= random.randrange(60) * DAY
    elif kind < 0.30:
        event["traffic"] = random.choice(["bot", "test"])
    elif kind < 0.34:
        headers = (topics.BOOTSTRAP_HEADER,)
    elif kind < 0.37:
        event |= {"autoplay": True, "watch_ms": random.randrange(200_000), "duration_ms": 180_000}
    elif kind < 0.39:
        event |= {"title": "unheard of " * random.randrange(1, 200), "video_id": f"new-{random.randrange(50)}"}
    viewer.watched += 1
    return Message(topics.WATCH_EVENTS, key, orjson.dumps(event), headers)


def _heartbeat(random: Random, viewer: _Viewer, event: dict[str, Any]) -> Message:
    """Growing watch times of one playback, sent several times."""
    if viewer.playback is None or random.random() < 0.3:
        viewer.playback = event | {"playback_id": event["event_id"], "duration_ms": 600_000, "watch_ms": 0}
    viewer.playback["watch_ms"] += random.randrange(200_000)
    beat = viewer.playback | {"ts": event["ts"]}
    return Message(topics.WATCH_EVENTS, viewer.user_id.encode(), orjson.dumps(beat))


def _video(random: Random, viewer: _Viewer) -> str:
    topic = random.choice(viewer.taste) if random.random() < 0.85 else random.randrange(113)
    return f"v{min(VIDEOS, topic * 23 + 1 + random.randrange(23)):04}"


def _unusable(random: Random, viewer: _Viewer) -> list[Message]:
    key, topic = viewer.user_id.encode(), topics.WATCH_EVENTS
    other = orjson.dumps({"user_id": "someone else", "video_id": "v0001", "ts": viewer.clock})
    seconds = orjson.dumps({"user_id": viewer.user_id, "video_id": "v0001", "ts": viewer.clock // 1000})
    return [
        Message(topic, key, b"not json"),
        Message(topic, key, None),
        Message(topic, key, other),
        Message(topic, key, seconds),
        Message(topic, key, b"[" * random.randrange(1, 2000)),
        Message(topic, None, b"{}"),
    ]


def _control(random: Random, viewer: _Viewer, number: int) -> Message:
    kind = random.choice(CONTROL_KINDS)
    value = {
        "control_id": f"{kind}-{number}",
        "user_id": viewer.user_id,
        "kind": kind,
        "ts": viewer.clock,
        "cluster_id": random.randrange(60),
        "video_id": _video(random, viewer),
    }
    if random.random() < 0.05:
        value["kind"] = "explode"
    return Message(topics.USER_CONTROLS, viewer.user_id.encode(), orjson.dumps(value))
