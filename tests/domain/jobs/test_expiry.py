"""A retention policy deletes what has expired, and never what a live job, a retry, a branch or a pin needs."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from domain.checkpoints.models import Checkpoint, CheckpointTombstone
from domain.db import Database, db_now
from domain.ids import new_id
from domain.jobs import expiry
from domain.jobs.dataset_deletion import delete_dataset
from domain.jobs.models import Job, JobAttempt, JobEvent, JobLog, JobMetric
from domain.jobs.states import JobStatus
from domain.retention.models import RetentionPolicy
from domain.retention.repository import get_policy, list_policies, set_policy
from domain.workers.repository import take_duty
from pocl.events import RESUMABLE_KINDS, CheckpointKind
from pocl.spec import resolve
from tests.support.rows import SPEC, add_job, insert_dataset

RESOLVED: Final = resolve(SPEC).model_dump(mode="json")
KINDS: Final[tuple[CheckpointKind, ...]] = ("training", "stage", "best", "final")
PIN: Final = "a pin"
"""In place of the id of a job that needs a checkpoint."""


@pytest.fixture(scope="module")
def shared(shared_database_url: str) -> Iterator[Database]:
    database = Database(shared_database_url)
    yield database
    database.close()


class RolledBack(Exception):
    """Ends the transaction of an example without a trace."""


@contextmanager
def rolled_back(database: Database) -> Iterator[Session]:
    with suppress(RolledBack), database.transaction(write=True) as session:
        yield session
        raise RolledBack


# --- Any lineage, any order ---------------------------------------------------------------------------------


class World:
    """Jobs that are submitted, retried, branched, trained and ended, and checkpoints that are saved and pinned."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def jobs(self, *, live: bool | None = None) -> list[Job]:
        rows = self.session.scalars(sa.select(Job).order_by(Job.id)).all()
        return [job for job in rows if live is None or job.ended is not live]

    def checkpoints(self) -> list[Checkpoint]:
        return list(self.session.scalars(sa.select(Checkpoint).order_by(Checkpoint.id)))

    def submit(self, **columns: Any) -> Job:
        job = Job(id=new_id("job"), posted_spec=SPEC, **{"spec": RESOLVED, **columns})
        self.session.add(job)
        self.session.flush()
        return job

    def submit_with_teacher(self, checkpoint: Checkpoint) -> None:
        self.submit(spec={**RESOLVED, "teacher": {"checkpoint": checkpoint.id}})

    def descend(self, parent: Job, column: str) -> None:
        own = [each for each in self.checkpoints() if each.job_id == parent.id and each.kind in RESUMABLE_KINDS]
        start = max(own, key=lambda each: (each.step, each.id)).id if own else parent.starts_from
        self.submit(**{column: parent.id, "starts_from": start})

    def save(self, job: Job, kind: CheckpointKind, step: int) -> None:
        checkpoint_id = new_id("ckpt")
        self.session.add(
            Checkpoint(
                id=checkpoint_id, job_id=job.id, attempt=1, kind=kind, step=step, store_key=f"jobs/{checkpoint_id}",
                size_bytes=1, manifest_sha256="",
            )
        )  # fmt: skip
        self.session.flush()

    def end(self, job: Job, days: int) -> None:
        now = self.session.scalars(sa.select(db_now())).one()
        job.status, job.finished_at = JobStatus.FAILED, now - timedelta(days=days)
        self.session.flush()

    def needed(self) -> dict[str, set[str]]:
        """The ids of the checkpoints that must stay, by a plain reading of the law, each with the ids of the jobs that
        need it, or :data:`PIN`.
        """
        jobs, checkpoints = {job.id: job for job in self.jobs()}, self.checkpoints()
        with_state = {each.job_id for each in checkpoints if each.kind in RESUMABLE_KINDS}
        needed: dict[str, set[str]] = {each.id: set() for each in checkpoints}
        for each in checkpoints:
            if each.pinned:
                needed[each.id].add(PIN)
            if each.kind in RESUMABLE_KINDS and not jobs[each.job_id].ended:
                needed[each.id].add(each.job_id)
        for job in jobs.values():
            if not job.ended:
                needed.get(str((job.spec["teacher"] or {}).get("checkpoint")), set()).add(job.id)
            if job.starts_from is not None and (not job.ended or job.id not in with_state):
                needed.get(job.starts_from, set()).add(job.id)
        return {checkpoint: why for checkpoint, why in needed.items() if why}

    def collect(self, policy: RetentionPolicy) -> int:
        """Delete all that has expired, as the scheduler does; how many jobs it deleted something of."""
        deleted = 0
        now = self.session.scalars(sa.select(db_now())).one()
        for job in expiry.list_ended_jobs(self.session, {"default": policy}, limit=100):
            expired = expiry.find_expired(self.session, job, policy, now)
            if expired is None:
                continue
            deleted += 1
            if expired.whole:
                assert expiry.delete_expired_job(self.session, job.id, policy) == f"jobs/{job.id}"
                continue
            assert expiry.delete_expired_checkpoints(self.session, job.id, policy) == len(expired.checkpoints)
            while expired.history and expiry.delete_history(self.session, job.id, policy):
                pass
        self.session.expire_all()
        return deleted


