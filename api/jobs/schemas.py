"""Jobs as the API shows them."""

from datetime import datetime
from typing import Literal

from pydantic import AliasChoices, Field, JsonValue

from api.jobs.forecast_schemas import ForecastView
from api.jobs.plan_schemas import PlanWarningView, StagePlanView
from api.jobs.publication_schemas import PublicationView
from api.jobs.spec_schema import ResolvedSpec
from api.pagination import Page, Resource
from domain.jobs.queue import QueueReason
from domain.jobs.states import AttemptEnd, Fault, JobStatus, PauseAt, StageStatus
from domain.trackers.models import TrackerKind, TrackerState
from pocl.encoding_counts import EncodingCounts
from pocl.events import SampledScores


class Progress(Resource):
    """How far a job has come."""

    percent: float
    """The share of the work that is done, 0 to 100: ranking, evaluations, caching the teacher and training, each by its
    planned operations. It never falls: while lost steps are repeated, it stays as it is."""
    step: int
    """The number of optimiser steps that are done."""
    total_steps: int
    """The number of optimiser steps of all stages."""
    stage: int | None
    """The stage that is trained or evaluated, counted from 0; null before the first."""
    stages: int
    """The number of stages."""
    tokens_seen: int
    """The number of prompt and response tokens that were trained on."""
    tokens_per_second: float | None
    """The training speed in prompt and response tokens per second; null while nothing is trained."""
    updated_at: datetime | None
    """When the engine last reported anything; null before its first report."""


class PhaseView(Resource):
    """What the engine does at present, in more detail than the status."""

    name: str
    """The name of the phase, for instance `ranking` or `training`."""
    done: int | None
    """The number of units that are done; null where the phase is not counted."""
    total: int | None
    """The number of units of the whole phase; null where the phase is not counted."""
    unit: str | None
    """The unit that the phase is counted in; null where it is not counted."""


class Eta(Resource):
    """An estimate of the time that is left, as of `progress.updated_at`: by the forecast of the job until its steps are
    timed, and then by their times and those of evaluations."""

    seconds: float
    """The expected time to the end of the job in seconds."""
    low_seconds: float | None
    """The lower end of the expected range in seconds; null before there is a measure of it."""
    high_seconds: float | None
    """The upper end of the expected range in seconds; null before there is a measure of it."""
    finish_at: datetime
    """When the job is expected to end."""


class QueueView(Resource):
    """The position of a queued job in the queue."""

    position: int
    """The position in the queue; the job at 1 is claimed next."""
    ahead: int
    """The number of jobs that are claimed before this one."""
    reason: QueueReason
    """Why the job waits. `no_worker_fits`: no live worker has the device or the memory that it needs;
    `workers_quarantined`: those that have it are quarantined, `/v1/workers` says why; `backing_off`: an attempt failed
    by a fault that may pass, and the next one waits; `broker_unreachable`: no scheduler can wake a worker. More reasons
    may be added."""
    until: datetime | None
    """When a job that is backing off may be claimed; null for any other reason."""
    starts_at: datetime | None
    """When the job is expected to start, estimated from running and recently ended jobs; null where too little is
    known."""


class Reason(Resource):
    """Why a job or an attempt ended."""

    code: str
    """A stable name of the reason, for programs."""
    message: str
    """One sentence for people."""
    fault: Fault | None
    """Who or what caused the end; null for success."""
    retryable: bool
    """Whether the same job, submitted again, may end otherwise."""
    hint: str
    """What to do about it."""


class LimitsView(Resource):
    """The limits of a job; a null limit is none."""

    max_runtime_seconds: int | None
    """The running time of all attempts together, in seconds."""
    max_wait_seconds: int | None
    """The time in the queue before the first attempt, in seconds."""
    max_attempts: int
    """The number of attempts that may be lost, crash or fail by a fault that may pass before the job fails. Progress, a
    training state further than all before it, gives them all back."""


