"""The rows of a job: itself, its history, its stages, metrics, evaluations and artifacts.

Every row that a job owns refers to it by a foreign key, and is deleted with it.
"""

from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Protocol

import sqlalchemy as sa
from sqlalchemy import ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, JsonType, UtcDateTime, db_now
from domain.jobs.states import TERMINAL, AttemptEnd, EndReason, JobStatus, PauseAt, StageStatus, StopRequest
from domain.logs import current_request_id
from domain.tracing import current_traceparent

ID_LENGTH: Final = 64
LABEL_KEY: Final = r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?"
"""A regular expression for the key of a label."""
CLEARED_WITH_LEASE: Final = "cleared_with_lease"
"""Key in a column's `info`: the column is about the present attempt, and is set to null when the lease is released."""
_WITH_LEASE: Final = {CLEARED_WITH_LEASE: True}


def _enumeration(values: type[StrEnum]) -> sa.Enum:
    # A CHECK refuses a value that no code knows, and is easier to extend than a native enum.
    return sa.Enum(
        values,
        native_enum=False,
        create_constraint=True,
        length=16,
        name=values.__name__.lower(),
        values_callable=lambda members: [member.value for member in members],
    )


class Job(Base):
    __tablename__ = "jobs"
    __table_args__ = (
        # No column that a heartbeat or an event changes has an index.
        Index(
            "ix_jobs_waits_until",
            "waits_until",
            postgresql_where=sa.text("waits_until IS NOT NULL"),
            sqlite_where=sa.text("waits_until IS NOT NULL"),
        ),
        Index("ix_jobs_project", "project", "id"),
        Index("ix_jobs_starts_from", "starts_from"),
        # What monitoring counts, out of the index alone.
        Index("ix_jobs_figures", "status", "project", "created_at", "not_before"),
        # The jobs that succeeded last, from which the starts of others are estimated.
        Index("ix_jobs_finished", "status", "finished_at"),
        Index("ix_jobs_retry_of", "retry_of"),
        Index("ix_jobs_branch_of", "branch_of"),
    )

    id: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    project: Mapped[str] = mapped_column(String(64), default="default")
    name: Mapped[str | None] = mapped_column(String(200))
    labels: Mapped[dict[str, str]] = mapped_column(JsonType, default=dict)
    priority: Mapped[int] = mapped_column(default=0)
    """Jobs of a higher priority are claimed first."""

    posted_spec: Mapped[dict[str, Any]] = mapped_column(JsonType)
    """The specification as the client posted it."""
    spec: Mapped[dict[str, Any]] = mapped_column(JsonType)
    """The resolved specification: every default is named."""
    request_id: Mapped[str | None] = mapped_column(String(64), default=current_request_id)
    """The id of the request that made the job, which is in the log lines of every process about it."""
    traceparent: Mapped[str | None] = mapped_column(String(64), default=current_traceparent)
    """The span of that request (W3C Trace Context), the parent of its attempts' spans; null where it was not traced."""
    device: Mapped[str] = mapped_column(String(16), default="auto")
    """`resources.device` of the specification: what a worker must have to claim it."""

    encodings: Mapped[list[dict[str, Any]]] = mapped_column(JsonType, default=list)
    """What the engine counted when it made tokens of each data set: the content of its `data_encoded` events."""

    status: Mapped[JobStatus] = mapped_column(_enumeration(JobStatus), default=JobStatus.QUEUED)
    version: Mapped[int] = mapped_column(default=1)
    """The optimistic lock of the row; it rises with every change that a client can see."""
    event_seq: Mapped[int] = mapped_column(default=0)
    """The sequence number of the newest event."""
    end_reason: Mapped[dict[str, Any] | None] = mapped_column(JsonType)

    token: Mapped[int] = mapped_column(default=0)
    """The fencing token of the newest attempt, which is its number, counted from 1; 0 before the first."""
    attempts_spent: Mapped[int] = mapped_column(default=0)
    """Attempts since the last progress that count towards `max_attempts`: a running one does, one that its worker
    released does not, and of those that failed by a fault that may pass one for each worker."""
    max_attempts: Mapped[int] = mapped_column(default=3)
    not_before: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When a job that is queued again after a failure may be claimed; null: at once."""
    furthest_step: Mapped[int | None]
    """The optimiser step of the furthest training state that an attempt has stored; null before the first."""
    progress_token: Mapped[int] = mapped_column(default=0)
    """The fencing token of the attempt that stored that state: of earlier attempts none counts any more."""
    lease_owner: Mapped[str | None] = mapped_column(String(200), info=_WITH_LEASE)
    """The name of the worker that holds the job."""
    lease_token: Mapped[int | None] = mapped_column(info=_WITH_LEASE)
    """The fencing token that writes must carry; null while no attempt holds the job."""
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime, info=_WITH_LEASE)
    events_offset: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    """Bytes of the attempt's `events.jsonl` that have been applied to the rows."""

    phase: Mapped[str | None] = mapped_column(String(32), info=_WITH_LEASE)
    phase_done: Mapped[int | None] = mapped_column(sa.BigInteger, info=_WITH_LEASE)
    phase_total: Mapped[int | None] = mapped_column(sa.BigInteger, info=_WITH_LEASE)
    phase_unit: Mapped[str | None] = mapped_column(String(16), info=_WITH_LEASE)
    step: Mapped[int] = mapped_column(default=0)
    """Optimiser steps done."""
    total_steps: Mapped[int] = mapped_column(default=0)
    stage: Mapped[int | None]
    """The stage that is trained or evaluated, counted from 0."""
    stages: Mapped[int] = mapped_column(default=0)
    percent: Mapped[float] = mapped_column(sa.Double, default=0.0)
    """The share of the planned work that is done, 0 to 100: see :mod:`domain.jobs.work_progress`. It never falls."""
    tokens_seen: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    tokens_per_second: Mapped[float | None] = mapped_column(sa.Double, info=_WITH_LEASE)
    eta_seconds: Mapped[float | None] = mapped_column(sa.Double, info=_WITH_LEASE)
    """The time to the end of the run, as estimated at `progress_at`: by the forecast until steps are timed."""
    eta_low_seconds: Mapped[float | None] = mapped_column(sa.Double, info=_WITH_LEASE)
    eta_high_seconds: Mapped[float | None] = mapped_column(sa.Double, info=_WITH_LEASE)
    """The range in which `eta_seconds` is expected to lie."""
    log_bytes: Mapped[int] = mapped_column(sa.BigInteger, default=0, server_default="0")
    """How many bytes the logs of all attempts have had so far; it changes without `version`."""
    progress_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When the engine last reported anything."""

    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When the first attempt began."""
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    cancel_requested_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    pause_at: Mapped[PauseAt | None] = mapped_column(String(16), info=_WITH_LEASE)
    """When a job that is pausing stops."""
    retry_of: Mapped[str | None] = mapped_column(String(ID_LENGTH))
    """The ended job that this one retries."""
    branch_of: Mapped[str | None] = mapped_column(String(ID_LENGTH))
    """The job from which this one branches at the end of a stage."""
    starts_from: Mapped[str | None] = mapped_column(String(ID_LENGTH))
    """The checkpoint of its parent that the job starts from; null for the start of the run."""
    branch_point: Mapped[str | None] = mapped_column(String(ID_LENGTH))
    """The checkpoint at which a branch left its parent: of the branch and of every retry of it. The steps before it had
    another specification, so none of them can be done by this one. Null for a job that descends from no branch."""
    plan_warnings: Mapped[list[dict[str, str]]] = mapped_column(JsonType, default=list)
    """What was to be known about the job at its submission, each with `code` and `message`."""

    max_runtime_seconds: Mapped[int | None]
    """How long all attempts together may run; null without a limit."""
    runtime_left_seconds: Mapped[float | None] = mapped_column(sa.Double)
    """What was left of `max_runtime_seconds` when the last attempt ended; null without a limit."""
    runs_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When the present attempt will have used up `runtime_left_seconds`."""
    max_wait_seconds: Mapped[int | None]
    """How long the job may wait in the queue for its first attempt; null without a limit."""
    waits_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When `max_wait_seconds` are over."""
    forecast: Mapped[dict[str, Any] | None] = mapped_column(JsonType)
    """What the job was expected to take when it was submitted: see :func:`domain.jobs.forecast.as_stored`."""
    memory_bytes: Mapped[int | None] = mapped_column(sa.BigInteger)
    """Device memory that the job needs at most, as planned; null where that is not known."""

    warnings: Mapped[list[dict[str, Any]]] = mapped_column(JsonType, default=list, server_default="[]")
    """The warnings of the engine by their text, each with its count."""
    events_dropped: Mapped[int] = mapped_column(default=0, server_default="0")
    """Events of the engine that the history does not have, since it has as many as it may."""
    metric_window: Mapped[int] = mapped_column(default=1, server_default="1")
    """Of so many steps the first, the last, the least and the greatest value of each metric stay; 1: all stay."""
    metrics_thinned_to: Mapped[int] = mapped_column(default=0, server_default="0")
    """The step up to which windows are thinned, exclusive."""
    metrics_dropped: Mapped[int] = mapped_column(sa.BigInteger, default=0, server_default="0")
    """Values that were dropped so."""
    retention: Mapped[dict[str, Any] | None] = mapped_column(JsonType)
    """The fields of :class:`~domain.retention.models.RetentionPolicy` that the job has for itself; null for none."""
    trackers: Mapped[list[dict[str, Any]] | None] = mapped_column(JsonType)
    """The options of the trackers that the job asks for, in their order; null for none."""
    history_deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When its events, metrics and logs were deleted; null while it has them."""
    stored_bytes: Mapped[int] = mapped_column(sa.BigInteger, default=0, server_default="0")
    """The bytes of the checkpoints and artifacts of the job in the artifact store."""

    @property
    def parent_job_id(self) -> str | None:
        """The job whose ranking and training state this one may start with."""
        return self.retry_of or self.branch_of

    @property
    def stop_request(self) -> StopRequest | None:
        """What the client's last action asks of the engine; null where the attempt may go on."""
        if self.status is JobStatus.CANCELLING:
            return StopRequest.CANCEL
        if self.status is JobStatus.PAUSING:
            return StopRequest.PAUSE_AT_STAGE_END if self.pause_at == "stage_end" else StopRequest.PAUSE
        return None

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL

    @property
    def reason(self) -> EndReason | None:
        """Why the job ended; null while it has not."""
        return None if self.end_reason is None else EndReason.from_json(self.end_reason)


