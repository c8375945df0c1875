"""`mezo-scale bench`"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mezo_scale.cli.app import app
from mezo_scale.distributed import launcher


@app.command()
def bench(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A first look in a few minutes on 2 CPU cores: a 135M model, 1 and 2 ranks."),
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A folder, a name on the hub, or random:SHAPE (random:opt-13b); repeatable."),
    ] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="single, fsdp2, hsdp or zero3; repeatable. Default: fsdp2.")
    ] = None,
    world_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Ranks; repeatable. Default: the launcher's, or 1 and one per GPU (2 without GPUs)."),
    ] = None,
    scaling: Annotated[
        list[str] | None,
        typer.Option(help="strong: --rows is the whole batch. weak: --rows is each rank's. Default: both."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="mezo; published (MeZO in place, one rank), naive (the same on FSDP2's shards) or adamw (full "
            "fine-tuning under FSDP2), which are in tools/baselines.py; repeatable. Default: mezo."
        ),
    ] = None,
    directions: Annotated[list[int] | None, typer.Option(min=1, help="Of mezo; repeatable. Default: 1.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a batch, see --scaling.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 64,
    dtype: Annotated[str, typer.Option(help="What weights are stored in: float32, bfloat16 or float16.")] = "float32",
    compute_dtype: Annotated[str | None, typer.Option(help="bfloat16, or as stored.")] = None,
    replicate: Annotated[
        int | None, typer.Option(min=2, help="Copies of the model under hsdp. Default: one per node, at least 2.")
    ] = None,
    memory_cap: Annotated[float | None, typer.Option(metavar="GIB", help="Of each GPU, what a rank may take.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="How often step and bare forwards take turns. Default: 7; 3 with --quick.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Of a cell; then it is a row without figures.")
    ] = 1800,
    project: Annotated[str, typer.Option(help="The shape whose projection to 64 devices is drawn.")] = "opt-66b",
    out: Annotated[
        Path, typer.Option(help="The folder of the rows and the report; its rows are not measured again.")
    ] = Path("runs/bench"),
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Measure cells again that have no figures.")
    ] = False,
) -> None:
    """Measure how a step scales: time, memory and traffic over strategies and ranks, beside the plan and the baselines.

    Alone it starts the ranks of each cell itself, on this machine. Under torchrun, deepspeed or srun it measures the
    cells with as many ranks as there are; launches of different sizes add to one folder. Every cell runs in processes
    of its own, so one that runs out of memory is a row with its reason. Stopped, the same command goes on.

    \b
      mezo-scale bench --quick
      mezo-scale bench --model random:opt-13b --dtype bfloat16 --strategy fsdp2 --strategy zero3 --world-size 4
      srun --nodes 2 --ntasks-per-node 8 mezo-scale bench --model random:opt-66b --dtype bfloat16 --strategy hsdp
    """
    found = launcher.adopt()
    from mezo_scale.bench import cell, report, sweep  # seconds to import

    if quick:
        cells = cell.quick(model or ())
    else:
        grid = cell.Grid(
            models=model or (),
            strategies=strategy or ("fsdp2",),
            world_sizes=world_size or sweep.usual_world_sizes(found),
            scalings=scaling or ("strong", "weak"),
            methods=method or ("mezo",),
            directions=directions or (1,),
            rows=rows,
            tokens=tokens,
            dtype=dtype,
            compute_dtype=compute_dtype,
            replicate=replicate or max(2, found.world_size // found.local_world_size),
            memory_cap_gib=memory_cap,
        )
        cells = grid.cells()
    sweep.check(cells, project)
    say: Callable[[str], None] = typer.echo if found.rank == 0 else lambda line: None
    say(str(found))
    turns = rounds or (3 if quick else 7)
    done = sweep.run(cells, out, found, rounds=turns, timeout_s=timeout, retry_failed=retry_failed, say=say)
    if found.rank == 0:
        say(f"report: {report.write(done, out, project)}")
