"""The resources of the service. Made by `python -m tools.client_models` from docs/openapi.json.

Fields that a newer service adds are in `model_extra`, and values that it adds to an enumeration are plain text.
"""

from datetime import date, datetime
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict


class Resource(BaseModel):
    """What all resources have in common: they are read, and fields that are not known here are kept."""

    # The validator of a model is built when it is first used: of the many models a program uses a few.
    model_config = ConfigDict(extra="allow", frozen=True, defer_build=True, protected_namespaces=())


AttemptEnd: TypeAlias = Literal["succeeded", "failed", "cancelled", "released", "crashed", "lost"] | str

CheckpointExportState: TypeAlias = Literal["pending", "running", "complete", "failed"] | str

CheckpointKind: TypeAlias = Literal["training", "stage", "best", "final"] | str

DatasetStatus: TypeAlias = Literal["validating", "ready", "refused"] | str

DeliveryError: TypeAlias = (
    Literal[
        "url_not_allowed",
        "name_not_resolved",
        "address_not_allowed",
        "connection_failed",
        "tls_failed",
        "proxy_failed",
        "timed_out",
        "response_invalid",
        "redirected",
        "status_not_2xx",
        "gone",
    ]
    | str
)

DeliveryFailure: TypeAlias = Literal["attempts_exhausted", "expired", "backlog_full"] | str

DeliveryStatus: TypeAlias = Literal["pending", "delivered", "failed"] | str

DeviceKind: TypeAlias = Literal["cpu", "cuda"] | str

Fault: TypeAlias = Literal["user", "capacity", "system"] | str

FileFormat: TypeAlias = Literal["jsonl", "json", "csv", "parquet"] | str

FinishReason: TypeAlias = Literal["stop", "length"] | str

ForecastBasis: TypeAlias = Literal["past_jobs", "assumption"] | str

GgufFormat: TypeAlias = Literal["f32", "f16", "q8_0"] | str

JobStatus: TypeAlias = (
    Literal[
        "queued",
        "preparing",
        "running",
        "pausing",
        "paused",
        "recovering",
        "cancelling",
        "cancelled",
        "succeeded",
        "failed",
    ]
    | str
)

KDMethod: TypeAlias = (
    Literal[
        "sft",
        "forward_kl",
        "reverse_kl",
        "js",
        "tvd",
        "skew_forward_kl",
        "skew_reverse_kl",
        "adaptive_kl",
        "alpha_beta",
    ]
    | str
)

KeyScope: TypeAlias = Literal["read", "submit", "admin"] | str

ModelRole: TypeAlias = Literal["student", "teacher", "ranker"] | str

ModelState: TypeAlias = Literal["usable", "refused", "not_read"] | str

PassPhase: TypeAlias = Literal["ranking", "evaluating", "caching_teacher", "training"] | str

PassSubject: TypeAlias = Literal["teacher", "initial", "epoch", "stage"] | str

PauseAt: TypeAlias = Literal["now", "stage_end"] | str

PresetName: TypeAlias = Literal["paper", "pocl_official", "quick"] | str

PublicationState: TypeAlias = Literal["pending", "uploading", "published", "failed"] | str

QueueReason: TypeAlias = (
    Literal[
        "jobs_ahead",
        "waiting_for_worker",
        "no_worker",
        "no_worker_fits",
        "workers_quarantined",
        "backing_off",
        "broker_unreachable",
        "project_quota",
    ]
    | str
)

RowForm: TypeAlias = (
    Literal["instruction", "messages", "sharegpt", "prompt_completion", "query_response", "prompt_only", "sample"] | str
)

StageStatus: TypeAlias = Literal["pending", "running", "succeeded", "failed", "cancelled"] | str

TrackerKind: TypeAlias = Literal["tensorboard", "mlflow", "wandb"] | str

TrackerState: TypeAlias = Literal["open", "closed", "failed"] | str

WakeUp: TypeAlias = Literal["ok", "no_scheduler", "broker_unreachable"] | str

WebhookDisabledReason: TypeAlias = Literal["by_client", "gone", "failing"] | str

WebhookStatus: TypeAlias = Literal["enabled", "disabled"] | str

Work: TypeAlias = Literal["generation", "scoring", "hidden_states", "training"] | str

WorkerFit: TypeAlias = Literal["fits", "no_worker", "no_worker_fits", "workers_quarantined"] | str

WorkerState: TypeAlias = Literal["idle", "busy", "draining", "drained", "quarantined", "lost"] | str


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


class Attempt(Resource):
    """One worker's hold on a job."""

    id: int
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


class AttemptPage(Resource):
    """Attempts, oldest first."""

    object: str = "list"
    """The kind of the resource."""
    data: list[Attempt]
    """The items of the page."""
    has_more: bool
    """Whether there are items after this page."""
    first_id: int | None
    """The id of the first item; null for an empty page."""
    last_id: int | None
    """The id of the last item, which gets the next page as `after`; null for an empty page."""


class ChatAnswerMessage(Resource):
    """The answer as a message."""

    role: str = "assistant"
    """Who speaks."""
    content: str
    """What the answer says, without thoughts and special tokens."""
    refusal: None = None
    """Always null."""


class ChatChoice(Resource):
    """One answer."""

    index: int = 0
    """The number of the answer: always 0."""
    message: ChatAnswerMessage
    """The answer."""
    finish_reason: FinishReason
    """`stop`: the model ended its answer, or came to a text of `stop`; `length`: it came to the limit of tokens."""
    logprobs: None = None
    """Always null."""


class ChatUsage(Resource):
    """The tokens of a conversation and its answer."""

    prompt_tokens: int
    """The tokens of the conversation, as the chat template renders it."""
    completion_tokens: int
    """The tokens of the answer, those of a thought before it included, without its end."""
    total_tokens: int
    """Both together."""


class ChatCompletion(Resource):
    """An answer, as OpenAI's API has it."""

    id: str
    """The id of the request."""
    object: str = "chat.completion"
    """The kind of the resource."""
    created: int
    """When the request arrived, in seconds since 1970."""
    model: str
    """The id of the checkpoint, or the path of the model."""
    choices: list[ChatChoice]
    """The answer."""
    usage: ChatUsage
    """The tokens of both."""
    warnings: list[str]
    """What of the conversation the model did not see, in sentences."""
    ignored: list[str]
    """The fields of the request that changed nothing."""


class CheckpointExportError(Resource):
    """Why an attempt at an export failed."""

    code: str
    """A stable name of the reason, for programs."""
    message: str
    """One sentence for people."""
    fault: Fault
    """Whose fault it is: of what was asked for, of a machine that is too small or full, or of the service."""


class CheckpointExport(Resource):
    """A checkpoint as GGUF, with an Ollama Modelfile. It goes with its checkpoint."""

    id: str
    """The id of the export."""
    object: str = "checkpoint.export"
    """The kind of the resource."""
    checkpoint_id: str
    """The checkpoint that is exported."""
    job_id: str
    """The job that saved the checkpoint."""
    format: GgufFormat
    """The format of the matrices."""
    state: CheckpointExportState
    """`pending` until a worker takes it, and between two attempts; `running` during one; `complete` once its files
    can be downloaded; `failed` where nothing more is tried unless you ask for it again. More states may be added."""
    attempts: int
    """The number of attempts since it was asked for, or asked for again."""
    not_before: datetime | None
    """When the next attempt is due; null unless it is pending."""
    error: CheckpointExportError | None
    """Why the last attempt failed; null where none did, or the export is complete."""
    size_bytes: int | None
    """The size of its files together, in bytes; null until it is complete."""
    manifest_sha256: str | None
    """The SHA-256 digest of its `manifest.json`, hexadecimal; null until it is complete."""
    notes: list[str]
    """Sentences on what differs from the checkpoint; empty until it is complete."""
    created_at: datetime
    """When it was first asked for."""
    completed_at: datetime | None
    """When its files were whole; null until then."""