# The order of a project's queue.
# The last column is for index-only scans of what may be claimed now.
Index("ix_jobs_queue", Job.status, Job.project, Job.priority.desc(), Job.created_at, Job.id, Job.not_before)


def _owned_by_job() -> Mapped[str]:
    return mapped_column(String(ID_LENGTH), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)


OUTBOX_TYPES: Final = frozenset({"status", "stage_finished", "checkpoint", "published", "publication_failed"})
"""The types of events that webhooks tell of."""


def _enters_outbox(context: Any) -> bool:
    """Whether the row that is inserted enters the outbox. SQLAlchemy leaves the context's functions untyped."""
    return context.get_current_parameters()["type"] in OUTBOX_TYPES


class JobEvent(Base):
    """One event of a job's history. Sequence numbers have no gap, and rise in the order of the commits."""

    __tablename__ = "job_events"
    __table_args__ = (
        Index(
            "ix_job_events_outbox",
            "job_id",
            "seq",
            postgresql_where=sa.text("in_outbox"),
            sqlite_where=sa.text("in_outbox = 1"),
        ),
    )

    job_id: Mapped[str] = _owned_by_job()
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    type: Mapped[str] = mapped_column(String(32))
    """`status` for a transition; otherwise an action of the client or the type of the engine's event."""
    data: Mapped[dict[str, Any]] = mapped_column(JsonType)
    in_outbox: Mapped[bool] = mapped_column(default=_enters_outbox, server_default=sa.false())
    """Whether messages to webhooks have still to be written about the event (a transactional outbox)."""


