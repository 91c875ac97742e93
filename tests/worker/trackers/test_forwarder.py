"""What is forwarded to a tracker, whatever becomes of its client: each value once, and none lost."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa

from domain.db import db_now
from domain.jobs.lineage import RetryStart, create_descendant, plan_retry
from domain.jobs.models import METRICS, Job, JobMetric, JobStage
from domain.jobs.states import AttemptOutcome, EndReason, JobStatus
from domain.jobs.tracker_feed import TrackedPoint, TrackedRun, later_steps
from domain.trackers.models import JobTracker
from tests.support.harness import PROJECT
from tests.support.rows import evaluated, save_checkpoint
from tests.support.worker_actions import settle_attempt, succeed_job
from tests.worker.trackers.conftest import TrackedJobs
from worker.scratch_directory import ScratchDirectory
from worker.trackers.client import CannotTrack, OpenedRun
from worker.trackers.forwarder import TrackerForwarder, available_channels
from worker.trackers.process import TrackerProcess

LONG = 200
"""Seconds that no turn takes to begin, however slow the machine is."""
MLFLOW = {"kind": "mlflow", "experiment": "kd", "tags": {"team": "nlp"}}
DIVERGED = EndReason("training_diverged", "The loss is no number.", "user", False, "Lower the learning rate.")


class FakeTracker(TrackerProcess):
    """A tracker's server and its client in this process: what was sent stays, whatever becomes of the client."""

    def __init__(self, directory: Path) -> None:
        super().__init__("mlflow", directory, timeout_seconds=1, environ={})
        self.mode = ""
        """`die`: the client ends; `die_after`: it ends once the server has what was sent; `refuse`: it answers so."""
        self.opened: list[TrackedRun] = []
        self.sent: list[tuple[str, list[TrackedPoint]]] = []
        self.closed: list[tuple[str, str, Mapping[str, str]]] = []
        self.is_alive = False

    @property
    def pid(self) -> int | None:
        return 1 if self.is_alive else None

    def open(self, run: TrackedRun) -> OpenedRun:
        self._act("die", "refuse")
        self.opened.append(run)
        last_steps: dict[str, int] = {}
        for job_id, points in self.sent:
            if job_id == run.job_id:
                last_steps = later_steps(last_steps, points)
        return OpenedRun(f"run-{run.job_id}", "https://tracker.example/run", last_steps)

    def send(self, job_id: str, points: Sequence[TrackedPoint]) -> None:
        self._act("die", "refuse")
        self.sent.append((job_id, list(points)))
        self._act("die_after")

    def end_run(self, job_id: str, status: str, tags: Mapping[str, str]) -> Path | None:
        self._act("die", "refuse")
        self.closed.append((job_id, status, tags))
        return None

    def kill(self) -> None:
        self.is_alive = False

    def _act(self, *modes: str) -> None:
        self.is_alive = True
        if self.mode in modes:
            self.is_alive = self.mode == "refuse"
            raise CannotTrack("tracker_refused" if self.is_alive else "tracker_error", "It says no.")


@pytest.fixture
def tracker(tmp_path: Path) -> FakeTracker:
    return FakeTracker(tmp_path)


def sent(tracker: FakeTracker, job_id: str) -> list[tuple[str, int, float]]:
    """Every value that arrived, in the order in which it did."""
    return [
        (name, point.step, value)
        for job, points in tracker.sent
        if job == job_id
        for point in points
        for name, value in point.values.items()
    ]


def recorded(tracked: TrackedJobs, job_id: str) -> set[tuple[str, int, float]]:
    """What the metrics of the job have."""
    with tracked.harness.database.transaction(write=False) as session:
        rows = session.execute(
            sa.select(JobMetric.name, JobMetric.step, JobMetric.value).where(JobMetric.job_id == job_id)
        )
        return {(row.name, row.step, row.value) for row in rows}


def assert_sent_once(tracked: TrackedJobs, tracker: FakeTracker, job_id: str) -> None:
    values = [each for each in sent(tracker, job_id) if each[0] in METRICS]
    assert len(values) == len(set(values))
    assert set(values) == recorded(tracked, job_id)


