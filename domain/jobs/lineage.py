"""Jobs that come from other jobs: one that ended is done again, or a stage is gone on from otherwise.

Either is a new job. It begins with a training state of the other, and with its ranking, metrics and scores up to
there.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints.models import Checkpoint
from domain.checkpoints.repository import get_checkpoint_for_share
from domain.db import Database
from domain.errors import NotFound, SpecRefused
from domain.jobs.actions import JobIsLive
from domain.jobs.models import Job, JobEvaluation, JobMetric, JobStage
from domain.jobs.repository import get_job
from domain.jobs.states import StageStatus
from domain.jobs.submission import JobOptions, JobPlan, create_job, plan_job, transaction_for
from domain.settings import Settings
from pocl.errors import FieldError
from pocl.spec import DistillationSpec

_REPLACED: Final = frozenset({"method", "teacher", "advance", "control", "sampling"})
"""Fields that come in kinds, so that parts of one mean nothing to another."""
_FIXED: Final = ("student", "data", "seed")
"""What a training state and a ranking stand for."""


class StageNotSaved(NotFound):
    """The job has no saved state of that stage: name a stage that it has finished."""

    code = "stage_not_saved"


@dataclass(frozen=True)
class RetryStart:
    """Where a new attempt at an ended job begins."""

    place: Literal["checkpoint", "stage", "start"] = "checkpoint"
    """Its newest training state, where there is one; the end of `stage`; or the very start."""
    stage: int | None = None
    """Counted from 0."""


def retry_job(
    database: Database,
    settings: Settings,
    *,
    project: str,
    job_id: str,
    start: RetryStart,
    options: JobOptions,
    session: Session | None = None,
) -> Job:
    """A new job with the specification of one that has ended.

    Raises:
        JobNotFound: the project has no such job.
        JobIsLive: it has not ended.
        StageNotSaved: it did not get so far.
        ApiError: what it was made of is gone, or the queue is full: as for a new job.
    """
    with database.transaction(write=False) as reading:
        parent = get_job(reading, project, job_id)
        if not parent.ended:
            raise JobIsLive("The job has not ended: only an ended one can be retried.")
        first = _start_of(reading, parent, start)
        plan = replace(plan_job(reading, settings, parent.spec, project=project), posted_spec=parent.posted_spec)
    with transaction_for(database, session) as writing:
        return _create(writing, settings, plan, parent, first, options, {"retry_of": parent.id})


def branch_job(
    database: Database,
    settings: Settings,
    *,
    project: str,
    job_id: str,
    stage: int,
    changes: Mapping[str, Any],
    options: JobOptions,
    session: Session | None = None,
) -> Job:
    """A new job that goes on from the end of a stage of another, live or ended, with `changes` to its specification.

    Raises:
        JobNotFound: the project has no such job.
        StageNotSaved: the job has not finished the stage.
        SpecRefused: the changes are wrong, or touch what the saved state stands for.
        ApiError: as for a new job.
    """
    with database.transaction(write=False) as reading:
        parent = get_job(reading, project, job_id)
        first = _start_of(reading, parent, RetryStart("stage", stage))
        changed_spec = merged(parent.spec, changes)
        plan = plan_job(reading, settings, changed_spec, project=project)
        _refuse_other_ground(DistillationSpec.model_validate(parent.spec), plan.spec)
    with transaction_for(database, session) as writing:
        return _create(writing, settings, plan, parent, first, options, {"branch_of": parent.id})


def merged(under: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `under`, object by object; fields that come in kinds are replaced whole."""
    result = deepcopy(dict(under))
    for key, value in changes.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping) and key not in _REPLACED:
            result[key] = merged(below, value)
        else:
            result[key] = value
    return result


def _start_of(session: Session, parent: Job, start: RetryStart) -> Checkpoint | None:
    if start.place == "start":
        return None
    wanted = sa.select(Checkpoint).where(Checkpoint.job_id == parent.id)
    if start.place == "stage":
        wanted = wanted.where(Checkpoint.kind == "stage", Checkpoint.stage == start.stage)
    else:
        wanted = wanted.where(Checkpoint.kind.in_(("training", "stage")))
    found = session.scalars(wanted.order_by(Checkpoint.step.desc(), Checkpoint.id.desc()).limit(1)).one_or_none()
    if found is None and start.place == "stage":
        raise StageNotSaved
    if found is None and parent.starts_from is not None:
        # It ended before it saved anything of its own.
        return session.get(Checkpoint, parent.starts_from)
    return found


def _refuse_other_ground(old: DistillationSpec, new: DistillationSpec) -> None:
    changed = [name for name in _FIXED if getattr(old, name) != getattr(new, name)]
    if old.curriculum.stages != new.curriculum.stages:
        changed.append("curriculum/stages")
    if old.curriculum.ranking != new.curriculum.ranking:
        changed.append("curriculum/ranking")
    if changed:
        detail = "a branch keeps this: the saved state stands for it; submit a new job instead"
        raise SpecRefused(field_errors=[FieldError(f"/{name}", "branch_cannot_change", detail) for name in changed])


def _create(
    session: Session,
    settings: Settings,
    plan: JobPlan,
    parent: Job,
    first: Checkpoint | None,
    options: JobOptions,
    relation: Mapping[str, str],
) -> Job:
    descent: dict[str, Any] = dict(relation)
    if first is not None:
        # Gone by now, it is told as such.
        get_checkpoint_for_share(session, parent.project, first.id)
        percent = min(100.0, 100.0 * first.step / plan.total_steps)
        descent |= {"starts_from": first.id, "step": first.step, "stage": first.stage, "percent": percent}
    job = create_job(session, settings, plan, project=parent.project, options=options, descent=descent)
    if first is not None:
        _inherit(session, parent, job, first)
    return job


def _inherit(session: Session, parent: Job, job: Job, first: Checkpoint) -> None:
    """What the parent came to by the state that the job begins with."""
    stages = {row.index: row for row in session.scalars(sa.select(JobStage).where(JobStage.job_id == parent.id))}
    ended_before = first.stage + 1 if first.kind == "stage" and first.stage is not None else first.stage or 0
    for row in session.scalars(sa.select(JobStage).where(JobStage.job_id == job.id, JobStage.index < ended_before)):
        known = stages[row.index]
        row.status, row.epochs, row.evaluation = StageStatus.SUCCEEDED, known.epochs, known.evaluation
        row.started_at, row.finished_at = known.started_at, known.finished_at
        row.temperature, row.kd_weight, row.steps = known.temperature, known.kd_weight, known.steps
        row.samples, row.first_step = known.samples, known.first_step
    kinds: tuple[type[JobMetric] | type[JobEvaluation], ...] = (JobMetric, JobEvaluation)
    for record in kinds:
        names = [column.key for column in record.__mapper__.columns if column.key != "job_id"]
        known_rows = sa.select(sa.literal(job.id), *(getattr(record, name) for name in names)).where(
            record.job_id == parent.id, record.step <= first.step
        )
        session.execute(sa.insert(record).from_select(["job_id", *names], known_rows))
    session.flush()
