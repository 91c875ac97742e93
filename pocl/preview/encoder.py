"""Encodes rows in a limited process, exactly as a run would: their tokens, and what is cut and left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

from pydantic import BaseModel, ConfigDict

from pocl.encoding_counts import EncodingCounts
from pocl.errors import FieldError, PoclError
from pocl.inspect import TokenLimits
from pocl.limited_process import LimitedProcess, ProcessFailed
from pocl.prompting.encoding_warnings import EncodingWarning
from pocl.spec import Data, RandomModel

MEMORY_BYTES: Final = 3 << 30
"""The largest known tokenizer.json has 33 MiB and takes some 600 MiB while it is read."""
ANSWER_BYTES: Final = 64 << 20
CALL_SECONDS: Final = 60.0
"""Of the processor, for one call: far more than any needs, which looks at the clock after each group of rows."""
MAX_PREVIEW_TOKENS: Final = 65_536
"""The tokens of a page of the preview; a page ends early where its rows have more."""


class EncodingAborted(PoclError):
    """The rows could not be encoded within the limits on time and memory."""

    code = "encoding_aborted"
    fault = "capacity"
    hint = "Use shorter rows or a smaller tokenizer; the log of the service says what failed."


@dataclass(frozen=True)
class EncodingInputs:
    """What decides how the rows of a data set become tokens."""

    data: Data
    """The settings. `train` names the file with the rows, whatever they are for."""
    tokenizer: Path | RandomModel
    """The directory of a model, or a freshly initialised model."""
    max_rows: int | None = None
    """How many rows a run reads; null for all."""
    part: str = "whole"
    """What a job uses the rows for: `train`, `validation`, `test` or an evaluation set; `whole` without a job."""

    limits: TokenLimits = field(default_factory=lambda: TokenLimits({}))
    """Which token ids the rows may use."""

    def to_json(self) -> dict[str, Any]:  # Any: JSON.
        """The inputs as a request holds them."""
        tokenizer = self.tokenizer
        source = {"path": str(tokenizer)} if isinstance(tokenizer, Path) else {"random": tokenizer.model_dump()}
        return {
            "data": self.data.model_dump(mode="json"),
            "tokenizer": source,
            "max_rows": self.max_rows,
            "part": self.part,
            "embeddings": dict(self.limits.embeddings),
            "conflicts": {str(id_): clause for id_, clause in self.limits.conflicts.items()},
        }


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PreviewToken(_Value):
    """One token of a sample."""

    id: int
    """The id of the token."""
    token: str
    """The token as the vocabulary spells it."""
    trained: bool
    """Whether the token is trained on: it is part of an answer, or its end."""


class PreviewRow(_Value):
    """One row of a data set, encoded as a run would encode it."""

    row: int
    """The number of the row among the samples of the data set, counted from 0."""
    digest: str
    """The SHA-256 digest of the sample."""
    tokens: list[PreviewToken]
    """The tokens that are trained on or seen before those; empty where the row is refused."""
    prompt: str
    """What generation of the last answer starts from, decoded."""
    answer: str
    """The last answer with its end, decoded."""
    counts: EncodingCounts
    """What was cut and left out of this row."""
    refusal: str | None = None
    """Why a run would refuse the row; null where it would not."""


class PreviewPage(_Value):
    """Some rows of a data set."""

    template: str
    """The template that makes text of the samples, `chat` or `alpaca`."""
    end: str
    """What ends an answer."""
    rows: list[PreviewRow]
    warnings: list[EncodingWarning]


class CountedRows(_Value):
    """What was counted over the rows so far."""

    template: str
    """The template that makes text of the samples."""
    counts: EncodingCounts
    rows: int
    """The rows that were tried."""
    done: bool
    """Whether these are all."""
    training_samples: int | None
    """The samples that a split leaves to train on; null before all rows were tried, and without a split."""
    parts: dict[str, int]
    """The rows up to here, those before included, by what a job uses them for; of a split by the part they are in."""
    warnings: list[EncodingWarning]
    """What is to be known about the template."""


class EncodingProcess(Protocol):
    """What runs :mod:`pocl.preview.process`."""

    def call(self, request: Any, *, seconds: float) -> Any: ...  # Any: JSON.

    def close(self) -> None: ...


class RowEncoder:
    """Encodes rows in a limited process, which it ends when it is left.

    Every method raises the errors that a run would raise about the same files, and :class:`EncodingAborted` where the
    limits are hit.
    """

    def __init__(self, inputs: EncodingInputs, process: EncodingProcess | None = None) -> None:
        self._inputs = inputs.to_json()
        self._process = process or LimitedProcess(
            "pocl.preview.process", memory_bytes=MEMORY_BYTES, answer_bytes=ANSWER_BYTES
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._process.close()

    def count(self, *, skip: int, parts: Mapping[str, int], seconds: float) -> CountedRows:
        """Encode the rows after the first `skip`, for about so many seconds, and count.

        Args:
            parts: of the first `skip` rows, as they were counted.
        """
        return CountedRows.model_validate(self._call("count", skip=skip, parts=dict(parts), seconds=seconds))

    def preview(self, *, skip: int, rows: int) -> PreviewPage:
        """Encode so many rows after the first `skip`; fewer where they are long or the data set ends."""
        return PreviewPage.model_validate(self._call("preview", skip=skip, rows=rows))

    def _call(self, operation: str, **arguments: float | dict[str, int]) -> Any:  # Any: JSON.
        request = {"operation": operation, "inputs": self._inputs, **arguments}
        try:
            answer = self._process.call(request, seconds=CALL_SECONDS)
        except ProcessFailed as error:
            raise EncodingAborted(f"Encoding the rows {error}.") from error
        if "refusal" in answer:
            raise rebuild_refusal(answer["refusal"])
        return answer


def describe_refusal(error: PoclError) -> dict[str, Any]:  # Any: JSON.
    """The error as JSON, for :func:`rebuild_refusal` of the parent process."""
    field_errors = [[each.pointer, each.code, each.detail] for each in error.field_errors]
    return {"code": error.code, "message": error.message, "field_errors": field_errors}


def rebuild_refusal(described: dict[str, Any]) -> PoclError:  # Any: JSON.
    """The error that :func:`describe_refusal` has described."""
    for kind in _subclasses(PoclError):
        if kind.code == described["code"]:
            error = kind.__new__(kind)
            field_errors: Sequence[FieldError] = [FieldError(*each) for each in described["field_errors"]]
            # The initialiser of a subclass may compose the message from other arguments.
            PoclError.__init__(error, described["message"], field_errors=field_errors)
            return error
    raise AssertionError(described)


def _subclasses(kind: type[PoclError]) -> list[type[PoclError]]:
    return [each for child in kind.__subclasses__() for each in (child, *_subclasses(child))]
