"""The training state: position and history of a run, as each checkpoint holds them."""

from dataclasses import dataclass
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from pocl.evaluation.answers_file import EvaluationKey
from pocl.evaluation.row_scores import RowScores
from pocl.events import Evaluated, Warned
from pocl.export.model_card import Progress, TrainedStage
from pocl.export.tokenizer_reading import TokenizerTrial
from pocl.spec import Method
from pocl.storage.inputs import RunInputs

MAX_METRIC_ROWS: Final = 2000
"""The most steps whose metrics a training state holds: more than the width of the report's plot has points."""

MAX_WARNINGS: Final = 200
"""The most warnings that a training state and a result hold; the events have them all."""


class MetricRow(BaseModel):
    """The metrics of one optimiser step, as the report plots them."""

    # A number that is not finite must come back as it was, and not as null.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    step: int
    stage: int
    loss: float
    cross_entropy: float
    divergence: float | None
    temperature: float
    learning_rate: float


class FinishedStage(BaseModel):
    """A stage as it was trained: by this run, or by one that this run continues with another specification."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int
    temperature: float
    kd_weight: float
    method: Method
    recipe: str
    """The `recipe_digest` of the specification that it was trained with."""
    end_step: int
    """Optimiser steps of the run at its end."""
    kept_epoch: int | None = None
    """How many of its epochs its weights were trained for, where they are those of its best epoch."""


class EvaluatedRows(BaseModel):
    """The scores of each sample of an evaluation, which intervals are computed from at the end of the run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: Literal["teacher", "initial", "stage"]
    stage: int | None
    split: str
    rows: RowScores


@dataclass(frozen=True)
class MadeEvaluation:
    """What one evaluation adds to the training state."""

    rows: EvaluatedRows | None
    evaluated: Evaluated | None
    """None where no sample has a reference to score."""


class TrainState(BaseModel):
    """The position of a run. The order of samples and the learning rate follow from it and the specification."""

    model_config = ConfigDict(extra="forbid")

    step: int = 0
    """Optimiser steps done."""
    stage: int = 0
    epoch: int = 0
    """Epochs done in this stage."""
    batch: int = 0
    """Optimiser batches done in this epoch."""
    stage_step: int = 0
    """Optimiser steps done in this stage."""
    micro_batch_size: int = 1
    machine: str = ""
    """What the bits of the result depend on besides the inputs: versions, instruction set, device, threads."""
    cached_teacher: bool = True
    """Whether the teacher's hidden states come from the cache; those of a live teacher round with the batch."""
    teacher_batch_tokens: int | None = None
    """Tokens of the batches in which the cached states were computed; None where the teacher is live."""
    not_exact: list[str] = []
    """Why the run may end in other bits when it is repeated or resumed, a sentence each."""
    warnings: list[Warned] = []
    """The warnings of the run so far, each once."""
    warned_spec: str = ""
    """The digest of the posted specification that they are about; a branch has another one."""
    inputs: RunInputs = RunInputs()
    """What the run was given besides its specification."""
    tokens_seen: int = 0
    finished_stages: list[FinishedStage] = []
    """In their order."""
    epoch_scores: list[float] = []
    """The convergence metric after each epoch of this stage."""
    evaluations: list[Evaluated] = []
    row_scores: list[EvaluatedRows] = Field(default=[], exclude=True)
    """Of each evaluation; one that had no sample to score is here alone. They have a file of their own, since they grow
    with the samples and change with evaluations alone.
    """
    row_scores_digest: str | None = None
    """SHA-256 of that file, hexadecimal."""
    tokenizer_trial: TokenizerTrial | None = None
    """How the exported tokenizer is read."""
    metrics: list[MetricRow] = []
    """Those of every `metric_stride`-th optimiser step and of the last one; the events have them all."""
    metric_stride: int = 1

    def log(self, row: MetricRow) -> None:
        """Add the metrics of a step. Beyond :data:`MAX_METRIC_ROWS` every second row goes: each checkpoint holds them.

        Which rows are kept follows from their number alone, and so not from where a run was interrupted.
        """
        if self.metrics and (self.metrics[-1].step - 1) % self.metric_stride:
            self.metrics.pop()
        self.metrics.append(row)
        if len(self.metrics) > MAX_METRIC_ROWS:
            self.metric_stride *= 2
            self.metrics = [each for each in self.metrics if (each.step - 1) % self.metric_stride == 0 or each is row]

    def add_evaluation(self, made: MadeEvaluation) -> None:
        """Add an evaluation that was made."""
        if made.evaluated is not None:
            self.evaluations.append(made.evaluated)
        if made.rows is not None:
            self.row_scores.append(made.rows)

    def note_not_exact(self, *reasons: str) -> None:
        """Add to `not_exact` those reasons that it lacks."""
        self.not_exact += [reason for reason in reasons if reason not in self.not_exact]

    @property
    def evaluation_keys(self) -> set[EvaluationKey]:
        """The evaluations that were made."""
        scored = {EvaluationKey(each.split, each.subject, each.stage) for each in self.evaluations}
        return scored | {EvaluationKey(each.split, each.subject, each.stage) for each in self.row_scores}

    @property
    def progress(self) -> Progress:
        """How far the run is, as a model card says it."""
        return Progress(self.step, self._trained_stages, tuple(self.evaluations))

    @property
    def progress_before_scores(self) -> Progress:
        """The same without the scores of this very step.

        They are computed after its checkpoint is saved, which gets them then
        (:func:`pocl.train.checkpoint.add_scores`); where a run is stopped meanwhile the checkpoint is saved again, and
        must get the same card.
        """
        before = (evaluated for evaluated in self.evaluations if evaluated.step < self.step)
        return Progress(self.step, self._trained_stages, tuple(before))

    @property
    def _trained_stages(self) -> tuple[TrainedStage, ...]:
        starts = [0, *self.stage_ends[:-1]]
        return tuple(
            TrainedStage(stage.temperature, stage.kd_weight, stage.method, stage.end_step - start, stage.recipe)
            for stage, start in zip(self.finished_stages, starts, strict=False)
        )

    @property
    def stage_ends(self) -> list[int]:
        """The step at which each finished stage ended."""
        return [stage.end_step for stage in self.finished_stages]
