"""The application: `create_app(settings)`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import copy
from functools import cache
from importlib.metadata import version

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, FastAPI
from fastapi.routing import APIRoute
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
import api.reference.routes
import api.workers.routes
from api import openapi, problems
from api.access_log import AccessLog
from api.auth import AuthenticationMiddleware, LoopbackOnly
from api.client_shares import ClientShares, TooManyTransfers
from api.datasets.upload import remove_stale_spool_files
from api.idempotency.keys import install_replay_handler
from api.jobs.watcher import JobWatcher
from api.middleware import RequestContextMiddleware
from api.request_checks import refuse_unknown_parameters
from domain.artifacts import ArtifactStore
from domain.db import Database
from domain.encoding_checks import EncodingChecker
from domain.settings import Settings


def create_app(settings: Settings | None = None, access_log: AccessLog | None = None) -> FastAPI:
    """The HTTP service over the database and the artifact store that `settings` name.

    The database must have its schema already: see :func:`domain.schema.upgrade`.

    Args:
        settings: read from the environment unless given.
        access_log: gets a line for each response; null for none.
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
        # The page of the framework loads its scripts from elsewhere: `api.reference` serves its own.
        docs_url=None,
        redoc_url=None,
    )
    app.state.settings = settings
    app.state.access_log = access_log
    app.state.transfers = ClientShares(settings.max_transfers, TooManyTransfers)
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
    app.add_middleware(AuthenticationMiddleware, api_key=settings.api_key)
    if settings.api_key is None:
        app.add_middleware(LoopbackOnly)
    app.add_middleware(RequestContextMiddleware, access_log=access_log, root_path=settings.root_path)
    app.openapi = lambda: openapi.build_document(app)  # type: ignore[method-assign] # FastAPI's documented way.
    return app


@cache
def _routes() -> list[BaseRoute]:
    """Everything that is served: built once, since it takes as long as a hundred requests and no setting changes it."""
    router = APIRouter(generate_unique_id_function=lambda route: route.name)
    for unversioned in (api.health.routes.router, api.reference.routes.router):
        _answer_head(unversioned)
        router.include_router(unversioned)
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
        _answer_head(part.router)
        router.include_router(part.router, prefix="/v1", dependencies=[Depends(refuse_unknown_parameters)])
    return router.routes


def _answer_head(router: APIRouter) -> None:
    """Have HEAD answered as GET is, without the body, which the server leaves out. It is documented once, for GET."""
    for position, route in reversed(list(enumerate(router.routes))):
        if isinstance(route, APIRoute) and route.methods is not None and {"GET", "HEAD"} & route.methods == {"GET"}:
            twin = copy(route)
            twin.methods, twin.include_in_schema = {"HEAD"}, False
            router.routes.insert(position + 1, twin)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    await run_sync(remove_stale_spool_files, app.state.settings)
    yield
    if app.state.access_log is not None:
        app.state.access_log.flush()
    await app.state.watcher.aclose()
    await run_sync(app.state.database.close)
