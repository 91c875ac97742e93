"""The lineage of jobs: a retry of an ended job, or a branch from the end of a stage with a changed specification.

Either is a new job, whose parent is the other. It starts from a training state of the parent, and inherits the parent's
ranking, and its stages, metrics and scores up to that state.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints.models import Checkpoint
from domain.checkpoints.repository import get_checkpoint_for_share, list_saved_stages
from domain.encoding_checks import EncodingChecker
from domain.errors import ActionRefused, Conflict, NotFound, engine_refusals
from domain.jobs import planning
from domain.jobs.actions import JobIsLive
from domain.jobs.job_options import JobOptions
from domain.jobs.models import Job, JobEvaluation, JobMetric, JobStage
from domain.jobs.planning import JobPlan, plan_job
from domain.jobs.repository import get_job
from domain.jobs.states import ALLOWED_ACTIONS, JobStatus, StageStatus
from domain.jobs.submission import create_job
from domain.settings import Settings
from domain.trackers.repository import parse_trackers
from pocl.errors import FieldError, SpecInvalid
from pocl.events import RESUMABLE_KINDS
from pocl.spec import DistillationSpec, NoCurriculum

_UNION_FIELDS: Final = frozenset({"method", "teacher", "advance", "control", "ranker", "sampling"})
"""Fields with one of several types: the parts of one type mean nothing to another, so that a change replaces them."""
_FIXED_FIELDS: Final = ("student", "data", "seed")
"""Fields on which a training state and a ranking depend, so that a branch cannot change them."""


class JobHasSucceeded(ActionRefused):
    """The job has succeeded, so nothing is left to train from its newest state: retry it from its start or an earlier
    stage, or branch off."""

    code = "job_has_succeeded"


class BranchPointDeleted(Conflict):
    """The state at which the job branched off was deleted, and the job has saved none of its own: from the start it
    would be another experiment."""

    code = "branch_point_deleted"


class StageNotSaved(NotFound):
    """The job has no saved state of that stage: name one that it has finished itself, counted from 0."""

    code = "stage_not_saved"

    def __init__(self, stage: int, saved: Sequence[int]) -> None:
        which = f"those of the stages {', '.join(map(str, saved))}" if saved else "none yet"
        super().__init__(f"The job has no saved state of the end of stage {stage}, counted from 0: it has {which}.")


@dataclass(frozen=True)
class RetryStart:
    """Where a retry starts."""

    kind: Literal["checkpoint", "stage", "start"] = "checkpoint"
    """The parent's newest training state, where there is one; the end of `stage`; or the start of the run, which for a
    branch is where it left its own parent."""
    stage: int | None = None
    """The stage of the kind `stage`, counted from 0."""


@dataclass(frozen=True)
class DescendantPlan:
    """A planned retry or branch: the plan of the new job, its parent, and the training state that it starts from."""

    job_plan: JobPlan
    parent: Job
    relation: Literal["retry_of", "branch_of"]
    start: Checkpoint | None
    """The training state that the new job starts from; null for the start of the run."""


def plan_retry(session: Session, settings: Settings, *, project: str, job_id: str, start: RetryStart) -> DescendantPlan:
    """Plan a new job with the specification of one that has ended. It writes nothing.

    Raises:
        JobNotFound: the project has no such job.
        JobIsLive: the job has not ended.
        JobHasSucceeded: it has, and nothing would be left to train from there.
        BranchPointDeleted: it is a branch whose steps before `start` cannot be had any more.
        StageNotSaved: the job has not finished the stage.
        ApiError: a model or data set is gone: see :func:`plan_job`.
    """
    parent = get_job(session, project, job_id)
    if not parent.ended:
        detail = "The job has not ended: only an ended one can be retried."
        raise JobIsLive(detail, allowed=ALLOWED_ACTIONS[parent.status])
    checkpoint = _start_checkpoint(session, parent, start)
    if parent.status is JobStatus.SUCCEEDED and (
        start.kind == "checkpoint" or (checkpoint is not None and checkpoint.step >= parent.step)
    ):
        raise JobHasSucceeded(allowed=ALLOWED_ACTIONS[parent.status])
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
    """Plan a new job that branches from the end of a stage of another, live or ended, with `changes` to its spec.

    Args:
        pointer_prefix: where the changes stand in the client's document, for the pointers of errors.

    Raises:
        JobNotFound: the project has no such job.
        StageNotSaved: the job has not finished the stage.
        EngineRefusal: the changes are wrong, or touch a field on which the training state depends.
        ApiError: see :func:`plan_job`.
    """
    parent = get_job(session, project, job_id)
    checkpoint = _start_checkpoint(session, parent, RetryStart("stage", stage))
    changed_spec = _merge_changes(parent.spec, changes)
    job_plan = plan_job(session, settings, changed_spec, project=project, pointer_prefix=pointer_prefix)
    with engine_refusals(pointer_prefix):
        _check_fixed_fields(DistillationSpec.model_validate(parent.spec), job_plan.spec)
    return DescendantPlan(job_plan, parent, "branch_of", checkpoint)


def check_data(checker: EncodingChecker, plan: DescendantPlan) -> DescendantPlan:
    """The plan with its data sets checked, as :func:`domain.jobs.planning.check_data` does."""
    return replace(plan, job_plan=planning.check_data(checker, plan.job_plan))


def create_descendant(session: Session, settings: Settings, plan: DescendantPlan, options: Mapping[str, Any]) -> Job:
    """Put a planned retry or branch into the queue.

    Args:
        options: the fields of :class:`JobOptions` that the client gave. Where it left out name, labels or priority,
            the job inherits those of the parent.

    Raises:
        CheckpointNotFound: the training state was deleted since the plan was made.
        ApiError: see :func:`create_job`.
    """
    parent, start = plan.parent, plan.start
    columns: dict[str, Any] = {plan.relation: parent.id, "branch_point": parent.branch_point}
    if plan.relation == "branch_of":
        assert start is not None, "a branch starts from a stage"
        columns["branch_point"] = start.id
    if start is not None:
        get_checkpoint_for_share(session, parent.project, start.id)
        columns |= {
            "metric_window": parent.metric_window,
            "starts_from": start.id,
            "step": start.step,
            "stage": start.stage,
        }
    inherited = {
        "name": parent.name,
        "labels": parent.labels,
        "priority": parent.priority,
        "retention": parent.retention,
        "trackers": parse_trackers(parent.trackers or []),
    }
    job = create_job(
        session,
        settings,
        plan.job_plan,
        project=parent.project,
        options=JobOptions(**inherited | dict(options)),
        lineage=columns,
    )
    if start is not None:
        _inherit_history(session, parent, job, start)
    return job


def _merge_changes(spec: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The specification with `changes` merged into it object by object; :data:`_UNION_FIELDS` are replaced whole."""
    merged = deepcopy(dict(spec))
    for key, value in changes.items():
        present = merged.get(key)
        if isinstance(value, Mapping) and isinstance(present, Mapping) and key not in _UNION_FIELDS:
            merged[key] = _merge_changes(present, value)
        else:
            merged[key] = value
    return merged


