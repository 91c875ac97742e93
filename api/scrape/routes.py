"""`GET /metrics`: the figures of the service for Prometheus."""

import hashlib
import hmac
from typing import Final

from anyio.to_thread import run_sync
from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from api.auth import ServiceAdminCaller, ServiceAdminRequired
from api.metrics.recorder import MetricsRecorder
from api.prefix import path_below_prefix
from api.problems import COMMON_PROBLEMS, problem_responses
from api.scrape.exposition import CONTENT_TYPE, Snapshot, render
from api.scrape.figures_cache import FiguresCache
from api.version import build_info
from domain.db import Database
from domain.errors import Forbidden, InsufficientScope
from domain.monitoring.figures import ServiceFigures, TableFigures, read_figures, read_table_figures
from domain.settings import Settings

PATH: Final = "/metrics"
_PATIENCE_SECONDS: Final = 4.0
"""How long a scrape waits for the database; Prometheus itself waits for ten seconds."""
_TABLE_SECONDS: Final = 60.0

router = APIRouter(tags=["health"])


@router.get(
    PATH,
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={
        200: {
            "description": "The metrics in the Prometheus exposition format.",
            "content": {CONTENT_TYPE: {"schema": {"type": "string"}}},
        },
        **COMMON_PROBLEMS,
        **problem_responses(Forbidden, InsufficientScope, ServiceAdminRequired),
    },
)
async def get_metrics(request: Request, _caller: ServiceAdminCaller) -> Response:
    """The figures of the service and of all its API processes on this machine, whichever of them answers. While the
    database is away they say so, and leave out what only it knows. They tell of all projects, so that they need an
    admin key of the project `default`, or the token for scrapes (`POCL_METRICS_TOKEN`)."""
    return await _scrape(request.app)


class ScrapeTokenMiddleware:
    """ASGI middleware: answers a scrape that carries the token for scrapes, which opens nothing else.

    Every other request goes on, to be authenticated by its key.

    Args:
        token: the token; null for none.
    """

    def __init__(self, app: ASGIApp, token: SecretStr | None) -> None:
        self._app = app
        self._digest = None if token is None else _digest(token.get_secret_value().encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digest is not None and self._is_scrape(scope, self._digest):
            scope["state"]["route"] = PATH
            response = await _scrape(scope["app"])
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    @staticmethod
    def _is_scrape(scope: Scope, digest: bytes) -> bool:
        if scope["method"] not in ("GET", "HEAD") or path_below_prefix(scope) != PATH:
            return False
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = (given[0] if len(given) == 1 else b"").partition(b" ")
        # In constant time; the digests are of one length.
        return scheme.lower() == b"bearer" and hmac.compare_digest(_digest(token.strip()), digest)


def create_figures_cache(database: Database, settings: Settings) -> FiguresCache[ServiceFigures]:
    """The figures of the service for all scrapes of this process."""

    def read() -> ServiceFigures:
        with database.transaction(write=False) as session:
            return read_figures(session, lease_seconds=settings.lease_seconds)

    return FiguresCache(read, seconds=settings.metrics_cache_seconds)


def create_table_figures_cache(database: Database) -> FiguresCache[TableFigures]:
    """The figures that take a while to add up."""

    def read() -> TableFigures:
        with database.transaction(write=False) as session:
            return read_table_figures(session)

    return FiguresCache(read, seconds=_TABLE_SECONDS)


async def _scrape(app: FastAPI) -> Response:
    settings: Settings = app.state.settings
    recorder: MetricsRecorder = app.state.metrics
    figures_cache: FiguresCache[ServiceFigures] = app.state.figures
    table_cache: FiguresCache[TableFigures] = app.state.table_figures
    figures = await figures_cache.get(patience=_PATIENCE_SECONDS)
    # A database that did not answer is not asked once more.
    tables = None if figures is None else await table_cache.get(patience=_PATIENCE_SECONDS / 4)
    recorder.update_readings()
    build = build_info(settings.commit)

    def render_in_thread() -> bytes:
        snapshot = Snapshot(
            build=(build.version, build.commit or "", build.schema_revision),
            processes=recorder.values.totals(),
            figures=None if figures is None else figures[0],
            figures_age=0 if figures is None else figures[1],
            tables=None if tables is None else tables[0],
            directories={"artifacts": settings.artifact_root, "home": settings.home},
        )
        return render(snapshot)

    content = await run_sync(render_in_thread)
    return Response(content, media_type=CONTENT_TYPE, headers={"cache-control": "no-store"})


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
