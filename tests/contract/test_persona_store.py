"""What every persona store does, checked on the store in memory and on real Apache Cassandra."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest

from agents.settings import Settings
from agents.stores.cassandra import CassandraStore
from agents.stores.memory import MemoryStore
from agents.stores.migrate import apply_migrations, packaged_migrations, schema_session
from agents.stores.ports import (
    MAXIMUM_BODY_BYTES,
    PersonaStore,
    StoredPersona,
    StoreRejected,
    StoreUnavailable,
)
from tests.conftest import Stack

KEPT = 3
HOSTILE_IDS = [
    "o'brien",
    "'; DROP KEYSPACE personas; --",
    '"quoted" \\ back\\slash',
    "%s {0} {user_id} ?",
    "line\nbreak\ttab\r",
    "nul\x00inside",
    "\u202eright-to-left \U0001f9d1\u200d\U0001f680 \u00e9 e\u0301",
    "x" * 10_240,
    "\u00e9" * 32_767,
    " ",
]

_numbers = count()


@pytest.fixture(scope="module")
def cassandra_settings(cassandra: Stack, keyspace: str) -> Settings:
    settings = replace(cassandra.settings, cassandra_keyspace=keyspace, history_versions=KEPT)
    with schema_session(settings, 30) as session:
        apply_migrations(session, settings, packaged_migrations())
    return settings


@pytest.fixture(scope="module", params=["memory", pytest.param("cassandra", marks=pytest.mark.stack)])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[PersonaStore]:
    made: PersonaStore
    if request.param == "memory":
        made = MemoryStore(KEPT)
    else:
        made = await CassandraStore.connect(request.getfixturevalue("cassandra_settings"))
    yield made
    await made.close()


@pytest.fixture
def user() -> str:
    """A viewer of this test alone: the store is shared."""
    return f"viewer-{next(_numbers)}"


def row(user_id: str, version: int, body: bytes | None = None) -> StoredPersona:
    content = b'{"version":%d}' % version if body is None else body
    return StoredPersona(user_id, version, 1, f"request-{version}", "student", content)


async def versions(store: PersonaStore, user_id: str) -> list[int]:
    return [kept.version for kept in await store.history(user_id, 100)]


async def test_gives_back_what_was_put(store: PersonaStore, user: str) -> None:
    stored = StoredPersona(user, 10, 7, "r'1\n\x00", "template", bytes(range(256)) * 3)
    await store.put(stored)
    assert await store.latest(user) == stored
    assert await store.by_version(user, 10) == stored
    assert await store.history(user) == [stored]


async def test_an_unknown_viewer_has_nothing(store: PersonaStore, user: str) -> None:
    assert await store.latest(user) is None
    assert await store.history(user) == []
    assert await store.by_version(user, 10) is None
    await store.remove_user(user, 15)
    assert await store.latest(user) is None


async def test_putting_again_changes_nothing(store: PersonaStore, user: str) -> None:
    for version in (10, 18, 10, 18, 18):
        await store.put(row(user, version))
    assert await store.latest(user) == row(user, 18)
    assert await store.history(user) == [row(user, 18), row(user, 10)]


async def test_history_keeps_the_newest_versions_newest_first(store: PersonaStore, user: str) -> None:
    for version in (10, 18, 26, 34, 42):
        await store.put(row(user, version))
    assert await versions(store, user) == [42, 34, 26]
    assert await store.by_version(user, 18) is None
    assert await store.by_version(user, 26) == row(user, 26)


async def test_history_gives_no_more_than_asked(store: PersonaStore, user: str) -> None:
    for version in (10, 18, 26):
        await store.put(row(user, version))
    assert [kept.version for kept in await store.history(user, 2)] == [26, 18]
    assert await store.history(user, 0) == []


async def test_latest_never_goes_back(store: PersonaStore, user: str) -> None:
    # 106 sorts below 98 as text, so a store that settled this by comparing contents would fail.
    for version in (106, 90, 98):
        await store.put(row(user, version))
        assert await store.latest(user) == row(user, 106)
    assert await versions(store, user) == [106, 98, 90]


async def test_a_version_older_than_the_history_stays_out(store: PersonaStore, user: str) -> None:
    for version in (50, 42, 34, 26, 10):
        await store.put(row(user, version))
    assert await versions(store, user) == [50, 42, 34]
    assert await store.by_version(user, 10) is None


@pytest.mark.parametrize("seed", range(5))
async def test_any_order_of_arrival_gives_the_same_store(store: PersonaStore, user: str, seed: int) -> None:
    arrivals: list[Callable[[], Awaitable[None]]] = [
        *(lambda v=v: store.put(row(user, v)) for v in range(10, 90, 8)),
        lambda: store.remove_user(user, 63),
    ]
    arrivals *= 2  # everything twice
    random.Random(seed).shuffle(arrivals)
    for arrive in arrivals:
        await arrive()
    assert await store.latest(user) == row(user, 82)
    assert await versions(store, user) == [82, 74, 66]
    assert await store.by_version(user, 58) is None


async def test_a_removal_takes_every_older_version(store: PersonaStore, user: str) -> None:
    for version in (10, 18):
        await store.put(row(user, version))
    await store.remove_user(user, 23)
    assert await store.latest(user) is None
    assert await store.history(user) == []
    assert await store.by_version(user, 18) is None


async def test_a_late_write_does_not_bring_a_removed_viewer_back(store: PersonaStore, user: str) -> None:
    await store.put(row(user, 10))
    await store.remove_user(user, 31)
    for late in (10, 18, 26):
        await store.put(row(user, late))
        assert await store.latest(user) is None
        assert await store.history(user) == []


async def test_a_newer_persona_lives_after_a_removal(store: PersonaStore, user: str) -> None:
    await store.put(row(user, 10))
    await store.remove_user(user, 15)
    await store.put(row(user, 18))
    await store.remove_user(user, 15)  # a removal that is repeated late
    assert await store.latest(user) == row(user, 18)
    assert await versions(store, user) == [18]


async def test_a_removal_before_any_write_counts(store: PersonaStore, user: str) -> None:
    await store.remove_user(user, 23)
    await store.put(row(user, 18))
    assert await store.latest(user) is None


async def test_a_removal_leaves_other_viewers_alone(store: PersonaStore, user: str) -> None:
    other = f"{user}-other"
    await store.put(row(user, 10))
    await store.put(row(other, 10))
    await store.remove_user(user, 15)
    assert await store.latest(other) == row(other, 10)


@pytest.mark.parametrize("hostile", HOSTILE_IDS, ids=range(len(HOSTILE_IDS)))
async def test_hostile_ids_are_data(store: PersonaStore, hostile: str) -> None:
    await store.put(row(hostile, 10))
    assert await store.latest(hostile) == row(hostile, 10)
    assert await versions(store, hostile) == [10]
    await store.put_wordings({hostile: b"w"})
    assert await store.wordings([hostile]) == {hostile: b"w"}
    await store.remove_user(hostile, 15)
    assert await store.latest(hostile) is None


async def test_ids_that_look_alike_are_different_viewers(store: PersonaStore, user: str) -> None:
    composed, decomposed = f"{user}\u00e9", f"{user}e\u0301"
    await store.put(row(composed, 10))
    assert await store.latest(decomposed) is None


@pytest.mark.parametrize("impossible", ["", "x" * 65_536, "\ud800"], ids=["empty", "too long", "lone surrogate"])
async def test_ids_that_no_store_can_hold_are_rejected(store: PersonaStore, impossible: str) -> None:
    calls: list[Awaitable[Any]] = [
        store.put(row(impossible, 10)),
        store.latest(impossible),
        store.history(impossible),
        store.by_version(impossible, 10),
        store.remove_user(impossible, 10),
        store.wordings([impossible]),
        store.put_wordings({impossible: b""}),
    ]
    for call in calls:
        with pytest.raises(StoreRejected):
            await call


@pytest.mark.parametrize("version", [0, -8, 2**63])
async def test_versions_that_are_no_timestamp_are_rejected(store: PersonaStore, user: str, version: int) -> None:
    with pytest.raises(StoreRejected):
        await store.put(row(user, version))
    with pytest.raises(StoreRejected):
        await store.remove_user(user, version)


@pytest.mark.parametrize("size", [0, 1_000_000, MAXIMUM_BODY_BYTES])
async def test_large_and_empty_bodies_come_back_whole(store: PersonaStore, user: str, size: int) -> None:
    body = random.Random(size).randbytes(size)
    await store.put(row(user, 10, body))
    latest = await store.latest(user)
    assert latest is not None
    assert latest.body == body


async def test_a_body_above_the_limit_is_rejected_and_harms_nothing(store: PersonaStore, user: str) -> None:
    await store.put(row(user, 10))
    with pytest.raises(StoreRejected, match=str(MAXIMUM_BODY_BYTES + 1)):
        await store.put(row(user, 18, bytes(MAXIMUM_BODY_BYTES + 1)))
    assert await store.latest(user) == row(user, 10)


async def test_concurrent_writes_end_at_the_newest(store: PersonaStore, user: str) -> None:
    rows = [row(user, version) for version in range(10, 10 + 8 * 30, 8)]
    random.Random(1).shuffle(rows)
    await asyncio.gather(*(store.put(one) for one in rows))
    assert await store.latest(user) == row(user, 242)
    assert await versions(store, user) == [242, 234, 226]


async def test_two_bodies_of_one_version_are_never_mixed(store: PersonaStore, user: str) -> None:
    first = StoredPersona(user, 10, 1, "a" * 40, "student", b"z" * 100)
    second = StoredPersona(user, 10, 2, "b" * 40, "template", b"y" * 500)
    await asyncio.gather(store.put(first), store.put(second))
    latest = await store.latest(user)
    assert latest in (first, second)
    assert await store.history(user) == [latest]


async def test_wordings_come_back_by_key_and_missing_ones_are_left_out(store: PersonaStore, user: str) -> None:
    keys = [f"{user}-{number}" for number in range(40)]
    await store.put_wordings({key: key.encode() for key in keys})
    asked = [*keys, keys[0], "missing"]
    assert await store.wordings(asked) == {key: key.encode() for key in keys}
    assert await store.wordings([]) == {}


async def test_a_store_is_ready_until_closed(request: pytest.FixtureRequest, store: PersonaStore) -> None:
    assert await store.ready()
    other: PersonaStore
    if isinstance(store, MemoryStore):
        other = MemoryStore()
    else:
        other = await CassandraStore.connect(request.getfixturevalue("cassandra_settings"))
    await other.close()
    assert not await other.ready()
    with pytest.raises(StoreUnavailable, match="closed"):
        await other.latest("anyone")


# What only Cassandra has: expiry, and a connection that can break.


@pytest.fixture
async def on_cassandra(cassandra_settings: Settings) -> AsyncIterator[CassandraStore]:
    made = await CassandraStore.connect(cassandra_settings)
    yield made
    await made.close()


def selected(settings: Settings, cells: list[str], key: str) -> list[int | None]:
    with schema_session(settings, 30) as session:
        return [session.execute(f"SELECT {cell}", (key,)).one()[0] for cell in cells]


@pytest.mark.stack
async def test_every_row_expires(on_cassandra: CassandraStore, cassandra_settings: Settings, user: str) -> None:
    await on_cassandra.put(row(user, 10))
    await on_cassandra.put_wordings({user: b"w"})
    keyspace = cassandra_settings.cassandra_keyspace
    cells = [
        f"TTL(persona) FROM {keyspace}.personas_by_user WHERE user_id = %s",
        f"TTL(persona) FROM {keyspace}.persona_history WHERE user_id = %s",
        f"TTL(wording) FROM {keyspace}.wording_cache WHERE content_key = %s",
    ]
    found = await asyncio.to_thread(selected, cassandra_settings, cells, user)
    whole = cassandra_settings.persona_ttl_days * 86_400
    for seconds in found:
        assert seconds is not None
        assert whole - 600 < seconds <= whole


@pytest.mark.stack
async def test_a_ttl_of_zero_keeps_rows(cassandra_settings: Settings, user: str) -> None:
    settings = replace(cassandra_settings, persona_ttl_days=0)
    keeping = await CassandraStore.connect(settings)
    try:
        await keeping.put(row(user, 10))

        cells = [f"TTL(persona) FROM {settings.cassandra_keyspace}.personas_by_user WHERE user_id = %s"]
        assert await asyncio.to_thread(selected, settings, cells, user) == [None]
    finally:
        await keeping.close()


@pytest.mark.stack
async def test_a_cancelled_call_leaves_the_store_usable(on_cassandra: CassandraStore, user: str) -> None:
    calls = [asyncio.ensure_future(on_cassandra.put(row(user, 10))) for _ in range(20)]
    await asyncio.sleep(0)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await on_cassandra.put(row(user, 18))
    assert await on_cassandra.latest(user) == row(user, 18)


@dataclass
class Proxy:
    """Stands between a store and Cassandra: `cut` refuses and drops connections, `freeze` swallows what is sent."""

    target: int
    port: int = 0
    frozen: bool = False
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        self._writers |= {writer, far_writer}
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            self._writers -= {writer, far_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while content := await reader.read(65_536):
                if not self.frozen:
                    writer.write(content)
                    await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort()


@pytest.fixture
async def proxy(cassandra: Stack) -> AsyncIterator[Proxy]:
    made = Proxy(cassandra.cassandra_port)
    await made.start()
    yield made
    await made.cut()


@pytest.mark.stack
@pytest.mark.parametrize("fault", ["cut", "freeze"])
async def test_a_store_that_is_away_is_unavailable_soon_and_then_recovers(
    cassandra_settings: Settings, proxy: Proxy, user: str, fault: str
) -> None:
    settings = replace(cassandra_settings, cassandra_port=proxy.port)
    store = await CassandraStore.connect(settings, deadline_seconds=2.0)
    try:
        await store.put(row(user, 10))
        if fault == "cut":
            await proxy.cut()
        else:
            proxy.frozen = True
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match=str(proxy.port)):
            await store.put(row(user, 18))
        assert time.monotonic() - started < 5
        assert not await store.ready()

        proxy.frozen = False
        if fault == "cut":
            await proxy.start()
        deadline = time.monotonic() + 30
        while not await store.ready():
            assert time.monotonic() < deadline, "the store did not come back"
            await asyncio.sleep(0.2)
        await store.put(row(user, 18))
        assert await store.latest(user) == row(user, 18)
    finally:
        await store.close()


@pytest.mark.stack
async def test_a_short_outage_is_waited_out(cassandra_settings: Settings, proxy: Proxy, user: str) -> None:
    settings = replace(cassandra_settings, cassandra_port=proxy.port)
    store = await CassandraStore.connect(settings, deadline_seconds=30.0)
    try:
        await proxy.cut()
        putting = asyncio.ensure_future(store.put(row(user, 10)))
        await asyncio.sleep(0.5)
        assert not putting.done()
        await proxy.start()
        await putting
        assert await store.latest(user) == row(user, 10)
    finally:
        await store.close()


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as held:  # bound but not listening, so nothing else takes it
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


async def test_connecting_to_nothing_names_the_address(closed_port: int) -> None:
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match=f"127.0.0.1 port {closed_port} does not answer"):
        await CassandraStore.connect(Settings(cassandra_port=closed_port))
    assert time.monotonic() - started < 10


@pytest.mark.stack
async def test_a_missing_schema_says_what_to_run(cassandra: Stack) -> None:
    settings = replace(cassandra.settings, cassandra_keyspace="never_made")
    with pytest.raises(StoreUnavailable, match="personas init"):
        await CassandraStore.connect(settings)
