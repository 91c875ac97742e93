"""One attempt at one job: claim it, run the engine in a process of its own, carry its events into the rows, settle.

The engine is asked to stop by SIGTERM, upon which it saves its state; it is killed only after a grace period.
A worker that lost its lease kills its engine at once and writes nothing more.
"""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from sqlalchemy.orm import Session

from domain.artifacts import ArtifactCorrupt, ArtifactNotFound, ArtifactStore
from domain.checkpoints.repository import get_checkpoint
from domain.datasets.repository import get_dataset
from domain.db import DATABASE_UNAVAILABLE, Database
from domain.errors import ApiError, LostLease
from domain.jobs import leases, repository
from domain.jobs.leases import Claim
from domain.jobs.queue import memory_by_device_kind
from domain.jobs.states import AttemptOutcome, EndReason, JobStatus, StopRequest
from domain.model_paths import locate_model
from domain.settings import Settings
from domain.workers.models import Device
from domain.workers.repository import accepts_jobs
from pocl.spec import DataRef, DistillationSpec, ModelRef
from pocl.storage.shared_cache import SharedCache
from worker import attempt_dir
from worker.attempt_dir import AttemptDir
from worker.bounded_log import BoundedLog
from worker.engine_exit import (
    STORAGE_FAILED,
    WORKER_FAILED,
    EngineExit,
    classify_exit,
    count_oom_kills,
    storage_failure_reason,
)
from worker.lease import Lease
from worker.processes import kill_group, spawn
from worker.settings import WorkerSettings
from worker.sink import RowSink

log = logging.getLogger(__name__)

_MOST_UNPINNED: Final = 500
# What the engine may see of the worker's environment. No database, no broker, no key, no token of a hub.
_PASSED_ON: Final = frozenset(
    {
        *("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH"),
        *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF"),
        *("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "OMP_NUM_THREADS", "MKL_NUM_THREADS"),
        *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "SSL_CERT_FILE", "SSL_CERT_DIR"),
    }
)


@dataclass(frozen=True)
class Supervisor:
    """Works on jobs, one at a time. Call it from the main thread: the engine dies with the thread that starts it."""

    database: Database
    store: ArtifactStore
    settings: Settings
    options: WorkerSettings
    worker: str
    """A name for people, unique among the workers."""
    devices: Sequence[Device]
    """What it computes on, found out once: to ask a driver takes long."""
    should_stop: Callable[[], bool]
    """Whether this worker shuts down: the job is then saved and given back."""
    clock: Callable[[], float] = time.monotonic

    def work_one(self) -> JobStatus | None:
        """Claim the next job that fits and see one attempt through; the state in which that left the job.

        Returns:
            None where there was nothing to do, the database was away, or the job was taken away.
        """
        if self.should_stop():
            return None
        attempt_dir.prune(self.settings.work_root, keep=self.options.kept_attempts)
        try:
            self._unpin_ended()
            with self.database.transaction(write=True) as session:
                if not accepts_jobs(session, self.worker):
                    log.info("this worker is drained")
                    return None
                claim = leases.claim_next(
                    session,
                    worker=self.worker,
                    lease_seconds=self.settings.lease_seconds,
                    memory=memory_by_device_kind([asdict(device) for device in self.devices]),
                )
        except DATABASE_UNAVAILABLE as error:
            log.warning("no job could be claimed: %s", type(error).__name__)
            return None
        if claim is None:
            return None
        log.info("attempt %d at %s begins", claim.attempt, claim.job_id)
        try:
            with attempt_dir.locked(self.settings.work_root, claim.job_id, claim.attempt) as place:
                status = _Attempt(self, claim, place).run()
        except LostLease:
            log.warning("attempt %d at %s lost its lease", claim.attempt, claim.job_id)
            return None
        except OSError as error:
            # Without a workplace the attempt never began.
            self._give_up(claim, AttemptOutcome.failed(storage_failure_reason(error)))
            raise
        log.info("attempt %d left %s %s", claim.attempt, claim.job_id, status)
        return status

    def _unpin_ended(self) -> None:
        """What ended jobs kept in the cache of this machine may go; of those that wait or pause it stays."""
        cache = SharedCache(self.settings.cache_root, self.settings.max_cache_bytes)
        pinned = sorted(cache.pinned_by())[:_MOST_UNPINNED]
        if not pinned:
            return
        with self.database.transaction(write=False) as session:
            ended = repository.filter_ended(session, pinned)
        for job_id in ended:
            replace(cache, keep_for=job_id).unpin()

    def _give_up(self, claim: Claim, outcome: AttemptOutcome) -> None:
        with suppress(LostLease, *DATABASE_UNAVAILABLE), self.database.transaction(write=True) as session:
            leases.settle(session, claim, outcome)


