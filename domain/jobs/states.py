"""The life of a job: its states, every allowed move, and why a job ended.

queued -> preparing -> running -> succeeded | failed
preparing, running -> recovering -> queued | failed        the worker or its engine was lost
preparing, running -> queued                               the worker shuts down and gives the job back
preparing, running -> pausing -> paused -> queued          asked by the client
queued, paused -> cancelled                                asked by the client, at once
queued -> failed                                           it waited for a worker longer than it may
preparing, running, pausing, recovering -> cancelling -> cancelled
"""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final, Literal, Self

_TEXT_LENGTH = 2000

Fault = Literal["user", "capacity", "system"]
PauseAt = Literal["now", "stage_end"]


class JobStatus(StrEnum):
    QUEUED = "queued"
    """Waits for a worker."""
    PREPARING = "preparing"
    """A worker holds it and loads models, ranks samples or caches the teacher."""
    RUNNING = "running"
    """The student is trained."""
    PAUSING = "pausing"
    """Asked to pause; the worker saves a checkpoint."""
    PAUSED = "paused"
    """Saved, and held back until it is resumed."""
    RECOVERING = "recovering"
    """The worker was lost; on its way back to the queue, or to failure."""
    CANCELLING = "cancelling"
    """Asked to end; the worker has not yet let go."""
    CANCELLED = "cancelled"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class StageStatus(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class AttemptEnd(StrEnum):
    """How a worker's hold on a job ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """The engine ended with a typed failure: another attempt would end alike."""
    CANCELLED = "cancelled"
    """The engine stopped because the client asked."""
    RELEASED = "released"
    """The worker shuts down or the job pauses: the state is saved and the attempt is not spent."""
    CRASHED = "crashed"
    """The engine died without a word, by a signal for instance."""
    LOST = "lost"
    """The lease expired: the worker or its machine is gone."""


TRANSITIONS: Final[dict[JobStatus, frozenset[JobStatus]]] = {
    JobStatus.QUEUED: frozenset({JobStatus.PREPARING, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.PREPARING: frozenset(
        {
            JobStatus.RUNNING,
            JobStatus.SUCCEEDED,
            JobStatus.FAILED,
            JobStatus.RECOVERING,
            JobStatus.QUEUED,
            JobStatus.PAUSING,
            JobStatus.CANCELLING,
        }
    ),
    JobStatus.RUNNING: frozenset(
        {
            JobStatus.SUCCEEDED,
            JobStatus.FAILED,
            JobStatus.RECOVERING,
            JobStatus.QUEUED,
            JobStatus.PAUSING,
            JobStatus.CANCELLING,
        }
    ),
    # The engine may end by itself before it notices that it was asked to pause.
    JobStatus.PAUSING: frozenset({JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLING}),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.RECOVERING: frozenset({JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLING}),
    JobStatus.CANCELLING: frozenset({JobStatus.CANCELLED}),
    JobStatus.CANCELLED: frozenset(),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
}
"""From each state, the states it may move to."""

TERMINAL: Final = frozenset(status for status, targets in TRANSITIONS.items() if not targets)
"""States that a job never leaves."""

HELD: Final = frozenset({JobStatus.PREPARING, JobStatus.RUNNING, JobStatus.PAUSING, JobStatus.CANCELLING})
"""States in which an attempt holds a lease on the job."""


@dataclass(frozen=True)
class EndReason:
    """Why a job, or one attempt of it, ended. The status of an ended job follows from it."""

    code: str
    message: str
    """One sentence."""
    fault: Fault | None = None
    """Null for success."""
    retryable: bool = False
    """Whether the same job, submitted again, may end otherwise."""
    hint: str = ""
    """What to do about it."""

    def as_json(self) -> dict[str, Any]:
        """For a JSON column; texts are cut to 2000 characters and lose NUL, which PostgreSQL cannot store."""
        values = asdict(self)
        return {
            key: value.replace("\0", "")[:_TEXT_LENGTH] if isinstance(value, str) else value
            for key, value in values.items()
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        return cls(**stored)


SUCCEEDED: Final = EndReason("succeeded", "The student is distilled.")
CANCELLED: Final = EndReason(
    "cancelled", "The job was cancelled.", "user", True, "Submit it again to run it from the start."
)
RELEASED: Final = EndReason(
    "released", "The worker gave the job back; its state is saved.", "system", True, "Nothing: it continues."
)
WORKER_LOST: Final = EndReason(
    "worker_lost",
    "The worker stopped answering.",
    "system",
    True,
    "Check the worker's machine and its memory, then submit the job again.",
)

RUNTIME_EXCEEDED: Final = EndReason(
    "max_runtime_exceeded",
    "The job ran for as long as it may; its state is saved.",
    "user",
    True,
    "Retry it from its last checkpoint with a larger max_runtime_seconds.",
)
WAIT_EXCEEDED: Final = EndReason(
    "max_wait_exceeded",
    "No worker took the job within max_wait_seconds.",
    "capacity",
    True,
    "Submit it again with a longer wait, or look at the workers at /v1/workers.",
)


def explain_illegal_transition(current: JobStatus, wanted: JobStatus) -> str | None:
    """Why a job may not move from `current` to `wanted`, as one sentence; null where it may."""
    allowed = TRANSITIONS[current]
    if wanted in allowed:
        return None
    if not allowed:
        return f"The job has ended as {current}; an ended job never changes its state."
    return f"A job that is {current} cannot become {wanted}; it can become {', '.join(sorted(allowed))}."


def terminal_status_of(reason: EndReason) -> JobStatus:
    """The final state that an end reason stands for."""
    if reason.code == SUCCEEDED.code:
        return JobStatus.SUCCEEDED
    if reason.code == CANCELLED.code:
        return JobStatus.CANCELLED
    return JobStatus.FAILED


def transitions_after_attempt(current: JobStatus, end: AttemptEnd, *, attempts_left: int) -> tuple[JobStatus, ...]:
    """The moves of a held job whose attempt ended: a path through :data:`TRANSITIONS`.

    Args:
        current: one of :data:`HELD`.
        attempts_left: attempts that may still be spent after this one.
    """
    if current is JobStatus.CANCELLING:
        return (JobStatus.CANCELLED,)
    if end is AttemptEnd.SUCCEEDED:
        return (JobStatus.SUCCEEDED,)
    if end is AttemptEnd.FAILED:
        return (JobStatus.FAILED,)
    # An engine that stopped for a cancel that the row does not know of has saved its state all the same.
    if end in (AttemptEnd.RELEASED, AttemptEnd.CANCELLED):
        return (JobStatus.PAUSED,) if current is JobStatus.PAUSING else (JobStatus.QUEUED,)
    if current is JobStatus.PAUSING:
        return (JobStatus.PAUSED,) if attempts_left > 0 else (JobStatus.FAILED,)
    return (JobStatus.RECOVERING, JobStatus.QUEUED if attempts_left > 0 else JobStatus.FAILED)
