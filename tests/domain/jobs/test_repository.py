"""Queries for jobs."""

import sqlite3
from itertools import pairwise
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domain.db import Database
from domain.errors import JobNotFound
from domain.jobs.event_recorder import apply_events
from domain.jobs.leases import claim_next
from domain.jobs.models import METRICS, Job, JobMetric
from domain.jobs.queue import queue_position
from domain.jobs.repository import (
    count_queued_jobs,
    get_job,
    list_events,
    list_jobs,
    list_other_jobs_needing,
    metric_series,
    newest_metrics,
)
from domain.jobs.states import JobStatus
from domain.schema import upgrade
from domain.settings import Settings
from tests.domain.jobs.test_queue import position_of
from tests.support.rows import SPEC, add_job, claim_job, envelopes, save_checkpoint, set_status, step_logged


def test_a_job_of_another_project_is_not_found(database: Database) -> None:
    with database.transaction(write=True) as session:
        job = add_job(session, project="theirs")
        assert get_job(session, "theirs", job.id).id == job.id
        with pytest.raises(JobNotFound):
            get_job(session, "mine", job.id)


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_pages_hold_every_job_once_newest_first(database: Database, limit: int) -> None:
    with database.transaction(write=True) as session:
        added = [add_job(session).id for _ in range(7)]
        add_job(session, project="theirs")
    listed: list[str] = []
    has_more = True
    while has_more:
        with database.transaction(write=False) as session:
            page = list_jobs(session, "default", limit=limit, after=listed[-1] if listed else None)
        assert len(page.rows) <= limit
        listed += [job.id for job in page.rows]
        has_more = page.has_more
    assert listed == added[::-1]


def test_a_page_after_a_deleted_job_continues_behind_it(database: Database) -> None:
    with database.transaction(write=True) as session:
        old, gone, _new = (add_job(session) for _ in range(3))
        session.delete(gone)
        session.flush()
        page = list_jobs(session, "default", limit=10, after=gone.id)
    assert [job.id for job in page.rows] == [old.id]


def test_lists_are_filtered_by_status_and_by_all_labels(database: Database) -> None:
    with database.transaction(write=True) as session:
        both = add_job(session, labels={"team": "nlp", "run.no": "7"})
        add_job(session, labels={"team": "nlp"})
        set_status(session, add_job(session, labels={"team": "nlp", "run.no": "7"}).id, JobStatus.RUNNING)
        page = list_jobs(
            session,
            "default",
            limit=10,
            statuses=[JobStatus.QUEUED, JobStatus.PAUSED],
            labels={"team": "nlp", "run.no": "7"},
        )
    assert [job.id for job in page.rows] == [both.id]


@pytest.mark.parametrize("key", ['a"b', "a.b[0]", "", "$", "'; --", "a b"])
def test_an_invalid_label_key_matches_no_job(database: Database, key: str) -> None:
    with database.transaction(write=True) as session:
        add_job(session, labels={"a": "x"})
        assert list(list_jobs(session, "default", limit=10, labels={key: "x"}).rows) == []


def test_events_are_listed_after_a_sequence_number(database: Database) -> None:
    claim = claim_job(database)
    with database.transaction(write=True) as session:
        apply_events(session, claim, envelopes(step_logged(1)), offset=1)
    with database.transaction(write=False) as session:
        assert [event.seq for event in list_events(session, claim.job_id, after=1, limit=5).rows] == [2]
        assert list_events(session, claim.job_id, limit=1).has_more


def test_positions_in_one_project_are_the_order_of_the_claims(database: Database) -> None:
    with database.transaction(write=True) as session:
        jobs = [add_job(session, priority=priority) for priority in (0, 5, 0, 9)]
        positions = [(position_of(session, job).position, job.id) for job in jobs]
    assert [position for position, _ in sorted(positions)] == [1, 2, 3, 4]
    for _, expected in sorted(positions):
        with database.transaction(write=True) as session:
            claim = claim_next(session, worker="worker-1", lease_seconds=60)
            assert claim is not None
            assert claim.job_id == expected
            assert queue_position(session, session.get_one(Job, expected), worker_seconds=60) is None


def test_queued_jobs_are_counted_for_all_and_for_a_project(database: Database) -> None:
    with database.transaction(write=True) as session:
        add_job(session)
        add_job(session, project="theirs")
        set_status(session, add_job(session).id, JobStatus.RUNNING)
        assert (count_queued_jobs(session), count_queued_jobs(session, project="theirs")) == (2, 1)


