"""The spans of an attempt: itself, its phases and its stages, at the times of the engine's events."""

from datetime import UTC, datetime
from typing import Final

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from domain.jobs.leases import Claim
from domain.jobs.states import AttemptEnd, AttemptOutcome
from domain.tracing import context_of
from pocl.events import (
    EventEnvelope,
    PhaseChanged,
    RunEnded,
    RunFinished,
    StageFinished,
    StageStarted,
    Warned,
)

_ERRORS: Final = frozenset({AttemptEnd.FAILED, AttemptEnd.CRASHED, AttemptEnd.LOST})
_MAX_WARNINGS: Final = 100


class AttemptTrace:
    """Makes the spans of one attempt, as children of the span of the request that made the job.

    Args:
        tracer: makes spans; one that makes none costs nothing.
        worker: the name of the worker.
    """

    def __init__(self, tracer: Tracer, claim: Claim, worker: str) -> None:
        self._tracer = tracer
        self._span = tracer.start_span(
            "attempt",
            context_of(claim.traceparent),
            SpanKind.CONSUMER,
            {
                "pocl.job_id": claim.job_id,
                "pocl.attempt": claim.attempt,
                "pocl.project": claim.project,
                "pocl.worker": worker,
                **({} if claim.request_id is None else {"pocl.request_id": claim.request_id}),
            },
        )
        self._context = trace.set_span_in_context(self._span)
        self._is_recording = self._span.is_recording()
        self._phase: Span | None = None
        self._stage: Span | None = None
        self._warnings = 0

    def add(self, envelope: EventEnvelope) -> None:
        """Follow an event of the engine."""
        if not self._is_recording:
            return
        at, event = _nanoseconds(envelope.at), envelope.event
        match event:
            case PhaseChanged():
                self._end_phase(at)
                attributes = {} if event.stage is None else {"pocl.stage": event.stage}
                self._phase = self._start(f"phase {event.phase}", at, {"pocl.phase": event.phase, **attributes})
            case StageStarted():
                self._end_stage(at)
                self._stage = self._start(
                    f"stage {event.stage}",
                    at,
                    {
                        "pocl.stage": event.stage,
                        "pocl.samples": event.samples,
                        "pocl.temperature": event.temperature,
                        "pocl.kd_weight": event.kd_weight,
                        "pocl.first_step": event.first_step,
                    },
                )
            case StageFinished():
                if self._stage is not None:
                    self._stage.set_attributes({"pocl.last_step": event.step, "pocl.epochs": event.epochs})
                self._end_stage(at)
            case Warned():
                self._warnings += 1
                if self._warnings <= _MAX_WARNINGS:
                    self._span.add_event("warning", {"pocl.code": event.code}, at)
            case RunFinished() | RunEnded():
                self._end_stage(at)
                self._end_phase(at)
            case _:
                pass

    def end(self, outcome: AttemptOutcome) -> None:
        """End the attempt's span, and those within it that the engine left open."""
        now = _nanoseconds(datetime.now(UTC))
        self._end_stage(now)
        self._end_phase(now)
        reason = outcome.reason
        self._span.set_attributes(
            {"pocl.end": outcome.end, "pocl.code": reason.code, "pocl.fault": reason.fault or "none"}
        )
        if outcome.end in _ERRORS:
            self._span.set_status(Status(StatusCode.ERROR, reason.code))
        self._span.end(now)

    def _start(self, name: str, at: int, attributes: dict[str, str | int | float]) -> Span:
        return self._tracer.start_span(name, self._context, attributes=attributes, start_time=at)

    def _end_phase(self, at: int) -> None:
        if self._phase is not None:
            self._phase.end(at)
            self._phase = None

    def _end_stage(self, at: int) -> None:
        if self._stage is not None:
            self._stage.end(at)
            self._stage = None


def _nanoseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000) * 1000
