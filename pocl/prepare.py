"""What a run works with: its samples, its models, and the samples as tokens of those models."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.encoding_counts import EncodingCounts
from pocl.evaluation.dataset import EncodedDataset
from pocl.evaluation.row_scores import MAX_SHOWN
from pocl.evaluation.vllm_generation import vllm_missing
from pocl.export.chat_templates import alpaca_chat_template, with_defaults
from pocl.inspect import SharedVocabulary, TokenLimits, check_sequence_length
from pocl.inspect.chat_templates import DEFAULT_TEMPLATE
from pocl.models.digest import DigestStore
from pocl.models.hub import HubClient
from pocl.models.loading import LazyModel, LoadedModel, load_lazily, load_student, shared_vocabulary, token_limits
from pocl.models.precision import Precision
from pocl.models.product_weights import ProductWeights
from pocl.models.tokenizers import text_tokenizer
from pocl.out_of_memory import fit_or_refuse
from pocl.prompting.encoding import SampleEncoder
from pocl.prompting.encoding_warnings import EncodingWarning, encoding_warnings
from pocl.prompting.template_choice import chat_template_sources, make_encoder
from pocl.prompting.template_renderer import call_shared_process
from pocl.prompting.text_tokenizer import TextTokenizer
from pocl.prompting.thoughts import AnswerForm
from pocl.samples.sample import Sample, require_answers, set_name
from pocl.spec import Data, DistillationSpec


@dataclass(frozen=True)
class Models:
    """Teacher and student, loaded and found to fit together."""

    student: LoadedModel
    teacher: LazyModel | None
    vocabulary: SharedVocabulary | None
    """How far teacher and student agree on it; None without a teacher."""
    token_limits: TokenLimits
    """Which ids samples may use."""
    tokenizer: PreTrainedTokenizerBase
    """Encodes the data, and is saved with the distilled student."""
    product_weights: ProductWeights
    """Of the student: used while it is trained, ranks and is evaluated."""

    @property
    def shared_vocabulary(self) -> int | None:
        """The ids from 0 up to it are scored by both output heads; None without a teacher."""
        return None if self.vocabulary is None else self.vocabulary.size


@dataclass(frozen=True)
class AnswerEnding:
    """What tells an answer from what is generated around it."""

    end_of_response_id: int
    """The token that ends a response; the end-of-sequence token where a response ends in plain text."""
    end_tokens: frozenset[int]
    """All tokens that end a response."""
    stop_text: str
    """The plain text that ends a response; empty where a token does."""
    form: AnswerForm
    """What is generated around what a response says."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a response, the one that ends the last answer first."""
        return (self.end_of_response_id, *sorted(self.end_tokens - {self.end_of_response_id}))


@dataclass(frozen=True)
class Corpus:
    """The samples of a run as token ids."""

    train: EncodedDataset
    difficulties: tuple[float | None, ...]
    """Of the training samples, as their rows have them."""
    held_out: Mapping[str, EncodedDataset]
    """The samples to evaluate on by name: `validation`, `test`, and the evaluation sets."""
    template: str
    """What the samples are encoded with, as far as it decides what of an answer is compared."""
    template_kind: str
    """`chat` or `alpaca`."""
    ending: AnswerEnding
    """How answers end, and how they begin with a thought."""
    counts: Mapping[str, EncodingCounts]
    """What was cut and left out, by the set of samples: `train`, and those of `held_out`."""
    warnings: tuple[EncodingWarning, ...]
    """What whoever runs the job should know about the samples as tokens."""
    chat_templates: Mapping[str, str]
    """The templates in Jinja that are saved with the student, by name."""


def check_generator(generator: Literal["engine", "vllm"]) -> None:
    """Refuse a generator that is not installed, before anything long is done.

    Raises:
        SpecInvalid: naming the field.
    """
    if generator == "vllm" and find_spec("vllm") is None:
        raise vllm_missing()


