"""From a data file to samples, with what was found, left out and refused on the way."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pocl.errors import DatasetInvalid, FieldError
from pocl.samples.file_formats import MAX_ROW_BYTES, RowSource, open_rows
from pocl.samples.forms import parse_fields
from pocl.samples.row_invalid import RowInvalid
from pocl.samples.sample import Sample
from pocl.samples.stored import MAX_STORED_BYTES, is_stored, stored_line
from pocl.samples.values import Fields
from pocl.spec import FileFormat, ReadOptions, RowForm

MAX_NAMED: Final = 20
"""The most invalid rows that are named."""
MAX_IGNORED: Final = 50
"""The most ignored columns that are named."""
_MISSING_ANSWER: Final = "The row has no answer, and others of the file have one."


class RowsInvalid(DatasetInvalid):
    """Rows of a data file are no samples; the message names the first of them, and so do the field errors."""

    def __init__(self, report: "ReadReport") -> None:
        self.report = report
        unit = report.unit
        named = [
            f"{unit} {each.pointer.rpartition('/')[2]}: {each.detail.rstrip('.')} ({each.code})"
            for each in report.bad_rows
        ]
        more = f"; and {report.bad - len(named)} more" if report.bad > len(named) else ""
        count = f"{report.bad} of {report.bad + report.rows} rows"
        super().__init__(
            f"{count} of the data file are invalid: {'; '.join(named)}{more}.", field_errors=report.bad_rows
        )
        listed = "" if report.bad <= MAX_NAMED else f"; the first {MAX_NAMED} are named"
        self._summary = f"{count} cannot be used{listed}. Correct them, or leave them out with `on_bad_rows` of `skip`."

    @property
    def summary(self) -> str:
        return self._summary


@dataclass
class ReadReport:
    """What was found in a data file."""

    format: FileFormat = "jsonl"
    compressed: bool = False
    unit: str = "line"
    """What the numbers of rows count: lines of the file, or rows."""
    rows: int = 0
    """The number of samples."""
    prompts: int = 0
    """How many of them have no answer: all or none."""
    with_difficulty: int = 0
    """How many of them have a difficulty, by which they can be ranked."""
    reasoning: Counter[str] = field(default_factory=Counter)
    """In how many samples the assistant's thought is from a column of its own; by the column."""
    forms: Counter[RowForm] = field(default_factory=Counter)
    """The number of samples that were read in each form."""
    ignored: Counter[str] = field(default_factory=Counter)
    """In how many samples a column, or a field of a message, holds something that is not used; by its name."""
    more_ignored: int = 0
    """The number of samples with ignored columns beyond those that are named."""
    bad: int = 0
    """The number of rows that are no samples."""
    bad_rows: list[FieldError] = field(default_factory=list)
    """The first of them; the pointer has the number of the line or row."""

    @property
    def notes(self) -> list[tuple[str, str]]:
        """What was left out, as codes and sentences for warnings."""
        notes: list[tuple[str, str]] = []
        if self.bad:
            first = "; ".join(f"{error.pointer}: {error.detail}" for error in self.bad_rows[:3])
            notes.append(("rows_skipped", f"{self.bad} of {self.bad + self.rows} rows are left out: {first}"))
        if self.ignored:
            listed = ", ".join(f"{name} ({count} rows)" for name, count in self.ignored.most_common(8))
            notes.append(("columns_ignored", f"columns that no form uses are ignored: {listed}"))
        if self.reasoning:
            listed = ", ".join(f"{name} ({count} rows)" for name, count in self.reasoning.most_common())
            message = f"the assistant's thought is read from a column of its own: {listed}"
            notes.append(("reasoning_column", message))
        return notes


