"""Records what an attempt reports as rows: progress, data, stages, metrics, scores, history, checkpoints, artifacts.

Every function is for the attempt that holds the job, writes in the caller's transaction, and is idempotent: it may be
repeated after a commit whose result is not known.
"""

import json
import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, assert_never

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints.models import Checkpoint
from domain.db import upsert_into
from domain.ids import new_id
from domain.jobs.leases import Claim
from domain.jobs.metric_thinning import thin_metrics
from domain.jobs.models import METRICS, Job, JobArtifact, JobAttempt, JobEvaluation, JobMetric, JobStage
from domain.jobs.states import JobStatus, StageStatus
from domain.jobs.transitions import NewEvent, lock_claimed_job, record_events, transition
from domain.jobs.usage import bytes_of_job
from domain.jobs.warning_counts import WarningCounts
from domain.jobs.work_progress import WorkPlan, forecast_time_left
from pocl import events as engine

MAX_EVENTS: Final = 10_000
"""An engine's events enter the history of a job up to this number; transitions and clients' actions always do."""

_MAX_TEXT_LENGTH: Final = 2000
_TIMES_LEFT: Final = ("eta_seconds", "eta_low_seconds", "eta_high_seconds")


def apply_events(session: Session, claim: Claim, events: Sequence[engine.EventEnvelope], *, offset: int) -> None:
    """Apply engine events, in their order, to the rows.

    The first training event brings the job from preparing to running. `checkpoint` and `artifact` events only set the
    time of the last progress: see :func:`add_checkpoint` and :func:`add_artifact`.

    Args:
        offset: where these events end in the attempt's `events.jsonl`, in bytes. A call that does not lie beyond
            what the row holds changes nothing.

    Raises:
        LostLease: the attempt no longer holds the job.
    """
    job = lock_claimed_job(session, claim.job_id, claim.token)
    if offset <= job.events_offset:
        return
    batch = _EventBatch(session, job, claim.token)
    for envelope in events:
        batch.add(envelope.event, envelope.at)
    batch.write({"events_offset": offset})


def add_checkpoint(
    session: Session,
    claim: Claim,
    *,
    kind: engine.CheckpointKind,
    step: int,
    stage: int | None,
    store_key: str,
    size_bytes: int,
    manifest_sha256: str,
) -> Checkpoint:
    """Add the row of a checkpoint whose files are in the artifact store; where the key has a row, return that.

    Raises:
        LostLease: the attempt no longer holds the job.
    """
    job = lock_claimed_job(session, claim.job_id, claim.token)
    existing = session.scalars(sa.select(Checkpoint).where(Checkpoint.store_key == store_key)).one_or_none()
    if existing is not None:
        return existing
    checkpoint = Checkpoint(
        id=new_id("ckpt"),
        project=job.project,
        job_id=job.id,
        attempt=claim.token,
        kind=kind,
        step=step,
        stage=stage,
        store_key=store_key,
        size_bytes=size_bytes,
        manifest_sha256=manifest_sha256,
    )
    session.add(checkpoint)
    session.flush()
    data = {"id": checkpoint.id, "kind": kind, "step": step, "stage": stage, "size_bytes": size_bytes}
    changes: dict[str, Any] = {"stored_bytes": bytes_of_job(job.id)}
    if kind in engine.RESUMABLE_KINDS and step > (job.furthest_step or 0):
        # Progress: the attempts before it count no more, and of this one as much as of any that runs.
        changes |= {"furthest_step": step, "progress_token": claim.token, "attempts_spent": min(job.attempts_spent, 1)}
    events = [NewEvent("checkpoint", data)]
    if job.event_seq >= MAX_EVENTS:
        events, changes = [], changes | {"events_dropped": job.events_dropped + 1}
    record_events(session, job, events, token=claim.token, changes=changes)
    return checkpoint


def add_artifact(
    session: Session, claim: Claim, *, kind: str, store_key: str, size_bytes: int, sha256: str
) -> JobArtifact:
    """Add the row of a file that is in the artifact store, in place of an earlier one of its kind.

    Raises:
        LostLease: the attempt no longer holds the job.
    """
    job = lock_claimed_job(session, claim.job_id, claim.token)
    existing = session.get(JobArtifact, (job.id, kind))
    if existing is not None and (existing.store_key, existing.sha256) == (store_key, sha256):
        return existing
    artifact = session.merge(
        JobArtifact(
            job_id=job.id,
            kind=kind,
            attempt=claim.token,
            store_key=store_key,
            size_bytes=size_bytes,
            sha256=sha256,
        )
    )
    session.flush()
    data = {"kind": kind, "size_bytes": size_bytes, "sha256": sha256}
    changes = {"stored_bytes": bytes_of_job(job.id)}
    record_events(session, job, [NewEvent("artifact", data)], token=claim.token, changes=changes)
    return artifact


