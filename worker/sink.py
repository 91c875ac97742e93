"""Writes the engine's events into the rows, after storing the files that they name in the artifact store."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar, assert_never

import structlog
from pydantic import ValidationError
from sqlalchemy.orm import Session

from domain.artifacts import (
    ArtifactCorrupt,
    ArtifactExists,
    ArtifactNotFound,
    ArtifactStore,
    ArtifactStoreUnavailable,
)
from domain.checkpoints.repository import has_tombstone
from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.jobs import event_recorder, leases
from domain.jobs.checkpoint_deletion import discard_surplus
from domain.jobs.engine_logs import LogChunk, append_log
from domain.jobs.leases import Claim
from domain.jobs.retries import NO_WAIT, RetryPolicy
from domain.jobs.states import TERMINAL, AttemptOutcome, EndReason, JobStatus
from pocl.events import (
    RESUMABLE_KINDS,
    ArtifactWritten,
    CheckpointSaved,
    Evaluated,
    EventEnvelope,
    HistoryEvent,
    Progressed,
    RunEnded,
    RunFinished,
    RunStarted,
    StepLogged,
    from_line,
)
from pocl.layout import ANSWERS_FILE, EVENTS_FILE, PARTIAL_RANKING_FILE, RANKING_FILE, RANKING_INPUTS_FILE
from pocl.storage.manifest import MANIFEST
from worker.attempt_dir import AttemptDir, ranking_key
from worker.engine_exit import storage_failure_reason
from worker.garbage import remove_unnamed_checkpoints
from worker.lease import Lease

_log = structlog.get_logger(__name__)

_CHUNK_BYTES: Final = 2**20
_MAX_LINE_BYTES: Final = 2**18
_LOG_INTERVAL_SECONDS: Final = 2
_MAX_PENDING_CHUNKS: Final = 64
_PARTIAL_RANKING_INTERVAL_SECONDS: Final = 60
"""How often a partial ranking is stored: the work that a lost worker costs."""
_MAX_PENDING_EVENTS: Final = 20_000
_STORE_WAIT_SECONDS: Final = 3600
"""For how long the attempt waits for an artifact store that is away, before it gives the job back."""
_UNUSABLE_FILE: Final = (ArtifactCorrupt, ArtifactExists, ArtifactNotFound, FileNotFoundError, ValueError)


Result = TypeVar("Result")


class EventTail:
    """Reads whole lines from an offset on; the file may not exist yet and may end in half a line."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path = path
        self.offset = offset
        """Bytes read, up to the end of the last whole line."""

    @property
    def size(self) -> int:
        """The bytes of the file; 0 where there is none yet."""
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0

    def read(self) -> list[tuple[EventEnvelope, int]]:
        """The next events, each with the offset at which its line ends; empty when there are none.

        A line that this version cannot read is skipped.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self.offset)
                chunk = file.read(_CHUNK_BYTES)
        except FileNotFoundError:
            return []
        if len(chunk) == _CHUNK_BYTES and b"\n" not in chunk:
            # No event is that long. To read on would hold ever more of the line in memory.
            self.offset += len(chunk)
            return []
        events: list[tuple[EventEnvelope, int]] = []
        # After the last line end there is half a line, or nothing.
        for line in chunk.split(b"\n")[:-1]:
            self.offset += len(line) + 1
            event = _parse(line)
            if event is not None:
                events.append((event, self.offset))
        return events


def _parse(line: bytes) -> EventEnvelope | None:
    if len(line) > _MAX_LINE_BYTES:
        _log.warning("event_skipped", reason="too long", bytes=len(line))
        return None
    try:
        return from_line(line)
    except ValidationError:
        _log.warning("event_skipped", reason="not known to this version", line=repr(line[:200]))
        return None


@dataclass
class _Batch:
    """Events and files that one transaction writes.

    A batch whose commit was tried is repeated as it was until it is known to be committed. Its offset shows whether it
    was; events added to it meanwhile would take those before them along for a second time.
    """

    offset: int
    """Where its events end in `events.jsonl`, in bytes."""
    events: list[EventEnvelope] = field(default_factory=list)
    files: list[Callable[[Session], object]] = field(default_factory=list)
    """Each adds the row of one stored file."""


class RowSink:
    """Writes the events of an attempt's engine into the rows, in their order and under the attempt's lease."""

    def __init__(
        self,
        database: Database,
        store: ArtifactStore,
        lease: Lease,
        claim: Claim,
        directory: AttemptDir,
        *,
        read_log: Callable[[bool], Sequence[LogChunk]],
        max_log_bytes: int,
        flush_seconds: float,
        on_event: Callable[[EventEnvelope], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._store = store
        self._lease = lease
        self._claim = claim
        self._directory = directory
        self._read_log = read_log
        self._max_log_bytes = max_log_bytes
        self._log_chunks: list[LogChunk] = []
        """Parts of the log whose rows are not known to be written."""
        self._on_event = on_event
        self._flush_seconds = flush_seconds
        self._clock = clock
        self._tail = EventTail(directory.workdir / EVENTS_FILE, claim.events_offset)
        self._unconfirmed: list[_Batch] = []
        """Batches whose commit was tried, oldest first."""
        self._batch = _Batch(self._tail.offset)
        """What the next transaction writes besides."""
        self._urgent = False
        """Whether the next transaction should not wait for the flush interval."""
        self._pending_states = 0
        """Stored training states whose rows are not known to be written."""
        self._seen_size = 0
        """Bytes of the events file when it was last looked at without being read."""
        self._flushed_at = self._log_read_at = self._partial_ranking_stored_at = self.last_event_at = clock()
        self.end_event: RunFinished | RunEnded | None = None
        """The last event of the engine, once it has reported one."""
        self.engine_started = False
        """Whether the engine has reported its start: from then on it handles signals."""
        self.student_stored = False
        """Whether the finished student is in the store."""
        self.storage_error: EndReason | None = None
        """Why a file of the run could not be stored; null where all were."""

    def pump(self) -> bool:
        """Read new events, and write them when that is due. False when there were none.

        Raises:
            LostLease: the attempt no longer holds the job.
        """
        has_new = self._read_events()
        # A change of state is shown at once; steps come too often for that.
        due = self._clock() - self._flushed_at >= self._flush_seconds
        has_events = bool(self._unconfirmed or self._batch.events)
        if (has_events and (due or self._urgent)) or (self._is_log_due() and self._collect_log()):
            self._write()
        return has_new

    def settle(self, outcome: AttemptOutcome, retry: RetryPolicy = NO_WAIT) -> JobStatus | None:
        """Write what is pending and settle the attempt, in one transaction. None while the database is unavailable.

        Args:
            retry: When the job may be tried again where the outcome may pass.

        Raises:
            LostLease: the attempt no longer holds the job, or was settled already.
        """
        settled: list[JobStatus] = []

        def settle_claim(session: Session) -> None:
            seconds_run = self._lease.seconds_run
            settled[:] = [leases.settle(session, self._claim, outcome, retry=retry, seconds_run=seconds_run)]

        if not self._write(settle_claim):
            return None
        if settled[0] in TERMINAL:
            self._remove_unnamed_checkpoints()
        return settled[0]

    def _remove_unnamed_checkpoints(self) -> None:
        """Remove what earlier attempts stored and were killed before they wrote its row; no attempt follows."""
        try:
            remove_unnamed_checkpoints(self._database, self._store, self._claim.job_id)
        except (DatabaseUnavailable, OSError) as error:
            # They go with the job.
            _log.warning("unnamed_checkpoints_not_removed", error=str(error))

    def _read_events(self) -> bool:
        if sum(len(batch.events) for batch in (*self._unconfirmed, self._batch)) >= _MAX_PENDING_EVENTS:
            # The database is unavailable; the rest of the events stays in the file, where the engine adds to it.
            if (size := self._tail.size) > self._seen_size:
                self._seen_size, self.last_event_at = size, self._clock()
            return False
        before = self._tail.offset
        for envelope, offset in self._tail.read():
            self._batch.events.append(envelope)
            self._batch.offset = offset
            self._handle(envelope)
            self._on_event(envelope)
        if self._tail.offset == before:
            return False
        self.last_event_at = self._clock()
        return True

    def _handle(self, envelope: EventEnvelope) -> None:
        match envelope.event:
            case StepLogged():
                return
            case Progressed() as progressed:
                if (
                    progressed.phase == "ranking"
                    and self._clock() - self._partial_ranking_stored_at >= _PARTIAL_RANKING_INTERVAL_SECONDS
                ):
                    self._store_partial_ranking()
                return
            case RunStarted():
                self.engine_started = True
            case CheckpointSaved() as saved:
                self._store_checkpoint(saved)
            case ArtifactWritten() as written:
                self._store_artifact(written)
            case RunFinished() | RunEnded() as end_event:
                self.end_event = end_event
                self._store_partial_ranking()
                self._store_for_next_attempt(ANSWERS_FILE)
            case Evaluated():
                self._store_for_next_attempt(ANSWERS_FILE)
            case HistoryEvent():
                pass
            case _:
                assert_never(envelope.event)
        self._urgent = True

    def _store_checkpoint(self, saved: CheckpointSaved) -> None:
        key = f"jobs/{self._claim.job_id}/attempt-{self._claim.token}/{saved.kind}-{saved.step:08d}"
        if saved.kind == "training" and self._unconfirmed and self._pending_states > self._claim.spec.checkpoints.keep:
            # Surplus ones are deleted once their rows are written, so without the database they would fill the disk.
            _log.warning("checkpoint_not_stored", kind=saved.kind, step=saved.step, error="database unavailable")
            return
        # `best` is named by its stage's directory, whose training state the engine may drop at any moment.
        resumable = saved.kind in RESUMABLE_KINDS
        try:
            source = self._directory.locate(saved.path)
            # A training state is not waited for: a later one follows.
            stored = self._run_patiently(
                lambda: self._store.publish(source, key, nested=resumable),
                seconds=0 if saved.kind == "training" else _STORE_WAIT_SECONDS,
            )
        except _UNUSABLE_FILE as error:
            # The engine prunes old training states by itself; a later one follows.
            _log.warning("checkpoint_not_stored", kind=saved.kind, step=saved.step, error=str(error))
            return
        except OSError as error:
            self._record_storage_error(error)
            return
        manifest = next(file.sha256 for file in stored.files if file.path == MANIFEST)

        def add_row(session: Session) -> None:
            if has_tombstone(session, key):
                # The batch was committed before, and the checkpoint has been deleted since.
                return
            event_recorder.add_checkpoint(
                session,
                self._claim,
                kind=saved.kind,
                step=saved.step,
                stage=saved.stage,
                store_key=key,
                size_bytes=stored.size_bytes,
                manifest_sha256=manifest,
            )

        self._batch.files.append(add_row)
        self._pending_states += saved.kind == "training"
        self.student_stored = self.student_stored or saved.kind == "final"

    def _store_artifact(self, written: ArtifactWritten) -> None:
        try:
            source = self._directory.locate(written.path)
            key = f"jobs/{self._claim.job_id}/attempt-{self._claim.token}/{source.name}"
            if written.kind == "ranking":
                key = ranking_key(self._claim.job_id, RANKING_FILE)
                inputs = source.with_name(RANKING_INPUTS_FILE)
                self._run_patiently(
                    lambda: self._store.publish_file(inputs, ranking_key(self._claim.job_id, inputs.name))
                )
            stored = self._run_patiently(lambda: self._store.publish_file(source, key))
        except _UNUSABLE_FILE as error:
            _log.warning("artifact_not_stored", kind=written.kind, error=str(error))
            return
        except OSError as error:
            self._record_storage_error(error)
            return

        def add_row(session: Session) -> None:
            event_recorder.add_artifact(
                session, self._claim, kind=written.kind, store_key=key, size_bytes=stored.size, sha256=stored.sha256
            )

        self._batch.files.append(add_row)

    def _run_patiently(self, store: Callable[[], Result], *, seconds: float = _STORE_WAIT_SECONDS) -> Result:
        """Run `store`, again and again while the artifact store is away, for so many seconds at most.

        Raises:
            ArtifactStoreUnavailable: it stays away, or the attempt is asked to stop meanwhile.
            LostLease: the attempt no longer holds the job.
        """
        deadline = self._clock() + seconds
        while True:
            try:
                return self._lease.renew_while(store)
            except ArtifactStoreUnavailable as error:
                if self._clock() >= deadline or self._lease.is_asked_to_stop():
                    raise
                _log.warning("artifact_store_unavailable", error=str(error), hint="The engine goes on.")
            time.sleep(self._flush_seconds)

    def _store_partial_ranking(self) -> None:
        """Store the partial ranking, so that another attempt, perhaps on another machine, continues it."""
        if self._store_for_next_attempt(PARTIAL_RANKING_FILE):
            self._partial_ranking_stored_at = self._clock()

    def _store_for_next_attempt(self, name: str) -> bool:
        """Store a file of the working directory for the next attempt; whether it is there."""
        source = self._directory.workdir / name
        if not source.exists():
            return False
        key = ranking_key(self._claim.job_id, name)
        try:
            self._lease.renew_while(lambda: self._store.publish_file(source, key))
        except FileNotFoundError:
            # The engine removed it meanwhile: the ranking is finished.
            return False
        except OSError as error:
            # The job goes on without it: a later attempt ranks more samples again, or lacks answers.
            _log.warning("file_not_stored_for_next_attempt", file=name, error=str(error))
        return True

    def _record_storage_error(self, error: OSError) -> None:
        self.storage_error = storage_failure_reason(error)
        _log.error("artifact_store_failed", error=str(error))

    def _write(self, finish: Callable[[Session], None] | None = None) -> bool:
        batches = [*self._unconfirmed, self._batch]
        if finish is not None or self._is_log_due():
            self._collect_log(final=finish is not None)
        try:
            with self._database.transaction(write=True) as session:
                for batch in batches:
                    event_recorder.apply_events(session, self._claim, batch.events, offset=batch.offset)
                    for add_row in batch.files:
                        add_row(session)
                surplus = self._discard_surplus(session) if any(batch.files for batch in batches) else []
                append_log(session, self._claim, self._log_chunks, max_bytes=self._max_log_bytes)
                if finish is not None:
                    finish(session)
        except DatabaseUnavailable as error:
            _log.warning("events_not_written", error=str(error))
            if self._batch.events or self._batch.files:
                self._unconfirmed, self._batch = batches, _Batch(self._batch.offset)
            # The next try waits for the flush interval.
            self._flushed_at, self._urgent = self._clock(), False
            return False
        for key in surplus:
            self._store.discard(key)
        self._unconfirmed, self._batch, self._urgent = [], _Batch(self._batch.offset), False
        self._pending_states, self._log_chunks = 0, []
        self._flushed_at = self._clock()
        return True

    def _is_log_due(self) -> bool:
        return self._clock() - self._log_read_at >= _LOG_INTERVAL_SECONDS

    def _collect_log(self, *, final: bool = False) -> bool:
        """Read what was added to the log; whether there was anything. While the database is unavailable the log stays
        in its file, once enough of it waits here.
        """
        self._log_read_at = self._clock()
        if len(self._log_chunks) > _MAX_PENDING_CHUNKS and not final:
            return False
        added = self._read_log(final)
        self._log_chunks += added
        return bool(added)

    def _discard_surplus(self, session: Session) -> list[str]:
        """Delete the rows of checkpoints that later ones replace; the keys whose files may go after the commit."""
        # With its student in the store no attempt resumes any more, and a retry starts at the end of the last stage.
        keep_states = 0 if self.student_stored else self._claim.spec.checkpoints.keep
        return discard_surplus(session, self._claim.job_id, token=self._claim.token, keep_states=keep_states)
