"""What a run works with: its samples, its models, and the samples as tokens of those models."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from pocl.data.batches import Prompting, encode, end_of_response_id
from pocl.errors import DatasetInvalid
from pocl.evaluation.dataset import EncodedDataset
from pocl.evaluation.vllm_generation import vllm_missing
from pocl.inspect import check_sequence_length
from pocl.models.digest import DigestStore
from pocl.models.loading import LazyModel, LoadedModel, load_lazily, load_student, shared_vocabulary
from pocl.models.precision import Precision
from pocl.models.product_weights import ProductWeights
from pocl.out_of_memory import fit_or_refuse
from pocl.samples.rows import read_samples
from pocl.samples.sample import Sample
from pocl.samples.splits import Splits, split_samples
from pocl.spec import Data, DataRef, DataSplit, DistillationSpec


@dataclass(frozen=True)
class Models:
    """Teacher and student, loaded and found to fit together."""

    student: LoadedModel
    teacher: LazyModel | None
    shared_vocabulary: int | None
    """Both heads agree on the ids below it; None without a teacher."""
    tokenizer: PreTrainedTokenizerBase
    """Encodes the data, and is saved with the distilled student."""
    product_weights: ProductWeights
    """Of the student: used while it is trained, ranks and is evaluated."""


@dataclass(frozen=True)
class Corpus:
    """The samples of a run as token ids."""

    train: EncodedDataset
    held_out: Mapping[str, EncodedDataset]
    """The samples to evaluate on by name: `validation`, `test`, and the evaluation sets."""
    template: str
    """The name of the template that the samples are encoded with."""
    end_of_response_id: int
    """The token that ends a response."""


def read_splits(spec: DistillationSpec) -> Splits:
    """Read the samples of a run; of those for validation as many as are evaluated on.

    Raises:
        DatasetInvalid: naming the lines that are wrong, or the part that would be empty.
    """
    data = spec.data
    splits = Splits(
        *([] if ref is None else read_samples(_file_of(ref)) for ref in (data.train, data.validation, data.test))
    )
    if data.split is not None:
        splits = _split_training_samples(splits, data.split)
    splits = replace(splits, validation=splits.validation[: spec.evaluation.max_rows])
    if splits.validation and not any(sample.references for sample in splits.validation):
        raise DatasetInvalid(
            "No validation sample has a reference answer, so no stage can be scored; "
            "what is only to be answered belongs into evaluation.sets."
        )
    return splits


def read_held_out(spec: DistillationSpec, splits: Splits) -> dict[str, list[Sample]]:
    """The samples to evaluate on by name: `validation`, `test`, and the evaluation sets, which are read.

    Raises:
        DatasetInvalid: naming the lines that are wrong.
    """
    sets = {name: read_samples(_file_of(ref)) for name, ref in spec.evaluation.sets.items()}
    held_out = {"validation": splits.validation, "test": splits.test, **sets}
    return {name: samples for name, samples in held_out.items() if samples}


def check_generator(generator: Literal["engine", "vllm"]) -> None:
    """Refuse a generator that is not installed, before anything long is done.

    Raises:
        SpecInvalid: naming the field.
    """
    if generator == "vllm" and find_spec("vllm") is None:
        raise vllm_missing()


def load_models(spec: DistillationSpec, *, device: torch.device, precision: Precision, digests: DigestStore) -> Models:
    """Load the student, and of the teacher what is needed to check that they can work together.

    Args:
        digests: Where the digests of models on disk are kept.

    Raises:
        ModelNotFound, ModelUnsupported, VocabularyMismatch, SpecInvalid: with what to do about it.
        OutOfMemory: one of them does not fit into the memory of the device.
    """
    teacher_ref = spec.teacher
    teacher = (
        None
        if teacher_ref is None
        else fit_or_refuse(
            lambda: load_lazily(teacher_ref, device=device, dtype=precision.weights, digests=digests), "The teacher"
        )
    )
    student = fit_or_refuse(
        lambda: load_student(spec.student, teacher, device=device, dropout=spec.training.dropout, digests=digests),
        "The student",
    )
    for structure in (student.structure, *([] if teacher is None else [teacher.structure])):
        check_sequence_length(spec.data.max_length, getattr(structure.config, "max_position_embeddings", None))
    shared = None if teacher is None else shared_vocabulary(teacher, student)
    copies = fit_or_refuse(lambda: ProductWeights(student.model, precision), "The copy of the student's weights")
    return Models(student, teacher, shared, _tokenizer(student, teacher), copies)


def encode_corpus(data: Data, models: Models, train: list[Sample], held_out: Mapping[str, list[Sample]]) -> Corpus:
    """Encode the samples with the template of the specification."""
    tokenizer = models.tokenizer
    prompting = Prompting.choose(data.template, tokenizer)
    end_id = end_of_response_id(tokenizer, prompting)

    def encode_all(samples: list[Sample]) -> EncodedDataset:
        encoded = tuple(
            encode(
                sample,
                tokenizer,
                prompting,
                max_length=data.max_length,
                max_prompt_length=data.max_prompt_length,
                eos_token_id=end_id,
            )
            for sample in samples
        )
        return EncodedDataset(encoded, tuple(sample.references for sample in samples))

    encoded = {name: encode_all(samples) for name, samples in held_out.items()}
    return Corpus(encode_all(train), encoded, prompting.value, end_id)


def _split_training_samples(splits: Splits, split: DataSplit) -> Splits:
    """
    Raises:
        DatasetInvalid: a part that was asked for is empty.
    """
    parts = split_samples(splits.train, validation=split.validation, test=split.test, seed=split.seed)
    for part, share in (("validation", split.validation), ("test", split.test), ("train", 1.0)):
        if share and not getattr(parts, part):
            raise DatasetInvalid(
                f"data.split leaves no sample for {part} out of {len(splits.train)}: "
                "give larger shares, or another seed."
            )
    return Splits(parts.train, parts.validation or splits.validation, parts.test or splits.test)


def _file_of(ref: DataRef) -> Path:
    if ref.path is None:
        raise DatasetInvalid("the engine reads files; the service localizes the id of a data set to one")
    return Path(ref.path)


def _tokenizer(student: LoadedModel, teacher: LazyModel | None) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, with the template that the teacher was trained on, unless the student lacks embeddings
    for some of its ids.
    """
    if (
        teacher is None
        or len(teacher.tokenizer) > student.model.get_input_embeddings().get_parameter("weight").shape[0]
    ):
        return student.tokenizer
    return teacher.tokenizer
