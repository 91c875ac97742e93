"""The model that ranks the training samples, by the specification: the student, the teacher or another one."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import assert_never

from transformers import PreTrainedModel

from pocl.callbacks import ShouldStop
from pocl.curriculum.measurer import MeasuredModel
from pocl.events import Sink, Warned
from pocl.inspect import check_sequence_length
from pocl.losses.buffers import LossExecution
from pocl.models.digest import DigestStore
from pocl.models.hub import HubClient
from pocl.models.loading import LazyModel, load_lazily, shared_vocabulary, token_limits
from pocl.models.packed import reason_not_to_pack
from pocl.models.precision import Precision
from pocl.out_of_memory import fit_or_refuse
from pocl.prepare import Corpus, Models
from pocl.sizes import RunSizes
from pocl.spec import (
    ENGINE_CHOICES,
    ColumnRanker,
    DistillationSpec,
    ModelRanker,
    ModelRef,
    StudentRanker,
    TeacherRanker,
    WarmStudentRanker,
)
from pocl.teacher.distillation_loss import CrossEntropyLoss
from pocl.train.accumulation import GradientAccumulator
from pocl.train.schedule import training_order
from pocl.train.warm_up import WarmUp


@dataclass(frozen=True)
class RankerSetup:
    """What a ranker is made of, besides the specification."""

    models: Models
    corpus: Corpus
    precision: Precision
    sizes: RunSizes
    digests: DigestStore
    hub: HubClient
    """Where a model on the Hub that ranks comes from."""
    sink: Sink
    should_stop: ShouldStop


def choose_ranker(spec: DistillationSpec, setup: RankerSetup) -> MeasuredModel:
    """The model that `curriculum.ranking.ranker` names.

    Raises:
        ValueError: it names no model, but a column.
        ModelNotFound, ModelUnsupported, VocabularyMismatch, SpecInvalid: it cannot read the samples.
    """
    ranker, models = spec.curriculum.ranking.ranker, setup.models
    match ranker:
        case StudentRanker():
            return MeasuredModel(models.student.digest, models.student.model, lambda: _student(models))
        case TeacherRanker():
            assert models.teacher is not None  # The specification demands one.
            # It is scored next, and its hidden states are computed.
            return _frozen(models.teacher, release=False)
        case ModelRanker():
            model = _load(ranker.model, spec, setup)
            return replace(_frozen(model, release=True), origin=model.origin)
        case WarmStudentRanker():
            return _warm_student(ranker, spec, setup)
        case ColumnRanker():
            raise ValueError("a column ranks without a model")
        case _:
            assert_never(ranker)


@contextmanager
def _student(models: Models) -> Iterator[PreTrainedModel]:
    with models.product_weights.in_use():
        yield models.student.model


def _frozen(model: LazyModel, *, release: bool) -> MeasuredModel:
    @contextmanager
    def ready() -> Iterator[PreTrainedModel]:
        try:
            yield model.whole()
        finally:
            if release:
                model.release()

    return MeasuredModel(model.digest, model.structure, ready)


def _load(ref: ModelRef, spec: DistillationSpec, setup: RankerSetup) -> LazyModel:
    precision, student = setup.precision, setup.models.student
    model = fit_or_refuse(
        lambda: load_lazily(
            ref, device=precision.device, dtype=precision.weights, digests=setup.digests, hub=setup.hub
        ),
        "The model that ranks",
    )
    positions = getattr(model.structure.config, "max_position_embeddings", None)
    check_sequence_length(spec.data.max_length, positions)
    limits = token_limits({"model that ranks": model}, shared_vocabulary(model, student).conflicts)
    token_of = setup.models.tokenizer.convert_ids_to_tokens
    for index, sample in enumerate(setup.corpus.train.samples):
        limits.check(sample.input_ids, f"Row {index + 1} of the train set", lambda id_: str(token_of(id_)))
    return model


def _warm_student(ranker: WarmStudentRanker, spec: DistillationSpec, setup: RankerSetup) -> MeasuredModel:
    models, dataset = setup.models, setup.corpus.train
    model, training = models.student.model, spec.training

    def note_halved(size: int) -> None:
        message = f"out of memory in the warm-up before the ranking: its micro-batch is now {size} rows"
        setup.sink(Warned(code="micro_batch_halved", message=message))

    @contextmanager
    def ready() -> Iterator[PreTrainedModel]:
        loss = CrossEntropyLoss(
            model,
            setup.precision,
            execution=LossExecution(setup.sizes.loss_chunk_tokens),
            product_weights=models.product_weights,
        )
        packed = loss.is_fused and reason_not_to_pack(model, spec.data.max_length, setup.precision) is None
        warm_up = WarmUp(
            GradientAccumulator(
                model=model,
                training_loss=loss,
                max_grad_norm=training.max_grad_norm,
                packed=packed,
                micro_batch_size=training.micro_batch_size or training.batch_size,
                on_halved=note_halved,
                micro_batch_tokens=setup.sizes.micro_batch_tokens,
            ),
            # The order of the file has no part in the batches.
            [dataset.samples[row] for row in training_order(None, [], dataset.sample_digests, spec.seed)],
            training,
            ranker.steps,
            spec.seed,
            setup.should_stop,
        )
        with warm_up.trained(), models.product_weights.in_use():
            yield model

    recipe = training.model_dump_json(exclude=set(ENGINE_CHOICES["training"]))
    inputs = (models.student.digest, "".join(sorted(dataset.sample_digests)), str(ranker.steps), str(spec.seed), recipe)
    return MeasuredModel(hashlib.sha256("\n".join(inputs).encode()).hexdigest(), model, ready)
