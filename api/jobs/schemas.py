"""Jobs as the API shows them."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, Self

from pydantic import JsonValue

from api.jobs.plan_schemas import StagePlanView
from api.jobs.spec_schema import Specification
from api.pagination import Page, Resource
from domain.jobs.models import Job, JobAttempt, JobEvaluation, JobEvent, JobStage
from domain.jobs.queue import QueuePosition
from domain.jobs.repository import MetricSeries
from domain.jobs.states import AttemptEnd, EndReason, Fault, JobStatus, PauseAt, StageStatus
from pocl.events import SampledScores


class Progress(Resource):
    percent: float
    """Of the optimiser steps, 0 to 100."""
    step: int
    total_steps: int
    stage: int | None
    """The stage that is trained or evaluated, counted from 0."""
    stages: int
    tokens_seen: int
    tokens_per_second: float | None
    updated_at: datetime | None
    """When the engine last reported anything."""


class PhaseView(Resource):
    """What the engine does at present, more finely than the status says."""

    name: str
    done: int | None
    total: int | None
    unit: str | None


class Eta(Resource):
    """An estimate, as of `progress.updated_at`."""

    seconds: float
    low_seconds: float | None
    """The range that it is expected in; null before there is a measure of it."""
    high_seconds: float | None
    finish_at: datetime


class QueueView(Resource):
    """Where a queued job stands."""

    position: int
    """1: the next to be claimed."""
    ahead: int
    reason: Literal["jobs_ahead", "waiting_for_worker", "no_worker", "no_worker_fits"]
    """`no_worker_fits`: none that lives has the device or the memory that the job needs."""
    starts_at: datetime | None
    """Estimated from the jobs at work and those that ended of late; null where too little is known."""


class Reason(Resource):
    """Why a job or an attempt ended."""

    code: str
    message: str
    fault: Fault | None
    """Whose it is; null for success."""
    retryable: bool
    hint: str
    """What to do about it."""

    @classmethod
    def of(cls, stored: dict[str, Any] | None) -> Self | None:
        if stored is None:
            return None
        reason = EndReason.from_json(stored)
        return cls(
            code=reason.code,
            message=reason.message,
            fault=reason.fault,
            retryable=reason.retryable,
            hint=reason.hint,
        )


class LimitsView(Resource):
    """What the job may take; null: as much as it needs."""

    max_runtime_seconds: int | None
    max_wait_seconds: int | None
    max_attempts: int


class JobSummary(Resource):
    """A job as lists show it."""

    id: str
    object: Literal["job"] = "job"
    name: str | None
    labels: dict[str, str]
    priority: int
    status: JobStatus
    """More states may be added: treat an unknown one as one that has not ended."""
    phase: PhaseView | None
    progress: Progress
    eta: Eta | None
    end_reason: Reason | None
    """Null until the job has ended."""
    attempts_spent: int
    max_attempts: int
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    cancel_requested_at: datetime | None
    pause_at: PauseAt | None
    """When a job that is `pausing` stops."""
    retry_of: str | None
    """The ended job that this one does again."""
    branch_of: str | None
    """The job that this one left at the end of a stage."""
    limits: LimitsView

    @classmethod
    def of(cls, job: Job) -> Self:
        return cls(**_summary(job))


class JobView(JobSummary):
    """A job."""

    queue: QueueView | None
    """Null unless the job is queued."""
    latest: dict[str, float] | None
    """The metrics of the newest optimiser step, by name; null before the first."""
    spec: Specification
    """As it runs, with every default named."""

    @classmethod
    def whole(cls, job: Job, *, place: QueuePosition | None, newest: Sequence[MetricSeries]) -> Self:
        """
        Args:
            newest: each metric at the newest step alone.
        """
        latest = {series.name: series.values[-1] for series in newest}
        return cls(**_summary(job), queue=_queue(place), latest=latest or None, spec=job.spec)


def _summary(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "name": job.name,
        "labels": job.labels,
        "priority": job.priority,
        "status": job.status,
        "phase": _phase(job),
        "progress": Progress(
            percent=job.percent,
            step=job.step,
            total_steps=job.total_steps,
            stage=job.stage,
            stages=job.stages,
            tokens_seen=job.tokens_seen,
            tokens_per_second=job.tokens_per_second,
            updated_at=job.progress_at,
        ),
        "eta": _eta(job),
        "end_reason": Reason.of(job.end_reason),
        "attempts_spent": job.attempts_spent,
        "max_attempts": job.max_attempts,
        "created_at": job.created_at,
        "updated_at": job.updated_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "cancel_requested_at": job.cancel_requested_at,
        "pause_at": job.pause_at,
        "retry_of": job.retry_of,
        "branch_of": job.branch_of,
        "limits": LimitsView(
            max_runtime_seconds=job.max_runtime_seconds,
            max_wait_seconds=job.max_wait_seconds,
            max_attempts=job.max_attempts,
        ),
    }


def _phase(job: Job) -> PhaseView | None:
    if job.phase is None:
        return None
    return PhaseView(name=job.phase, done=job.phase_done, total=job.phase_total, unit=job.phase_unit)


def _eta(job: Job) -> Eta | None:
    if job.eta_seconds is None or job.progress_at is None:
        return None
    return Eta(
        seconds=job.eta_seconds,
        low_seconds=job.eta_low_seconds,
        high_seconds=job.eta_high_seconds,
        finish_at=job.progress_at + timedelta(seconds=job.eta_seconds),
    )


def _queue(place: QueuePosition | None) -> QueueView | None:
    if place is None:
        return None
    return QueueView(position=place.position, ahead=place.ahead, reason=place.reason, starts_at=place.starts_at)


class JobPage(Page[JobSummary, str]):
    """Jobs, newest first."""


class StageView(StagePlanView):
    """A stage of a job: planned at submission, then as the engine reports it."""

    status: StageStatus
    started_at: datetime | None
    finished_at: datetime | None
    evaluation: dict[str, JsonValue] | None
    """The scores at the stage's end."""

    @classmethod
    def of(cls, row: JobStage) -> Self:
        return cls(
            index=row.index,
            samples=row.samples,
            temperature=row.temperature,
            kd_weight=row.kd_weight,
            epochs=row.epochs,
            steps=row.steps,
            first_step=row.first_step,
            status=row.status,
            started_at=row.started_at,
            finished_at=row.finished_at,
            evaluation=row.evaluation,
        )


