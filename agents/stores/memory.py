"""A persona store in memory, for replay and tests. It keeps Cassandra's rules, but nothing expires."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from agents.stores.ports import (
    StoredPersona,
    StoreUnavailable,
    check_body,
    check_key,
    check_row,
    check_version,
)


class MemoryStore:
    """`PersonaStore` of one process. `history_versions` is how many versions are kept per viewer."""

    def __init__(self, history_versions: int = 5) -> None:
        self._history_versions = history_versions
        self._versions: defaultdict[str, dict[int, StoredPersona]] = defaultdict(dict)
        self._floors: dict[str, int] = {}  # versions up to here were removed or fell out of the history
        self._wordings: dict[str, bytes] = {}
        self._open = True

    async def put(self, row: StoredPersona) -> None:
        """See `PersonaStore.put`."""
        self._require_open()
        check_row(row)
        if row.version <= self._floors.get(row.user_id, 0):
            return
        kept = self._versions[row.user_id]
        kept[row.version] = row
        beyond = sorted(kept, reverse=True)[self._history_versions :]
        if beyond:
            self._drop_up_to(row.user_id, beyond[0])

    async def latest(self, user_id: str) -> StoredPersona | None:
        """See `PersonaStore.latest`."""
        newest = await self.history(user_id, 1)
        return newest[0] if newest else None

    async def history(self, user_id: str, limit: int = 5) -> list[StoredPersona]:
        """See `PersonaStore.history`."""
        self._require_open()
        check_key(user_id, "user id")
        kept = self._versions.get(user_id, {})
        return [kept[version] for version in sorted(kept, reverse=True)[: max(limit, 0)]]

    async def by_version(self, user_id: str, version: int) -> StoredPersona | None:
        """See `PersonaStore.by_version`."""
        self._require_open()
        check_key(user_id, "user id")
        return self._versions.get(user_id, {}).get(version)

    async def remove_user(self, user_id: str, version: int) -> None:
        """See `PersonaStore.remove_user`."""
        self._require_open()
        check_key(user_id, "user id")
        check_version(version)
        self._drop_up_to(user_id, version)

    async def wordings(self, keys: Sequence[str]) -> dict[str, bytes]:
        """See `PersonaStore.wordings`."""
        self._require_open()
        for key in keys:
            check_key(key, "wording key")
        return {key: self._wordings[key] for key in keys if key in self._wordings}

    async def put_wordings(self, rows: Mapping[str, bytes]) -> None:
        """See `PersonaStore.put_wordings`."""
        self._require_open()
        for key, body in rows.items():
            check_key(key, "wording key")
            check_body(body, "wording")
        self._wordings.update(rows)

    async def ready(self) -> bool:
        """See `PersonaStore.ready`."""
        return self._open

    async def close(self) -> None:
        """See `PersonaStore.close`."""
        self._open = False

    def _drop_up_to(self, user_id: str, version: int) -> None:
        self._floors[user_id] = max(self._floors.get(user_id, 0), version)
        kept = self._versions.get(user_id, {})
        for old in [v for v in kept if v <= version]:
            del kept[old]

    def _require_open(self) -> None:
        if not self._open:
            raise StoreUnavailable("the store is closed")
