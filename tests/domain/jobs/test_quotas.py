"""Quotas of projects: what waits, what is refused, and that the last place is given once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from domain.db import Database
from domain.errors import QuotaExceeded, Unauthenticated
from domain.jobs.leases import claim_next, settle
from domain.jobs.models import Job
from domain.jobs.queue import queue_position
from domain.jobs.quotas import admit_file, admit_job, admit_upload, quotas_of
from domain.jobs.states import AttemptOutcome, JobStatus
from domain.projects.models import Project
from domain.settings import Settings
from domain.workers.models import Device
from domain.workers.repository import register_worker
from tests.support.rows import add_job, insert_dataset


def set_quotas(database: Database, **columns: int) -> None:
    with database.transaction(write=True) as session:
        session.execute(sa.update(Project).where(Project.id == "default").values(**columns))


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(home=tmp_path, database_url=database_url)


def test_a_job_beyond_the_running_quota_waits_and_says_so(database: Database) -> None:
    set_quotas(database, max_jobs_running=1)
    with database.transaction(write=True) as session:
        register_worker(session, "w", [Device("cpu", "cpu", None)])
        for name in ("job_a", "job_b"):
            add_job(session, id=name)
        add_job(session, id="job_other", project="other")
        claim = claim_next(session, worker="w", lease_seconds=60)
    assert claim is not None
    assert claim.job_id == "job_a"
    with database.transaction(write=False) as session:
        waiting = queue_position(session, session.get_one(Job, "job_b"), worker_seconds=60)
    assert waiting is not None
    assert (waiting.reason, waiting.ahead, waiting.starts_at) == ("project_quota", 1, None)
    with database.transaction(write=True) as session:
        second = claim_next(session, worker="v", lease_seconds=60)
        assert second is not None
        assert second.job_id == "job_other"
        assert claim_next(session, worker="u", lease_seconds=60) is None
        settle(session, claim, AttemptOutcome.succeeded())
        third = claim_next(session, worker="u", lease_seconds=60)
    assert third is not None
    assert third.job_id == "job_b"


def test_workers_that_claim_at_once_keep_the_running_quota(database: Database) -> None:
    set_quotas(database, max_jobs_running=2)
    with database.transaction(write=True) as session:
        for _ in range(6):
            add_job(session)

    def claim(number: int) -> bool:
        with database.transaction(write=True) as session:
            return claim_next(session, worker=f"w{number}", lease_seconds=60) is not None

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(claim, range(6))) == 2
    with database.transaction(write=False) as session:
        held = session.scalar(sa.select(sa.func.count()).where(Job.status == JobStatus.PREPARING))
    assert held == 2


def test_the_last_byte_of_storage_is_given_once(database: Database) -> None:
    set_quotas(database, max_storage_bytes=3000)

    def store(_number: int) -> bool:
        try:
            with database.transaction(write=True) as session:
                admit_file(session, "default", 1000)
                insert_dataset(session)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(store, range(6))) == 3


def test_full_storage_refuses_uploads_and_submissions(database: Database, settings: Settings) -> None:
    set_quotas(database, max_storage_bytes=1000, max_uploads=5)
    with database.transaction(write=True) as session:
        assert admit_upload(session, "default") == 5
        admit_job(session, settings, "default")
        insert_dataset(session)
        with pytest.raises(QuotaExceeded, match="1000 of the 1000 bytes"):
            admit_upload(session, "default")
        with pytest.raises(QuotaExceeded, match="bytes"):
            admit_job(session, settings, "default")


def test_a_quota_of_its_own_counts_before_that_of_the_settings(database: Database, settings: Settings) -> None:
    with database.transaction(write=False) as session:
        assert quotas_of(session, settings, "default").jobs_queued.limit == settings.max_jobs_queued
    set_quotas(database, max_jobs_queued=0)
    with database.transaction(write=True) as session, pytest.raises(QuotaExceeded, match="0 queued jobs"):
        admit_job(session, settings, "default")


def test_nothing_is_added_to_a_deleted_project(database: Database, settings: Settings) -> None:
    with database.transaction(write=True) as session, pytest.raises(Unauthenticated):
        admit_job(session, settings, "gone")
