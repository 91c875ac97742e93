"""The OpenAPI document of the service."""

from collections.abc import Callable
from threading import Lock
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.component_schemas import refine
from api.principal import SAFE_METHODS
from api.problems import MEDIA_TYPE
from api.shared_components import share_components
from api.single_flight import SingleFlightCache

DescribeWebhooks = Callable[[], tuple[dict[str, Any], dict[str, Any]]]
"""What the service sends, by type, and the schemas that it refers to."""

TAGS = [
    {"name": "jobs", "description": "Distillation jobs: submit, watch, pause, retry, branch, cancel."},
    {"name": "datasets", "description": "Training and validation samples."},
    {"name": "checkpoints", "description": "Weights to download, or to use in a later job."},
    {"name": "chat", "description": "Conversations with checkpoints and models, to try them."},
    {"name": "webhooks", "description": "Signed messages about jobs, posted to addresses of the client."},
    {"name": "retention", "description": "What is deleted of ended jobs and unused data sets, and when."},
    {"name": "workers", "description": "The processes that train: devices, current jobs, draining."},
    {"name": "queue", "description": "The queued jobs of the project in their order, and how busy the service is."},
    {"name": "models", "description": "The models on the machine that may be teacher or student."},
    {"name": "presets", "description": "The presets of a specification, with their defaults."},
    {"name": "usage", "description": "Device time, jobs and storage of the project, day by day."},
    {"name": "methods", "description": "The distillation methods of a job, with their parameters."},
    {"name": "keys", "description": "API keys: make, rotate, revoke."},
    {"name": "projects", "description": "Projects with their quotas: each sees its own rows alone."},
    {"name": "quota", "description": "What a project may have, and has."},
    {"name": "health", "description": "Probes."},
]


_building = Lock()
MessageSchemas = Callable[[], dict[str, Any]]


def build_document(
    app: FastAPI, describe_webhooks: DescribeWebhooks, message_schemas: MessageSchemas
) -> dict[str, Any]:
    """FastAPI's document, built once, with webhooks and the messages of event streams, and with problem details under
    their own media type.

    It takes seconds.
    """
    with _building:
        if app.openapi_schema is None:
            root_path = app.state.settings.root_path
            document = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                description=app.description,
                routes=app.routes,
                tags=app.openapi_tags,
                servers=[{"url": root_path or "/", "description": "The service that this document comes from."}],
            )
            document["webhooks"], schemas = describe_webhooks()
            document["components"]["schemas"] |= schemas
            for path in document["paths"].values():
                for method, operation in path.items():
                    _set_problem_media_type(operation["responses"])
                    _name_scope(method, operation.get("security", []))
            schemas = document["components"]["schemas"]
            schemas |= {name: schema for name, schema in message_schemas().items() if name not in schemas}
            refine(document)
            share_components(document)
            app.openapi_schema = document
        return app.openapi_schema


DocumentCache = SingleFlightCache[None, bytes]


def create_document_cache(app: FastAPI) -> DocumentCache:
    """The document as JSON, which a thread makes for the first request that asks for it."""
    return SingleFlightCache(lambda _: orjson.dumps(app.openapi()), lambda _key, _document: True, 1)


def _name_scope(method: str, security: list[dict[str, list[str]]]) -> None:
    """Name the scope that an operation needs; the framework knows those of routes that need more than their method."""
    for requirement in security:
        requirement["bearer"] = requirement["bearer"] or ["read" if method.upper() in SAFE_METHODS else "submit"]


def _set_problem_media_type(responses: dict[str, Any]) -> None:
    # FastAPI files a model under the media type of the route's own response, whatever the status.
    for status, response in responses.items():
        if status >= "400":
            (schema,) = response["content"].values()
            response["content"] = {MEDIA_TYPE: schema}
