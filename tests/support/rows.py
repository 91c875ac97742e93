"""Rows and events for tests."""

from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints.models import Checkpoint
from domain.datasets.models import Dataset
from domain.datasets.repository import add_dataset
from domain.db import Base, Database
from domain.ids import new_id
from domain.jobs.event_recorder import add_checkpoint
from domain.jobs.leases import Claim, claim_next
from domain.jobs.models import Job, JobStage
from domain.jobs.states import JobStatus
from pocl import events as engine
from pocl.spec import resolve

SPEC: dict[str, Any] = {
    "preset": "quick",
    "teacher": {"random": {"layers": 4}},
    "student": {"random": {"layers": 2}},
    "data": {"train": {"dataset": "ds_00000000"}},
    "curriculum": {"stages": 2},
}
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


def add_job(session: Session, **columns: Any) -> Job:
    """A queued job of two stages with 10 steps each, whose data set need not exist."""
    posted_spec = columns.pop("posted_spec", SPEC)
    defaults = {
        "id": new_id("job"),
        "posted_spec": posted_spec,
        "spec": resolve(posted_spec).model_dump(mode="json"),
        "total_steps": 20,
        "stages": 2,
    }
    job = Job(**{**defaults, **columns})
    session.add(job)
    session.flush()
    session.add_all(
        JobStage(
            job_id=job.id,
            index=index,
            samples=40 * (index + 1),
            temperature=1.0 + index,
            kd_weight=0.7,
            epochs=1,
            steps=10,
            first_step=10 * index,
        )
        for index in range(2)
    )
    session.flush()
    return job


def insert_dataset(session: Session, *, project: str = "default", rows: int = 100, name: str = "dolly") -> Dataset:
    dataset_id = new_id("ds")
    return add_dataset(
        session,
        project=project,
        name=name,
        rows=rows,
        size_bytes=1000,
        sha256="0" * 64,
        store_key=f"datasets/{dataset_id}.jsonl",
        dataset_id=dataset_id,
    )


def claim_job(database: Database, *, lease_seconds: float = 60, **columns: Any) -> Claim:
    """Add a job and claim it; with a negative `lease_seconds` the lease has expired already."""
    with database.transaction(write=True) as session:
        add_job(session, **columns)
        claim = claim_next(session, worker="worker-1", lease_seconds=lease_seconds)
    assert claim is not None
    return claim


def save_checkpoint(
    database: Database, claim: Claim, kind: engine.CheckpointKind, step: int, **fields: Any
) -> Checkpoint:
    """Add the row of a checkpoint, whose files need not exist."""
    defaults: dict[str, Any] = {
        "stage": None,
        "store_key": f"jobs/{claim.job_id}/attempt-{claim.token}/{kind}-{step:08d}",
        "size_bytes": 1,
        "manifest_sha256": "0" * 64,
    }
    with database.transaction(write=True) as session:
        return add_checkpoint(session, claim, kind=kind, step=step, **{**defaults, **fields})


def reload_job(database: Database, claim: Claim) -> Job:
    with database.transaction(write=False) as session:
        return session.scalars(sa.select(Job).where(Job.id == claim.job_id)).one()


def set_status(session: Session, job_id: str, status: JobStatus) -> None:
    """Set the state of a job without a transition."""
    session.execute(sa.update(Job).where(Job.id == job_id).values(status=status))


def dump_tables(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables, by the name of the table."""
    with database.transaction(write=False) as session:
        return {
            table.name: sorted((tuple(row) for row in session.execute(sa.select(table))), key=repr)
            for table in Base.metadata.sorted_tables
        }


def envelopes(*events: engine.Event, first_second: int = 0) -> list[engine.EventEnvelope]:
    """The events with timestamps, one a second."""
    return [
        engine.EventEnvelope(at=EPOCH + timedelta(seconds=first_second + second), event=event)
        for second, event in enumerate(events)
    ]


def stage_started(stage: int, **fields: Any) -> engine.StageStarted:
    defaults = {"samples": 40, "temperature": 1.0, "kd_weight": 0.7, "steps": 10, "first_step": 10 * stage}
    return engine.StageStarted(stage=stage, **{**defaults, **fields})


def step_logged(step: int, **fields: Any) -> engine.StepLogged:
    defaults = {
        "total_steps": 20,
        "stage": (step - 1) // 10,
        "loss": 2.0,
        "cross_entropy": 2.5,
        "divergence": 0.5,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "temperature": 1.0,
        "kd_weight": 0.7,
        "tokens": 100,
        "tokens_seen": 150 * step,
        "tokens_per_second": 1000.0,
        "eta_seconds": 60.0,
    }
    return engine.StepLogged(step=step, **{**defaults, **fields})


def evaluated(**fields: Any) -> engine.Evaluated:
    defaults = {"subject": "stage", "stage": 0, "step": 10, "rows": 8, "rouge_l": 20.0, "exact_match": 0.0}
    return engine.Evaluated(**{**defaults, "cross_entropy": 2.0, "divergence": 0.3, **fields})
