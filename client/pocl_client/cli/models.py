"""`pocl models`."""

from typing import Annotated

import typer

from pocl_client.cli.output import Format, Output, show_list, size_text
from pocl_client.cli.session import connect

app = typer.Typer(help="Models that a specification may name.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_models(
    limit: Annotated[int, typer.Option(help="How many at most.", min=1)] = 100, output: Output = Format.TEXT
) -> None:
    """List the models below the model roots of the service."""
    with connect() as client:
        show_list(
            client.models(limit=limit),
            output,
            {
                "id": lambda each: each.id,
                "state": lambda each: each.state,
                "family": lambda each: each.facts and each.facts.family,
                "layers": lambda each: each.facts and each.facts.layers,
                "parameters": lambda each: each.facts and each.facts.parameters,
                "size": lambda each: each.facts and size_text(each.facts.size_bytes),
                "refused": lambda each: each.refusal and each.refusal.message,
            },
        )
