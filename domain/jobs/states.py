"""The state machine of a job: its states, every legal transition, what an attempt brings about, and end reasons.

queued -> preparing -> running -> succeeded | failed
preparing, running -> recovering -> queued | failed        the lease of the worker expired, its engine crashed, or it
                                                           failed by a fault that may pass: see domain/jobs/retries.py
preparing, running -> queued                               the worker shuts down and releases the job
preparing, running -> pausing -> paused -> queued          pause and resume, by the client
queued, paused -> cancelled                                cancel, by the client: at once
preparing, running, pausing, recovering -> cancelling -> cancelled
queued -> failed                                           the job waited for longer than its max_wait_seconds
"""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final, Literal, Self

_MAX_TEXT_LENGTH = 2000

Fault = Literal["user", "capacity", "system"]
JobAction = Literal["cancel", "pause", "resume", "retry", "delete"]
PauseAt = Literal["now", "stage_end"]


# --- The states of a job and its stages -----------------------------------------------------------------


class JobStatus(StrEnum):
    QUEUED = "queued"
    """The job waits for a worker."""
    PREPARING = "preparing"
    """A worker holds the job and loads models, ranks samples or caches the teacher."""
    RUNNING = "running"
    """The student is trained."""
    PAUSING = "pausing"
    """The client asked for a pause; the worker saves a checkpoint."""
    PAUSED = "paused"
    """The job is saved, and waits until the client resumes it."""
    RECOVERING = "recovering"
    """The lease expired, or the engine crashed or failed by a fault that may pass; the job goes back into the queue, or
    fails."""
    CANCELLING = "cancelling"
    """The client cancelled the job; its worker has not yet settled the attempt."""
    CANCELLED = "cancelled"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class StageStatus(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


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
    # The engine may end by itself before the request to pause reaches it.
    JobStatus.PAUSING: frozenset({JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLING}),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.RECOVERING: frozenset({JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLING}),
    JobStatus.CANCELLING: frozenset({JobStatus.CANCELLED}),
    JobStatus.CANCELLED: frozenset(),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
}
"""From each state, the states that a transition may lead to."""

TERMINAL: Final = frozenset(status for status, targets in TRANSITIONS.items() if not targets)
"""States that a job never leaves."""

HELD: Final = frozenset({JobStatus.PREPARING, JobStatus.RUNNING, JobStatus.PAUSING, JobStatus.CANCELLING})
"""States in which an attempt holds a lease on the job."""


_ENDED_ACTIONS: Final[tuple[JobAction, ...]] = ("delete", "retry")
ALLOWED_ACTIONS: Final[dict[JobStatus, tuple[JobAction, ...]]] = {
    JobStatus.QUEUED: ("cancel",),
    JobStatus.PREPARING: ("cancel", "pause"),
    JobStatus.RUNNING: ("cancel", "pause"),
    JobStatus.PAUSING: ("cancel", "pause"),
    JobStatus.PAUSED: ("cancel", "resume"),
    JobStatus.RECOVERING: ("cancel",),
    JobStatus.CANCELLING: ("cancel",),
    **dict.fromkeys(TERMINAL, _ENDED_ACTIONS),
}
"""The actions of a client that change a job in each state, or have been requested already. Whether it can be branched
off depends on its saved stages, and not on its state."""


def explain_illegal_transition(current: JobStatus, target: JobStatus) -> str | None:
    """Why there is no transition from `current` to `target`, as one sentence; null where there is one."""
    allowed = TRANSITIONS[current]
    if target in allowed:
        return None
    if not allowed:
        return f"The job has ended as {current}; an ended job never changes its state."
    return f"A job that is {current} cannot become {target}; it can become {', '.join(sorted(allowed))}."


