"""States and reasons in the words of the pages."""

from typing import Final

from domain.jobs.queue import QueueReason
from domain.jobs.states import TERMINAL, JobStatus
from domain.workers.models import WorkerState

STATE_GROUPS: Final[dict[str, tuple[JobStatus, ...]]] = {
    "active": tuple(status for status in JobStatus if status not in {*TERMINAL, JobStatus.QUEUED, JobStatus.PAUSED}),
    "queued": (JobStatus.QUEUED,),
    "paused": (JobStatus.PAUSED,),
    "succeeded": (JobStatus.SUCCEEDED,),
    "failed": (JobStatus.FAILED,),
    "cancelled": (JobStatus.CANCELLED,),
}
"""The states that the list of jobs can be narrowed to, by the name of the filter."""

QUEUE_REASONS: Final[dict[QueueReason, str]] = {
    "jobs_ahead": "Other jobs are claimed first.",
    "waiting_for_worker": "It is next: the first worker that is free takes it.",
    "no_worker": "No worker is live and accepts jobs: start one.",
    "no_worker_fits": "No live worker has the device or the memory that it needs.",
    "workers_quarantined": "The workers that have what it needs are quarantined: see why below.",
    "backing_off": "An attempt failed by a fault that may pass; the next one waits.",
    "broker_unreachable": "No scheduler can wake a worker: the broker does not answer.",
    "project_quota": "The project runs as many jobs as it may at a time.",
}
"""Why a job waits, in one sentence each."""

WORKER_STATES: Final[dict[WorkerState, str]] = {
    "idle": "waits for a job",
    "busy": "works on a job",
    "draining": "ends its job and takes no other",
    "drained": "takes no jobs",
    "quarantined": "takes no jobs until a check of itself succeeds",
    "lost": "has been silent for longer than a lease lasts",
}
"""What a worker does, in a few words."""