class CheckpointExportPage(Resource):
    """Exports of a checkpoint, newest first."""

    object: str = "list"
    """The kind of the resource."""
    data: list[CheckpointExport]
    """The items of the page."""
    has_more: bool
    """Whether there are items after this page."""
    first_id: str | None
    """The id of the first item; null for an empty page."""
    last_id: str | None
    """The id of the last item, which gets the next page as `after`; null for an empty page."""


class Checkpoint(Resource):
    """Weights that `from_pretrained` loads. The files of a checkpoint never change."""

    id: str
    """The id by which a later job names the checkpoint as its teacher or student."""
    object: str = "checkpoint"
    """The kind of the resource."""
    job_id: str
    """The job that saved the checkpoint."""
    attempt: int
    """The attempt of the job that saved it, counted from 1."""
    kind: CheckpointKind
    """What the checkpoint is; `training` and `stage` hold the full training state besides the weights."""
    stage: int | None
    """The stage in which the checkpoint was saved, counted from 0; null outside of any stage."""
    step: int
    """The number of optimiser steps that were done when the checkpoint was saved."""
    size_bytes: int
    """The size of all files together, in bytes."""
    manifest_sha256: str
    """The SHA-256 digest of the checkpoint's `manifest.json`, hexadecimal; the manifest has that of each file."""
    pinned: bool
    """Whether the checkpoint is pinned: a pinned one is not deleted."""
    expires_at: datetime | None
    """When the retention policy deletes the checkpoint, as things stand; null while it keeps it, and before the job
    has ended. A pin, a job that needs it, or another policy changes that."""
    created_at: datetime
    """When the checkpoint was committed."""


class CheckpointPage(Resource):
    """Checkpoints, newest first."""

    object: str = "list"
    """The kind of the resource."""
    data: list[Checkpoint]
    """The items of the page."""
    has_more: bool
    """Whether there are items after this page."""
    first_id: str | None
    """The id of the first item; null for an empty page."""
    last_id: str | None
    """The id of the last item, which gets the next page as `after`; null for an empty page."""


class Cost(Resource):
    """What the time on GPUs costs at the rate that the service is set to now."""

    amount: float
    """The cost."""
    currency: str
    """The currency, as ISO 4217 names it."""
    per_gpu_hour: float
    """The rate for an hour of a GPU."""


class EncodingCounts(Resource):
    """Counts over the samples of a data set as tokens."""

    rows: int = 0
    """The samples that were encoded."""
    tokens: int = 0
    """The tokens of all samples as they are trained, after cuts."""
    prompt_tokens: int = 0
    """Those of them before the last answers."""
    trained_tokens: int = 0
    """Those of them that are trained on: answers with their ends."""
    rows_too_long: int = 0
    """The samples of which something was cut or dropped because they were too long."""
    prompts_cut: int = 0
    """The samples whose prompt was longer than `data.max_prompt_length`."""
    turns_dropped: int = 0
    """The answers of earlier turns that were dropped, with their questions, from prompts that were too long."""
    questions_lost: int = 0
    """The samples whose prompt, cut from its left, has nothing left of the last question."""
    answers_cut: int = 0
    """The samples whose last answer was cut at `data.max_length`."""
    ends_lost: int = 0
    """The samples whose last answer lost its end token, so that they do not teach where to stop."""
    tokens_cut: int = 0
    """The tokens that cuts and dropped turns took away."""
    ends_added: int = 0
    """The samples whose template writes no end after the last answer, so that the end-of-sequence token was added."""
    tokenised_apart: int = 0
    """The samples in which prompt and answer are tokenised apart, because tokens would merge across their border."""
    turns_unlabelled: int = 0
    """The answers of earlier turns that are not trained on, because the template renders them otherwise than given."""
    left_out: dict[str, int] | None = None
    """The samples of which the template leaves something out, by the name of what is left out."""
    lengths: dict[str, int] | None = None
    """The samples by their length in tokens before any cut: the number of those of at most so many tokens, a power
    of two, and of more than half as many."""


class DataFigures(Resource):
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


class FieldError(Resource):
    """One wrong field of the request."""

    pointer: str
    """The place of the error: an RFC 6901 pointer into the body, `/query/NAME` for a parameter, `/lines/N` for a
    line of a file, `/rows/N` for a row of one without lines."""
    code: str
    """A stable name of the error, for programs."""
    detail: str
    """One sentence for people."""


class IgnoredColumn(Resource):
    """A column of the file, or a field of its messages, that no form uses."""

    name: str
    rows: int
    """The number of samples in which it holds something."""


class ReasoningColumn(Resource):
    """A column of the file that the assistant's thoughts are read from."""

    name: str
    rows: int
    """The number of samples whose thought is from this column."""


class Ingestion(Resource):
    """How the uploaded file was read."""

    format: FileFormat
    """The format of the file."""
    compressed: bool
    """Whether the file was compressed with gzip."""
    size_bytes: int
    """The size of the file as it was sent, in bytes."""
    sha256: str
    """The SHA-256 digest of the file as it was sent, hexadecimal."""
    forms: dict[str, int]
    """The number of samples that were read in each form; `prompt_only` has no answer."""
    ignored_columns: list[IgnoredColumn]
    """What is not used, and so neither trained on nor shown to the models: the first 50 names."""
    more_ignored: int
    """The number of samples with further such columns, each counted as often as it has one."""
    with_difficulty: int = 0
    """The number of samples with a number in the column `difficulty`, by which `curriculum.ranking.ranker` can rank."""
    reasoning_columns: list[ReasoningColumn] = []
    """The columns of their own that the assistant's thoughts are read from; thoughts in messages are not counted."""
    skipped: int
    """The number of rows that are no samples and were left out, as `on_bad_rows` asked for."""
    first_skipped: list[FieldError]
    """The first 20 of them."""


class Refusal(Resource):
    """Why a file is no data set."""

    code: str
    """A stable name of the reason, for programs: those of a problem that a small upload would be answered with."""
    message: str
    """One sentence for people."""
    retryable: bool
    """Whether the same file may be accepted another time."""
    errors: list[FieldError]
    """The rows that are no samples, the first 20 of them."""


class Dataset(Resource):
    """An uploaded data set. Once it is ready or refused it never changes."""

    id: str
    """The id by which a job's specification names the data set."""
    object: str = "dataset"
    """The kind of the resource."""
    name: str
    """The name that people call the data set."""
    status: DatasetStatus
    """`validating`: the file is large, and is being read; `ready`: jobs may name the data set; `refused`: `refusal`
    says why."""
    refusal: Refusal | None
    """Why the file was refused; null unless it was."""
    rows: int | None
    """The number of samples; null unless the data set is ready."""
    prompts: int | None
    """How many of the samples have no answer: all or none. Only evaluation sets may have none. Null unless the data
    set is ready."""
    size_bytes: int | None
    """The size of the stored samples in bytes; null unless the data set is ready."""
    sha256: str | None
    """The SHA-256 digest of the stored samples, hexadecimal: equal samples in equal order have an equal digest, in
    whatever format and form they were sent. Null unless the data set is ready."""
    ingestion: Ingestion | None
    """How the uploaded file was read; null unless the data set is ready, and for one from before that was noted."""
    created_at: datetime
    """When the upload was complete."""


