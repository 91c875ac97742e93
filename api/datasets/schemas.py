"""Data sets as the API shows them."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from api.pagination import Page, Resource
from api.problems import FieldErrorView
from domain.datasets.models import Dataset, DatasetStatus
from pocl.encoding_counts import EncodingCounts
from pocl.preview.encoder import PreviewRow
from pocl.spec import FileFormat, RowForm


class _Part(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class IgnoredColumn(_Part):
    """A column of the file, or a field of its messages, that no form uses."""

    name: str
    rows: int
    """The number of samples in which it holds something."""


class ReasoningColumn(_Part):
    """A column of the file that the assistant's thoughts are read from."""

    name: str
    rows: int
    """The number of samples whose thought is from this column."""


class IngestionView(_Part):
    """How the uploaded file was read."""

    format: FileFormat
    """The format of the file."""
    compressed: bool
    """Whether the file was compressed with gzip."""
    size_bytes: int
    """The size of the file as it was sent, in bytes."""
    sha256: str
    """The SHA-256 digest of the file as it was sent, hexadecimal."""
    forms: dict[RowForm, int]
    """The number of samples that were read in each form; `prompt_only` has no answer."""
    ignored_columns: list[IgnoredColumn]
    """What is not used, and so neither trained on nor shown to the models: the first 50 names."""
    more_ignored: int
    """The number of samples with further such columns, each counted as often as it has one."""
    with_difficulty: int = 0
    """The number of samples with a number in the column `difficulty`, by which `curriculum.ranking.ranker` can rank."""
    reasoning_columns: list[ReasoningColumn] = []
    """The columns of their own that the assistant's thoughts are read from; thoughts in messages are not counted."""
    skipped: int
    """The number of rows that are no samples and were left out, as `on_bad_rows` asked for."""
    first_skipped: list[FieldErrorView]
    """The first 20 of them."""


class RefusalView(_Part):
    """Why a file is no data set."""

    code: str
    """A stable name of the reason, for programs: those of a problem that a small upload would be answered with."""
    message: str
    """One sentence for people."""
    retryable: bool
    """Whether the same file may be accepted another time."""
    errors: list[FieldErrorView]
    """The rows that are no samples, the first 20 of them."""


class DatasetView(Resource):
    """An uploaded data set. Once it is ready or refused it never changes."""

    id: str
    """The id by which a job's specification names the data set."""
    object: Literal["dataset"] = "dataset"
    """The kind of the resource."""
    name: str
    """The name that people call the data set."""
    status: DatasetStatus
    """`validating`: the file is large, and is being read; `ready`: jobs may name the data set; `refused`: `refusal`
    says why."""
    refusal: RefusalView | None
    """Why the file was refused; null unless it was."""
    rows: int | None
    """The number of samples; null unless the data set is ready."""
    prompts: int | None
    """How many of the samples have no answer: all or none. Only evaluation sets may have none. Null unless the data set
    is ready."""
    size_bytes: int | None
    """The size of the stored samples in bytes; null unless the data set is ready."""
    sha256: str | None
    """The SHA-256 digest of the stored samples, hexadecimal: equal samples in equal order have an equal digest, in
    whatever format and form they were sent. Null unless the data set is ready."""
    ingestion: IngestionView | None
    """How the uploaded file was read; null unless the data set is ready, and for one from before that was noted."""
    created_at: datetime
    """When the upload was complete."""


def present_dataset(dataset: Dataset) -> DatasetView:
    """The view of a data set."""
    view = DatasetView.model_validate(dataset)
    if dataset.status == "ready":
        return view
    return view.model_copy(update=dict.fromkeys(("rows", "prompts", "size_bytes", "sha256")))


class DatasetPage(Page[DatasetView, str]):
    """Data sets, newest first."""


class PreviewWarningView(Resource):
    """Something to know about the samples as tokens."""

    code: str
    """A stable name of the warning, for programs."""
    message: str
    """One sentence for people."""


class PreviewView(Resource):
    """Rows of a data set as a run would train on them."""

    object: Literal["preview"] = "preview"
    """The kind of the resource."""
    dataset: str
    """The id of the data set."""
    model: str
    """The model whose tokenizer was used, as it was given."""
    template: str
    """The template that makes text of the samples, `chat` or `alpaca`."""
    end: str
    """What ends an answer."""
    samples: int
    """The number of samples in the data set."""
    offset: int
    """The number of the first row that is shown, counted from 0."""
    rows: list[PreviewRow]
    """The rows, fewer than were asked for where they are long or the data set ends."""
    tried: int
    """The number of samples that were counted so far; the next preview goes on with the others."""
    counts: EncodingCounts
    """What is cut and left out of the samples that were counted."""
    refusal: str | None
    """Why a run would refuse the data set; null as far as is known."""
    warnings: list[PreviewWarningView]
    """What is to be known about the template and the samples."""
