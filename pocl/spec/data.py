"""The samples that a job trains on and is evaluated on, and how they become tokens."""

import json
from datetime import date as calendar_date
from typing import Annotated, Final, Literal, Self

from pydantic import Field, JsonValue, StringConstraints, field_validator, model_validator

from pocl.spec.frozen import ExactlyOneOf, FrozenModel
from pocl.spec.hub_names import RepositoryFile, RepositoryName, Revision

MAX_TEMPLATE_CHARACTERS: Final = 1 << 17
MAX_KWARGS_CHARACTERS: Final = 1 << 14
_RESERVED_KWARGS: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]

FileFormat = Literal["jsonl", "json", "csv", "parquet"]
RowForm = Literal["instruction", "messages", "sharegpt", "prompt_completion", "query_response", "prompt_only", "sample"]
ROW_FIELDS: Final = (
    *("instruction", "prompt", "query", "question", "messages", "conversations", "conversation"),
    *("output", "response", "answer", "completion", "references", "difficulty"),
    *("input", "Input", "context", "system", "system_prompt", "history", "tools", "functions"),
    *("reasoning", "reasoning_content", "thinking", "thought", "cot"),
)
"""The columns that forms of rows have, and that other columns may be mapped to."""
ColumnName = Annotated[str, Field(min_length=1, max_length=200)]


class ReadOptions(FrozenModel):
    """How the rows of a data file are read. What is left out is found out from the file."""

    format: FileFormat | None = None
    """The format of the file, which may be compressed with gzip; null tells it from the content."""
    form: RowForm | None = None
    """The form of the rows; null tells it from the columns of each. With `prompt_only` answers are left out."""
    columns: dict[str, ColumnName] = Field(default_factory=dict, max_length=16)
    """Columns that have other names, by the name of the field that they are: `{"instruction": "question"}`."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1, pattern=r"^[^\r\n\"]$")
    """The delimiter of a CSV file; null takes the one that fits its header."""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """What is done with a file that has rows that are no samples: it is refused, or they are left out and counted."""

    @model_validator(mode="after")
    def _columns_of_forms(self) -> Self:
        unknown = [field for field in self.columns if field not in ROW_FIELDS]
        if unknown:
            raise ValueError(f"columns maps {unknown[0][:40]!r}, which no form has; use one of {', '.join(ROW_FIELDS)}")
        if len(set(self.columns.values())) < len(self.columns):
            raise ValueError("columns maps two fields to one column")
        return self


class HubDataset(FrozenModel):
    """A data set on the Hugging Face Hub, as files of Parquet, JSONL, JSON or CSV. Its code is never run."""

    repo: RepositoryName
    """The repository, as `owner/name`."""
    revision: Revision = "main"
    """A branch, tag or commit; the result says which commit it named."""
    split: str | None = Field(default=None, pattern=r"^[\w.-]{1,64}$")
    """The split whose files are read, as the data set's card or the names of its files say: `train` unless given."""
    files: tuple[RepositoryFile, ...] = Field(default=(), max_length=64)
    """The files that are read, or patterns such as `data/train-*.parquet`, instead of those of a split."""

    @model_validator(mode="after")
    def _files_or_split(self) -> Self:
        if self.files and self.split is not None:
            raise ValueError("give files or split, and not both")
        return self


class DataRef(ReadOptions, ExactlyOneOf):
    """Where samples come from: a file, a data set that was uploaded to the service, or one on the Hub."""

    path: str | None = Field(default=None, min_length=1, max_length=1024)
    """The path of a file, for the engine alone; jobs of the service name a data set."""
    dataset: str | None = Field(default=None, pattern=r"^ds_[0-9a-z]{8,40}$")
    """The id of an uploaded data set."""
    hub: HubDataset | None = None
    """A data set on the Hugging Face Hub."""

    @classmethod
    def _alternatives(cls) -> tuple[str, ...]:
        return ("path", "dataset", "hub")

    @model_validator(mode="after")
    def _dataset_is_read_already(self) -> Self:
        given = [name for name in ReadOptions.model_fields if getattr(self, name) != getattr(ReadOptions(), name)]
        if self.dataset is not None and given:
            raise ValueError(f"{given[0]} is given when a data set is uploaded; here it would change nothing")
        return self


