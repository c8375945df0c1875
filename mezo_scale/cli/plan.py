"""`mezo-scale plan`"""

import json
from functools import partial
from typing import Annotated

import typer

from mezo_scale.cli.app import app
from mezo_scale.cli.arguments import console
from mezo_scale.errors import ShardingError


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="A model by name (opt-66b), a folder or its config.json, a hub name.")],
    gpus: Annotated[
        str,
        typer.Option(help="Devices in all, one rank each; several numbers (1,2,4..64) make a projection over them."),
    ],
    gpu_memory: Annotated[float, typer.Option(metavar="GIB", help="Memory of each device.")],
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Devices of each node; default: 8, or all if fewer.")
    ] = None,
    host_memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Memory of each node, for what is offloaded; default: enough.")
    ] = None,
    headroom: Annotated[float, typer.Option(help="Part of a device's memory that is to stay free.")] = 0.1,
    rows: Annotated[int, typer.Option(help="Rows of a batch (or micro-batch) on each rank.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens of a row, padding included.")] = 400,
    positions: Annotated[int, typer.Option(help="Positions per row whose logits the loss needs.")] = 1,
    directions: Annotated[int, typer.Option(min=1, help="Random directions per step, of two branches each.")] = 1,
    dtype: Annotated[str, typer.Option(help="What is computed in: bfloat16, float16 or float32.")] = "bfloat16",
    rate: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A rate of the machine, like between_gbit_s=10; repeatable."),
    ] = None,
    recipe: Annotated[str, typer.Option(help="The recipe that the printed command names.")] = "recipe.yaml",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Take each step that fits on tensors without memory, and compare.")
    ] = False,
) -> None:
    """Say what fits on which devices, and how: the memory, traffic and time of every strategy, before you book."""
    from mezo_scale.planner import Cluster, Rates, Report, Workload, device_counts, scaling_table

    workload, rates = Workload(rows, tokens, 2 * directions, dtype, positions), Rates.parse(rate or ())
    clusters = [
        Cluster(count, gpus_per_node or min(count, 8), gpu_memory, headroom, host_memory)
        for count in device_counts(gpus)
    ]
    tell = partial(typer.echo, err=True) if dry_run else None
    reports = [Report.make(model, cluster, workload, rates, recipe, dry_run=tell) for cluster in clusters]
    last = reports[-1]
    if as_json:
        trees = [report.as_json() for report in reports]
        typer.echo(json.dumps(trees if len(trees) > 1 else trees[0], indent=2))
    elif len(reports) > 1:
        console().print(scaling_table(reports))
        typer.echo("\n".join(last.formula()))
    else:
        console().print(last.table())
        typer.echo("\n".join(last.lines()))
    if all(report.choice is None for report in reports):
        raise ShardingError(last.nothing_fits())
