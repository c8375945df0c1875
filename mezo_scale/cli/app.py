"""The application that the commands belong to."""

from typing import Annotated

import typer

from mezo_scale import __version__

app = typer.Typer(
    name="mezo-scale",
    no_args_is_help=True,
    rich_markup_mode=None,  # its boxes would reflow the table of the recipe's fields
    pretty_exceptions_enable=False,
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mezo-scale {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Fine-tune language models with forward passes only, sharded over as many devices as it takes."""