class DatasetPage(Resource):
    """Data sets, newest first."""

    object: str = "list"
    """The kind of the resource."""
    data: list[Dataset]
    """The items of the page."""
    has_more: bool
    """Whether there are items after this page."""
    first_id: str | None
    """The id of the first item; null for an empty page."""
    last_id: str | None
    """The id of the last item, which gets the next page as `after`; null for an empty page."""


class DayUsage(Resource):
    """What the project used on one day."""

    chat_requests: int
    """The number of conversations that workers answered, also those that failed or were cancelled on the way."""
    chat_prompt_tokens: int
    """The tokens of the conversations that models read."""
    chat_completion_tokens: int
    """The tokens of the answers."""
    gpu_seconds: float
    """The seconds on GPUs. Every attempt counts from its claim to its end, however it ended; one that runs counts up
    to now."""
    cpu_seconds: float
    """The seconds of attempts that computed on the CPU of their worker, whatever number of cores that had."""
    other_seconds: float
    """The seconds of attempts from before the service noted on which device an attempt computes."""
    day: date
    """The day, in UTC."""
    jobs: int
    """The number of jobs that computed on the day."""
    attempts: int
    """The number of attempts that computed on the day."""
    storage_bytes: int | None
    """The most bytes that checkpoints, data sets and results took on the day, as far as the scheduler looked; null
    where it did not."""


class DeliveryAttempt(Resource):
    """One attempt to deliver a message."""

    number: int
    """The number of the attempt, counted from 1."""
    at: datetime
    """When it began."""
    seconds: float
    """How long it took, in seconds."""
    status_code: int | None
    """The HTTP status of the response; null where there was none."""
    error: DeliveryError | None
    """Why it failed; null for success, which is any status of 2xx."""
    detail: str
    """One sentence about the error; empty for success."""


class Delivery(Resource):
    """A message to a webhook, and the attempts to deliver it."""

    id: str
    """The id of the message: the `webhook-id` of every attempt, by which receivers know a message that comes twice."""
    object: str = "webhook_delivery"
    """The kind of the resource."""
    type: str
    """The type of the message, for instance `job.succeeded`."""
    job_id: str | None
    """The job that the message is about; null for a test message."""
    status: DeliveryStatus
    """`pending` until it is `delivered`, or given up as `failed`."""
    failure: DeliveryFailure | None
    """Why it was given up: `attempts_exhausted`, all attempts of a day failed; `expired`, it waited for a day, as
    while its webhook was disabled; `backlog_full`, too many others waited. Null unless it was."""
    attempt_count: int
    """The number of attempts so far."""
    attempts: list[DeliveryAttempt]
    """The attempts, oldest first; of many the last 20."""
    next_attempt_at: datetime | None
    """When the next attempt is due; null for a message that is delivered or given up."""
    expires_at: datetime
    """When the message is given up at the latest."""
    created_at: datetime
    """When the message was written."""
    settled_at: datetime | None
    """When it was delivered or given up; null before."""


class DeliveryPage(Resource):
    """Messages to a webhook, newest first."""

    object: str = "list"
    """The kind of the resource."""
    data: list[Delivery]
    """The items of the page."""
    has_more: bool
    """Whether there are items after this page."""
    first_id: str | None
    """The id of the first item; null for an empty page."""
    last_id: str | None
    """The id of the last item, which gets the next page as `after`; null for an empty page."""


class DeliveryWithBody(Resource):
    """A message to a webhook with its body."""

    id: str
    """The id of the message: the `webhook-id` of every attempt, by which receivers know a message that comes twice."""
    object: str = "webhook_delivery"
    """The kind of the resource."""
    type: str
    """The type of the message, for instance `job.succeeded`."""
    job_id: str | None
    """The job that the message is about; null for a test message."""
    status: DeliveryStatus
    """`pending` until it is `delivered`, or given up as `failed`."""
    failure: DeliveryFailure | None
    """Why it was given up: `attempts_exhausted`, all attempts of a day failed; `expired`, it waited for a day, as
    while its webhook was disabled; `backlog_full`, too many others waited. Null unless it was."""
    attempt_count: int
    """The number of attempts so far."""
    attempts: list[DeliveryAttempt]
    """The attempts, oldest first; of many the last 20."""
    next_attempt_at: datetime | None
    """When the next attempt is due; null for a message that is delivered or given up."""
    expires_at: datetime
    """When the message is given up at the latest."""
    created_at: datetime
    """When the message was written."""
    settled_at: datetime | None
    """When it was delivered or given up; null before."""
    body: str
    """The body that is posted, exactly: signatures are made of these characters."""


class Device(Resource):
    """A device that a worker computes on."""

    kind: DeviceKind
    """The kind of the device."""
    name: str
    """The name of the device, as its driver or operating system has it."""
    memory_bytes: int | None
    """The memory of the device in bytes; null where it is not known."""
    uuid: str | None = None
    """The UUID of a GPU or of a MIG instance, as its driver lists it; null for a CPU."""


class Disk(Resource):
    """The disk space that the job needs, and what is free."""

    needed_bytes: int | None
    """What its checkpoints take at most; null where a model's files are not at hand."""
    free_bytes: int | None
    """What is free where the artifact store is, as the API sees it; workers may have other disks. Null where it is
    not known."""
    fits: bool | None
    """Whether there is enough; null where either is not known."""


class Duration(Resource):
    """How long the job will run, from its claim by a worker to its end, if nothing interrupts it."""

    low_seconds: float
    """The lower end of the expected range in seconds."""
    expected_seconds: float
    """The expected time in seconds."""
    high_seconds: float
    """The upper end of the expected range in seconds."""
    basis: ForecastBasis
    """What it rests on: `past_jobs` with students of about this size on the devices of the workers that the job
    fits, or an `assumption` about devices of this kind, right within a factor of four at best. No trial run is
    made."""
    past_jobs: int
    """The number of past jobs; 0 for an assumption."""
    device: DeviceKind
    """The kind of device that it is about."""
    flops_per_second: float
    """The floating-point operations per second that are expected, of those that the estimate counts."""


class Encoding(Resource):
    """What the engine counted when it made tokens of a data set."""

    part: str
    """What the samples are used for: `train`, `validation`, `test`, or the name of an evaluation set."""
    template: str
    """The template that made text of the samples, `chat` or `alpaca`."""
    counts: EncodingCounts
    """What was counted over all samples."""


class ModelPass(Resource):
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
    subject: PassSubject | None
    """What is evaluated: the `teacher`, the `initial` student, or the student after each `epoch` or `stage`; null in
    other phases."""
    stage: int | None
    """The stage that is trained, counted from 0; null in other phases."""


class Estimate(Resource):
    """What a job costs, computed from the sizes of the models and of the samples: in the mean they are taken to be
    like those that were tried, and of full length before any was tried. Nothing is taken to end early."""

    memory_bytes: int
    """The memory for weights, gradients, optimiser state and the logits that exist at a time; activations come on
    top."""
    disk_bytes: int
    """The disk space that the checkpoints take at most."""
    stored_bytes: int
    """The bytes of all checkpoints in the artifact store, at their most; the end of each stage keeps its training
    state there."""
    training_flops: int
    """The floating-point operations of all training steps, those of the teacher included."""
    flops: int | None
    """The floating-point operations of the whole job: ranking, evaluations and the teacher's hidden states too. Null
    where a model that ranks is not at hand."""
    passes: list[ModelPass]
    """Every pass of a model over samples, in the order of the phases."""


