"""Whether and how the rows of data sets become tokens: tried in limited processes, and cached.

The dry run tries all rows of a data set with the tokenizer and the template of the job, as far as its time goes, and
goes on there the next time. Rows, tokenizer and settings make up the key of a check, so that its outcome stays true.
"""

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Final, Protocol

import structlog

from domain.errors import Unavailable
from domain.file_states import file_states
from pocl.encoding_counts import EncodingCounts
from pocl.errors import PoclError
from pocl.preview.encoder import (
    CountedRows,
    EncodingAborted,
    EncodingInputs,
    PreviewPage,
    RowEncoder,
)
from pocl.prompting.encoding_warnings import EncodingWarning

_log = structlog.get_logger(__name__)

_PROCESSES: Final = 2
"""Checks of one process of the service at a time: each may take gigabytes for a moment."""
_WAITING: Final = 8
"""Checks that may wait for their turn; each holds a thread of the service."""
_CACHED: Final = 1000
_SLICE_SECONDS: Final = 1.0


class EncodingBusy(Unavailable):
    """The service is encoding as many data sets as it can: try again in a moment."""

    code = "encoding_busy"


class Encoder(Protocol):
    """What encodes rows: see :class:`~pocl.preview.encoder.RowEncoder`."""

    def count(self, *, skip: int, parts: Mapping[str, int], seconds: float) -> CountedRows: ...

    def preview(self, *, skip: int, rows: int) -> PreviewPage: ...


@dataclass(frozen=True)
class EncodingCheck:
    """What is known of the rows of a data set as tokens."""

    template: str | None = None
    """The template that makes text of them; null before any was tried."""
    tried: int = 0
    """The rows that were tried."""
    done: bool = False
    """Whether these are all, or one was refused."""
    counts: EncodingCounts = field(default_factory=EncodingCounts)
    """What was counted over the rows that were tried."""
    training_samples: int | None = None
    """The samples that a split leaves to train on; null before all rows were tried, and without a split."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """The rows that were tried, by what a job uses them for."""
    warnings: tuple[EncodingWarning, ...] = ()
    """What is to be known about the template."""
    refusal: PoclError | None = None
    """Why a run would refuse the data set; null as far as is known."""


@dataclass
class _Entry:
    """A cached check, and the lock of whoever goes on with it."""

    check: EncodingCheck = EncodingCheck()
    lock: BoundedSemaphore = field(default_factory=BoundedSemaphore)


class EncodingChecker:
    """Tries data sets and remembers the outcome.

    Args:
        seconds: how long one call may take, besides its wait for a turn; 0 tries nothing.
        open_encoder: starts the process that encodes.
        processes: how many work at a time.
        waiting: how many more may wait for their turn.
    """

    def __init__(
        self,
        *,
        seconds: float,
        open_encoder: Callable[[EncodingInputs], AbstractContextManager[Encoder]] = RowEncoder,
        clock: Callable[[], float] = time.monotonic,
        processes: int = _PROCESSES,
        waiting: int = _WAITING,
    ) -> None:
        self._seconds = seconds
        self._open_encoder = open_encoder
        self._clock = clock
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._entries_lock = Lock()
        self._processes = BoundedSemaphore(processes)
        self._places = BoundedSemaphore(processes + waiting)

    def check(self, inputs: EncodingInputs, *, digest: str) -> EncodingCheck:
        """What is known of a data set, after trying as many more of its rows as the time allows.

        Args:
            digest: of the file with the rows.
        """
        entry = self._entry(check_key(inputs, digest))
        if entry.check.done or not self._seconds:
            return entry.check
        try:
            with self._turn(), _holding(entry.lock, self._seconds):
                if not entry.check.done:
                    entry.check = self._go_on(entry.check, inputs)
        except EncodingBusy:
            _log.info("encoding_check_skipped")
        return entry.check

    def preview(self, inputs: EncodingInputs, *, skip: int, rows: int) -> PreviewPage:
        """Some rows of a data set as tokens.

        Raises:
            EncodingBusy: too many others are at it.
            PoclError: a run would refuse the data set, the tokenizer or the settings.
        """
        with self._turn(), self._open_encoder(inputs) as encoder:
            return encoder.preview(skip=skip, rows=rows)

    def _go_on(self, check: EncodingCheck, inputs: EncodingInputs) -> EncodingCheck:
        until = self._clock() + self._seconds
        try:
            with self._open_encoder(inputs) as encoder:
                while not check.done and (left := until - self._clock()) > 0:
                    counted = encoder.count(skip=check.tried, parts=check.parts, seconds=min(left, _SLICE_SECONDS))
                    check = EncodingCheck(
                        template=counted.template,
                        tried=check.tried + counted.rows,
                        done=counted.done,
                        counts=check.counts + counted.counts,
                        training_samples=counted.training_samples,
                        parts=counted.parts,
                        warnings=tuple(counted.warnings),
                    )
        except EncodingAborted as error:
            # Not the rows' fault as far as is known: the worker has other limits.
            _log.warning("encoding_check_aborted", error=str(error), exc_info=error)
        except PoclError as error:
            check = replace(check, done=True, refusal=error)
        return check

    def _entry(self, key: str) -> _Entry:
        with self._entries_lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
            while len(self._entries) > _CACHED:
                self._entries.popitem(last=False)
        return entry

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._places.acquire(blocking=False):
            raise EncodingBusy
        try:
            with _holding(self._processes, max(self._seconds, _SLICE_SECONDS)):
                yield
        finally:
            self._places.release()


def check_key(inputs: EncodingInputs, digest: str) -> str:
    """The key under which a check is cached: of the rows, the tokenizer's files and the settings."""
    content = inputs.to_json()
    content["data"]["train"].pop("path")
    if isinstance(inputs.tokenizer, Path):
        content["tokenizer"] = file_states(inputs.tokenizer, weights=False)
    return hashlib.sha256(json.dumps([digest, content], sort_keys=True).encode()).hexdigest()


@contextmanager
def _holding(lock: BoundedSemaphore, seconds: float) -> Iterator[None]:
    """
    Raises:
        EncodingBusy: the lock was not free within the time.
    """
    if not lock.acquire(timeout=seconds):
        raise EncodingBusy
    try:
        yield
    finally:
        lock.release()
