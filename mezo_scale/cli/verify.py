"""`mezo-scale verify`"""

from typing import Annotated

import typer

from mezo_scale import recipe as recipes
from mezo_scale.cli.app import app


@app.command()
def verify(run: Annotated[str, typer.Argument(metavar="RUN_DIR", help="The directory of a run.")]) -> None:
    """Check a run: its trajectory, its base model, and its checkpoint against a replay."""
    parsed = recipes.load(run)
    from mezo_scale.models.checkpoints import silence_transformers
    from mezo_scale.runs.verify import verify as check

    silence_transformers()

    for line in check(parsed):
        typer.echo(f"ok  {line}")