class Eta(Resource):
    """An estimate of the time that is left, as of `progress.updated_at`: by the forecast of the job until its steps
    are timed, and then by their times and those of evaluations."""

    seconds: float
    """The expected time to the end of the job in seconds."""
    low_seconds: float | None
    """The lower end of the expected range in seconds; null before there is a measure of it."""
    high_seconds: float | None
    """The upper end of the expected range in seconds; null before there is a measure of it."""
    finish_at: datetime
    """When the job is expected to end."""


class SeedStats(Resource):
    """A score for each seed, with mean and standard deviation."""

    values: list[float]
    """The scores, in the order of the seeds."""
    mean: float
    """The mean over the seeds."""
    sd: float | None
    """The sample standard deviation, with n - 1 in the denominator; null for one seed."""


class SampledScores(Resource):
    """Scores of answers that were sampled at random, once with each seed."""

    temperature: float
    """The temperature of sampling."""
    top_p: float
    """The probability mass of nucleus sampling."""
    seeds: list[int]
    """The seeds with each of which every prompt was answered once."""
    rouge_l: SeedStats
    """ROUGE-L F1, 0 to 100."""
    exact_match: SeedStats
    """Exact match, in per cent."""


class EvaluationView(Resource):
    """Scores on held-out samples."""

    subject: str
    """The model that was scored: `teacher`, `initial`, or the student after an `epoch`, a `stage`, the `best` stage
    or all (`final`)."""
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


class Event(Resource):
    """One event of a job's history."""

    id: int
    """The number of the event: counted from 1, without gaps, in the order of the commits."""
    at: datetime
    """When the event happened."""
    type: str
    """The type of the event: `status` for a transition, else what the engine reported. More types may be added."""
    data: dict[str, Any]
    """The content of the event, which depends on its type."""


class EventPage(Resource):
    """Events, oldest first."""

    object: str = "list"
    """The kind of the resource."""
    data: list[Event]
    """The items of the page."""
    has_more: bool
    """Whether there are items after this page."""
    first_id: int | None
    """The id of the first item; null for an empty page."""
    last_id: int | None
    """The id of the last item, which gets the next page as `after`; null for an empty page."""


class ExpiredDataset(Resource):
    """A data set that would be deleted."""

    id: str
    """The id of the data set."""
    name: str
    """Its name."""
    size_bytes: int
    """Its size in bytes."""


class ExpiredJob(Resource):
    """What would be deleted of an ended job."""

    job_id: str
    """The id of the job."""
    whole: bool
    """Whether the job would be deleted with all that it made."""
    history: bool
    """Whether its events, metrics and logs would be deleted."""
    checkpoints: list[str]
    """The ids of the checkpoints that would be deleted; empty where the whole job would be."""
    size_bytes: int
    """The size of the files that would be deleted, in bytes."""


class FailedAttempt(Resource):
    """An attempt that failed, crashed or was lost."""

    id: int
    """The number of the attempt, counted from 1."""
    worker: str
    """The name of the worker."""
    ended_at: datetime
    """When the attempt ended."""
    end: AttemptEnd
    """How the attempt ended."""
    end_reason: Reason
    """Why the attempt ended."""


class Fit(Resource):
    """Which workers the job fits at this moment."""

    state: WorkerFit
    """`fits`; or `no_worker`: none is live and accepts jobs; `no_worker_fits`: none has the device or the memory;
    `workers_quarantined`: those that have it are quarantined. In the last three cases the job would wait."""
    workers: int
    """The number of live workers that accept jobs."""
    able: int
    """The number of those that have the device and the memory that the job needs."""


class Price(Resource):
    """What the job will cost at the rate for an hour of a GPU that the service is set to."""

    low: float
    """The lower end of the expected range."""
    expected: float
    """The expected price."""
    high: float
    """The upper end of the expected range."""
    currency: str
    """The currency, as ISO 4217 names it."""
    per_gpu_hour: float
    """The rate for an hour of a GPU."""


class Forecast(Resource):
    """What a job will take, by the workers that there are and the jobs that they have done."""

    duration: Duration | None
    """How long it will run; null where a model's files are not at hand."""
    fit: Fit
    """Which workers it fits."""
    disk: Disk
    """The disk space that it needs."""
    price: Price | None
    """What it will cost; null where the service has no rate, for a job on a CPU, and without a duration."""


class Health(Resource):
    """The answer of a probe."""

    status: str = "ok"
    """Always `ok`: a failing probe answers with a problem."""


class HistoryBounds(Resource):
    """What the history of a job does not have, so that it stays bounded."""

    events_dropped: int
    """The number of events of the engine beyond the 10,000th event of the job, which were dropped."""
    metrics_dropped: int
    """The number of metric values that were dropped."""
    deleted_at: datetime | None
    """When the retention policy deleted events, metrics and logs, but for the changes of state; null while they are
    there."""
    metric_window: int
    """Of so many optimiser steps the first, the last, the least and the greatest value of each metric are kept; 1
    where all are, as up to step 8192. The newest steps are whole."""


class Limits(Resource):
    """The limits of a job; a null limit is none."""

    max_runtime_seconds: int | None
    """The running time of all attempts together, in seconds."""
    max_wait_seconds: int | None
    """The time in the queue before the first attempt, in seconds."""
    max_attempts: int
    """The number of attempts that may be lost, crash or fail by a fault that may pass before the job fails.
    Progress, a training state further than all before it, gives them all back."""


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


class Progress(Resource):
    """How far a job has come."""

    percent: float
    """The share of the work that is done, 0 to 100: ranking, evaluations, caching the teacher and training, each by
    its planned operations. It never falls: while lost steps are repeated, it stays as it is."""
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


class JobSummary(Resource):
    """A job as lists show it."""

    id: str
    """The id of the job."""
    object: str = "job"
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
    """The time that is left, over all phases; null while no worker holds the job, and until steps are trained where
    the job has no forecast."""
    end_reason: Reason | None
    """Why the job ended; null until then."""
    attempts_spent: int
    """The number of attempts since the last progress that count against `max_attempts`. A running one does; one that
    was released, or that failed on a worker which found itself sick, does not; of those that failed by a fault
    that may pass one counts for each worker."""
    max_attempts: int
    """The number of attempts that may be lost, crash or fail by a fault that may pass before the job fails.
    Progress, a training state further than all before it, gives them all back."""
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
    limits: Limits
    """The limits of the job."""
    stored_bytes: int
    """The bytes of the checkpoints and other files of the job in the artifact store; files that checkpoints share on
    the disk count for each."""


class JobPage(Resource):
    """Jobs, newest first."""

    object: str = "list"
    """The kind of the resource."""
    data: list[JobSummary]
    """The items of the page."""
    has_more: bool
    """Whether there are items after this page."""
    first_id: str | None
    """The id of the first item; null for an empty page."""
    last_id: str | None
    """The id of the last item, which gets the next page as `after`; null for an empty page."""


