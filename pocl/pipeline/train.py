"""The phase `training`: what the training loop is put together from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from pocl.data.batches import EncodedSample
from pocl.errors import ModelUnsupported
from pocl.export.student import StudentExport
from pocl.losses.buffers import LossExecution
from pocl.models.compiled_layers import CompiledLayers, layer_compiler
from pocl.models.layers import decoder_layers
from pocl.models.loading import load_weights
from pocl.models.packed import reason_not_to_pack
from pocl.models.precision import machine_fingerprint
from pocl.out_of_memory import HALVED_IS_NOT_EXACT, fit_or_refuse
from pocl.pipeline.context import RunContext
from pocl.pipeline.load import LoadedRun
from pocl.pipeline.validate import ValidatedRun
from pocl.prepare import Models
from pocl.teacher.cache import CachedTeacher
from pocl.teacher.distillation_loss import TrainingLoss, training_loss
from pocl.teacher.shards import choose_batch_tokens
from pocl.teacher.signal import LiveTeacher, TeacherSignal
from pocl.train import checkpoint
from pocl.train.checkpoint import ResumePoint, Student
from pocl.train.evaluations import StudentScoring
from pocl.train.loop import Trainer
from pocl.train.optimizer import make_optimizer
from pocl.train.prefetch import Prefetcher
from pocl.train.schedule import training_order
from pocl.train.state import TrainState


@dataclass(frozen=True)
class TrainingParts:
    """What the training loop gets from the phases before it."""

    rows: Sequence[int]
    """The training samples in the order of their ranking; none where nothing is ranked."""
    teacher: TeacherSignal | None
    export: StudentExport
    scoring: StudentScoring | None
    """How the student is scored; None without samples to evaluate on."""


def make_trainer(context: RunContext, validated: ValidatedRun, loaded: LoadedRun, parts: TrainingParts) -> Trainer:
    """The training loop of the run, where its training state left off.

    Raises:
        OutOfMemory: the state of the optimiser does not fit.
    """
    models, spec, resume_point = loaded.models, context.spec, validated.resume_point
    student = Student(models.student.model, parts.export, make_optimizer(models.student.model, spec.training))
    state = _initial_state(context) if resume_point is None else _restore(resume_point, student)
    _note_teacher(context, state, parts.teacher, is_resumed=resume_point is not None)
    state.note_not_exact(*context.not_exact)
    # What is noted from here on enters the training state.
    context.not_exact = state.not_exact
    state.warnings, state.warned_spec = context.warnings, context.warned_spec
    loss = _loss(context, models, parts.teacher)
    packed = _can_pack(context, student.model, loss, parts.teacher)
    return Trainer(
        spec=spec,
        table=validated.table,
        samples=_samples_in_order(context, loaded, parts.rows),
        student=student,
        training_loss=loss,
        packed=packed,
        compiled_layers=_compiled_layers(context, student.model, packed=packed),
        prefetcher=_prefetcher(context, parts.teacher),
        micro_batch_tokens=context.sizes.micro_batch_tokens,
        workdir=context.workdir,
        sink=context.sink,
        should_stop=context.host.should_stop,
        should_pause=context.host.should_pause,
        scoring=parts.scoring,
        state=state,
        best_epoch_weights=(
            None if resume_point is None else checkpoint.read_best_epoch_weights(resume_point.directory)
        ),
    )


def _samples_in_order(context: RunContext, run: LoadedRun, ranked_rows: Sequence[int]) -> list[EncodedSample]:
    train, spec = run.corpus.train, context.spec
    rows = training_order(spec.curriculum.control, ranked_rows, train.sample_digests, spec.seed)
    return [train.samples[row] for row in rows]


def _initial_state(context: RunContext) -> TrainState:
    spec = context.spec
    # Dropout draws from here on; until then loading may have drawn any number of times.
    torch.manual_seed(spec.seed)
    return TrainState(micro_batch_size=spec.training.micro_batch_size or 1, machine=machine_fingerprint(context.device))


def _restore(resume_point: ResumePoint, student: Student) -> TrainState:
    load_weights(student.model, resume_point.directory)
    fit_or_refuse(
        lambda: checkpoint.restore_optimizer(resume_point.directory, student.model, student.optimizer),
        "The state of the optimiser",
    )
    return resume_point.state


def _note_teacher(context: RunContext, state: TrainState, teacher: TeacherSignal | None, *, is_resumed: bool) -> None:
    """Note in the training state how the teacher's states are computed; another way than before is reported."""
    is_cached = not isinstance(teacher, LiveTeacher)
    batch_tokens = teacher.batch_tokens if isinstance(teacher, CachedTeacher) else None
    if is_resumed and state.cached_teacher != is_cached:
        context.warn_not_exact(
            f"continued with the teacher {'cached' if is_cached else 'live'}, so not to the same bits"
        )
    elif is_resumed and state.teacher_batch_tokens not in (None, batch_tokens):
        context.warn_not_exact("continued with a teacher that runs on smaller batches, so not to the same bits")
    state.cached_teacher = is_cached
    state.teacher_batch_tokens = batch_tokens
    if batch_tokens is not None and batch_tokens < choose_batch_tokens(context.device):
        context.note_not_exact(HALVED_IS_NOT_EXACT)


