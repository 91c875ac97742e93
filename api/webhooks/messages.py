"""The messages of webhooks in the OpenAPI document: a schema and an example of each type."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from pydantic.json_schema import JsonSchemaMode, models_json_schema

from domain.jobs.models import Job, JobEvent
from domain.jobs.states import CANCELLED, SUCCEEDED, WORKER_LOST, EndReason, JobStatus
from domain.webhooks.event_types import (
    DESCRIPTIONS,
    MESSAGES,
    TEST_TYPE,
    WebhookEventType,
    write_message,
    write_test_message,
)

_AT: Final = datetime(2026, 11, 27, 9, 30, tzinfo=UTC)
_SCHEMA_MODE: Final[JsonSchemaMode] = "serialization"
_HEADERS: Final = {
    "webhook-id": "The id of the message. It is the same for every attempt: use it to tell a message that comes twice.",
    "webhook-timestamp": "When the attempt was made, in seconds since 1970. Refuse one that is more than minutes old.",
    "webhook-signature": "Signatures, `v1,` and base64, separated by spaces: one by each valid secret.",
}


def _transition(before: JobStatus | None, to: JobStatus, reason: EndReason | None = None) -> dict[str, Any]:
    data: dict[str, Any] = {"from": before, "to": to, "attempt": 0 if before is None else 1}
    return data if reason is None else {**data, "reason": reason.as_json()}


_FAILED: Final = EndReason("loss_not_finite", "The loss is not finite.", "user", True, "Use a lower learning rate.")
_PUSH: Final = {"repo": "acme/news-student", "branch": "main", "checkpoint": "ckpt_06f2k8m3"}
_NOT_PUSHED: Final = {
    "code": "hub_token_refused",
    "message": "The Hub does not accept the token of the service: have it renewed.",
}
_EXAMPLES: Final[Mapping[WebhookEventType, tuple[str, dict[str, Any]]]] = {
    WebhookEventType.QUEUED: ("status", _transition(None, JobStatus.QUEUED)),
    WebhookEventType.STARTED: ("status", _transition(JobStatus.QUEUED, JobStatus.PREPARING)),
    WebhookEventType.RUNNING: ("status", _transition(JobStatus.PREPARING, JobStatus.RUNNING)),
    WebhookEventType.STAGE_COMPLETED: ("stage_finished", {"stage": 0, "step": 120, "epochs": 2, "kept_epoch": None}),
    WebhookEventType.CHECKPOINT_CREATED: (
        "checkpoint",
        {"id": "ckpt_06f2k8m3", "kind": "stage", "step": 120, "stage": 0, "size_bytes": 2_471_645_608},
    ),
    WebhookEventType.RECOVERING: ("status", _transition(JobStatus.RUNNING, JobStatus.RECOVERING, WORKER_LOST)),
    WebhookEventType.PAUSED: ("status", _transition(JobStatus.PAUSING, JobStatus.PAUSED)),
    WebhookEventType.RESUMED: ("status", _transition(JobStatus.PAUSED, JobStatus.QUEUED)),
    WebhookEventType.SUCCEEDED: ("status", _transition(JobStatus.RUNNING, JobStatus.SUCCEEDED, SUCCEEDED)),
    WebhookEventType.FAILED: ("status", _transition(JobStatus.RUNNING, JobStatus.FAILED, _FAILED)),
    WebhookEventType.CANCELLED: ("status", _transition(JobStatus.CANCELLING, JobStatus.CANCELLED, CANCELLED)),
    WebhookEventType.PUBLISHED: (
        "published",
        {
            **_PUSH,
            "url": "https://huggingface.co/acme/news-student",
            "commit": "9c0f3ab1" * 5,
        },
    ),
    WebhookEventType.PUBLICATION_FAILED: ("publication_failed", {**_PUSH, "error": _NOT_PUSHED}),
}


def example_of(message_type: WebhookEventType) -> dict[str, Any]:
    """The body of an example message."""
    event_type, data = _EXAMPLES[message_type]
    job = Job(id="job_06f2k8m3", name="news-student", project="default", labels={"team": "search"})
    event = JobEvent(job_id=job.id, seq=7, at=_AT, type=event_type, data=data)
    example: dict[str, Any] = json.loads(write_message(message_type, event, job))
    return example


def describe_messages() -> tuple[dict[str, Any], dict[str, Any]]:
    """What the service sends, for `webhooks` of an OpenAPI document, and the schemas that it refers to."""
    references, definitions = models_json_schema(
        [(model, _SCHEMA_MODE) for model in MESSAGES.values()], ref_template="#/components/schemas/{model}"
    )
    descriptions = {each.value: DESCRIPTIONS[each] for each in WebhookEventType}
    examples = {each.value: example_of(each) for each in WebhookEventType}
    descriptions[TEST_TYPE] = "Somebody asked for a test message."
    examples[TEST_TYPE] = json.loads(write_test_message("wh_06f2k8m3", _AT))
    operations = {
        message_type: {"post": _operation(message_type, descriptions[message_type], schema, examples[message_type])}
        for message_type, schema in ((each, references[(MESSAGES[each], _SCHEMA_MODE)]) for each in MESSAGES)
    }
    return operations, definitions["$defs"]


def _operation(message_type: str, description: str, schema: dict[str, Any], example: dict[str, Any]) -> dict[str, Any]:
    return {
        "operationId": f"receive_{message_type.replace('.', '_')}",
        "tags": ["webhooks"],
        "summary": f"A message of the type `{message_type}`",
        "description": description,
        "parameters": [
            {"name": name, "in": "header", "required": True, "description": text, "schema": {"type": "string"}}
            for name, text in _HEADERS.items()
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema, "example": example}},
        },
        "responses": {
            "2XX": {"description": "The message is received, and does not come again."},
            "410": {"description": "The webhook is disabled: no further messages come."},
            "default": {"description": "The message is sent again, later and later, for a day. `Retry-After` counts."},
        },
    }
