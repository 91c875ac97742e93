"""A job as lines: what happened, and how far it is."""

from typing import TYPE_CHECKING, Any

import typer

from pocl_client.cli.output import StatusLine, text_of
from pocl_client.models import Event, Job, ProgressMessage

if TYPE_CHECKING:
    from pocl_client import Client

_SUBJECTS = {"initial": "untrained student", "best": "best student", "final": "final student"}
_TYPES = ("state", "stage", "evaluation", "checkpoint", "warning", "run", "progress")


def watch_job(client: "Client", job_id: str) -> Job:
    """Print what happens to a job on standard error until it has ended, with its progress below on a terminal; the job
    as it is then."""
    line = StatusLine()
    try:
        for message in client.jobs.stream(job_id, types=_TYPES):
            if isinstance(message.content, ProgressMessage):
                line.update(progress_text(message.content))
            elif isinstance(message.content, Event) and (text := event_text(message.content)):
                line.clear()
                typer.echo(text, err=True)
    finally:
        line.clear()
    return client.jobs.wait(job_id)


def progress_text(job: Job | ProgressMessage) -> str:
    """How far a job is, on one line."""
    parts = [f"{job.progress.percent:3.0f} %"]
    phase = job.phase
    if phase is None:
        parts.append(job.status)
    elif phase.total:
        parts.append(f"{phase.name} {phase.done or 0}/{phase.total} {phase.unit or ''}".rstrip())
    else:
        parts.append(phase.name)
    if job.progress.step:
        parts.append(f"step {job.progress.step}/{job.progress.total_steps}")
    if job.progress.stage is not None:
        parts.append(f"stage {job.progress.stage + 1}/{job.progress.stages}")
    if job.progress.tokens_per_second:
        parts.append(f"{job.progress.tokens_per_second:.0f} tokens/s")
    if job.eta is not None:
        parts.append(f"{job.eta.seconds:.0f} s left")
    return "  ".join(parts)


def event_text(event: Event) -> str | None:
    """An event of the history on one line; null for what people need not see. Stages count from 1 here."""
    text = _describe(event.type, event.data)
    return None if text is None else f"{event.at.astimezone():%H:%M:%S}  {text_of(text)}"


def _describe(type_: str, data: dict[str, Any]) -> str | None:
    match type_:
        case "status":
            reason = data.get("reason") or {}
            code = None if reason.get("code") == data.get("to") else reason.get("code")
            sentence = " ".join(filter(None, (reason.get("message"), reason.get("hint"))))
            return ": ".join(filter(None, (data.get("to"), code, sentence)))
        case "phase":
            return None if data.get("phase") == "training" else str(data.get("phase"))
        case "stage_started":
            temperature = f"temperature {data.get('temperature', 1):.3g}"
            return f"stage {_number(data)}: {data.get('samples')} samples, {temperature}, {data.get('steps')} steps"
        case "evaluated":
            stage = f" {_number(data)}" if data.get("stage") is not None else ""
            scores = f"ROUGE-L {data.get('rouge_l', 0):.2f}, cross-entropy {data.get('cross_entropy', 0):.3f}"
            subject = _SUBJECTS.get(data.get("subject", ""), data.get("subject"))
            return f"{subject}{stage} on {data.get('rows')} {data.get('split')} samples: {scores}"
        case "checkpoint":
            return f"checkpoint {data.get('id')} ({data.get('kind')}, step {data.get('step')})"
        case "warning":
            return f"warning: {data.get('message')}"
        case _:
            return None


def _number(data: dict[str, Any]) -> int:
    return int(data.get("stage") or 0) + 1
