"""`mezo-scale export`"""

from pathlib import Path
from typing import Annotated

import typer

from mezo_scale.cli.app import app


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a run.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to make; `replay --trajectory` reads it.")],
) -> None:
    """Write a run's trajectory in a few bytes per step: what a replay needs, and no losses."""
    from mezo_scale.runs.publish import export as write

    steps, size = write(run, out)
    typer.echo(f"{out}: {steps} steps, {size:,} bytes")
