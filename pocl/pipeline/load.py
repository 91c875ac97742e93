"""The phase `loading`: the models, how much is done at once, and the samples as tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from pocl.events import DataEncoded, PhaseChanged
from pocl.layout import MODEL_DIGESTS_FILE
from pocl.models.digest import DigestStore
from pocl.models.loading import LazyModel, LoadedModel
from pocl.models.output_head import extract_head
from pocl.pipeline.context import RunContext
from pocl.pipeline.validate import ValidatedRun
from pocl.prepare import Corpus, Models, encode_corpus, load_models
from pocl.prompting.encoding_warnings import pointer_of_part
from pocl.run_inputs import model_inputs
from pocl.sizes import Workload, choose_sizes, measure_free_memory


@dataclass(frozen=True)
class LoadedRun:
    """The models of a run, and its samples as their tokens."""

    models: Models
    corpus: Corpus
    data_encoded: tuple[DataEncoded, ...]
    """What was cut and left out of each set of samples, as it was reported."""
    digests: DigestStore
    """The digests of models on disk."""
    parameters: Mapping[Literal["teacher", "student"], int]
    """How many parameters the models have."""


def load(context: RunContext, run: ValidatedRun) -> LoadedRun:
    """Load the models, of the teacher only what is needed to check it, and encode the samples.

    Raises:
        ModelNotFound, ModelUnsupported, VocabularyMismatch, SpecInvalid, DatasetInvalid: with what to do about it.
        InputsChanged: a model is not the one with which the run began.
        OutOfMemory: one does not fit into the memory of the device.
    """
    context.sink(PhaseChanged(phase="loading"))
    digests = DigestStore(context.shared_cache.root / MODEL_DIGESTS_FILE)
    models = load_models(
        context.spec,
        device=context.device,
        precision=context.precision,
        digests=digests,
        hub=run.inputs.hub,
    )
    run.inputs.add(model_inputs(context.posted_spec, models))
    # The model that ranks is read later, and was pinned by an earlier start.
    run.inputs.pin(are_complete=False)
    # Later the teacher has given up its layers.
    parameters = {role: _count_parameters(model.structure) for role, model in _by_role(models).items()}
    _warn_of_models(context, models)
    _choose_sizes(context, models)
    corpus = encode_corpus(context.spec.data, models, run.data.splits.train, run.data.held_out)
    data_encoded = tuple(
        DataEncoded(part=part, template=corpus.template_kind, counts=counts) for part, counts in corpus.counts.items()
    )
    for event in data_encoded:
        context.sink(event)
    for about_samples in corpus.warnings:
        context.warn(about_samples.code, about_samples.message, about_samples.pointer)
    _report_unscored(context, corpus)
    return LoadedRun(models, corpus, data_encoded, digests, parameters)


def _by_role(models: Models) -> dict[Literal["teacher", "student"], LoadedModel | LazyModel]:
    """The models that there are."""
    return {"student": models.student, **({} if models.teacher is None else {"teacher": models.teacher})}


def _count_parameters(model: PreTrainedModel) -> int:
    return sum(each.numel() for each in model.parameters())


def _warn_of_models(context: RunContext, models: Models) -> None:
    for role, model in _by_role(models).items():
        for warning in model.warnings:
            context.warn(warning.code, f"{role}: {warning.message}", f"/{role}")
    for warning in () if models.vocabulary is None else models.vocabulary.warnings():
        context.warn(warning.code, warning.message, "/student")


def _choose_sizes(context: RunContext, models: Models) -> None:
    """Choose and pin those sizes that are neither posted nor pinned already."""
    workload = Workload.of(
        context.spec,
        models.student.model,
        None if models.teacher is None else models.teacher.structure,
        precision=context.precision,
        has_fused_head=extract_head(models.student.model) is not None,
    )
    context.pin(context.spec.with_choices(choose_sizes(workload, measure_free_memory(context.device)).choices))


def _report_unscored(context: RunContext, corpus: Corpus) -> None:
    """Say of which samples to evaluate on the answers are kept without a score."""
    for name, dataset in corpus.held_out.items():
        if unscored := len(dataset.samples) - len(dataset.scored.samples):
            message = f"{unscored} {name} samples have no reference to compare with: they are answered, not scored"
            context.warn("answers_not_scored", message, pointer_of_part(name))
