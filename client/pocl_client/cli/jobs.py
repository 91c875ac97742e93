"""`pocl jobs`."""

import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocl_client.cli.exits import SUCCEEDED, TIMED_OUT, exit_status_of_job
from pocl_client.cli.output import (
    Format,
    Output,
    PlainFormat,
    PlainOutput,
    printable,
    show,
    show_deleted,
    show_json,
    show_list,
    show_table,
    size_text,
)
from pocl_client.cli.session import connect

if TYPE_CHECKING:
    from pocl_client.models import Job

app = typer.Typer(help="Follow and steer jobs.", no_args_is_help=True, rich_markup_mode=None)

JobId = Annotated[str, typer.Argument(help="Id of the job.", metavar="JOB")]
JobIds = Annotated[list[str], typer.Argument(help="Ids of jobs.", metavar="JOB...")]


def _reason(job: Any) -> str | None:
    reason = job.end_reason
    return reason and f"{reason.code}: {reason.message} {reason.hint}".strip()


def _stage(job: "Job") -> str | None:
    return None if job.progress.stage is None else f"{job.progress.stage + 1} of {job.progress.stages}"


def _queue(job: "Job") -> str | None:
    return None if job.queue is None else f"position {job.queue.position}: {job.queue.reason}"


def _publication(job: "Job") -> str | None:
    push = job.publication
    if push is None:
        return None
    if push.state == "published":
        return push.url
    return f"{push.repo}: {push.state}" + (f" ({push.error.code}: {push.error.message})" if push.error else "")


_COLUMNS = {
    "id": lambda each: each.id,
    "name": lambda each: each.name,
    "status": lambda each: each.status,
    "done": lambda each: f"{each.progress.percent:.0f} %",
    "phase": lambda each: each.phase and each.phase.name,
    "created": lambda each: each.created_at,
}
JOB_FIELDS = {
    **_COLUMNS,
    "labels": lambda job: ", ".join(f"{key}={value}" for key, value in job.labels.items()),
    "priority": lambda job: job.priority or None,
    "queue": _queue,
    "stage": _stage,
    "step": lambda job: f"{job.progress.step} of {job.progress.total_steps}",
    "left": lambda job: job.eta and f"{job.eta.seconds:.0f} s",
    "started": lambda job: job.started_at,
    "finished": lambda job: job.finished_at,
    "reason": _reason,
    "retry of": lambda job: job.retry_of,
    "branch of": lambda job: job.branch_of,
    "stored": lambda job: size_text(job.stored_bytes),
    "on the Hub": _publication,
}


@app.command("list")
def list_jobs(
    status: Annotated[list[str] | None, typer.Option(help="Jobs of this status alone; may be repeated.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Jobs with this label, KEY=VALUE; may be repeated.")] = None,
    limit: Annotated[int, typer.Option(help="How many at most.", min=1)] = 20,
    output: Output = Format.TEXT,
) -> None:
    """List jobs, newest first."""
    from pocl_client.cli.submit import labels_of

    with connect() as client:
        show_list(client.jobs.list(status=status, labels=labels_of(label), limit=limit), output, _COLUMNS)


@app.command()
def get(job: JobId, output: Output = Format.TEXT) -> None:
    """Show a job."""
    with connect() as client:
        show(client.jobs.get(job), output, JOB_FIELDS)


@app.command()
def watch(job: JobId, output: Output = Format.TEXT) -> None:
    """Follow a job until it has ended. Exit status: 0 succeeded, 1 failed or cancelled."""
    from pocl_client.cli.watching import watch_job

    with connect() as client:
        ended = watch_job(client, job)
    show(ended, output, JOB_FIELDS)
    raise typer.Exit(exit_status_of_job(ended.status))


@app.command()
def wait(
    jobs: JobIds,
    timeout: Annotated[float, typer.Option(help="Seconds for all of them together.", min=0)] = math.inf,
    until: Annotated[
        list[str] | None, typer.Option(help="Wait for this status, such as `paused`, or the end; may be repeated.")
    ] = None,
    output: Output = Format.TEXT,
) -> None:
    """Wait until all these jobs have ended, and print them.

    Exit status: 0 all succeeded (or have the status), 1 one failed or was cancelled, 2 refused, 124 the time is over.
    """
    import time

    from pocl_client import WaitTimedOut
    from pocl_client.responses import ENDED

    deadline = time.monotonic() + timeout
    ended, statuses = [], {SUCCEEDED}
    with connect() as client:
        for job in jobs:
            left = None if timeout == math.inf else max(0.0, deadline - time.monotonic())
            try:
                ended.append(client.jobs.wait(job, timeout=left, until=until or ENDED))
            except WaitTimedOut as error:
                typer.echo(f"pocl: {error}", err=True)
                statuses.add(TIMED_OUT)
            else:
                is_wanted = ended[-1].status in (until or ())
                statuses.add(SUCCEEDED if is_wanted else exit_status_of_job(ended[-1].status))
    show_list(ended, output, _COLUMNS)
    raise typer.Exit(max(statuses))


