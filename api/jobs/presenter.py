"""Views of a job, built from its row, its position in the queue and its newest metrics."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

from sqlalchemy.orm import Session

from api.jobs.publication_schemas import PublicationView
from api.jobs.schemas import Eta, HistoryBounds, JobSummary, JobView, LimitsView, PhaseView, Progress, QueueView
from domain.jobs import repository
from domain.jobs.live_progress import LiveProgress
from domain.jobs.models import Job, JobAttempt
from domain.jobs.publication_start import wanted_push
from domain.jobs.queue import QueuedJob, QueuePosition, queue_position
from domain.publications.models import Publication
from domain.publications.repository import get_publication
from domain.settings import Settings

_MAX_FAILED_ATTEMPTS: Final = 20
_NESTED: Final = {"phase", "progress", "eta", "limits"}
"""Fields of a view that combine several columns; every other one is a column of the same name."""
_COLUMNS: Final = tuple(JobSummary.model_fields.keys() - _NESTED - {"object"})


def summarize_job(job: Job) -> JobSummary:
    """The view of a job in a list."""
    return JobSummary.model_validate(_summary_fields(job))


def present_progress(job: Job | LiveProgress) -> Mapping[str, Any]:
    """How far a job is: the fields of a view that change with every report of the engine."""
    return {
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
    }


def present_job(session: Session, job: Job, settings: Settings) -> JobView:
    """The whole view of a job, with its position in the queue at this moment."""
    return present_job_at(session, job, queue_position(session, job, worker_seconds=settings.lease_seconds))


def present_job_at(session: Session, job: Job, position: QueuePosition | None) -> JobView:
    """The whole view of a job.

    Args:
        position: of the job in the queue; null unless it is queued.
    """
    failed = repository.list_failed_attempts(session, job, limit=_MAX_FAILED_ATTEMPTS)
    publication = get_publication(session, job.id) if job.ended and wanted_push(job.spec) is not None else None
    return _view(job, position, failed, repository.newest_metrics(session, job) or None, publication)


def present_new_job(queued: QueuedJob) -> JobView:
    """The whole view of a job that no worker has claimed yet: there is nothing more to read of it."""
    return _view(queued.job, queued.position, (), None)


def _view(
    job: Job,
    position: QueuePosition | None,
    failed: Sequence[JobAttempt],
    latest: Mapping[str, float] | None,
    publication: Publication | None = None,
) -> JobView:
    return JobView.model_validate(
        {
            **_summary_fields(job),
            "failed_attempts": failed,
            "queue": None if position is None else QueueView.model_validate(position),
            "latest": latest,
            "warnings": job.warnings,
            "retention": job.retention,
            "trackers": job.trackers or [],
            "publication": None if publication is None else _present_publication(publication),
            "history": HistoryBounds.model_validate(job),
            "plan_warnings": job.plan_warnings,
            "forecast": job.forecast,
            "encodings": job.encodings,
            "spec": job.spec,
        }
    )


def _present_publication(row: Publication) -> PublicationView:
    columns = {name: getattr(row, name) for name in PublicationView.model_fields.keys() - {"checkpoint", "not_before"}}
    not_before = row.not_before if row.state == "pending" else None
    return PublicationView.model_validate({**columns, "checkpoint": row.checkpoint_id, "not_before": not_before})


def _summary_fields(job: Job) -> Mapping[str, Any]:
    return {
        **{name: getattr(job, name) for name in _COLUMNS},
        **present_progress(job),
        "limits": LimitsView.model_validate(job),
    }


def _phase(job: Job | LiveProgress) -> PhaseView | None:
    if job.phase is None:
        return None
    return PhaseView(name=job.phase, done=job.phase_done, total=job.phase_total, unit=job.phase_unit)


def _eta(job: Job | LiveProgress) -> Eta | None:
    if job.eta_seconds is None or job.progress_at is None:
        return None
    return Eta(
        seconds=job.eta_seconds,
        low_seconds=job.eta_low_seconds,
        high_seconds=job.eta_high_seconds,
        finish_at=job.progress_at + timedelta(seconds=job.eta_seconds),
    )
