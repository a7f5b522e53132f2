"""What a worker loads before it consumes: thresholds, registry versions, field mapping and decoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

import orjson

from agents.clusters.files import PACKAGED, RegistryError, load_registry, packaged_registry, read_manifest
from agents.event_decoder import load_decoder
from agents.settings import Settings, SettingsError
from streams import topics
from streams.ageing import FORGET_DAYS
from streams.decoding import Decoded, Decoder, Rejected, decode_event
from streams.mapping import FieldMapping, MappingError, parse_mapping
from streams.records import WatchEvent
from streams.registry import Registry
from streams.trigger import Policy, Thresholds, ThresholdsError, read_thresholds
from streams.watch import PLAIN, Kernel, WatchConfiguration


def load_thresholds(path: Path) -> Thresholds:
    """The calibrated artefact at `path`, or the packaged one, named with its checksum. Raises SettingsError."""
    try:
        if path == Path():
            text = resources.files("agents.data").joinpath("thresholds.json").read_bytes()
        else:
            text = path.read_bytes()
        thresholds = read_thresholds(orjson.loads(text))
        return replace(thresholds, name=f"{thresholds.name}@{sha256(text).hexdigest()[:8]}")
    except (OSError, ValueError, ThresholdsError) as error:
        raise SettingsError(f"PERSONAS_THRESHOLDS={path}: {error}") from error


def load_current_registry(settings: Settings) -> Registry:
    """The registry snapshot that the settings name, or the packaged demo registry. Raises SettingsError."""
    try:
        return packaged_registry() if settings.registry == Path() else load_registry(settings.registry)
    except RegistryError as error:
        raise SettingsError(f"PERSONAS_REGISTRY={settings.registry}: {error}") from error


def registry_versions(settings: Settings, current: Registry) -> Callable[[int], Registry]:
    """Registry by version: the current one, or another of its lineage from a folder beside it.

    Folders that hold something else are passed over. Asking for a version that is not there raises SettingsError.
    """

    @functools.cache
    def version(number: int) -> Registry:
        if number == current.version:
            return current
        for folder in _registry_folders(settings):
            if _holds(folder, number, current.lineage):
                try:
                    return load_registry(folder)
                except RegistryError as error:
                    raise SettingsError(f"registry version {number}: {error}") from error
        raise SettingsError(
            f"registry version {number} is in force for events still to be read, but only version {current.version} is "
            f"here: put the folder of version {number} beside PERSONAS_REGISTRY={settings.registry}"
        )

    return version


@dataclass(frozen=True, slots=True)
class EventFormat:
    """How the operator's events are read: their decoder and field mapping, None for our own JSON."""

    mapping: FieldMapping | None
    decoder: Decoder | None

    def decode(self, value: bytes | None, key: bytes | None, append_time: int) -> Decoded[WatchEvent] | Rejected:
        """The event in a record, by the strict rules of `streams.decoding`."""
        return decode_event(value, key, append_time=append_time, mapping=self.mapping, decoder=self.decoder)

    def parse(self, value: bytes) -> Any:  # noqa: ANN401
        """A value as a mapping of our field names, unchecked. Raises what the bytes or the operator's decoder do."""
        data = orjson.loads(value) if self.decoder is None else dict(self.decoder(value))
        return data if self.mapping is None else self.mapping.apply(data)

    def key_of(self, value: bytes) -> bytes | None:
        """The key that a record of this value should have: its user id, None where it has none."""
        try:
            return bytes(self.parse(value)["user_id"].encode())
        except Exception:  # whatever the operator's decoder raises or returns: decoding the record says what is wrong
            return None


def _holds(folder: Path, version: int, lineage: str) -> bool:
    try:
        manifest = read_manifest(folder)
    except RegistryError:  # of an older format, say: nothing that this version could use
        return False
    return bool(manifest["version"] == version and manifest.get("lineage") == lineage)


def _registry_folders(settings: Settings) -> list[Path]:
    """Where older registry versions may be: beside the current one, and the packaged one."""
    beside = [] if settings.registry == Path() else sorted(settings.registry.resolve().parent.iterdir())
    return [folder for folder in (*beside, PACKAGED) if (folder / "manifest.json").is_file()]


def load_format(settings: Settings) -> EventFormat:
    """The operator's field mapping and decoder. Raises SettingsError."""
    mapping: FieldMapping | None = None
    if settings.field_mapping != Path():
        try:
            mapping = parse_mapping(settings.field_mapping.read_bytes())
        except (OSError, MappingError) as error:
            raise SettingsError(f"PERSONAS_FIELD_MAPPING={settings.field_mapping}: {error}") from error
    return EventFormat(mapping, load_decoder(settings.event_decoder) if settings.event_decoder else None)


def load_policy(settings: Settings) -> Policy:
    """What the operator decided about refreshes."""
    return Policy(
        first_persona_after=settings.first_persona_after,
        template_after=settings.template_after,
        maximum_age_days=settings.maximum_age_days,
        request_expires_ms=settings.request_expires_minutes * 60_000,
        forget_days=max(FORGET_DAYS, settings.persona_ttl_days + topics.SOURCE_RETENTION_DAYS),
    )


def load_configuration(
    settings: Settings, topic_ids: Mapping[str, str], registry: Registry | None = None, kernel: Kernel = PLAIN
) -> tuple[WatchConfiguration, Registry]:
    """What every watch handler works with, and the registry version to adopt. `topic_ids`: unprefixed name -> id."""
    registry = load_current_registry(settings) if registry is None else registry
    events = load_format(settings)
    configuration = WatchConfiguration(
        topic=settings.topic_prefix + topics.WATCH_EVENTS,
        topic_id=topic_ids[topics.WATCH_EVENTS],
        positions_id=topic_ids[topics.WATCH_POSITIONS],
        thresholds=load_thresholds(settings.thresholds),
        policy=load_policy(settings),
        decode=events.decode,
        parse=orjson.loads if events == EventFormat(None, None) else events.parse,
        kernel=kernel,
        registry_of=registry_versions(settings, registry),
    )
    return configuration, registry
