"""The outbox: what is committed is told of, whatever commits first; and only to those who want to hear it."""

import json
from contextlib import ExitStack
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import Database
from domain.jobs.leases import settle
from domain.jobs.models import JobEvent
from domain.jobs.states import RELEASED, AttemptOutcome, EndReason, JobStatus
from domain.jobs.transitions import NewEvent, lock_job, record_events, transition
from domain.projects.repository import create_project
from domain.webhooks.event_types import MESSAGES
from domain.webhooks.models import WebhookDelivery
from domain.webhooks.outbox import empty_outbox, has_events
from domain.webhooks.repository import add_endpoint, database_time, update_endpoint
from tests.support.rows import add_job, claim_job

URL = "https://hooks.example/"


def add(session: Session, **columns: Any) -> str:
    fields = {"project": "default", "url": URL, "description": "", "events": None, "labels": {}, **columns}
    return add_endpoint(session, **fields).id


def write_messages(database: Database) -> list[tuple[str, str, str | None]]:
    """Empty the outbox; (endpoint, type, job) of all messages, oldest first."""
    with database.transaction(write=True) as session:
        empty_outbox(session, now=database_time(session))
    with database.transaction(write=False) as session:
        assert not has_events(session)
        rows = session.scalars(sa.select(WebhookDelivery).order_by(WebhookDelivery.id)).all()
        for row in rows:
            MESSAGES[row.type].model_validate_json(row.body)
        return [(row.endpoint_id, row.type, row.job_id) for row in rows]


def test_event_that_commits_late_is_told_of_too(database: Database, backend: str) -> None:
    with database.transaction(write=True) as session:
        add(session)
        late, early = add_job(session).id, add_job(session).id
    with ExitStack() as stack:
        if backend == "postgres":
            # SQLite has one writer at a time, so that nothing commits late there.
            slow = stack.enter_context(database.transaction(write=True))
            job = lock_job(slow, late)
            assert job is not None
            transition(slow, job, JobStatus.PREPARING)
        with database.transaction(write=True) as session:
            job = lock_job(session, early)
            assert job is not None
            transition(session, job, JobStatus.PREPARING)
        assert [told[2] for told in write_messages(database)] == [early]
    if backend == "sqlite":
        with database.transaction(write=True) as session:
            job = lock_job(session, late)
            assert job is not None
            transition(session, job, JobStatus.PREPARING)
    assert [told[2] for told in write_messages(database)] == [early, late]


def test_each_event_is_told_of_once(database: Database) -> None:
    with database.transaction(write=True) as session:
        add(session)
        transition(session, add_job(session), JobStatus.PREPARING)
    assert write_messages(database) == write_messages(database)


def test_the_end_of_a_push_is_told_of(database: Database) -> None:
    push = {"repo": "acme/student", "branch": "main", "checkpoint": "ckpt_1"}
    with database.transaction(write=True) as session:
        add(session, events=["job.published", "job.publication.failed"])
        job = record_events(
            session,
            add_job(session),
            [
                NewEvent("published", {**push, "url": "https://hub.example/acme/student", "commit": "c" * 40}),
                NewEvent("publication_failed", {**push, "error": {"code": "hub_busy", "message": "It is."}}),
            ],
            token=None,
        )
    assert [told[1:] for told in write_messages(database)] == [
        ("job.published", job.id),
        ("job.publication.failed", job.id),
    ]
    with database.transaction(write=False) as session:
        bodies = session.scalars(sa.select(WebhookDelivery.body).order_by(WebhookDelivery.id)).all()
    published, failed = (json.loads(body)["data"]["publication"] for body in bodies)
    assert (published["commit"], published["error"]) == ("c" * 40, None)
    assert (failed["url"], failed["error"]["code"]) == (None, "hub_busy")


def test_only_those_hear_of_an_event_who_want_to(database: Database) -> None:
    with database.transaction(write=True) as session:
        everything = add(session)
        started = add(session, events=["job.started"])
        labelled = add(session, labels={"team": "search", "env": "test"})
        add(session, events=["job.failed"])
        add(session, labels={"team": "ads"})
        create_project(session, "other")
        add(session, project="other")
        disabled = add(session)
        update_endpoint(session, "default", disabled, {"status": "disabled"})
        job = add_job(session, labels={"team": "search", "env": "test", "more": "x"})
        transition(session, job, JobStatus.PREPARING)
    assert {told[0] for told in write_messages(database)} == {everything, started, labelled}


def test_life_of_a_job_is_told_of_by_its_types(database: Database) -> None:
    with database.transaction(write=True) as session:
        add(session)
    claim = claim_job(database)
    with database.transaction(write=True) as session:
        job = lock_job(session, claim.job_id)
        assert job is not None
        job = transition(session, job, JobStatus.RUNNING, token=claim.token)
        events = [
            NewEvent("stage_started", {"stage": 0}),
            NewEvent("stage_finished", {"stage": 0, "step": 10, "epochs": 1, "kept_epoch": None}),
            NewEvent("checkpoint", {"id": "ckpt_1", "kind": "stage", "step": 10, "stage": 0, "size_bytes": 2**40}),
            NewEvent("warning", {"code": "x", "message": "y"}),
        ]
        job = record_events(session, job, events, token=claim.token)
        transition(session, job, JobStatus.PAUSING)
        settle(session, claim, AttemptOutcome.released(RELEASED))
        job = lock_job(session, claim.job_id)
        assert job is not None
        job = transition(session, job, JobStatus.QUEUED)
        reason = EndReason("max_wait_exceeded", "No worker took it.", "capacity", True, "Wait longer.")
        transition(session, job, JobStatus.FAILED, reason=reason)
    assert [told[1] for told in write_messages(database)] == [
        "job.started",
        "job.running",
        "job.stage.completed",
        "job.checkpoint.created",
        "job.paused",
        "job.resumed",
        "job.failed",
    ]


def test_event_of_another_version_holds_up_no_other(database: Database) -> None:
    with database.transaction(write=True) as session:
        add(session)
        job = record_events(session, add_job(session), [NewEvent("checkpoint", {"id": "ckpt_1"})], token=None)
        transition(session, job, JobStatus.PREPARING)
    assert [told[1] for told in write_messages(database)] == ["job.started"]


def test_messages_that_wait_for_an_endpoint_are_bounded(database: Database) -> None:
    with database.transaction(write=True) as session:
        add(session)
        for _ in range(4):
            transition(session, add_job(session), JobStatus.PREPARING)
        empty_outbox(session, now=database_time(session), max_pending=2)
    with database.transaction(write=False) as session:
        rows = session.scalars(sa.select(WebhookDelivery).order_by(WebhookDelivery.id)).all()
        assert [(row.status, row.failure) for row in rows] == [
            *[("pending", None)] * 2,
            *[("failed", "backlog_full")] * 2,
        ]


def test_events_that_nobody_can_hear_of_do_not_enter(database: Database) -> None:
    with database.transaction(write=True) as session:
        job = record_events(session, add_job(session), [NewEvent("warning", {}), NewEvent("phase", {})], token=None)
        assert job.event_seq == 2
    with database.transaction(write=False) as session:
        assert not has_events(session)
        assert session.scalars(sa.select(JobEvent.in_outbox)).all() == [False, False]
