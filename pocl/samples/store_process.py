"""The child process of :class:`~pocl.samples.limited_storing.SampleStorer`: stores the samples of one data file."""

import os
import tempfile
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

from pocl.errors import DatasetInvalid
from pocl.samples.reading import ReadReport, RowsInvalid, store_samples
from pocl.spec import ReadOptions

REPORT: Final = TypeAdapter(ReadReport)
_NICENESS: Final = 10
"""Whoever waits for an answer of the service goes before a file that is read."""


def answer(request: dict[str, Any]) -> dict[str, Any]:  # Any: JSON.
    """Store samples as :func:`~pocl.samples.reading.store_samples` does.

    Returns:
        The `report`; or `rows_invalid`, a report with the rows; or the sentence of a `refusal`; or an `os_error`.
    """
    os.nice(_NICENESS)
    # What is unpacked on the way lies where the parent removes it, also after a kill.
    tempfile.tempdir = request["scratch"]
    options = ReadOptions.model_validate(request["options"])
    try:
        report = store_samples(Path(request["source"]), Path(request["target"]), options, hint=request["hint"])
    except RowsInvalid as error:
        return {"rows_invalid": REPORT.dump_python(error.report, mode="json")}
    except DatasetInvalid as error:
        return {"refusal": error.message}
    except OSError as error:
        return {"os_error": error.errno}
    return {"report": REPORT.dump_python(report, mode="json")}