class PlanWarning(Resource):
    """A warning about a specification that is valid."""

    code: str
    """A stable name of the warning, for programs."""
    message: str
    """One sentence for people."""
    pointer: str | None
    """The field of the posted document that it is about; null where it is about none."""


class PublicationError(Resource):
    """Why the student could not be pushed."""

    code: str
    """A stable name of the reason, for programs."""
    message: str
    """One sentence for people."""


class Publication(Resource):
    """The push of a job's student to a repository of the Hugging Face Hub."""

    state: PublicationState
    """`pending` until a scheduler takes it, and between two attempts; `uploading` during one; `published` once the
    branch has the files of the student; `failed` where nothing more is tried unless you ask for it. More states
    may be added."""
    repo: str
    """The repository, as `owner/name`."""
    branch: str
    """The branch."""
    checkpoint: str | None
    """The id of the checkpoint that is pushed; null where the job stored none of the kind."""
    attempts: int
    """The number of attempts since the job succeeded, or since another try was asked for."""
    not_before: datetime | None
    """When the next attempt is due; null unless it is pending."""
    error: PublicationError | None
    """Why the last attempt failed; null where none did, or the student is published."""
    url: str | None
    """Where people see the repository; null until it is published."""
    commit: str | None
    """The commit of the branch that has the files; null until it is published."""
    published_at: datetime | None
    """When it was found there; null until then."""


class Queue(Resource):
    """The position of a queued job in the queue."""

    position: int
    """The position in the queue; the job at 1 is claimed next."""
    ahead: int
    """The number of jobs that are claimed before this one."""
    reason: QueueReason
    """Why the job waits. `no_worker_fits`: no live worker has the device or the memory that it needs;
    `workers_quarantined`: those that have it are quarantined, `/v1/workers` says why; `backing_off`: an attempt
    failed by a fault that may pass, and the next one waits; `broker_unreachable`: no scheduler can wake a worker.
    More reasons may be added."""
    until: datetime | None
    """When a job that is backing off may be claimed; null for any other reason."""
    starts_at: datetime | None
    """When the job is expected to start, estimated from running and recently ended jobs; null where too little is
    known."""


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


class Job(Resource):
    """A job."""

    id: str
    """The id of the job."""
    object: str = "job"
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
    """The time that is left, over all phases; null while no worker holds the job, and until steps are trained where
    the job has no forecast."""
    end_reason: Reason | None
    """Why the job ended; null until then."""
    attempts_spent: int
    """The number of attempts since the last progress that count against `max_attempts`. A running one does; one that
    was released, or that failed on a worker which found itself sick, does not; of those that failed by a fault
    that may pass one counts for each worker."""
    max_attempts: int
    """The number of attempts that may be lost, crash or fail by a fault that may pass before the job fails.
    Progress, a training state further than all before it, gives them all back."""
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
    limits: Limits
    """The limits of the job."""
    stored_bytes: int
    """The bytes of the checkpoints and other files of the job in the artifact store; files that checkpoints share on
    the disk count for each."""
    failed_attempts: list[FailedAttempt]
    """The newest attempts that failed, crashed or were lost, oldest first, at most 20; `/attempts` has all attempts."""
    queue: Queue | None
    """The position in the queue; null unless the job is queued."""
    latest: dict[str, float] | None
    """The metrics of the newest optimiser step, by name; null before the first."""
    warnings: list[WarningCount]
    """The warnings of the engine by their text, at most 100 and one for all others, in the order in which they first
    came."""
    retention: dict[str, int | bool | None] | None
    """What the job has in place of the fields of the project's retention policy; null for nothing."""
    trackers: list[dict[str, Any]]
    """Where the metrics of the job go besides the service, as it was submitted; `/trackers` says what they have."""
    publication: Publication | None
    """The push of the student to the Hugging Face Hub; null before the job has succeeded, and where `export.hub` of
    its specification is null."""
    history: HistoryBounds
    """What the history does not have."""
    plan_warnings: list[PlanWarning]
    """What was to be known about the job when it was submitted, as its dry run says it."""
    forecast: Forecast | None
    """What the job was expected to take when it was submitted; null for jobs from before that was noted."""
    encodings: list[Encoding]
    """What was cut and left out of each data set; empty before the engine has read them."""
    spec: dict[str, Any]
    """The specification of the job, with every default named."""


class Key(Resource):
    """An API key, without its secret."""

    id: str
    """The id of the key, which is a part of its text: `pocl_<id>_<secret>` without `key_`."""
    object: str = "key"
    """The kind of the resource."""
    name: str
    """What the key is for, in the words of its maker."""
    project: str
    """The project whose key it is."""
    scopes: list[KeyScope]
    """What the key may do; each scope includes those before it: `read`, `submit`, `admin`."""
    expires_at: datetime | None
    """From when on the key is not accepted; null: never."""
    previous_expires_at: datetime | None
    """Until when the secret from before the last rotation is accepted; null before the first rotation."""
    revoked_at: datetime | None
    """When the key was revoked; null unless it was. It stays listed for thirty days."""
    last_used_at: datetime | None
    """When the key was last used, to the minute; null before the first use."""
    created_at: datetime
    """When the key was made."""


class KeyPage(Resource):
    """Keys, newest first."""

    object: str = "list"
    """The kind of the resource."""
    data: list[Key]
    """The items of the page."""
    has_more: bool
    """Whether there are items after this page."""
    first_id: str | None
    """The id of the first item; null for an empty page."""
    last_id: str | None
    """The id of the last item, which gets the next page as `after`; null for an empty page."""


class KeyWithSecret(Resource):
    """An API key with its text, which is shown this once."""

    id: str
    """The id of the key, which is a part of its text: `pocl_<id>_<secret>` without `key_`."""
    object: str = "key"
    """The kind of the resource."""
    name: str
    """What the key is for, in the words of its maker."""
    project: str
    """The project whose key it is."""
    scopes: list[KeyScope]
    """What the key may do; each scope includes those before it: `read`, `submit`, `admin`."""
    expires_at: datetime | None
    """From when on the key is not accepted; null: never."""
    previous_expires_at: datetime | None
    """Until when the secret from before the last rotation is accepted; null before the first rotation."""
    revoked_at: datetime | None
    """When the key was revoked; null unless it was. It stays listed for thirty days."""
    last_used_at: datetime | None
    """When the key was last used, to the minute; null before the first use."""
    created_at: datetime
    """When the key was made."""
    key: str
    """The text to send as `Authorization: Bearer`. The service keeps its digest alone."""


class LogMessage(Resource):
    """Consecutive lines of the engine's log."""

    type: str = "log"
    """The type of the message."""
    attempt: int
    """The number of the attempt, counted from 1."""
    offset: int
    """The offset of the first byte of the text in the log of the attempt. Where it is greater than `next_offset` of
    the message before, what lies between was dropped."""
    next_offset: int
    """The offset after the last byte of the text."""
    text: str
    """The text."""


class ManifestFile(Resource):
    """One file of a manifest."""

    path: str
    """The path relative to the manifest, with forward slashes; no part is hidden or leads upward."""
    size: int
    """The size in bytes."""
    sha256: str
    """The SHA-256 digest of the content, hexadecimal."""


class Manifest(Resource):
    """Every file of a directory with its size and digest."""

    requires: str | None = None
    """What reads the directory, as pip takes a requirement, e.g. `transformers>=4.57`."""
    dtype: str | None = None
    """The format of the stored weights: `float32`, `bfloat16` or `float16`."""
    tied_embeddings: bool | None = None
    """Whether input and output embeddings are one tensor."""
    format: int = 1
    """The version of the manifest's format."""
    files: list[ManifestFile]
    """The files of the directory, by path."""


