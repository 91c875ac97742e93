"""Validation of large uploads after they were answered, by tasks of every API process.

A file is read in a process with limits, few at a time. Whoever reads it holds a lease on the data set, so that another
process goes on where one died, and a data set that is deleted meanwhile is read no further.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Final, TypeVar

import structlog
from anyio.to_thread import run_sync
from fastapi import Depends, Request

from api.loop_limiters import LoopLimiter
from domain.artifacts import ArtifactCorrupt, ArtifactNotFound, ArtifactStore
from domain.database_errors import DatabaseUnavailable
from domain.datasets import validation
from domain.datasets.ingestion import StoredDataset, UploadedFile, samples_key, store_dataset
from domain.datasets.validation import MAX_VALIDATIONS, Refusal, ValidationClaim, source_key
from domain.db import Database
from domain.errors import EngineRefusal
from pocl.limited_process import ProcessCrashed
from pocl.samples.limited_storing import SampleStorer, StoringCancelled

Result = TypeVar("Result")

upload_readers: Final = LoopLimiter("upload_readers", 2)
"""The turns of one API process at reading uploaded files; further ones wait, without a thread."""
_LEASE_SECONDS: Final = 60.0
_LOOK_SECONDS: Final = 10.0
"""How often a process looks for uploads that another has left."""
_MAX_REFUSED_ROWS: Final = 20

_LOST: Final = Refusal("upload_lost", "The uploaded file is gone from the artifact store: send it again.", True)
_CRASHED: Final = Refusal(
    "file_not_read_now",
    "The process that reads the file died again and again, maybe for want of memory: send it again, or in parts.",
    True,
)

_log = structlog.get_logger(__name__)


async def _run_to_its_end(function: Callable[[], Result]) -> Result:
    """Run a function in a thread. Where the task is cancelled, it is waited for all the same: it holds a connection."""
    running = asyncio.create_task(run_sync(function))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


class DatasetValidator:
    """Validates the data sets that wait for it, as long as :meth:`run` runs.

    Args:
        directory: where samples are written before they are published.
        lease_seconds: how long another process waits for one that died.
        look_seconds: how often to look for data sets that were not announced by :meth:`wake`.
        open_storer: makes what reads a file.
    """

    def __init__(
        self,
        database: Database,
        store: ArtifactStore,
        directory: Path,
        *,
        lease_seconds: float = _LEASE_SECONDS,
        look_seconds: float = _LOOK_SECONDS,
        open_storer: Callable[[Path], SampleStorer] = SampleStorer,
    ) -> None:
        self._database = database
        self._store = store
        self._directory = directory
        self._lease_seconds = lease_seconds
        self._look_seconds = look_seconds
        self._open_storer = open_storer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting = asyncio.Event()
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    def wake(self) -> None:
        """Announce a data set that is to be validated; from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._waiting.set)

    async def run(self) -> None:
        """Validate data sets until the task is cancelled; what is being read then is given back."""
        self._loop = asyncio.get_running_loop()
        try:
            while True:
                self._waiting.clear()
                while len(self._tasks) < upload_readers.limit and (claim := await self._claim()) is not None:
                    task = asyncio.create_task(self._validate(claim))
                    self._tasks.add(task)
                    task.add_done_callback(self._end)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._waiting.wait(), self._look_seconds)
        finally:
            self._closing = True
            if self._tasks:
                for task in self._tasks:
                    task.cancel()
                await asyncio.wait(self._tasks)

    def _end(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._waiting.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("validation_failed", exc_info=error)

    async def _claim(self) -> ValidationClaim | None:
        def claim() -> ValidationClaim | None:
            with self._database.transaction(write=False) as session:
                # Mostly none waits, and a writer would keep others waiting.
                if not validation.count_waiting(session):
                    return None
            with self._database.transaction(write=True) as session:
                return validation.claim_validation(session, lease_seconds=self._lease_seconds)

        with suppress(DatabaseUnavailable):
            return await _run_to_its_end(claim)
        return None

    async def _validate(self, claim: ValidationClaim) -> None:
        if claim.number > MAX_VALIDATIONS:
            # Whoever read it died with it.
            await _run_to_its_end(partial(self._refuse, claim, _CRASHED))
            return
        try:
            source = await run_sync(self._store.locate, source_key(claim.dataset_id))
        except (ArtifactNotFound, ArtifactCorrupt):
            await _run_to_its_end(partial(self._refuse, claim, _LOST))
            return
        except OSError as error:
            # The lease expires, and it is tried again.
            _log.warning("upload_not_found_now", dataset=claim.dataset_id, error=str(error))
            return
        storer = self._open_storer(source)
        renewing = asyncio.create_task(self._renew(claim, storer))
        try:
            # The thread ends soon once the storer is cancelled, and is waited for: it writes files.
            await asyncio.shield(reading := asyncio.create_task(self._read(claim, source, storer)))
        except asyncio.CancelledError:
            storer.cancel()
            await asyncio.wait({reading})
            raise
        finally:
            renewing.cancel()
            await asyncio.wait({renewing})

    async def _read(self, claim: ValidationClaim, source: Path, storer: SampleStorer) -> None:
        await run_sync(self._store_and_settle, claim, source, storer, limiter=upload_readers.get())

    async def _renew(self, claim: ValidationClaim, storer: SampleStorer) -> None:
        def renew() -> bool:
            with self._database.transaction(write=True) as session:
                return validation.renew_validation(session, claim, lease_seconds=self._lease_seconds)

        while True:
            await asyncio.sleep(self._lease_seconds / 4)
            with suppress(DatabaseUnavailable):
                if not await _run_to_its_end(renew):
                    storer.cancel()
                    return

    def _store_and_settle(self, claim: ValidationClaim, source: Path, storer: SampleStorer) -> None:
        upload = UploadedFile(source, claim.options, claim.format_hint)
        try:
            stored = store_dataset(
                upload,
                partial(self._store.publish_file, keep=True),
                storer=storer,
                directory=self._directory,
                dataset_id=claim.dataset_id,
            )
        except EngineRefusal as refusal:
            errors = refusal.field_errors[:_MAX_REFUSED_ROWS]
            self._refuse(claim, Refusal(refusal.code, refusal.detail, errors=errors))
        except StoringCancelled:
            if self._closing:
                with self._database.transaction(write=True) as session:
                    validation.release_validation(session, claim)
        except ProcessCrashed as error:
            _log.error("upload_reader_crashed", dataset=claim.dataset_id, error=str(error), log=error.log)
            if claim.number >= MAX_VALIDATIONS:
                self._refuse(claim, _CRASHED)
        except OSError as error:
            # Another time there may be space, or the store be mounted: the lease expires, and it is tried again.
            _log.error("upload_not_stored", dataset=claim.dataset_id, error=str(error))
        else:
            self._complete(claim, stored)

    def _complete(self, claim: ValidationClaim, stored: StoredDataset) -> None:
        with self._database.transaction(write=True) as session:
            completed = validation.complete_validation(session, claim, stored)
            gone = not completed and not validation.exists(session, claim.dataset_id)
        if gone:
            self._store.discard(samples_key(claim.dataset_id))
        if completed or gone:
            self._store.discard(source_key(claim.dataset_id))

    def _refuse(self, claim: ValidationClaim, refusal: Refusal) -> None:
        with self._database.transaction(write=True) as session:
            refused = validation.refuse_validation(session, claim, refusal)
        if refused:
            self._store.discard(source_key(claim.dataset_id))


async def _get_validator(request: Request) -> DatasetValidator:
    validator: DatasetValidator = request.app.state.validator
    return validator


ValidatorDep = Annotated[DatasetValidator, Depends(_get_validator)]
