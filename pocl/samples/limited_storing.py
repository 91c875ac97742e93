"""Storing the samples of a data file in a child process with limits, so that a service answers others meanwhile."""

import errno
import os
import tempfile
from pathlib import Path
from typing import Any, Final

from pocl.errors import DatasetInvalid
from pocl.limited_process import LimitedProcess, ProcessCrashed, ProcessOutOfMemory, ProcessOutOfTime
from pocl.samples.file_formats import is_gzip
from pocl.samples.reading import ReadReport, RowsInvalid, store_samples
from pocl.samples.store_process import REPORT
from pocl.spec import FileFormat, ReadOptions

SMALL_BYTES: Final = 128 << 10
"""Up to this size a file that is not compressed is read at once: a process takes longer to start."""
_MEMORY_BYTES: Final = 2 << 30
"""Text takes a few rows of it; the decoder of Parquet, a process of its own, inherits the limit."""
_LEAST_SECONDS: Final = 60
_BYTES_PER_SECOND: Final = 100_000
"""The slowest rate at which a file may be read, in bytes of the file per second of the processor."""
_LEAST_FILE_BYTES: Final = 1 << 30
_EXPANSION: Final = 64
"""How many times the size of the file its samples may take on the disk."""


class StoringCancelled(Exception):
    """:meth:`SampleStorer.cancel` was called before the samples were stored."""


class SampleStorer:
    """Stores the samples of one data file, in a limited process unless the file is small.

    Args:
        small_bytes: up to this size no process is started.
    """

    def __init__(self, source: Path, *, small_bytes: int = SMALL_BYTES) -> None:
        self._source = source
        size = source.stat().st_size
        self._seconds = _LEAST_SECONDS + size / _BYTES_PER_SECOND
        self._file_bytes = _LEAST_FILE_BYTES + _EXPANSION * size
        self._cancelled = False
        self._process: LimitedProcess | None = None
        if size > small_bytes or is_gzip(source):
            self._process = LimitedProcess(
                "pocl.samples.store_process", memory_bytes=_MEMORY_BYTES, file_bytes=self._file_bytes
            )

    def store(self, target: Path, options: ReadOptions, *, hint: FileFormat | None = None) -> ReadReport:
        """Write the samples to `target` as :func:`~pocl.samples.reading.store_samples` does.

        Raises:
            DatasetInvalid: the file cannot be read within the limits, or as :func:`store_samples` has it.
            OSError: `target` cannot be written.
            ProcessCrashed: the process died of what is not known to be the file's fault.
            StoringCancelled: another thread called :meth:`cancel`.
        """
        if self._process is None:
            return store_samples(self._source, target, options, hint=hint)
        with self._process as process, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            request = {
                "source": str(self._source.absolute()),
                "target": str(target.absolute()),
                "scratch": scratch,
                "options": options.model_dump(mode="json"),
                "hint": hint,
            }
            try:
                answer = process.call(request, seconds=self._seconds)
            except (ProcessOutOfTime, ProcessOutOfMemory) as error:
                raise DatasetInvalid(f"The data file cannot be read: reading it {error}.") from error
            except ProcessCrashed:
                if self._cancelled:
                    raise StoringCancelled from None
                raise
        return self._report(answer)

    def cancel(self) -> None:
        """Let :meth:`store` end soon; called from another thread. A small file is stored all the same."""
        self._cancelled = True
        if self._process is not None:
            self._process.kill()

    def _report(self, answer: dict[str, Any]) -> ReadReport:  # Any: JSON.
        match answer:
            case {"rows_invalid": report}:
                raise RowsInvalid(REPORT.validate_python(report))
            case {"refusal": sentence}:
                raise DatasetInvalid(sentence)
            case {"os_error": errno.EFBIG}:
                raise DatasetInvalid(
                    f"The samples of the data file take more than {self._file_bytes >> 20} MiB: split the file."
                )
            case {"os_error": code}:
                raise OSError(code, os.strerror(code))
        return REPORT.validate_python(answer["report"])
