"""Webhooks over HTTP: make, list, change, delete, test, rotate their secret; list and repeat deliveries."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from api.auth import Caller
from api.dependencies import SettingsDep
from api.idempotency.keys import KEY_ERRORS
from api.idempotency.writes import IdempotentWriteDep, replayable_response
from api.pagination import After, Limit
from api.path_params import DeliveryId, WebhookId
from api.prefix import location_of
from api.problems import BODY_PROBLEMS, COMMON_PROBLEMS, problem_responses
from api.sessions import ReadSession, WriteSession
from api.strict_json import StrictJsonRoute
from api.webhooks.schemas import (
    DeliveryPage,
    DeliveryView,
    DeliveryWithBody,
    RotateSecretRequest,
    WebhookCreate,
    WebhookPage,
    WebhookUpdate,
    WebhookView,
    WebhookWithSecret,
)
from domain.webhooks import deliveries, repository
from domain.webhooks.addresses import WebhookUrlInvalid, parse_url
from domain.webhooks.deliveries import BacklogFull, DeliveryNotFound, WebhookIsDisabled
from domain.webhooks.models import DeliveryStatus
from domain.webhooks.repository import TooManyWebhooks, WebhookNotFound, database_time

router = APIRouter(prefix="/webhooks", tags=["webhooks"], responses=COMMON_PROBLEMS, route_class=StrictJsonRoute)

Status = Annotated[DeliveryStatus | None, Query(description="The state of the messages to list; all unless given.")]


@router.post(
    "",
    status_code=201,
    summary="Make a webhook",
    response_model=WebhookWithSecret,
    responses={
        **replayable_response(201, location=True),
        **BODY_PROBLEMS,
        **problem_responses(WebhookUrlInvalid, TooManyWebhooks, *KEY_ERRORS),
    },
)
def create_webhook(
    body: WebhookCreate, write: IdempotentWriteDep, caller: Caller, settings: SettingsDep, request: Request
) -> Response:
    """Have messages about jobs of the project posted to an address, signed as Standard Webhooks has it. The response
    has the secret to verify them with, which is not shown again.
    """
    parse_url(body.url, settings.webhook_internal_hosts)
    with write.transaction() as session:
        endpoint = repository.add_endpoint(
            session,
            project=caller.project,
            url=body.url,
            description=body.description,
            events=body.events,
            labels=body.labels,
        )
        location = location_of(request, "get_webhook", webhook_id=endpoint.id)
        return write.respond(WebhookWithSecret.from_row(endpoint), status=201, location=location)


@router.get("", summary="List webhooks")
def list_webhooks(session: ReadSession, caller: Caller, limit: Limit = 20, after: After = None) -> WebhookPage:
    """The project's webhooks, newest first, without their secrets."""
    page = repository.list_endpoints(session, caller.project, limit=limit, after=after)
    return WebhookPage.from_rows(page, WebhookView.model_validate, lambda row: row.id)


@router.get("/{webhook_id}", summary="Get a webhook", responses=problem_responses(WebhookNotFound))
def get_webhook(session: ReadSession, caller: Caller, webhook_id: WebhookId) -> WebhookView:
    """One webhook: what is sent to it, whether it is enabled, and how deliveries go."""
    return WebhookView.model_validate(repository.get_endpoint(session, caller.project, webhook_id))


@router.patch(
    "/{webhook_id}",
    summary="Change a webhook",
    responses={**BODY_PROBLEMS, **problem_responses(WebhookNotFound, WebhookUrlInvalid)},
)
def update_webhook(
    session: WriteSession, caller: Caller, webhook_id: WebhookId, settings: SettingsDep, body: WebhookUpdate
) -> WebhookView:
    """Change address, description, event types or labels, disable the webhook or enable it again. Messages that wait go
    to the new address.
    """
    if body.url is not None:
        parse_url(body.url, settings.webhook_internal_hosts)
    endpoint = repository.update_endpoint(session, caller.project, webhook_id, body.changes)
    return WebhookView.model_validate(endpoint)


