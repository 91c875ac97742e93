"""What a job would do, as the API shows it before one is submitted."""

from typing import Literal, Self

from api.jobs.spec_schema import Specification
from api.pagination import Resource
from domain.jobs.submission import JobPlan


class StagePlanView(Resource):
    """A stage as it is planned."""

    index: int
    """Counted from 0."""
    samples: int
    """It trains on this many of the easiest samples."""
    temperature: float
    kd_weight: float
    epochs: int
    steps: int
    """Optimiser steps."""
    first_step: int
    """Optimiser steps before this stage."""


class EstimateView(Resource):
    """From sizes alone, for rows of full length."""

    memory_bytes: int
    """Weights, gradients, optimiser state and the logits that exist at a time; activations come on top."""
    disk_bytes: int
    """Checkpoints at their largest."""
    training_flops: int
    """Floating-point operations of all training steps, the teacher's included."""


class PlanWarningView(Resource):
    """What the caller should know of a specification that is valid."""

    code: str
    message: str


class PlanView(Resource):
    """What a job would do. A job that is posted so would be accepted at this moment."""

    object: Literal["plan"] = "plan"
    spec: Specification
    """With every default named."""
    samples: int
    """Training rows."""
    total_steps: int
    """Optimiser steps of all stages."""
    stages: list[StagePlanView]
    estimate: EstimateView | None
    """Null where a model's files are not at hand."""
    warnings: list[PlanWarningView]

    @classmethod
    def of(cls, plan: JobPlan) -> Self:
        cost = plan.estimate
        return cls(
            spec=plan.spec.model_dump(mode="json"),
            samples=plan.samples,
            total_steps=plan.total_steps,
            stages=[
                StagePlanView(
                    index=stage.index,
                    samples=stage.samples,
                    temperature=stage.temperature,
                    kd_weight=stage.kd_weight,
                    epochs=stage.epochs,
                    steps=stage.steps,
                    first_step=stage.first_step,
                )
                for stage in plan.stages
            ],
            estimate=None
            if cost is None
            else EstimateView(
                memory_bytes=cost.memory_bytes, disk_bytes=cost.disk_bytes, training_flops=cost.training_flops
            ),
            warnings=[PlanWarningView(code=each.code, message=each.message) for each in plan.warnings],
        )