def test_metrics_stages_and_scores_are_sent_by_step(tracked: TrackedJobs, tracker: FakeTracker) -> None:
    job = tracked.submit(MLFLOW)
    forwarder = tracked.forwarder("mlflow", tracker)
    assert tracked.turn(forwarder) == 0  # Nobody has claimed it.
    claim = tracked.claim()
    tracked.train(claim, 1, 12, evaluated(step=10, stage=0, rouge_l=31.5, divergence=None))
    tracked.turn(forwarder)
    assert_sent_once(tracked, tracker, job)
    values = {(name, step): value for name, step, value in sent(tracker, job)}
    assert (values["stage", 10], values["stage", 11]) == (0.0, 1.0)
    assert values["evaluation/initial/validation/rouge_l", 0] == 20.0
    assert values["evaluation/stage/validation/rouge_l", 10] == 31.5
    assert ("evaluation/stage/validation/divergence", 10) not in values
    (opened,) = tracker.opened
    assert opened.tags == {
        "pocl.job": job,
        "pocl.project": PROJECT,
        "pocl.attempt": "1",
        "pocl.status": "running",
        "pocl.path": f"/v1/jobs/{job}",
    }
    assert (opened.name, opened.parameters["seed"], opened.options["experiment"]) == ("tracked", 10, "kd")
    row = tracked.row(job)
    assert (row.run_id, row.state, max(row.last_steps.values())) == (f"run-{job}", "open", 12)
    save_checkpoint(tracked.harness.database, claim, "final", 12)
    succeed_job(tracked.harness.database, claim)
    tracked.turn(forwarder)
    ((_, status, tags),) = tracker.closed
    assert (status, tags["pocl.status"]) == ("succeeded", "succeeded")
    assert tags["pocl.checkpoint.final"].endswith(f"sha256:{'0' * 64}")
    assert tracked.row(job).state == "closed"
    assert tracked.turn(forwarder) == 0
    assert not tracker.is_alive  # Nothing is left to be sent.


@pytest.mark.parametrize("mode", ["die", "die_after", "refuse"])
def test_a_client_that_ends_or_is_refused_loses_nothing_and_doubles_nothing(
    tracked: TrackedJobs, tracker: FakeTracker, mode: str
) -> None:
    job = tracked.submit(MLFLOW)
    forwarder, claim = tracked.forwarder("mlflow", tracker), tracked.claim()
    tracked.train(claim, 1, 3)
    tracked.turn(forwarder)
    tracked.train(claim, 4, 7)
    tracker.mode = mode
    tracked.turn(forwarder)
    row = tracked.row(job)
    assert (row.failures, row.state, row.problem is not None) == (1, "open", True)
    tracked.turn(forwarder)
    # It is said once in the history, with where it is from, and the job goes on.
    (warning,) = tracked.harness.events(job, "warning")
    assert (warning.data["code"], warning.data["pointer"]) == ("tracker_failed", "/trackers/0")
    assert tracked.harness.job(job).status is JobStatus.RUNNING
    tracker.mode = ""
    tracked.train(claim, 8, 9)
    succeed_job(tracked.harness.database, claim)
    tracked.turn(forwarder)
    assert_sent_once(tracked, tracker, job)
    row = tracked.row(job)
    assert (row.state, row.failures, row.problem) == ("closed", 0, None)


def test_a_step_has_the_stage_that_the_engine_trained_and_not_the_planned_one(
    tracked: TrackedJobs, tracker: FakeTracker
) -> None:
    job = tracked.submit(MLFLOW)
    with tracked.harness.database.transaction(write=False) as session:
        planned = session.scalars(sa.select(JobStage.first_step).where(JobStage.job_id == job)).all()
    assert max(planned) < 8  # The engine begins the second stage after step 10.
    claim = tracked.claim()
    tracked.train(claim, 1, 8)
    tracked.turn(tracked.forwarder("mlflow", tracker))
    assert {value for name, _, value in sent(tracker, job) if name == "stage"} == {0.0}


