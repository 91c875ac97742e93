"""The quotas of the sender's project over HTTP, with their use."""

from typing import Literal

from fastapi import APIRouter, Request

from api.auth import Caller
from api.dependencies import SettingsDep
from api.pagination import Resource
from api.problems import COMMON_PROBLEMS
from api.sessions import ReadSession
from domain.jobs.quotas import QuotaUse, quotas_of

router = APIRouter(prefix="/quota", tags=["quota"], responses=COMMON_PROBLEMS)


class QuotaUseView(Resource):
    """How much of something a project has, and how much it may."""

    used: int
    """How much the project has now."""
    limit: int | None
    """How much it may have; null: any amount."""


class QuotaView(Resource):
    """The quotas of a project."""

    object: Literal["quota"] = "quota"
    """The kind of the resource."""
    project: str
    """The project of the sender."""
    jobs_running: QuotaUseView
    """Jobs that workers hold. A job beyond waits in the queue, with the reason `project_quota`."""
    jobs_queued: QuotaUseView
    """Jobs that wait for a worker. A submission beyond is refused as `quota_exceeded`."""
    uploads: QuotaUseView
    """Uploads in progress at the API process that answers. One beyond is refused as `quota_exceeded`."""
    storage_bytes: QuotaUseView
    """Bytes of data sets, checkpoints and results. An upload or submission beyond is refused as `quota_exceeded`; a job
    that runs goes on."""
    requests_per_minute: int | None
    """Requests that one key may send in a minute, beyond which it gets 429 `rate_limited`; null: any number."""


@router.get("", summary="Show the quotas")
def show_quota(session: ReadSession, caller: Caller, settings: SettingsDep, request: Request) -> QuotaView:
    """What the sender's project may have, and has."""
    quotas = quotas_of(session, settings, caller.project)
    uploads: int = request.app.state.uploads[caller.project]
    return QuotaView(
        project=caller.project,
        jobs_running=QuotaUseView.model_validate(quotas.jobs_running),
        jobs_queued=QuotaUseView.model_validate(quotas.jobs_queued),
        uploads=QuotaUseView.model_validate(QuotaUse(uploads, quotas.max_uploads)),
        storage_bytes=QuotaUseView.model_validate(quotas.storage_bytes),
        requests_per_minute=settings.requests_per_minute,
    )
