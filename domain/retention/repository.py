"""Queries for retention policies. No function commits."""

from dataclasses import asdict

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import db_now, upsert_into
from domain.retention.models import ProjectRetention, RetentionPolicy


def get_policy(session: Session, project: str) -> RetentionPolicy:
    """The policy of a project; one that deletes nothing where it has set none."""
    row = session.get(ProjectRetention, project)
    return RetentionPolicy() if row is None else RetentionPolicy(**row.policy)


def set_policy(session: Session, project: str, policy: RetentionPolicy) -> None:
    """Put a policy in the place of the present one of a project."""
    values = {"policy": asdict(policy), "updated_at": db_now()}
    statement = upsert_into(session.connection(), ProjectRetention).values(project=project, **values)
    session.execute(statement.on_conflict_do_update(index_elements=["project"], set_=values))


def list_policies(session: Session) -> dict[str, RetentionPolicy]:
    """The policies of all projects that have set one, by project."""
    return {row.project: RetentionPolicy(**row.policy) for row in session.scalars(sa.select(ProjectRetention))}
