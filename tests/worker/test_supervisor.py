"""One attempt at a job, with real processes and real databases, and the fake engine."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
import structlog

from domain.artifacts import ArtifactStore
from domain.datasets.models import Dataset
from domain.jobs.models import Job
from domain.jobs.states import AttemptEnd, JobStatus
from domain.workers.models import Worker
from domain.workers.repository import drain, register_worker
from pocl.layout import (
    ABOUT_FILE,
    EVENTS_FILE,
    PARTIAL_RANKING_FILE,
    RANKING_FILE,
    RANKING_INPUTS_FILE,
    RESULT_FILE,
)
from pocl.storage.shared_cache import SharedCache
from tests.support.harness import ServiceHarness, processes_mentioning
from tests.support.waiting import eventually
from tests.worker.fake_engine import STEPS
from worker.attempt_dir import AttemptDir

pytestmark = pytest.mark.system

HOLD_AT_5 = ("--hold", "5")


@contextmanager
def concurrently(*actions: Callable[[], object]) -> Iterator[None]:
    """Run `actions` in a thread beside the block, and fail if one failed: a supervisor needs the main thread."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            for action in actions:
                action()
        except BaseException as error:  # noqa: BLE001 - it is re-raised below
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failures:
        raise failures[0]


def wait_for_step(harness: ServiceHarness, job: str, step: int) -> None:
    eventually(lambda: harness.job(job).step >= step, what=f"step {step}")


def test_successful_job_leaves_its_checkpoints_and_artifacts(harness: ServiceHarness) -> None:
    job = harness.submit()
    assert harness.supervisor().work_one() is JobStatus.SUCCEEDED
    row = harness.job(job)
    assert (row.step, row.percent, row.attempts_spent) == (STEPS, 100.0, 1)
    assert harness.status_history(job) == ["queued", "preparing", "running", "succeeded"]
    assert [event.seq for event in harness.events(job)] == list(range(1, row.event_seq + 1))
    assert {kind: harness.store.locate(a.store_key).stat().st_size for kind, a in harness.artifacts(job).items()} == {
        kind: artifact.size_bytes for kind, artifact in harness.artifacts(job).items()
    }
    assert set(harness.artifacts(job)) == {"ranking", "result"}
    final = next(c for c in harness.checkpoints(job) if c.kind == "final")
    assert harness.store.locate(final.store_key, "model.safetensors").read_bytes() == b"weights of the student"


def test_surplus_training_states_are_deleted_from_rows_and_store(harness: ServiceHarness) -> None:
    job = harness.submit(checkpoints={"keep": 2})
    harness.supervisor().work_one()
    kept = harness.checkpoints(job)
    # While the job runs the newest two stay; the student is stored now, and a retry starts at the end of a stage.
    assert [c.step for c in kept if c.kind == "training"] == []
    assert [c.step for c in kept if c.kind == "stage"] == [5, 10]
    stored = harness.store.list_keys(f"jobs/{job}/attempt-1")
    assert {c.store_key for c in kept} == {key for key in stored if "result" not in key}


def test_log_lines_of_an_attempt_name_the_job_and_the_attempt(harness: ServiceHarness) -> None:
    job = harness.submit()
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        harness.supervisor().work_one()
        harness.supervisor().work_one()
    assert [(line["event"], line["job_id"], line["attempt"]) for line in lines if line["log_level"] == "info"] == [
        ("attempt_started", job, 1),
        ("attempt_ended", job, 1),
    ]


def test_no_job_is_claimed_from_an_empty_queue(harness: ServiceHarness) -> None:
    assert harness.supervisor().work_one() is None


def test_worker_that_shuts_down_claims_no_job(harness: ServiceHarness) -> None:
    job = harness.submit()
    assert harness.supervisor(should_stop=lambda: True).work_one() is None
    assert harness.job(job).status is JobStatus.QUEUED


@pytest.mark.parametrize(("death", "code"), [(9, "engine_killed"), (11, "engine_crashed")])
def test_crashed_engine_is_restarted_from_the_last_training_state(
    harness: ServiceHarness, death: int, code: str
) -> None:
    job = harness.submit()
    assert harness.supervisor("--die", "5", "--signal", str(death)).work_one() is JobStatus.QUEUED
    assert harness.supervisor().work_one() is JobStatus.SUCCEEDED
    first, second = harness.attempts(job)
    assert (first.end, (first.end_reason or {})["code"]) == (AttemptEnd.CRASHED, code)
    assert (second.end, second.resumed_from_step) == (AttemptEnd.SUCCEEDED, 4)
    assert "recovering" in harness.status_history(job)


