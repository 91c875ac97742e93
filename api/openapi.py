"""The OpenAPI document of the service."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.problems import MEDIA_TYPE

TAGS = [
    {"name": "jobs", "description": "Distillation jobs: submit, watch, pause, retry, branch, cancel."},
    {"name": "datasets", "description": "Training and validation rows."},
    {"name": "checkpoints", "description": "Weights to download, or to use in a later job."},
    {"name": "workers", "description": "Who does the work: devices, current jobs, draining."},
    {"name": "methods", "description": "What a job may be told to do."},
    {"name": "health", "description": "Probes."},
]


def document(app: FastAPI) -> dict[str, Any]:
    """The document, made once: FastAPI's, with problems under their own media type."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            description=app.description,
            routes=app.routes,
            tags=app.openapi_tags,
        )
        for path in made["paths"].values():
            for operation in path.values():
                _give_problems_their_type(operation["responses"])
        app.openapi_schema = made
    return app.openapi_schema


def _give_problems_their_type(responses: dict[str, Any]) -> None:
    # FastAPI files a model under the media type of the route's own answer, whatever the status.
    for status, response in responses.items():
        if status >= "400":
            (schema,) = response["content"].values()
            response["content"] = {MEDIA_TYPE: schema}