class JobAttempt(Base):
    """One attempt of a worker at a job, from the claim of the lease to its end."""

    __tablename__ = "job_attempts"
    __table_args__ = (Index("ix_job_attempts_worker", "worker", "ended_at"),)

    job_id: Mapped[str] = _owned_by_job()
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """The attempt's number, counted from 1, which is its fencing token."""
    worker: Mapped[str] = mapped_column(String(200))
    device: Mapped[str | None] = mapped_column(String(16))
    """The kind of device that it computes on, `cpu` or `cuda`; null for attempts from before that was noted."""
    started_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    end: Mapped[AttemptEnd | None] = mapped_column(_enumeration(AttemptEnd))
    """How the attempt ended; null while it runs."""
    end_reason: Mapped[dict[str, Any] | None] = mapped_column(JsonType)
    resumed_from_step: Mapped[int | None]
    """The optimiser step of the checkpoint from which the attempt resumed; null where it started afresh."""
    log_tail: Mapped[str] = mapped_column(Text, default="")
    """The end of what the engine wrote to stderr, of attempts of an older version; see :class:`JobLog`."""


class JobLog(Base):
    """Consecutive bytes of what the engine of an attempt wrote to stderr."""

    __tablename__ = "job_logs"

    job_id: Mapped[str] = _owned_by_job()
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    start: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    """The offset of the first byte in the log of the attempt."""
    size: Mapped[int]
    """The number of bytes."""
    content: Mapped[bytes] = mapped_column(sa.LargeBinary)
    """The bytes: UTF-8, with no character cut."""


