"""The page's web server: static files, JSON endpoints, health checks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Final

import orjson
from aiohttp import web

from agents.page.source import Health, PageSource, SourceUnavailable

_FILES: Final = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HEADERS: Final = {
    "Content-Security-Policy": ("default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def _alive() -> bool:
    return True


def _moving() -> str | None:
    return None


def create_page(
    source: PageSource,
    *,
    alive: Callable[[], bool] = _alive,
    stalled: Callable[[], str | None] = _moving,
    ready: Callable[[], Awaitable[Mapping[str, Health]]] | None = None,
) -> web.Application:
    """The page as an aiohttp application; it starts and stops `source` with itself.

    `/healthz` answers 200 while `alive()` and `stalled()` names nothing that stands still, else 503 with the
    `problem`: a supervisor restarts the worker then. `/readyz` answers
    with the parts of `ready()` (default: the source's): 503 if one is down, else 200, degraded included.
    `/api/overview`, `/api/latest` and `/api/viewers/USER` (or `/api/viewers?user_id=USER`, for ids that a
    path cannot hold) answer with the records of `agents.page.source` as JSON.
    """
    parts = source.health if ready is None else ready

    async def overview(_: web.Request) -> web.Response:
        return _json(await source.overview())

    async def latest(_: web.Request) -> web.Response:
        return _json(await source.latest())

    async def viewer(request: web.Request) -> web.Response:
        user_id = request.match_info.get("user_id") or request.query.get("user_id")
        if not user_id:
            return _json({"error": "name a viewer: /api/viewers?user_id=..."}, 400)
        try:
            card = await source.viewer(user_id)
        except SourceUnavailable as error:
            return _json({"error": str(error)}, 503)
        if card is None:
            return _json({"error": "no persona is stored for this viewer"}, 404)
        return _json(card)

    async def healthz(_: web.Request) -> web.Response:
        problem = stalled() if alive() else "an app of this worker failed; see its log"
        return _json({"alive": True}) if problem is None else _json({"alive": False, "problem": problem}, 503)

    async def readyz(_: web.Request) -> web.Response:
        health = await parts()
        return _json(health, 503 if Health.DOWN in health.values() else 200)

    async def running(_: web.Application) -> AsyncIterator[None]:
        await source.start()
        yield
        await source.stop()

    app = web.Application(middlewares=[_secured])
    app.cleanup_ctx.append(running)
    app.add_routes(
        [
            *(web.get(path, _file(name, kind)) for path, (name, kind) in _FILES.items()),
            web.get("/api/overview", overview),
            web.get("/api/latest", latest),
            web.get("/api/viewers", viewer),
            web.get("/api/viewers/{user_id}", viewer),
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
        ]
    )
    return app


@dataclass(frozen=True, slots=True)
class RunningPage:
    """A page that is being served. url: where a browser on this machine finds it."""

    url: str
    port: int
    runner: web.AppRunner

    async def stop(self) -> None:
        """Stop serving and stop the source."""
        await self.runner.cleanup()


async def serve_page(app: web.Application, host: str, port: int) -> RunningPage:
    """Serve `app` on host:port, port 0 meaning any free one. Raises OSError if the address cannot be used."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError:
        await runner.cleanup()
        raise
    bound: int = runner.addresses[0][1]
    shown = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host  # noqa: S104
    return RunningPage(f"http://{f'[{shown}]' if ':' in shown else shown}:{bound}/", bound, runner)


@web.middleware
async def _secured(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        response = await handler(request)
    except web.HTTPException as error:  # aiohttp's own 404 and 405
        response = _json({"error": error.reason}, error.status)
    response.headers.update(_HEADERS)
    return response


def _file(name: str, kind: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    text = resources.files("agents.page").joinpath(name).read_text("utf-8")

    async def serve(_: web.Request) -> web.StreamResponse:
        return web.Response(text=text, content_type=kind, charset="utf-8")

    return serve


def _json(value: object, status: int = 200) -> web.Response:
    body = orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)
    return web.Response(body=body, status=status, content_type="application/json", charset="utf-8")
