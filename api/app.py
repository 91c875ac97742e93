"""The application: `create_app(settings)`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from importlib.metadata import version

from anyio.to_thread import run_sync
from fastapi import APIRouter, FastAPI
from starlette.routing import BaseRoute

import api.checkpoints.routes
import api.datasets.preview
import api.datasets.routes
import api.health.routes
import api.jobs.actions
import api.jobs.polling
import api.jobs.routes
import api.jobs.streaming
import api.jobs.validation
import api.methods.routes
import api.workers.routes
from api import openapi, problems
from api.auth import LoopbackOnly
from api.datasets.upload import remove_stale_spool_files
from api.idempotency.keys import install_replay_handler
from api.jobs.watcher import JobWatcher
from api.middleware import RequestContextMiddleware
from domain.artifacts import ArtifactStore
from domain.db import Database
from domain.encoding_checks import EncodingChecker
from domain.settings import Settings


def create_app(settings: Settings | None = None) -> FastAPI:
    """The HTTP service over the database and the artifact store that `settings` name.

    The database must have its schema already: see :func:`domain.db.upgrade`.

    Args:
        settings: read from the environment unless given.
    """
    settings = settings or Settings()
    app = FastAPI(
        title="POCL",
        version=version("pocl-service"),
        summary="Distil large language models with progressive overload curriculum learning.",
        openapi_tags=openapi.TAGS,
        lifespan=_lifespan,
        routes=_routes(),
        separate_input_output_schemas=False,
        # A redirect would be built from what the client calls this host.
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.state.database = Database(settings.database_url)
    app.state.watcher = JobWatcher(
        app.state.database,
        poll_seconds=settings.watch_seconds,
        max_followers=settings.max_followers,
        worker_seconds=settings.lease_seconds,
    )
    app.state.representations = api.jobs.polling.create_representation_cache(
        app.state.database, worker_seconds=settings.lease_seconds
    )
    app.state.event_cache = api.jobs.streaming.create_event_cache(app.state.database)
    app.state.store = ArtifactStore(settings.artifact_root)
    app.state.encoding_checker = EncodingChecker(seconds=settings.encoding_check_seconds)
    problems.install(app)
    install_replay_handler(app)
    # The one added last is the outermost.
    app.add_middleware(api.jobs.polling.PollFastPath)
    if settings.api_key is None:
        app.add_middleware(LoopbackOnly)
    app.add_middleware(RequestContextMiddleware)
    app.openapi = lambda: openapi.build_document(app)  # type: ignore[method-assign] # FastAPI's documented way.
    return app


@cache
def _routes() -> list[BaseRoute]:
    """Everything that is served: built once, since it takes as long as a hundred requests and no setting changes it."""
    router = APIRouter(generate_unique_id_function=lambda route: route.name)
    router.include_router(api.health.routes.router)
    # The router tries them in this order: the busiest first, after `validate`, which would pass for the id of a job.
    for part in (
        api.jobs.validation,
        api.jobs.polling,
        api.jobs.streaming,
        api.jobs.actions,
        api.jobs.routes,
        api.datasets.routes,
        api.datasets.preview,
        api.checkpoints.routes,
        api.methods.routes,
        api.workers.routes,
    ):
        router.include_router(part.router, prefix="/v1")
    return router.routes


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    await run_sync(remove_stale_spool_files, app.state.settings)
    yield
    await app.state.watcher.aclose()
    await run_sync(app.state.database.close)