def test_ranking_is_made_once(harness: ServiceHarness) -> None:
    job = harness.submit()
    harness.supervisor("--die", "1").work_one()
    first_ranking = harness.artifacts(job)["ranking"].sha256
    assert harness.supervisor().work_one() is JobStatus.SUCCEEDED
    assert harness.artifacts(job)["ranking"].sha256 == first_ranking


def test_a_control_is_given_what_came_of_the_job_that_it_is_compared_with(harness: ServiceHarness) -> None:
    compared = harness.submit()
    assert harness.supervisor().work_one() is JobStatus.SUCCEEDED
    posted = harness.job(compared).posted_spec
    curriculum = {**posted["curriculum"], "control": {"kind": "no_curriculum", "budget_of": compared}}
    control = harness.submit(data=posted["data"], curriculum=curriculum)
    # The engine of the other job wrote no answers.
    code = "from pathlib import Path; assert [each.name for each in Path('run/compared').iterdir()] == ['result.json']"
    assert harness.supervisor("--run", code).work_one() is JobStatus.SUCCEEDED, harness.log(control)


def test_a_run_is_told_what_its_job_is_called_and_when_it_began(harness: ServiceHarness) -> None:
    job = harness.submit()
    told = "json.loads(Path('run/about.json').read_text())"
    code = f"import json; from pathlib import Path; assert [*{told}] == ['name', 'began_at'], {told}"
    check = f"{code}; assert {told}['name'] == '{job}', {told}"
    assert harness.supervisor("--run", check).work_one() is JobStatus.SUCCEEDED, harness.log(job)


def test_partial_ranking_is_continued_by_the_next_attempt(harness: ServiceHarness) -> None:
    job = harness.submit()
    partial = AttemptDir(harness.settings.work_root / f"{job}.1").workdir / PARTIAL_RANKING_FILE
    stopping = harness.supervisor("--hold-ranking", should_stop=partial.exists)
    assert stopping.work_one() is JobStatus.QUEUED
    assert harness.supervisor().work_one() is JobStatus.SUCCEEDED
    ranked = harness.store.locate(harness.artifacts(job)["ranking"].store_key).read_text().splitlines()
    assert len({json.loads(line)["by"] for line in ranked}) == 2


def test_cache_entries_are_pinned_until_their_job_ends(harness: ServiceHarness) -> None:
    job, other = harness.submit(), harness.submit()
    cache = SharedCache(harness.settings.cache_root, 0)
    stopped = {"now": False}
    with concurrently(lambda: wait_for_step(harness, job, 5), lambda: stopped.update(now=True)):
        harness.supervisor(*HOLD_AT_5, should_stop=lambda: stopped["now"]).work_one()
    assert cache.pinning_jobs() == {job}
    assert harness.supervisor().work_one() is JobStatus.SUCCEEDED
    harness.supervisor().work_one()
    assert cache.pinning_jobs() == {other}
    harness.supervisor().work_one()
    assert cache.pinning_jobs() == set()


def test_damaged_training_state_is_skipped_for_an_older_one(harness: ServiceHarness) -> None:
    job = harness.submit()
    harness.supervisor("--die", "5").work_one()
    newest = max((c for c in harness.checkpoints(job) if c.kind == "training"), key=lambda c: c.step)
    weights = harness.store.locate(newest.store_key, "model.safetensors")
    weights.write_bytes(b"damaged")
    assert harness.supervisor().work_one() is JobStatus.SUCCEEDED
    assert harness.attempts(job)[1].resumed_from_step == 2


def test_job_whose_engine_always_dies_fails_with_the_reason(harness: ServiceHarness) -> None:
    job = harness.submit()
    # The worker finds nothing wrong with itself each time.
    statuses = [harness.supervisor("--die", "1").work_one() for _ in range(harness.settings.max_attempts)]
    assert statuses == [JobStatus.QUEUED, JobStatus.QUEUED, JobStatus.FAILED]
    reason = harness.job(job).reason
    assert reason is not None
    assert (reason.code, reason.fault, reason.retryable) == ("engine_killed", "capacity", True)


