"""The persona store in Apache Cassandra.

Every write and delete of a viewer's rows is USING TIMESTAMP = version, so Cassandra itself settles the order:
the higher version wins in both tables, whatever arrives first, and a removal beats every older version, also
a late one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import orjson
from cassandra import ConsistencyLevel
from cassandra.query import BatchStatement, BatchType

from agents.settings import Settings
from agents.stores.connection import REQUEST_SECONDS, open_cluster, open_session, store_error
from agents.stores.ports import (
    StoredPersona,
    StoreError,
    StoreRejected,
    StoreUnavailable,
    check_body,
    check_key,
    check_row,
    check_version,
)

FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 1.0
READY_SECONDS: Final = 2.0
SECONDS_PER_DAY: Final = 86_400

_STATEMENTS: Final = {
    "put_latest": "INSERT INTO {keyspace}.personas_by_user (user_id, persona) VALUES (?, ?) "
    "USING TTL ? AND TIMESTAMP ?",
    "put_history": "INSERT INTO {keyspace}.persona_history (user_id, version, persona) VALUES (?, ?, ?) "
    "USING TTL ? AND TIMESTAMP ?",
    "latest": "SELECT persona FROM {keyspace}.personas_by_user WHERE user_id = ?",
    "history": "SELECT persona FROM {keyspace}.persona_history WHERE user_id = ? LIMIT ?",
    "versions": "SELECT version FROM {keyspace}.persona_history WHERE user_id = ? LIMIT ?",
    "by_version": "SELECT persona FROM {keyspace}.persona_history WHERE user_id = ? AND version = ?",
    "trim_history": "DELETE FROM {keyspace}.persona_history USING TIMESTAMP ? WHERE user_id = ? AND version <= ?",
    "remove_latest": "DELETE FROM {keyspace}.personas_by_user USING TIMESTAMP ? WHERE user_id = ?",
    "remove_history": "DELETE FROM {keyspace}.persona_history USING TIMESTAMP ? WHERE user_id = ?",
    "wording": "SELECT wording FROM {keyspace}.wording_cache WHERE content_key = ?",
    "put_wording": "INSERT INTO {keyspace}.wording_cache (content_key, wording) VALUES (?, ?) USING TTL ?",
}


class CassandraStore:
    """`PersonaStore` over cassandra-driver. Make it with `connect` inside the event loop that uses it.

    Retriable errors are tried again with growing pauses until `deadline_seconds` have passed in all for one
    statement; the driver itself tries the other hosts first. When Cassandra comes back, the same store works
    again.
    """

    def __init__(
        self,
        cluster: Any,  # noqa: ANN401
        session: Any,  # noqa: ANN401
        settings: Settings,
        deadline_seconds: float,
    ) -> None:
        self._cluster = cluster
        self._session = session
        self._settings = settings
        self._deadline_seconds = deadline_seconds
        self._ttl = settings.persona_ttl_days * SECONDS_PER_DAY
        self._open = True
        self._prepared = {
            name: session.prepare(text.format(keyspace=settings.cassandra_keyspace))
            for name, text in _STATEMENTS.items()
        }
        for prepared in self._prepared.values():
            prepared.is_idempotent = True

    @classmethod
    async def connect(cls, settings: Settings, *, deadline_seconds: float = 10.0) -> CassandraStore:
        """Connect and prepare all statements, in a thread.

        Raises StoreUnavailable if Cassandra does not answer or `personas init` has not made the schema;
        SettingsError and StoreRejected for what only an operator can mend.
        """
        return await asyncio.to_thread(cls._connect, settings, deadline_seconds)

    @classmethod
    def _connect(cls, settings: Settings, deadline_seconds: float) -> CassandraStore:
        cluster = open_cluster(settings)
        session = open_session(cluster, settings)
        try:
            return cls(cluster, session, settings, deadline_seconds)
        except Exception as error:
            cluster.shutdown()
            raise store_error(error, settings) from error

    async def put(self, row: StoredPersona) -> None:
        """See `PersonaStore.put`. Both tables share the partition key: one batch is one atomic mutation."""
        check_row(row)
        persona = _packed(row)
        await self._run_together(
            self._bind("put_latest", row.user_id, persona, self._ttl, row.version),
            self._bind("put_history", row.user_id, row.version, persona, self._ttl, row.version),
        )
        await self._trim_history(row.user_id)

    async def latest(self, user_id: str) -> StoredPersona | None:
        """See `PersonaStore.latest`."""
        check_key(user_id, "user id")
        rows = await self._run(self._bind("latest", user_id))
        return _unpacked(user_id, rows[0][0]) if rows else None

    async def history(self, user_id: str, limit: int = 5) -> list[StoredPersona]:
        """See `PersonaStore.history`."""
        check_key(user_id, "user id")
        limit = min(limit, self._settings.history_versions)
        if limit <= 0:
            return []
        rows = await self._run(self._bind("history", user_id, limit))
        return [_unpacked(user_id, persona) for (persona,) in rows]

    async def by_version(self, user_id: str, version: int) -> StoredPersona | None:
        """See `PersonaStore.by_version`."""
        check_key(user_id, "user id")
        rows = await self._run(self._bind("by_version", user_id, version))
        return _unpacked(user_id, rows[0][0]) if rows else None

    async def remove_user(self, user_id: str, version: int) -> None:
        """See `PersonaStore.remove_user`."""
        check_key(user_id, "user id")
        check_version(version)
        await self._run_together(
            self._bind("remove_latest", version, user_id),
            self._bind("remove_history", version, user_id),
        )

    async def wordings(self, keys: Sequence[str]) -> dict[str, bytes]:
        """See `PersonaStore.wordings`."""
        unique = list(dict.fromkeys(keys))
        for key in unique:
            check_key(key, "wording key")
        found = await _all(self._run(self._bind("wording", key)) for key in unique)
        return {key: rows[0][0] for key, rows in zip(unique, found, strict=True) if rows}

    async def put_wordings(self, rows: Mapping[str, bytes]) -> None:
        """See `PersonaStore.put_wordings`."""
        for key, body in rows.items():
            check_key(key, "wording key")
            check_body(body, "wording")
        await _all(self._run(self._bind("put_wording", key, body, self._ttl)) for key, body in rows.items())

    async def ready(self) -> bool:
        """See `PersonaStore.ready`. One read at the consistency that serving needs, within 2 seconds."""
        try:
            await self._once(self._bind("wording", "ready?"), READY_SECONDS)
        except StoreError:
            return False
        return True

    async def close(self) -> None:
        """See `PersonaStore.close`."""
        self._open = False
        await asyncio.to_thread(self._cluster.shutdown)

    async def _trim_history(self, user_id: str) -> None:
        """Delete what is older than the versions kept, at a timestamp that also stops late older writes."""
        kept = self._settings.history_versions
        rows = await self._run(self._bind("versions", user_id, kept + 1))
        if len(rows) > kept:
            (oldest,) = rows[-1]
            await self._run(self._bind("trim_history", oldest, user_id, oldest))

    def _bind(self, name: str, *values: object) -> Any:  # noqa: ANN401
        return self._prepared[name].bind(values)

    async def _run_together(self, *statements: Any) -> None:  # noqa: ANN401
        batch = BatchStatement(BatchType.UNLOGGED, consistency_level=ConsistencyLevel.LOCAL_QUORUM)
        for statement in statements:
            batch.add(statement)
        batch.is_idempotent = True
        await self._run(batch)

    async def _run(self, statement: Any) -> list[Any]:  # noqa: ANN401
        """Rows of `statement`; retriable errors are tried again until the deadline."""
        deadline = time.monotonic() + self._deadline_seconds
        pause = FIRST_PAUSE_SECONDS
        while True:
            timeout = min(REQUEST_SECONDS, deadline - time.monotonic())
            try:
                return await self._once(statement, timeout)
            except StoreUnavailable:
                if not self._open or time.monotonic() + pause >= deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _once(self, statement: Any, timeout: float) -> list[Any]:  # noqa: ANN401
        """One attempt. The driver answers on its own thread, so the result is handed over to this loop."""
        if not self._open:
            raise StoreUnavailable("the store is closed")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Any]] = loop.create_future()

        def hand_over(rows: list[Any] | None, error: Exception | None = None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits for the answer
                loop.call_soon_threadsafe(_settle, answer, rows or [], error)

        try:
            response = self._session.execute_async(statement, timeout=timeout)
            response.add_callbacks(hand_over, lambda error: hand_over(None, error))
            return await answer
        except asyncio.CancelledError:
            raise
        except Exception as error:
            raise store_error(error, self._settings) from error


def _settle(answer: asyncio.Future[list[Any]], rows: list[Any], error: Exception | None) -> None:
    if answer.done():  # cancelled
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(rows)


async def _all(calls: Iterable[Any]) -> list[Any]:
    """Run all calls at once; on the first error the others are cancelled and the error is raised as it is."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _packed(row: StoredPersona) -> bytes:
    """One cell: a line of JSON about the version, then the body as it is."""
    try:
        header = orjson.dumps([row.version, row.epoch, row.request_id, row.tier])
    except TypeError as error:
        raise StoreRejected(f"persona {row.request_id!a} cannot be stored: {error}") from error
    return b"%b\n%b" % (header, row.body)


def _unpacked(user_id: str, cell: bytes) -> StoredPersona:
    header, _, body = cell.partition(b"\n")
    version, epoch, request_id, tier = orjson.loads(header)
    return StoredPersona(user_id, version, epoch, request_id, tier, body)
