"""The application: `create_app(settings)`."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from copy import copy
from functools import cache, partial
from importlib.metadata import version
from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, FastAPI
from fastapi.routing import APIRoute
from limits.storage import Storage
from opentelemetry.trace import TracerProvider
from starlette.routing import BaseRoute
from starlette.types import Scope

import api.chat.routes
import api.checkpoints.routes
import api.dashboard.routes
import api.datasets.preview
import api.datasets.routes
import api.exports.routes
import api.health.routes
import api.jobs.actions
import api.jobs.logs
import api.jobs.polling
import api.jobs.publications
import api.jobs.routes
import api.jobs.streaming
import api.jobs.trackers
import api.jobs.validation
import api.keys.routes
import api.methods.routes
import api.models.routes
import api.openai.files
import api.openai.fine_tuning
import api.openai.models
import api.presets.routes
import api.projects.routes
import api.queue.routes
import api.quota.routes
import api.reference.routes
import api.retention.routes
import api.schedulers.routes
import api.scrape.routes
import api.usage.routes
import api.version
import api.webhooks.routes
import api.workers.routes
from api import openapi, problems
from api.access_log import AccessLog
from api.auth import AuthenticationMiddleware, LoopbackOnly
from api.browser_sessions import BrowserSessions
from api.chat.completions import ChatWatcher
from api.chat.schemas import chunk_schemas
from api.client_shares import ClientShares, TooManyTransfers
from api.cross_origin import NamedOrigins
from api.dashboard.error_pages import ErrorPages
from api.datasets.upload import remove_stale_spool_files, spool_directory
from api.datasets.validation import DatasetValidator
from api.idempotency.keys import install_replay_handler
from api.jobs.event_schemas import message_schemas
from api.jobs.stream_reads import StreamReads
from api.jobs.summaries import SummaryCache
from api.jobs.watcher import JobWatcher
from api.metrics import catalog
from api.metrics.catalog import Metric
from api.metrics.recorder import MetricsRecorder
from api.middleware import RequestContextMiddleware
from api.openai.error_shape import PREFIX, OpenAIErrors
from api.prefix import path_below_prefix
from api.rate_limits import RequestRates, WrongKeyRates
from api.request_checks import refuse_unknown_parameters
from api.sessions import transaction_slots
from api.verified_keys import VerifiedKeys
from api.webhooks.messages import describe_messages
from domain.artifact_stores import open_artifact_store
from domain.db import Database
from domain.encoding_checks import EncodingChecker
from domain.jobs.group_commit import GroupCommit
from domain.model_catalog import ModelCatalog
from domain.settings import Settings

_UNTRACED = frozenset({"/healthz", "/readyz", "/version", "/metrics"})


def create_app(
    settings: Settings | None = None,
    access_log: AccessLog | None = None,
    metrics: MetricsRecorder | None = None,
    tracer_provider: TracerProvider | None = None,
    clock: Callable[[], float] = time.monotonic,
    wrong_keys: WrongKeyRates | None = None,
    rate_counts: Storage | None = None,
) -> FastAPI:
    """The HTTP service over the database and the artifact store that `settings` name.

    The database must have its schema already: see :func:`domain.schema.upgrade`.

    Args:
        settings: read from the environment unless given.
        access_log: gets a line for each response; null for none.
        metrics: records requests; those of this process alone unless given.
        tracer_provider: makes a span for each request; null for none.
        clock: monotonic seconds, by which keys are looked up again.
        wrong_keys: slows clients down that send wrong keys; one that waits by the clock unless given.
        rate_counts: where processes that share a socket count the requests of a key together; null: this one counts for
            itself, unless the settings name a Redis.
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
        # The page of the framework loads its scripts from elsewhere, and its document is built on the event loop, for
        # seconds: `api.reference` serves both.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        telemetry={
            "tracing": tracer_provider is not None,
            "tracer_provider": tracer_provider,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
            "exclude": _is_untraced,
        },
    )
    app.state.settings = settings
    app.state.access_log = access_log
    app.state.metrics = metrics = metrics or MetricsRecorder()
    app.state.uploads = Counter[str]()
    app.state.transfers = ClientShares(settings.max_transfers, TooManyTransfers)
    app.state.database = Database(settings.database_url)
    app.state.watcher = JobWatcher(
        app.state.database,
        poll_seconds=settings.watch_seconds,
        max_followers=settings.max_followers,
        worker_seconds=settings.lease_seconds,
    )
    app.state.chat_watcher = ChatWatcher(
        app.state.database, poll_seconds=settings.watch_seconds, worker_seconds=settings.lease_seconds
    )
    app.state.representations = api.jobs.polling.create_representation_cache(
        app.state.database, worker_seconds=settings.lease_seconds
    )
    app.state.summaries = SummaryCache()
    app.state.stream_reads = StreamReads(app.state.database)
    app.state.store = open_artifact_store(settings)
    app.state.model_reader = api.models.routes.ModelReader(ModelCatalog(settings.model_roots))
    app.state.validator = DatasetValidator(app.state.database, app.state.store, directory=spool_directory(settings))
    app.state.encoding_checker = EncodingChecker(seconds=settings.encoding_check_seconds)
    app.state.group_commit = GroupCommit(app.state.database)
    app.state.figures = api.scrape.routes.create_figures_cache(app.state.database, settings)
    app.state.table_figures = api.scrape.routes.create_table_figures_cache(app.state.database)
    metrics.add_readings(lambda: _readings(app))
    problems.install(app)
    install_replay_handler(app)
    # The one added last is the outermost.
    app.add_middleware(api.jobs.polling.PollFastPath)
    app.state.keys = VerifiedKeys(app.state.database, settings.api_key, settings.home, clock)
    app.state.sessions = BrowserSessions(app.state.database, app.state.keys, clock)
    app.state.wrong_keys = wrong_keys or WrongKeyRates()
    app.add_middleware(
        AuthenticationMiddleware,
        keys=app.state.keys,
        sessions=app.state.sessions,
        rates=RequestRates(settings.requests_per_minute, settings.rate_limit_redis_url, rate_counts),
        wrong_keys=app.state.wrong_keys,
    )
    if settings.cors_origins:
        app.add_middleware(NamedOrigins, origins=settings.cors_origins)
    if settings.api_key is None and settings.on_loopback:
        app.add_middleware(LoopbackOnly, origins=settings.cors_origins)
    app.add_middleware(api.scrape.routes.ScrapeTokenMiddleware, token=settings.metrics_token)
    app.add_middleware(RequestContextMiddleware, access_log=access_log, metrics=metrics, root_path=settings.root_path)
    app.add_middleware(ErrorPages, root_path=settings.root_path)
    app.add_middleware(OpenAIErrors)
    build_document = partial(openapi.build_document, app, describe_messages, _describe_stream_messages)
    app.openapi = build_document  # type: ignore[method-assign] # FastAPI's documented way.
    app.state.document_cache = openapi.create_document_cache(app)
    return app


