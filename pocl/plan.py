"""The stages of a curriculum: their samples, temperature, KD weight and steps; and the estimated cost of a run."""

from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil
from typing import assert_never

from pocl.errors import FieldError, SpecInvalid
from pocl.spec import (
    AllSamples,
    ByConvergence,
    ConstantTemperature,
    ConstantWeight,
    Control,
    Curriculum,
    DistillationSpec,
    NoCurriculum,
    ReversedOrder,
    ShuffledStages,
    Training,
)


@dataclass(frozen=True)
class StagePlan:
    """One stage of the curriculum, as planned."""

    index: int
    """The number of the stage, counted from 0."""
    samples: int
    """How many samples it trains on: the easiest of all, but for a control about just that."""
    temperature: float
    kd_weight: float
    epochs: int
    """The planned epochs, the last of which may be a part of one; convergence may end the stage earlier."""
    steps: int
    """The planned optimiser steps."""
    first_step: int
    """The optimiser steps of all stages before it."""
    steps_per_epoch: int


def stage_table(spec: DistillationSpec, samples: int) -> tuple[StagePlan, ...]:
    """The stages of `spec` over `samples` training samples (Baby Step, arXiv 2506.05695 section 3).

    Those of a control differ from the curriculum's in the one thing that the control is about, and have as many
    optimiser steps; `no_curriculum` has them in a single stage.

    Raises:
        SpecInvalid: when there are more stages than samples, or a control names a job whose steps are not filled in.
    """
    curriculum, training = spec.curriculum, spec.training
    stages = _curriculum_stages(curriculum, samples, training)
    control = curriculum.control
    if control is not None:
        stages = _with_budget(stages, control)
    match control:
        case None | ShuffledStages() | ReversedOrder():
            pass
        case NoCurriculum():
            steps = sum(stage.steps for stage in stages)
            stages = [
                replace(
                    _over(stages[0], samples, steps, training),
                    temperature=_resolved(control.temperature),
                    kd_weight=_resolved(control.kd_weight),
                )
            ]
        case AllSamples():
            stages = [_over(stage, samples, stage.steps, training) for stage in stages]
        case ConstantTemperature():
            stages = [replace(stage, temperature=_resolved(control.temperature)) for stage in stages]
        case ConstantWeight():
            stages = [replace(stage, kd_weight=_resolved(control.kd_weight)) for stage in stages]
        case _:
            assert_never(control)
    first_steps = accumulate((stage.steps for stage in stages), initial=0)
    return tuple(replace(stage, first_step=first) for stage, first in zip(stages, first_steps, strict=False))


def subset_sizes(samples: int, stages: int) -> tuple[int, ...]:
    """The cumulative sizes of the stages' subsets: floor(N/n)(i+1), and N for the last."""
    share = samples // stages
    return (*(share * (i + 1) for i in range(stages - 1)), samples)


def _curriculum_stages(curriculum: Curriculum, samples: int, training: Training) -> list[StagePlan]:
    """The stages without a control; their first steps are not filled in."""
    n = curriculum.stages
    if samples < n:
        raise SpecInvalid(
            [
                FieldError(
                    pointer="/curriculum/stages",
                    code="stages_exceed_samples",
                    detail=f"{n} stages need at least {n} training samples, the data has {samples}",
                )
            ]
        )
    return [
        StagePlan(
            index=i,
            samples=size,
            temperature=curriculum.temperature.at(i, n),
            kd_weight=curriculum.kd_weight.at(i, n),
            epochs=curriculum.epochs_per_stage,
            steps=training.steps_per_epoch(size) * curriculum.epochs_per_stage,
            first_step=0,
            steps_per_epoch=training.steps_per_epoch(size),
        )
        for i, size in enumerate(subset_sizes(samples, n))
    ]


def _with_budget(stages: list[StagePlan], control: Control) -> list[StagePlan]:
    """The stages with the steps that the control is to spend, where they are not the planned ones."""
    if control.stage_steps is None:
        if control.budget_of is not None:
            detail = "only the service knows the steps of a job; give them as stage_steps"
            raise SpecInvalid([FieldError("/curriculum/control/budget_of", "budget_unknown", detail)])
        return stages
    return [
        replace(stage, steps=steps, epochs=ceil(steps / stage.steps_per_epoch))
        for stage, steps in zip(stages, control.stage_steps, strict=True)
    ]


def _over(stage: StagePlan, samples: int, steps: int, training: Training) -> StagePlan:
    """The stage over this many samples and steps; the last epoch may be a part of one."""
    steps_per_epoch = training.steps_per_epoch(samples)
    return replace(
        stage, samples=samples, steps=steps, steps_per_epoch=steps_per_epoch, epochs=ceil(steps / steps_per_epoch)
    )


def _resolved(constant: float | None) -> float:
    assert constant is not None  # resolve() fills in the constants of a control.
    return constant


# --- Cost -----------------------------------------------------------------------------------------------

ADAMW_BYTES_PER_PARAMETER = 16
"""The bytes of an fp32 weight, its gradient and its two moments."""
_CHUNK_TOKENS = 512
"""The tokens whose logits are in memory at a time."""


@dataclass(frozen=True)
class Estimate:
    """What a run needs, estimated from sizes alone, for samples of full length."""

    memory_bytes: int
    """The bytes of weights, gradients, optimiser state and the logits of one chunk; activations come on top."""
    disk_bytes: int
    """The bytes of all checkpoints in the working directory, at their most."""
    training_flops: int
    """The floating-point operations of all training steps, the teacher's included."""


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that the estimate depends on."""

    parameters: int
    vocabulary: int


def estimate(
    spec: DistillationSpec, table: tuple[StagePlan, ...], *, teacher: ModelSize, student: ModelSize
) -> Estimate:
    """Memory, disk and FLOPs of a run: 6 FLOPs per student parameter and token of each visit, 2 per teacher parameter
    and token of each sample, which the teacher reads once.
    """
    length = spec.data.max_length
    with_teacher = spec.method.needs_teacher
    logits = _CHUNK_TOKENS * 4 * 2 * (student.vocabulary + (teacher.vocabulary if with_teacher else 0))
    teacher_weights = 4 * teacher.parameters if with_teacher else 0
    visits = sum(_visits(stage, spec.training) for stage in table)
    samples = max(stage.samples for stage in table)
    teacher_flops = 2 * teacher.parameters * samples if with_teacher else 0
    weights = 4 * student.parameters
    # Weights and two moments; where a stage ends by convergence, also the weights of its best epoch.
    training_state = (4 if isinstance(spec.curriculum.advance, ByConvergence) else 3) * weights
    return Estimate(
        memory_bytes=ADAMW_BYTES_PER_PARAMETER * student.parameters + teacher_weights + logits,
        # While the newest training state is written there is one more.
        disk_bytes=training_state * (spec.checkpoints.keep + 1) + weights * (len(table) + 2),
        training_flops=length * (6 * student.parameters * visits + teacher_flops),
    )


def _visits(stage: StagePlan, training: Training) -> int:
    """How often the stage visits a sample, all samples together."""
    epochs, steps = divmod(stage.steps, stage.steps_per_epoch)
    if training.last_batch == "drop" and stage.samples >= training.batch_size:
        return stage.steps * training.batch_size
    return epochs * stage.samples + steps * min(training.batch_size, stage.samples)
