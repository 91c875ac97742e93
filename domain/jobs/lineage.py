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
from domain.errors import NotFound, SpecRefused
from domain.jobs.actions import JobIsLive
from domain.jobs.models import Job, JobEvaluation, JobMetric, JobStage
from domain.jobs.repository import get_job
from domain.jobs.states import StageStatus
from domain.jobs.submission import JobOptions, JobPlan, create_job, plan_job
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


@dataclass(frozen=True)
class DescendantPlan:
    """A planned retry or branch: the job's plan, and what it takes over from its parent."""

    job_plan: JobPlan
    parent: Job
    relation: Literal["retry_of", "branch_of"]
    start: Checkpoint | None
    """The training state that the new job begins with; null: from the very start."""


def plan_retry(session: Session, settings: Settings, *, project: str, job_id: str, start: RetryStart) -> DescendantPlan:
    """Plan a new job with the specification of one that has ended. Writes nothing.

    Raises:
        JobNotFound: the project has no such job.
        JobIsLive: it has not ended.
        StageNotSaved: it did not get so far.
        ApiError: what it was made of is gone: as for a new job.
    """
    parent = get_job(session, project, job_id)
    if not parent.ended:
        raise JobIsLive("The job has not ended: only an ended one can be retried.")
    checkpoint = _start_of(session, parent, start)
    job_plan = replace(plan_job(session, settings, parent.spec, project=project), posted_spec=parent.posted_spec)
    return DescendantPlan(job_plan, parent, "retry_of", checkpoint)


def plan_branch(
    session: Session,
    settings: Settings,
    *,
    project: str,
    job_id: str,
    stage: int,
    changes: Mapping[str, Any],
    pointer_prefix: str = "",
) -> DescendantPlan:
    """Plan a new job that goes on from the end of a stage of another, live or ended, with `changes` to its spec.

    Args:
        pointer_prefix: where the changes stand in the client's document, for the pointers of errors.

    Raises:
        JobNotFound: the project has no such job.
        StageNotSaved: the job has not finished the stage.
        SpecRefused: the changes are wrong, or touch what the saved state stands for.
        ApiError: as for a new job.
    """
    parent = get_job(session, project, job_id)
    checkpoint = _start_of(session, parent, RetryStart("stage", stage))
    changed_spec = merged(parent.spec, changes)
    job_plan = plan_job(session, settings, changed_spec, project=project, pointer_prefix=pointer_prefix)
    _refuse_other_ground(DistillationSpec.model_validate(parent.spec), job_plan.spec, pointer_prefix)
    return DescendantPlan(job_plan, parent, "branch_of", checkpoint)


def create_descendant(session: Session, settings: Settings, plan: DescendantPlan, options: Mapping[str, Any]) -> Job:
    """Put a planned retry or branch into the queue.

    Args:
        options: the fields of :class:`JobOptions` that the client gave. Name, labels and priority that it left out
            are those of the parent.

    Raises:
        CheckpointNotFound: the training state was deleted since the plan was made.
        ApiError: as for a new job.
    """
    parent, start = plan.parent, plan.start
    columns: dict[str, Any] = {plan.relation: parent.id}
    if start is not None:
        get_checkpoint_for_share(session, parent.project, start.id)
        percent = min(100.0, 100.0 * start.step / plan.job_plan.total_steps)
        columns |= {"starts_from": start.id, "step": start.step, "stage": start.stage, "percent": percent}
    inherited = {"name": parent.name, "labels": parent.labels, "priority": parent.priority}
    job = create_job(
        session,
        settings,
        plan.job_plan,
        project=parent.project,
        options=JobOptions(**inherited | dict(options)),
        lineage=columns,
    )
    if start is not None:
        _inherit(session, parent, job, start)
    return job


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


def _refuse_other_ground(old: DistillationSpec, new: DistillationSpec, pointer_prefix: str) -> None:
    changed = [name for name in _FIXED if getattr(old, name) != getattr(new, name)]
    if old.curriculum.stages != new.curriculum.stages:
        changed.append("curriculum/stages")
    if old.curriculum.ranking != new.curriculum.ranking:
        changed.append("curriculum/ranking")
    if changed:
        detail = "a branch keeps this: the saved state stands for it; submit a new job instead"
        errors = [FieldError(f"{pointer_prefix}/{name}", "branch_cannot_change", detail) for name in changed]
        raise SpecRefused(field_errors=errors)


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