class JobSummary(Resource):
    """A job as lists show it."""

    id: str
    """The id of the job."""
    object: Literal["job"] = "job"
    """The kind of the resource."""
    name: str | None
    """The name that people call the job."""
    labels: dict[str, str]
    """Keys and values by which lists of jobs are filtered."""
    priority: int
    """The priority of the job in the queue; the job of the highest priority is claimed first."""
    status: JobStatus
    """The state of the job. More states may be added: treat an unknown one as one that has not ended."""
    phase: PhaseView | None
    """What the engine does at present; null while no worker holds the job."""
    progress: Progress
    """How far the job has come."""
    eta: Eta | None
    """The time that is left, over all phases; null while no worker holds the job, and until steps are trained where the
    job has no forecast."""
    end_reason: Reason | None
    """Why the job ended; null until then."""
    attempts_spent: int
    """The number of attempts since the last progress that count against `max_attempts`. A running one does; one that
    was released, or that failed on a worker which found itself sick, does not; of those that failed by a fault that may
    pass one counts for each worker."""
    max_attempts: int
    """The number of attempts that may be lost, crash or fail by a fault that may pass before the job fails. Progress, a
    training state further than all before it, gives them all back."""
    not_before: datetime | None
    """When a job that is queued again after a failure may be claimed; null: at once."""
    created_at: datetime
    """When the job was submitted."""
    updated_at: datetime
    """When anything about the job last changed."""
    started_at: datetime | None
    """When the first attempt began; null before it."""
    finished_at: datetime | None
    """When the job ended; null until then."""
    cancel_requested_at: datetime | None
    """When a client asked for the job to be cancelled; null if none did."""
    pause_at: PauseAt | None
    """When a job that is `pausing` stops."""
    retry_of: str | None
    """The ended job that this one retries."""
    branch_of: str | None
    """The job that this one branched off at the end of a stage."""
    limits: LimitsView
    """The limits of the job."""
    stored_bytes: int
    """The bytes of the checkpoints and other files of the job in the artifact store; files that checkpoints share on
    the disk count for each."""


class EncodingView(Resource):
    """What the engine counted when it made tokens of a data set."""

    part: str
    """What the samples are used for: `train`, `validation`, `test`, or the name of an evaluation set."""
    template: str
    """The template that made text of the samples, `chat` or `alpaca`."""
    counts: EncodingCounts
    """What was counted over all samples."""


class FailedAttempt(Resource):
    """An attempt that failed, crashed or was lost."""

    id: int = Field(validation_alias=AliasChoices("id", "number"))
    """The number of the attempt, counted from 1."""
    worker: str
    """The name of the worker."""
    ended_at: datetime
    """When the attempt ended."""
    end: AttemptEnd
    """How the attempt ended."""
    end_reason: Reason
    """Why the attempt ended."""


class WarningCount(Resource):
    """A warning of the engine, and how often it came."""

    code: str
    """A stable name of the warning, for programs; `further_warnings` counts those whose texts are not kept."""
    message: str
    """One sentence for people."""
    count: int
    """How often the engine gave the warning, in all attempts; the history has the first."""
    first_at: datetime
    """When it was first given."""
    last_at: datetime
    """When it was last given."""


class HistoryBounds(Resource):
    """What the history of a job does not have, so that it stays bounded."""

    events_dropped: int
    """The number of events of the engine beyond the 10,000th event of the job, which were dropped."""
    metrics_dropped: int
    """The number of metric values that were dropped."""
    deleted_at: datetime | None = Field(validation_alias=AliasChoices("deleted_at", "history_deleted_at"))
    """When the retention policy deleted events, metrics and logs, but for the changes of state; null while they are
    there."""
    metric_window: int
    """Of so many optimiser steps the first, the last, the least and the greatest value of each metric are kept; 1 where
    all are, as up to step 8192. The newest steps are whole."""


class JobView(JobSummary):
    """A job."""

    failed_attempts: list[FailedAttempt]
    """The newest attempts that failed, crashed or were lost, oldest first, at most 20; `/attempts` has all attempts."""

    queue: QueueView | None
    """The position in the queue; null unless the job is queued."""
    latest: dict[str, float] | None
    """The metrics of the newest optimiser step, by name; null before the first."""
    warnings: list[WarningCount]
    """The warnings of the engine by their text, at most 100 and one for all others, in the order in which they first
    came."""
    retention: dict[str, int | bool | None] | None
    """What the job has in place of the fields of the project's retention policy; null for nothing."""
    trackers: list[dict[str, JsonValue]]
    """Where the metrics of the job go besides the service, as it was submitted; `/trackers` says what they have."""
    publication: PublicationView | None
    """The push of the student to the Hugging Face Hub; null before the job has succeeded, and where `export.hub` of its
    specification is null."""
    history: HistoryBounds
    """What the history does not have."""
    plan_warnings: list[PlanWarningView]
    """What was to be known about the job when it was submitted, as its dry run says it."""
    forecast: ForecastView | None
    """What the job was expected to take when it was submitted; null for jobs from before that was noted."""
    encodings: list[EncodingView]
    """What was cut and left out of each data set; empty before the engine has read them."""
    spec: ResolvedSpec
    """The specification of the job, with every default named."""


class JobPage(Page[JobSummary, str]):
    """Jobs, newest first."""