def test_failure_that_the_engine_reports_becomes_the_end_reason(harness: ServiceHarness) -> None:
    job = harness.submit()
    assert harness.supervisor("--fail", "3").work_one() is JobStatus.FAILED
    reason = harness.job(job).reason
    assert reason is not None
    assert (reason.code, reason.message, reason.fault, reason.hint) == (
        "loss_diverged",
        "It ended.",
        "user",
        "Read this.",
    )


def test_run_without_a_stored_student_does_not_succeed(harness: ServiceHarness) -> None:
    job = harness.submit()
    assert harness.supervisor("--no-student").work_one() is JobStatus.QUEUED
    assert (harness.attempts(job)[0].end_reason or {})["code"] == "storage_failed"


def test_cancelling_stops_the_engine_and_its_children(harness: ServiceHarness) -> None:
    job = harness.submit()

    def cancel() -> None:
        wait_for_step(harness, job, 5)
        assert len(processes_mentioning(str(harness.home))) == 2
        harness.cancel(job)

    # The heartbeat brings the request.
    quick = ServiceHarness(harness.home, harness.database_url, heartbeat_seconds=1)
    with concurrently(cancel):
        assert quick.supervisor(*HOLD_AT_5, "--child").work_one() is JobStatus.CANCELLED
    quick.close()
    assert processes_mentioning(str(harness.home)) == {}
    assert harness.status_history(job)[-2:] == ["cancelling", "cancelled"]


def test_engine_that_ignores_sigterm_is_killed_after_the_grace_period(harness: ServiceHarness) -> None:
    job = harness.submit()
    stop = threading.Event()

    def shut_down() -> None:
        wait_for_step(harness, job, 5)
        stop.set()

    with concurrently(shut_down):
        status = harness.supervisor(
            *HOLD_AT_5, "--ignore-sigterm", should_stop=stop.is_set, grace_seconds=0.2
        ).work_one()
    assert status is JobStatus.QUEUED
    assert harness.job(job).attempts_spent == 0


def test_worker_that_shuts_down_releases_its_job_and_the_next_continues_it(
    harness: ServiceHarness,
) -> None:
    job = harness.submit()
    stop = threading.Event()

    def shut_down() -> None:
        wait_for_step(harness, job, 5)
        stop.set()

    with concurrently(shut_down):
        assert harness.supervisor(*HOLD_AT_5, should_stop=stop.is_set).work_one() is JobStatus.QUEUED
    assert harness.job(job).attempts_spent == 0
    assert harness.supervisor().work_one() is JobStatus.SUCCEEDED
    first, second = harness.attempts(job)
    assert (first.end, second.resumed_from_step) == (AttemptEnd.RELEASED, 5)


def test_stalled_engine_is_stopped(harness: ServiceHarness) -> None:
    job = harness.submit()
    assert harness.supervisor(*HOLD_AT_5, stall_seconds=1).work_one() is JobStatus.QUEUED
    first = harness.attempts(job)[0]
    assert (first.end, (first.end_reason or {})["code"]) == (AttemptEnd.CRASHED, "stalled")


def test_worker_without_its_lease_kills_its_engine_and_writes_nothing(harness: ServiceHarness) -> None:
    job = harness.submit()
    event_seqs: list[int] = []

    def steal() -> None:
        wait_for_step(harness, job, 5)
        with harness.database.transaction(write=True) as session:
            session.execute(sa.update(Job).where(Job.id == job).values(lease_token=99, token=99))
        event_seqs.append(harness.job(job).event_seq)

    quick = ServiceHarness(harness.home, harness.database_url, heartbeat_seconds=1)
    with concurrently(steal):
        assert quick.supervisor(*HOLD_AT_5, "--ignore-sigterm").work_one() is None
    quick.close()
    assert processes_mentioning(str(harness.home)) == {}
    assert harness.job(job).event_seq == event_seqs[0]
    assert harness.job(job).status is JobStatus.RUNNING