class Method(Resource):
    """A knowledge-distillation method."""

    name: KDMethod
    """The name of the method, which `spec.method` may be for the default parameters."""
    description: str
    """What the method minimises, and how large its gradient is beside that of cross-entropy, where that was
    measured: a KD weight means another mixture with each method."""
    parameters: dict[str, Any]
    """The JSON Schema of the object that `spec.method` may be; every parameter has a default."""


class MethodList(Resource):
    """All methods."""

    object: str = "list"
    """The kind of the resource."""
    data: list[Method]
    """The methods."""


class MetricMessage(Resource):
    """The metrics of one optimiser step. Steps that an attempt runs again are not sent again."""

    type: str = "metric"
    """The type of the message."""
    step: int
    """The optimiser step, counted from 1."""
    values: dict[str, float]
    """The value of each metric by its name, for instance `loss`."""


class Series(Resource):
    """One metric over the optimiser steps, thinned out."""

    name: str
    """The name of the metric, for instance `loss`."""
    steps: list[int]
    """The optimiser steps, in rising order."""
    values: list[float]
    """The value of the metric at each of `steps`."""


class Metrics(Resource):
    """The metrics of a job over its optimiser steps, and all evaluations."""

    series: list[Series]
    """The metrics, each over the optimiser steps."""
    evaluations: list[EvaluationView]
    """All evaluations, oldest first."""


class ModelVocabulary(Resource):
    """The vocabulary of a model."""

    size: int
    """The number of token ids that the model has embeddings for."""
    tokens: int
    """The number of tokens that its tokenizer knows."""
    sha256: str
    """The SHA-256 over all tokens with their ids, in hexadecimal. Models with equal digests can teach each other.
    Others may, as far as their tokens agree: the dry run says so."""


class ModelWarning(Resource):
    """What a client should know of a model that can be used."""

    code: str
    """A stable name of the warning, for programs."""
    message: str
    """One sentence for people."""


class ModelFacts(Resource):
    """What the files of a model say about it."""

    family: str
    """The family of the model, as its config.json or the header of its GGUF file names it."""
    parameters: int
    """The number of its parameters; tied embeddings are counted once."""
    layers: int
    """The number of its layers."""
    layers_selectable: bool
    """Whether a student can be made of some of its layers (`from_teacher`)."""
    hidden_size: int
    """The width of its hidden states."""
    vocabulary: ModelVocabulary
    """The vocabulary of the model."""
    dtype: str
    """The format of most stored weights: as safetensors name it (`BF16`), or GGML for a GGUF file (`Q4_K`)."""
    size_bytes: int
    """The size of the stored weights in bytes."""
    context_length: int | None
    """The longest sequence in tokens; null where the files do not say."""
    has_chat_template: bool
    """Whether the model has a chat template."""
    tied_embeddings: bool
    """Whether the output head is the embedding."""
    warnings: list[ModelWarning]
    """What is not used of the files, or used in another way than they say."""


class ModelRefusal(Resource):
    """Why a model can be neither teacher nor student."""

    code: str
    """A stable name of the reason, for programs."""
    message: str
    """What is wrong with the model, and what to do about it."""


class Model(Resource):
    """A model that lies below a model root of the service."""

    id: str
    """The path of the model: what `path` of a teacher or a student may be."""
    object: str = "model"
    """The kind of the resource."""
    state: ModelState
    """A `usable` model may be teacher and student as far as its files tell; a `refused` one may be neither,
    `refusal` says why. The files of one that is `not_read` have not been looked at for want of time: ask again."""
    facts: ModelFacts | None
    """What the files say; null unless the model is `usable`."""
    refusal: ModelRefusal | None
    """Why the model is refused; null unless it is."""


class ModelPage(Resource):
    """Models, in the order of their paths."""

    object: str = "list"
    """The kind of the resource."""
    data: list[Model]
    """The items of the page."""
    has_more: bool
    """Whether there are items after this page."""
    first_id: str | None
    """The id of the first item; null for an empty page."""
    last_id: str | None
    """The id of the last item, which gets the next page as `after`; null for an empty page."""
    complete: bool = True
    """Whether the model roots were searched to their ends. They are searched five directories deep and for 20,000
    entries; directories whose names begin with a dot are left out, and so are links out of the roots."""


class StagePlan(Resource):
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


class Plan(Resource):
    """What a job would do. A job that is posted like this would be accepted at this moment."""

    object: str = "plan"
    """The kind of the resource."""
    spec: dict[str, Any]
    """The specification with every default named."""
    samples: int
    """The number of training samples."""
    total_steps: int
    """The number of optimiser steps of all stages."""
    stages: list[StagePlan]
    """The stages of the curriculum, in order."""
    estimate: Estimate | None
    """What the job would cost; null where a model's files are not at hand."""
    forecast: Forecast
    """What the job would take: time, workers, free disk and price."""
    data: list[DataFigures]
    """What is cut and left out of each data set, as far as its samples were tried."""
    warnings: list[PlanWarning]
    """What the client should know before it submits the job."""


class Preset(Resource):
    """A preset: the defaults of the fields that a specification leaves out."""

    name: PresetName
    """The name of the preset, which `spec.preset` may be."""
    description: str
    """What the preset is for, in one sentence."""
    spec: dict[str, Any]
    """The default of every field, with the method `forward_kl`. Models and data sets have none."""
    methods: dict[str, dict[str, Any]]
    """The default parameters of each method."""


class PresetList(Resource):
    """All presets."""

    object: str = "list"
    """The kind of the resource."""
    data: list[Preset]
    """The presets; a specification that names none has the first."""


class PreviewToken(Resource):
    """One token of a sample."""

    id: int
    """The id of the token."""
    token: str
    """The token as the vocabulary spells it."""
    trained: bool
    """Whether the token is trained on: it is part of an answer, or its end."""


class PreviewRow(Resource):
    """One row of a data set, encoded as a run would encode it."""

    row: int
    """The number of the row among the samples of the data set, counted from 0."""
    digest: str
    """The SHA-256 digest of the sample."""
    tokens: list[PreviewToken]
    """The tokens that are trained on or seen before those; empty where the row is refused."""
    prompt: str
    """What generation of the last answer starts from, decoded."""
    answer: str
    """The last answer with its end, decoded."""
    counts: EncodingCounts
    """What was cut and left out of this row."""
    refusal: str | None = None
    """Why a run would refuse the row; null where it would not."""


class PreviewWarning(Resource):
    """Something to know about the samples as tokens."""

    code: str
    """A stable name of the warning, for programs."""
    message: str
    """One sentence for people."""


class Preview(Resource):
    """Rows of a data set as a run would train on them."""

    object: str = "preview"
    """The kind of the resource."""
    dataset: str
    """The id of the data set."""
    model: str
    """The model whose tokenizer was used, as it was given."""
    template: str
    """The template that makes text of the samples, `chat` or `alpaca`."""
    end: str
    """What ends an answer."""
    samples: int
    """The number of samples in the data set."""
    offset: int
    """The number of the first row that is shown, counted from 0."""
    rows: list[PreviewRow]
    """The rows, fewer than were asked for where they are long or the data set ends."""
    tried: int
    """The number of samples that were counted so far; the next preview goes on with the others."""
    counts: EncodingCounts
    """What is cut and left out of the samples that were counted."""
    refusal: str | None
    """Why a run would refuse the data set; null as far as is known."""
    warnings: list[PreviewWarning]
    """What is to be known about the template and the samples."""