def load_models(
    spec: DistillationSpec,
    *,
    device: torch.device,
    precision: Precision,
    digests: DigestStore,
    hub: HubClient | None = None,
) -> Models:
    """Load the student, and of the teacher what is needed to check that they can work together.

    Args:
        digests: Where the digests of models on disk are kept.
        hub: Where models on the Hub come from; the Hub itself unless given.

    Raises:
        ModelNotFound, ModelUnsupported, VocabularyMismatch, SpecInvalid: with what to do about it.
        OutOfMemory: one of them does not fit into the memory of the device.
    """
    teacher_ref = spec.teacher
    teacher = (
        None
        if teacher_ref is None
        else fit_or_refuse(
            lambda: load_lazily(teacher_ref, device=device, dtype=precision.weights, digests=digests, hub=hub),
            "The teacher",
        )
    )
    student = fit_or_refuse(
        lambda: load_student(
            spec.student, teacher, device=device, dropout=spec.training.dropout, digests=digests, hub=hub
        ),
        "The student",
    )
    for structure in (student.structure, *([] if teacher is None else [teacher.structure])):
        check_sequence_length(spec.data.max_length, getattr(structure.config, "max_position_embeddings", None))
    shared = None if teacher is None else shared_vocabulary(teacher, student)
    copies = fit_or_refuse(lambda: ProductWeights(student.model, precision), "The copy of the student's weights")
    roles: dict[str, LoadedModel | LazyModel] = {"student": student}
    if teacher is not None:
        roles["teacher"] = teacher
    limits = token_limits(roles, {} if shared is None else shared.conflicts)
    return Models(student, teacher, shared, limits, _tokenizer(student, teacher), copies)


def encode_corpus(data: Data, models: Models, train: list[Sample], held_out: Mapping[str, list[Sample]]) -> Corpus:
    """Encode the samples with the template of the specification, which is saved with the distilled student.

    Raises:
        ModelUnsupported, VocabularyMismatch: a sample uses a token that a model has no embedding for, or that means
            something else to each.
        SpecInvalid, DatasetInvalid, ModelUnsupported: see :func:`~pocl.prompting.template_choice.make_encoder` and
            :meth:`~pocl.prompting.encoding.SampleEncoder.encode`.
    """
    tokenizer = _text_tokenizer(models)
    encoder = make_encoder(data, tokenizer, call_shared_process)
    counts: dict[str, EncodingCounts] = {}
    datasets: dict[str, EncodedDataset] = {}
    require_answers(train, set_name("train"))
    for name, samples in {"train": train, **held_out}.items():
        encoded = encoder.named(set_name(name)).encode(samples)
        for index, sample in enumerate(encoded.samples):
            models.token_limits.check(sample.input_ids, f"Row {index + 1} of {set_name(name)}", tokenizer.token_of)
        references = tuple(
            tuple(encoder.answer.read_reference(reference) for reference in sample.references) for sample in samples
        )
        prompts = tuple(sample.prompt_text for sample in samples[:MAX_SHOWN])
        counts[name], datasets[name] = encoded.counts, EncodedDataset(encoded.samples, references, prompts)
    return Corpus(
        datasets.pop("train"),
        tuple(sample.difficulty for sample in train),
        datasets,
        encoder.answer_key,
        encoder.template,
        ending_of(encoder),
        counts,
        tuple(encoding_warnings(encoder, counts)),
        _exported_templates(data, tokenizer),
    )


def _exported_templates(data: Data, tokenizer: TextTokenizer) -> dict[str, str]:
    """The chat templates as a server has to use them: with the variables that the samples were rendered with."""
    sources = chat_template_sources(data, tokenizer)
    if not sources:
        return {DEFAULT_TEMPLATE: alpaca_chat_template(tokenizer)}
    return {name: with_defaults(source, data.chat_template_kwargs) for name, source in sources.items()}


def _text_tokenizer(models: Models) -> TextTokenizer:
    """The tokenizer of the data for texts, with the ends that the generation config of its model names."""
    is_teachers = models.teacher is not None and models.tokenizer is models.teacher.tokenizer
    owner = models.teacher if is_teachers else models.student
    assert owner is not None  # The teacher's tokenizer has a teacher.
    return tokenizer_for_texts(models.tokenizer, owner.structure)


def tokenizer_for_texts(tokenizer: PreTrainedTokenizerBase, structure: PreTrainedModel) -> TextTokenizer:
    """A tokenizer for texts, with the ends that the generation config of a model names.

    Raises:
        ModelUnsupported: it has no backend of the tokenizers library.
    """
    generation_config = structure.generation_config
    configured = None if generation_config is None else generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return text_tokenizer(tokenizer, [id_ for id_ in ids if isinstance(id_, int)])


def ending_of(encoder: SampleEncoder) -> AnswerEnding:
    """How answers end, and how they begin with a thought, in the template of an encoder."""
    end, eos = encoder.end, encoder.tokenizer.eos_id
    token = end.token if end.token is not None else eos
    return AnswerEnding(
        end_of_response_id=token if token is not None else end.ids[-1],
        end_tokens=encoder.end_tokens,
        stop_text=encoder.stop_text,
        form=encoder.answer,
    )


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
