"""What a run works with: its rows, its models, and the rows as tokens of those models."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from pocl.data.batches import Prompting, encode, end_of_response_id
from pocl.data.samples import Sample, read_samples
from pocl.errors import DatasetInvalid
from pocl.evaluation.evaluate import EncodedDataset
from pocl.inspect import check_sequence_length
from pocl.models.loading import LoadedModel, load_student, load_teacher, shared_vocabulary
from pocl.models.precision import Precision
from pocl.spec import Data, DataRef, DistillationSpec


@dataclass(frozen=True)
class Models:
    student: LoadedModel
    teacher: LoadedModel | None
    shared_vocabulary: int | None
    """Both heads agree on the ids below it; None without a teacher."""
    tokenizer: PreTrainedTokenizerBase
    """What the data is read with, and what the distilled student is saved with."""


@dataclass(frozen=True)
class Corpus:
    """The rows of the run, tokenised."""

    train: EncodedDataset
    validation: EncodedDataset | None
    template: str
    end_id: int
    """The token that ends a response."""


def read_splits(spec: DistillationSpec) -> tuple[list[Sample], list[Sample]]:
    """The training rows, and the validation rows that are evaluated on.

    Raises:
        DatasetInvalid: naming the rows that are wrong.
    """
    train = read_samples(_path_of(spec.data.train))
    validation = [] if spec.data.validation is None else read_samples(_path_of(spec.data.validation))
    return train, validation[: spec.evaluation.max_rows]


def load_models(spec: DistillationSpec, *, device: torch.device, precision: Precision) -> Models:
    """Load teacher and student, and check that they can work together.

    Raises:
        ModelNotFound, ModelUnsupported, VocabularyMismatch, SpecInvalid: with what to do about it.
    """
    teacher = None if spec.teacher is None else load_teacher(spec.teacher, device=device, dtype=precision.weights)
    student = load_student(spec.student, teacher, device=device, dropout=spec.training.dropout)
    for loaded in filter(None, (teacher, student)):
        check_sequence_length(spec.data.max_length, getattr(loaded.model.config, "max_position_embeddings", None))
    shared = None if teacher is None else shared_vocabulary(teacher, student)
    return Models(student, teacher, shared, _tokenizer(student, teacher))


def encode_corpus(data: Data, models: Models, train: list[Sample], validation: list[Sample]) -> Corpus:
    """Tokenise the rows as the data's template says."""
    tokenizer = models.tokenizer
    prompting = Prompting.choose(data.template, tokenizer)
    end_id = end_of_response_id(tokenizer, prompting)

    def rows(samples: list[Sample]) -> EncodedDataset:
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

    return Corpus(rows(train), rows(validation) if validation else None, prompting.value, end_id)


def dataset_digest(rows: EncodedDataset) -> str:
    """SHA-256 over the rows as tokens, in their order."""
    digest = hashlib.sha256()
    for row in rows.samples:
        digest.update(f"{row.digest} {list(row.input_ids)}\n".encode())
    return digest.hexdigest()


def references_digest(rows: EncodedDataset) -> str:
    """SHA-256 over what answers are compared with, in the order of the rows."""
    return hashlib.sha256(repr(rows.references).encode()).hexdigest()


def _path_of(ref: DataRef) -> Path:
    if ref.path is None:
        raise DatasetInvalid("the engine reads files; a data set id is resolved by the service")
    return Path(ref.path)


def _tokenizer(student: LoadedModel, teacher: LoadedModel | None) -> PreTrainedTokenizerBase:
    """The teacher's, whose template the teacher knows, unless it has ids that the student has no embedding for."""
    if (
        teacher is None
        or len(teacher.tokenizer) > student.model.get_input_embeddings().get_parameter("weight").shape[0]
    ):
        return student.tokenizer
    return teacher.tokenizer
