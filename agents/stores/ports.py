"""The persona store as the rest of the program sees it, and the rules that every implementation applies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

MAXIMUM_KEY_BYTES: Final = 65_535
"""Cassandra's limit of a partition key, so the limit of a user id and of a wording's key (UTF-8)."""
MAXIMUM_BODY_BYTES: Final = 1024 * 1024
"""Limit of one persona: what a Kafka record holds by default. A write to Cassandra carries it twice, and a node with
a heap of 512 MiB takes messages up to 4 MiB."""
MAXIMUM_VERSION: Final = 2**62
"""Versions are Cassandra write timestamps: positive 64-bit integers."""


class StoreError(Exception):
    """Base of what a store raises."""


class StoreUnavailable(StoreError):  # noqa: N818 - a state of the store
    """The store cannot answer now; the same call may succeed later. Nothing is known to be lost."""


class StoreRejected(StoreError):  # noqa: N818 - a verdict on a row
    """The store will never take this row as it is: too large, or an identifier it cannot hold."""


@dataclass(frozen=True, slots=True)
class StoredPersona:
    """One version of a viewer's persona. `body` is the published JSON, kept byte for byte."""

    user_id: str
    version: int
    epoch: int
    request_id: str
    tier: str
    body: bytes


class PersonaStore(Protocol):
    """Keeps each viewer's latest persona, a short history, and wordings shared between viewers.

    Every write is idempotent, and writes of one viewer may arrive in any order: the higher version wins,
    whether it is a persona or a removal. All methods raise StoreUnavailable within a bounded time when the
    store does not answer, and StoreRejected for a row that it can never hold.
    """

    async def put(self, row: StoredPersona) -> None:
        """Keep `row` in the history, and as the latest unless a newer version or removal is stored."""

    async def latest(self, user_id: str) -> StoredPersona | None:
        """The viewer's persona of the highest version, None if there is none (any more)."""

    async def history(self, user_id: str, limit: int = 5) -> list[StoredPersona]:
        """The newest versions, newest first: at most `limit`, and at most the number of versions kept."""

    async def by_version(self, user_id: str, version: int) -> StoredPersona | None:
        """One version, None if it was never stored, was removed, or left the history."""

    async def remove_user(self, user_id: str, version: int) -> None:
        """Remove every version up to and including `version`, also those that arrive after this call."""

    async def wordings(self, keys: Sequence[str]) -> dict[str, bytes]:
        """The cached wordings among `keys`; missing ones are left out."""

    async def put_wordings(self, rows: Mapping[str, bytes]) -> None:
        """Cache wordings by their content key. They hold nothing that belongs to one viewer."""

    async def ready(self) -> bool:
        """Whether the store answers now. Never raises."""

    async def close(self) -> None:
        """Release connections. Calls after it raise StoreUnavailable."""


def check_row(row: StoredPersona) -> None:
    """Raise StoreRejected unless every store can hold `row`."""
    check_key(row.user_id, "user id")
    check_key(row.request_id, "request id")
    check_version(row.version)
    check_body(row.body, "persona")


def check_key(key: str, what: str) -> None:
    """Raise StoreRejected unless `key` can be a partition key: 1 to 65,535 bytes of UTF-8."""
    try:
        length = len(key.encode())
    except UnicodeEncodeError:
        raise StoreRejected(f"{what} is not encodable as UTF-8: {key[:64]!a}") from None
    if not 0 < length <= MAXIMUM_KEY_BYTES:
        raise StoreRejected(f"{what} of {length} bytes; a store holds 1 to {MAXIMUM_KEY_BYTES}")


def check_body(body: bytes, what: str) -> None:
    """Raise StoreRejected if `body` is larger than a store takes."""
    if len(body) > MAXIMUM_BODY_BYTES:
        raise StoreRejected(f"{what} of {len(body)} bytes is larger than {MAXIMUM_BODY_BYTES}")


def check_version(version: int) -> None:
    """Raise StoreRejected unless `version` can be a write timestamp."""
    if not 0 < version <= MAXIMUM_VERSION:
        raise StoreRejected(f"version {version} is not between 1 and {MAXIMUM_VERSION}")
