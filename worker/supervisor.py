"""One attempt at one job: claim it, run the engine as a child process, write its events into the rows, settle.

The engine is asked to stop by SIGTERM, upon which it saves its state; it is killed only after a grace period.
A worker that lost its lease kills its engine at once and writes nothing more.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

import structlog
from opentelemetry.trace import NoOpTracer, Tracer
from sqlalchemy.orm import Session

from domain.artifacts import ArtifactCorrupt, ArtifactNotFound, ArtifactStore, ArtifactStoreUnavailable
from domain.chat.repository import count_waiting
from domain.checkpoints.repository import get_checkpoint
from domain.database_errors import DatabaseUnavailable
from domain.datasets.models import Dataset
from domain.datasets.repository import get_dataset, stored_reference
from domain.db import Database
from domain.errors import ApiError, LostLease, NotFound
from domain.jobs import leases, repository
from domain.jobs.fleet import memory_by_device_kind
from domain.jobs.leases import Claim
from domain.jobs.retries import RetryPolicy
from domain.jobs.states import DATABASE_UNAVAILABLE as UNAVAILABLE_REASON
from domain.jobs.states import WORKER_LOST, AttemptEnd, AttemptOutcome, EndReason, JobStatus, StopRequest
from domain.model_paths import locate_model
from domain.settings import Settings
from domain.workers import repository as workers
from domain.workers.models import Device, DeviceKind
from pocl.container_limits import available_memory_bytes, count_oom_kills
from pocl.errors import is_disk_full
from pocl.spec import RANKING_MODEL_POINTER, DataRef, DistillationSpec, ModelRef
from pocl.storage.shared_cache import SharedCache
from worker import attempt_dir
from worker.attempt_dir import AttemptDir
from worker.attempt_trace import AttemptTrace
from worker.bounded_log import BoundedLog
from worker.chat.process import ChatProcess
from worker.chat.session import ChatSession
from worker.devices import visible_devices
from worker.engine_environment import ENGINE_HOME, engine_environment, redact_secrets
from worker.engine_exit import (
    DISK_FULL,
    STORAGE_FAILED,
    WORKER_FAILED,
    EngineExit,
    classify_exit,
    outcome_of_storage_failure,
    storage_failure_reason,
)
from worker.engine_limits import limit_engine, memory_limit
from worker.engine_log import EngineLogReader
from worker.engine_sandbox import sandbox
from worker.lease import Lease
from worker.processes import kill_group, spawn
from worker.self_check import SelfCheck, check_writable, explain_unwritable
from worker.settings import WorkerSettings
from worker.sink import RowSink

_log = structlog.get_logger(__name__)

_MAX_UNPINNED_JOBS: Final = 500
_BRANCH_POINT_LOST: Final = EndReason(
    STORAGE_FAILED.code,
    "The training state at which the job begins is damaged or not to be had from this worker.",
    "system",
    True,
    "Look at POCL_ARTIFACT_ROOT of the worker; where the state is lost, branch off again.",
)
_DAY_SECONDS: Final = 86_400
_FAILURES_IN_A_ROW: Final = 2
"""So many are one too many, also for a worker that finds nothing wrong with itself."""


@dataclass(frozen=True)
class Supervisor:
    """Works on jobs, one at a time. Call it from the main thread: the engine dies with the thread that starts it."""

    database: Database
    store: ArtifactStore
    settings: Settings
    options: WorkerSettings
    worker_name: str
    """The name of this worker, unique among the workers."""
    devices: Sequence[Device]
    """The devices that it computes on, detected once: a driver takes long to answer."""
    should_stop: Callable[[], bool]
    """Whether this worker is shutting down: the job is then saved and released."""
    kill_strays: Callable[[], int] = lambda: 0
    """Kills what an engine leaves behind in sessions of its own; how many processes that were."""
    clock: Callable[[], float] = time.monotonic
    device_fault: str | None = None
    """Why a worker that is to use GPUs has none, in one sentence: it stays in quarantine."""
    check: Callable[[], str | None] | None = None
    """What is wrong with this worker, in one sentence, null for nothing; a :class:`SelfCheck` unless given."""
    tracer: Tracer = field(default_factory=NoOpTracer)
    """Makes the spans of attempts."""

    @property
    def retry(self) -> RetryPolicy:
        return RetryPolicy.from_settings(self.settings)

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
        device: DeviceKind = "cuda" if any(each.kind == "cuda" for each in self.devices) else "cpu"
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

    def hub_arguments(self) -> list[str]:
        """What an engine may read of the Hub, and how much of it is kept."""
        patterns = self.settings.hub_repositories
        return [
            *("--hub-cache-bytes", str(self.options.max_hub_cache_bytes)),
            *(f"--hub-allow={pattern}" for pattern in (() if patterns is None else patterns or ("",))),
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
                attempt = _Attempt(self, claim, directory)
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
        device: DeviceKind = "cuda" if any(each.kind == "cuda" for each in self.devices) else "cpu"
        return SelfCheck(
            self.options.engine,
            self.settings.work_root,
            self.devices,
            lambda temporary: self.engine_environment(temporary, device),
            timeout_seconds=self.options.check_seconds,
            should_stop=self.should_stop,
        )()

    def engine_environment(self, temporary: Path, device: DeviceKind) -> dict[str, str]:
        """The environment of an engine that computes on this kind of device."""
        return engine_environment(
            os.environ,
            temporary,
            home=self.settings.home / ENGINE_HOME,
            visible_devices=visible_devices(self.devices, device),
        )

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


class _Attempt:
    """One claimed attempt: its lease, its directory, its engine and the sink of its events."""

    def __init__(self, supervisor: Supervisor, claim: Claim, directory: AttemptDir) -> None:
        self._supervisor = supervisor
        self._options = supervisor.options
        self._clock = supervisor.clock
        self._claim = claim
        self._directory = directory
        self._lease = Lease(
            supervisor.database,
            claim,
            seconds=supervisor.settings.lease_seconds,
            interval=supervisor.settings.heartbeat_seconds,
            should_stop=supervisor.should_stop,
            clock=supervisor.clock,
        )
        self._log = BoundedLog(directory.log_file, supervisor.options.max_engine_log_bytes)
        self._trace = AttemptTrace(supervisor.tracer, claim, supervisor.worker_name)
        self._log_reader = EngineLogReader(self._log, self._redact)
        self._sink = RowSink(
            supervisor.database,
            supervisor.store,
            self._lease,
            claim,
            directory,
            read_log=lambda final: self._log_reader.read(final=final),
            max_log_bytes=supervisor.settings.max_log_bytes,
            flush_seconds=supervisor.options.flush_seconds,
            on_event=self._trace.add,
            clock=supervisor.clock,
        )
        self._stop_request: StopRequest | None = None
        """The stop request that the engine was sent."""
        self._kill_at: float | None = None
        self._device: DeviceKind = "cpu"
        """What the engine computes on."""
        self.outcome = AttemptOutcome.released()
        """How the attempt ended, once :meth:`run` has settled it."""
        self.finding: str | None = None
        """What the worker's check of itself found after the end; null for nothing."""

    def run(self) -> JobStatus:
        """Run the engine and settle the attempt; the status that the job then has.

        Raises:
            LostLease: the attempt no longer holds the job.
        """
        try:
            status = self._run()
        except LostLease:
            self._trace.end(AttemptOutcome(AttemptEnd.LOST, WORKER_LOST))
            raise
        self._trace.end(self.outcome)
        return status

    def _run(self) -> JobStatus:
        try:
            outcome = self._prepare() or self._run_engine()
        except LostLease:
            raise
        except DatabaseUnavailable:
            # Raised only before the engine starts: everything later waits for the database.
            outcome = AttemptOutcome.released(UNAVAILABLE_REASON)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is logged, and the job is tried again
            # Settled now, so that the job need not wait for its lease to expire.
            _log.exception("worker_failed")
            is_full = is_disk_full(error)
            outcome = AttemptOutcome.failed(DISK_FULL) if is_full else AttemptOutcome.crashed(WORKER_FAILED)
        return self._settle(self._with_check(outcome))

    def _with_check(self, outcome: AttemptOutcome) -> AttemptOutcome:
        """The outcome, after a check of the worker where the attempt failed by a fault that may pass."""
        if outcome.may_pass:
            # A store that is away is no fault of this worker.
            with suppress(ArtifactStoreUnavailable):
                self.finding = self._lease.renew_while(self._supervisor.find_fault)
        self.outcome = replace(outcome, worker_is_sick=self.finding is not None)
        return self.outcome

    def _prepare(self) -> AttemptOutcome | None:
        """Write the inputs of the engine; an outcome where the engine cannot start."""
        supervisor, claim = self._supervisor, self._claim
        try:
            with supervisor.database.transaction(write=False) as session:
                inputs = find_inputs(session, claim)
            spec = self._lease.renew_while(
                lambda: localize_spec(
                    inputs, supervisor.store, supervisor.settings, claim.spec, self._directory.inputs_dir
                )
            )
        except (ApiError, ArtifactNotFound, ArtifactCorrupt) as error:
            return AttemptOutcome.failed(_unusable_reference(error))
        except OSError as error:
            _log.error("inputs_not_fetched", error=str(error))
            return outcome_of_storage_failure(storage_failure_reason(error))
        spec = self._apply_worker_defaults(spec)
        jobs = [claim.job_id] if claim.parent_job_id is None else [claim.job_id, claim.parent_job_id]
        try:
            state = self._lease.renew_while(
                lambda: attempt_dir.stage_inputs(
                    self._directory,
                    supervisor.store,
                    spec,
                    posted_spec=claim.spec,
                    ranking_jobs=jobs,
                    training_states=claim.checkpoints,
                )
            )
        except OSError as error:
            _log.error("inputs_not_staged", error=str(error))
            return outcome_of_storage_failure(storage_failure_reason(error))
        if state is None and claim.needs_training_state:
            return AttemptOutcome.failed(_BRANCH_POINT_LOST)
        return None

    def _apply_worker_defaults(self, spec: DistillationSpec) -> DistillationSpec:
        resources, options = spec.resources, self._options
        device = resources.device
        if device == "auto":
            # Resolved here: an engine that looked for itself would train on the CPU where its GPU is lost.
            device = "cuda" if any(each.kind == "cuda" for each in self._supervisor.devices) else "cpu"
        self._device = device
        completed = resources.model_copy(update={"device": device, "threads": resources.threads or options.threads})
        return spec.model_copy(update={"resources": completed})

    def _run_engine(self) -> AttemptOutcome:
        kills_before = count_oom_kills()
        engine = self._start_engine()
        try:
            self._watch(engine)
        finally:
            # Kills the engine's own children too, and the engine where this attempt lost its lease.
            kill_group(engine)
            status = engine.wait()
            if strays := self._supervisor.kill_strays():
                _log.warning("strays_killed", processes=strays)
        while self._sink.pump():
            self._lease.heartbeat_if_due()
        return classify_exit(
            EngineExit(
                status=status,
                end_event=self._sink.end_event,
                stop_request=self._stop_request,
                student_stored=self._sink.student_stored,
                storage_error=self._sink.storage_error,
                oom_kills=count_oom_kills() - kills_before,
            )
        )

    def _start_engine(self) -> subprocess.Popen[bytes]:
        supervisor, options = self._supervisor, self._options
        environment = supervisor.engine_environment(self._directory.temp_dir, self._device)
        with (
            self._log.open() as errors,
            sandbox(options.sandbox, supervisor.settings, self._directory.path, environment) as restrict,
        ):
            engine = spawn(
                self._command(),
                # The engine writes its events to a file as well, which outlives this process.
                stdout=subprocess.DEVNULL,
                stderr=errors,
                environment=environment,
                directory=self._directory.path,
                death_signal=signal.SIGKILL,
                restrict=restrict,
            )
        available = options.memory_bytes or available_memory_bytes()
        limit = memory_limit(self._claim.memory_bytes, options.memory_factor, available)
        if limit is not None and options.memory_bytes is not None:
            # The rest of the machine is for other workers.
            limit = min(limit, options.memory_bytes)
        # On a GPU the process maps the memory of the device as well.
        limit_engine(engine.pid, limit if self._device == "cpu" else None)
        return engine

    def _command(self) -> list[str]:
        settings = self._supervisor.settings
        return [
            *self._options.engine,
            str(self._directory.spec_file),
            *("--posted-spec", str(self._directory.posted_spec_file)),
            *("--workdir", str(self._directory.workdir)),
            *("--cache", str(settings.cache_root)),
            *("--cache-bytes", str(settings.max_cache_bytes)),
            *("--keep-for", self._claim.job_id),
            *self._supervisor.hub_arguments(),
        ]

    def _watch(self, engine: subprocess.Popen[bytes]) -> None:
        while engine.poll() is None:
            self._sink.pump()
            self._deliver_stop_request(engine)
            self._log.trim()
            try:
                engine.wait(self._options.tick_seconds)
            except subprocess.TimeoutExpired:
                continue

    def _deliver_stop_request(self, engine: subprocess.Popen[bytes]) -> None:
        request = self._pending_stop_request()
        if request is not None and request.waits_for_stage_end:
            self._ask_to_stop_at_stage_end(engine, request)
            return
        if request is not None and (self._stop_request is None or self._kill_at is None):
            _log.info("engine_stop_requested", reason=str(request))
            engine.terminate()
            self._kill_at = self._clock() + self._options.grace_seconds
        # A cancel outranks an earlier request; one that waits for the end of the stage may turn into any other.
        replaceable = self._stop_request is None or self._stop_request.waits_for_stage_end
        if request is not None and (replaceable or request is StopRequest.CANCEL):
            self._stop_request = request
        if self._kill_at is not None and self._clock() >= self._kill_at:
            kill_group(engine)

    def _ask_to_stop_at_stage_end(self, engine: subprocess.Popen[bytes], request: StopRequest) -> None:
        # Before it reports its start the engine may not listen yet, and the signal would end it.
        if self._stop_request is not None or not self._sink.engine_started:
            return
        _log.info("engine_stop_requested", reason=str(request), at="stage_end")
        engine.send_signal(signal.SIGUSR1)
        self._stop_request = request

    def _pending_stop_request(self) -> StopRequest | None:
        """The stop request of the client or the drain; else of this worker, which shuts down or sees a stall."""
        request = self._lease.heartbeat_if_due()
        if request is not None and not request.waits_for_stage_end:
            return request
        if self._supervisor.should_stop():
            return StopRequest.RELEASE
        if self._clock() - self._sink.last_event_at >= self._options.stall_seconds:
            return StopRequest.STALL
        return request

    def _redact(self, lines: bytes) -> bytes:
        """Lines of the engine's log for clients, with the paths of this machine replaced by placeholders."""
        settings = self._supervisor.settings
        # The longer path first: the directory of the attempt lies below the home.
        for path, placeholder in (
            (self._directory.path, b"<attempt>"),
            (settings.artifact_root, b"<store>"),
            (settings.cache_root, b"<cache>"),
            (settings.home, b"<home>"),
        ):
            lines = lines.replace(os.fsencode(path), placeholder)
        return redact_secrets(lines, os.environ)

    def _settle(self, outcome: AttemptOutcome) -> JobStatus:
        """Settle the attempt, again and again while the database is unavailable."""
        while (status := self._sink.settle(outcome, self._supervisor.retry)) is None:
            time.sleep(self._options.tick_seconds)
            self._lease.heartbeat_if_due()
        return status