DAYS = st.none() | st.integers(0, 3)
POLICIES = st.builds(
    RetentionPolicy,
    checkpoint_days=DAYS,
    keep_last=st.integers(0, 3),
    keep_best=st.booleans(),
    history_days=DAYS,
    job_days=DAYS,
)
OPERATIONS = st.sampled_from(
    ("submit", "teacher", "retry", "branch", "save", "save", "save", "end", "end", "pin", "unpin", "own", "collect")
)


def operate(world: World, operation: str, data: st.DataObject) -> None:
    jobs, live, ended, saved = world.jobs(), world.jobs(live=True), world.jobs(live=False), world.checkpoints()
    if operation == "submit":
        world.submit()
    elif operation == "teacher" and saved:
        world.submit_with_teacher(data.draw(st.sampled_from(saved)))
    elif operation == "retry" and ended:
        world.descend(data.draw(st.sampled_from(ended)), "retry_of")
    elif operation == "branch" and jobs:
        world.descend(data.draw(st.sampled_from(jobs)), "branch_of")
    elif operation == "save" and live:
        kind, step = data.draw(st.sampled_from(KINDS)), data.draw(st.integers(1, 9))
        world.save(data.draw(st.sampled_from(live)), kind, step)
    elif operation == "end" and live:
        world.end(data.draw(st.sampled_from(live)), data.draw(st.integers(0, 4)))
    elif operation in ("pin", "unpin") and saved:
        data.draw(st.sampled_from(saved)).pinned = operation == "pin"
        world.session.flush()
    elif operation == "own" and jobs:
        data.draw(st.sampled_from(jobs)).retention = {"job_days": data.draw(DAYS), "keep_last": 0}
        world.session.flush()
    elif operation == "collect":
        collect_and_check(world, data.draw(POLICIES))


def collect_and_check(world: World, policy: RetentionPolicy) -> None:
    needed, live = world.needed(), {job.id for job in world.jobs(live=True)}
    before = {each.id: each for each in world.checkpoints()}
    job_of = {each.id: each.job_id for each in before.values()}
    set_policy(world.session, "default", policy)
    now = world.session.scalars(sa.select(db_now())).one()
    times = expiry.expiry_times(world.session, "default", list(before.values()))
    passes = 0
    while world.collect(policy):
        # Each pass deletes something for good, so that there is an end.
        passes += 1
        assert passes <= 50
    after = {each.id for each in world.checkpoints()}
    jobs = {job.id for job in world.jobs()}
    # What an ended job needs may go with it.
    assert {each for each, why in needed.items() if why & {*jobs, PIN}} <= after
    # What a client was told goes, and of what it was told to keep at most what the deletion of others has freed.
    due = {each for each, time in times.items() if time <= now}
    assert due.isdisjoint(needed.keys() | after)
    assert live <= jobs
    assert {job_of[each] for each in before.keys() - after} & live == set()
    # Whoever descends from a job finds it.
    assert {job.parent_job_id for job in world.jobs()} - {None} <= jobs
    buried = set(world.session.scalars(sa.select(CheckpointTombstone.id)))
    assert before.keys() - after <= buried
    assert not after & buried


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(OPERATIONS, min_size=6, max_size=25), data=st.data())
def test_what_anything_needs_stays_whatever_the_lineage(
    shared: Database, operations: list[str], data: st.DataObject
) -> None:
    with rolled_back(shared) as session:
        world = World(session)
        for operation in operations:
            operate(world, operation, data)
        collect_and_check(world, data.draw(POLICIES))


# --- One thing at a time ------------------------------------------------------------------------------------


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    with database.transaction(write=True) as session:
        yield World(session)


def test_state_that_an_ended_retry_needs_goes_after_the_retry(world: World) -> None:
    parent = world.submit()
    world.save(parent, "training", 1)
    world.end(parent, 4)
    world.descend(parent, "retry_of")
    (retry,) = world.jobs(live=True)
    collect_and_check(world, RetentionPolicy(job_days=0))
    assert len(world.checkpoints()) == 1
    world.end(retry, 4)
    collect_and_check(world, RetentionPolicy(job_days=0))
    assert (world.jobs(), world.checkpoints()) == ([], [])


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [
        (0, False, set()),
        (0, True, {("best", 6)}),
        (1, False, {("final", 9)}),
        (2, True, {("final", 9), ("stage", 9), ("best", 6)}),
        (4, False, {("final", 9), ("stage", 9), ("training", 8), ("stage", 6)}),
        (6, False, {("final", 9), ("stage", 9), ("training", 8), ("stage", 6), ("stage", 3)}),
    ],
)
def test_the_last_and_the_best_checkpoints_of_an_ended_job_stay(
    world: World, keep_last: int, keep_best: bool, kept: set[tuple[str, int]]
) -> None:
    job = world.submit()
    saved: tuple[tuple[CheckpointKind, int], ...] = (
        ("stage", 3), ("best", 3), ("stage", 6), ("best", 6), ("training", 8), ("stage", 9), ("final", 9)
    )  # fmt: skip
    for kind, step in saved:
        world.save(job, kind, step)
    world.end(job, days=5)
    policy = RetentionPolicy(checkpoint_days=6, keep_last=keep_last, keep_best=keep_best)
    set_policy(world.session, "default", policy)
    assert job.finished_at is not None
    times = expiry.expiry_times(world.session, "default", world.checkpoints())
    assert set(times.values()) <= {job.finished_at + timedelta(days=6)}
    assert {(each.kind, each.step) for each in world.checkpoints() if each.id not in times} == kept
    assert world.collect(policy) == 0
    assert world.collect(replace(policy, checkpoint_days=5)) == 1
    assert {(each.kind, each.step) for each in world.checkpoints()} == kept


