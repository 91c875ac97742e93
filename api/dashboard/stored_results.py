"""What the pages show of the files of a job: its ranking and the answers of its models. Bounded parts are read."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from domain.artifacts import ArtifactStore
from domain.jobs.models import JobArtifact
from pocl.samples.file_formats import parse_line
from pocl.samples.forms import parse_fields
from pocl.samples.row_invalid import RowInvalid
from pocl.samples.sample import Sample
from pocl.samples.stored import MAX_STORED_BYTES, STORED

MAX_RESULT_BYTES: Final = 16 * 2**20
_MAX_WHOLE_BYTES: Final = 8 * 2**20
"""A longer ranking is read in pieces that lie evenly in it."""
_PIECES: Final = 64
_PIECE_BYTES: Final = 64 * 1024
_SHOWN: Final = 5
_BINS: Final = 24
_MAX_TEXT: Final = 1200
_MAX_SCANNED: Final = 20_000
"""Samples of a data set that are read to find the shown ones."""


@dataclass
class ShownSample:
    """A sample at one end of the ranking."""

    rank: int
    row: int
    digest: str
    cross_entropy: float | None
    rouge_l: float | None
    answer: str | None
    """What the model that ranked answered."""
    prompt: str | None = None
    """Null where the text of the sample is not at hand."""
    reference: str | None = None


@dataclass(frozen=True)
class Bin:
    """The samples whose measure lies in a range."""

    low: float
    high: float
    count: int
    share: float
    """Of the fullest bin, 0 to 1."""


@dataclass(frozen=True)
class Difficulty:
    """How difficult the training samples were for the model that ranked them."""

    measure: str
    """What the histogram is of."""
    bins: Sequence[Bin]
    counted: int
    """The samples that the histogram has."""
    is_partial: bool
    """Whether these are a part that lies evenly in the ranking."""
    easiest: Sequence[ShownSample] = field(default_factory=list)
    hardest: Sequence[ShownSample] = field(default_factory=list)


def read_difficulty(store: ArtifactStore, ranking: JobArtifact) -> Difficulty:
    """The histogram of a ranking, and the samples at both of its ends.

    Raises:
        ArtifactNotFound, ArtifactCorrupt, OSError: the file cannot be read.
    """
    size = ranking.size_bytes
    if size <= _MAX_WHOLE_BYTES:
        rows = _rows(_read(store, ranking.store_key, 0, size))
        first, last = rows[:_SHOWN], rows[-_SHOWN:]
    else:
        stride = size // _PIECES
        pieces = [_read(store, ranking.store_key, at * stride, at * stride + _PIECE_BYTES) for at in range(_PIECES)]
        end = _read(store, ranking.store_key, size - _PIECE_BYTES, size)
        # A piece begins and ends within a line, but for the first one's beginning.
        rows = [row for at, piece in enumerate(pieces) for row in _rows(_whole_lines(piece, first=at == 0))]
        first, last = _rows(_whole_lines(pieces[0], first=True))[:_SHOWN], _rows(_whole_lines(end))[-_SHOWN:]
    measure = "cross_entropy" if any(row.get("cross_entropy") is not None for row in rows) else "score"
    values = [float(row[measure]) for row in rows if isinstance(row.get(measure), int | float)]
    return Difficulty(
        measure="cross-entropy of the reference, nats per token" if measure == "cross_entropy" else "difficulty",
        bins=_histogram([value for value in values if math.isfinite(value)]),
        counted=len(values),
        is_partial=size > _MAX_WHOLE_BYTES,
        easiest=[_shown(row) for row in first],
        hardest=[_shown(row) for row in reversed(last)],
    )


def add_texts(shown: Sequence[ShownSample], dataset: Path, *, is_split: bool) -> None:
    """Add the texts of samples from the stored data set that they are of.

    Args:
        is_split: whether only a part of the data set was trained on, so that positions are others than in the file.
    """
    wanted = {sample.digest: sample for sample in shown}
    rows = {sample.row for sample in shown}
    last = _MAX_SCANNED if is_split else max(rows, default=-1) + 1
    with dataset.open("rb") as file:
        for number in range(last):
            line = file.readline(MAX_STORED_BYTES + 1)
            if not line or not wanted:
                return
            if not is_split and number not in rows:
                continue
            sample = _parse(line)
            found = None if sample is None else wanted.pop(sample.digest, None)
            if sample is not None and found is not None:
                found.prompt = _cut(sample.prompt_text)
                found.reference = _cut(sample.references[0]) if sample.references else None


def read_answers(store: ArtifactStore, result: JobArtifact) -> list[dict[str, Any]]:
    """The answers that a result has, by sample: `split`, `prompt`, `reference`, and `answers` by model.

    Raises:
        ArtifactNotFound, ArtifactCorrupt, OSError: the file cannot be read.
    """
    if result.size_bytes > MAX_RESULT_BYTES:
        return []
    try:
        content = orjson.loads(_read(store, result.store_key, 0, result.size_bytes))
    except orjson.JSONDecodeError:
        return []
    answers = content.get("answers") if isinstance(content, dict) else None
    return [each for each in answers or [] if isinstance(each, dict) and isinstance(each.get("answers"), dict)]


def _read(store: ArtifactStore, key: str, start: int, stop: int) -> bytes:
    return b"".join(store.read(key, None, start, stop))


def _whole_lines(piece: bytes, *, first: bool = False) -> bytes:
    begin = 0 if first else piece.find(b"\n") + 1
    return piece[begin : piece.rfind(b"\n") + 1]


def _rows(content: bytes) -> list[dict[str, Any]]:
    return list(_parsed(content))


def _parsed(content: bytes) -> Iterator[dict[str, Any]]:
    for line in content.split(b"\n"):
        try:
            row = orjson.loads(line) if line else None
        except orjson.JSONDecodeError:
            continue
        if isinstance(row, dict):
            yield row


def _shown(row: dict[str, Any]) -> ShownSample:
    answer = row.get("response")
    return ShownSample(
        rank=int(row.get("rank", 0)),
        row=int(row.get("row", -1)),
        digest=str(row.get("digest", "")),
        cross_entropy=row.get("cross_entropy"),
        rouge_l=row.get("rouge_l"),
        answer=None if answer is None else _cut(str(answer)),
    )


def _histogram(values: Sequence[float]) -> list[Bin]:
    """Bins of one width up to the 99th percentile; the last one has what lies above."""
    if not values:
        return []
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, math.ceil(len(ordered) * 0.99))]
    width = (high - low) / _BINS
    if width <= 0:
        return [Bin(low, high, len(values), 1.0)]
    counts = [0] * _BINS
    for value in values:
        counts[min(_BINS - 1, int((value - low) / width))] += 1
    fullest = max(counts)
    return [
        Bin(low + index * width, low + (index + 1) * width, count, count / fullest)
        for index, count in enumerate(counts)
    ]


def _parse(line: bytes) -> Sample | None:
    try:
        return parse_fields(parse_line(line, MAX_STORED_BYTES), STORED).sample
    except RowInvalid:
        return None


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"