@cache
def _routes() -> list[BaseRoute]:
    """Everything that is served: built once, since it takes as long as a hundred requests and no setting changes it."""
    router = APIRouter(generate_unique_id_function=lambda route: route.name)
    for unversioned in (
        api.health.routes.router,
        api.version.router,
        api.scrape.routes.router,
        api.reference.routes.router,
        *api.dashboard.routes.ROUTERS,
    ):
        _answer_head(unversioned)
        router.include_router(unversioned)
    # The router tries them in this order: the busiest first, after `validate`, which would pass for the id of a job.
    for part in (
        api.jobs.validation,
        api.jobs.polling,
        api.jobs.streaming,
        api.jobs.logs,
        api.jobs.actions,
        api.jobs.publications,
        api.jobs.routes,
        api.jobs.trackers,
        api.datasets.routes,
        api.datasets.preview,
        api.chat.routes,
        api.checkpoints.routes,
        api.exports.routes,
        api.methods.routes,
        api.webhooks.routes,
        api.workers.routes,
        api.schedulers.routes,
        api.retention.routes,
        api.keys.routes,
        api.projects.routes,
        api.quota.routes,
        api.models.routes,
        api.presets.routes,
        api.queue.routes,
        api.usage.routes,
    ):
        _answer_head(part.router)
        router.include_router(part.router, prefix="/v1", dependencies=[Depends(refuse_unknown_parameters)])
    for part in (api.openai.files, api.openai.fine_tuning, api.openai.models):
        _answer_head(part.router)
        router.include_router(part.router, prefix=PREFIX)
    return router.routes


def _describe_stream_messages() -> dict[str, Any]:
    """The schemas of what streams send, by name."""
    return {**message_schemas(), **chunk_schemas()}


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
    tasks = {asyncio.create_task(each.run()) for each in (app.state.metrics, app.state.validator)}
    yield
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    if app.state.access_log is not None:
        app.state.access_log.flush()
    await app.state.watcher.aclose()
    await app.state.keys.aclose()
    await run_sync(app.state.database.close)


def _is_untraced(scope: Scope) -> bool:
    """Whether a request is one of thousands that are alike: a probe, a scrape or a poll."""
    path = path_below_prefix(scope)
    return path in _UNTRACED or api.jobs.polling.is_plain_poll(scope)


def _readings(app: FastAPI) -> Mapping[tuple[Metric, tuple[str, ...]], float]:
    """What this process holds and has room for now."""
    settings: Settings = app.state.settings
    database: Database = app.state.database
    slots = transaction_slots()
    return {
        (catalog.FOLLOWERS, ()): app.state.watcher.subscriptions,
        (catalog.TRANSFERS, ()): app.state.transfers.total,
        (catalog.CAPACITY, ("followers",)): settings.max_followers,
        (catalog.CAPACITY, ("transfers",)): settings.max_transfers,
        (catalog.CAPACITY, ("transactions",)): slots.capacity,
        (catalog.CAPACITY, ("database_connections",)): database.max_connections,
        (catalog.DATABASE_CONNECTIONS, ()): database.connections_in_use,
        (catalog.TRANSACTION_SLOTS, ("in_use",)): slots.in_use,
        (catalog.TRANSACTION_SLOTS, ("waiting",)): slots.waiting,
    }
