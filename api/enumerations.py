"""The enumerations that the code spells as literals, as the OpenAPI document names and describes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Enumeration:
    """An enumeration of strings."""

    description: str
    """One sentence for people."""
    values: tuple[str, ...]


ENUMERATIONS: Final[Mapping[str, Enumeration]] = {
    "BadRows": Enumeration(
        "What becomes of rows that are no samples: the file is refused, or they are left out and counted.",
        ("refuse", "skip"),
    ),
    "ChatRole": Enumeration("Who says a message.", ("system", "developer", "user", "assistant")),
    "CheckpointKind": Enumeration(
        "What a checkpoint holds: a state to go on from, or the weights after a stage, the best one, or the last.",
        ("training", "stage", "best", "final"),
    ),
    "DatasetStatus": Enumeration(
        "Whether the file of a data set has been read: only one that is ready can be trained on.",
        ("validating", "ready", "refused"),
    ),
    "DecayedParameters": Enumeration(
        "Which parameters weight decay acts on: matrices alone, or also biases and norms.", ("matrices", "all")
    ),
    "DeliveryError": Enumeration(
        "Why an attempt to deliver a message failed.",
        (
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
        ),
    ),
    "DeliveryFailure": Enumeration(
        "Why no further attempt is made at a message.", ("attempts_exhausted", "expired", "backlog_full")
    ),
    "DeliveryStatus": Enumeration("Whether a message has arrived.", ("pending", "delivered", "failed")),
    "DeviceKind": Enumeration("The kind of a device.", ("cpu", "cuda")),
    "DeviceRequest": Enumeration(
        "The kind of the device that a job runs on; with `auto` the worker chooses.", ("auto", "cpu", "cuda")
    ),
    "DrainMode": Enumeration(
        "What becomes of the job of a worker that drains: it is finished first, or saved and put back into the queue.",
        ("finish", "release"),
    ),
    "EasiestEnd": Enumeration("Which values of a column are the easiest samples.", ("lowest", "highest")),
    "EvaluatedModel": Enumeration(
        "The model that was scored.", ("teacher", "initial", "epoch", "stage", "best", "final")
    ),
    "ExportDtype": Enumeration("The format of exported weights.", ("fp32", "bf16", "fp16", "as_loaded")),
    "Fault": Enumeration(
        "Whose fault a failure is: the client's input, a limit of the machine, or the service.",
        ("user", "capacity", "system"),
    ),
    "FileFormat": Enumeration("The format of a file of samples.", ("jsonl", "json", "csv", "parquet")),
    "FinishReason": Enumeration("Why an answer ended: by itself, or at its limit of tokens.", ("stop", "length")),
    "ForecastBasis": Enumeration("What a forecast was computed from.", ("past_jobs", "assumption")),
    "Generator": Enumeration("What generates the answers that samples are ranked by.", ("engine", "vllm")),
    "GgufFormat": Enumeration("The format of matrices in a GGUF file.", ("f32", "f16", "q8_0")),
    "JobFile": Enumeration(
        "A file of a job, besides its checkpoints.", ("spec", "ranking", "answers", "result", "report")
    ),
    "KeyScope": Enumeration(
        "What a key may do: read, also submit and change, or also administer the project.", ("read", "submit", "admin")
    ),
    "LastBatch": Enumeration(
        "What becomes of the samples of an epoch that do not fill a batch.", ("partial", "even", "drop")
    ),
    "ModelRole": Enumeration("What a model is for in a job.", ("student", "teacher", "ranker")),
    "ModelState": Enumeration("Whether a model on the machine can be used.", ("usable", "refused", "not_read")),
    "OptimizerAtStage": Enumeration("Whether optimiser and schedule begin anew at each stage.", ("restart", "carry")),
    "PassPhase": Enumeration(
        "A phase that makes a pass over samples.", ("ranking", "evaluating", "caching_teacher", "training")
    ),
    "PassSubject": Enumeration("The model that a pass over samples scores.", ("teacher", "initial", "epoch", "stage")),
    "PauseAt": Enumeration("When a job pauses: at once, or at the end of its stage.", ("now", "stage_end")),
    "Phase": Enumeration(
        "What the engine is doing.",
        ("validating", "loading", "ranking", "caching_teacher", "training", "evaluating", "exporting"),
    ),
    "Precision": Enumeration("The format of matrix products.", ("auto", "fp32", "bf16")),
    "PresetName": Enumeration(
        "The name of a preset: the defaults of all fields of a specification.", ("paper", "pocl_official", "quick")
    ),
    "QueueReason": Enumeration(
        "Why a queued job does not run yet.",
        (
            "jobs_ahead",
            "waiting_for_worker",
            "no_worker",
            "no_worker_fits",
            "workers_quarantined",
            "backing_off",
            "broker_unreachable",
            "project_quota",
        ),
    ),
    "RandomFamily": Enumeration("The architecture of a random model.", ("gpt2", "opt", "llama", "qwen2")),
    "RetryFrom": Enumeration(
        "Where a retry begins: at the newest training state, at the end of a stage, or at the start.",
        ("checkpoint", "stage", "start"),
    ),
    "RowForm": Enumeration(
        "The form of the rows of a file.",
        ("instruction", "messages", "sharegpt", "prompt_completion", "query_response", "prompt_only", "sample"),
    ),
    "StageMetric": Enumeration("The score by which stages are compared.", ("rouge_l", "exact_match")),
    "TemplateChoice": Enumeration(
        "How a sample becomes a text: by the chat template, by the Alpaca prompt, or by the former where there is one.",
        ("auto", "chat", "alpaca"),
    ),
    "TrackerFileKind": Enumeration("A tracker that writes a file.", ("tensorboard", "wandb")),
    "TrackerKind": Enumeration("A tool to which metrics are forwarded.", ("tensorboard", "mlflow", "wandb")),
    "TrackerState": Enumeration("Whether a tracker still takes metrics.", ("open", "closed", "failed")),
    "WakeUp": Enumeration(
        "Whether idle workers are told of new jobs at once; if not, they look for them.",
        ("ok", "no_scheduler", "broker_unreachable"),
    ),
    "WandbMode": Enumeration(
        "Whether runs go to the server of Weights & Biases at once, or into files.", ("online", "offline")
    ),
    "WebhookDisabledReason": Enumeration(
        "Why a webhook gets no messages: the client disabled it, its address answered 410, or every attempt failed.",
        ("by_client", "gone", "failing"),
    ),
    "WebhookStatus": Enumeration("Whether a webhook gets messages.", ("enabled", "disabled")),
    "Work": Enumeration("Work on a device that is measured.", ("generation", "scoring", "hidden_states", "training")),
    "WorkerFit": Enumeration(
        "Whether some worker can run the job.", ("fits", "no_worker", "no_worker_fits", "workers_quarantined")
    ),
    "WorkerState": Enumeration(
        "What a worker is doing.", ("idle", "busy", "draining", "drained", "quarantined", "lost")
    ),
}
"""By the name of each."""

DESCRIPTIONS: Final[Mapping[str, str]] = {
    "JobStatus": "The state of a job; `succeeded`, `failed` and `cancelled` are its ends.",
    "StageStatus": "The state of a stage.",
    "KDMethod": "The divergence that is minimised.",
    "JsonValue": "Any JSON value.",
}
"""What schemas are that have no docstring: enumeration classes, and JSON itself."""
