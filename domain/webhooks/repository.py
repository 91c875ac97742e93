"""Endpoints of a project: add, change, rotate their secret, list, delete. No function commits."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import KeysetPage, db_now, fetch_page
from domain.errors import Conflict, NotFound
from domain.ids import new_id
from domain.projects.repository import lock_project_of_key
from domain.webhooks.models import DisabledReason, WebhookEndpoint
from domain.webhooks.signing import new_secret

MAX_ENDPOINTS: Final = 20
"""Endpoints of one project."""


class WebhookNotFound(NotFound):
    """The project has no webhook of this id."""

    code = "webhook_not_found"


class TooManyWebhooks(Conflict):
    """The project has as many webhooks as it may: delete one first."""

    code = "too_many_webhooks"


def database_time(session: Session) -> datetime:
    """The time by the database's clock."""
    return session.scalars(sa.select(db_now())).one()


def add_endpoint(
    session: Session,
    *,
    project: str,
    url: str,
    description: str,
    events: Sequence[str] | None,
    labels: Mapping[str, str],
) -> WebhookEndpoint:
    """Add an endpoint with a new secret.

    Args:
        url: one that :func:`domain.webhooks.addresses.parse_url` accepts.
        events: the types of messages that it gets; null: all.
        labels: those that a job must have.

    Raises:
        TooManyWebhooks: the project has as many as it may.
        Unauthenticated: the project was deleted since the sender was identified.
    """
    # Of two requests for the last place one gets it.
    lock_project_of_key(session, project)
    count = session.scalars(
        sa.select(sa.func.count()).select_from(WebhookEndpoint).where(WebhookEndpoint.project == project)
    ).one()
    if count >= MAX_ENDPOINTS:
        raise TooManyWebhooks
    endpoint = WebhookEndpoint(
        id=new_id("wh"),
        project=project,
        url=url,
        description=description,
        events=None if events is None else sorted(set(events)),
        labels=dict(labels),
        secret=new_secret(),
    )
    session.add(endpoint)
    session.flush()
    # The database has set the times.
    session.refresh(endpoint)
    return endpoint


def get_endpoint(session: Session, project: str, webhook_id: str) -> WebhookEndpoint:
    """An endpoint of the project.

    Raises:
        WebhookNotFound: the project has no such endpoint.
    """
    return _one(session, _by_id(project, webhook_id))


def lock_endpoint(session: Session, project: str, webhook_id: str) -> WebhookEndpoint:
    """Like :func:`get_endpoint`, with a row lock until the transaction ends.

    Raises:
        WebhookNotFound: the project has no such endpoint.
    """
    return _one(session, _by_id(project, webhook_id).with_for_update())


def list_endpoints(
    session: Session, project: str, *, limit: int, after: str | None = None
) -> KeysetPage[WebhookEndpoint]:
    """The project's endpoints, newest first, after the one with the id `after`."""
    statement = sa.select(WebhookEndpoint).where(WebhookEndpoint.project == project).order_by(WebhookEndpoint.id.desc())
    if after is not None:
        statement = statement.where(WebhookEndpoint.id < after)
    return fetch_page(session, statement, limit=limit)


def update_endpoint(session: Session, project: str, webhook_id: str, changes: Mapping[str, Any]) -> WebhookEndpoint:
    """Change columns of an endpoint; those that `changes` does not name stay. Enabling it forgets its failures.

    Raises:
        WebhookNotFound: the project has no such endpoint.
    """
    endpoint = lock_endpoint(session, project, webhook_id)
    for name, value in changes.items():
        if name != "status":
            setattr(endpoint, name, value)
    now = database_time(session)
    if changes.get("status") == "disabled" and endpoint.status == "enabled":
        disable(endpoint, "by_client", now)
    elif changes.get("status") == "enabled" and endpoint.status == "disabled":
        endpoint.status, endpoint.disabled_reason, endpoint.disabled_at = "enabled", None, None
        endpoint.failures, endpoint.failing_since, endpoint.not_before = 0, None, None
    endpoint.updated_at = now
    session.flush()
    return endpoint


def disable(endpoint: WebhookEndpoint, reason: DisabledReason, now: datetime) -> None:
    """Deliver nothing more to an endpoint until it is enabled again."""
    endpoint.status, endpoint.disabled_reason, endpoint.disabled_at = "disabled", reason, now


def rotate_secret(session: Session, project: str, webhook_id: str, *, grace_seconds: float) -> WebhookEndpoint:
    """Give an endpoint a new secret. For `grace_seconds` messages are signed with the former one too.

    Raises:
        WebhookNotFound: the project has no such endpoint.
    """
    endpoint = lock_endpoint(session, project, webhook_id)
    now, until = session.execute(sa.select(db_now(), db_now(grace_seconds))).one()
    endpoint.former_secret = endpoint.secret if grace_seconds > 0 else None
    endpoint.former_secret_until = until if grace_seconds > 0 else None
    endpoint.secret, endpoint.updated_at = new_secret(), now
    session.flush()
    return endpoint


def delete_endpoint(session: Session, project: str, webhook_id: str) -> None:
    """Delete an endpoint with the log of its deliveries.

    Raises:
        WebhookNotFound: the project has no such endpoint.
    """
    endpoint = lock_endpoint(session, project, webhook_id)
    session.execute(sa.delete(WebhookEndpoint).where(WebhookEndpoint.id == endpoint.id))


def _by_id(project: str, webhook_id: str) -> sa.Select[WebhookEndpoint]:
    return sa.select(WebhookEndpoint).where(WebhookEndpoint.id == webhook_id, WebhookEndpoint.project == project)


def _one(session: Session, statement: sa.Select[WebhookEndpoint]) -> WebhookEndpoint:
    endpoint = session.scalars(statement).one_or_none()
    if endpoint is None:
        raise WebhookNotFound
    return endpoint
