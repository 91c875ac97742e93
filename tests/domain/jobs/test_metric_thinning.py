"""Metrics of long jobs: bounded, with the extremes, and the same whatever the batches and resumptions were."""

import itertools
import random

import pytest
import sqlalchemy as sa

from domain.db import Database
from domain.jobs import metric_thinning
from domain.jobs.event_recorder import apply_events
from domain.jobs.leases import Claim
from domain.jobs.metric_thinning import window_for
from domain.jobs.models import JobMetric
from domain.jobs.repository import metric_series
from tests.support.rows import claim_job, envelopes, reload_job, step_logged


def expected(values: dict[int, float], window: int, end: int) -> dict[int, float]:
    """The values that stay, by a plain reading of the law: four of each window before `end`, all after it."""
    kept = {step for step in values if step >= end}
    for _, steps in itertools.groupby(sorted(step for step in values if step < end), key=lambda step: step // window):
        inside = list(steps)
        least = min(inside, key=lambda step: (values[step], step))
        greatest = min(inside, key=lambda step: (-values[step], step))
        kept |= {inside[0], inside[-1], least, greatest}
    return {step: values[step] for step in sorted(kept)}


def losses(database: Database, claim: Claim) -> dict[int, float]:
    with database.transaction(write=False) as session:
        rows = session.execute(
            sa.select(JobMetric.step, JobMetric.value).where(JobMetric.job_id == claim.job_id, JobMetric.name == "loss")
        )
        return {row.step: row.value for row in rows}


@pytest.mark.parametrize("seed", [1, 2])
def test_thinned_metrics_follow_from_the_values_alone(
    database: Database, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    # The law at a hundredth of its size.
    for name, value in (("MAX_WHOLE_STEPS", 64), ("_MAX_WINDOWS", 8), ("_MIN_CHUNK", 16)):
        monkeypatch.setattr(metric_thinning, name, value)
    chance = random.Random(seed)
    # Equal values too: of those the first stays.
    values = {step: float(chance.randrange(12)) for step in range(1, 301)}
    claim, step, furthest, offset = claim_job(database), 0, 0, 0
    while step < 300:
        if chance.random() < 0.2:
            # The attempt resumed from an earlier step, and writes the steps after it again.
            step = chance.randrange(step + 1)
        batch = range(step + 1, min(300, step + chance.randrange(1, 40)) + 1)
        offset += 1
        with database.transaction(write=True) as session:
            apply_events(session, claim, envelopes(*(step_logged(n, loss=values[n]) for n in batch)), offset=offset)
        step = batch[-1]
        furthest = max(step, furthest)
        if furthest <= 64:
            assert losses(database, claim) == {n: values[n] for n in range(1, furthest + 1)}
    job, window = reload_job(database, claim), 64
    assert (job.metric_window, job.metrics_thinned_to) == (window, 256)
    assert losses(database, claim) == expected(values, window, 256)
    assert job.metrics_dropped >= 300 - len(losses(database, claim))
    with database.transaction(write=False) as session:
        (series,) = metric_series(session, claim.job_id, points=100, names=["loss"])
    assert (series.steps[0], series.steps[-1]) == (1, 300)


def test_windows_grow_so_that_rows_stay_bounded() -> None:
    assert [window_for(steps) for steps in (1, 8192, 8193, 16384, 16385, 10**6, 2**31)] == [1, 1, 8, 8, 16, 512, 2**20]