def _loss(context: RunContext, models: Models, teacher: TeacherSignal | None) -> TrainingLoss:
    backend = "inductor" if context.spec.resources.compile and context.is_on_gpu else None
    return training_loss(
        models.student.model,
        teacher,
        context.spec.method,
        shared_vocabulary=models.shared_vocabulary,
        precision=context.precision,
        execution=LossExecution(context.sizes.loss_chunk_tokens, backend=backend),
        product_weights=models.product_weights,
    )


def _can_pack(context: RunContext, student: PreTrainedModel, loss: TrainingLoss, teacher: TeacherSignal | None) -> bool:
    """Whether micro-batches are packed; a model that pads them instead is reported."""
    max_length = context.spec.data.max_length
    if loss.is_fused:
        reason = reason_not_to_pack(student, max_length, context.precision)
    else:
        reason = "an output head is no linear map, so that full logits are computed"
    if reason is not None:
        context.warn("not_packed", f"the student's samples are padded, not packed: {reason}")
        return False
    if isinstance(teacher, LiveTeacher) and (reason := teacher.reason_not_to_pack(max_length)) is not None:
        context.warn("not_packed", f"the teacher's samples are padded, not packed: {reason}")
    return True


def _prefetcher(context: RunContext, teacher: TeacherSignal | None) -> Prefetcher | None:
    """What prepares micro-batches ahead, where the specification asks for it and the teacher's states are cached.

    A live teacher works on the stream of the step, so that nothing could overlap.
    """
    if not context.spec.resources.prefetch or not context.is_on_gpu:
        return None
    if isinstance(teacher, LiveTeacher):
        message = "prefetch of resources: the teacher runs at each visit of a sample, so nothing is prefetched"
        context.warn("resources_ignored", message)
        return None
    return Prefetcher(context.device)


def _compiled_layers(context: RunContext, student: PreTrainedModel, *, packed: bool) -> CompiledLayers:
    """The student's layers, compiled where the specification asks for it and the device is one for it."""
    resources = context.spec.resources
    requested = [name for name in ("compile", "graphs", "prefetch") if getattr(resources, name)]
    if requested and not context.is_on_gpu:
        message = f"{', '.join(requested)} of resources: on a GPU alone, and this run is on a CPU"
        context.warn("resources_ignored", message)
        return CompiledLayers()
    compiler = layer_compiler(compiled=resources.compile, graphs=resources.graphs, few_shapes=packed)
    if compiler is None:
        return CompiledLayers()
    try:
        layers = decoder_layers(student)
    except ModelUnsupported as error:
        context.warn("resources_ignored", f"the student is not compiled: {error}")
        return CompiledLayers()
    return CompiledLayers(layers, compiler, graphs=resources.graphs)
