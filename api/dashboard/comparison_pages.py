"""The page that compares jobs."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import StringConstraints
from sqlalchemy.orm import Session

from api.auth import Caller
from api.dashboard.comparison import compare_curves, last_scores, specification_differences
from api.dashboard.rendering import render
from api.jobs.presenter import summarize_job
from api.jobs.routes import get_job_metrics
from api.jobs.schemas import MetricsView
from api.principal import Principal
from api.request_checks import refuse_unknown_parameters
from api.sessions import HeavyReadSession
from domain.jobs import repository
from domain.jobs.models import Job

router = APIRouter(prefix="/ui/compare", include_in_schema=False, dependencies=[Depends(refuse_unknown_parameters)])

MAX_COMPARED: Final = 6
_OFFERED: Final = 50
_POINTS: Final = 300
JobIds = Annotated[
    tuple[Annotated[str, StringConstraints(pattern=r"^job_[0-9a-z]{8,40}$")], ...], Query(max_length=MAX_COMPARED)
]


@router.get("")
def show_comparison(request: Request, session: HeavyReadSession, caller: Caller, job: JobIds = ()) -> Response:
    """Up to six jobs beside each other; without any, the jobs to choose from."""
    rows = _rows(session, caller, job)
    evaluations = [_metrics(session, caller, row, ()).evaluations for row in rows]
    page = repository.list_jobs(session, caller.project, limit=_OFFERED)
    offered = {row.id: row for row in repository.get_listed_jobs(session, [each.id for each in page.rows])}
    return render(
        request,
        "compare.html",
        jobs=[summarize_job(row) for row in rows],
        scores=[last_scores(each) for each in evaluations],
        controls=[(row.spec["curriculum"].get("control") or {}).get("kind") for row in rows],
        methods=[row.spec["method"]["name"] for row in rows],
        differences=specification_differences([row.spec for row in rows]),
        offered=[summarize_job(offered[each.id]) for each in page.rows if each.id in offered],
        chosen={row.id for row in rows},
        most=MAX_COMPARED,
    )


@router.get("/curves")
def get_compared_curves(session: HeavyReadSession, caller: Caller, job: JobIds = ()) -> dict[str, Any]:
    """What the charts of the page draw."""
    rows = _rows(session, caller, job)
    return compare_curves(
        [row.name or row.id for row in rows], [_metrics(session, caller, row, ("loss",)) for row in rows]
    )


def _rows(session: Session, caller: Principal, job_ids: tuple[str, ...]) -> list[Job]:
    return [repository.get_job(session, caller.project, job_id) for job_id in dict.fromkeys(job_ids)]


def _metrics(session: Session, caller: Principal, row: Job, names: tuple[str, ...]) -> MetricsView:
    # A name that no series has reads the evaluations alone.
    return get_job_metrics(session, caller, row.id, names or ("none",), 0, None, _POINTS)