# --- End reasons ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EndReason:
    """Why a job, or one attempt of it, ended. The status of an ended job follows from it."""

    code: str
    message: str
    """One sentence."""
    fault: Fault | None = None
    """Whose fault it is; null for success."""
    retryable: bool = False
    """Whether a retry of the job may end otherwise."""
    hint: str = ""
    """What the client can do about it."""

    def as_json(self) -> dict[str, Any]:
        """The value for a JSON column. Texts are cut to 2000 characters and lose NUL, which PostgreSQL cannot store."""
        values = asdict(self)
        return {
            key: value.replace("\0", "")[:_MAX_TEXT_LENGTH] if isinstance(value, str) else value
            for key, value in values.items()
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        return cls(**stored)


SUCCEEDED: Final = EndReason("succeeded", "The student is distilled.")
CANCELLED: Final = EndReason(
    "cancelled",
    "The job was cancelled.",
    "user",
    True,
    "Retry it to continue from its last checkpoint, or from the start where it has none.",
)
RELEASED: Final = EndReason(
    "released", "The worker gave the job back; its state is saved.", "system", True, "Nothing: it continues."
)
DATABASE_UNAVAILABLE: Final = EndReason(
    "database_unavailable",
    "The database did not answer before the engine could start.",
    "system",
    True,
    "Nothing: the job is queued again.",
)
ARTIFACT_STORE_UNAVAILABLE: Final = EndReason(
    "artifact_store_unavailable",
    "The artifact store did not answer.",
    "system",
    True,
    "Nothing: the job is queued again, and goes on from its last stored state.",
)
WORKER_LOST: Final = EndReason(
    "worker_lost",
    "The worker stopped answering.",
    "system",
    True,
    "Check the worker's machine and its memory, then retry the job from its last checkpoint.",
)
STALLED: Final = EndReason(
    "stalled",
    "The engine reported nothing for too long.",
    "system",
    True,
    "See the log; then retry the job from its last checkpoint.",
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
    "Retry it with a larger max_wait_seconds, or look at the workers at /v1/workers.",
)


def terminal_status_of(reason: EndReason) -> JobStatus:
    """The terminal state that an end reason stands for."""
    if reason.code == SUCCEEDED.code:
        return JobStatus.SUCCEEDED
    if reason.code == CANCELLED.code:
        return JobStatus.CANCELLED
    return JobStatus.FAILED


# --- Attempts -------------------------------------------------------------------------------------------


class AttemptEnd(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """The engine ended with a typed failure. Another attempt is made where its reason is retryable and the fault lies
    with the system or its capacity."""
    CANCELLED = "cancelled"
    """The engine stopped because the client cancelled the job."""
    RELEASED = "released"
    """The worker shuts down or the job pauses: the state is saved and the attempt does not count."""
    CRASHED = "crashed"
    """The engine died without a last event, by a signal for instance."""
    LOST = "lost"
    """The lease expired: the worker or its machine is gone."""


@dataclass(frozen=True)
class AttemptOutcome:
    """How an attempt ended and why, as its worker saw it."""

    end: AttemptEnd
    reason: EndReason
    worker_is_sick: bool = False
    """Whether the worker checked itself after the end and found that it cannot run any job."""

    @property
    def may_pass(self) -> bool:
        """Whether another attempt may end otherwise: the engine died, or failed by a retryable fault that is not the
        user's."""
        if self.end in (AttemptEnd.CRASHED, AttemptEnd.LOST):
            return True
        return self.end is AttemptEnd.FAILED and self.reason.retryable and self.reason.fault in ("capacity", "system")

    @classmethod
    def succeeded(cls) -> Self:
        return cls(AttemptEnd.SUCCEEDED, SUCCEEDED)

    @classmethod
    def failed(cls, reason: EndReason) -> Self:
        """The engine said why it ended; see :attr:`may_pass` for whether another attempt is made."""
        return cls(AttemptEnd.FAILED, reason)

    @classmethod
    def cancelled(cls) -> Self:
        return cls(AttemptEnd.CANCELLED, CANCELLED)

    @classmethod
    def released(cls, reason: EndReason = RELEASED) -> Self:
        """The worker gives the job back, because it shuts down for instance: the attempt does not count."""
        return cls(AttemptEnd.RELEASED, reason)

    @classmethod
    def crashed(cls, reason: EndReason) -> Self:
        """The engine died; `reason` becomes the job's if no attempt is left."""
        return cls(AttemptEnd.CRASHED, reason)


class StopRequest(StrEnum):
    """Why an attempt is to stop its engine."""

    CANCEL = "cancel"
    """The client cancels the job."""
    PAUSE = "pause"
    """The client pauses the job."""
    PAUSE_AT_STAGE_END = "pause_at_stage_end"
    """The client pauses the job once its stage has ended."""
    EXPIRE = "expire"
    """The job has used up its `max_runtime_seconds`."""
    RELEASE = "release"
    """The worker shuts down or is drained."""
    STALL = "stall"
    """The engine reports nothing any more, which its worker notices."""

    @property
    def waits_for_stage_end(self) -> bool:
        """Whether the engine goes on until its stage has ended; any other request may take this one's place."""
        return self is StopRequest.PAUSE_AT_STAGE_END

    @property
    def outcome(self) -> AttemptOutcome:
        """The outcome of an attempt whose engine stopped for this request, or was killed after the grace period."""
        match self:
            case StopRequest.CANCEL:
                return AttemptOutcome.cancelled()
            case StopRequest.PAUSE | StopRequest.PAUSE_AT_STAGE_END | StopRequest.RELEASE:
                # Where the engine was killed, an earlier training state is in the store all the same.
                return AttemptOutcome.released()
            case StopRequest.EXPIRE:
                return AttemptOutcome.failed(RUNTIME_EXCEEDED)
            case StopRequest.STALL:
                return AttemptOutcome.crashed(STALLED)


def transitions_after_attempt(
    current: JobStatus, outcome: AttemptOutcome, *, attempts_left: int
) -> tuple[JobStatus, ...]:
    """The transitions of a held job whose attempt ended: a path through :data:`TRANSITIONS`.

    Args:
        current: one of :data:`HELD`.
        attempts_left: attempts that may still be made after this one.
    """
    if current is JobStatus.CANCELLING:
        return (JobStatus.CANCELLED,)
    if outcome.end is AttemptEnd.SUCCEEDED:
        return (JobStatus.SUCCEEDED,)
    # An engine that stopped for a cancel that the row does not know of has saved its state all the same.
    if outcome.end in (AttemptEnd.RELEASED, AttemptEnd.CANCELLED):
        return (JobStatus.PAUSED,) if current is JobStatus.PAUSING else (JobStatus.QUEUED,)
    if not outcome.may_pass:
        return (JobStatus.FAILED,)
    if current is JobStatus.PAUSING:
        return (JobStatus.PAUSED,) if attempts_left > 0 else (JobStatus.FAILED,)
    return (JobStatus.RECOVERING, JobStatus.QUEUED if attempts_left > 0 else JobStatus.FAILED)
