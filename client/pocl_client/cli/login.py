"""`pocl login` and `pocl logout`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pocl_client.cli.output import PlainFormat, PlainOutput, show_json


def login(
    url: Annotated[str | None, typer.Argument(help="Address of the service.", show_default=False)] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(help="File with the key, such as `.pocl/api-key`; else it is asked for, or read from a pipe."),
    ] = None,
    output: PlainOutput = PlainFormat.TEXT,
) -> None:
    """Keep the address of a service and a key for it, in a file that only you can read.

    The key is tried before it is kept.
    """
    from pocl_client import Client
    from pocl_client.credentials import find_url, login_path, write_login

    address = find_url(url)
    if key_file is not None:
        key = key_file.read_text(encoding="utf-8").strip()
    elif sys.stdin.isatty():
        key = typer.prompt(f"API key of {address}", hide_input=True).strip()
    else:
        key = sys.stdin.readline().strip()
    with Client(address, key) as client:
        project = client.quota().project
    write_login(login_path(), address, key)
    if output is PlainFormat.JSON:
        show_json({"url": address, "project": project, "file": str(login_path())})
    else:
        typer.echo(f"Logged in to {address}, project {project}; the key is in {login_path()}.")


def logout(
    url: Annotated[str | None, typer.Argument(help="Address of the service.", show_default=False)] = None,
    output: PlainOutput = PlainFormat.TEXT,
) -> None:
    """Forget the key of a service. The key itself stays valid until it is revoked."""
    from pocl_client.credentials import find_url, login_path, write_login

    address = find_url(url)
    write_login(login_path(), address, None)
    if output is PlainFormat.JSON:
        show_json({"url": address})
    else:
        typer.echo(f"Forgot the key of {address}.")
