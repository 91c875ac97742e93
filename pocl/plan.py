"""The stages of a curriculum: their samples, temperature, KD weight and steps."""

from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil
from typing import assert_never

from pocl.errors import FieldError, SpecInvalid
from pocl.spec import (
    AllSamples,
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
