"""Ranking, stages, what rises from stage to stage, and the controls of equal budget."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pocl.spec.frozen import FrozenModel


class Range(FrozenModel):
    """A value that rises from stage to stage: start + (end - start) i / (n - 1); with one stage, start."""

    start: float
    end: float


class TemperatureRange(Range):
    start: float = Field(default=1.0, gt=0, le=100)
    end: float = Field(default=2.0, gt=0, le=100)

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.start > self.end:
            raise ValueError("temperature.start must not exceed temperature.end: the load rises")
        return self


class WeightRange(Range):
    start: float = Field(default=0.7, ge=0, le=1)
    end: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.start > self.end:
            raise ValueError("kd_weight.start must not exceed kd_weight.end: the load rises")
        return self


class Ranking(FrozenModel):
    """The difficulty measurer: the student as it starts answers and scores every training sample."""

    rrf_k: int = Field(default=60, ge=1, le=10_000)
    """k of reciprocal rank fusion, 1/(k + rank)."""
    max_new_tokens: int = Field(default=256, ge=1, le=4096)


class ByEpochs(FrozenModel):
    """A stage ends after its epochs."""

    by: Literal["epochs"] = "epochs"


class ByConvergence(FrozenModel):
    """A stage ends once a generation metric on the validation rows no longer improves, or after its epochs.

    Cross-entropy is not offered: in published POCL runs it worsens while ROUGE-L rises.
    """

    by: Literal["convergence"]
    metric: Literal["rouge_l", "exact_match"] = "rouge_l"
    patience: int = Field(default=1, ge=1, le=100)
    """Epochs without improvement after which the stage ends."""
    min_delta: float = Field(default=0.1, ge=0, le=100)
    """Points by which the metric must rise to count as improved."""


class NoCurriculum(FrozenModel):
    """Control: all samples shuffled, one stage, one learning-rate schedule, as many optimiser steps."""

    kind: Literal["no_curriculum"]
    temperature: float | None = Field(default=None, gt=0, le=100)
    """Constant temperature; the start of `curriculum.temperature` unless given."""
    kd_weight: float | None = Field(default=None, ge=0, le=1)
    """Constant KD weight; the middle of `curriculum.kd_weight` unless given."""


class ShuffledStages(FrozenModel):
    """Control: the same stages, temperatures and weights over a random order instead of the ranking."""

    kind: Literal["shuffled_stages"]


class ConstantTemperature(FrozenModel):
    """Control: the same stages over the ranking, at one temperature."""

    kind: Literal["constant_temperature"]
    temperature: float | None = Field(default=None, gt=0, le=100)
    """The start of `curriculum.temperature` unless given."""


Control = Annotated[NoCurriculum | ShuffledStages | ConstantTemperature, Field(discriminator="kind")]
Advance = Annotated[ByEpochs | ByConvergence, Field(discriminator="by")]


class Curriculum(FrozenModel):
    """Baby Step: stage i trains on the easiest floor(N/n) (i+1) samples, the last stage on all N."""

    stages: int = Field(default=4, ge=1, le=64)
    epochs_per_stage: int = Field(default=8, ge=1, le=1000)
    temperature: TemperatureRange = TemperatureRange()
    kd_weight: WeightRange = WeightRange()
    """w in loss = (1-w) CE + w D."""
    ranking: Ranking = Ranking()
    advance: Advance = ByEpochs()
    optimizer_at_stage: Literal["restart", "carry"] = "restart"
    """`restart`: a new optimiser and schedule at each stage; `carry`: one of each over all stages."""
    control: Control | None = None
