"""Ranking, stages, what rises from stage to stage, and the controls of equal budget."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pocl.spec.frozen import FrozenModel


class Range(FrozenModel):
    """A value that rises linearly: stage i of n has start + (end - start) i / (n - 1), a single stage has start."""

    start: float
    end: float


class TemperatureRange(Range):
    """The temperature of the distillation, which rises from the first stage to the last."""

    start: float = Field(default=1.0, gt=0, le=100)
    end: float = Field(default=2.0, gt=0, le=100)

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.start > self.end:
            raise ValueError("temperature.start must not exceed temperature.end: the load rises")
        return self


class WeightRange(Range):
    """The weight of the divergence in the loss, which rises from the first stage to the last."""

    start: float = Field(default=0.7, ge=0, le=1)
    end: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.start > self.end:
            raise ValueError("kd_weight.start must not exceed kd_weight.end: the load rises")
        return self


class Ranking(FrozenModel):
    """The difficulty measurer: the untrained student answers every training sample and is scored on it."""

    rrf_k: int = Field(default=60, ge=1, le=10_000)
    """The constant k of reciprocal rank fusion, which scores a rank as 1/(k + rank)."""
    max_new_tokens: int = Field(default=256, ge=1, le=4096)
    """The most tokens that an answer may have."""


class ByEpochs(FrozenModel):
    """A stage ends once all its epochs are done."""

    by: Literal["epochs"] = "epochs"


class ByConvergence(FrozenModel):
    """A stage ends once a metric of the answers to the validation data no longer improves (early stopping).

    It ends after its planned epochs at the latest.

    Cross-entropy is not offered: in published POCL runs it worsens while ROUGE-L rises.
    """

    by: Literal["convergence"]
    metric: Literal["rouge_l", "exact_match"] = "rouge_l"
    """The score of the greedy answers that must improve."""
    patience: int = Field(default=1, ge=1, le=100)
    """The number of epochs without improvement after which the stage ends."""
    min_delta: float = Field(default=0.1, ge=0, le=100)
    """The number of points by which the metric must rise to count as improved."""


class NoCurriculum(FrozenModel):
    """A control experiment: one stage over all samples, shuffled, with as many optimiser steps as the curriculum."""

    kind: Literal["no_curriculum"]
    temperature: float | None = Field(default=None, gt=0, le=100)
    """The constant temperature; where null, the start of `curriculum.temperature`."""
    kd_weight: float | None = Field(default=None, ge=0, le=1)
    """The constant KD weight; where null, the middle of `curriculum.kd_weight`."""


class ShuffledStages(FrozenModel):
    """A control experiment: the same stages, temperatures and weights over a random order instead of the ranking."""

    kind: Literal["shuffled_stages"]


class ConstantTemperature(FrozenModel):
    """A control experiment: the same stages over the same ranking, all at one temperature."""

    kind: Literal["constant_temperature"]
    temperature: float | None = Field(default=None, gt=0, le=100)
    """The constant temperature; where null, the start of `curriculum.temperature`."""


Control = Annotated[NoCurriculum | ShuffledStages | ConstantTemperature, Field(discriminator="kind")]
Advance = Annotated[ByEpochs | ByConvergence, Field(discriminator="by")]


class Curriculum(FrozenModel):
    """The Baby Step curriculum: stage i of n trains on the easiest floor(N/n) (i+1) of N samples, the last on all N."""

    stages: int = Field(default=4, ge=1, le=64)
    """The number of stages."""
    epochs_per_stage: int = Field(default=8, ge=1, le=1000)
    """The number of passes that each stage makes over its samples."""
    temperature: TemperatureRange = TemperatureRange()
    kd_weight: WeightRange = WeightRange()
    """The weight w in loss = (1-w) CE + w D, with cross-entropy CE and divergence D."""
    ranking: Ranking = Ranking()
    advance: Advance = ByEpochs()
    optimizer_at_stage: Literal["restart", "carry"] = "restart"
    """`restart` begins a new optimiser and schedule at each stage; `carry` has one of each for all stages."""
    control: Control | None = None
    """Makes the job a control experiment of equal budget; null for the curriculum itself."""
