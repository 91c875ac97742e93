"""Keys and webhooks of the project."""

from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ValidationError
from sqlalchemy.orm import Session

from api.auth import AdminCaller, Caller
from api.dashboard.forms import Form, FormFields, require_form_token
from api.dashboard.rendering import redirect, render
from api.dependencies import SettingsDep
from api.keys.routes import create_key, list_keys, revoke_key, rotate_key
from api.keys.schemas import KeyCreate
from api.path_params import KeyId, WebhookId
from api.principal import Principal
from api.problems import field_error
from api.request_checks import refuse_unknown_parameters
from api.sessions import ReadSession, WriteSession
from api.webhooks.routes import delete_webhook, list_webhook_deliveries, list_webhooks, update_webhook
from api.webhooks.schemas import WebhookCreate, WebhookUpdate
from domain.errors import Unprocessable
from domain.keys.models import SCOPES_INCLUDED
from domain.webhooks import deliveries
from domain.webhooks import repository as webhooks
from domain.webhooks.addresses import parse_url
from domain.webhooks.event_types import WebhookEventType
from domain.webhooks.repository import database_time
from pocl.errors import FieldError

router = APIRouter(prefix="/ui/settings", include_in_schema=False)

_LISTED: Final = 100
_DELIVERIES: Final = 20
_CHANGES = [Depends(require_form_token)]
_SETTINGS: Final = "/ui/settings"
Body = TypeVar("Body", bound=BaseModel)


@router.get("", dependencies=[Depends(refuse_unknown_parameters)])
def show_settings(request: Request, session: ReadSession, caller: Caller) -> Response:
    """The webhooks of the project, and its keys for those who administer them."""
    return render(request, "settings.html", **_context(session, caller))


@router.post("/keys", dependencies=_CHANGES)
def make_key(request: Request, session: WriteSession, caller: AdminCaller, form: Form) -> Response:
    """Make a key, and show it this once."""
    body = _read(
        KeyCreate,
        {
            "name": form.get("name", ""),
            "scopes": form.getlist("scope"),
            "project": form.get("project") or None,
            "expires_at": _read_date(form),
        },
    )
    made = create_key(session, caller, body, request, Response())
    return render(request, "secret.html", title="Key made", name=made.name, secret=made.key, kind="key")


@router.post("/keys/{key_id}/rotate", dependencies=_CHANGES)
def renew_key(request: Request, session: WriteSession, caller: AdminCaller, key_id: KeyId) -> Response:
    """Give the key a new secret, and show it this once; the former one is accepted for an hour more."""
    made = rotate_key(session, caller, key_id)
    return render(request, "secret.html", title="Key rotated", name=made.name, secret=made.key, kind="rotated key")


@router.post("/keys/{key_id}/revoke", dependencies=_CHANGES)
def end_key(request: Request, session: WriteSession, caller: AdminCaller, key_id: KeyId) -> Response:
    """Have the key accepted no more."""
    revoke_key(session, caller, key_id)
    return redirect(request, _SETTINGS)


@router.post("/webhooks", dependencies=_CHANGES)
def make_webhook(
    request: Request, session: WriteSession, caller: Caller, settings: SettingsDep, form: Form
) -> Response:
    """Make a webhook, and show its secret this once."""
    body = _read(
        WebhookCreate,
        {
            "url": form.get("url", ""),
            "description": form.get("description", ""),
            "events": form.getlist("event") or None,
        },
    )
    parse_url(body.url, settings.webhook_internal_hosts)
    endpoint = webhooks.add_endpoint(
        session,
        project=caller.project,
        url=body.url,
        description=body.description,
        events=body.events,
        labels=body.labels,
    )
    return render(
        request, "secret.html", title="Webhook made", name=endpoint.url, secret=endpoint.secret, kind="webhook"
    )


@router.get("/webhooks/{webhook_id}", dependencies=[Depends(refuse_unknown_parameters)])
def show_webhook(request: Request, session: ReadSession, caller: Caller, webhook_id: WebhookId) -> Response:
    """The newest messages to a webhook, each with its attempts."""
    page = list_webhook_deliveries(session, caller, webhook_id, _DELIVERIES, None, None)
    endpoint = webhooks.get_endpoint(session, caller.project, webhook_id)
    return render(request, "webhook.html", webhook=endpoint, deliveries=page)


@router.post("/webhooks/{webhook_id}/status", dependencies=_CHANGES)
def set_webhook_status(
    request: Request, session: WriteSession, caller: Caller, settings: SettingsDep, webhook_id: WebhookId, form: Form
) -> Response:
    """Enable or disable the webhook."""
    body = _read(WebhookUpdate, {"status": form.get("status", "")})
    update_webhook(session, caller, webhook_id, settings, body)
    return redirect(request, f"{_SETTINGS}/webhooks/{webhook_id}")


@router.post("/webhooks/{webhook_id}/test", dependencies=_CHANGES)
def send_test(request: Request, session: WriteSession, caller: Caller, webhook_id: WebhookId) -> Response:
    """Send a message of the type `webhook.test`."""
    deliveries.add_test_delivery(session, caller.project, webhook_id, now=database_time(session))
    return redirect(request, f"{_SETTINGS}/webhooks/{webhook_id}")


@router.post("/webhooks/{webhook_id}/delete", dependencies=_CHANGES)
def remove_webhook(request: Request, session: WriteSession, caller: Caller, webhook_id: WebhookId) -> Response:
    """Delete the webhook and the log of its deliveries."""
    delete_webhook(session, caller, webhook_id)
    return redirect(request, _SETTINGS)


def _context(session: Session, caller: Principal) -> dict[str, Any]:
    return {
        "keys": list_keys(session, caller, None, _LISTED, None) if "admin" in caller.scopes else None,
        "webhooks": list_webhooks(session, caller, _LISTED, None),
        "scopes": list(SCOPES_INCLUDED),
        "event_types": [each.value for each in WebhookEventType],
    }


def _read(model: type[Body], values: dict[str, Any]) -> Body:
    """
    Raises:
        Unprocessable: a field of the form is wrong.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = [field_error({**each, "loc": ("body", *each["loc"])}, [model]) for each in error.errors()]
        raise Unprocessable(field_errors=errors) from None


def _read_date(form: FormFields) -> datetime | None:
    """The end of the day that the form names, in UTC."""
    text = form.get("expires_on", "")
    if not text:
        return None
    try:
        return datetime.strptime(f"{text} 23:59:59", "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    except ValueError:
        raise Unprocessable(
            field_errors=[FieldError("/expires_on", "date_invalid", "Write a day as 2030-12-31.")]
        ) from None
