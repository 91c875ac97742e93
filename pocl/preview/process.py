"""Encodes rows as a run does; run in a child process, since rows, tokenizers and templates come from clients.

See :mod:`pocl.limited_process`, and :mod:`pocl.preview.encoder` for what is asked. What a request says of the rows is
kept for the next one, which mostly goes on where this one ended.
"""

import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

from pocl.encoding_counts import EncodingCounts
from pocl.errors import DatasetInvalid, ModelUnsupported, PoclError
from pocl.inspect import TokenLimits
from pocl.preview.encoder import (
    MAX_PREVIEW_TOKENS,
    CountedRows,
    PreviewPage,
    PreviewRow,
    PreviewToken,
    describe_refusal,
)
from pocl.prompting.byte_level import byte_level_text_tokenizer
from pocl.prompting.encoded_sample import EncodedSample
from pocl.prompting.encoding import SampleEncoder
from pocl.prompting.encoding_warnings import template_warnings
from pocl.prompting.template_choice import make_encoder
from pocl.prompting.template_renderer import call_shared_process
from pocl.prompting.text_tokenizer import TextTokenizer
from pocl.prompting.tokenizer_files import read_tokenizer
from pocl.samples.reading import RowsInvalid, SampleReader
from pocl.samples.sample import Sample, require_answers, set_name
from pocl.samples.splits import part_of, require_samples
from pocl.samples.stored import is_stored
from pocl.spec import Data, RandomModel

_CHUNK: Final = 64
"""Rows between two looks at the clock."""


def answer(request: dict[str, Any]) -> dict[str, Any]:  # Any: JSON.
    """Answer a request of :class:`pocl.preview.encoder.RowEncoder`."""
    try:
        session = _session(request["inputs"])
        if request["operation"] == "count":
            counted = session.count(request["skip"], request["parts"], request["seconds"])
            return counted.model_dump(mode="json")
        return session.preview(request["skip"], request["rows"]).model_dump(mode="json")
    except PoclError as error:
        if error.fault != "user":
            raise
        return {"refusal": describe_refusal(error)}


class _Session:
    """A data set and the encoder of its rows."""

    def __init__(self, inputs: dict[str, Any]) -> None:  # Any: JSON.
        """
        Raises:
            PoclError: a run would refuse the tokenizer or the settings.
        """
        self._data = Data.model_validate(inputs["data"])
        self._max_rows: int | None = inputs["max_rows"]
        # Templates render in a process of their own with the limits that they have in a run.
        encoder = make_encoder(self._data, _tokenizer(inputs["tokenizer"]), call_shared_process)
        self._part: str = inputs["part"]
        conflicts = {int(id_): clause for id_, clause in inputs["conflicts"].items()}
        self._limits = TokenLimits(inputs["embeddings"], conflicts)
        self._encoder = encoder.named(set_name(self._part))
        self._rows: Iterator[Sample] = iter(())
        self._position = -1
        self._parts: Counter[str] = Counter()
        """The rows that were read, by what a job uses them for; of a split by the part that they are in."""

    def count(self, skip: int, parts: dict[str, int], seconds: float) -> CountedRows:
        self._go_to(skip, parts)
        until = time.monotonic() + seconds
        counts = EncodingCounts()
        rows, done = 0, False
        while not done and (rows == 0 or time.monotonic() < until):
            chunk = self._next_rows(_CHUNK)
            if self._part in ("train", "validation"):
                require_answers(chunk, self._encoder.source, first=skip + rows)
            result = self._encoder.encode(chunk, first=skip + rows)
            for number, sample in enumerate(result.samples, start=skip + rows + 1):
                place = f"Row {number} of {self._encoder.source}"
                self._limits.check(sample.input_ids, place, self._encoder.tokenizer.token_of)
            counts += result.counts
            rows, done = rows + len(chunk), len(chunk) < _CHUNK
        if done and (split := self._data.split) is not None:
            require_samples(self._parts, validation=split.validation, test=split.test)
        return CountedRows(
            template=self._encoder.template,
            counts=counts,
            rows=rows,
            done=done,
            training_samples=self._parts["train"] if done and self._data.split is not None else None,
            parts=dict(self._parts),
            warnings=list(template_warnings(self._encoder)),
        )

    def preview(self, skip: int, rows: int) -> PreviewPage:
        self._go_to(skip, {})
        shown: list[PreviewRow] = []
        tokens = 0
        for number, sample in enumerate(self._next_rows(rows), start=skip):
            row = _preview_row(number, sample, self._encoder)
            tokens += len(row.tokens)
            if shown and tokens > MAX_PREVIEW_TOKENS:
                break
            shown.append(row)
        end = self._encoder.end
        return PreviewPage(
            template=self._encoder.template,
            end=end.text,
            rows=shown,
            warnings=list(template_warnings(self._encoder)),
        )

    def _part_of(self, sample: Sample) -> str:
        split = self._data.split
        return self._part if split is None else part_of(sample, **split.model_dump())

    def _go_to(self, position: int, parts: dict[str, int]) -> None:
        """
        Args:
            parts: the rows before `position`, as they were counted, where any are needed.
        """
        if self._position == position:
            return
        # What the service has stored needs no look to be passed over: a line is a sample.
        self._position = position if is_stored(self._data.train) else 0
        self._parts = Counter(parts) if self._position else Counter()
        self._rows = _read_rows(self._data, self._max_rows, skip=self._position)
        while self._position < position and self._next_rows(min(_CHUNK, position - self._position)):
            pass

    def _next_rows(self, rows: int) -> list[Sample]:
        chunk = list(islice(self._rows, rows))
        self._position += len(chunk)
        for sample in chunk:
            self._parts[self._part_of(sample)] += 1
        return chunk