@router.delete(
    "/{webhook_id}", status_code=204, summary="Delete a webhook", responses=problem_responses(WebhookNotFound)
)
def delete_webhook(session: WriteSession, caller: Caller, webhook_id: WebhookId) -> None:
    """Delete a webhook, its secret and the log of its deliveries; messages that wait are not sent."""
    repository.delete_endpoint(session, caller.project, webhook_id)


@router.post(
    "/{webhook_id}/rotate-secret",
    summary="Rotate the secret of a webhook",
    response_model=WebhookWithSecret,
    responses={
        **replayable_response(200),
        **BODY_PROBLEMS,
        **problem_responses(WebhookNotFound, *KEY_ERRORS),
    },
)
def rotate_webhook_secret(
    write: IdempotentWriteDep, caller: Caller, webhook_id: WebhookId, body: RotateSecretRequest | None = None
) -> Response:
    """Make a new secret, which the response shows once. For a time of grace each message has two signatures, one by the
    new secret and one by the former.
    """
    grace_seconds = (body or RotateSecretRequest()).grace_seconds
    with write.transaction() as session:
        endpoint = repository.rotate_secret(session, caller.project, webhook_id, grace_seconds=grace_seconds)
        return write.respond(WebhookWithSecret.from_row(endpoint), status=200)


@router.post(
    "/{webhook_id}/test",
    status_code=202,
    summary="Test a webhook",
    response_model=DeliveryView,
    responses={
        **replayable_response(202),
        **problem_responses(WebhookNotFound, WebhookIsDisabled, BacklogFull, *KEY_ERRORS),
    },
)
def check_webhook(write: IdempotentWriteDep, caller: Caller, webhook_id: WebhookId) -> Response:
    """Send a message of the type `webhook.test`, whatever types the webhook is for. Its delivery says how it went."""
    with write.transaction() as session:
        delivery = deliveries.add_test_delivery(session, caller.project, webhook_id, now=database_time(session))
        return write.respond(DeliveryView.model_validate(delivery), status=202)


@router.get("/{webhook_id}/deliveries", summary="List deliveries", responses=problem_responses(WebhookNotFound))
def list_webhook_deliveries(
    session: ReadSession,
    caller: Caller,
    webhook_id: WebhookId,
    limit: Limit = 20,
    after: After = None,
    status: Status = None,
) -> DeliveryPage:
    """The messages to the webhook, newest first, each with its attempts: time, status, duration, error, and when the
    next one is due.
    """
    endpoint = repository.get_endpoint(session, caller.project, webhook_id)
    page = deliveries.list_deliveries(session, endpoint, limit=limit, after=after, status=status)
    return DeliveryPage.from_rows(page, DeliveryView.model_validate, lambda row: row.id)


@router.get(
    "/{webhook_id}/deliveries/{delivery_id}",
    summary="Get a delivery",
    responses=problem_responses(WebhookNotFound, DeliveryNotFound),
)
def get_webhook_delivery(
    session: ReadSession, caller: Caller, webhook_id: WebhookId, delivery_id: DeliveryId
) -> DeliveryWithBody:
    """One message to the webhook with its body and the attempts to deliver it."""
    endpoint = repository.get_endpoint(session, caller.project, webhook_id)
    return DeliveryWithBody.model_validate(deliveries.get_delivery(session, endpoint, delivery_id))


@router.post(
    "/{webhook_id}/deliveries/{delivery_id}/redeliver",
    status_code=202,
    summary="Deliver a message again",
    response_model=DeliveryView,
    responses={
        **replayable_response(202),
        **problem_responses(WebhookNotFound, DeliveryNotFound, WebhookIsDisabled, BacklogFull, *KEY_ERRORS),
    },
)
def redeliver_webhook_message(
    write: IdempotentWriteDep, caller: Caller, webhook_id: WebhookId, delivery_id: DeliveryId
) -> Response:
    """Send a message once more, at once and under its id, and retry it for a day if need be."""
    with write.transaction() as session:
        now = database_time(session)
        delivery = deliveries.redeliver(session, caller.project, webhook_id, delivery_id, now=now)
        return write.respond(DeliveryView.model_validate(delivery), status=202)
