"""Whose turn it is in the queue, why a job waits, and when it may start."""

from collections.abc import Sequence
from datetime import datetime, timedelta

import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from domain.db import Database, db_now
from domain.jobs.leases import Claim, claim_next, expire_waiting, settle
from domain.jobs.models import Job
from domain.jobs.queue import QueuePosition, memory_by_device_kind, queue_position
from domain.jobs.states import AttemptOutcome, JobStatus
from domain.workers.models import Device, Worker
from domain.workers.repository import accepts_jobs, delete_stale_workers, drain, live_workers, register_worker
from tests.support.rows import add_job

CPU = Device("cpu", "CPU", 8 << 30)
GPU = Device("cuda", "NVIDIA L4", 24 << 30)


def place_of(session: Session, job: Job) -> QueuePosition:
    place = queue_position(session, job, worker_seconds=60)
    assert place is not None
    return place


def minute_after(moment: datetime) -> datetime:
    whole = moment.replace(second=0, microsecond=0)
    return whole if whole == moment else whole + timedelta(minutes=1)


def claim(session: Session, worker: str = "w1") -> Claim | None:
    return claim_next(session, worker=worker, lease_seconds=60)


def claimed_in_order(session: Session) -> list[str]:
    return [each.job_id for each in iter(lambda: claim(session), None)]


def test_projects_take_turns_however_many_jobs_one_submits(database: Database) -> None:
    with database.transaction(write=True) as session:
        for number in range(4):
            add_job(session, id=f"job_greedy{number}", project="greedy")
        add_job(session, id="job_modest", project="modest")
        assert claimed_in_order(session)[:2] == ["job_greedy0", "job_modest"]


def test_priority_outranks_the_turn(database: Database) -> None:
    with database.transaction(write=True) as session:
        add_job(session, id="job_one", project="a", priority=5)
        add_job(session, id="job_two", project="a", priority=5)
        add_job(session, id="job_other", project="b")
        assert claimed_in_order(session) == ["job_one", "job_two", "job_other"]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1)), min_size=1, max_size=8))
def test_the_places_are_the_order_of_the_claims(database: Database, jobs: Sequence[tuple[str, int]]) -> None:
    with database.transaction(write=True) as session:
        session.execute(sa.delete(Job))
        made = [add_job(session, project=project, priority=priority) for project, priority in jobs]
        places = {job.id: place_of(session, job).position for job in made}
        assert sorted(places.values()) == list(range(1, len(made) + 1))
        order = claimed_in_order(session)
    assert [places[job] for job in order] == sorted(places.values())


def test_a_job_that_needs_more_memory_than_there_is_waits_for_a_larger_worker(database: Database) -> None:
    with database.transaction(write=True) as session:
        job = add_job(session, memory_bytes=9 << 30)
        small, large = memory_by_device_kind([{"kind": "cpu", "memory_bytes": 8 << 30}]), {"cpu": 16 << 30}
        assert claim_next(session, worker="small", lease_seconds=60, memory=small) is None
        register_worker(session, "small", [CPU])
        assert place_of(session, job).reason == "no_worker_fits"
        found = claim_next(session, worker="large", lease_seconds=60, memory=large)
    assert found is not None


def test_where_a_worker_has_a_gpu_a_job_for_any_device_runs_there(database: Database) -> None:
    memory = memory_by_device_kind(
        [{"kind": "cuda", "memory_bytes": 4}, {"kind": "cuda", "memory_bytes": 2}, {"kind": "cpu", "memory_bytes": 9}]
    )
    assert memory == {"cuda": 2, "cpu": 9}
    with database.transaction(write=True) as session:
        add_job(session, id="job_any", memory_bytes=5)
        add_job(session, id="job_cpu", memory_bytes=5, device="cpu")
        found = claim_next(session, worker="w", lease_seconds=60, memory=memory)
    assert found is not None
    assert found.job_id == "job_cpu"


def test_the_reason_says_what_is_missing(database: Database) -> None:
    with database.transaction(write=True) as session:
        first, second = add_job(session, device="cuda"), add_job(session, device="cuda")
        assert place_of(session, first).reason == "no_worker"
        register_worker(session, "w1", [CPU])
        assert place_of(session, first).reason == "no_worker_fits"
        register_worker(session, "w1", [CPU, GPU])
        assert (place_of(session, first).reason, place_of(session, second).reason) == (
            "waiting_for_worker",
            "jobs_ahead",
        )
        drain(session, "w1", "finish")
        assert place_of(session, first).reason == "no_worker"


def test_the_start_is_when_a_worker_comes_free(database: Database) -> None:
    with database.transaction(write=True) as session:
        register_worker(session, "w1", [CPU])
        now = session.scalars(sa.select(db_now())).one()
        running, first, second = (add_job(session) for _ in range(3))
        assert timedelta() <= (place_of(session, running).starts_at or now) - now < timedelta(minutes=2)
        claim(session)
        # Nothing is known of how long it takes.
        assert place_of(session, first).starts_at is None
        session.execute(sa.update(Job).where(Job.id == running.id).values(eta_seconds=600.0, progress_at=now))
        assert place_of(session, first).starts_at == minute_after(now + timedelta(seconds=600))
        assert place_of(session, second).starts_at is None
        hour = timedelta(hours=1)
        add_job(session, status=JobStatus.SUCCEEDED, started_at=now - hour, finished_at=now)
        assert place_of(session, second).starts_at == minute_after(now + timedelta(seconds=600) + hour)


def test_a_job_that_waited_too_long_fails_as_such(database: Database) -> None:
    with database.transaction(write=True) as session:
        late = add_job(session, waits_until=session.scalars(sa.select(db_now(-1))).one())
        add_job(session, waits_until=session.scalars(sa.select(db_now(60))).one())
        add_job(session)
        assert expire_waiting(session) == [late.id]
    with database.transaction(write=False) as session:
        row = session.get_one(Job, late.id)
    assert (row.status, (row.end_reason or {})["code"]) == (JobStatus.FAILED, "max_wait_exceeded")


def test_a_job_that_has_run_may_wait_for_as_long_as_it_takes(database: Database) -> None:
    with database.transaction(write=True) as session:
        add_job(session, waits_until=session.scalars(sa.select(db_now(60))).one())
        held = claim(session)
        assert held is not None
        settle(session, held, AttemptOutcome.released())
        session.execute(sa.update(Job).values(waits_until=db_now(-1)))
        assert expire_waiting(session) == []


# --- Workers ----------------------------------------------------------------------------------------------


def test_a_drained_worker_takes_nothing_until_it_may_again(database: Database) -> None:
    with database.transaction(write=True) as session:
        assert accepts_jobs(session, "w1")
        register_worker(session, "w1", [CPU])
        drain(session, "w1", "finish")
        # Its next heartbeat does not undo it.
        register_worker(session, "w1", [CPU])
        assert not accepts_jobs(session, "w1")
        drain(session, "w1", None)
        assert accepts_jobs(session, "w1")


def test_workers_that_are_not_heard_of_do_not_count_and_are_forgotten(database: Database) -> None:
    with database.transaction(write=True) as session:
        for name, age in (("alive", 0), ("silent", 120), ("gone", 100_000)):
            register_worker(session, name, [CPU])
            session.execute(sa.update(Worker).where(Worker.name == name).values(seen_at=db_now(-age)))
        assert [worker.name for worker in live_workers(session, 60)] == ["alive"]
        assert delete_stale_workers(session) == 1
        assert sorted(session.scalars(sa.select(Worker.name))) == ["alive", "silent"]