_opened: tuple[dict[str, Any], _Session] | None = None  # Any: JSON.


def _session(inputs: dict[str, Any]) -> _Session:  # Any: JSON.
    global _opened
    if _opened is None or _opened[0] != inputs:
        _opened = (inputs, _Session(inputs))
    return _opened[1]


def _tokenizer(source: dict[str, Any]) -> TextTokenizer:  # Any: JSON.
    if "random" in source:
        return byte_level_text_tokenizer(RandomModel.model_validate(source["random"]).max_positions)
    directory = Path(source["path"])
    try:
        return read_tokenizer(directory)
    except OSError as error:
        raise ModelUnsupported(f"The tokenizer files of {directory.name} could not be read.") from error


def _read_rows(data: Data, max_rows: int | None, *, skip: int) -> Iterator[Sample]:
    """
    Raises:
        DatasetInvalid: the file cannot be read, or has rows that are no samples.
    """
    assert data.train.path is not None  # The service localizes the data set.
    reader = SampleReader(Path(data.train.path), data.train, skip=skip)
    yield from islice(reader, None if max_rows is None else max(0, max_rows - skip))
    if reader.report.bad:
        raise RowsInvalid(reader.report)


def _preview_row(number: int, sample: Sample, encoder: SampleEncoder) -> PreviewRow:
    try:
        result = encoder.encode([sample], first=number)
    except DatasetInvalid as error:
        return PreviewRow(
            row=number,
            digest=sample.digest,
            tokens=[],
            prompt="",
            answer="",
            counts=EncodingCounts(),
            refusal=error.message,
        )
    tokenizer, encoded = encoder.tokenizer, result.samples[0]
    return PreviewRow(
        row=number,
        digest=sample.digest,
        tokens=_tokens(encoded, tokenizer),
        prompt=tokenizer.decode(encoded.prompt_ids),
        answer=tokenizer.decode(encoded.reference_ids),
        counts=result.counts,
    )


def _tokens(encoded: EncodedSample, tokenizer: TextTokenizer) -> list[PreviewToken]:
    return [
        PreviewToken(id=id_, token=tokenizer.token_of(id_) or "", trained=trained)
        for id_, trained in zip(encoded.input_ids, encoded.label_mask, strict=True)
    ]
