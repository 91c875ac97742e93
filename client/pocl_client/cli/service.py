"""What runs on this machine: `pocl serve`, `pocl worker`, `pocl run`, `pocl doctor`."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, Final

import typer

from pocl_client.cli.exits import FAILED, REFUSED
from pocl_client.cli.output import PlainFormat, PlainOutput, show_json

# All arguments, `--help` too, are those of the program that is started.
HANDED_ON: Final[dict[str, Any]] = {
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    "add_help_option": False,
}
INSTALL: Final = "install it with `pip install 'pocl-service[engine,embedded]'`, or `make install` in a checkout."


def serve(context: typer.Context) -> None:
    """Start the whole service on this machine: broker, API, scheduler and workers (`pocl serve --help`)."""
    hand_over("worker", ["serve", *context.args])


def worker(context: typer.Context) -> None:
    """Start a worker of a larger set-up."""
    hand_over("worker", ["run", *context.args])


def run(context: typer.Context) -> None:
    """Run the engine alone, without a service (`pocl run --help`)."""
    hand_over("pocl", ["run", *context.args])


def hand_over(module: str, arguments: Sequence[str], execute: Callable[[str, list[str]], object] = os.execv) -> None:
    """Become a program of the service.

    Raises:
        typer.Exit: the service is not installed here.
    """
    try:
        distribution("pocl-service")
    except PackageNotFoundError:
        typer.echo(f"pocl: The service is not installed here; {INSTALL}", err=True)
        raise typer.Exit(REFUSED) from None
    sys.stdout.flush()
    # Never a module of the working directory.
    execute(sys.executable, [sys.executable, "-P", "-m", module, *arguments])


def doctor(output: PlainOutput = PlainFormat.TEXT) -> None:
    """Say what this machine has and lacks, and whether the service can be reached.

    Exit status 1 if something is lacking.
    """
    from pocl_client.cli.doctor import examine

    checks = list(examine())
    if output is PlainFormat.JSON:
        show_json([each.as_json() for each in checks])
    else:
        for each in checks:
            typer.echo(f"{each.level.value:<5} {each.sentence}")
    if any(each.is_lack for each in checks):
        raise typer.Exit(FAILED)
