"""Webhooks as the API shows them, and the bodies of requests about them."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from api.pagination import Page, Resource
from domain.jobs.models import LABEL_KEY
from domain.webhooks.addresses import MAX_URL_LENGTH
from domain.webhooks.event_types import WebhookEventType
from domain.webhooks.models import (
    DeliveryError,
    DeliveryFailure,
    DeliveryStatus,
    DisabledReason,
    WebhookEndpoint,
    WebhookStatus,
)

_WEEK = 7 * 24 * 3600
_PRINTABLE = r"^[^\x00-\x1f\x7f]*$"
Url = Annotated[str, Field(min_length=1, max_length=MAX_URL_LENGTH, examples=["https://example.com/hooks/pocl"])]
Events = Annotated[list[WebhookEventType], Field(min_length=1, max_length=len(WebhookEventType))]
Labels = Annotated[
    dict[
        Annotated[str, Field(pattern=f"^(?:{LABEL_KEY})$")],
        Annotated[str, Field(max_length=200, pattern=_PRINTABLE)],
    ],
    Field(max_length=16),
]
Description = Annotated[str, Field(max_length=200, pattern=_PRINTABLE)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class WebhookCreate(_Body):
    """A new webhook."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"url": "https://example.com/hooks/pocl", "events": ["job.succeeded", "job.failed"]}]
        }
    )

    url: Url
    """Where messages are posted to: `https`, at a host in the public internet unless the operator allows it."""
    description: Description = ""
    """What people call the webhook."""
    events: Events | None = None
    """The types of messages to send; null: all, those of later versions too."""
    labels: Labels = {}
    """Labels that a job must have, all of them, for messages about it to be sent."""


class WebhookUpdate(_Body):
    """Changes of a webhook; fields that are left out stay."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "disabled"}]})

    url: Url | None = None
    """Where messages are posted to."""
    description: Description | None = None
    """What people call the webhook."""
    events: Events | None = None
    """The types of messages to send; null: all."""
    labels: Labels | None = None
    """Labels that a job must have, all of them."""
    status: WebhookStatus | None = None
    """`disabled` stops all deliveries; `enabled` begins them again, and forgets failures."""

    @model_validator(mode="after")
    def _refuse_null(self) -> Self:
        for name in self.model_fields_set - {"events"}:
            if getattr(self, name) is None:
                raise ValueError(f"leave {name} out to let it stay as it is; null means nothing here")
        return self

    @property
    def changes(self) -> dict[str, Any]:
        """The columns to change, by name."""
        values = {name: getattr(self, name) for name in self.model_fields_set}
        if values.get("events") is not None:
            values["events"] = sorted(set(values["events"]))
        return values


class RotateSecretRequest(_Body):
    """How a secret is changed."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"grace_seconds": 3600}]})

    grace_seconds: StrictInt = Field(default=24 * 3600, ge=0, le=_WEEK)
    """How long the former secret stays valid beside the new one, in seconds: messages have a signature by each."""


class WebhookView(Resource):
    """An address that messages about jobs are posted to."""

    id: str
    """The id of the webhook."""
    object: Literal["webhook"] = "webhook"
    """The kind of the resource."""
    url: str
    """Where messages are posted to."""
    description: str
    """What people call the webhook."""
    events: list[str] | None
    """The types of messages that are sent; null: all. During an upgrade they may be some of a newer version."""
    labels: dict[str, str]
    """Labels that a job must have, all of them, for messages about it to be sent."""
    status: WebhookStatus
    """Whether messages are delivered."""
    disabled_reason: DisabledReason | None
    """Why nothing is delivered: `by_client`; `gone`, the receiver answered 410; `failing`, every attempt of some days
    failed. Null while the webhook is enabled."""
    disabled_at: datetime | None
    """When it was disabled."""
    failures: int
    """The number of attempts in a row that failed."""
    failing_since: datetime | None
    """When the first of them was; null where the last attempt succeeded."""
    delivered_at: datetime | None
    """When the last attempt succeeded; null: none did."""
    failed_at: datetime | None
    """When the last failed attempt was; null: none failed."""
    former_secret_until: datetime | None
    """Until when messages are signed with the former secret too; null: they are not."""
    created_at: datetime
    """When the webhook was made."""
    updated_at: datetime
    """When a client last changed it."""


class WebhookWithSecret(WebhookView):
    """A webhook with its secret, which is shown once."""

    secret: str
    """The secret that messages are signed with: `whsec_` and base64, as libraries of Standard Webhooks take it. Keep
    it: it is not shown again."""

    @classmethod
    def from_row(cls, endpoint: WebhookEndpoint) -> Self:
        return cls.model_validate(endpoint)


class WebhookPage(Page[WebhookView, str]):
    """Webhooks, newest first."""


class DeliveryAttemptView(Resource):
    """One attempt to deliver a message."""

    number: int
    """The number of the attempt, counted from 1."""
    at: datetime
    """When it began."""
    seconds: float
    """How long it took, in seconds."""
    status_code: int | None
    """The HTTP status of the response; null where there was none."""
    error: DeliveryError | None
    """Why it failed; null for success, which is any status of 2xx."""
    detail: str
    """One sentence about the error; empty for success."""


class DeliveryView(Resource):
    """A message to a webhook, and the attempts to deliver it."""

    id: str
    """The id of the message: the `webhook-id` of every attempt, by which receivers know a message that comes twice."""
    object: Literal["webhook_delivery"] = "webhook_delivery"
    """The kind of the resource."""
    type: str
    """The type of the message, for instance `job.succeeded`."""
    job_id: str | None
    """The job that the message is about; null for a test message."""
    status: DeliveryStatus
    """`pending` until it is `delivered`, or given up as `failed`."""
    failure: DeliveryFailure | None
    """Why it was given up: `attempts_exhausted`, all attempts of a day failed; `expired`, it waited for a day, as while
    its webhook was disabled; `backlog_full`, too many others waited. Null unless it was."""
    attempt_count: int
    """The number of attempts so far."""
    attempts: list[DeliveryAttemptView]
    """The attempts, oldest first; of many the last 20."""
    next_attempt_at: datetime | None
    """When the next attempt is due; null for a message that is delivered or given up."""
    expires_at: datetime
    """When the message is given up at the latest."""
    created_at: datetime
    """When the message was written."""
    settled_at: datetime | None
    """When it was delivered or given up; null before."""


class DeliveryWithBody(DeliveryView):
    """A message to a webhook with its body."""

    body: str
    """The body that is posted, exactly: signatures are made of these characters."""


class DeliveryPage(Page[DeliveryView, str]):
    """Messages to a webhook, newest first."""
