"""The page's endpoints over HTTP, with a source in memory."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from importlib import resources
from urllib.parse import quote

import pytest
from aiohttp.test_utils import TestClient, TestServer

from agents.page.server import create_page, serve_page
from agents.page.source import (
    Count,
    GroupLag,
    Health,
    MemoryPageSource,
    Overview,
    SourceUnavailable,
    TopicLag,
    ViewerCard,
    viewer_card,
)
from tests.persona_samples import NOON, SampleRegistry, hostile_persona, sample_persona

HOSTILE = "<script>alert(1)</script> {0} %s ' \" \u202e\x1b[2J"
OVERVIEW = Overview(
    at=NOON,
    events=1_234,
    groups=(GroupLag("persona-watch", 7, (TopicLag("watch-events", 7),)),),
    rules=(Count("drift", 3),),
)


class DownSource(MemoryPageSource):
    """A source whose store is away."""

    async def viewer(self, user_id: str) -> ViewerCard | None:
        raise SourceUnavailable("Cassandra at nowhere:1 does not answer")


def source_of(*users: str) -> MemoryPageSource:
    return MemoryPageSource(
        OVERVIEW, cards={user: viewer_card([sample_persona(user)], SampleRegistry()) for user in users}
    )


async def test_overview_and_latest_are_json() -> None:
    async with TestClient(TestServer(create_page(source_of()))) as client:
        overview = await (await client.get("/api/overview")).json()
        assert overview["events"] == 1_234
        assert overview["groups"] == [
            {"group": "persona-watch", "lag": 7, "topics": [{"topic": "watch-events", "lag": 7}]}
        ]
        assert overview["rules"] == [{"name": "drift", "count": 3}]
        assert overview["delay_p50"] is None
        assert await (await client.get("/api/latest")).json() == []


async def test_a_card_has_titles_labels_and_versions() -> None:
    older = sample_persona(sequence=4, summary="Cooks.")
    card = viewer_card([sample_persona(), older], SampleRegistry())
    source = MemoryPageSource(OVERVIEW, cards={"ann": card})
    async with TestClient(TestServer(create_page(source))) as client:
        shown = await (await client.get("/api/viewers/ann")).json()
    assert shown["persona"]["version"] == 42
    assert shown["titles"]["v-pasta"] == "Hand-rolled tagliatelle in one hour"
    assert "v-unknown" not in shown["titles"]
    assert shown["labels"] == {"3": "italian cooking", "7": "gravel cycling", "9": "true crime"}
    assert [line["version"] for line in shown["versions"]] == [42, 34]
    assert shown["versions"][0]["added"] == ["gravel cycling"]


@pytest.mark.parametrize("user", ["ann", "a/b", "..", ".", "a?b#c", "ü 漢", HOSTILE, "%2e%2e", "a" * 512])
async def test_any_user_id_can_be_asked_for(user: str) -> None:
    async with TestClient(TestServer(create_page(source_of(user)))) as client:
        response = await client.get("/api/viewers", params={"user_id": user})
        assert response.status == 200
        assert (await response.json())["persona"]["user_id"] == user


async def test_a_user_id_with_a_slash_in_the_path() -> None:
    async with TestClient(TestServer(create_page(source_of("a/b")))) as client:
        assert (await client.get(f"/api/viewers/{quote('a/b', safe='')}")).status == 200


async def test_an_unknown_viewer_is_404_and_none_is_400() -> None:
    async with TestClient(TestServer(create_page(source_of("ann")))) as client:
        unknown = await client.get("/api/viewers/bob")
        assert unknown.status == 404
        assert "no persona" in (await unknown.json())["error"]
        assert (await client.get("/api/viewers")).status == 400
        assert (await client.get("/api/viewers?user_id=")).status == 400


async def test_a_store_that_is_away_is_503_with_its_address() -> None:
    async with TestClient(TestServer(create_page(DownSource(OVERVIEW)))) as client:
        response = await client.get("/api/viewers/ann")
        assert response.status == 503
        assert (await response.json())["error"] == "Cassandra at nowhere:1 does not answer"


async def test_hostile_text_is_escaped_json_and_never_html() -> None:
    card = viewer_card([hostile_persona("ann", HOSTILE)], SampleRegistry(titles={HOSTILE: HOSTILE}))
    async with TestClient(TestServer(create_page(MemoryPageSource(OVERVIEW, cards={"ann": card})))) as client:
        response = await client.get("/api/viewers/ann")
        assert response.content_type == "application/json"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        shown = await response.json()
    assert shown["persona"]["summary"] == HOSTILE
    assert shown["titles"] == {HOSTILE: HOSTILE}


@pytest.mark.parametrize("path", ["/", "/page.css", "/page.js", "/api/overview", "/nowhere"])
async def test_every_answer_has_the_security_headers(path: str) -> None:
    async with TestClient(TestServer(create_page(source_of()))) as client:
        response = await client.get(path)
        assert response.status == (404 if path == "/nowhere" else 200)
        assert response.headers["Content-Security-Policy"].startswith("default-src 'self';")
        assert response.headers["Cache-Control"] == "no-store"


async def test_only_reading_is_possible() -> None:
    async with TestClient(TestServer(create_page(source_of("ann")))) as client:
        for path in ("/", "/api/overview", "/api/viewers/ann"):
            assert (await client.post(path)).status == 405


def test_the_page_refers_to_nothing_outside_and_parses_no_markup() -> None:
    files = {name: resources.files("agents.page").joinpath(name).read_text("utf-8") for name in
             ("index.html", "page.css", "page.js")}  # fmt: skip
    for text in files.values():
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
        assert "@import" not in text
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|srcdoc", files["page.js"]
    )
    assert "style=" not in files["index.html"]
    assert not re.search(r"<script(?![^>]*\bsrc=)", files["index.html"])


async def test_health_follows_the_callbacks() -> None:
    state: dict[str, Health] = {"kafka": Health.OK, "student": Health.DEGRADED}
    alive = True

    async def ready() -> Mapping[str, Health]:
        return state

    app = create_page(source_of(), alive=lambda: alive, ready=ready)
    async with TestClient(TestServer(app)) as client:
        assert (await client.get("/healthz")).status == 200
        response = await client.get("/readyz")
        assert response.status == 200
        assert await response.json() == {"kafka": "ok", "student": "degraded"}
        state["kafka"] = Health.DOWN
        assert (await client.get("/readyz")).status == 503
        alive = False
        assert (await client.get("/healthz")).status == 503


async def test_what_stands_still_is_named_and_not_alive() -> None:
    problem: str | None = "watch-events partition 3: events wait"
    app = create_page(source_of(), stalled=lambda: problem)
    async with TestClient(TestServer(app)) as client:
        response = await client.get("/healthz")
        assert response.status == 503
        assert await response.json() == {"alive": False, "problem": problem}
        problem = None
        response = await client.get("/healthz")
        assert (response.status, await response.json()) == (200, {"alive": True})


async def test_readiness_is_the_sources_by_default() -> None:
    source = MemoryPageSource(OVERVIEW, health={"store": Health.DOWN})
    async with TestClient(TestServer(create_page(source))) as client:
        response = await client.get("/readyz")
        assert response.status == 503
        assert await response.json() == {"store": "down"}


async def test_serving_starts_and_stops_the_source_and_frees_the_port() -> None:
    source = source_of()
    page = await serve_page(create_page(source), "127.0.0.1", 0)
    assert source.running
    assert page.url == f"http://127.0.0.1:{page.port}/"
    await page.stop()
    assert not source.running
    with socket.create_server(("127.0.0.1", page.port)):
        pass


async def test_a_port_in_use_raises_and_leaves_nothing_running() -> None:
    source = source_of()
    in_use = pytest.raises(OSError, match="address already in use")
    with socket.create_server(("127.0.0.1", 0)) as taken, in_use:
        await serve_page(create_page(source), "127.0.0.1", taken.getsockname()[1])
    assert not source.running
