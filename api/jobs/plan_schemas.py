"""The plan of a job, as the API shows it before a job is submitted."""

from typing import Literal

from api.jobs.spec_schema import ResolvedSpec
from api.pagination import Resource
from pocl.encoding_counts import EncodingCounts


class StagePlanView(Resource):
    """A stage as it is planned."""

    index: int
    """The position of the stage in the curriculum, counted from 0."""
    samples: int
    """The number of samples that the stage trains on: the easiest ones of the ranking, but for a control experiment
    about just that."""
    temperature: float
    """The temperature of the distillation."""
    kd_weight: float
    """The weight of the distillation term in the loss, 0 to 1; cross-entropy has the rest."""
    epochs: int
    """The number of epochs over the samples; of a stage that has ended, as many as were run."""
    steps: int
    """The number of optimiser steps; of a stage that has ended, as many as were run."""
    first_step: int
    """The number of optimiser steps before the stage begins."""


class EstimateView(Resource):
    """What a job costs, computed from sizes alone and for samples of full length."""

    memory_bytes: int
    """The memory for weights, gradients, optimiser state and the logits that exist at a time; activations come on
    top."""
    disk_bytes: int
    """The disk space that the checkpoints take at most."""
    training_flops: int
    """The floating-point operations of all training steps, those of the teacher included."""


class DataFiguresView(Resource):
    """What becomes of a data set when its samples become tokens."""

    part: str
    """What the samples are used for: `train`, `validation`, `test`, or the name of an evaluation set."""
    template: str | None
    """The template that makes text of the samples, `chat` or `alpaca`; null before any was tried."""
    samples: int
    """The number of samples that a run encodes."""
    tried: int
    """The number of samples that were tried so far; the dry run goes on with the others the next time."""
    counts: EncodingCounts
    """What was cut and left out of the samples that were tried."""


class PlanWarningView(Resource):
    """A warning about a specification that is valid."""

    code: str
    """A stable name of the warning, for programs."""
    message: str
    """One sentence for people."""


class PlanView(Resource):
    """What a job would do. A job that is posted like this would be accepted at this moment."""

    object: Literal["plan"] = "plan"
    """The kind of the resource."""
    spec: ResolvedSpec
    """The specification with every default named."""
    samples: int
    """The number of training samples."""
    total_steps: int
    """The number of optimiser steps of all stages."""
    stages: list[StagePlanView]
    """The stages of the curriculum, in order."""
    estimate: EstimateView | None
    """What the job would cost; null where a model's files are not at hand."""
    data: list[DataFiguresView]
    """What is cut and left out of each data set, as far as its samples were tried."""
    warnings: list[PlanWarningView]
    """What the client should know before it submits the job."""
