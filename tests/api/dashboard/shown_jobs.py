"""A job with everything that its page shows, as a run would have left it."""

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from domain.artifacts import ArtifactStore
from domain.checkpoints.models import Checkpoint
from domain.db import Database
from domain.ids import new_id
from domain.jobs.models import Job, JobArtifact, JobAttempt, JobEvaluation, JobEvent, JobLog, JobMetric, JobStage
from domain.jobs.states import JobStatus, StageStatus
from pocl.samples.sample import Message, Sample

BEGAN = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
QUESTIONS = [
    ("What is the capital of Australia?", "Canberra is the capital of Australia."),
    ("Name a fruit that is yellow.", "A banana is yellow."),
    ("What does a thermometer measure?", "A thermometer measures temperature."),
    ("Write one sentence about rain.", "Rain falls from clouds and waters the fields."),
]
STAGES = ((30, 1.0, 0.7, 21.4), (55, 1.33, 0.8, 26.9), (80, 1.67, 0.9, 31.2), (110, 2.0, 1.0, 33.8))
STEPS = 25


def sample(number: int) -> Sample:
    question, answer = QUESTIONS[number % len(QUESTIONS)]
    return Sample((Message("user", f"{question} ({number})"), Message("assistant", answer)))


def ranking(count: int = 110) -> bytes:
    """A ranking of `count` samples, easy to hard."""
    rows = []
    for number in range(count):
        entropy = 0.4 + 3.4 * (number / count) ** 1.7 + 0.08 * math.sin(number)
        rows.append(
            {
                "row": number,
                "digest": sample(number).digest,
                "rouge_l": max(0.0, 62 - 0.55 * number),
                "cross_entropy": entropy,
                "response": "The capital of Australia is Australia." if number % 2 else "A banana is a fruit.",
                "rank": number + 1,
                "score": 1 / (61 + number),
            }
        )
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def result() -> bytes:
    """A result with answers of all models."""
    answers = [
        {
            "split": "validation",
            "prompt": question,
            "reference": answer,
            "answers": {
                "teacher": answer,
                "initial": f"{question.split()[0]} is {question.split()[0]} is",
                "final": said,
            },
            "unfinished_thoughts": [],
        }
        for (question, answer), said in zip(
            QUESTIONS,
            (
                "The capital of Australia is Canberra.",
                "A banana.",
                "A thermometer measures the temperature.",
                "Rain falls from the sky.",
            ),
            strict=True,
        )
    ]
    return json.dumps({"answers": answers}).encode()


def fill_job(
    database: Database, store: ArtifactStore, scratch: Path, job_id: str, *, steps: int, seed: int = 0
) -> None:
    """Give a job the history of a run of four stages of 25 steps that has done so many of them."""
    total = STEPS * len(STAGES)
    is_over = steps >= total
    with database.transaction(write=True) as session:
        for table in (JobStage, JobEvent):
            session.execute(sa.delete(table).where(table.job_id == job_id))
        rows: list[Any] = []
        for index, (samples, temperature, weight, rouge) in enumerate(STAGES):
            ended = steps >= (index + 1) * STEPS
            running = not ended and steps > index * STEPS
            status = StageStatus.SUCCEEDED if ended else StageStatus.RUNNING if running else StageStatus.PENDING
            rows.append(
                JobStage(
                    job_id=job_id,
                    index=index,
                    samples=samples,
                    temperature=temperature,
                    kd_weight=weight,
                    epochs=1,
                    steps=STEPS,
                    first_step=index * STEPS,
                    status=status,
                    evaluation={"rouge_l": rouge - seed} if ended else None,
                )
            )
            if ended:
                rows.append(_evaluation(job_id, "stage", (index + 1) * STEPS, index, rouge - seed))
                rows.append(_checkpoint(job_id, "stage", index, (index + 1) * STEPS))
        rows.append(_evaluation(job_id, "teacher", 0, None, 41.7))
        rows.append(_evaluation(job_id, "initial", 0, None, 9.8))
        for step in range(1, steps + 1):
            loss = 3.2 * math.exp(-step / 45) + 0.9 + 0.12 * math.sin(step * 1.7 + seed) + 0.1 * seed
            rows += [
                JobMetric(job_id=job_id, name=name, step=step, value=value)
                for name, value in (("loss", loss), ("cross_entropy", loss * 0.8), ("divergence", loss * 0.35))
            ]
        kinds = ("status", "phase_changed", "stage_started", "checkpoint", "evaluated")
        rows += [
            JobEvent(
                job_id=job_id,
                seq=number + 1,
                at=BEGAN + timedelta(seconds=17 * number),
                type=kinds[number % len(kinds)],
                data={"stage": number % 4, "step": 2 * number},
            )
            for number in range(12)
        ]
        rows.append(JobAttempt(job_id=job_id, number=1, worker="gpu-box-1", started_at=BEGAN))
        log = b"".join(
            b"step %d loss %.3f\n" % (step, 3.2 * math.exp(-step / 45) + 0.9) for step in range(1, steps + 1)
        )
        rows.append(JobLog(job_id=job_id, attempt=1, start=0, size=len(log), content=log))
        artifacts = {"ranking": ranking()}
        if is_over:
            rows.append(_evaluation(job_id, "final", total, None, STAGES[-1][3] - seed))
            rows.append(_checkpoint(job_id, "final", None, total))
            artifacts["result"] = result()
        for kind, content in artifacts.items():
            source = scratch / kind
            source.write_bytes(content)
            stored = store.publish_file(source, f"jobs/{job_id}/{kind}.json")
            rows.append(
                JobArtifact(
                    job_id=job_id,
                    kind=kind,
                    attempt=1,
                    store_key=f"jobs/{job_id}/{kind}.json",
                    size_bytes=stored.size,
                    sha256=stored.sha256,
                )
            )
        session.add_all(rows)
        session.execute(
            sa.update(Job)
            .where(Job.id == job_id)
            .values(
                status=JobStatus.SUCCEEDED if is_over else JobStatus.RUNNING,
                step=steps,
                total_steps=total,
                stages=len(STAGES),
                percent=100.0 * steps / total,
                token=1,
                event_seq=12,
                tokens_seen=steps * 8192,
                tokens_per_second=None if is_over else 5230.0,
                phase=None if is_over else "training",
                eta_seconds=None if is_over else 340.0,
                progress_at=BEGAN,
                started_at=BEGAN,
                finished_at=BEGAN + timedelta(minutes=14) if is_over else None,
                stored_bytes=1_340_000_000,
                version=Job.version + 1,
            )
        )


def _evaluation(job_id: str, subject: str, step: int, stage: int | None, rouge: float) -> JobEvaluation:
    return JobEvaluation(
        job_id=job_id,
        subject=subject,
        step=step,
        stage=stage,
        at=BEGAN + timedelta(seconds=step),
        rows=64,
        rouge_l=rouge,
        exact_match=rouge / 4,
        cross_entropy=4.6 - rouge / 16,
        divergence=None if subject == "teacher" else 2.1 - rouge / 30,
    )


def _checkpoint(job_id: str, kind: Any, stage: int | None, step: int) -> Checkpoint:
    checkpoint = new_id("ckpt")
    return Checkpoint(
        id=checkpoint,
        job_id=job_id,
        attempt=1,
        kind=kind,
        stage=stage,
        step=step,
        store_key=f"jobs/{job_id}/{checkpoint}",
        size_bytes=269_000_000,
        manifest_sha256="0" * 64,
    )