def test_the_history_of_an_ended_job_goes_but_for_its_changes_of_state_and_its_newest_event(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiry, "HISTORY_CHUNK", 4)
    job = world.submit(event_seq=12)
    types = ["status", *["phase"] * 9, "status", "changed"]
    session = world.session
    session.add_all(JobEvent(job_id=job.id, seq=seq, type=each, data={}) for seq, each in enumerate(types, start=1))
    session.add_all(JobMetric(job_id=job.id, name="loss", step=step, value=1) for step in range(1, 8))
    session.add(JobAttempt(job_id=job.id, number=1, worker="w", log_tail="a secret of the data"))
    session.add(JobLog(job_id=job.id, attempt=1, start=0, size=1, content=b"a"))
    world.end(job, days=2)
    assert world.collect(RetentionPolicy(history_days=3)) == 0
    assert [world.collect(RetentionPolicy(history_days=2)) for _ in range(2)] == [1, 0]
    left = session.execute(sa.select(JobEvent.seq, JobEvent.type).order_by(JobEvent.seq)).all()
    assert [tuple(row) for row in left] == [(1, "status"), (11, "status"), (12, "changed")]
    assert session.scalars(sa.select(JobMetric)).all() == []
    assert session.scalars(sa.select(JobAttempt.log_tail)).all() == [""]
    assert session.scalars(sa.select(JobLog)).all() == []
    assert session.get_one(Job, job.id).history_deleted_at is not None


def test_fields_of_a_job_take_the_place_of_the_projects(world: World) -> None:
    kept, gone = world.submit(retention={"job_days": None}), world.submit()
    own = world.submit(project="silent", retention={"job_days": 1})
    for job in (kept, gone, own):
        world.end(job, days=2)
    assert world.collect(RetentionPolicy(job_days=2)) == 2
    assert [job.id for job in world.jobs()] == [kept.id]


def test_a_data_set_goes_that_no_job_has_named_for_so_long(world: World) -> None:
    session = world.session
    unused, used, ended_long_ago, _recent = (insert_dataset(session).id for _ in range(4))
    now = session.scalars(sa.select(db_now())).one()
    for dataset_id in (unused, used, ended_long_ago):
        session.execute(
            sa.text("UPDATE datasets SET created_at = :at WHERE id = :id").bindparams(
                sa.bindparam("at", now - timedelta(days=9), Job.created_at.type), id=dataset_id
            )
        )
    for dataset_id, days in ((used, 3), (ended_long_ago, 5)):
        job = add_job(session, posted_spec={**SPEC, "data": {"train": {"dataset": dataset_id}}})
        world.end(job, days=days)

    def expired(days: int | None) -> list[str]:
        policy = RetentionPolicy(dataset_days=days)
        return [each.id for each in expiry.list_unused_datasets(session, "default", policy, limit=9)]

    assert expired(None) == []
    assert expired(10) == []
    assert expired(4) == [unused, ended_long_ago]
    assert expired(2) == [unused, used, ended_long_ago]
    delete_dataset(session, "default", unused)
    assert expired(4) == [ended_long_ago]


def test_a_policy_is_of_its_project(database: Database) -> None:
    policy = RetentionPolicy(checkpoint_days=30, keep_last=2)
    with database.transaction(write=True) as session:
        assert get_policy(session, "mine") == RetentionPolicy()
        set_policy(session, "mine", RetentionPolicy(job_days=1))
        set_policy(session, "mine", policy)
    with database.transaction(write=False) as session:
        assert (get_policy(session, "mine"), get_policy(session, "theirs")) == (policy, RetentionPolicy())
        assert list_policies(session) == {"mine": policy}


def test_one_scheduler_has_a_duty_until_its_lease_is_over(database: Database) -> None:
    def take(scheduler: str, seconds: float) -> bool:
        with database.transaction(write=True) as session:
            return take_duty(session, "expiry", scheduler, seconds=seconds)

    takes = [("a", 60.0), ("b", 60.0), ("a", -1.0), ("b", 60.0), ("a", 60.0)]
    assert [take(*each) for each in takes] == [True, False, True, True, False]
