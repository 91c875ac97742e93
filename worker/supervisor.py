"""One worker: whether it is well, the conversations that wait, the next job that it can run, and one attempt at it."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Final

import structlog
from sqlalchemy.orm import Session

from domain.artifacts import ArtifactStoreUnavailable
from domain.chat.repository import count_waiting
from domain.database_errors import DatabaseUnavailable
from domain.errors import LostLease
from domain.jobs import leases, repository
from domain.jobs.fleet import memory_by_device_kind
from domain.jobs.leases import Claim
from domain.jobs.states import AttemptEnd, AttemptOutcome, JobStatus
from domain.workers import repository as workers
from domain.workers.models import DeviceKind
from pocl.storage.shared_cache import SharedCache
from worker import attempt_dir
from worker.attempt import Attempt
from worker.chat.process import ChatProcess
from worker.chat.session import ChatSession
from worker.engine_exit import (
    storage_failure_reason,
)
from worker.engine_host import EngineHost
from worker.self_check import SelfCheck, check_writable, explain_unwritable

_log = structlog.get_logger(__name__)

_MAX_UNPINNED_JOBS: Final = 500
_DAY_SECONDS: Final = 86_400
_FAILURES_IN_A_ROW: Final = 2
"""So many are one too many, also for a worker that finds nothing wrong with itself."""


@dataclass(frozen=True)
class Supervisor(EngineHost):
    """Works on jobs, one at a time. Call it from the main thread: the engine dies with the thread that starts it."""

    device_fault: str | None = None
    """Why a worker that is to use GPUs has none, in one sentence: it stays in quarantine."""
    check: Callable[[], str | None] | None = None
    """What is wrong with this worker, in one sentence, null for nothing; a :class:`SelfCheck` unless given."""

    def work_one(self) -> JobStatus | None:
        """Answer the conversations that wait, then claim the next job that this worker can run, and run one attempt at
        it; the status that the job then has.

        A quarantined worker claims nothing; where it is time it checks itself, and goes on if it is well.

        Returns:
            None where no job was claimed, the database was unavailable, or the lease was lost.
        """
        if self.should_stop():
            return None
        attempt_dir.prune(self.settings.work_root, keep=self.options.kept_attempts)
        try:
            self._clean_cache()
            claim = self._answer_chats() if self._is_well() else None
        except (DatabaseUnavailable, ArtifactStoreUnavailable) as error:
            _log.warning("claim_failed", error=str(error))
            return None
        if claim is None:
            return None
        known = {"job_id": claim.job_id, "attempt": claim.attempt, "request_id": claim.request_id}
        with structlog.contextvars.bound_contextvars(**{name: value for name, value in known.items() if value}):
            return self._run_attempt(claim)

    def _is_well(self) -> bool:
        """Whether the worker may claim jobs. One that is quarantined checks itself first, where that is due."""
        with self.database.transaction(write=False) as session:
            health = workers.worker_health(session, self.worker_name, max_wait_seconds=self.settings.max_retry_seconds)
        if health.drained:
            _log.info("worker_drained")
            return False
        if health.quarantined and not health.check_is_due:
            return False
        finding = self.find_fault() if health.quarantined else self._find_plain_fault()
        if self.should_stop():
            return False
        if finding is not None:
            with self.database.transaction(write=True) as session:
                self._quarantine(session, finding)
            return False
        if health.quarantined:
            _log.info("worker_well_again")
            with self.database.transaction(write=True) as session:
                workers.end_quarantine(session, self.worker_name)
        return True

    def _answer_chats(self) -> Claim | None:
        """Answer the conversations that wait, and claim the next job."""
        with self.database.transaction(write=False) as session:
            waiting = count_waiting(session, limit=1)
        if not waiting:
            return self._claim_next()
        device = self.device_kind
        process = ChatProcess(
            self.settings,
            self.options,
            self._chat_command(device),
            lambda temporary: self.engine_environment(temporary, device),
            is_on_gpu=device == "cuda",
        )
        try:
            with process:
                session_of_chats = ChatSession(
                    self.database,
                    self.store,
                    self.settings,
                    self.worker_name,
                    process,
                    self.options.chat_idle_seconds,
                    may_claim=self._may_claim,
                    should_stop=self.should_stop,
                    clock=self.clock,
                )
                return session_of_chats.run(self._claim_next)
        finally:
            if strays := self.kill_strays():
                _log.warning("strays_killed", processes=strays)

    def _chat_command(self, device: DeviceKind) -> list[str]:
        return [
            *self.options.chat_engine,
            *("--device", device),
            *(() if self.options.threads is None else ("--threads", str(self.options.threads))),
            *self.hub_arguments(),
        ]

    def _may_claim(self, session: Session) -> bool:
        return not workers.worker_health(session, self.worker_name, max_wait_seconds=0).drained

    def _claim_next(self) -> Claim | None:
        with self.database.transaction(write=True) as session:
            if not self._may_claim(session):
                return None
            return leases.claim_next(
                session,
                worker=self.worker_name,
                lease_seconds=self.settings.lease_seconds,
                memory=memory_by_device_kind([asdict(device) for device in self.devices]),
                retry=self.retry,
            )

    def _run_attempt(self, claim: Claim) -> JobStatus | None:
        _log.info("attempt_started")
        try:
            with attempt_dir.locked(self.settings.work_root, claim.job_id, claim.attempt) as directory:
                attempt = Attempt(self, claim, directory, self.find_fault)
                status = attempt.run()
                self.record_end(attempt.outcome, attempt.finding)
        except LostLease:
            _log.warning("lease_lost")
            return None
        except OSError as error:
            # The directory could not be created, so the attempt never began, and cost the job nothing.
            _log.error("attempt_directory_failed", error=str(error))
            outcome = replace(AttemptOutcome.failed(storage_failure_reason(error)), worker_is_sick=True)
            self.record_end(outcome, explain_unwritable(error))
            return self._settle_unstarted(claim, outcome)
        _log.info("attempt_ended", status=str(status))
        return status

    def find_fault(self) -> str | None:
        """What is wrong with this worker, in one sentence; null for nothing, and where the worker shuts down.

        Raises:
            ArtifactStoreUnavailable: the store is away, which is nothing of this worker.
        """
        if (finding := self._find_plain_fault()) is not None:
            return finding
        if self.check is not None:
            return self.check()
        device = self.device_kind
        return SelfCheck(
            self.options.engine,
            self.settings.work_root,
            self.devices,
            lambda temporary: self.engine_environment(temporary, device),
            timeout_seconds=self.options.check_seconds,
            should_stop=self.should_stop,
        )()

    def _find_plain_fault(self) -> str | None:
        """What is wrong with this worker as far as no job is needed to tell.

        Raises:
            ArtifactStoreUnavailable: the store is away, which is nothing of this worker.
        """
        if self.device_fault is not None:
            return self.device_fault
        settings = self.settings
        directories = {"POCL_WORK_ROOT": settings.work_root, "POCL_ARTIFACT_ROOT": settings.artifact_root}
        return check_writable(directories) or self.store.find_fault()

    def record_end(self, outcome: AttemptOutcome, finding: str | None) -> None:
        """Count an attempt that ended on this worker, and quarantine the worker where it is sick or fails too often.

        Args:
            finding: What the worker's check of itself found after the end; null for nothing.
        """
        with suppress(DatabaseUnavailable), self.database.transaction(write=True) as session:
            if not outcome.may_pass:
                if outcome.end in (AttemptEnd.SUCCEEDED, AttemptEnd.FAILED):
                    workers.record_success(session, self.worker_name)
                return
            workers.register_worker(session, self.worker_name, self.devices)
            failures = workers.record_failure(session, self.worker_name)
            if finding is None and failures >= _FAILURES_IN_A_ROW:
                finding = (
                    f"{failures} attempts in a row failed here, the last with {outcome.reason.code}; the worker finds"
                    " nothing wrong with itself."
                )
            if finding is not None:
                self._quarantine(session, finding)

    def _quarantine(self, session: Session, finding: str) -> None:
        _log.error("worker_quarantined", reason=finding)
        workers.register_worker(session, self.worker_name, self.devices)
        workers.quarantine(session, self.worker_name, finding, wait=self.retry.delay)

    def _clean_cache(self) -> None:
        """Unpin the cache entries of ended jobs on this machine, and remove those that nobody has used for long; those
        of queued and paused jobs stay pinned.
        """
        cache = SharedCache(self.settings.cache_root, self.settings.max_cache_bytes)
        if pinned := sorted(cache.pinning_jobs())[:_MAX_UNPINNED_JOBS]:
            with self.database.transaction(write=False) as session:
                ended = repository.filter_ended(session, pinned)
            for job_id in ended:
                replace(cache, pinning_job=job_id).unpin()
        try:
            cache.remove_unused(self.settings.max_cache_days * _DAY_SECONDS)
        except OSError as error:
            _log.warning("cache_not_cleaned", error=str(error))

    def _settle_unstarted(self, claim: Claim, outcome: AttemptOutcome) -> JobStatus | None:
        with suppress(LostLease, DatabaseUnavailable), self.database.transaction(write=True) as session:
            return leases.settle(session, claim, outcome, retry=self.retry)
        return None
