"""`mezo-scale submit`"""

from enum import StrEnum
from typing import Annotated

import typer

from mezo_scale.cli.app import app
from mezo_scale.cli.arguments import Overrides, Source


class Start(StrEnum):
    """What starts the ranks on the nodes of a job."""

    torchrun = "torchrun"
    deepspeed = "deepspeed"
    accelerate = "accelerate"


@app.command()
def submit(
    recipe: Source,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of each run.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs, and so ranks, per node; 0: one rank, on CPUs.")] = 8,
    partition: Annotated[str | None, typer.Option(help="SLURM's partition; default: the cluster's own.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit as SLURM writes it; default: 24 hours.")] = None,
    array: Annotated[
        str | None,
        typer.Option(metavar="KEY=VALUE,VALUE,...", help="One run per value of a field, like seed=13,21,42."),
    ] = None,
    start: Annotated[Start, typer.Option(help="What starts the ranks on the nodes.")] = Start.torchrun,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="One more option of sbatch, like --account=lab; repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the job script, but don't submit it.")] = False,
) -> None:
    """Submit a recipe to SLURM: frozen in its run directory, requeued by itself when it is preempted."""
    from mezo_scale.slurm.submit import Resources
    from mezo_scale.slurm.submit import submit as run

    resources = Resources(nodes, gpus_per_node, partition, time, start.value, tuple(sbatch or ()))
    for line in run(recipe, overrides or (), array, resources, dry_run=dry_run):
        typer.echo(line)
