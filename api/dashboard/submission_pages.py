"""The form of a submission, checked while it is filled in."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

from anyio import from_thread
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import ValidationError
from sqlalchemy.orm import Session

from api.auth import Caller
from api.dashboard.forms import TOKEN_FIELD, Form, FormFields, require_form_token
from api.dashboard.rendering import redirect, render
from api.dashboard.schema_fields import (
    ESSENTIALS,
    FormField,
    form_fields,
    form_sections,
    ordered_fields,
    read_document,
    write_values,
)
from api.dependencies import DatabaseDep, EncodingCheckerDep, GroupCommitDep, SettingsDep
from api.jobs.requests import JobCreate
from api.jobs.validation import validate_job
from api.models.routes import ModelReader, ModelReaderDep
from api.principal import Principal
from api.problems import field_error
from api.request_checks import refuse_unknown_parameters
from api.sessions import PlanningSlot, ReadSession
from domain.datasets.repository import list_datasets
from domain.errors import ApiError, InsufficientScope, Unprocessable
from domain.jobs import planning, repository, submission
from pocl.errors import FieldError
from pocl.spec import PresetName, describe_preset

router = APIRouter(prefix="/ui/jobs", include_in_schema=False)

_OPTIONS: Final = 100
"""Data sets and models that the form offers; others are named by hand."""
_PRESET: Final = "/spec/preset"
_PRESETS: Final[Mapping[str, PresetName]] = {"paper": "paper", "pocl_official": "pocl_official", "quick": "quick"}


@router.get("/new", dependencies=[Depends(refuse_unknown_parameters)])
def show_form(
    request: Request,
    session: ReadSession,
    caller: Caller,
    models: ModelReaderDep,
    like: Annotated[str, Query(pattern=r"^(job_[0-9a-z]{8,40})?$")] = "",
    dataset: Annotated[str, Query(pattern=r"^(ds_[0-9a-z]{8,40})?$")] = "",
) -> Response:
    """The form: empty, or with the values of another job."""
    if "submit" not in caller.scopes:
        raise InsufficientScope("submit")
    document: dict[str, Any] = {"spec": {"preset": "quick"}}
    if like:
        row = repository.get_job(session, caller.project, like)
        document = {"name": row.name, "labels": row.labels or None, "spec": row.posted_spec}
    if dataset:
        document["spec"]["data"] = {**document["spec"].get("data", {}), "train": {"dataset": dataset}}
    return _show(request, session, caller, models, write_values(document))


@router.post("/validate", dependencies=[Depends(require_form_token)])
def check_form(
    request: Request,
    database: DatabaseDep,
    slot: PlanningSlot,
    caller: Caller,
    settings: SettingsDep,
    checker: EncodingCheckerDep,
    form: Form,
) -> Response:
    """The plan of what is filled in so far, or what is wrong with it."""
    plan = None
    errors: Sequence[FieldError] = ()
    try:
        body = _read_request(form)
        plan = validate_job(body, database, slot, caller, settings, checker)
    except Unprocessable as error:
        errors = _errors_of(error)
    return render(request, "plan.html", plan=plan, errors=errors, places=_places(errors))


@router.post("/new", dependencies=[Depends(require_form_token)])
def submit_form(
    request: Request,
    database: DatabaseDep,
    slot: PlanningSlot,
    caller: Caller,
    settings: SettingsDep,
    checker: EncodingCheckerDep,
    group_commit: GroupCommitDep,
    models: ModelReaderDep,
    form: Form,
) -> Response:
    """Queue the job. Where something is wrong, the form comes again and says what."""
    del slot
    try:
        body = _read_request(form)
        with database.transaction(write=False) as session:
            plan = planning.plan_job(session, settings, body.spec, project=caller.project, pointer_prefix="/spec")
        planned = submission.Submission(planning.check_data(checker, plan), body.options)
        queued = group_commit.submit(settings, caller.project, planned)
    except Unprocessable as error:
        values = {name: value for name, value in form.items() if name != TOKEN_FIELD}
        with database.transaction(write=False) as session:
            return _show(request, session, caller, models, values, _errors_of(error), status=error.status)
    return redirect(request, f"/ui/jobs/{queued.job.id}")


def _read_request(form: FormFields) -> JobCreate:
    """
    Raises:
        Unprocessable: a field is wrong by itself; it names all of those.
    """
    document, errors = read_document(form)
    try:
        body = JobCreate.model_validate(document)
    except ValidationError as error:
        errors += [field_error({**each, "loc": ("body", *each["loc"])}, [JobCreate]) for each in error.errors()]
        raise Unprocessable(field_errors=errors) from None
    if errors:
        raise Unprocessable(field_errors=errors)
    return body


def _errors_of(error: ApiError) -> Sequence[FieldError]:
    return error.field_errors or (FieldError("", error.code, error.detail),)


def _places(errors: Sequence[FieldError]) -> dict[str, FormField]:
    """The field of the form that each error is about: the first one of it, where it is about several."""
    places = {}
    for pointer in (error.pointer for error in errors):
        below = (field for field in ordered_fields() if f"{field.pointer}/".startswith(f"{pointer}/"))
        field = next(below, None)
        if pointer and field is not None:
            places[pointer] = field
    return places


def _show(
    request: Request,
    session: Session,
    caller: Principal,
    models: ModelReader,
    values: Mapping[str, str],
    errors: Sequence[FieldError] = (),
    *,
    status: int = 200,
) -> Response:
    datasets = list_datasets(session, caller.project, limit=_OPTIONS).rows
    listing = from_thread.run(models.pages.get, (None, _OPTIONS))
    fields = form_fields()
    preset = _PRESETS.get(values.get(_PRESET, ""), "paper")
    return render(
        request,
        "submission.html",
        status_code=status,
        essentials=[fields[pointer] for pointer in ESSENTIALS],
        sections=form_sections(),
        values=values,
        defaults=write_values({"spec": describe_preset(preset).spec}),
        messages={error.pointer: error.detail for error in errors},
        errors=errors,
        places=_places(errors),
        datasets=[each for each in datasets if each.status == "ready"],
        models=[each.path for each in listing.page.rows],
        plan=None,
    )
