"""The samples of a run: read from files or from the Hub, and split."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from pocl.errors import DatasetInvalid
from pocl.models.hub import HubClient, HuggingFaceHub
from pocl.models.hub_datasets import fetch_dataset
from pocl.samples.file_formats import format_of_name
from pocl.samples.reading import read_sample_file
from pocl.samples.sample import Sample
from pocl.samples.splits import Splits, require_samples, split_samples
from pocl.spec import ANSWERED_DATA, DataRef, DataSplit, DistillationSpec


@dataclass(frozen=True)
class RunData:
    """The samples of a run, and what is to be told about how they were read."""

    splits: Splits
    held_out: dict[str, list[Sample]]
    """The samples that are evaluated on, by name: `validation`, `test`, and the evaluation sets; none is empty."""
    notes: tuple[tuple[str, str, str], ...] = ()
    """What was left out: codes, sentences, and the pointers to the fields of the data, for warnings."""
    commits: dict[str, str] = field(default_factory=dict)
    """The commit of each data set of the Hub, by the pointer of its field in the specification."""


def read_data(spec: DistillationSpec, hub: HubClient | None = None) -> RunData:
    """Read the samples of a run; of those for validation as many as are evaluated on.

    Args:
        hub: where data sets of the Hub are fetched; null for the Hub itself.

    Raises:
        DatasetInvalid: naming the rows that are wrong, the part that would be empty, or what the Hub does not have.
        DiskFull, EngineFailure: the files of the Hub could not be fetched.
    """
    parts: dict[str, list[Sample]] = {}
    notes: list[tuple[str, str, str]] = []
    commits: dict[str, str] = {}
    for pointer, ref in spec.data_refs.items():
        files, commit = _locate(ref, hub)
        if commit is not None:
            commits[pointer] = commit
        parts[pointer] = []
        for file in files:
            samples, report = read_sample_file(file, ref, hint=format_of_name(file.name))
            parts[pointer] += samples
            notes += [(code, f"{pointer}: {sentence}", pointer) for code, sentence in report.notes]
        if pointer in ANSWERED_DATA:
            _check_answers(parts[pointer], pointer)
    splits = Splits(*(parts.get(f"/data/{part}", []) for part in ("train", "validation", "test")))
    if spec.data.split is not None:
        splits = _split_training_samples(splits, spec.data.split)
    splits = replace(splits, validation=splits.validation[: spec.evaluation.max_rows])
    sets = {name: parts[f"/evaluation/sets/{name}"] for name in spec.evaluation.sets}
    held_out = {"validation": splits.validation, "test": splits.test, **sets}
    return RunData(splits, {name: each for name, each in held_out.items() if each}, tuple(notes), commits)


def _locate(ref: DataRef, hub: HubClient | None) -> tuple[list[Path], str | None]:
    if ref.hub is not None:
        commit, files = fetch_dataset(ref.hub, ref.format, hub or HuggingFaceHub())
        return files, commit
    if ref.path is None:
        raise DatasetInvalid("The engine reads files; the service localizes the id of a data set to one.")
    return [Path(ref.path)], None


def _check_answers(samples: list[Sample], pointer: str) -> None:
    """
    Raises:
        DatasetInvalid: there are prompts alone, and an answer is needed.
    """
    prompts = sum(not sample.has_answer for sample in samples)
    if prompts:
        raise DatasetInvalid(
            f"{prompts} samples of {pointer} are prompts without an answer, from which nothing is learnt: give an "
            "answer to each, or map the column that has it with `columns`. What is only to be answered belongs into "
            "evaluation.sets."
        )


def _split_training_samples(splits: Splits, split: DataSplit) -> Splits:
    """
    Raises:
        DatasetInvalid: a part that was asked for is empty.
    """
    parts = split_samples(splits.train, validation=split.validation, test=split.test, seed=split.seed)
    sizes = {"train": len(parts.train), "validation": len(parts.validation), "test": len(parts.test)}
    require_samples(sizes, validation=split.validation, test=split.test)
    return Splits(parts.train, parts.validation or splits.validation, parts.test or splits.test)
