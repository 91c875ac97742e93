"""Ranking, stages, what rises from stage to stage, and the controls of equal budget."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pocl.spec.frozen import FrozenModel
from pocl.spec.models import ModelRef


class Range(FrozenModel):
    """A value that rises linearly: stage i of n has start + (end - start) i / (n - 1), a single stage has start."""

    start: float
    end: float

    def at(self, stage: int, stages: int) -> float:
        """The value of a stage, counted from 0: start + (end - start) i / (n - 1), or start when there is one stage."""
        if stages == 1:
            return self.start
        return self.start + (self.end - self.start) * stage / (stages - 1)

    def mean_over_visits(self, stages: int) -> float:
        """The mean over the visits of samples in all stages, of which stage i has (i + 1) shares of equal size."""
        weighted = sum((stage + 1) * self.at(stage, stages) for stage in range(stages))
        return round(weighted / (stages * (stages + 1) / 2), 12)


class TemperatureRange(Range):
    """The temperature of the distillation, which rises from the first stage to the last."""

    start: float = Field(default=1.0, gt=0, le=100)
    """The temperature of the first stage."""
    end: float = Field(default=2.0, gt=0, le=100)
    """The temperature of the last stage, no lower than that of the first."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.start > self.end:
            raise ValueError("temperature.start must not exceed temperature.end: the load rises")
        return self