def test_while_a_server_refuses_nothing_is_sent_to_it(tracked: TrackedJobs, tracker: FakeTracker) -> None:
    for _ in range(2):
        tracked.submit(MLFLOW)
        tracked.train(tracked.claim(), 1, 3)
    forwarder = tracked.forwarder("mlflow", tracker)
    tracker.mode = "refuse"
    assert tracked.turn(forwarder) == 1  # The second job is not tried: its turn would end alike.
    assert forwarder.turn() == 0
    tracker.mode = ""
    assert tracked.turn(forwarder) == 2


def test_a_resumed_job_goes_on_with_its_run_and_sends_no_step_again(tracked: TrackedJobs, tracker: FakeTracker) -> None:
    job = tracked.submit(MLFLOW)
    first = tracked.forwarder("mlflow", tracker)
    claim = tracked.claim()
    tracked.train(claim, 1, 6)
    tracked.turn(first)
    tracked.train(claim, 7, 8)  # Recorded, and not sent: the scheduler is killed.
    first.stop()
    assert settle_attempt(tracked.harness.database, claim, AttemptOutcome.released()) is JobStatus.QUEUED
    claim = tracked.claim()
    second = tracked.forwarder("mlflow", tracker)
    tracked.train(claim, 5, 11)  # Steps are run again from the last training state.
    tracked.turn(second)
    succeed_job(tracked.harness.database, claim)
    tracked.turn(second)
    assert_sent_once(tracked, tracker, job)
    assert [step for name, step, _ in sent(tracker, job) if name == "loss"] == list(range(1, 12))
    assert [run.run_id for run in tracker.opened] == [None, f"run-{job}"]


def test_what_a_released_attempt_left_is_sent_while_nobody_holds_the_job(
    tracked: TrackedJobs, tracker: FakeTracker
) -> None:
    job = tracked.submit(MLFLOW)
    forwarder, claim = tracked.forwarder("mlflow", tracker), tracked.claim()
    tracked.train(claim, 1, 4)
    settle_attempt(tracked.harness.database, claim, AttemptOutcome.released())
    assert tracked.turn(forwarder) == 1
    assert_sent_once(tracked, tracker, job)
    assert [status for _, status, _ in tracker.closed] == ["queued"]
    assert (tracked.row(job).state, tracked.row(job).pending) == ("open", False)
    assert tracked.turn(forwarder) == 0


def test_a_retry_has_a_run_of_its_own_that_is_linked_to_the_first(tracked: TrackedJobs, tracker: FakeTracker) -> None:
    harness = tracked.harness
    job = tracked.submit(MLFLOW)
    forwarder, claim = tracked.forwarder("mlflow", tracker), tracked.claim()
    tracked.train(claim, 1, 4)
    settle_attempt(harness.database, claim, AttemptOutcome.failed(DIVERGED))
    tracked.turn(forwarder)
    with harness.database.transaction(write=True) as session:
        plan = plan_retry(session, harness.settings, project=PROJECT, job_id=job, start=RetryStart("start"))
        retry = create_descendant(session, harness.settings, plan, {}).id
    claim = tracked.claim()
    tracked.train(claim, 1, 5)
    succeed_job(harness.database, claim)
    tracked.turn(forwarder)
    assert_sent_once(tracked, tracker, retry)
    run = tracker.opened[-1]
    assert (run.job_id, run.run_id, run.parent_run_id) == (retry, None, f"run-{job}")
    assert run.tags["pocl.retry_of"] == job
    assert [status for _, status, _ in tracker.closed] == ["failed", "succeeded"]


def test_of_two_schedulers_one_forwards(tracked: TrackedJobs, tracker: FakeTracker, tmp_path: Path) -> None:
    tracked.submit(MLFLOW)
    other = FakeTracker(tmp_path)
    one, two = tracked.forwarder("mlflow", tracker), tracked.forwarder("mlflow", other, name="s2")
    tracked.train(tracked.claim(), 1, 4)
    assert (tracked.turn(one), tracked.turn(two)) == (1, 0)
    assert other.sent == []


