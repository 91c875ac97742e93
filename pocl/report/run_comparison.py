"""A control beside the run that it is compared with: the final students of both on the same samples."""

import json
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from pocl.evaluation.answers_file import AnswersFile
from pocl.evaluation.intervals import MIN_ROWS, paired_interval
from pocl.events import Evaluated
from pocl.layout import ANSWERS_FILE, COMPARED_DIR, RESULT_FILE

_MAX_FILE_BYTES: Final = 256 << 20


class RunDifference(BaseModel):
    """By how much the final student of the run without the control scores above that of the control."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    split: str
    """The samples: `validation`, `test` or the name of an evaluation set."""
    difference: float
    """ROUGE-L of the run minus that of its control, in points."""
    low: float
    """The lower end of the 95 % interval, by a paired bootstrap over the samples."""
    high: float
    """The upper end of the interval."""
    rows: int
    """The number of samples that both were scored on one by one."""


class RunComparison(BaseModel):
    """The run that a control is compared with, beside it."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    evaluations: tuple[Evaluated, ...]
    """The scores of that run's final student."""
    differences: tuple[RunDifference, ...]
    """How far they lie above those of the control; none of fewer than ten samples that both were scored on."""


def compare_with_run(workdir: Path, *, seed: int) -> RunComparison | None:
    """The comparison with the run whose files are in the directory `compared` of `workdir`; null where it holds none
    that can be read.

    Args:
        seed: of the resampling for the intervals.
    """
    compared = workdir / COMPARED_DIR
    result_file, answers_file = compared / RESULT_FILE, compared / ANSWERS_FILE
    try:
        if max(file.stat().st_size for file in (result_file, answers_file)) > _MAX_FILE_BYTES:
            return None
        evaluations = [
            Evaluated.model_validate(each) for each in json.loads(result_file.read_bytes()).get("evaluations", [])
        ]
        theirs = AnswersFile(answers_file).read_last_rouge()
        ours = AnswersFile(workdir / ANSWERS_FILE).read_last_rouge()
    except (OSError, ValueError, AttributeError, TypeError, ValidationError):
        return None
    return RunComparison(
        evaluations=tuple(each for each in evaluations if each.subject == "final"),
        differences=tuple(
            difference
            for split in theirs
            if split in ours and (difference := _difference(split, theirs[split], ours[split], seed=seed)) is not None
        ),
    )


def _difference(
    split: str, theirs: dict[tuple[int, str], float], ours: dict[tuple[int, str], float], *, seed: int
) -> RunDifference | None:
    common = sorted(theirs.keys() & ours.keys())
    if len(common) < MIN_ROWS:
        return None
    interval = paired_interval([theirs[each] for each in common], [ours[each] for each in common], seed=seed)
    return RunDifference(
        split=split, difference=interval.difference, low=interval.low, high=interval.high, rows=len(common)
    )
