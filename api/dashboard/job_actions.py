"""What people do to a job on its page: pause, resume, cancel, retry, branch, and push its student again."""

from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from api.auth import Caller
from api.dashboard.forms import TOKEN_FIELD, Form, FormFields, require_form_token
from api.dashboard.rendering import redirect
from api.dependencies import DatabaseDep, EncodingCheckerDep, SettingsDep
from api.jobs.requests import Name
from api.path_params import JobId
from api.sessions import PlanningSlot, WriteSession
from api.strict_json import parse
from domain.db import Database
from domain.errors import JsonInvalid, Unprocessable
from domain.jobs import actions, lineage, publication_feed
from domain.jobs.lineage import DescendantPlan, RetryStart
from domain.settings import Settings
from pocl.errors import FieldError

router = APIRouter(prefix="/ui/jobs", include_in_schema=False, dependencies=[Depends(require_form_token)])


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Fields = TypeVar("Fields", bound=_Fields)


class _Pause(_Fields):
    at: Literal["now", "stage_end"] = "now"


class _Retry(_Fields):
    start: Literal["checkpoint", "start"] = "checkpoint"


class _Branch(_Fields):
    stage: Annotated[int, Field(ge=0, lt=2**31)]
    changes: str = ""
    name: Name | Literal[""] = ""


@router.post("/{job_id}/pause")
def pause_job(request: Request, session: WriteSession, caller: Caller, job_id: JobId, form: Form) -> Response:
    """Pause the job, now or at the end of its stage."""
    actions.pause_job(session, caller.project, job_id, _read(_Pause, form).at)
    return redirect(request, f"/ui/jobs/{job_id}")


@router.post("/{job_id}/resume")
def resume_job(request: Request, session: WriteSession, caller: Caller, job_id: JobId) -> Response:
    """Put the paused job back into the queue."""
    actions.resume_job(session, caller.project, job_id)
    return redirect(request, f"/ui/jobs/{job_id}")


@router.post("/{job_id}/cancel")
def cancel_job(request: Request, session: WriteSession, caller: Caller, job_id: JobId) -> Response:
    """Cancel the job."""
    actions.cancel_job(session, caller.project, job_id)
    return redirect(request, f"/ui/jobs/{job_id}")


@router.post("/{job_id}/publication/retry")
def retry_publication(request: Request, session: WriteSession, caller: Caller, job_id: JobId) -> Response:
    """Push the student of the job to the Hub again."""
    publication_feed.retry_publication(session, caller.project, job_id)
    return redirect(request, f"/ui/jobs/{job_id}")


@router.post("/{job_id}/retry")
def retry_job(
    request: Request,
    database: DatabaseDep,
    _slot: PlanningSlot,
    caller: Caller,
    settings: SettingsDep,
    checker: EncodingCheckerDep,
    job_id: JobId,
    form: Form,
) -> Response:
    """Make a new job of an ended one, which keeps its name, labels and priority."""
    start = RetryStart(_read(_Retry, form).start)
    with database.transaction(write=False) as session:
        plan = lineage.plan_retry(session, settings, project=caller.project, job_id=job_id, start=start)
    return _create(request, database, settings, lineage.check_data(checker, plan), {})


@router.post("/{job_id}/branch")
def branch_job(
    request: Request,
    database: DatabaseDep,
    _slot: PlanningSlot,
    caller: Caller,
    settings: SettingsDep,
    checker: EncodingCheckerDep,
    job_id: JobId,
    form: Form,
) -> Response:
    """Make a new job that goes on from the end of a stage, with other temperatures or another method."""
    fields = _read(_Branch, form)
    with database.transaction(write=False) as session:
        plan = lineage.plan_branch(
            session,
            settings,
            project=caller.project,
            job_id=job_id,
            stage=fields.stage,
            changes=_parse_changes(fields.changes),
            pointer_prefix="/changes",
        )
    options = {"name": fields.name} if fields.name else {}
    return _create(request, database, settings, lineage.check_data(checker, plan), options)


def _create(
    request: Request, database: Database, settings: Settings, plan: DescendantPlan, options: dict[str, Any]
) -> Response:
    with database.transaction(write=True) as session:
        job = lineage.create_descendant(session, settings, plan, options)
    return redirect(request, f"/ui/jobs/{job.id}")


def _read(model: type[Fields], form: FormFields) -> Fields:
    """The fields of a form.

    Raises:
        Unprocessable: one is wrong or not known.
    """
    given = {name: value for name, value in form.items() if name != TOKEN_FIELD}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise Unprocessable(
            field_errors=[
                FieldError("".join(f"/{part}" for part in each["loc"]), each["type"], each["msg"])
                for each in error.errors()
            ]
        ) from None


def _parse_changes(text: str) -> dict[str, JsonValue]:
    try:
        value = parse(text.encode()) if text.strip() else {}
    except JsonInvalid as error:
        raise Unprocessable(field_errors=[FieldError("/changes", "json_invalid", error.detail)]) from None
    if not isinstance(value, dict):
        raise Unprocessable(field_errors=[FieldError("/changes", "not_an_object", "write one JSON object")])
    return value
