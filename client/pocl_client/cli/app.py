"""The commands, and how the command line ends.

Exit statuses: 0 done; 1 a job failed or was cancelled; 2 wrong usage, or refused by the service; 3 the service cannot
be reached, or failed itself; 124 the time that was given is over; 130 Ctrl-C.
"""

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pocl_client.cli import checkpoints, datasets, jobs, login, models, service, submit
from pocl_client.cli.exits import REFUSED, STOPPED, exit_status_of
from pocl_client.errors import ClientError


class PoclGroup(TyperGroup):
    """Says in a sentence what went wrong, and ends with the status that stands for it."""

    def invoke(self, ctx: Any) -> object:
        try:
            return super().invoke(ctx)
        except ClientError as error:
            typer.echo(f"pocl: {error}", err=True)
            raise typer.Exit(exit_status_of(error)) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            typer.echo(f"pocl: {error.strerror or error}{place}", err=True)
            raise typer.Exit(REFUSED) from None
        except KeyboardInterrupt:
            typer.echo("", err=True)
            raise typer.Exit(STOPPED) from None


app = typer.Typer(
    name="pocl",
    cls=PoclGroup,
    no_args_is_help=True,
    # Plain text: the library that draws boxes takes longer to load than all else.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(is_asked_for: bool) -> None:
    if not is_asked_for:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        typer.echo(version("pocl-client"))
    except PackageNotFoundError:
        typer.echo("not installed")
    raise typer.Exit


@app.callback()
def main(
    url: Annotated[
        str | None,
        typer.Option(help="Address of the service; POCL_URL, else that of the last login, else http://127.0.0.1:8000."),
    ] = None,
    version: Annotated[  # noqa: ARG001 # Its callback prints it, before anything else is looked at.
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Distil language models: submit jobs to a POCL service, follow them, and take what comes out.

    The key is POCL_API_KEY, else the content of the file POCL_API_KEY_FILE, else that of `pocl login`.
    """
    if url is not None:
        os.environ["POCL_URL"] = url


app.command()(login.login)
app.command()(login.logout)
app.add_typer(datasets.app, name="datasets")
app.add_typer(models.app, name="models")
app.command()(submit.validate)
app.command()(submit.submit)
app.add_typer(jobs.app, name="jobs")
app.add_typer(checkpoints.app, name="checkpoints")
app.command(**service.HANDED_ON)(service.serve)
app.command(**service.HANDED_ON)(service.worker)
app.command(**service.HANDED_ON)(service.run)
app.command()(service.doctor)


def run() -> int:
    """Run the command line; the exit status."""
    try:
        app(prog_name="pocl")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    finally:
        # What reads the output may be gone: its end is no error of this program.
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