class StageView(StagePlanView):
    """A stage of a job: planned at submission, then as the engine reports it."""

    status: StageStatus
    """The state of the stage."""
    started_at: datetime | None
    """When the stage began; null before it."""
    finished_at: datetime | None
    """When the stage ended; null until then."""
    evaluation: dict[str, JsonValue] | None
    """The scores on the validation samples at the end of the stage; null before it, or without such samples."""


class StageList(Resource):
    """All stages of a job, in order."""

    object: Literal["list"] = "list"
    """The kind of the resource."""
    data: list[StageView]
    """The stages."""


class EventView(Resource):
    """One event of a job's history."""

    id: int = Field(validation_alias=AliasChoices("id", "seq"))
    """The number of the event: counted from 1, without gaps, in the order of the commits."""
    at: datetime
    """When the event happened."""
    type: str
    """The type of the event: `status` for a transition, else what the engine reported. More types may be added."""
    data: dict[str, JsonValue]
    """The content of the event, which depends on its type."""


class EventPage(Page[EventView, int]):
    """Events, oldest first."""


class AttemptView(Resource):
    """One worker's hold on a job."""

    id: int = Field(validation_alias=AliasChoices("id", "number"))
    """The number of the attempt, counted from 1."""
    worker: str
    """The name of the worker."""
    started_at: datetime
    """When the worker claimed the job."""
    ended_at: datetime | None
    """When the attempt ended; null while it runs."""
    end: AttemptEnd | None
    """How the attempt ended; null while it runs."""
    end_reason: Reason | None
    """Why the attempt ended; null while it runs."""
    resumed_from_step: int | None
    """The optimiser step of the checkpoint that the attempt resumed from; null for a fresh start."""


class AttemptPage(Page[AttemptView, int]):
    """Attempts, oldest first."""


class SeriesView(Resource):
    """One metric over the optimiser steps, thinned out."""

    name: str
    """The name of the metric, for instance `loss`."""
    steps: list[int]
    """The optimiser steps, in rising order."""
    values: list[float]
    """The value of the metric at each of `steps`."""


class EvaluationView(Resource):
    """Scores on held-out samples."""

    subject: str
    """The model that was scored: `teacher`, `initial`, or the student after an `epoch`, a `stage`, the `best` stage or
    all (`final`)."""
    split: str
    """The samples that it was scored on: `validation`, by which the best stage is chosen, `test`, or the name of an
    evaluation set."""
    step: int
    """The number of optimiser steps that were done."""
    stage: int | None
    """The stage after or in which the student was scored, counted from 0; null outside of any stage."""
    at: datetime
    """When the scores were reported."""
    rows: int
    """The number of samples that were scored."""
    rouge_l: float
    """The ROUGE-L F1 score of greedy responses, 0 to 100."""
    exact_match: float
    """The share of greedy responses that equal a reference, in per cent."""
    cross_entropy: float
    """The cross-entropy of the reference responses in nats per response token."""
    divergence: float | None
    """The forward KL divergence to the teacher in nats per response token; null where there is no teacher."""
    unfinished_thoughts: int
    """The number of greedy responses that end inside their thought, and so say nothing; their ROUGE-L is 0."""
    sampled: SampledScores | None
    """The scores of responses that were drawn with several seeds; null where only greedy responses were scored."""


class MetricsView(Resource):
    """The metrics of a job over its optimiser steps, and all evaluations."""

    series: list[SeriesView]
    """The metrics, each over the optimiser steps."""
    evaluations: list[EvaluationView]
    """All evaluations, oldest first."""


class TrackerProblem(Resource):
    """Why a tracker was sent nothing lately."""

    code: str
    """A stable name of the reason, for programs."""
    message: str
    """One sentence for people."""


class TrackerView(Resource):
    """A tracker of a job, and what it has of the job's metrics."""

    kind: TrackerKind
    """The kind of tracker."""
    options: dict[str, JsonValue]
    """What the job asks of it."""
    state: TrackerState
    """`open` while more may be sent; `closed` once the job has ended and the tracker has all of it; `failed` where it
    was given up."""
    run_id: str | None
    """The id of the run on the tracker's server; null before it is made, and for a file."""
    run_url: str | None
    """Where people see the run; for MLflow relative to its server. Null where the tracker does not say."""
    step: int
    """The last optimiser step that it has; 0 before the first."""
    failures: int
    """How often in a row it was sent nothing."""
    problem: TrackerProblem | None
    """Why, the last time; null where the last values were sent."""


class TrackerList(Resource):
    """The trackers of a job, in the order in which it names them."""

    object: Literal["list"] = "list"
    """The kind of the resource."""
    data: list[TrackerView]
    """The trackers."""
