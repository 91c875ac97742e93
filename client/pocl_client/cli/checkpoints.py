"""`pocl checkpoints`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocl_client.cli.exits import REFUSED
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
    size_text,
    transfer_progress,
)
from pocl_client.cli.session import connect

if TYPE_CHECKING:
    from pocl_client import Client
    from pocl_client.models import Checkpoint, CheckpointExport

app = typer.Typer(help="List checkpoints, and download them.", no_args_is_help=True, rich_markup_mode=None)

_COLUMNS = {
    "id": lambda each: each.id,
    "kind": lambda each: each.kind,
    "job": lambda each: each.job_id,
    "stage": lambda each: None if each.stage is None else each.stage + 1,
    "step": lambda each: each.step,
    "size": lambda each: size_text(each.size_bytes),
    "pinned": lambda each: "pinned" if each.pinned else None,
    "created": lambda each: each.created_at,
}
_EXPORT_COLUMNS = {
    "id": lambda each: each.id,
    "checkpoint": lambda each: each.checkpoint_id,
    "format": lambda each: each.format,
    "size": lambda each: size_text(each.size_bytes),
    "completed": lambda each: each.completed_at,
}
CheckpointId = Annotated[str, typer.Argument(help="Id of the checkpoint.", metavar="CHECKPOINT")]


@app.command("list")
def list_checkpoints(
    job: Annotated[str | None, typer.Argument(help="Of this job alone.", show_default=False)] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="`training`, `stage`, `best` or `final`; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(help="How many at most.", min=1)] = 50,
    output: Output = Format.TEXT,
) -> None:
    """List checkpoints, newest first."""
    with connect() as client:
        show_list(client.checkpoints.list(job=job, kind=kind, limit=limit), output, _COLUMNS)


@app.command()
def download(
    checkpoint: Annotated[
        str, typer.Argument(help="Id of a checkpoint, or of a job: of that the newest of a kind.", metavar="ID")
    ],
    directory: Annotated[Path, typer.Argument(help="New or empty directory.")],
    kind: Annotated[str, typer.Option(help="`best`, `final`, `stage` or `training`, of a job.")] = "best",
    connections: Annotated[int, typer.Option(help="Parts that are downloaded side by side.", min=1, max=32)] = 4,
    output: Output = Format.TEXT,
) -> None:
    """Download a checkpoint, each file verified by its SHA-256. Repeat the command to go on where it was interrupted.

    The directory appears when everything in it is whole.
    """
    with connect() as client:
        found = _find(client, checkpoint, kind)
        with transfer_progress(f"downloading {found.id}") as on_progress:
            client.checkpoints.download(found.id, directory, connections=connections, on_progress=on_progress)
    show(found, output, {**_COLUMNS, "directory": lambda _: directory})


@app.command()
def export(
    checkpoint: Annotated[
        str, typer.Argument(help="Id of a checkpoint, or of a job: of that the newest of a kind.", metavar="ID")
    ],
    directory: Annotated[Path, typer.Argument(help="New or empty directory.")],
    export_format: Annotated[str, typer.Option("--format", help="`f32`, `f16` or `q8_0`.")] = "q8_0",
    kind: Annotated[str, typer.Option(help="`best`, `final`, `stage` or `training`, of a job.")] = "best",
    timeout: Annotated[
        float | None, typer.Option(help="Seconds to wait until it is written; without it as long as it takes.", min=0)
    ] = None,
    connections: Annotated[int, typer.Option(help="Parts that are downloaded side by side.", min=1, max=32)] = 4,
    output: Output = Format.TEXT,
) -> None:
    """Have a checkpoint written as GGUF, for llama.cpp and Ollama, wait for it, and download it, each file verified.

    Repeat the command to go on where it was interrupted: what is written already is not written again.
    """
    with connect() as client:
        found = _find(client, checkpoint, kind)
        with transfer_progress(f"downloading {found.id} as {export_format}") as on_progress:
            made = client.checkpoints.export(
                found.id,
                export_format,
                directory,
                timeout=timeout,
                connections=connections,
                on_change=_tell,
                on_progress=on_progress,
            )
    for note in made.notes:
        typer.echo(f"note: {printable(note)}", err=True)
    show(made, output, {**_EXPORT_COLUMNS, "directory": lambda _: directory})


def _tell(made: "CheckpointExport") -> None:
    reason = "" if made.error is None else f": {printable(made.error.message)}"
    if made.state != "complete":
        typer.echo(f"pocl: {made.id} is {made.state}{reason}", err=True)


def _find(client: "Client", given: str, kind: str) -> "Checkpoint":
    """The checkpoint of an id, or the newest of a kind of a job of this id.

    Raises:
        Exit: the job has none of the kind.
    """
    if not given.startswith("job_"):
        return client.checkpoints.get(given)
    newest = client.checkpoints.newest(given, kind)
    if newest is None:
        typer.echo(f"pocl: {given} has no checkpoint of the kind {kind}: see `pocl checkpoints list`.", err=True)
        raise typer.Exit(REFUSED)
    return newest


@app.command()
def chat(
    checkpoint: CheckpointId,
    question: Annotated[
        str | None, typer.Argument(help="What to ask; without it a conversation, line by line.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is the most likely answer.", min=0, max=2)] = 0,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1)] = 256,
    output: PlainOutput = PlainFormat.TEXT,
) -> None:
    """Talk to a checkpoint, by a worker that is free: an aid to try it, and no serving.

    With `-o json` each line is a question with its whole answer.
    """
    history = [] if system is None else [{"role": "system", "content": system}]
    with connect() as client:
        for text in _questions(question):
            history.append({"role": "user", "content": text})
            answer = []
            for piece in client.checkpoints.chat(checkpoint, history, temperature=temperature, max_tokens=max_tokens):
                answer.append(piece)
                if output is PlainFormat.TEXT:
                    typer.echo(printable(piece), nl=False)
            history.append({"role": "assistant", "content": "".join(answer)})
            if output is PlainFormat.TEXT:
                typer.echo()
            else:
                show_json({"question": text, "answer": "".join(answer)}, on_one_line=True)


def _questions(question: str | None) -> Iterator[str]:
    """The one that is given, or each line of standard input, until an empty one on a terminal or the end."""
    if question is not None:
        yield question
        return
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.strip()


@app.command()
def pin(checkpoint: CheckpointId, output: Output = Format.TEXT) -> None:
    """Keep a checkpoint, whatever the retention policy says."""
    with connect() as client:
        show(client.checkpoints.pin(checkpoint), output, _COLUMNS)


@app.command()
def unpin(checkpoint: CheckpointId, output: Output = Format.TEXT) -> None:
    """Let the retention policy decide again."""
    with connect() as client:
        show(client.checkpoints.unpin(checkpoint), output, _COLUMNS)


@app.command()
def delete(
    checkpoints: Annotated[list[str], typer.Argument(help="Ids.", metavar="CHECKPOINT...")],
    output: Output = Format.TEXT,
) -> None:
    """Delete checkpoints that are not pinned, and that no job needs."""
    with connect() as client:
        for each in checkpoints:
            client.checkpoints.delete(each)
    show_deleted(checkpoints, output)
