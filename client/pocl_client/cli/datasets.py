"""`pocl datasets`."""

from pathlib import Path
from typing import Annotated

import typer

from pocl_client.cli.output import (
    Format,
    Output,
    PlainFormat,
    PlainOutput,
    show,
    show_deleted,
    show_list,
    size_text,
    transfer_progress,
)
from pocl_client.cli.session import connect

app = typer.Typer(help="Upload samples, and look at them.", no_args_is_help=True, rich_markup_mode=None)

_COLUMNS = {
    "id": lambda each: each.id,
    "name": lambda each: each.name,
    "status": lambda each: each.status,
    "rows": lambda each: each.rows,
    "size": lambda each: size_text(each.size_bytes),
    "created": lambda each: each.created_at,
}
DatasetId = Annotated[str, typer.Argument(help="Id of the data set.", metavar="DATASET")]


@app.command()
def upload(
    file: Annotated[Path, typer.Argument(help="JSONL, JSON, CSV or Parquet, also in gzip.")],
    name: Annotated[str | None, typer.Option(help="What people call it; the name of the file unless given.")] = None,
    format: Annotated[str | None, typer.Option(help="Format of the file; told from its content unless given.")] = None,
    form: Annotated[str | None, typer.Option(help="Form of the rows; told from their columns unless given.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Column with another name, as FIELD=COLUMN; may be repeated.")
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help="Delimiter of a CSV file.")] = None,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave out rows that are no samples.")] = False,
    output: Output = Format.TEXT,
) -> None:
    """Upload a file of samples, and wait until it is read."""
    columns = dict(_pair(each) for each in column or [])
    with connect() as client, transfer_progress(f"uploading {file.name}") as on_progress:
        dataset = client.datasets.upload(
            file,
            name=name,
            format=format,
            form=form,
            columns=columns or None,
            delimiter=delimiter,
            on_bad_rows="skip" if skip_bad_rows else None,
            on_progress=on_progress,
        )
    ingestion = dataset.ingestion
    show(
        dataset,
        output,
        {
            **_COLUMNS,
            "format": lambda _: ingestion and ingestion.format,
            "forms": lambda _: ingestion and ", ".join(f"{rows} {form}" for form, rows in ingestion.forms.items()),
            "not used": lambda _: ingestion and ", ".join(each.name for each in ingestion.ignored_columns),
            "skipped": lambda _: (ingestion and ingestion.skipped) or None,
        },
    )


@app.command("list")
def list_datasets(
    limit: Annotated[int, typer.Option(help="How many at most.", min=1)] = 50, output: Output = Format.TEXT
) -> None:
    """List data sets, newest first."""
    with connect() as client:
        show_list(client.datasets.list(limit=limit), output, _COLUMNS)


@app.command()
def preview(
    dataset: DatasetId,
    model: Annotated[str, typer.Option(help="Model whose tokenizer is used, as a specification names it.")],
    rows: Annotated[int, typer.Option(help="How many rows.", min=1)] = 3,
    offset: Annotated[int, typer.Option(help="First row, counted from 0.", min=0)] = 0,
    output: PlainOutput = PlainFormat.TEXT,
) -> None:
    """Show rows as a run would train on them; what is trained stands in [brackets]."""
    with connect() as client:
        shown = client.datasets.preview(dataset, model, rows=rows, offset=offset)
    if output is PlainFormat.JSON:
        show(shown, Format.JSON, {})
        return
    for warning in shown.warnings:
        typer.echo(f"warning: {warning.message}", err=True)
    for row in shown.rows:
        typer.echo(f"--- row {row.row}: {len(row.tokens)} tokens, {sum(each.trained for each in row.tokens)} trained")
        typer.echo(row.refusal or marked([(each.token, each.trained) for each in row.tokens]))


@app.command()
def delete(
    datasets: Annotated[list[str], typer.Argument(help="Ids.", metavar="DATASET...")], output: Output = Format.TEXT
) -> None:
    """Delete data sets that no job needs."""
    with connect() as client:
        for each in datasets:
            client.datasets.delete(each)
    show_deleted(datasets, output)


def _pair(text: str) -> tuple[str, str]:
    field, separator, column = text.partition("=")
    if not (field and separator and column):
        raise typer.BadParameter(f"--column takes FIELD=COLUMN, and not {text!r}")
    return field, column


def marked(tokens: list[tuple[str, bool]]) -> str:
    """The text of tokens, with brackets around those that are trained."""
    pieces, is_inside = [], False
    for token, is_trained in [*tokens, ("", False)]:
        if is_trained != is_inside:
            pieces.append("[" if is_trained else "]")
            is_inside = is_trained
        pieces.append(token)
    return "".join(pieces)
