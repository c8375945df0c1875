"""`mezo-scale bench`"""

from pathlib import Path
from typing import Annotated

import typer

from mezo_scale.cli.app import app

Sweep = Annotated[
    str, typer.Argument(metavar="SWEEP", help="A sweep (YAML), or one that is shipped: quick, scaling, one-gpu.")
]
Fields = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Single fields of the sweep, like rows=16.")
]


def _fields() -> str:
    """The fields of a sweep file, for --help. The backspace keeps click from joining the lines."""
    from mezo_scale.bench.sweep import fields

    return "\b\nThe sweep's fields:\n" + "\n".join(f"  {name}: {about}" for name, about in fields())


@app.command(epilog=_fields())
def bench(
    sweep: Sweep,
    overrides: Fields = None,
    out: Annotated[
        Path, typer.Option(help="The folder of the rows and the report; its rows are not measured again.")
    ] = Path("runs/bench"),
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Measure cells again that have no figures.")
    ] = False,
) -> None:
    """Measure how a step scales: time, memory and traffic over strategies and ranks, beside the plan and the rivals.

    Each cell is a launch of its own: torchrun on this machine, srun in a SLURM allocation. One that runs out of memory
    is a row with its reason. Stopped, the same command goes on; several sweeps may add to one folder.

    \b
      mezo-scale bench quick
      mezo-scale bench scaling models=random:opt-13b strategies=[fsdp2,zero3] world_sizes=4
      salloc --nodes 4 --gpus-per-node 8 mezo-scale bench scaling
    """
    from mezo_scale.bench import report, running  # seconds to import
    from mezo_scale.bench import sweep as sweeps
    from mezo_scale.models.shapes import config_of

    asked, places = sweeps.load(sweep, overrides or ()), sweeps.Places.here()
    cells = sweeps.cells(asked, places)
    for model in dict.fromkeys(cell.model for cell in cells):
        config_of(model)  # there is such a model
    done = running.run(
        cells,
        out,
        places,
        rounds=asked.rounds,
        timeout_s=asked.timeout_s,
        budget_s=asked.budget_s,
        retry_failed=retry_failed,
        say=typer.echo,
    )
    typer.echo(f"report: {report.write(done, out, asked.published_s)}")