def test_a_long_job_is_sent_in_batches(tracked: TrackedJobs, tracker: FakeTracker) -> None:
    job = tracked.submit(MLFLOW)
    claim = tracked.claim()
    tracked.train(claim, 1, 450)
    tracked.turn(tracked.forwarder("mlflow", tracker))
    assert [len({point.step for point in points}) for _, points in tracker.sent] == [200, 200, 51]
    assert_sent_once(tracked, tracker, job)


def test_a_tracker_that_stays_away_is_given_up_and_it_is_said_what_is_lost(
    tracked: TrackedJobs, tracker: FakeTracker
) -> None:
    job = tracked.submit(MLFLOW)
    forwarder, claim = tracked.forwarder("mlflow", tracker), tracked.claim()
    tracked.train(claim, 1, 4)
    tracked.turn(forwarder)
    tracked.train(claim, 5, 9)
    succeed_job(tracked.harness.database, claim)
    tracker.mode = "refuse"
    tracked.turn(forwarder)
    with tracked.harness.database.transaction(write=True) as session:
        session.execute(sa.update(JobTracker).values(failing_since=db_now(-3601)))
    tracked.turn(forwarder)
    assert tracked.row(job).state == "failed"
    assert tracked.turn(forwarder) == 0
    job_row = tracked.harness.job(job)
    assert [warning["code"] for warning in job_row.warnings] == ["tracker_failed", "tracker_given_up"]
    assert "up to step 4 of 9" in job_row.warnings[1]["message"]
    # The end of the job stays the last event of its history.
    assert tracked.harness.events(job)[-1].data["to"] == "succeeded"


class HangingTracker(FakeTracker):
    """One whose server never answers."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.is_asked, self.is_interrupted = threading.Event(), threading.Event()

    def open(self, run: TrackedRun) -> OpenedRun:
        self.is_asked.set()
        self.is_interrupted.wait()
        raise CannotTrack("tracker_error", f"Its client ended, of {run.job_id}.")

    def interrupt(self) -> None:
        self.is_interrupted.set()


def test_a_scheduler_stops_while_a_tracker_hangs_and_blames_nobody(tracked: TrackedJobs, tmp_path: Path) -> None:
    job = tracked.submit(MLFLOW)
    tracked.train(tracked.claim(), 1, 4)
    tracker = HangingTracker(tmp_path)
    channels = TrackerForwarder((tracked.forwarder("mlflow", tracker),), grace_seconds=0.0)
    channels.start()
    assert tracker.is_asked.wait(LONG)
    channels.close()
    row = tracked.row(job)
    assert (row.state, row.failures, row.failing_since) == ("open", 0, None)
    assert not [thread for thread in threading.enumerate() if thread.name == "tracker-mlflow"]


def test_deleting_a_job_ends_its_trackers(tracked: TrackedJobs, tracker: FakeTracker) -> None:
    job = tracked.submit(MLFLOW)
    forwarder = tracked.forwarder("mlflow", tracker)
    tracked.train(tracked.claim(), 1, 4)
    tracked.turn(forwarder)
    with tracked.harness.database.transaction(write=True) as session:
        session.execute(sa.delete(Job).where(Job.id == job))
    assert tracked.turn(forwarder) == 0


def test_directories_of_schedulers_that_have_ended_are_removed(tmp_path: Path) -> None:
    (tmp_path / "scheduler-left").mkdir()
    alive = ScratchDirectory.make(tmp_path)
    another = ScratchDirectory.make(tmp_path)
    assert set(tmp_path.iterdir()) == {alive.path, another.path}
    alive.remove()
    another.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_channel_is_there_where_its_package_and_its_server_are() -> None:
    assert available_channels({}, lambda _: False) == ()
    assert available_channels({}, lambda _: True) == ("tensorboard", "wandb_offline")
    everything = {"MLFLOW_TRACKING_URI": "http://mlflow", "WANDB_API_KEY": "k"}
    assert available_channels(everything, lambda _: True) == ("tensorboard", "mlflow", "wandb", "wandb_offline")
    assert available_channels(everything, lambda name: name == "mlflow") == ("mlflow",)