class ProgressMessage(Resource):
    """How far the job is: at once when the stream begins, then at each change, once a second at most. It has no id."""

    type: str = "progress"
    """The type of the message."""
    status: JobStatus
    """The state of the job."""
    phase: PhaseView | None
    """What the engine does at present; null while no worker holds the job."""
    progress: Progress
    """How far the job has come."""
    eta: Eta | None
    """The time that is left, as of a job."""


class Project(Resource):
    """A project. A quota of null is none, and for queued jobs that of the settings; `/v1/quota` has figures and use."""

    id: str
    """The id of the project."""
    object: str = "project"
    """The kind of the resource."""
    description: str | None
    """What the project is for."""
    max_jobs_running: int | None
    """How many jobs of the project workers may hold at once; others wait in the queue."""
    max_jobs_queued: int | None
    """How many jobs of the project may be queued at once."""
    max_uploads: int | None
    """How many uploads of the project one API process takes at once."""
    max_storage_bytes: int | None
    """How many bytes the data sets, checkpoints and results of the project may take."""
    created_at: datetime
    """When the project was made."""


class ProjectPage(Resource):
    """Projects, by id."""

    object: str = "list"
    """The kind of the resource."""
    data: list[Project]
    """The items of the page."""
    has_more: bool
    """Whether there are items after this page."""
    first_id: str | None
    """The id of the first item; null for an empty page."""
    last_id: str | None
    """The id of the last item, which gets the next page as `after`; null for an empty page."""


class ProjectRetention(Resource):
    """The retention policy of a project."""

    object: str = "retention_policy"
    """The kind of the resource."""
    checkpoint_days: int | None
    """The days from the end of a job after which its checkpoints are deleted; null: never."""
    keep_last: int
    """The number of the last checkpoints that a job keeps."""
    keep_best: bool
    """Whether a job keeps its best student."""
    history_days: int | None
    """The days from the end of a job after which its events, metrics and logs are deleted; null: never."""
    job_days: int | None
    """The days from its end after which a job is deleted; null: never."""
    dataset_days: int | None
    """The days after which a data set that no job names is deleted; null: never."""


class Quarantine(Resource):
    """Why a worker claims nothing until a check of itself succeeds."""

    reason: str
    """What is wrong with the worker, in one sentence."""
    since: datetime
    """When the worker was quarantined."""
    checks_at: datetime
    """When it checks itself again."""


class QueueTotals(Resource):
    """How busy the service is, all projects together."""

    queued: int
    """The number of jobs that wait for a worker."""
    running: int
    """The number of jobs that workers hold."""
    workers: int
    """The number of live workers that accept jobs."""
    workers_quarantined: int
    """The number of live workers that claim nothing until a check of themselves succeeds: `/v1/workers` says why."""


class QueuedJob(Resource):
    """A job that waits for a worker."""

    id: str
    """The id of the job."""
    object: str = "queued_job"
    """The kind of the resource."""
    name: str | None
    """The name that people call the job."""
    priority: int
    """The priority of the job in the queue; the job of the highest priority is claimed first."""
    device: str
    """The kind of device that the job asks for: `cpu`, `cuda`, or `auto` for either."""
    memory_bytes: int | None
    """The device memory that the job needs, as planned; null where that is not known."""
    position: int
    """The position in the queue of all projects; the job at 1 is claimed next."""
    ahead: int
    """The number of jobs, of all projects, that are claimed before this one."""
    reason: QueueReason
    """Why the job waits, as in `queue` of the job. More reasons may be added."""
    until: datetime | None
    """When a job that is backing off may be claimed; null for any other reason."""
    starts_at: datetime | None
    """When the job is expected to start, estimated from running and recently ended jobs; null where too little is
    known."""
    created_at: datetime
    """When the job was submitted."""


class QueuePage(Resource):
    """The queued jobs of the project, the next one first."""

    object: str = "list"
    """The kind of the resource."""
    data: list[QueuedJob]
    """The items of the page."""
    has_more: bool
    """Whether there are items after this page."""
    first_id: int | None
    """The position of the first job of the page; null for an empty page."""
    last_id: int | None
    """The position of the last job of the page, which gets the next page as `after`; null for an empty page."""
    totals: QueueTotals | None = None
    """How busy the service is, all projects together."""


class QuotaUse(Resource):
    """How much of something a project has, and how much it may."""

    used: int
    """How much the project has now."""
    limit: int | None
    """How much it may have; null: any amount."""


class Quota(Resource):
    """The quotas of a project."""

    object: str = "quota"
    """The kind of the resource."""
    project: str
    """The project of the sender."""
    jobs_running: QuotaUse
    """Jobs that workers hold. A job beyond waits in the queue, with the reason `project_quota`."""
    jobs_queued: QuotaUse
    """Jobs that wait for a worker. A submission beyond is refused as `quota_exceeded`."""
    uploads: QuotaUse
    """Uploads in progress at the API process that answers. One beyond is refused as `quota_exceeded`."""
    storage_bytes: QuotaUse
    """Bytes of data sets, checkpoints and results. An upload or submission beyond is refused as `quota_exceeded`; a
    job that runs goes on."""
    requests_per_minute: int | None
    """Requests that one key may send in a minute, beyond which it gets 429 `rate_limited`; null: any number."""


class Readiness(Resource):
    """The answer of the probe of readiness."""

    status: str = "ok"
    """Always `ok`: a failing probe answers with a problem."""
    wake_up: WakeUp
    """Whether workers are woken for queued jobs. `no_scheduler`: none has shown its liveness for as long as a lease
    lasts; `broker_unreachable`: no scheduler reaches the broker. Requests are served all the same, and jobs wait."""


class RetentionPreview(Resource):
    """What a policy would delete now."""

    object: str = "retention_preview"
    """The kind of the resource."""
    jobs: list[ExpiredJob]
    """The jobs of which something would be deleted, oldest first."""
    datasets: list[ExpiredDataset]
    """The data sets that would be deleted, oldest first; with the first page alone, and 100 at most."""
    size_bytes: int
    """The size of all these files, in bytes."""
    has_more: bool
    """Whether there are ended jobs that this page has not looked at."""
    last_id: str | None
    """The last ended job that was looked at, which gets the next page as `after`; null where there was none."""


class Scheduler(Resource):
    """A scheduler."""

    id: str
    """The name of the scheduler; one that starts again has another."""
    object: str = "scheduler"
    """The kind of the resource."""
    leads: bool
    """Whether it does what is due; the others wait to take its place."""
    reaches_broker: bool
    """Whether the broker answered at its last heartbeat."""
    version: str | None
    """The version of the service that the scheduler runs; null for one that does not tell."""
    generation: int | None
    """The generation of that version (`/version`)."""
    seen_at: datetime
    """The time of its last heartbeat; one that ended is listed for a day."""


class SchedulerPage(Resource):
    """Schedulers, by name."""

    object: str = "list"
    """The kind of the resource."""
    data: list[Scheduler]
    """The items of the page."""
    has_more: bool
    """Whether there are items after this page."""
    first_id: str | None
    """The id of the first item; null for an empty page."""
    last_id: str | None
    """The id of the last item, which gets the next page as `after`; null for an empty page."""