@pytest.mark.parametrize("points", [1, 2, 5, 19, 20, 100])
def test_a_series_is_downsampled_and_keeps_both_ends(database: Database, points: int) -> None:
    claim = claim_job(database)
    with database.transaction(write=True) as session:
        apply_events(session, claim, envelopes(*(step_logged(step, loss=step) for step in range(1, 21))), offset=1)
        (series,) = metric_series(session, claim.job_id, names=["loss"], points=points)
    assert (series.steps[0], series.steps[-1]) == (1, 20)
    assert list(series.values) == [float(step) for step in series.steps]
    assert len(series.steps) <= points + 1
    assert len(series.steps) == 20 or points < 20


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(0, 300), min_size=1, max_size=60), st.integers(1, 40))
def test_any_series_is_thinned_evenly_and_whole_where_it_is_short(
    database: Database, steps: set[int], points: int
) -> None:
    with database.transaction(write=True) as session:
        session.execute(sa.delete(Job))
        job = add_job(session)
        rows = [{"job_id": job.id, "name": "loss", "step": step, "value": -step} for step in steps]
        session.execute(sa.insert(JobMetric), rows)
        (series,) = metric_series(session, job.id, points=points)
    assert set(series.steps) <= steps
    assert list(series.values) == [-step for step in series.steps]
    assert (series.steps[0], series.steps[-1]) == (min(steps), max(steps))
    assert len(series.steps) <= points + 1
    if len(steps) <= points:
        assert set(series.steps) == steps
    elif len(series.steps) > 2:
        # No two lie nearer than the stride, but for the last one.
        stride = (max(steps) - min(steps) + points) // points
        assert min(after - before for before, after in pairwise(series.steps[:-1])) >= stride


def test_reading_metrics_costs_as_much_for_a_long_job_as_for_a_short_one(tmp_path: Path) -> None:
    # On SQLite, whose machine counts its steps.
    service = Settings(home=tmp_path)
    upgrade(service)
    database = Database(service.database_url)
    costs = [_cost_of_metrics(database, steps) for steps in (200, 1500)]
    database.close()
    assert all(for_long < 2 * for_short for for_short, for_long in zip(*costs, strict=True))


def _cost_of_metrics(database: Database, steps: int) -> list[int]:
    """The hundreds of steps of SQLite's machine that a thinned series and the newest values take."""
    with database.transaction(write=True) as session:
        job = add_job(session, step=steps)
        numbered = [(name, step) for name in METRICS for step in range(1, steps + 1)]
        rows = [{"job_id": job.id, "name": name, "step": step, "value": 1.0} for name, step in numbered]
        session.execute(sa.insert(JobMetric), rows)
    costs = []
    with database.transaction(write=False) as session:
        driver = session.connection().connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        for read in (lambda: metric_series(session, job.id, points=50), lambda: newest_metrics(session, job)):
            counted = []
            driver.set_progress_handler(lambda: counted.append(0), 100)  # noqa: B023 # It is taken away below.
            assert len(read()) == len(METRICS)
            driver.set_progress_handler(None, 0)
            costs.append(len(counted) + 1)
    return costs


def test_a_series_is_cut_to_a_range_of_steps(database: Database) -> None:
    claim = claim_job(database)
    with database.transaction(write=True) as session:
        apply_events(session, claim, envelopes(*map(step_logged, range(1, 21))), offset=1)
        series = metric_series(session, claim.job_id, points=100, from_step=5, to_step=8)
    assert {each.steps for each in series} == {(5, 6, 7, 8)}


def test_jobs_need_their_teacher_and_student_until_they_end(database: Database) -> None:
    saved = {
        name: save_checkpoint(database, claim_job(database), "final", 20) for name in ("teacher", "student", "other")
    }
    with database.transaction(write=True) as session:
        jobs = {
            role: add_job(session, posted_spec={**SPEC, role: {"checkpoint": saved[role].id}}).id
            for role in ("teacher", "student")
        }
        for name, checkpoint in saved.items():
            assert list_other_jobs_needing(session, checkpoint) == ([jobs[name]] if name in jobs else [])
        set_status(session, jobs["student"], JobStatus.FAILED)
        assert list_other_jobs_needing(session, saved["student"]) == []


def test_an_ended_job_without_a_state_of_its_own_needs_the_one_that_it_started_from(database: Database) -> None:
    state = save_checkpoint(database, claim_job(database), "stage", 10)
    child = claim_job(database, starts_from=state.id)
    with database.transaction(write=True) as session:
        set_status(session, child.job_id, JobStatus.CANCELLED)
        # A retry of it starts there.
        assert list_other_jobs_needing(session, state) == [child.job_id]
        set_status(session, child.job_id, JobStatus.PREPARING)
    save_checkpoint(database, child, "training", 15)
    with database.transaction(write=True) as session:
        assert list_other_jobs_needing(session, state) == [child.job_id]
        set_status(session, child.job_id, JobStatus.CANCELLED)
        assert list_other_jobs_needing(session, state) == []
