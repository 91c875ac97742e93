"""What the clients of `python -m bench api` meet: jobs by the thousand, a history that grows, a large file."""

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bench.server import AUTHORIZATION
from domain.db import Database
from domain.ids import new_id
from domain.jobs.leases import Claim, claim_next, settle
from domain.jobs.models import Job, JobArtifact
from domain.jobs.states import SUCCEEDED, AttemptOutcome, JobStatus
from domain.jobs.transitions import NewEvent, lock_claimed_job, record_events

_MODEL = {"random": {"layers": 4, "hidden_size": 128, "heads": 4}}


def post(port: int, path: str, body: Any, media_type: str = "application/json") -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=content,
        headers={"content-type": media_type, "authorization": AUTHORIZATION},
        method="POST",
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        made: dict[str, Any] = json.load(answer)
        return made


def get(port: int, path: str) -> tuple[dict[str, Any], str]:
    """The answer and its tag."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"authorization": AUTHORIZATION})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer), answer.headers["etag"]


def submission(port: int) -> dict[str, Any]:
    """A job that can be posted, over a data set that is there."""
    rows = (json.dumps({"instruction": f"Count to {n}", "output": f"{n} " * 60}) + "\n" for n in range(256))
    dataset = post(port, "/v1/datasets", "".join(rows).encode(), "application/jsonl")["id"]
    spec = {"preset": "quick", "teacher": _MODEL, "student": _MODEL, "data": {"train": {"dataset": dataset}}}
    return {"spec": spec}


def add_ended(database: Database, like: str, count: int) -> None:
    """More jobs, that have ended: they are in lists, and not in the queue."""
    with database.transaction(write=True) as session:
        first = session.get_one(Job, like)
        shared = {"posted_spec": first.posted_spec, "spec": first.spec, "total_steps": 10, "stages": 2}
        ended = {"status": JobStatus.SUCCEEDED, "end_reason": SUCCEEDED.as_json()}
        session.execute(sa.insert(Job), [{"id": new_id("job"), **shared, **ended} for _ in range(count)])


def claim(database: Database) -> Claim:
    with database.transaction(write=True) as session:
        held = claim_next(session, worker="bench", lease_seconds=3600)
    assert held is not None
    return held


def happen(database: Database, held: Claim, events: int, every_seconds: float) -> None:
    """Write events that say when they were written, then end the job."""
    for _ in range(events):
        with database.transaction(write=True) as session:
            job = lock_claimed_job(session, held.job_id, held.token)
            record_events(session, job, [NewEvent("note", {"sent": time.time()})], token=held.token)
        time.sleep(every_seconds)
    with database.transaction(write=True) as session:
        settle(session, held, AttemptOutcome.succeeded())


def add_file(database: Database, artifacts: Path, job_id: str, size_bytes: int) -> None:
    """A result of zeros, which take no room on the disk."""
    key = f"jobs/{job_id}/zeros.json"
    place = artifacts / key
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("wb") as file:
        file.truncate(size_bytes)
    with database.transaction(write=True) as session:
        session.add(
            JobArtifact(job_id=job_id, kind="result", attempt=1, store_key=key, size_bytes=size_bytes, sha256="0" * 64)
        )
