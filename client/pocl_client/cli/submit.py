"""`pocl validate` and `pocl submit`."""

from pathlib import Path
from typing import Annotated

import typer

from pocl_client.cli.exits import exit_status_of_job
from pocl_client.cli.jobs import JOB_FIELDS
from pocl_client.cli.output import Format, Output, PlainFormat, PlainOutput, show, show_table, size_text
from pocl_client.cli.session import connect
from pocl_client.cli.spec_file import SpecUnreadable, read_request

SpecFile = Annotated[
    Path,
    typer.Argument(help="YAML or JSON: a specification, or a body with `spec`, `name` and options; `-` for stdin."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Set a field of the specification; may be repeated."),
]


def validate(spec: SpecFile, set_: Settings = None, output: PlainOutput = PlainFormat.TEXT) -> None:
    """Say what a job would be: stages, memory, disk, time and warnings. Nothing is queued."""
    request = read_request(spec, set_ or [])
    with connect() as client:
        plan = client.jobs.validate(request.pop("spec"), **request)
    if output is PlainFormat.JSON:
        show(plan, Format.JSON, {})
        return
    show_table(
        ("stage", "samples", "temperature", "weight", "epochs", "steps"),
        [(s.index + 1, s.samples, s.temperature, s.kd_weight, s.epochs, s.steps) for s in plan.stages],
    )
    duration, estimate = plan.forecast.duration, plan.estimate
    show(
        plan,
        Format.TEXT,
        {
            "": lambda _: " ",
            "steps": lambda _: plan.total_steps,
            "memory": lambda _: estimate and size_text(estimate.memory_bytes),
            "disk": lambda _: estimate and size_text(estimate.disk_bytes),
            "time": lambda _: duration and f"{duration.low_seconds:.0f} to {duration.high_seconds:.0f} s",
            "fits": lambda _: plan.forecast.fit.state,
        },
    )
    for warning in plan.warnings:
        typer.echo(f"warning: {warning.pointer or ''} {warning.message}", err=True)


def submit(
    spec: SpecFile,
    set_: Settings = None,
    name: Annotated[str | None, typer.Option(help="What people call the job.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; may be repeated.")] = None,
    priority: Annotated[int | None, typer.Option(help="The highest is claimed first.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Text of your own: submitting again with it makes no second job.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job until it has ended.")] = False,
    output: Output = Format.TEXT,
) -> None:
    """Submit a job. With --watch the exit status is that of the job: 0 succeeded, 1 failed or cancelled."""
    from pocl_client.cli.watching import watch_job

    request = read_request(spec, set_ or [])
    given = {"name": name, "labels": labels_of(label), "priority": priority}
    request |= {field: value for field, value in given.items() if value is not None}
    with connect() as client:
        job = client.jobs.create(request.pop("spec"), idempotency_key=idempotency_key, **request)
        for warning in job.plan_warnings:
            typer.echo(f"warning: {warning.message}", err=True)
        if watch:
            typer.echo(f"{job.id} is {job.status}; Ctrl-C stops watching, and not the job", err=True)
            job = watch_job(client, job.id)
    show(job, output, JOB_FIELDS)
    if watch:
        raise typer.Exit(exit_status_of_job(job.status))


def labels_of(texts: list[str] | None) -> dict[str, str] | None:
    """Labels of the command line.

    Raises:
        SpecUnreadable: one is none.
    """
    if texts is None:
        return None
    pairs = [text.partition("=") for text in texts]
    if wrong := [key for key, separator, _ in pairs if not separator or not key]:
        raise SpecUnreadable(f"--label takes KEY=VALUE, and not {wrong[0]!r}.")
    return {key: value for key, _, value in pairs}
