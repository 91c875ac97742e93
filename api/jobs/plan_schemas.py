"""The plan of a job, as the API shows it before a job is submitted."""

from typing import Literal

from api.jobs.forecast_schemas import ForecastView
from api.jobs.spec_schema import ResolvedSpec
from api.pagination import Resource
from pocl.encoding_counts import EncodingCounts
from pocl.estimate import ModelRole, PassPhase, Subject, Work


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


class ModelPassView(Resource):
    """What one model does with one set of samples, as often as it does it."""

    phase: PassPhase
    """The phase of the job that it belongs to."""
    work: Work
    """`generation` of answers, `scoring` of the references, computing the teacher's `hidden_states`, or `training`."""
    model: ModelRole
    """The model: `student`, `teacher`, or `ranker`, a model that only ranks."""
    part: str
    """The samples: `train`, `validation`, `test`, or the name of an evaluation set."""
    samples: int
    """How many there are."""
    passes: float
    """How often each is passed, in the mean; of evaluations after stages and epochs, the most that there can be."""
    tokens: int
    """The prompt and response tokens of all passes; answers are taken to be as long as they may be."""
    flops: int | None
    """The floating-point operations of all passes; null where the model's files are not at hand."""
    subject: Subject | None
    """What is evaluated: the `teacher`, the `initial` student, or the student after each `epoch` or `stage`; null in
    other phases."""
    stage: int | None
    """The stage that is trained, counted from 0; null in other phases."""


class EstimateView(Resource):
    """What a job costs, computed from the sizes of the models and of the samples: in the mean they are taken to be like
    those that were tried, and of full length before any was tried. Nothing is taken to end early."""

    memory_bytes: int
    """The memory for weights, gradients, optimiser state and the logits that exist at a time; activations come on
    top."""
    disk_bytes: int
    """The disk space that the checkpoints take at most."""
    stored_bytes: int
    """The bytes of all checkpoints in the artifact store, at their most; the end of each stage keeps its training state
    there."""
    training_flops: int
    """The floating-point operations of all training steps, those of the teacher included."""
    flops: int | None
    """The floating-point operations of the whole job: ranking, evaluations and the teacher's hidden states too. Null
    where a model that ranks is not at hand."""
    passes: list[ModelPassView]
    """Every pass of a model over samples, in the order of the phases."""


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
    pointer: str | None
    """The field of the posted document that it is about; null where it is about none."""


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
    forecast: ForecastView
    """What the job would take: time, workers, free disk and price."""
    data: list[DataFiguresView]
    """What is cut and left out of each data set, as far as its samples were tried."""
    warnings: list[PlanWarningView]
    """What the client should know before it submits the job."""
