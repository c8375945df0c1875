"""`mezo-scale push`"""

from pathlib import Path
from typing import Annotated

import typer

from mezo_scale.cli.app import app


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run that has ended.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Its name on the hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made: for its owner only.")] = False,
) -> None:
    """Push: upload a run's checkpoint to the Hugging Face hub, with its card and the log that rebuilds it."""
    from mezo_scale.models.checkpoints import silence_transformers
    from mezo_scale.runs.publish import push as upload

    silence_transformers()

    typer.echo(f"{run}: {upload(run, repo, private=private)}")