class PlannedStage(Protocol):
    """A stage as planned at submission, as the engine reports its start, or as a parent job has run it."""

    @property
    def samples(self) -> int: ...

    @property
    def temperature(self) -> float: ...

    @property
    def kd_weight(self) -> float: ...

    @property
    def steps(self) -> int: ...

    @property
    def first_step(self) -> int: ...


class JobStage(Base):
    """One stage of the curriculum: as planned at submission, then as the engine reports it."""

    __tablename__ = "job_stages"

    job_id: Mapped[str] = _owned_by_job()
    index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """The stage's number, counted from 0."""
    samples: Mapped[int]
    """How many of the easiest samples the stage trains on."""
    temperature: Mapped[float] = mapped_column(sa.Double)
    kd_weight: Mapped[float] = mapped_column(sa.Double)
    epochs: Mapped[int]
    """Planned epochs until the stage ends; then the epochs that were run."""
    steps: Mapped[int]
    """Planned optimiser steps until the stage ends; then the steps that were run."""
    first_step: Mapped[int]
    """Optimiser steps before the stage."""
    status: Mapped[StageStatus] = mapped_column(_enumeration(StageStatus), default=StageStatus.PENDING)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    evaluation: Mapped[dict[str, Any] | None] = mapped_column(JsonType)
    """The scores at the stage's end."""

    @staticmethod
    def planned_columns(plan: PlannedStage) -> dict[str, Any]:
        """The numbers of a planned stage. Epochs are apart: the engine reports them when the stage ends."""
        return {name: getattr(plan, name) for name in ("samples", "steps", "first_step", "temperature", "kd_weight")}

    def apply_plan(self, plan: PlannedStage) -> None:
        """Take over :meth:`planned_columns`."""
        for name, value in self.planned_columns(plan).items():
            setattr(self, name, value)


METRICS: Final = (
    "loss",
    "cross_entropy",
    "divergence",
    "learning_rate",
    "grad_norm",
    "temperature",
    "kd_weight",
    "tokens",
    "tokens_seen",
    "tokens_per_second",
)
"""The metrics of an optimiser step that are stored as series."""


class JobMetric(Base):
    """One metric at one optimiser step. A step that is run again replaces its values."""

    __tablename__ = "job_metrics"

    job_id: Mapped[str] = _owned_by_job()
    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[float] = mapped_column(sa.Double)


class JobEvaluation(Base):
    """Scores on held-out samples."""

    __tablename__ = "job_evaluations"

    job_id: Mapped[str] = _owned_by_job()
    subject: Mapped[str] = mapped_column(String(16), primary_key=True)
    """`teacher`, `initial`, `epoch`, `stage`, `best` or `final`."""
    split: Mapped[str] = mapped_column(String(32), primary_key=True, default="validation")
    """`validation`, `test` or the name of an evaluation set."""
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    stage: Mapped[int | None]
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    rows: Mapped[int]
    rouge_l: Mapped[float] = mapped_column(sa.Double)
    exact_match: Mapped[float] = mapped_column(sa.Double)
    cross_entropy: Mapped[float] = mapped_column(sa.Double)
    divergence: Mapped[float | None] = mapped_column(sa.Double)
    unfinished_thoughts: Mapped[int] = mapped_column(default=0, server_default="0")
    """Scored answers that end inside their thought."""
    sampled: Mapped[dict[str, Any] | None] = mapped_column(JsonType)
    """Scores of sampled responses, as the engine reported them."""


class JobArtifact(Base):
    """A file of a job in the artifact store: the newest of its kind."""

    __tablename__ = "job_artifacts"

    job_id: Mapped[str] = _owned_by_job()
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    """`spec`, `ranking`, `answers`, `result` or `report`; or a tracker that makes a file, `tensorboard` or `wandb`."""
    attempt: Mapped[int]
    store_key: Mapped[str] = mapped_column(String(255))
    """The file's key, relative to the artifact store."""
    size_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