class SampleReader:
    """Reads the samples of a data file one after the other; what it found is in `report` at the end.

    A file has answers or is of prompts alone: :meth:`finish` says whether some of what was read must be left out.
    """

    def __init__(self, path: Path, options: ReadOptions, hint: FileFormat | None = None, *, skip: int = 0) -> None:
        """
        Args:
            skip: how many samples are passed over without a look at them; only of a file in the form in which the
                service stores samples, where each is a line.
        """
        assert not skip or is_stored(options)
        self.report = ReadReport()
        self._path = path
        self._options = options
        self._hint = hint
        self._skip = skip
        self._prompts: list[FieldError] = []
        self._ignored_in_prompts: Counter[str] = Counter()
        self._columns: set[str] = set()

    def __iter__(self) -> Iterator[Sample]:
        """
        Raises:
            DatasetInvalid: the file cannot be read.
        """
        limit = MAX_STORED_BYTES if self._options.form == "sample" else MAX_ROW_BYTES
        with open_rows(self._path, self._options, hint=self._hint, limit=limit, skip=self._skip) as source:
            self.report.format, self.report.compressed, self.report.unit = source.format, source.compressed, source.unit
            for number, row in source.rows:
                try:
                    yield self._sample(row, source, number, limit)
                except RowInvalid as error:
                    self._refuse(number, error)

    def finish(self) -> bool:
        """Whether samples without an answer must be left out, as others have one.

        Raises:
            RowsInvalid: there are rows that are no samples, and they are not to be skipped.
            DatasetInvalid: there is no sample.
        """
        report = self.report
        is_mixed = 0 < report.prompts < report.rows
        if is_mixed:
            report.bad += report.prompts
            report.rows -= report.prompts
            del report.forms["prompt_only"]
            ordered = sorted(
                [*report.bad_rows, *self._prompts], key=lambda error: int(error.pointer.rpartition("/")[2])
            )
            report.bad_rows = ordered[:MAX_NAMED]
            report.prompts = 0
        else:
            report.ignored.update(self._ignored_in_prompts)
        if report.bad and (self._options.on_bad_rows == "refuse" or not report.rows):
            raise RowsInvalid(report)
        if not report.rows:
            raise DatasetInvalid(
                "The data file holds no usable row: send one JSON object on each line, or CSV or Parquet."
            )
        absent = sorted(set(self._options.columns.values()) - self._columns)
        if absent:
            raise DatasetInvalid(f"No row has the column {absent[0][:40]!r} that `columns` names: check its name.")
        return is_mixed

    def _sample(self, row: Fields | RowInvalid, source: RowSource, number: int, limit: int) -> Sample:
        if isinstance(row, RowInvalid):
            raise row
        self._columns.update(name for name in self._options.columns.values() if name in row)
        sample, form, ignored, reasoning = parse_fields(row, self._options)
        if source.format in ("csv", "parquet") and _text_size(sample) > limit:
            raise RowInvalid("line_too_long", f"The row has more than {limit} characters.")
        report = self.report
        report.rows += 1
        report.with_difficulty += sample.difficulty is not None
        report.reasoning.update([] if reasoning is None else [reasoning])
        report.forms[form] += 1
        counted = report.ignored if sample.has_answer else self._ignored_in_prompts
        for name in (*ignored, *source.unread_columns):
            if name in counted or len(counted) < MAX_IGNORED:
                counted[name] += 1
            else:
                report.more_ignored += 1
        if not sample.has_answer:
            report.prompts += 1
            if len(self._prompts) < MAX_NAMED:
                self._prompts.append(self._error(number, RowInvalid("missing", _MISSING_ANSWER)))
        return sample

    def _refuse(self, number: int, error: RowInvalid) -> None:
        self.report.bad += 1
        if len(self.report.bad_rows) < MAX_NAMED:
            self.report.bad_rows.append(self._error(number, error))

    def _error(self, number: int, error: RowInvalid) -> FieldError:
        return FieldError(f"/{self.report.unit}s/{number}", error.code, error.detail)


def read_sample_file(
    path: Path, options: ReadOptions | None = None, *, hint: FileFormat | None = None
) -> tuple[list[Sample], ReadReport]:
    """Read all samples of a data file, in file order, with what was found in it.

    Raises:
        DatasetInvalid: the file cannot be read, has no sample, or has bad rows that are not to be skipped; it counts
            them and names the first.
    """
    reader = SampleReader(path, options or ReadOptions(), hint)
    samples = list(reader)
    if reader.finish():
        samples = [sample for sample in samples if sample.has_answer]
    return samples, reader.report


def read_samples(path: Path, options: ReadOptions | None = None) -> list[Sample]:
    """As :func:`read_sample_file`, the samples alone."""
    return read_sample_file(path, options)[0]


def store_samples(source: Path, target: Path, options: ReadOptions, *, hint: FileFormat | None = None) -> ReadReport:
    """Write the samples of a data file in the form in which the service stores them, one in memory at a time.

    Raises:
        DatasetInvalid: as :func:`read_sample_file`; what `target` holds is then of no use.
        OSError: `target` cannot be written.
    """
    reader = SampleReader(source, options, hint)
    with target.open("wb") as file:
        for sample in reader:
            file.write(stored_line(sample))
    if reader.finish():
        _leave_out_prompts(target)
    return reader.report


def _leave_out_prompts(stored: Path) -> None:
    """Write the file anew without the samples that have no answer."""
    answered = stored.with_name(f"{stored.name}.answered")
    try:
        with stored.open("rb") as lines, answered.open("wb") as file:
            file.writelines(line for line in lines if b'"references":[]' not in line)
        answered.replace(stored)
    finally:
        answered.unlink(missing_ok=True)


def _text_size(sample: Sample) -> int:
    texts = [message.content for message in sample.conversation]
    return sum(map(len, (*texts, *sample.references[1:], sample.context, sample.tools)))