def _start_checkpoint(session: Session, parent: Job, start: RetryStart) -> Checkpoint | None:
    """The training state that a descendant starts from; null for the start of the run.

    Raises:
        BranchPointDeleted, StageNotSaved: see :func:`plan_retry`.
    """
    if start.kind == "start":
        return _branch_point(session, parent)
    statement = sa.select(Checkpoint).where(Checkpoint.job_id == parent.id)
    if start.kind == "stage":
        statement = statement.where(Checkpoint.kind == "stage", Checkpoint.stage == start.stage)
    else:
        statement = statement.where(Checkpoint.kind.in_(RESUMABLE_KINDS))
    newest = session.scalars(statement.order_by(Checkpoint.step.desc(), Checkpoint.id.desc()).limit(1)).one_or_none()
    if newest is None and start.kind == "stage" and start.stage is not None:
        raise StageNotSaved(start.stage, list_saved_stages(session, parent.id))
    if newest is None and parent.starts_from is not None:
        # The parent ended before it saved a state of its own.
        newest = session.get(Checkpoint, parent.starts_from)
    return _branch_point(session, parent) if newest is None else newest


def _branch_point(session: Session, job: Job) -> Checkpoint | None:
    """The state in which the job's specification begins to hold; null for the start of the run.

    Raises:
        BranchPointDeleted: the job descends from a branch, and that state is gone.
    """
    if job.branch_point is None:
        return None
    checkpoint = session.get(Checkpoint, job.branch_point)
    if checkpoint is None:
        raise BranchPointDeleted
    return checkpoint


def _check_fixed_fields(old: DistillationSpec, new: DistillationSpec) -> None:
    changed = [name for name in _FIXED_FIELDS if getattr(old, name) != getattr(new, name)]
    if old.curriculum.stages != new.curriculum.stages:
        changed.append("curriculum/stages")
    if old.curriculum.ranking != new.curriculum.ranking:
        changed.append("curriculum/ranking")
    if isinstance(old.curriculum.control, NoCurriculum) != isinstance(new.curriculum.control, NoCurriculum):
        # It has a single stage: a state after another would leave nothing to train.
        changed.append("curriculum/control")
    if changed:
        detail = "a branch keeps this: the saved state stands for it; submit a new job instead"
        raise SpecInvalid([FieldError(f"/{name}", "branch_cannot_change", detail) for name in changed])


def _inherit_history(session: Session, parent: Job, job: Job, start: Checkpoint) -> None:
    """Copy the parent's ended stages, metrics and evaluations up to the training state that the job starts from."""
    stages = {row.index: row for row in session.scalars(sa.select(JobStage).where(JobStage.job_id == parent.id))}
    ended_stages = start.stage + 1 if start.kind == "stage" and start.stage is not None else start.stage or 0
    for row in session.scalars(sa.select(JobStage).where(JobStage.job_id == job.id, JobStage.index < ended_stages)):
        inherited = stages[row.index]
        row.apply_plan(inherited)
        row.status, row.epochs, row.evaluation = StageStatus.SUCCEEDED, inherited.epochs, inherited.evaluation
        row.started_at, row.finished_at = inherited.started_at, inherited.finished_at
    tables: tuple[type[JobMetric] | type[JobEvaluation], ...] = (JobMetric, JobEvaluation)
    for table in tables:
        names = [column.key for column in table.__mapper__.columns if column.key != "job_id"]
        rows = sa.select(sa.literal(job.id), *(getattr(table, name) for name in names)).where(
            table.job_id == parent.id, table.step <= start.step
        )
        session.execute(sa.insert(table).from_select(["job_id", *names], rows))
    session.flush()