def test_engine_gets_paths_for_ids_and_no_credentials(harness: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job = harness.submit()
    for secret in ("POCL_API_KEY", "POCL_DATABASE_URL", "POCL_REDIS_URL", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(secret, "not for the engine")
    harness.supervisor(threads=3).work_one()
    directory = AttemptDir(harness.settings.work_root / f"{job}.1")
    spec = json.loads(directory.spec_file.read_text())
    assert Path(spec["data"]["train"]["path"]).read_text().count("\n") == 8
    assert spec["resources"]["threads"] == 3
    names = set(json.loads(directory.log_file.read_text().partition("environment ")[2]))
    assert {"PATH", "TMPDIR", "PYTHONUNBUFFERED"} <= names
    assert not {name for name in names if name.startswith(("POCL", "AWS"))}


def test_stored_log_has_no_paths_of_the_machine(harness: ServiceHarness) -> None:
    job = harness.submit()
    harness.supervisor().work_one()
    tail = harness.log(job)
    assert "workdir <attempt>/run" in tail
    assert str(harness.home) not in tail


def test_worker_without_the_artifact_store_leaves_the_job_to_another(harness: ServiceHarness, tmp_path: Path) -> None:
    job = harness.submit()
    unmounted = replace(harness.supervisor(name="unmounted"), store=ArtifactStore(tmp_path / "empty"))
    assert unmounted.work_one() is JobStatus.QUEUED
    reason = harness.attempts(job)[0].end_reason or {}
    assert (reason["code"], reason["fault"], reason["retryable"]) == ("storage_failed", "system", True)
    assert harness.supervisor().work_one() is JobStatus.SUCCEEDED


def test_worker_without_a_model_of_the_job_leaves_it_to_another(harness: ServiceHarness, tmp_path: Path) -> None:
    job = harness.submit()
    spec = {**harness.job(job).spec, "teacher": {"path": "teacher"}}
    with harness.database.transaction(write=True) as session:
        session.execute(sa.update(Job).values(spec=spec))
    assert harness.supervisor().work_one() is JobStatus.QUEUED
    reason = harness.attempts(job)[0].end_reason or {}
    assert (reason["code"], reason["fault"], reason["retryable"]) == ("model_not_found", "system", True)
    assert str(tmp_path) not in json.dumps(reason)


def test_deleted_data_set_fails_the_job(harness: ServiceHarness) -> None:
    job = harness.submit()
    with harness.database.transaction(write=True) as session:
        session.execute(sa.delete(Dataset))
    assert harness.supervisor().work_one() is JobStatus.FAILED
    assert (harness.attempts(job)[0].end_reason or {})["code"] == "dataset_not_found"


@pytest.mark.parametrize("setting", ["work_root", "artifact_root"])
def test_worker_that_cannot_write_its_directories_is_quarantined_and_claims_nothing(
    harness: ServiceHarness, setting: str
) -> None:
    jobs = [harness.submit() for _ in range(2)]
    directory: Path = getattr(harness.settings, setting)
    elsewhere = directory.with_name("elsewhere")
    if directory.exists():
        directory.rename(elsewhere)
    directory.write_text("a file where the directory should be")
    assert [harness.supervisor().work_one() for _ in range(3)] == [None] * 3
    assert [harness.job(job).token for job in jobs] == [0, 0]
    worker = quarantined(harness)
    assert f"POCL_{setting.upper()} cannot be written" in str(worker.quarantine_reason)
    assert str(harness.home) not in str(worker.quarantine_reason)
    # Once it can, it comes back by itself.
    directory.unlink()
    if elsewhere.exists():
        elsewhere.rename(directory)
    assert [harness.supervisor().work_one() for _ in range(2)] == [JobStatus.SUCCEEDED] * 2
    assert registered(harness).quarantined_at is None


def registered(harness: ServiceHarness, name: str = "tester") -> Worker:
    with harness.database.transaction(write=False) as session:
        return session.get_one(Worker, name)


def quarantined(harness: ServiceHarness, name: str = "tester") -> Worker:
    worker = registered(harness, name)
    assert worker.quarantined_at is not None
    return worker


LOST_GPU = ("--fail", "1", "--code", "engine_failure", "--fault", "system", "--retryable")


def test_jobs_of_a_worker_whose_engines_fail_are_done_by_another(harness: ServiceHarness) -> None:
    """The real check, by a tiny job of the same engine, finds the worker sick after its first failure."""
    jobs = [harness.submit() for _ in range(6)]
    sick = harness.supervisor(*LOST_GPU, name="sick", check=None)
    with harness.database.transaction(write=True) as session:
        for name in ("sick", "well"):
            register_worker(session, name, sick.devices)
    slow = replace(sick, settings=sick.settings.model_copy(update={"retry_seconds": 60.0}))
    assert [slow.work_one() for _ in range(3)] == [JobStatus.QUEUED, None, None]
    assert quarantined(harness, "sick").quarantine_reason == "A tiny job failed with engine_failure: It ended."
    assert [harness.job(job).attempts_spent for job in jobs] == [0] * 6
    with harness.database.transaction(write=True) as session:
        session.execute(sa.update(Job).values(not_before=None))
    well = harness.supervisor(name="well")
    assert [well.work_one() for _ in jobs] == [JobStatus.SUCCEEDED] * 6
    assert {harness.job(job).status for job in jobs} == {JobStatus.SUCCEEDED}
    # Its GPU is back: a check lets it in.
    with harness.database.transaction(write=True) as session:
        drain(session, "sick", None)
    again = harness.submit()
    assert harness.supervisor(name="sick", check=None).work_one() is JobStatus.SUCCEEDED
    assert harness.job(again).status is JobStatus.SUCCEEDED
    assert (registered(harness, "sick").quarantined_at, registered(harness, "sick").failures) == (None, 0)


def test_worker_on_which_two_attempts_in_a_row_fail_is_quarantined_though_it_finds_nothing(
    harness: ServiceHarness,
) -> None:
    for _ in range(2):
        harness.submit()
    failing = harness.supervisor(*LOST_GPU)
    slow = replace(failing, settings=failing.settings.model_copy(update={"retry_seconds": 60.0}))
    assert [slow.work_one() for _ in range(3)] == [JobStatus.QUEUED, JobStatus.QUEUED, None]
    assert str(quarantined(harness).quarantine_reason).startswith("2 attempts in a row failed here")


def test_quarantine_is_not_for_failures_of_the_user(harness: ServiceHarness) -> None:
    for _ in range(3):
        harness.submit()
        assert harness.supervisor("--fail", "1", check=None).work_one() is JobStatus.FAILED
    with harness.database.transaction(write=False) as session:
        assert session.get(Worker, "tester") is None


def test_check_says_how_the_engine_of_its_tiny_job_failed(harness: ServiceHarness) -> None:
    harness.submit()
    supervisor = harness.supervisor("--hold", "1", check=None, check_seconds=0.5)
    assert supervisor.find_fault() == "A tiny job did not end within 0.5 seconds."
    assert processes_mentioning(str(harness.home)) == {}
    assert list(harness.settings.work_root.iterdir()) == []
    died = harness.supervisor("--die", "1", check=None).find_fault()
    assert died == "The engine of a tiny job died by signal 9."
    missing = replace(supervisor, options=harness.options(engine=("/nonexistent/engine",))).find_fault()
    assert missing == "The engine cannot be started: No such file or directory."


def test_directories_of_ended_attempts_are_pruned(harness: ServiceHarness) -> None:
    jobs = [harness.submit() for _ in range(3)]
    for _ in jobs:
        harness.supervisor(kept_attempts=1).work_one()
    names = sorted(entry.name for entry in harness.settings.work_root.iterdir())
    assert names == [f"{job}.1" for job in jobs[1:]]
    workdir = AttemptDir(harness.settings.work_root / names[-1]).workdir
    files = {ABOUT_FILE, EVENTS_FILE, RANKING_FILE, RANKING_INPUTS_FILE, RESULT_FILE}
    assert {entry.name for entry in workdir.iterdir()} == files


def test_engine_dies_with_its_worker(harness: ServiceHarness) -> None:
    job = harness.submit()
    pid = os.fork()
    if pid == 0:
        # The fork has a harness of its own, since connections must not be shared.
        ServiceHarness(harness.home, harness.database_url).supervisor(*HOLD_AT_5).work_one()
        os._exit(0)
    wait_for_step(harness, job, 5)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    eventually(lambda: not processes_mentioning(str(harness.home)), what="the engine is gone")
