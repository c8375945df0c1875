"""`mezo-scale replay`"""

from pathlib import Path
from typing import Annotated

import typer

from mezo_scale.cli.app import app
from mezo_scale.cli.arguments import Until


@app.command()
def replay(
    base: Annotated[str, typer.Option(help="The model the run began with: a folder, or a name on the hub.")],
    trajectory: Annotated[Path, typer.Option(help="The run's trajectory.mezo.")],
    out: Annotated[Path, typer.Option(help="The folder to make: an ordinary Hugging Face checkpoint, or an adapter.")],
    until: Until = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="For a run that tuned an adapter: its adapter_init; default: the one beside the trajectory."),
    ] = None,
) -> None:
    """Rebuild the weights of a run, bit for bit, from its base model and its trajectory."""
    from mezo_scale.models.checkpoints import silence_transformers
    from mezo_scale.runs.publish import rebuild

    silence_transformers()

    steps = rebuild(base, trajectory, out, until, adapter)
    typer.echo(f"{out}: {base} after {steps} steps")
