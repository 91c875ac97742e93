"""Retention over HTTP: the policy of the project, and what it would delete."""

from typing import Final

import sqlalchemy as sa
from fastapi import APIRouter

from api.auth import AdminCaller, Caller
from api.pagination import After
from api.problems import BODY_PROBLEMS, COMMON_PROBLEMS, problem_responses
from api.retention.schemas import (
    ExpiredDatasetView,
    ExpiredJobView,
    ProjectRetentionRequest,
    ProjectRetentionView,
    RetentionPreview,
)
from api.sessions import ReadSession, WriteSession
from api.strict_json import StrictJsonRoute
from domain.db import db_now
from domain.errors import Unprocessable
from domain.jobs import expiry
from domain.retention.repository import get_policy, set_policy

router = APIRouter(prefix="/retention", tags=["retention"], responses=COMMON_PROBLEMS, route_class=StrictJsonRoute)

_JOBS_PER_PAGE: Final = 100
_MAX_DATASETS: Final = 100


@router.get("", summary="Get the retention policy")
def get_retention(session: ReadSession, caller: Caller) -> ProjectRetentionView:
    """The retention policy of the project: what is deleted of ended jobs and unused data sets, and when."""
    return ProjectRetentionView.model_validate(get_policy(session, caller.project))


@router.put("", summary="Set the retention policy", responses={**BODY_PROBLEMS, **problem_responses(Unprocessable)})
def set_retention(session: WriteSession, caller: AdminCaller, body: ProjectRetentionRequest) -> ProjectRetentionView:
    """Put a policy in the place of the project's present one. What it deletes is deleted within minutes to hours, and
    cannot be brought back: ask for a preview first. `retention` of a job takes the place of the policy's fields.
    """
    set_policy(session, caller.project, body.policy)
    return ProjectRetentionView.model_validate(body.policy)


@router.post(
    "/preview",
    summary="Preview a retention policy",
    responses={**BODY_PROBLEMS, **problem_responses(Unprocessable)},
)
def preview_retention(
    session: ReadSession, caller: Caller, body: ProjectRetentionRequest | None = None, after: After = None
) -> RetentionPreview:
    """What a policy would delete now, with its bytes: the one of the body, or the present one without a body. Nothing
    is deleted. One page looks at 100 ended jobs.
    """
    policy = get_policy(session, caller.project) if body is None else body.policy
    now = session.scalars(sa.select(db_now())).one()
    ended = expiry.list_ended_jobs(
        session, {caller.project: policy}, project=caller.project, after=after or "", limit=_JOBS_PER_PAGE
    )
    expired = [found for job in ended if (found := expiry.find_expired(session, job, policy, now)) is not None]
    unused = expiry.list_unused_datasets(session, caller.project, policy, limit=_MAX_DATASETS) if after is None else ()
    return RetentionPreview(
        jobs=[ExpiredJobView.model_validate(each) for each in expired],
        datasets=[ExpiredDatasetView.model_validate(each) for each in unused],
        size_bytes=sum(each.size_bytes for each in expired) + sum(each.size_bytes for each in unused),
        has_more=len(ended) == _JOBS_PER_PAGE,
        last_id=ended[-1].id if ended else None,
    )
