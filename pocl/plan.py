"""The stages of a curriculum: their samples, temperature, KD weight and steps; and the estimated cost of a run."""

from dataclasses import dataclass
from itertools import accumulate
from math import ceil

from pocl.errors import FieldError, SpecInvalid
from pocl.spec import (
    ConstantTemperature,
    Curriculum,
    DistillationSpec,
    NoCurriculum,
    Range,
)


@dataclass(frozen=True)
class StagePlan:
    """One stage of the curriculum, as planned."""

    index: int
    """The number of the stage, counted from 0."""
    samples: int
    """How many samples it trains on, the easiest of all."""
    temperature: float
    kd_weight: float
    epochs: int
    """The planned epochs; convergence may end the stage earlier."""
    steps: int
    """The planned optimiser steps."""
    first_step: int
    """The optimiser steps of all stages before it."""
    steps_per_epoch: int


def stage_table(spec: DistillationSpec, samples: int) -> tuple[StagePlan, ...]:
    """The stages of `spec` over `samples` training samples (Baby Step, arXiv 2506.05695 section 3).

    Raises:
        SpecInvalid: when there are more stages than samples.
    """
    stages = _curriculum_stages(spec.curriculum, samples, spec.training.batch_size)
    control = spec.curriculum.control
    if not isinstance(control, NoCurriculum):
        return stages
    budget = sum(stage.steps for stage in stages)
    steps_per_epoch = ceil(samples / spec.training.batch_size)
    assert control.temperature is not None  # resolve() fills in both.
    assert control.kd_weight is not None
    return (
        StagePlan(
            index=0,
            samples=samples,
            temperature=control.temperature,
            kd_weight=control.kd_weight,
            epochs=ceil(budget / steps_per_epoch),
            steps=budget,
            first_step=0,
            steps_per_epoch=steps_per_epoch,
        ),
    )


def subset_sizes(samples: int, stages: int) -> tuple[int, ...]:
    """The cumulative sizes of the stages' subsets: floor(N/n)(i+1), and N for the last."""
    share = samples // stages
    return (*(share * (i + 1) for i in range(stages - 1)), samples)


def value_at(range_: Range, stage: int, stages: int) -> float:
    """The value of a stage: start + (end - start) i / (n - 1), or start when there is one stage."""
    if stages == 1:
        return range_.start
    return range_.start + (range_.end - range_.start) * stage / (stages - 1)


def _curriculum_stages(curriculum: Curriculum, samples: int, batch_size: int) -> tuple[StagePlan, ...]:
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
    sizes = subset_sizes(samples, n)
    steps_per_epoch = [ceil(size / batch_size) for size in sizes]
    steps = [epoch_steps * curriculum.epochs_per_stage for epoch_steps in steps_per_epoch]
    return tuple(
        StagePlan(
            index=i,
            samples=sizes[i],
            temperature=_temperature(curriculum, i),
            kd_weight=value_at(curriculum.kd_weight, i, n),
            epochs=curriculum.epochs_per_stage,
            steps=steps[i],
            first_step=first_step,
            steps_per_epoch=steps_per_epoch[i],
        )
        for i, first_step in zip(range(n), accumulate(steps, initial=0), strict=False)
    )


def _temperature(curriculum: Curriculum, stage: int) -> float:
    control = curriculum.control
    if isinstance(control, ConstantTemperature):
        assert control.temperature is not None  # resolve() fills it in.
        return control.temperature
    return value_at(curriculum.temperature, stage, curriculum.stages)


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
    visits = sum(stage.samples * stage.epochs for stage in table)
    samples = max(stage.samples for stage in table)
    teacher_flops = 2 * teacher.parameters * samples if with_teacher else 0
    weights = 4 * student.parameters
    training_state = 3 * weights
    return Estimate(
        memory_bytes=ADAMW_BYTES_PER_PARAMETER * student.parameters + teacher_weights + logits,
        # While the newest training state is written there is one more.
        disk_bytes=training_state * (spec.checkpoints.keep + 1) + weights * (len(table) + 2),
        training_flops=length * (6 * student.parameters * visits + teacher_flops),
    )
