"""Checks of a job's data sets at submission: their rows, encoded as a run would encode them, and what that cuts."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from domain.encoding_checks import EncodingChecker
from domain.errors import engine_refusals
from domain.jobs.model_checks import InspectedModels, source_field
from pocl.encoding_counts import EncodingCounts
from pocl.errors import ModelNotFound, ModelUnsupported, PoclError, SpecInvalid, VocabularyMismatch
from pocl.estimate import SetSize
from pocl.preview.encoder import EncodingInputs
from pocl.prompting.encoding_warnings import EncodingWarning
from pocl.spec import DataRef, DistillationSpec


@dataclass(frozen=True)
class StoredRows:
    """The rows of a data set."""

    reference: DataRef | None
    """Their file in the artifact store, which may be on other machines only; null for rows of the Hub."""
    samples: int
    """How many there are."""
    sha256: str = ""
    """The digest of the file."""


@dataclass(frozen=True)
class DataFigures:
    """What encoding a data set cuts and leaves out."""

    part: str
    """What a run uses the samples for: `train`, `validation`, `test` or an evaluation set."""
    template: str | None
    """The template that makes text of the samples; null before any was tried."""
    samples: int
    """The samples that a run encodes."""
    tried: int
    """How many of them were tried."""
    counts: EncodingCounts
    """What was counted over those."""
    training_samples: int | None = None
    """The samples that a split leaves to train on, once all were tried; null without a split."""
    warnings: tuple[EncodingWarning, ...] = ()
    """What is to be known about the template."""


def check_datasets(
    checker: EncodingChecker,
    spec: DistillationSpec,
    datasets: Mapping[str, StoredRows],
    models: InspectedModels,
    *,
    pointer_prefix: str = "",
) -> Iterator[DataFigures]:
    """Encode the rows of the data sets as far as the time of the checker goes.

    Call it without a transaction: it may take as long as the settings allow.

    Args:
        datasets: by the pointers to the fields that name them.
        pointer_prefix: where the specification stands in the client's document, for the pointers of errors.

    Raises:
        EngineRefusal: a run would refuse a data set, the tokenizer or the settings.
    """
    for pointer, rows in datasets.items():
        part = pointer.rpartition("/")[2]
        # A run takes as many of the validation samples as it evaluates on, and all others.
        max_rows = spec.evaluation.max_rows if part == "validation" else None
        samples = rows.samples if max_rows is None else min(rows.samples, max_rows)
        tokenizer = models.tokenizer
        # The tokenizer of a GGUF file is read by the worker alone.
        if tokenizer is None or (isinstance(tokenizer, Path) and tokenizer.is_file()) or not _is_here(rows):
            yield DataFigures(part, None, samples, 0, EncodingCounts())
            continue
        others = ("validation", "test") if part == "train" else ("validation", "test", "split")
        data = spec.data.model_copy(update={"train": rows.reference, **dict.fromkeys(others)})
        inputs = EncodingInputs(data, tokenizer, max_rows, part, models.token_limits)
        check = checker.check(inputs, digest=rows.sha256)
        if check.refusal is not None:
            refused = _pointer(check.refusal, f"{pointer}/dataset", models.tokenizer_role, spec)
            with engine_refusals(f"{pointer_prefix}{refused}"):
                raise check.refusal
        yield DataFigures(
            part, check.template, samples, check.tried, check.counts, check.training_samples, check.warnings
        )


def set_sizes(
    spec: DistillationSpec, samples: int, datasets: Mapping[str, StoredRows], checked: Iterable[DataFigures]
) -> dict[str, SetSize]:
    """The sizes of the samples of a run, by what it uses them for.

    Args:
        samples: those that are trained on.
        datasets: by the pointers to the fields that name them.
        checked: what was counted; samples that were not tried are like those that were, and of full length before any
            was.
    """
    counts = {figures.part: figures.counts for figures in checked if figures.counts.rows}
    split, max_rows = spec.data.split, spec.evaluation.max_rows
    numbers = {pointer.rpartition("/")[2]: rows.samples for pointer, rows in datasets.items()}
    sources = {part: part for part in numbers}
    if split is not None:
        held_out = max(0, numbers["train"] - samples)
        for part, share in (("validation", split.validation), ("test", split.test)):
            if share:
                numbers[part] = round(held_out * share / (split.validation + split.test))
                sources[part] = "train"
    numbers["train"] = samples
    if max_rows is not None and "validation" in numbers:
        numbers["validation"] = min(max_rows, numbers["validation"])
    return {
        part: SetSize.as_counted(number, counts[sources[part]])
        if sources[part] in counts
        else SetSize.of_full_length(number, spec.data)
        for part, number in numbers.items()
    }


def _is_here(rows: StoredRows) -> bool:
    return rows.reference is not None and Path(str(rows.reference.path)).is_file()


def _pointer(refusal: PoclError, dataset: str, role: str, spec: DistillationSpec) -> str:
    """The field of the specification that an error about encoding is about."""
    if isinstance(refusal, SpecInvalid):
        # Its field errors have their pointers already.
        return ""
    if isinstance(refusal, VocabularyMismatch):
        return "/student"
    if isinstance(refusal, ModelUnsupported | ModelNotFound):
        ref = spec.student if role == "student" else spec.teacher
        return f"/{role}/{'path' if ref is None else source_field(ref)}"
    return dataset
