"""Where one partition's states live beside the changelog: nowhere, or on disk in RocksDB.

A store is a copy of a prefix of the changelog: it is written after the changelog has committed, says up to which offset
it is complete, and is thrown away whenever it cannot be a prefix of the log that is there.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import orjson
from rocksdict import (
    BlockBasedOptions,
    Cache,
    DbClosedError,
    DBCompressionType,
    DBRecoveryMode,
    Options,
    Rdict,
    WriteBatch,
)

from agents.changelog import Bounds

CACHE_BYTES: Final = 64 * 1024 * 1024
"""Block cache of all stores of a process together: keys, indexes and filters."""
WRITE_BUFFER_BYTES: Final = 32 * 1024 * 1024
BLOB_BYTES: Final = 512
"""Values from this size on are kept apart from the sorted keys, so that compaction does not copy them."""
METADATA_KEY: Final = b""
"""No user id is empty."""

logger = logging.getLogger(__name__)


class StoreError(RuntimeError):
    """A disk store cannot be used; the message names its folder and says what to do."""


class StateStore(Protocol):
    """A copy of a prefix of one changelog partition."""

    @property
    def offset(self) -> int | None:
        """Changelog offset up to which the store is complete; None: it holds nothing."""

    @property
    def highest_watch_offset(self) -> int:
        """Highest offset of the watch partition that any stored state was changed by; -1: none."""

    def get(self, key: bytes) -> bytes | None:
        """Stored value of a viewer."""

    def write(
        self, keys: Sequence[bytes], values: Sequence[bytes | None], changelog_offset: int, watch_offset: int
    ) -> None:
        """Store values (None removes) together with how far they reach, all or nothing.

        changelog_offset: up to which the store is complete now; watch_offset: highest one among these states, -1: none.
        """

    def keys(self) -> Iterator[bytes]:
        """Keys of all stored viewers."""

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All stored viewers."""

    def close(self) -> None:
        """Release the store, which stays as it is. May be repeated."""

    def delete(self) -> None:
        """Close the store and remove what it holds."""


