"""Events of a run as typed values, one JSON object a line: `{"at": time, "event": {"type": ..., ...}}`.

A reader must ignore a `type` that it does not know.

Every event belongs to one of three groups, by which most readers treat it: see :class:`HistoryEvent`,
:class:`ProgressEvent` and :class:`FileEvent`. To add one, derive it from its group and name it in `Event`. Where a
reader has to treat the new event on its own, the type check fails at that reader's `assert_never`, as it does at every
reader for an event without a group.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from pocl.encoding_counts import EncodingCounts

Phase = Literal["validating", "loading", "ranking", "caching_teacher", "training", "evaluating", "exporting"]
CheckpointKind = Literal["training", "stage", "best", "final"]
RESUMABLE_KINDS: Final[tuple[CheckpointKind, ...]] = ("training", "stage")
"""The kinds of checkpoint with the full training state besides the weights, from which a run can continue."""


class _Value(BaseModel):
    # Fields may be added: a reader of an older version ignores them.
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class HistoryEvent(_Value):
    """Something that happened once. It enters the history of the job as it is, and is shown at once."""


class ProgressEvent(_Value):
    """How far the run is. It comes by the thousand: the newest one counts, and none enters the history."""


class FileEvent(_Value):
    """A file or directory below the working directory is whole. It enters the history once it is stored."""


class RunStarted(HistoryEvent):
    """The specification is valid and the models are about to be loaded."""

    type: Literal["run_started"] = "run_started"
    resumed_from_step: int | None
    """The optimiser step of the checkpoint that is continued; null for a fresh run."""
    total_steps: int
    """The planned optimiser steps of the run, of all stages together."""
    stages: int
    """The number of stages."""


class PhaseChanged(HistoryEvent):
    """The run enters a phase."""

    type: Literal["phase"] = "phase"
    phase: Phase
    """The phase."""
    stage: int | None = None
    """The stage that is trained or evaluated, counted from 0; null for other phases."""


class DataEncoded(HistoryEvent):
    """The samples of a data set are token ids; what was cut and left out on the way is counted."""

    type: Literal["data_encoded"] = "data_encoded"
    part: str
    """What the samples are used for: `train`, `validation`, `test`, or the name of an evaluation set."""
    template: str
    """The template that made text of the samples, `chat` or `alpaca`."""
    counts: EncodingCounts
    """What was counted over all samples."""


class Progressed(ProgressEvent):
    """How far a phase other than training has come."""

    type: Literal["progress"] = "progress"
    phase: Phase
    done: int
    total: int
    unit: Literal["samples", "rows", "bytes"] = "rows"


class StageStarted(HistoryEvent):
    """The training of a stage begins, or continues after an interruption."""

    type: Literal["stage_started"] = "stage_started"
    stage: int
    """Counted from 0."""
    samples: int
    """How many of the easiest samples it trains on."""
    temperature: float
    """The temperature of the distillation."""
    kd_weight: float
    """The weight of the divergence in the loss."""
    steps: int
    """The planned optimiser steps."""
    first_step: int
    """Optimiser steps done before this stage."""


class StepLogged(ProgressEvent):
    """One optimiser step. Steps that are run again after a crash are logged again under the same number."""

    type: Literal["step"] = "step"
    step: int
    """The number of the step, counted from 1 over all stages."""
    total_steps: int
    stage: int
    loss: float
    cross_entropy: float
    """Unscaled cross-entropy at temperature 1, in nats per token."""
    divergence: float | None
    """Unscaled divergence from the teacher, in nats per token; null where the method has no teacher."""
    learning_rate: float
    grad_norm: float
    temperature: float
    kd_weight: float
    tokens: int
    """The response tokens of this step."""
    tokens_seen: int
    """The prompt and response tokens of the run so far."""
    tokens_per_second: float
    """Throughput in prompt and response tokens a second."""
    eta_seconds: float
    """The estimated time to the end of the run, evaluations included."""
    eta_low_seconds: float | None = None
    """The lower end of the range of the estimate, from how unequal the steps were."""
    eta_high_seconds: float | None = None
    """The upper end of that range."""


class StageFinished(HistoryEvent):
    """A stage is trained, and its state is saved."""

    type: Literal["stage_finished"] = "stage_finished"
    stage: int
    """The stage, counted from 0."""
    step: int
    """The optimiser steps that were done, of all stages."""
    epochs: int
    """The epochs that were run; fewer than planned after convergence."""
    kept_epoch: int | None = None
    """How many epochs the stage's weights were trained for, where `advance` is by convergence: they are those of its
    best epoch; null where its epochs are not scored."""


class SeedStats(_Value):
    """A score for each seed, with mean and standard deviation."""

    values: tuple[float, ...]
    """The scores, in the order of the seeds."""
    mean: float
    """The mean over the seeds."""
    sd: float | None
    """The sample standard deviation, with n - 1 in the denominator; null for one seed."""


class SampledScores(_Value):
    """Scores of answers that were sampled at random, once with each seed."""

    temperature: float
    """The temperature of sampling."""
    top_p: float
    """The probability mass of nucleus sampling."""
    seeds: tuple[int, ...]
    """The seeds with each of which every prompt was answered once."""
    rouge_l: SeedStats
    """ROUGE-L F1, 0 to 100."""
    exact_match: SeedStats
    """Exact match, in per cent."""


class Evaluated(HistoryEvent):
    """Scores on held-out samples; `rouge_l` and `exact_match` are those of greedy answers."""

    type: Literal["evaluated"] = "evaluated"
    subject: Literal["teacher", "initial", "epoch", "stage", "best", "final"]
    """`best` is the student after the stage that was chosen on the validation samples, scored on other samples."""
    split: str = "validation"
    """The samples: `validation`, `test`, or the name of an evaluation set."""
    stage: int | None = None
    """The stage after or in which the student was scored, counted from 0; null outside of any stage."""
    step: int = 0
    """The optimiser steps that the student had been trained for."""
    rows: int
    """The number of samples that were scored."""
    rouge_l: float
    """ROUGE-L F1, 0 to 100."""
    exact_match: float
    """Exact match, in per cent."""
    cross_entropy: float
    """Cross-entropy, in nats per response token."""
    divergence: float | None = None
    """Forward KL to the teacher at temperature 1, nats per response token; null for the teacher."""
    unfinished_thoughts: int = 0
    """The scored answers that end inside their thought: they say nothing, and their ROUGE-L is 0."""
    sampled: SampledScores | None = None
    """Scores of sampled answers; null where none are specified, and after an epoch, which greedy answers decide."""


class CheckpointSaved(FileEvent):
    """A directory below the working directory is whole: it has its manifest and does not change again."""

    type: Literal["checkpoint"] = "checkpoint"
    kind: CheckpointKind
    """`best` names the stage whose weights are in `best/` from now on."""
    path: str
    """Relative to the working directory."""
    step: int
    stage: int | None
    size_bytes: int


class ArtifactWritten(FileEvent):
    """A file of the working directory is written."""

    type: Literal["artifact"] = "artifact"
    kind: Literal["spec", "ranking", "answers", "result", "report"]
    path: str
    """Relative to the working directory."""


class Warned(HistoryEvent):
    """Something that people should know, and that does not end the run."""

    type: Literal["warning"] = "warning"
    code: str
    """A stable name of the warning, for programs."""
    message: str
    """One sentence for people."""
    pointer: str | None = None
    """The field of the specification that it is about; null where it is about none."""


class RunFinished(HistoryEvent):
    """The student is distilled; `result.json` holds the figures."""

    type: Literal["run_finished"] = "run_finished"
    step: int
    """The optimiser steps that were done."""


class RunEnded(HistoryEvent):
    """The run ended without a result: it was stopped, or it failed."""

    type: Literal["run_ended"] = "run_ended"
    code: str
    """A stable name of the reason, for programs."""
    message: str
    """One sentence for people."""
    fault: Literal["user", "capacity", "system"]
    """Who or what caused the end."""
    retryable: bool
    """Whether the same run may end otherwise."""
    hint: str
    """What to do about it."""
    step: int
    """The optimiser steps that were done."""


Event = Annotated[
    RunStarted
    | PhaseChanged
    | DataEncoded
    | Progressed
    | StageStarted
    | StepLogged
    | StageFinished
    | Evaluated
    | CheckpointSaved
    | ArtifactWritten
    | Warned
    | RunFinished
    | RunEnded,
    Field(discriminator="type"),
]


class EventEnvelope(BaseModel):
    """An event with the time at which it was written."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    at: datetime
    event: Event


Sink = Callable[[Event], None]
"""What the engine reports its events to."""


def to_line(event: Event, at: datetime) -> str:
    """The event as one line of JSON, without the line end."""
    return EventEnvelope(at=at, event=event).model_dump_json()


def from_line(line: str | bytes) -> EventEnvelope:
    """Parse a line of JSON.

    Raises:
        pydantic.ValidationError: for a type that this version does not know, or a broken line.
    """
    return EventEnvelope.model_validate_json(line)
