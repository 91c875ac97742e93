"""The budget of a control experiment: the optimiser steps that the job it is compared with has spent in each stage."""

from typing import Any, NoReturn

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.errors import JobNotFound
from domain.jobs.models import JobStage
from domain.jobs.repository import get_job
from domain.jobs.states import JobStatus
from pocl.errors import FieldError, SpecInvalid
from pocl.spec import ENGINE_CHOICES, DistillationSpec

_POINTER = "/curriculum/control/budget_of"


def with_budget(session: Session, project: str, spec: DistillationSpec) -> DistillationSpec:
    """The specification with the steps of the job that its control names as `budget_of`, and with the day that the
    templates of that job were given, where its own is open.

    A control that has the steps already, such as that of a retry, keeps them when the job is deleted.

    Raises:
        SpecInvalid: the project has no such job, it has not succeeded, it is a control itself or differs in more than
            the control, or the specification names other steps.
    """
    control = spec.curriculum.control
    if control is None or control.budget_of is None:
        return spec
    try:
        job = get_job(session, project, control.budget_of)
    except JobNotFound as error:
        if control.stage_steps is not None:
            return spec
        _refuse(error.code, error.detail)
    if job.status is not JobStatus.SUCCEEDED:
        _refuse("budget_not_spent", f"the job is {job.status.value}: its steps are known once it has succeeded")
    compared = DistillationSpec.model_validate(job.spec)
    if compared.curriculum.control is not None:
        _refuse("budget_of_control", "the job is a control itself: name the job that the control is compared with")
    if compared.data.date is not None:
        spec = spec.with_day(compared.data.date)
    mine, theirs = _parts(spec), _parts(compared)
    if differing := [part for part in mine if mine[part] != theirs[part]]:
        detail = f"the job differs in {', '.join(differing)}: a control differs from it in curriculum.control alone"
        _refuse("budget_of_other_specification", detail)
    statement = sa.select(JobStage.steps).where(JobStage.job_id == job.id).order_by(JobStage.index)
    steps = tuple(session.scalars(statement))
    if control.stage_steps not in (None, steps):
        _refuse("budget_differs", f"the job has spent {list(steps)} steps: leave stage_steps out")
    filled_in = control.model_copy(update={"stage_steps": steps})
    return spec.model_copy(update={"curriculum": spec.curriculum.model_copy(update={"control": filled_in})})


def _parts(spec: DistillationSpec) -> dict[str, Any]:
    """What a control has in common with the job that it is compared with, by part of the specification."""
    return {
        "teacher": spec.teacher,
        "student": spec.student,
        "data": spec.data,
        "method": spec.method,
        "curriculum": spec.curriculum.model_copy(update={"control": None}),
        "training": spec.training.model_copy(update=dict.fromkeys(ENGINE_CHOICES["training"])),
    }


def _refuse(code: str, detail: str) -> NoReturn:
    raise SpecInvalid([FieldError(_POINTER, code, detail)])