class _EventBatch:
    """Accumulates the changes of consecutive events, and writes them together."""

    def __init__(self, session: Session, job: Job, token: int) -> None:
        self._session = session
        self._job = job
        self._token = token
        self._work = WorkPlan.from_stored(job.forecast)
        self._columns: dict[str, Any] = {}
        self._history: list[NewEvent] = []
        self._metrics: dict[tuple[str, int], float] = {}
        self._encodings: list[dict[str, Any]] = job.encodings
        self._warnings = WarningCounts(job.warnings)
        self._stages = {
            stage.index: stage for stage in session.scalars(sa.select(JobStage).where(JobStage.job_id == job.id))
        }

    def add(self, event: engine.Event, at: datetime) -> None:  # noqa: C901 # One case for each kind of event.
        self._count_down(at)
        self._columns["progress_at"] = at
        if isinstance(event, engine.StageStarted | engine.StepLogged) and self._job.status is JobStatus.PREPARING:
            # Earlier events are written first, so that the history is in order.
            self.write({})
            self._job = transition(self._session, self._job, JobStatus.RUNNING, token=self._token)
        match event:
            case engine.RunStarted():
                self._run_started(event)
            case engine.PhaseChanged():
                self._phase_changed(event)
            case engine.DataEncoded():
                self._data_encoded(event)
            case engine.Progressed():
                self._advance(self._work.within(self._percent, event.phase, event.done, event.total))
                self._columns |= {
                    "phase": event.phase,
                    "phase_done": event.done,
                    "phase_total": event.total,
                    "phase_unit": event.unit,
                }
            case engine.StageStarted():
                self._stage_started(event, at)
            case engine.StepLogged():
                self._step_logged(event, at)
            case engine.StageFinished():
                self._stage_finished(event, at)
            case engine.Evaluated():
                self._evaluated(event, at)
            case engine.RunFinished() | engine.RunEnded():
                self._columns["step"] = event.step
            case engine.HistoryEvent() | engine.FileEvent():
                # Files are recorded once they are in the store.
                pass
            case _:
                assert_never(event)
        if isinstance(event, engine.Warned):
            is_first = self._warnings.add(_without_nul(event.code), _without_nul(event.message), at)
            self._columns["warnings"] = self._warnings.entries
            if not is_first:
                return
        if isinstance(event, engine.HistoryEvent):
            self._history.append(NewEvent(event.type, _event_data(event), at))

    def write(self, columns: dict[str, Any]) -> None:
        """Write the changes so far, and `columns` of the job."""
        self._session.flush()
        self._write_metrics()
        room = max(0, MAX_EVENTS - self._job.event_seq)
        if dropped := len(self._history[room:]):
            self._columns["events_dropped"] = self._job.events_dropped + dropped
        self._job = record_events(
            self._session, self._job, self._history[:room], token=self._token, changes={**self._columns, **columns}
        )
        self._history, self._columns = [], {}

    @property
    def _percent(self) -> float:
        return float(self._present("percent"))

    def _advance(self, percent: float) -> None:
        # An attempt that repeats what an earlier one had done moves nothing until it has come further.
        self._columns["percent"] = max(self._percent, percent)
        self._expect_end()

    def _count_down(self, at: datetime) -> None:
        """What was left at the last report is less by the time since then."""
        left, reported_at = (self._present(name) for name in ("eta_seconds", "progress_at"))
        if left is None or reported_at is None:
            return
        elapsed = max(0.0, (at - reported_at).total_seconds())
        for name in _TIMES_LEFT:
            left = self._present(name)
            self._columns[name] = None if left is None else max(0.0, left - elapsed)

    def _expect_end(self) -> None:
        """Until steps are timed, the time that is left is what the forecast makes of the work that is left."""
        if self._present("tokens_per_second") is not None:
            return
        left = forecast_time_left(self._job.forecast, self._percent, self._elapsed())
        if left is not None:
            self._columns |= dict(zip(_TIMES_LEFT, (left.expected, left.low, left.high), strict=True))

    def _elapsed(self) -> float | None:
        """The seconds that a first attempt has taken so far; null of a later one, which need not do all again, and
        where the clocks of database and worker differ.
        """
        began_at, reported_at = self._job.started_at, self._present("progress_at")
        if self._token != 1 or began_at is None or reported_at <= began_at:
            return None
        return float((reported_at - began_at).total_seconds())

    def _present(self, column: str) -> Any:
        """The value of a column of the job with the changes so far."""
        return self._columns.get(column, getattr(self._job, column))

    def _run_started(self, event: engine.RunStarted) -> None:
        step = event.resumed_from_step or 0
        self._columns |= {
            "total_steps": event.total_steps,
            "stages": event.stages,
            "step": step,
        }
        self._advance(self._work.at_step(step, event.total_steps))
        self._session.execute(
            sa.update(JobAttempt)
            .where(JobAttempt.job_id == self._job.id, JobAttempt.number == self._token)
            .values(resumed_from_step=event.resumed_from_step)
        )

    def _phase_changed(self, event: engine.PhaseChanged) -> None:
        self._columns |= {"phase": event.phase, "phase_done": None, "phase_total": None, "phase_unit": None}
        if event.stage is not None:
            self._columns["stage"] = event.stage

    def _data_encoded(self, event: engine.DataEncoded) -> None:
        # A later attempt counts again: its figures take the place of the earlier ones.
        others = [each for each in self._encodings if each["part"] != event.part]
        self._encodings = [*others, _event_data(event)]
        self._columns["encodings"] = self._encodings

    def _stage_started(self, event: engine.StageStarted, at: datetime) -> None:
        # An attempt may resume from an earlier stage; the stages after it will be run again.
        for later in (stage for index, stage in self._stages.items() if index > event.stage):
            later.status, later.started_at, later.finished_at, later.evaluation = StageStatus.PENDING, None, None, None
        stage = self._stages.get(event.stage)
        if stage is None:
            # The engine counts the samples that it can use, so its table of stages is the true one.
            stage = JobStage(job_id=self._job.id, index=event.stage, epochs=0)
            self._stages[event.stage] = stage
            self._session.add(stage)
        stage.apply_plan(event)
        stage.status, stage.finished_at = StageStatus.RUNNING, None
        stage.started_at = stage.started_at or at
        self._columns["stage"] = event.stage

    def _step_logged(self, event: engine.StepLogged, at: datetime) -> None:
        for name in METRICS:
            value = getattr(event, name)
            if value is not None and math.isfinite(value):
                self._metrics[name, event.step] = float(value)
        self._advance(self._work.at_step(event.step, event.total_steps))
        stage = self._stages.get(event.stage)
        if stage is not None and stage.status is StageStatus.PENDING:
            stage.status, stage.started_at = StageStatus.RUNNING, stage.started_at or at
        self._columns |= {
            "step": event.step,
            "phase": "training",
            "phase_done": None,
            "phase_total": None,
            "phase_unit": None,
            "total_steps": event.total_steps,
            "stage": event.stage,
            "tokens_seen": event.tokens_seen,
            "tokens_per_second": _finite_or_none(event.tokens_per_second),
            "eta_seconds": _finite_or_none(event.eta_seconds),
            "eta_low_seconds": None if event.eta_low_seconds is None else _finite_or_none(event.eta_low_seconds),
            "eta_high_seconds": None if event.eta_high_seconds is None else _finite_or_none(event.eta_high_seconds),
        }

    def _stage_finished(self, event: engine.StageFinished, at: datetime) -> None:
        stage = self._stages.get(event.stage)
        if stage is not None:
            stage.status, stage.finished_at, stage.epochs = StageStatus.SUCCEEDED, at, event.epochs
            # Convergence may have ended the stage before its planned steps.
            stage.steps = event.step - stage.first_step

    def _evaluated(self, event: engine.Evaluated, at: datetime) -> None:
        self._advance(self._work.after_evaluation(self._percent, event.subject, event.split))
        scores = event.model_dump(exclude={"type"})
        self._session.merge(JobEvaluation(job_id=self._job.id, at=at, **scores))
        stage = None if event.stage is None else self._stages.get(event.stage)
        if (event.subject, event.split) == ("stage", "validation") and stage is not None:
            stage.evaluation = _event_data(event)

    def _write_metrics(self) -> None:
        if not self._metrics:
            return
        statement = upsert_into(self._session.connection(), JobMetric)
        statement = statement.on_conflict_do_update(
            index_elements=["job_id", "name", "step"], set_={"value": statement.excluded.value}
        )
        rows = [
            {"job_id": self._job.id, "name": name, "step": step, "value": value}
            for (name, step), value in self._metrics.items()
        ]
        self._session.connection().execute(statement, rows)
        steps = [step for _, step in self._metrics]
        self._columns |= thin_metrics(self._session, self._job, first_step=min(steps), last_step=max(steps))
        self._metrics = {}


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _event_data(event: engine.Event) -> dict[str, Any]:
    # JSON has no number that is not finite: such a number becomes null.
    data: dict[str, Any] = json.loads(event.model_dump_json(exclude={"type"}))
    return {
        key: _without_nul(value)[:_MAX_TEXT_LENGTH] if isinstance(value, str) else value for key, value in data.items()
    }


def _without_nul(text: str) -> str:
    # PostgreSQL stores no NUL.
    return text.replace("\0", "")
