"""A file of watch events as records, with the registry that holds their videos."""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from agents.artefacts import load_configuration, load_current_registry, load_format
from agents.replay import Event, append_times
from agents.settings import Settings
from streams import topics
from streams.counting import QUALIFYING_WEIGHT
from streams.decoding import Rejected
from streams.identifiers import event_text, playback_text
from streams.interests import watch_weight
from streams.records import UNASSIGNED, Action, Traffic, UnknownVideo, WatchEvent
from streams.registry import Registry
from streams.watch import WatchConfiguration

KeyOf: TypeAlias = Callable[[bytes], bytes | None]
"""From a line to its record key, None where the line has no user id."""
LAST_APPEND_TIME: Final = 10**14 - 1
"""Append time for a first look at an event's own ts: later than any ts that is accepted."""


@dataclass(frozen=True, slots=True)
class EventLog:
    """Events in their order, with what decodes them and the registry that their videos are found in."""

    records: Sequence[Event]
    configuration: WatchConfiguration
    registry: Registry

    def watches(self) -> Iterator[tuple[WatchEvent, int]]:
        """Qualifying organic watches of known clusters, with these, in the order of the log.

        A playback counts once, however many heartbeats it has, and so does an event that was sent twice.
        """
        seen: set[tuple[str, str]] = set()
        for record in self.records:
            decoded = self.configuration.decode(record.value, record.key, record.timestamp)
            if isinstance(decoded, Rejected):
                continue
            event = decoded.record
            if event.traffic is not Traffic.ORGANIC or watch_weight(event) < QUALIFYING_WEIGHT:
                continue
            cluster = UNASSIGNED if event.cluster_id is None else self.registry.successor_of(event.cluster_id)
            if cluster not in self.registry.cards:
                cluster = self.registry.cluster_of(event.video_id)
            key = (event.user_id, (playback_text(event) if event.action is Action.PLAY else None) or event_text(event))
            if cluster in self.registry.cards and key not in seen:
                seen.add(key)
                yield event, cluster


class UnreadableFile(Exception):  # noqa: N818 - a state of the file
    """A file cannot be read; the message names it."""


def read_lines(path: Path) -> list[bytes]:
    """Lines of a file without their ends; `.gz` is unpacked, `-` is standard input. Raises UnreadableFile."""
    try:
        if str(path) == "-":
            content = sys.stdin.buffer.read()
        else:
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableFile(f"cannot read {path}: {error}") from error
    lines = content.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    return [line.removesuffix(b"\r") for line in lines]


def events_of(lines: Sequence[bytes], configuration: WatchConfiguration, key_of: KeyOf) -> list[Event]:
    """The lines as records: keyed by their own user id, appended at the time that the log had reached."""
    keys = [key_of(line) for line in lines]
    times = append_times([_own_ts(line, key, configuration) for line, key in zip(lines, keys, strict=True)])
    return [Event(line, key, ts) for line, key, ts in zip(lines, keys, times, strict=True)]


def load_event_log(lines: Sequence[bytes], settings: Settings) -> EventLog:
    """The lines as events, with the registry of the settings; the packaged one is extended by the events' videos."""
    names = {name: name for name in (topics.WATCH_EVENTS, topics.WATCH_POSITIONS)}
    registry = load_current_registry(settings)
    configuration, _ = load_configuration(settings, names, registry)
    records = events_of(lines, configuration, load_format(settings).key_of)
    if settings.registry != Path():
        return EventLog(records, configuration, registry)
    registry = registry_holding(settings, registry, records, configuration)
    return EventLog(records, load_configuration(settings, names, registry)[0], registry)


def unknown_videos(
    events: Sequence[Event], registry: Registry, configuration: WatchConfiguration
) -> list[UnknownVideo]:
    """Videos with a title that the registry lacks, in order of first appearance."""
    found: dict[str, UnknownVideo] = {}
    for event in events:
        decoded = configuration.decode(event.value, event.key, event.timestamp)
        if isinstance(decoded, Rejected) or decoded.record.title is None:
            continue
        record = decoded.record
        if record.video_id not in found and not registry.knows(record.video_id):
            found[record.video_id] = UnknownVideo(record.video_id, record.title, record.tags, record.category)
    return list(found.values())


def registry_holding(
    settings: Settings, registry: Registry, events: Sequence[Event], configuration: WatchConfiguration
) -> Registry:
    """The packaged registry with the events' videos placed in it by their titles; unchanged if it knows them all."""
    from agents.clusters.catalogue import Catalogue, Video
    from agents.clusters.embedding import MiniLM
    from agents.clusters.extend import extend
    from agents.clusters.files import PACKAGED, load_snapshot
    from agents.localstack.assets import tokenizer_path

    unknown = unknown_videos(events, registry, configuration)
    if not unknown:
        return registry
    videos = tuple(Video(video.video_id, video.title or "", video.tags, video.category) for video in unknown)
    embedder = MiniLM(tokenizer_path(settings, lambda line: print(line, file=sys.stderr)))  # noqa: T201
    following = extend(load_snapshot(PACKAGED), Catalogue("replayed events", "", videos), embedder).snapshot
    return following.registry()


def _own_ts(line: bytes, key: bytes | None, configuration: WatchConfiguration) -> int | None:
    if key is None:
        return None
    decoded = configuration.decode(line, key, LAST_APPEND_TIME)
    return None if isinstance(decoded, Rejected) else decoded.record.ts
