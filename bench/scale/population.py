"""The rows of a large service: jobs of many projects that ended or wait, and all that belongs to them.

The database makes the rows from one job, so that a million take minutes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from domain.checkpoints.models import Checkpoint
from domain.db import Base, Database, db_now
from domain.ids import new_id
from domain.jobs.models import Job, JobAttempt, JobEvaluation, JobEvent, JobMetric, JobStage
from domain.jobs.states import SUCCEEDED, AttemptEnd, JobStatus, StageStatus
from domain.usage.models import UsageRecord
from domain.workers.models import Worker
from pocl.spec import DistillationSpec

BYSTANDER: Final = "default"
"""The project whose jobs are listed and polled; it is as large as any other."""
STAGES, EVENTS, STEPS = 4, 12, 1000
"""Stages, events and optimiser steps of each job."""
METRIC_POINTS: Final = 200
_JOBS_WITH_METRICS: Final = 0.01
_SECONDS_BETWEEN_JOBS: Final = 30.0
_MODEL: Final = {"random": {"layers": 4, "hidden_size": 128, "heads": 4}}
_SPEC: Final = {
    "preset": "quick",
    "teacher": _MODEL,
    "student": _MODEL,
    "data": {"train": {"dataset": "ds_0123456789"}},
}
_SHOWN_TABLES: Final = (Job, JobEvent, JobStage, JobMetric, JobAttempt, JobEvaluation, Checkpoint, UsageRecord, Worker)


@dataclass(frozen=True)
class Population:
    """How much there is."""

    jobs: int
    """Jobs of all states."""
    queued: int
    """How many of them wait for a worker: the newest."""
    projects: int
    workers: int

    def divided(self, by: int) -> "Population":
        """As many projects, and a part of everything else."""
        return Population(self.jobs // by, self.queued // by, self.projects, max(1, self.workers // by))


def fill(database: Database, population: Population) -> None:
    """Bring an empty or a smaller database to this population."""
    # Filling is not what is measured, and takes longer than any statement of the service may.
    engine = sa.create_engine(database.engine.url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        known = connection.scalar(sa.select(Job.id).where(Job.name == _TEMPLATE))
        template = known or _add_template(connection)
        # Those that waited in a smaller population have ended by now.
        _end_queued(connection)
        first = connection.scalar(sa.select(sa.func.count()).select_from(Job).where(Job.name != _TEMPLATE)) or 0
        _add_jobs(connection, template, range(first, population.jobs), population)
        _add_children(connection, first)
    # What the planner of a database that has grown slowly knows, and the visibility map of index-only scans.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM ANALYZE"))


def table_sizes(database: Database) -> dict[str, int]:
    """Bytes of the largest tables with their indexes."""
    with database.transaction(write=False) as session:
        return {
            table.__tablename__: session.scalar(sa.select(sa.func.pg_total_relation_size(table.__tablename__))) or 0
            for table in _SHOWN_TABLES
        }


_TEMPLATE: Final = "template"
_JOB_PREFIX: Final = "job_0"
"""Ids of these jobs: their number follows in hexadecimal, so that the newest has the greatest."""


def _add_template(connection: sa.Connection) -> str:
    spec = DistillationSpec.model_validate(_SPEC).model_dump(mode="json")
    job_id = new_id("job")
    row: dict[str, Any] = {"id": job_id, "name": _TEMPLATE, "posted_spec": _SPEC, "spec": spec, "project": "none"}
    ended = {"status": JobStatus.SUCCEEDED, "end_reason": SUCCEEDED.as_json(), "stages": STAGES, "total_steps": STEPS}
    connection.execute(sa.insert(Job).values(**row, **ended))
    return job_id


def _end_queued(connection: sa.Connection) -> None:
    waiting = Job.status != JobStatus.SUCCEEDED
    ended = {"status": JobStatus.SUCCEEDED, "end_reason": SUCCEEDED.as_json(), "finished_at": db_now()}
    held = {"lease_owner": None, "lease_token": None, "lease_expires_at": None}
    connection.execute(sa.update(Job).where(waiting).values(**ended, **held))


def _add_jobs(connection: sa.Connection, template: str, numbers: range, population: Population) -> None:
    number = _NUMBER
    waits = number >= population.jobs - population.queued
    age = (population.jobs - number) * _SECONDS_BETWEEN_JOBS
    created = db_now() - sa.func.make_interval(0, 0, 0, 0, 0, 0, age)
    project_number = number % population.projects
    given: dict[str, sa.ColumnElement[Any]] = {
        "id": sa.literal(_JOB_PREFIX) + sa.func.lpad(sa.func.to_hex(number), 25, "0"),
        "name": sa.literal("scale-") + sa.cast(number, sa.Text),
        "project": sa.case((project_number == 0, BYSTANDER), else_=sa.literal("p") + sa.cast(project_number, sa.Text)),
        # A tenth of the jobs of each project is urgent, as in a service where some people are.
        "priority": sa.case((number / population.projects % 10 == 3, 10), else_=0),
        "status": sa.case((waits, JobStatus.QUEUED.value), else_=JobStatus.SUCCEEDED.value),
        "end_reason": sa.case((waits, sa.null()), else_=Job.end_reason),
        "created_at": created,
        "updated_at": created,
        "started_at": sa.case((waits, sa.null()), else_=created),
        "finished_at": sa.case((waits, sa.null()), else_=created),
        "step": sa.case((waits, 0), else_=STEPS),
        "event_seq": sa.case((waits, 1), else_=EVENTS),
        "token": sa.case((waits, 0), else_=1),
    }
    columns = [column.key for column in sa.inspect(Job).columns]
    series = _series(numbers.start, numbers.stop - 1)
    source = (
        sa.select(*(given.get(key, getattr(Job, key)).label(key) for key in columns))
        .select_from(Job)
        .join(series, sa.true())
        .where(Job.id == template)
    )
    connection.execute(sa.insert(Job).from_select(columns, source))


def _add_children(connection: sa.Connection, first: int) -> None:
    """What belongs to the jobs from this number on."""
    added = sa.and_(Job.name.startswith("scale-"), sa.cast(sa.func.substr(Job.name, 7), sa.Integer) >= first)
    ended = sa.and_(added, Job.status == JobStatus.SUCCEEDED)
    _insert(connection, JobEvent, added, _series(1, EVENTS), {
        "seq": _NUMBER, "at": Job.created_at, "type": sa.literal("phase"), "in_outbox": sa.false(),
        "data": sa.func.jsonb_build_object("phase", "training", "stage", _NUMBER % STAGES),
    }, Job.event_seq >= _NUMBER)  # fmt: skip
    _insert(connection, JobStage, added, _series(0, STAGES - 1), {
        "index": _NUMBER, "samples": sa.literal(1000), "temperature": sa.literal(1.0), "kd_weight": sa.literal(0.5),
        "epochs": sa.literal(2), "steps": sa.literal(STEPS // STAGES), "first_step": _NUMBER * (STEPS // STAGES),
        "status": sa.case((Job.status == JobStatus.SUCCEEDED, StageStatus.SUCCEEDED.value),
                          else_=StageStatus.PENDING.value),
    })  # fmt: skip
    _insert(connection, JobAttempt, ended, _series(1, 1), {
        "number": _NUMBER, "worker": sa.literal("worker-") + sa.cast(sa.func.length(Job.name), sa.Text),
        "started_at": Job.started_at, "ended_at": Job.finished_at, "end": sa.literal(AttemptEnd.SUCCEEDED.value),
        "log_tail": sa.func.repeat("a line of the log of an engine\n", 30),
    })  # fmt: skip
    _insert(connection, JobEvaluation, ended, _series(0, STAGES), {
        "subject": sa.literal("stage"), "split": sa.literal("validation"), "step": _NUMBER, "stage": _NUMBER,
        "at": Job.finished_at, "rows": sa.literal(100), "rouge_l": sa.literal(20.0), "exact_match": sa.literal(1.0),
        "cross_entropy": sa.literal(3.0),
    })  # fmt: skip
    _insert(connection, Checkpoint, ended, _series(1, 2), {
        "id": sa.func.replace(Job.id, "job_", "ckpt_") + sa.cast(_NUMBER, sa.Text), "project": Job.project,
        "attempt": sa.literal(1), "kind": sa.case((_NUMBER == 1, "final"), else_="stage"), "step": sa.literal(STEPS),
        "store_key": sa.literal("jobs/") + Job.id + "/" + sa.cast(_NUMBER, sa.Text),
        "size_bytes": sa.literal(10**8), "manifest_sha256": sa.func.repeat("0", 64),
    })  # fmt: skip
    _insert(connection, UsageRecord, ended, _series(1, 1), {
        "attempt": _NUMBER, "day": sa.cast(Job.finished_at, sa.Date), "project": Job.project,
        "worker": sa.literal("worker-1"), "device": sa.literal("cuda"), "seconds": sa.literal(1000.0),
    })  # fmt: skip
    has_metrics = sa.and_(ended, sa.func.hashtext(Job.id) % int(1 / _JOBS_WITH_METRICS) == 0)
    for name in ("loss", "cross_entropy", "divergence"):
        _insert(connection, JobMetric, has_metrics, _series(1, METRIC_POINTS), {
            "name": sa.literal(name), "step": _NUMBER, "value": sa.literal(1.5),
        })  # fmt: skip


_NUMBER: Final[sa.ColumnElement[Any]] = sa.literal_column("number", sa.Integer)


def _series(first: int, last: int) -> sa.TableValuedAlias:
    return sa.func.generate_series(first, last).table_valued("number", name="number")


def _insert(
    connection: sa.Connection,
    record: type[Base],
    jobs: sa.ColumnElement[bool],
    series: sa.TableValuedAlias,
    values: Mapping[str, sa.SQLColumnExpression[Any]],
    condition: sa.ColumnElement[bool] | None = None,
) -> None:
    """Rows of the jobs that a condition selects, one for each number of the series."""
    named = {"job_id": sa.literal_column("jobs.id", sa.String), **values}
    source = sa.select(*named.values()).select_from(Job).join(series, sa.true()).where(jobs)
    connection.execute(
        sa.insert(record).from_select(list(named), source if condition is None else source.where(condition))
    )