class Stage(Resource):
    """A stage of a job: planned at submission, then as the engine reports it."""

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
    status: StageStatus
    """The state of the stage."""
    started_at: datetime | None
    """When the stage began; null before it."""
    finished_at: datetime | None
    """When the stage ended; null until then."""
    evaluation: dict[str, Any] | None
    """The scores on the validation samples at the end of the stage; null before it, or without such samples."""


class StageList(Resource):
    """All stages of a job, in order."""

    object: str = "list"
    """The kind of the resource."""
    data: list[Stage]
    """The stages."""


class TrackerProblem(Resource):
    """Why a tracker was sent nothing lately."""

    code: str
    """A stable name of the reason, for programs."""
    message: str
    """One sentence for people."""


class Tracker(Resource):
    """A tracker of a job, and what it has of the job's metrics."""

    kind: TrackerKind
    """The kind of tracker."""
    options: dict[str, Any]
    """What the job asks of it."""
    state: TrackerState
    """`open` while more may be sent; `closed` once the job has ended and the tracker has all of it; `failed` where
    it was given up."""
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

    object: str = "list"
    """The kind of the resource."""
    data: list[Tracker]
    """The trackers."""


class UsageTotals(Resource):
    """What the project used on all days."""

    chat_requests: int
    """The number of conversations that workers answered, also those that failed or were cancelled on the way."""
    chat_prompt_tokens: int
    """The tokens of the conversations that models read."""
    chat_completion_tokens: int
    """The tokens of the answers."""
    gpu_seconds: float
    """The seconds on GPUs. Every attempt counts from its claim to its end, however it ended; one that runs counts up
    to now."""
    cpu_seconds: float
    """The seconds of attempts that computed on the CPU of their worker, whatever number of cores that had."""
    other_seconds: float
    """The seconds of attempts from before the service noted on which device an attempt computes."""


class Usage(Resource):
    """What the project used, day by day. It is kept when jobs are deleted."""

    object: str = "usage"
    """The kind of the resource."""
    project: str
    """The project."""
    since: date
    """The first day, inclusive."""
    until: date
    """The last day, inclusive."""
    storage_bytes: int
    """The bytes that the checkpoints, data sets and results of the project take now."""
    totals: UsageTotals
    """The time on devices and the conversations of all days."""
    cost: Cost | None
    """What the time on GPUs costs; null where the service has no rate."""
    days: list[DayUsage]
    """The days on which anything was used, oldest first."""


class Version(Resource):
    """What runs here."""

    version: str
    """The version of the service."""
    commit: str | None
    """The commit of the source (`POCL_COMMIT`, or that of the checkout); null where it is not known."""
    schema_revision: str
    """The newest revision of the database's schema that this version knows, and needs: `/readyz` says whether the
    database has it."""
    generation: int
    """What changes with each release that changes the schema, rows or messages: processes of two neighbouring
    generations work together, others refuse to start."""
    api: str = "v1"
    """The version of the contract: the first part of the paths of all resources."""


class Webhook(Resource):
    """An address that messages about jobs are posted to."""

    id: str
    """The id of the webhook."""
    object: str = "webhook"
    """The kind of the resource."""
    url: str
    """Where messages are posted to."""
    description: str
    """What people call the webhook."""
    events: list[str] | None
    """The types of messages that are sent; null: all. During an upgrade they may be some of a newer version."""
    labels: dict[str, str]
    """Labels that a job must have, all of them, for messages about it to be sent."""
    status: WebhookStatus
    """Whether messages are delivered."""
    disabled_reason: WebhookDisabledReason | None
    """Why nothing is delivered: `by_client`; `gone`, the receiver answered 410; `failing`, every attempt of some
    days failed. Null while the webhook is enabled."""
    disabled_at: datetime | None
    """When it was disabled."""
    failures: int
    """The number of attempts in a row that failed."""
    failing_since: datetime | None
    """When the first of them was; null where the last attempt succeeded."""
    delivered_at: datetime | None
    """When the last attempt succeeded; null: none did."""
    failed_at: datetime | None
    """When the last failed attempt was; null: none failed."""
    former_secret_until: datetime | None
    """Until when messages are signed with the former secret too; null: they are not."""
    created_at: datetime
    """When the webhook was made."""
    updated_at: datetime
    """When a client last changed it."""


class WebhookPage(Resource):
    """Webhooks, newest first."""

    object: str = "list"
    """The kind of the resource."""
    data: list[Webhook]
    """The items of the page."""
    has_more: bool
    """Whether there are items after this page."""
    first_id: str | None
    """The id of the first item; null for an empty page."""
    last_id: str | None
    """The id of the last item, which gets the next page as `after`; null for an empty page."""


class WebhookWithSecret(Resource):
    """A webhook with its secret, which is shown once."""

    id: str
    """The id of the webhook."""
    object: str = "webhook"
    """The kind of the resource."""
    url: str
    """Where messages are posted to."""
    description: str
    """What people call the webhook."""
    events: list[str] | None
    """The types of messages that are sent; null: all. During an upgrade they may be some of a newer version."""
    labels: dict[str, str]
    """Labels that a job must have, all of them, for messages about it to be sent."""
    status: WebhookStatus
    """Whether messages are delivered."""
    disabled_reason: WebhookDisabledReason | None
    """Why nothing is delivered: `by_client`; `gone`, the receiver answered 410; `failing`, every attempt of some
    days failed. Null while the webhook is enabled."""
    disabled_at: datetime | None
    """When it was disabled."""
    failures: int
    """The number of attempts in a row that failed."""
    failing_since: datetime | None
    """When the first of them was; null where the last attempt succeeded."""
    delivered_at: datetime | None
    """When the last attempt succeeded; null: none did."""
    failed_at: datetime | None
    """When the last failed attempt was; null: none failed."""
    former_secret_until: datetime | None
    """Until when messages are signed with the former secret too; null: they are not."""
    created_at: datetime
    """When the webhook was made."""
    updated_at: datetime
    """When a client last changed it."""
    secret: str
    """The secret that messages are signed with: `whsec_` and base64, as libraries of Standard Webhooks take it. Keep
    it: it is not shown again."""


class Worker(Resource):
    """A worker."""

    id: str
    """The name of the worker; a worker that starts again has another."""
    object: str = "worker"
    """The kind of the resource."""
    state: WorkerState
    """A `draining` worker still holds a job, a `drained` one holds none; a `quarantined` one claims none because it
    found itself sick, or because attempt after attempt failed on it; `lost` means that the worker has been silent
    for longer than a lease lasts."""
    quarantine: Quarantine | None
    """Why the worker is quarantined; null unless it is."""
    devices: list[Device]
    """The devices that the worker computes on."""
    job: str | None
    """The job that the worker holds; null if it holds none, or one of another project."""
    version: str | None
    """The version of the service that the worker runs; null for one that does not tell."""
    generation: int | None
    """The generation of that version: workers of the API's own and of the one before work with it (`/version`)."""
    started_at: datetime
    """When the worker registered."""
    seen_at: datetime
    """When the worker last showed its liveness."""


class WorkerPage(Resource):
    """Workers, by name."""

    object: str = "list"
    """The kind of the resource."""
    data: list[Worker]
    """The items of the page."""
    has_more: bool
    """Whether there are items after this page."""
    first_id: str | None
    """The id of the first item; null for an empty page."""
    last_id: str | None
    """The id of the last item, which gets the next page as `after`; null for an empty page."""
