"""`python -m bench scale` at the smallest size: its population is what it says, and every figure is measured."""

import sqlalchemy as sa

from bench.__main__ import COMMANDS
from bench.scale.fleet import Fleet, closed_loop
from bench.scale.population import Population, fill, table_sizes
from domain.db import Database
from domain.jobs.models import Job, JobStage
from domain.jobs.states import HELD, JobStatus


def test_a_population_grows_to_its_size_and_its_workers_claim_it(database: Database) -> None:
    if database.engine.dialect.name != "postgresql":
        # It is filled by functions of PostgreSQL.
        assert "PostgreSQL" in COMMANDS["scale"]
        return
    whole = Population(jobs=60, queued=20, projects=3, workers=4)
    for part in (whole.divided(2), whole):
        fill(database, part)
        with database.transaction(write=False) as session:
            counts = session.execute(sa.select(Job.status, sa.func.count().label("count_of")).group_by(Job.status))
            by_status = {row.status: row.count_of for row in counts}
            stages = session.scalar(sa.select(sa.func.count()).select_from(JobStage))
        # One is the job that the others are made of.
        assert by_status == {JobStatus.QUEUED: part.queued, JobStatus.SUCCEEDED: part.jobs - part.queued + 1}
        assert stages == 4 * part.jobs
    assert all(size > 0 for size in table_sizes(database).values())
    fleet = Fleet(database, whole.workers, clients=2)
    fleet.register_all()
    assert len(fleet.claim(60).seconds) == whole.workers
    with database.transaction(write=False) as session:
        held = session.scalars(sa.select(Job.project).where(Job.status.in_(HELD))).all()
    assert len(held) == whole.workers
    assert len(set(held)) == whole.projects
    for action in (fleet.heartbeat, fleet.register, fleet.report, lambda seconds: fleet.work(seconds, 1)):
        assert action(0.1).per_second > 0


def test_a_closed_loop_makes_each_call_once() -> None:
    numbers: list[int] = []
    timings = closed_loop(numbers.append, 4, count=50, seconds=60)
    assert sorted(numbers) == list(range(50))
    assert len(timings.seconds) == 50