class MemoryStore:
    """Holds no states: the table in memory has them all, and is recovered from the changelog's beginning."""

    def __init__(self) -> None:
        self.offset: int | None = None
        self.highest_watch_offset = -1

    def get(self, key: bytes) -> bytes | None:
        """Nothing."""
        return None

    def write(
        self, keys: Sequence[bytes], values: Sequence[bytes | None], changelog_offset: int, watch_offset: int
    ) -> None:
        """Remember how far the states reach."""
        self.offset = changelog_offset
        self.highest_watch_offset = max(self.highest_watch_offset, watch_offset)

    def keys(self) -> Iterator[bytes]:
        """Nothing."""
        return iter(())

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Nothing."""
        return iter(())

    def close(self) -> None:
        """Nothing to release."""

    def delete(self) -> None:
        """Forget how far the states reach."""
        self.offset, self.highest_watch_offset = None, -1


@dataclass(frozen=True, slots=True)
class _Metadata:
    """What a store is a copy of, and how far. Offsets of the watch topic mean something only with its id."""

    changelog_id: str
    watch_id: str
    changelog_offset: int | None = None
    watch_offset: int = -1


class DiskStore:
    """States of one partition in a folder of their own. One process at a time."""

    def __init__(self, folder: Path, database: Rdict, metadata: _Metadata) -> None:
        """Use `open`."""
        self._folder = folder
        self._database = database
        self._metadata = metadata

    @classmethod
    def open(cls, folder: Path, changelog_id: str, watch_id: str, bounds: Bounds) -> DiskStore:
        """The store in `folder`, empty if it cannot be a prefix of the changelog that is there now.

        changelog_id, watch_id: Kafka's ids of the two topics; bounds: the changelog partition's. Raises StoreError.
        """
        try:
            store = cls._opened(folder, _Metadata(changelog_id, watch_id))
        except _DamagedError as error:
            return cls._anew(folder, _Metadata(changelog_id, watch_id), str(error))
        found = store._metadata
        if why := _mismatch(found, changelog_id, bounds):
            store.close()
            return cls._anew(folder, _Metadata(changelog_id, watch_id), why)
        if found.watch_id != watch_id:
            store._metadata = replace(found, watch_id=watch_id, watch_offset=-1)
        return store

    @classmethod
    def _anew(cls, folder: Path, empty: _Metadata, why: str) -> DiskStore:
        logger.warning("disk store %s is built anew: %s", folder, why)
        shutil.rmtree(folder)
        return cls._opened(folder, empty)

    @classmethod
    def _opened(cls, folder: Path, empty: _Metadata) -> DiskStore:
        """The store as it is. Raises StoreError, and _DamagedError."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            database = Rdict(str(folder), _options())
        except Exception as error:  # rocksdict raises no class of its own
            if "Corruption" in str(error):
                raise _DamagedError(str(error)) from error
            raise _explained(folder, error) from error
        stored = database.get(METADATA_KEY)
        try:
            return cls(folder, database, _Metadata(**orjson.loads(stored)) if stored else empty)
        except (TypeError, orjson.JSONDecodeError) as error:
            database.close()
            raise _DamagedError(f"its metadata cannot be read: {error}") from error

    @property
    def offset(self) -> int | None:
        """Changelog offset up to which the store is complete; None: it holds nothing."""
        return self._metadata.changelog_offset

    @property
    def highest_watch_offset(self) -> int:
        """Highest offset of the present watch topic's partition that any stored state was changed by; -1: none."""
        return self._metadata.watch_offset

    def get(self, key: bytes) -> bytes | None:
        """Stored value of a viewer. Raises StoreError."""
        try:
            value: bytes | None = self._database.get(key)
        except Exception as error:
            raise _explained(self._folder, error) from error
        return value

    def write(
        self, keys: Sequence[bytes], values: Sequence[bytes | None], changelog_offset: int, watch_offset: int
    ) -> None:
        """Store values (None removes) with how far they reach, in one atomic write. Raises StoreError.

        Nothing is forced to the disk: after a crash of the machine the store is an earlier prefix of the changelog.
        """
        metadata = replace(
            self._metadata,
            changelog_offset=changelog_offset,
            watch_offset=max(watch_offset, self._metadata.watch_offset),
        )
        batch: Any = WriteBatch(raw_mode=True)
        for key, value in zip(keys, values, strict=True):
            if value is None:
                batch.delete(key)
            else:
                batch.put(key, value)
        batch.put(METADATA_KEY, orjson.dumps(metadata))
        try:
            self._database.write(batch)
        except Exception as error:
            raise _explained(self._folder, error) from error
        self._metadata = metadata

    def keys(self) -> Iterator[bytes]:
        """Keys of all stored viewers."""
        found: Any = self._database.keys()
        return (key for key in found if key != METADATA_KEY)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All stored viewers, by key."""
        found: Any = self._database.items()
        return ((key, value) for key, value in found if key != METADATA_KEY)

    def close(self) -> None:
        """Release the folder for other processes. May be repeated."""
        with suppress(DbClosedError):
            self._database.close()

    def delete(self) -> None:
        """Close the store and remove its folder."""
        self.close()
        shutil.rmtree(self._folder)


class _DamagedError(Exception):
    """The files are not what was written."""


def _mismatch(found: _Metadata, changelog_id: str, bounds: Bounds) -> str:
    """Why a store cannot be a prefix of the changelog; empty if it can."""
    if found.changelog_id != changelog_id:
        return "the changelog topic was made anew"
    if found.changelog_offset is None or bounds.beginning <= found.changelog_offset <= bounds.end:
        return ""
    return f"it reaches to changelog offset {found.changelog_offset}, the log from {bounds.beginning} to {bounds.end}"


def _explained(folder: Path, error: Exception) -> StoreError:
    if "lock file" in str(error) or "lock hold" in str(error):
        return StoreError(
            f"disk store {folder} is in use by another process: give each worker of a machine its own "
            "PERSONAS_STATE_FOLDER"
        )
    return StoreError(f"disk store {folder} fails: {error}. Check the disk; deleted, the folder is built anew")


_cache = Cache(CACHE_BYTES)


def _options() -> Options:
    """For lookups of single keys and values of some kilobytes, most of which are overwritten again and again."""
    tables = BlockBasedOptions()
    tables.set_bloom_filter(10, False)  # most keys that are asked for and absent are new viewers
    tables.set_block_cache(_cache)
    tables.set_cache_index_and_filter_blocks(True)
    tables.set_pin_l0_filter_and_index_blocks_in_cache(True)
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_block_based_table_factory(tables)
    options.set_write_buffer_size(WRITE_BUFFER_BYTES)
    options.set_max_background_jobs(2)
    options.set_compression_type(DBCompressionType.lz4())
    options.set_enable_blob_files(True)
    options.set_min_blob_size(BLOB_BYTES)
    options.set_blob_compression_type(DBCompressionType.none())  # stored values are packed already
    options.set_enable_blob_gc(True)
    # After a crash of the machine the log is replayed up to its first damage: a prefix.
    options.set_wal_recovery_mode(DBRecoveryMode.point_in_time())
    options.set_keep_log_file_num(2)
    options.set_max_log_file_size(4 * 1024 * 1024)
    return options