class WeightRange(Range):
    """The weight of the divergence in the loss, which rises from the first stage to the last."""

    start: float = Field(default=0.7, ge=0, le=1)
    """The weight in the first stage."""
    end: float = Field(default=1.0, ge=0, le=1)
    """The weight in the last stage, no lower than that in the first."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.start > self.end:
            raise ValueError("kd_weight.start must not exceed kd_weight.end: the load rises")
        return self


class StudentRanker(FrozenModel):
    """The student ranks as it is before training (the paper)."""

    kind: Literal["student"] = "student"


class TeacherRanker(FrozenModel):
    """The teacher ranks."""

    kind: Literal["teacher"]


class ModelRanker(FrozenModel):
    """Another model ranks, for instance a checkpoint of an earlier job. It is used for nothing else."""

    kind: Literal["model"]
    model: ModelRef
    """The model; its vocabulary must agree with that of the student."""


class WarmStudentRanker(FrozenModel):
    """A copy of the student ranks that is trained a little: by cross-entropy, on random batches of all samples.

    The curriculum itself begins with the untrained student, as it does with every other ranker.
    """

    kind: Literal["warm_student"]
    steps: int = Field(default=100, ge=1, le=100_000)
    """The optimiser steps of the copy, with batch size, learning rate and schedule of `training`."""


class ColumnRanker(FrozenModel):
    """The column `difficulty` of the training rows ranks: scores of your own, which every row must have."""

    kind: Literal["column"]
    easiest: Literal["lowest", "highest"] = "lowest"
    """Which values are those of the easiest samples."""


RANKER_KINDS = ("student", "teacher", "model", "warm_student", "column")
Ranker = Annotated[
    StudentRanker | TeacherRanker | ModelRanker | WarmStudentRanker | ColumnRanker, Field(discriminator="kind")
]


class Ranking(FrozenModel):
    """The difficulty measurer: a model answers every training sample and is scored on it."""

    ranker: Ranker = StudentRanker()
    """The model that the samples are easy or hard for; where nothing is ranked it is not used."""
    rrf_k: int = Field(default=60, ge=1, le=10_000)
    """The constant k of reciprocal rank fusion, which scores a rank as 1/(k + rank)."""
    max_new_tokens: int = Field(default=256, ge=1, le=4096)
    """The most tokens that an answer may have."""
    no_repeat_ngram: int | None = Field(default=None, ge=2, le=1024)
    """The size of the n-grams that no answer repeats, be they of the prompt or its own; null bans none. Greedy answers
    of base models often loop; the published measurer bans repeated 6-grams."""
    temperature: float | None = Field(default=None, gt=0, le=100)
    """The temperature at which answers are sampled, with the seed of the job; null takes the likeliest token at each
    step. The published measurer samples at 0.01."""


class ByEpochs(FrozenModel):
    """A stage ends once all its epochs are done."""

    by: Literal["epochs"] = "epochs"


class ByConvergence(FrozenModel):
    """A stage ends once a metric of the answers to the validation data no longer improves (early stopping).

    It ends after its planned epochs at the latest, with the weights of its best epoch, of equals the last. Its learning
    rate follows the planned epochs, so that a stage which ends early was not annealed.

    Cross-entropy is not offered: in published POCL runs it worsens while ROUGE-L rises.
    """

    by: Literal["convergence"]
    metric: Literal["rouge_l", "exact_match"] = "rouge_l"
    """The score of the greedy answers that must improve."""
    patience: int = Field(default=1, ge=1, le=100)
    """The number of epochs without improvement after which the stage ends."""
    min_delta: float = Field(default=0.1, ge=0, le=100)
    """The number of points by which the metric must rise to count as improved."""


class _Control(FrozenModel):
    stage_steps: tuple[Annotated[int, Field(ge=1, le=100_000_000)], ...] | None = Field(
        default=None, min_length=1, max_length=64
    )
    """The optimiser steps of each stage of the run that the control is compared with, which it spends instead of the
    planned ones. A stage of a control never ends by convergence, so `advance` by convergence needs them."""
    budget_of: str | None = Field(default=None, pattern=r"^job_[0-9a-z]{8,40}$")
    """The id of a succeeded job of the service with the same curriculum; `stage_steps` are then those that it spent,
    and the report and the result of the control show that job beside it."""


class NoCurriculum(_Control):
    """A control experiment: one stage over all samples, shuffled, with as many optimiser steps as the curriculum."""

    kind: Literal["no_curriculum"]
    temperature: float | None = Field(default=None, gt=0, le=100)
    """The constant temperature; where null, the start of `curriculum.temperature`."""
    kd_weight: float | None = Field(default=None, ge=0, le=1)
    """The constant KD weight; where null, the mean of `curriculum.kd_weight` over the visits of all stages, of which
    stage i has i + 1 shares: 0.9 for four stages from 0.7 to 1."""


class AllSamples(_Control):
    """A control experiment: the stages as they are, with their temperatures, weights and steps, each over all samples.

    A stage's steps may end inside an epoch.
    """

    kind: Literal["all_samples"]


class ShuffledStages(_Control):
    """A control experiment: the same stages, temperatures and weights over a random order instead of the ranking."""

    kind: Literal["shuffled_stages"]


class ReversedOrder(_Control):
    """A control experiment: the same stages, temperatures and weights over the reversed ranking, from hard to easy."""

    kind: Literal["reversed_order"]


class ConstantTemperature(_Control):
    """A control experiment: the same stages over the same ranking, all at one temperature."""

    kind: Literal["constant_temperature"]
    temperature: float | None = Field(default=None, gt=0, le=100)
    """The constant temperature; where null, the start of `curriculum.temperature`."""


class ConstantWeight(_Control):
    """A control experiment: the same stages over the same ranking, all with one KD weight."""

    kind: Literal["constant_weight"]
    kd_weight: float | None = Field(default=None, ge=0, le=1)
    """The constant KD weight; where null, the mean over the visits of all stages, as for `no_curriculum`."""


Control = Annotated[
    NoCurriculum | AllSamples | ShuffledStages | ReversedOrder | ConstantTemperature | ConstantWeight,
    Field(discriminator="kind"),
]
CONTROL_KINDS = (
    "no_curriculum", "all_samples", "shuffled_stages", "reversed_order", "constant_temperature", "constant_weight",
)  # fmt: skip
Advance = Annotated[ByEpochs | ByConvergence, Field(discriminator="by")]


class Curriculum(FrozenModel):
    """The Baby Step curriculum: stage i of n trains on the easiest floor(N/n) (i+1) of N samples, the last on all N."""

    stages: int = Field(default=4, ge=1, le=64)
    """The number of stages."""
    epochs_per_stage: int = Field(default=8, ge=1, le=1000)
    """The number of passes that each stage makes over its samples."""
    temperature: TemperatureRange = TemperatureRange()
    """The temperature of the distillation in the first and the last stage; it rises linearly between them."""
    kd_weight: WeightRange = WeightRange()
    """The weight w in loss = (1-w) CE + w D, with cross-entropy CE and divergence D."""
    ranking: Ranking = Ranking()
    """How the samples are ranked from easy to hard."""
    advance: Advance = ByEpochs()
    """When a stage ends."""
    optimizer_at_stage: Literal["restart", "carry"] = "restart"
    """`restart` begins a new optimiser and schedule at each stage; `carry` has one of each for all stages."""
    control: Control | None = None
    """Makes the job a control experiment of equal budget; null for the curriculum itself."""

    @property
    def uses_ranking(self) -> bool:
        """Whether the order of the ranking decides which samples a stage trains on."""
        return self.stages > 1 and not isinstance(self.control, NoCurriculum | AllSamples | ShuffledStages)

    @property
    def ranks_by_column(self) -> bool:
        """Whether a column of the data decides which samples a stage trains on."""
        return self.uses_ranking and isinstance(self.ranking.ranker, ColumnRanker)

    @property
    def ends_by_convergence(self) -> bool:
        """Whether a stage may end before its planned steps: those of a control never do."""
        return isinstance(self.advance, ByConvergence) and self.control is None

    @model_validator(mode="after")
    def _equal_budget(self) -> Self:
        control = self.control
        if control is None:
            return self
        if control.stage_steps is not None and len(control.stage_steps) != self.stages:
            raise ValueError("control.stage_steps must have the steps of each of the curriculum's stages")
        has_budget = control.stage_steps is not None or control.budget_of is not None
        if isinstance(self.advance, ByConvergence) and not has_budget:
            raise ValueError(
                "with advance by convergence a run may spend fewer steps than planned, so a control of equal budget "
                "needs control.budget_of, a succeeded job, or control.stage_steps, the steps of each of its stages"
            )
        return self
