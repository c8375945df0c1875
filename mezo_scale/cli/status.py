"""`mezo-scale status`"""

from pathlib import Path
from typing import Annotated

import typer

from mezo_scale.cli.app import app
from mezo_scale.cli.arguments import console


@app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a run, or of an array of them.")],
) -> None:
    """Show how a run is getting on: its state, steps, rate, time left and last losses."""
    from mezo_scale.slurm.status import status as ask
    from mezo_scale.slurm.status import table

    console().print(table(ask(run)))