@app.command()
def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    attempt: Annotated[int | None, typer.Option(help="Attempt; the newest unless given.", min=1)] = None,
    tail: Annotated[int | None, typer.Option(help="So many lines of its end.", min=0)] = None,
    output: PlainOutput = PlainFormat.TEXT,
) -> None:
    """Print the log of the engine, as far as it is kept; with --follow that of all attempts, from the beginning on.

    With --follow and `-o json` each line is a part of the log, with its attempt.
    """
    from pocl_client.models import LogMessage

    if follow and (attempt is not None or tail is not None):
        raise typer.BadParameter("--follow prints the whole log of all attempts: leave --attempt and --tail out")
    with connect() as client:
        if not follow:
            text = client.jobs.logs(job, attempt=attempt, tail=tail)
            if output is PlainFormat.JSON:
                show_json({"job": job, "text": text})
            else:
                _print_log(text)
            return
        for message in client.jobs.stream(job, types=["log"]):
            if not isinstance(message.content, LogMessage):
                continue
            if output is PlainFormat.JSON:
                show_json(message.content.model_dump(mode="json"), on_one_line=True)
            else:
                _print_log(message.content.text)


def _print_log(text: str) -> None:
    """Print a part of a log as it is, and on a terminal without what would steer that."""
    typer.echo(printable(text) if sys.stdout.isatty() else text, nl=False)


@app.command()
def metrics(
    job: JobId,
    name: Annotated[list[str] | None, typer.Option(help="Metric, such as `loss`; may be repeated.")] = None,
    resolution: Annotated[int, typer.Option(help="Values of each metric at most.", min=2)] = 20,
    output: PlainOutput = PlainFormat.TEXT,
) -> None:
    """Show the metrics of steps and the scores of evaluations."""
    with connect() as client:
        figures = client.jobs.metrics(job, names=name, resolution=resolution)
    if output is PlainFormat.JSON:
        show(figures, Format.JSON, {})
        return
    by_step: dict[int, dict[str, float]] = {}
    for series in figures.series:
        for step, value in zip(series.steps, series.values, strict=True):
            by_step.setdefault(step, {})[series.name] = value
    names = [series.name for series in figures.series]
    show_table(["step", *names], [[step, *(by_step[step].get(each) for each in names)] for step in sorted(by_step)])
    if figures.evaluations:
        typer.echo()
        show_table(
            ("scored", "split", "stage", "rouge_l", "exact", "ce"),
            [
                (
                    e.subject,
                    e.split,
                    None if e.stage is None else e.stage + 1,
                    e.rouge_l,
                    e.exact_match,
                    e.cross_entropy,
                )
                for e in figures.evaluations
            ],
        )


@app.command()
def cancel(jobs: JobIds, output: Output = Format.TEXT) -> None:
    """Cancel jobs. A cancelled job can be retried, and keeps what it has saved."""
    with connect() as client:
        show_list([client.jobs.cancel(each) for each in jobs], output, _COLUMNS)


@app.command()
def pause(
    job: JobId,
    at_stage_end: Annotated[bool, typer.Option("--at-stage-end", help="Let the present stage end first.")] = False,
    output: Output = Format.TEXT,
) -> None:
    """Save a job and stop it. A paused job holds no worker."""
    with connect() as client:
        show(client.jobs.pause(job, at="stage_end" if at_stage_end else "now"), output, JOB_FIELDS)


@app.command()
def resume(job: JobId, output: Output = Format.TEXT) -> None:
    """Let a paused job go on."""
    with connect() as client:
        show(client.jobs.resume(job), output, JOB_FIELDS)


@app.command()
def retry(
    job: JobId,
    from_start: Annotated[bool, typer.Option("--from-start", help="Begin anew.")] = False,
    from_stage: Annotated[
        int | None, typer.Option(help="Begin at the end of this stage, counted from 1.", min=1)
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the new job; else that of the old one.")] = None,
    output: Output = Format.TEXT,
) -> None:
    """Make a new job that goes on where an ended one was saved last."""
    if from_start and from_stage is not None:
        raise typer.BadParameter("give --from-start or --from-stage, and not both")
    with connect() as client:
        if from_stage is not None:
            made = client.jobs.retry(job, start="stage", stage=from_stage - 1, name=name)
        else:
            made = client.jobs.retry(job, start="start" if from_start else "checkpoint", name=name)
    show(made, output, JOB_FIELDS)


@app.command()
def branch(
    job: JobId,
    stage: Annotated[int, typer.Option(help="The stage at whose end the new job begins, counted from 1.", min=1)],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="Change a field of the specification; may be repeated."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the new job; else that of the old one.")] = None,
    output: Output = Format.TEXT,
) -> None:
    """Make a new job that goes on from the end of a stage with another method, teacher or temperature."""
    from pocl_client.cli.spec_file import apply_setting

    changes: dict[str, Any] = {}
    for setting in set_ or []:
        apply_setting(changes, setting)
    with connect() as client:
        show(client.jobs.branch(job, stage=stage - 1, changes=changes, name=name), output, JOB_FIELDS)


@app.command()
def delete(jobs: JobIds, output: Output = Format.TEXT) -> None:
    """Delete jobs that have ended, with what they have made."""
    with connect() as client:
        for each in jobs:
            client.jobs.delete(each)
    show_deleted(jobs, output)
