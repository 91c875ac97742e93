"""What commands print: columns for people, JSON and ids for programs; progress on a terminal alone."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel


class Format(StrEnum):
    """How a command prints."""

    TEXT = "text"
    JSON = "json"
    ID = "id"


class PlainFormat(StrEnum):
    """How a command prints what has no id."""

    TEXT = "text"
    JSON = "json"


Output = Annotated[
    Format, typer.Option("--output", "-o", help="`text` for people, `json`, or the `id` alone.", show_default=False)
]
PlainOutput = Annotated[
    PlainFormat, typer.Option("--output", "-o", help="`text` for people, or `json`.", show_default=False)
]
Column = Callable[[Any], object]


def show_list(items: "Iterable[BaseModel]", output: Format, columns: Mapping[str, Column]) -> None:
    """Print resources, each with a value in each column."""
    listed = list(items)
    if output is Format.JSON:
        show_json([each.model_dump(mode="json") for each in listed])
    elif output is Format.ID:
        show_ids(listed)
    else:
        show_table(columns, [[column(each) for column in columns.values()] for each in listed])


def show(item: "BaseModel", output: Format, fields: Mapping[str, Column]) -> None:
    """Print one resource, with a line for each field."""
    if output is Format.JSON:
        show_json(item.model_dump(mode="json"))
    elif output is Format.ID:
        show_ids([item])
    else:
        values = {name: text_of(field(item)) for name, field in fields.items()}
        width = max(map(len, values), default=0)
        for name, value in values.items():
            if value:
                typer.echo(f"{name:<{width}}  {value}")


def show_ids(items: Iterable[Any]) -> None:
    """Print the id of each, a line each."""
    for each in items:
        typer.echo(str(each.id))


def show_deleted(ids: Sequence[str], output: Format) -> None:
    """Print which resources are gone, for programs: people hear of failures alone."""
    if output is Format.JSON:
        show_json([{"id": each, "deleted": True} for each in ids])
    elif output is Format.ID:
        typer.echo("\n".join(ids))


def show_json(value: object, *, on_one_line: bool = False) -> None:
    """Print a value as JSON; on one line where others follow it."""
    typer.echo(json.dumps(value, indent=None if on_one_line else 2))


def show_table(names: Iterable[str], rows: Sequence[Sequence[object]]) -> None:
    """Print columns that are as wide as what stands in them."""
    texts = [[name.upper() for name in names], *([text_of(cell) or "-" for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        typer.echo("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())


def text_of(value: object) -> str:
    """A value for people, on one line."""
    match value:
        case None:
            return ""
        case datetime():
            return f"{value.astimezone():%Y-%m-%d %H:%M:%S}"
        case float():
            return f"{value:.4g}"
        case _:
            return printable(str(value)).replace("\n", " ")


def printable(text: str) -> str:
    """A text without what would steer the terminal; line breaks stay."""
    return "".join(each if each.isprintable() or each == "\n" else " " for each in text)


def size_text(size: int | None) -> str | None:
    """A number of bytes for people."""
    if size is None:
        return None
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


@contextmanager
def transfer_progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar for the bytes of a transfer on standard error; null where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class StatusLine:
    """A line on standard error that is written over; nothing where that is no terminal."""

    def __init__(self) -> None:
        self._is_shown = sys.stderr.isatty()
        self._text = ""

    def update(self, text: str) -> None:
        """Show a text in place of the one before."""
        if self._is_shown and text != self._text:
            import shutil

            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[2K{text[:width]}")
            sys.stderr.flush()
            self._text = text

    def clear(self) -> None:
        """Take the line away."""
        if self._text:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._text = ""