@dataclass(frozen=True)
class StoredInputs:
    """What a specification names of what is in the artifact store."""

    datasets: Mapping[str, Dataset]
    """By their ids."""
    checkpoint_keys: Mapping[str, str]
    """The store keys of checkpoints by their ids."""


def find_inputs(session: Session, claim: Claim) -> StoredInputs:
    """The rows of the data sets and checkpoints that the claim's specification names.

    Raises:
        DatasetNotFound, CheckpointNotFound: one of them was deleted.
    """
    named = [ref.dataset for ref in claim.spec.data_refs.values() if ref.dataset is not None]
    models = [ref.checkpoint for ref in claim.spec.model_refs.values() if ref.checkpoint is not None]
    return StoredInputs(
        {each: get_dataset(session, claim.project, each) for each in named},
        {each: get_checkpoint(session, claim.project, each).store_key for each in models},
    )


def localize_spec(
    inputs: StoredInputs, store: ArtifactStore, settings: Settings, spec: DistillationSpec, scratch: Path
) -> DistillationSpec:
    """The specification with ids and model names replaced by absolute paths.

    Args:
        scratch: where what a bucket has is fetched to, which takes long.

    Raises:
        ArtifactNotFound, ArtifactCorrupt: what it names was deleted or damaged.
        PathOutsideModelRoots, EngineRefusal: a model is not where the service may read it.
        OSError: the store is away or refuses, or the disk is full.
    """

    def data(reference: DataRef) -> DataRef:
        if reference.dataset is None:
            return reference
        dataset = inputs.datasets[reference.dataset]
        return stored_reference(dataset, store.provide_file(dataset.store_key, scratch))

    def model(pointer: str, reference: ModelRef) -> ModelRef:
        if reference.checkpoint is not None:
            path = store.provide_directory(inputs.checkpoint_keys[reference.checkpoint], scratch)
        elif reference.path is not None:
            path = locate_model(settings.model_roots, reference.path, pointer=f"{pointer}/path")
        else:
            return reference
        return reference.model_copy(update={"path": str(path), "checkpoint": None})

    localized = spec.with_data_refs({pointer: data(ref) for pointer, ref in spec.data_refs.items()})
    if localized.ranking_model is not None:
        localized = localized.with_ranking_model(model(RANKING_MODEL_POINTER, localized.ranking_model))
    return localized.model_copy(
        update={
            "teacher": None if localized.teacher is None else model("/teacher", localized.teacher),
            "student": model("/student", localized.student),
        }
    )


def _unusable_reference(error: Exception) -> EndReason:
    if isinstance(error, NotFound):
        return EndReason(error.code, error.detail, "user", False, "Submit the job again with what exists.")
    if isinstance(error, ApiError):
        # The service had the model when it accepted the job: this worker lacks it.
        hint = "Give every worker the models of the API below POCL_MODEL_ROOTS."
        return EndReason(error.code, error.detail, "system", True, hint)
    # Where the store of this worker is not mounted, that of another may be.
    message = "A stored file that the job needs is gone, damaged or not to be had from this worker."
    return EndReason(STORAGE_FAILED.code, message, "system", True, "Look at POCL_ARTIFACT_ROOT of the worker.")