class DataSplit(FrozenModel):
    """Held-out samples that are taken out of the training samples.

    Which samples those are follows from their content and the seed alone, and not from their order or from other
    samples: a sample that is added moves none of the others, and equal samples are never on two sides.
    """

    validation: float = Field(default=0.0, ge=0.0, lt=1.0)
    """The share that becomes validation samples, about so many: 0.1 takes a tenth."""
    test: float = Field(default=0.0, ge=0.0, lt=1.0)
    """The share that becomes test samples."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Another seed takes other samples."""

    @model_validator(mode="after")
    def _something_is_split(self) -> Self:
        if not 0 < self.validation + self.test < 1:
            raise ValueError(
                "validation and test together must be above 0 and below 1, so that samples to train on stay"
            )
        return self


class Data(FrozenModel):
    """The samples of a job, and how they become tokens."""

    train: DataRef
    """The samples that are ranked and trained on."""
    validation: DataRef | None = None
    """Held-out samples, which are never trained on, and by which the best stage is chosen."""
    test: DataRef | None = None
    """Held-out samples that choose nothing, neither the best stage nor when a stage ends: their scores are those to
    report. Teacher, untrained student, each stage that becomes the best, and the final student are scored on them."""
    split: DataSplit | None = None
    """Takes validation and test samples out of the training samples, instead of `validation` and `test`."""
    template: Literal["auto", "chat", "alpaca"] = "auto"
    """How a sample becomes text; `auto` takes the teacher's chat template where it has one, else Alpaca's prompt."""
    chat_template: str | None = Field(default=None, min_length=1, max_length=MAX_TEMPLATE_CHARACTERS)
    """The source of a chat template that is used in place of the teacher's, and saved with the student."""
    template_name: str | None = Field(default=None, min_length=1, max_length=64)
    """Which of several named chat templates is used; null takes `default`, and `tool_use` for samples with tools."""
    chat_template_kwargs: dict[_VariableName, JsonValue] = Field(default_factory=dict, max_length=32)
    """Variables that the chat template reads, as `{"enable_thinking": false}`; one that it does not read is refused."""
    date: calendar_date | None = None
    """The day that templates which print today's date are given; null takes the day on which the job is submitted."""
    system: str | None = Field(default=None, min_length=1, max_length=1 << 16)
    """The system message of samples that have none."""
    max_length: int = Field(default=512, ge=8, le=32768)
    """The most tokens of prompt and response together; a longer response is cut at its end."""
    max_prompt_length: int = Field(default=256, ge=1, le=32767)
    """The most tokens of the prompt. A longer chat prompt keeps its system message and what the template writes, and
    loses its oldest turns, then the oldest text of the last question; Alpaca's prompt is cut from its left."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _usable_kwargs(cls, kwargs: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if reserved := sorted(_RESERVED_KWARGS & kwargs.keys()):
            raise ValueError(f"{', '.join(reserved)}: given by the samples, not by chat_template_kwargs")
        if len(json.dumps(kwargs)) > MAX_KWARGS_CHARACTERS:
            raise ValueError(f"chat_template_kwargs may have {MAX_KWARGS_CHARACTERS} characters of JSON at most")
        return kwargs

    @model_validator(mode="after")
    def _room_for_a_response(self) -> Self:
        if self.max_prompt_length >= self.max_length:
            raise ValueError("max_prompt_length must be smaller than max_length, so that a response fits")
        return self

    @model_validator(mode="after")
    def _one_chat_template(self) -> Self:
        if self.chat_template is not None and self.template_name is not None:
            raise ValueError("give chat_template or template_name, not both")
        if self.template == "alpaca" and (self.chat_template or self.template_name or self.chat_template_kwargs):
            raise ValueError("template alpaca uses no chat_template, template_name and chat_template_kwargs")
        return self

    @model_validator(mode="after")
    def _held_out_once(self) -> Self:
        for part in ("validation", "test"):
            if self.split is not None and getattr(self.split, part) and getattr(self, part) is not None:
                raise ValueError(f"give {part} or split.{part}, and not both")
        return self

    @property
    def has_validation(self) -> bool:
        """Whether there are validation samples, of their own or out of the training samples."""
        return self.validation is not None or (self.split is not None and self.split.validation > 0)
