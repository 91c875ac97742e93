"""The OpenAPI document of the service."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.problems import MEDIA_TYPE

TAGS = [
    {"name": "jobs", "description": "Distillation jobs: submit, watch, pause, retry, branch, cancel."},
    {"name": "datasets", "description": "Training and validation samples."},
    {"name": "checkpoints", "description": "Weights to download, or to use in a later job."},
    {"name": "workers", "description": "The processes that train: devices, current jobs, draining."},
    {"name": "methods", "description": "The distillation methods of a job, with their parameters."},
    {"name": "health", "description": "Probes."},
]


def build_document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, built once, with problem details under their own media type."""
    if app.openapi_schema is None:
        root_path = app.state.settings.root_path
        document = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            description=app.description,
            routes=app.routes,
            tags=app.openapi_tags,
            servers=[{"url": root_path}] if root_path else None,
        )
        for path in document["paths"].values():
            for operation in path.values():
                _set_problem_media_type(operation["responses"])
        app.openapi_schema = document
    return app.openapi_schema


def _set_problem_media_type(responses: dict[str, Any]) -> None:
    # FastAPI files a model under the media type of the route's own response, whatever the status.
    for status, response in responses.items():
        if status >= "400":
            (schema,) = response["content"].values()
            response["content"] = {MEDIA_TYPE: schema}
