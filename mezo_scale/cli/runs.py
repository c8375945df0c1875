"""`mezo-scale runs`"""

import json
from pathlib import Path
from typing import Annotated

import typer

from mezo_scale.cli.app import app
from mezo_scale.cli.arguments import console


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where your runs lie, at any depth.")] = Path(
        "runs"
    ),
    plot: Annotated[Path | None, typer.Option(help="Draw dev metric and loss over the steps into this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """List the runs of a folder and compare them: steps, scores, and the recipe fields in which they differ."""
    from mezo_scale.runs import listing

    found = listing.find(folder)
    entries = listing.compare(found)
    if as_json:
        typer.echo(json.dumps(entries, indent=2))
    else:
        console().print(listing.table(entries))
    if plot is not None:
        listing.plot(found, plot)
        if not as_json:
            typer.echo(f"plot: {plot}")