class StageList(Resource):
    """All stages of a job, in order."""

    object: Literal["list"] = "list"
    data: list[StageView]


class EventView(Resource):
    """One entry of a job's history."""

    id: int
    """Counted from 1, without gaps, in the order of the commits."""
    at: datetime
    type: str
    """`status` for a change of state, else what the engine reported. More types may be added."""
    data: dict[str, JsonValue]

    @classmethod
    def of(cls, row: JobEvent) -> Self:
        return cls(id=row.seq, at=row.at, type=row.type, data=row.data)


class EventPage(Page[EventView, int]):
    """Events, oldest first."""


class AttemptView(Resource):
    """One worker's hold on a job."""

    id: int
    """Counted from 1."""
    worker: str
    started_at: datetime
    ended_at: datetime | None
    end: AttemptEnd | None
    """Null while it runs."""
    end_reason: Reason | None
    resumed_from_step: int | None
    """The optimiser step of the checkpoint that it continued; null for a fresh start."""

    @classmethod
    def of(cls, row: JobAttempt) -> Self:
        return cls(
            id=row.number,
            worker=row.worker,
            started_at=row.started_at,
            ended_at=row.ended_at,
            end=row.end,
            end_reason=Reason.of(row.end_reason),
            resumed_from_step=row.resumed_from_step,
        )


class AttemptPage(Page[AttemptView, int]):
    """Attempts, oldest first."""


class SeriesView(Resource):
    """One metric over the optimiser steps, thinned out."""

    name: str
    steps: list[int]
    values: list[float]
    """One for each of `steps`."""

    @classmethod
    def of(cls, series: MetricSeries) -> Self:
        return cls(name=series.name, steps=list(series.steps), values=list(series.values))


class EvaluationView(Resource):
    """Scores on the validation rows."""

    subject: str
    """`teacher`, `initial`, `epoch`, `stage` or `final`."""
    step: int
    stage: int | None
    at: datetime
    rows: int
    rouge_l: float
    """F1, 0 to 100."""
    exact_match: float
    """Per cent."""
    cross_entropy: float
    """Nats per response token."""
    divergence: float | None
    """Forward KL to the teacher, nats per response token."""
    sampled: SampledScores | None
    """Scores of answers drawn with several seeds; null where only greedy answers were scored."""

    @classmethod
    def of(cls, row: JobEvaluation) -> Self:
        return cls(
            subject=row.subject,
            step=row.step,
            stage=row.stage,
            at=row.at,
            rows=row.rows,
            rouge_l=row.rouge_l,
            exact_match=row.exact_match,
            cross_entropy=row.cross_entropy,
            divergence=row.divergence,
            sampled=None if row.sampled is None else SampledScores.model_validate(row.sampled),
        )


class MetricsView(Resource):
    """What was measured while training."""

    series: list[SeriesView]
    evaluations: list[EvaluationView]
