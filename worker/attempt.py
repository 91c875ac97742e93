"""One claimed attempt at a job: run the engine as a child process, write its events into the rows, settle.

The engine is asked to stop by SIGTERM, upon which it saves its state; it is killed only after a grace period.
A worker that lost its lease kills its engine at once and writes nothing more.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Final

import structlog

from domain.artifacts import ArtifactCorrupt, ArtifactNotFound, ArtifactStoreUnavailable
from domain.database_errors import DatabaseUnavailable
from domain.errors import ApiError, LostLease
from domain.jobs.leases import Claim
from domain.jobs.states import DATABASE_UNAVAILABLE as UNAVAILABLE_REASON
from domain.jobs.states import WORKER_LOST, AttemptEnd, AttemptOutcome, EndReason, JobStatus, StopRequest
from domain.workers.models import DeviceKind
from pocl.container_limits import available_memory_bytes, count_oom_kills
from pocl.errors import is_disk_full
from pocl.spec import DistillationSpec
from worker import attempt_dir
from worker.attempt_dir import AttemptDir
from worker.attempt_trace import AttemptTrace
from worker.bounded_log import BoundedLog
from worker.engine_environment import redact_secrets
from worker.engine_exit import (
    DISK_FULL,
    STORAGE_FAILED,
    WORKER_FAILED,
    EngineExit,
    classify_exit,
    outcome_of_storage_failure,
    storage_failure_reason,
)
from worker.engine_host import EngineHost
from worker.engine_limits import limit_engine, memory_limit
from worker.engine_log import EngineLogReader
from worker.engine_sandbox import sandbox
from worker.job_inputs import explain_unusable, find_inputs, localize_spec
from worker.lease import Lease
from worker.processes import kill_group, spawn
from worker.sink import RowSink

_log = structlog.get_logger(__name__)

_BRANCH_POINT_LOST: Final = EndReason(
    STORAGE_FAILED.code,
    "The training state at which the job begins is damaged or not to be had from this worker.",
    "system",
    True,
    "Look at POCL_ARTIFACT_ROOT of the worker; where the state is lost, branch off again.",
)


class Attempt:
    """One claimed attempt: its lease, its directory, its engine and the sink of its events."""

    def __init__(
        self, host: EngineHost, claim: Claim, directory: AttemptDir, find_fault: Callable[[], str | None]
    ) -> None:
        self._host = host
        self._find_fault = find_fault
        self._options = host.options
        self._clock = host.clock
        self._claim = claim
        self._directory = directory
        self._lease = Lease(
            host.database,
            claim,
            seconds=host.settings.lease_seconds,
            interval=host.settings.heartbeat_seconds,
            should_stop=host.should_stop,
            clock=host.clock,
        )
        self._log = BoundedLog(directory.log_file, host.options.max_engine_log_bytes)
        self._trace = AttemptTrace(host.tracer, claim, host.worker_name)
        self._log_reader = EngineLogReader(self._log, self._redact)
        self._sink = RowSink(
            host.database,
            host.store,
            self._lease,
            claim,
            directory,
            read_log=lambda final: self._log_reader.read(final=final),
            max_log_bytes=host.settings.max_log_bytes,
            flush_seconds=host.options.flush_seconds,
            on_event=self._trace.add,
            clock=host.clock,
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
                self.finding = self._lease.renew_while(self._find_fault)
        self.outcome = replace(outcome, worker_is_sick=self.finding is not None)
        return self.outcome

    def _prepare(self) -> AttemptOutcome | None:
        """Write the inputs of the engine; an outcome where the engine cannot start."""
        host, claim = self._host, self._claim
        try:
            with host.database.transaction(write=False) as session:
                inputs = find_inputs(session, claim)
            spec = self._lease.renew_while(
                lambda: localize_spec(inputs, host.store, host.settings, claim.spec, self._directory.inputs_dir)
            )
        except (ApiError, ArtifactNotFound, ArtifactCorrupt) as error:
            return AttemptOutcome.failed(explain_unusable(error))
        except OSError as error:
            _log.error("inputs_not_fetched", error=str(error))
            return outcome_of_storage_failure(storage_failure_reason(error))
        spec = self._apply_worker_defaults(spec)
        jobs = [claim.job_id] if claim.parent_job_id is None else [claim.job_id, claim.parent_job_id]
        try:
            state = self._lease.renew_while(
                lambda: attempt_dir.stage_inputs(
                    self._directory,
                    host.store,
                    spec,
                    posted_spec=claim.spec,
                    ranking_jobs=jobs,
                    training_states=claim.checkpoints,
                    compared=inputs.compared_keys,
                    run_name=inputs.run_name,
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
            device = self._host.device_kind
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
            if strays := self._host.kill_strays():
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
        host, options = self._host, self._options
        environment = host.engine_environment(self._directory.temp_dir, self._device)
        with (
            self._log.open() as errors,
            sandbox(options.sandbox, host.settings, self._directory.path, environment) as restrict,
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
        settings = self._host.settings
        return [
            *self._options.engine,
            str(self._directory.spec_file),
            *("--posted-spec", str(self._directory.posted_spec_file)),
            *("--workdir", str(self._directory.workdir)),
            *("--cache", str(settings.cache_root)),
            *("--cache-bytes", str(settings.max_cache_bytes)),
            *("--keep-for", self._claim.job_id),
            *self._host.hub_arguments(),
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
        if self._host.should_stop():
            return StopRequest.RELEASE
        if self._clock() - self._sink.last_event_at >= self._options.stall_seconds:
            return StopRequest.STALL
        return request

    def _redact(self, lines: bytes) -> bytes:
        """Lines of the engine's log for clients, with the paths of this machine replaced by placeholders."""
        settings = self._host.settings
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
        while (status := self._sink.settle(outcome, self._host.retry)) is None:
            time.sleep(self._options.tick_seconds)
            self._lease.heartbeat_if_due()
        return status
