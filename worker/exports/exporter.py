"""Makes exports that are due, one after the other: a lease on each, a process that writes it, the files in the store.

Of several workers any makes them: the lease of each export keeps them apart.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from domain.artifacts import ArtifactCorrupt, ArtifactNotFound, ArtifactStore
from domain.db import Database
from domain.errors import LostLease, QuotaExceeded
from domain.jobs.export_feed import (
    DueExport,
    ExportFailure,
    claim_export,
    record_exported,
    record_failed_export,
    release_export,
    renew_export,
)
from pocl.layout import TRAINING_DIR
from pocl.storage.manifest import MANIFEST, Manifest, is_whole
from worker.engine_exit import storage_failure_reason
from worker.exports.conversion import BrokenOff, CannotExport, GgufConversion
from worker.row_lease import renewed_lease, wait_after

_log = structlog.get_logger(__name__)

LEASE_SECONDS: Final = 90.0
_MISSING: Final = ExportFailure("checkpoint_missing", "The files of the checkpoint are gone.", "system")
_DAMAGED: Final = ExportFailure("checkpoint_damaged", "The files of the checkpoint are damaged.", "system")
_WRONG_FILES: Final = ExportFailure(
    "export_ended", "The process that writes it left other files than it said.", "system"
)


@dataclass(frozen=True)
class CheckpointExporter:
    """The exports of one worker. Call it from the main thread."""

    database: Database
    store: ArtifactStore
    scratch: Path
    """Where checkpoints of a bucket are fetched to, and files are written before they are stored."""
    conversion: GgufConversion
    should_stop: Callable[[], bool]
    lease_seconds: float = LEASE_SECONDS
    jitter: Callable[[], float] = random.random

    def turn(self) -> bool:
        """Make one export, if one is due; whether one was.

        Raises:
            DatabaseUnavailable: the rows could not be read or written; the lease runs out.
        """
        with self.database.transaction(write=True) as session:
            due = claim_export(session, lease_seconds=self.lease_seconds)
        if due is None:
            return False
        try:
            self._attempt(due)
        except LostLease:
            _log.warning("export_lease_lost", export_id=due.export_id)
        return True

    def _attempt(self, due: DueExport) -> None:
        try:
            with renewed_lease(
                self.database,
                lambda session: renew_export(session, due, lease_seconds=self.lease_seconds),
                lease_seconds=self.lease_seconds,
            ) as is_lost:
                self._export(due, lambda: self.should_stop() or is_lost.is_set())
        except BrokenOff:
            with self.database.transaction(write=True) as session:
                release_export(session, due)
        except CannotExport as error:
            self._fail(due, error)
        except OSError as error:
            _log.error("export_files_failed", export_id=due.export_id, error=str(error))
            reason = storage_failure_reason(error)
            message = reason.message.replace("of the job", "of the export")
            self._fail(due, CannotExport(ExportFailure(reason.code, message, reason.fault or "system")))

    def _export(self, due: DueExport, is_broken_off: Callable[[], bool]) -> None:
        """Make the files, store them, and record them.

        Raises:
            CannotExport, BrokenOff, LostLease, OSError: it was not made.
        """
        self._discard_earlier(due)
        with tempfile.TemporaryDirectory(dir=self.scratch, ignore_cleanup_errors=True) as name:
            scratch = Path(name)
            source = self._fetch(due, scratch / "checkpoint")
            target, written = self.conversion.write(
                source, scratch, due.format, source_bytes=due.checkpoint_bytes, is_broken_off=is_broken_off
            )
            try:
                manifest = self.store.publish(target, due.store_key, nested=False)
            except ArtifactCorrupt:
                raise CannotExport(_WRONG_FILES) from None
        try:
            if {file.path for file in manifest.files} != {*written.files, MANIFEST}:
                raise CannotExport(_WRONG_FILES)
            self._record(due, manifest, written.notes)
        except (CannotExport, LostLease):
            # Not where the database broke off: the row may name them by now, and if not, the next attempt removes them.
            self.store.discard(due.store_key)
            raise
        _log.info("exported", export_id=due.export_id, format=due.format, size_bytes=manifest.size_bytes)

    def _fetch(self, due: DueExport, scratch: Path) -> Path:
        """The directory of the checkpoint on this machine, its weights and tokenizer verified."""
        try:
            directory = self.store.provide_directory(due.checkpoint_key, scratch)
            files = self.store.manifest(due.checkpoint_key).files
        except ArtifactNotFound:
            raise CannotExport(_MISSING, is_final=True) from None
        except ArtifactCorrupt:
            raise CannotExport(_DAMAGED, is_final=True) from None
        needed = (
            [] if self.store.is_remote else [each for each in files if not each.path.startswith(f"{TRAINING_DIR}/")]
        )
        for file in needed:
            try:
                if not is_whole(directory / file.path, file):
                    raise CannotExport(_DAMAGED, is_final=True)
            except FileNotFoundError:
                raise CannotExport(_DAMAGED, is_final=True) from None
        return directory

    def _discard_earlier(self, due: DueExport) -> None:
        """Remove what attempts at this export stored that ended before a row named it."""
        if due.lease_token > 1:
            for key in self.store.list_keys(due.store_keys):
                if key.startswith(f"{due.store_keys}/{due.export_id}-"):
                    self.store.discard(key)

    def _record(self, due: DueExport, manifest: Manifest, notes: Sequence[str]) -> None:
        digest = next(file.sha256 for file in manifest.files if file.path == MANIFEST)
        try:
            with self.database.transaction(write=True) as session:
                record_exported(
                    session,
                    due,
                    size_bytes=manifest.size_bytes,
                    manifest_sha256=digest,
                    notes=notes,
                )
        except QuotaExceeded as error:
            raise CannotExport(ExportFailure(error.code, error.detail, "user"), is_final=True) from None

    def _fail(self, due: DueExport, error: CannotExport) -> None:
        wait = None if error.is_final else wait_after(due.attempts, self.jitter())
        with self.database.transaction(write=True) as session:
            was_last = record_failed_export(session, due, error.failure, wait_seconds=wait)
        facts = {"export_id": due.export_id, "code": error.failure.code, "attempt": due.attempts}
        _log.warning("export_failed" if was_last else "export_attempt_failed", **facts)