class _Attempt:
    def __init__(self, supervisor: Supervisor, claim: Claim, place: AttemptDir) -> None:
        self._supervisor = supervisor
        self._options = supervisor.options
        self._clock = supervisor.clock
        self._claim = claim
        self._place = place
        self._lease = Lease(
            supervisor.database,
            claim,
            seconds=supervisor.settings.lease_seconds,
            every=supervisor.settings.heartbeat_seconds,
            clock=supervisor.clock,
        )
        self._log = BoundedLog(place.log, supervisor.options.max_engine_log_bytes)
        self._sink = RowSink(
            supervisor.database,
            supervisor.store,
            self._lease,
            claim,
            place,
            log_tail=self._log_tail,
            flush_seconds=supervisor.options.flush_seconds,
            clock=supervisor.clock,
        )
        self._stop_request: StopRequest | None = None
        """What the engine was asked for."""
        self._kill_at: float | None = None

    def run(self) -> JobStatus:
        try:
            outcome = self._furnish() or self._train()
        except LostLease:
            raise
        except DATABASE_UNAVAILABLE:
            # Only before the engine starts: all that comes later waits for the database.
            outcome = AttemptOutcome.released()
        except Exception:
            # The job must not wait for its lease to expire; the worker's log gets the rest.
            self._settle(AttemptOutcome.crashed(WORKER_FAILED))
            raise
        return self._settle(outcome)

    def _furnish(self) -> AttemptOutcome | None:
        """Prepare the workplace; an outcome where that shows that the engine need not start."""
        supervisor, claim = self._supervisor, self._claim
        try:
            with supervisor.database.transaction(write=False) as session:
                spec = localize_spec(session, supervisor.store, supervisor.settings, claim)
        except (ApiError, ArtifactNotFound, ArtifactCorrupt) as error:
            return AttemptOutcome.failed(_unusable_reference(error))
        spec = self._apply_worker_defaults(spec)
        jobs = [claim.job_id] if claim.parent_job_id is None else [claim.job_id, claim.parent_job_id]
        try:
            self._lease.renew_while(
                lambda: attempt_dir.stage_inputs(
                    self._place, supervisor.store, spec, ranking_jobs=jobs, training_states=claim.checkpoints
                )
            )
        except OSError as error:
            log.error("the workplace cannot be written: %s", error)
            return AttemptOutcome.failed(storage_failure_reason(error))
        return None

    def _apply_worker_defaults(self, spec: DistillationSpec) -> DistillationSpec:
        resources, options = spec.resources, self._options
        device = options.device if resources.device == "auto" else resources.device
        fitted = resources.model_copy(update={"device": device, "threads": resources.threads or options.threads})
        return spec.model_copy(update={"resources": fitted})

    def _train(self) -> AttemptOutcome:
        kills_before = count_oom_kills()
        with self._log.open() as errors:
            engine = spawn(
                self._command(),
                # The events are in a file as well, which outlives this process.
                stdout=subprocess.DEVNULL,
                stderr=errors,
                environment=engine_environment(os.environ, self._place.temp_dir, self._options.gpus),
                directory=self._place.path,
                death_signal=signal.SIGKILL,
            )
        try:
            self._watch(engine)
        finally:
            # Also what the engine itself started, and also when this attempt lost its lease.
            kill_group(engine)
            status = engine.wait()
        while self._sink.pump():
            self._lease.heartbeat_if_due()
        return classify_exit(
            EngineExit(
                status=status,
                last=self._sink.end_event,
                stop_request=self._stop_request,
                stored=self._sink.student_stored,
                trouble=self._sink.storage_error,
                oom_kills=count_oom_kills() - kills_before,
            )
        )

    def _command(self) -> list[str]:
        settings = self._supervisor.settings
        return [
            *self._options.engine,
            str(self._place.spec_file),
            *("--workdir", str(self._place.workdir)),
            *("--cache", str(settings.cache_root)),
            *("--cache-bytes", str(settings.max_cache_bytes)),
            *("--keep-for", self._claim.job_id),
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
            log.info("the engine of %s is asked to stop: %s", self._claim.job_id, request)
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
        log.info("the engine of %s is asked to stop at the end of its stage: %s", self._claim.job_id, request)
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

    def _log_tail(self) -> bytes:
        """The end of the engine's log, for clients: places of this machine go by their names."""
        settings = self._supervisor.settings
        tail = self._log.tail(settings.max_log_bytes)
        # The longer path first: the workplace lies below the home.
        for place, name in (
            (self._place.path, b"<attempt>"),
            (settings.artifact_root, b"<store>"),
            (settings.cache_root, b"<cache>"),
            (settings.home, b"<home>"),
        ):
            tail = tail.replace(os.fsencode(place), name)
        return tail

    def _settle(self, outcome: AttemptOutcome) -> JobStatus:
        """Try until it is written, or until the job may be another worker's."""
        while (status := self._sink.settle(outcome)) is None:
            time.sleep(self._options.tick_seconds)
            self._lease.heartbeat_if_due()
        return status


def localize_spec(session: Session, store: ArtifactStore, settings: Settings, claim: Claim) -> DistillationSpec:
    """The claim's specification with ids and model names replaced by absolute paths.

    Raises:
        DatasetNotFound, CheckpointNotFound, ArtifactNotFound, ArtifactCorrupt: what it names was deleted.
        PathOutsideModelRoots, ModelMissing: a model is not where the service may read it.
    """

    def data(reference: DataRef) -> DataRef:
        if reference.dataset is None:
            return reference
        key = get_dataset(session, claim.project, reference.dataset).store_key
        return DataRef(path=str(store.locate(key)))

    def model(role: str, reference: ModelRef) -> ModelRef:
        if reference.checkpoint is not None:
            place = store.directory(get_checkpoint(session, claim.project, reference.checkpoint).store_key)
        elif reference.path is not None:
            place = locate_model(settings.model_roots, reference.path, pointer=f"/{role}/path")
        else:
            return reference
        return reference.model_copy(update={"path": str(place), "checkpoint": None})

    spec, rows = claim.spec, claim.spec.data
    found = {
        "train": data(rows.train),
        "validation": None if rows.validation is None else data(rows.validation),
    }
    return spec.model_copy(
        update={
            "teacher": None if spec.teacher is None else model("teacher", spec.teacher),
            "student": model("student", spec.student),
            "data": rows.model_copy(update=found),
        }
    )


def engine_environment(
    environ: Mapping[str, str], temporary: Path, gpus: Sequence[int] | None = None
) -> dict[str, str]:
    """The environment of an engine: an allowed part of the worker's, without credentials, and with its GPUs alone."""
    allowed = {name: value for name, value in environ.items() if name in _PASSED_ON}
    if gpus is not None:
        allowed["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    return {**allowed, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def _unusable_reference(error: Exception) -> EndReason:
    if isinstance(error, ApiError):
        return EndReason(error.code, error.detail, "user", False, "Submit the job again with what exists.")
    return EndReason(STORAGE_FAILED.code, "A stored file that the job needs is gone or damaged.", "system", False)
