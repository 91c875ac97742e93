"""The dry run of a submission over HTTP."""

from http import HTTPStatus

from fastapi import APIRouter, HTTPException

from api.auth import Caller
from api.dependencies import DatabaseDep, EncodingCheckerDep, SettingsDep
from api.jobs.plan_schemas import PlanView
from api.jobs.requests import JobCreate
from api.problems import BODY_PROBLEMS, COMMON_PROBLEMS, problem_responses
from api.sessions import PlanningSlot
from api.strict_json import StrictJsonRoute
from domain.errors import SPEC_ERRORS, Unprocessable
from domain.jobs import job_options, planning

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=COMMON_PROBLEMS, route_class=StrictJsonRoute)


@router.post(
    "/validate",
    summary="Check a job without submitting it",
    responses={**BODY_PROBLEMS, **problem_responses(Unprocessable, *SPEC_ERRORS)},
)
def validate_job(
    body: JobCreate,
    database: DatabaseDep,
    _slot: PlanningSlot,
    caller: Caller,
    settings: SettingsDep,
    checker: EncodingCheckerDep,
) -> PlanView:
    """The dry run of a submission: the specification with every default named, the table of stages, what it costs in
    memory, disk and arithmetic, how long it will take on the workers that there are and at which price, what of the
    samples is cut and left out, and warnings. Nothing is stored.
    """
    with database.transaction(write=False) as session:
        job_options.check_options(session, settings, body.options)
        plan = planning.plan_job(session, settings, body.spec, project=caller.project, pointer_prefix="/spec")
    plan = planning.check_data(checker, plan)
    with database.transaction(write=False) as session:
        return PlanView.model_validate(planning.forecast_plan(session, settings, plan))


@router.api_route("/validate", methods=["GET", "HEAD", "PUT", "PATCH", "DELETE"], include_in_schema=False)
async def refuse_other_methods() -> None:
    """Keeps `validate` from being taken for the id of a job, of which it would be said that there is none."""
    raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED)
