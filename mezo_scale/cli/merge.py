"""`mezo-scale merge`"""

from pathlib import Path
from typing import Annotated

import typer

from mezo_scale.cli.app import app


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The directory of a run, or an adapter's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make: a Hugging Face checkpoint.")],
    base: Annotated[
        str | None,
        typer.Option(help="The base model: a folder, or a name on the hub; default: the adapter's own."),
    ] = None,
) -> None:
    """Merge: add a tuned adapter to its base model, for use without PEFT."""
    from mezo_scale.models.checkpoints import silence_transformers
    from mezo_scale.runs.publish import merge as run

    silence_transformers()

    found = run(adapter, out, base)
    typer.echo(f"{out}: {found} with {adapter} merged into it")
