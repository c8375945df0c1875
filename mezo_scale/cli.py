"""The command line. It parses, calls one function, and turns a MezoError into one line and exit code 2."""

import json
import os
import sys
import textwrap
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mezo_scale import launcher
from mezo_scale import recipe as recipes
from mezo_scale.errors import LaunchError, MezoError, ShardingError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="mezo-scale",
    help="Fine-tune language models with forward passes only, sharded over as many devices as it takes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its boxes would reflow the table of the recipe's fields
    pretty_exceptions_enable=False,
)


class Split(StrEnum):
    """A part of a task's data."""

    train = "train"
    dev = "dev"
    test = "test"


class Start(StrEnum):
    """What starts the ranks on the nodes of a job."""

    torchrun = "torchrun"
    deepspeed = "deepspeed"
    accelerate = "accelerate"


def _fields() -> str:
    """The recipe's fields for --help. The backspaces keep click from joining the lines."""
    paragraphs, section = ["\b\nThe recipe's fields:"], None
    for option in recipes.options():
        if section != option.key.split(".")[0]:
            section = option.key.split(".")[0]
            paragraphs.append(f"\b\n{section}")
        default = option.default if option.default == "required" else f"default {option.default}"
        indent = " " * 6
        about = textwrap.fill(
            option.description, 78, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
        paragraphs[-1] += f"\n  {option.key} ({option.type}; {default})\n{about}"
    return "\n\n".join(paragraphs)


Source = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe (YAML), or the directory of a run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Single fields of the recipe, like train.steps=200."),
]
Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Without a launcher: how many ranks to start on this machine; default: one per GPU."),
]
Until = Annotated[int | None, typer.Option(help="Stop after this many steps of the trajectory; default: all.", min=0)]


@app.command(epilog=_fields())
def train(recipe: Source, overrides: Overrides = None, processes: Processes = None) -> None:
    """Train: start a run, or go on with the one in the recipe's run directory.

    Run it alone, or under torchrun, deepspeed, accelerate launch or srun.
    """
    parsed = recipes.load(recipe, overrides or ())
    _launch(processes)
    from mezo_scale.trainer import train as run  # seconds to import

    run(parsed)


@app.command()
def evaluate(
    recipe: Source,
    overrides: Overrides = None,
    split: Annotated[Split, typer.Option(help="Which part of the data.")] = Split.test,
    until: Until = None,
    processes: Processes = None,
) -> None:
    """Accuracy of a recipe's model, or of a run's after its last step (or --until another)."""
    parsed = recipes.load(recipe, overrides or ())
    _launch(processes)
    from mezo_scale.rebuild import evaluate_recipe

    found, steps = evaluate_recipe(parsed, split.value, until)
    if _is_first():
        low, high = found.interval
        typer.echo(
            f"{parsed.model.name} after {steps} steps: accuracy on {split.value} {found.accuracy:.1%} "
            f"(95% interval {low:.1%} to {high:.1%}), loss {found.loss:.4f}, {found.count} examples"
        )


@app.command()
def replay(
    base: Annotated[str, typer.Option(help="The model the run began with: a folder, or a name on the hub.")],
    trajectory: Annotated[Path, typer.Option(help="The run's trajectory.mezo.")],
    out: Annotated[Path, typer.Option(help="The folder to make: an ordinary Hugging Face checkpoint.")],
    until: Until = None,
) -> None:
    """Rebuild the weights of a run, bit for bit, from its base model and its trajectory."""
    from mezo_scale.rebuild import rebuild

    steps = rebuild(base, trajectory, out, until)
    typer.echo(f"{out}: {base} after {steps} steps")


@app.command()
def verify(run: Annotated[str, typer.Argument(metavar="RUN_DIR", help="The directory of a run.")]) -> None:
    """Check a run: its trajectory, its base model, and its checkpoint against a replay."""
    parsed = recipes.load(run)
    from mezo_scale.rebuild import verify as check

    for line in check(parsed):
        typer.echo(f"ok  {line}")


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
    from mezo_scale.submission import Resources
    from mezo_scale.submission import submit as run

    resources = Resources(nodes, gpus_per_node, partition, time, start.value, tuple(sbatch or ()))
    for line in run(recipe, overrides or (), array, resources, dry_run=dry_run):
        typer.echo(line)


@app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a run, or of an array of them.")],
) -> None:
    """How a run is getting on: its state, steps, rate, time left and last losses."""
    from mezo_scale.status import status as ask
    from mezo_scale.status import table

    _console().print(table(ask(run)))


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="A model by name (opt-66b), a folder or its config.json, a hub name.")],
    gpus: Annotated[int, typer.Option(help="Devices in all, one rank each.")],
    gpu_memory: Annotated[float, typer.Option(metavar="GIB", help="Memory of each device.")],
    gpus_per_node: Annotated[
        int | None, typer.Option(help="Devices of each node; default: 8, or all if fewer.")
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
    """What fits on which devices, and how: memory, traffic and time of every strategy, before a machine is booked."""
    from mezo_scale.planner import Cluster, Rates, Report, Workload

    per_node = min(gpus, 8) if gpus_per_node is None else gpus_per_node
    cluster = Cluster(gpus, per_node, gpu_memory, headroom, host_memory)
    workload = Workload(rows, tokens, 2 * directions, dtype, positions)
    tell = partial(typer.echo, err=True) if dry_run else None
    report = Report.make(model, cluster, workload, Rates.parse(rate or ()), recipe, dry_run=tell)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2))
    else:
        _console().print(report.table())
        for line in report.lines():
            typer.echo(line)
    if report.choice is None:
        raise ShardingError(report.nothing_fits())


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
    say = typer.echo if found.rank == 0 else lambda line: None
    say(str(found))
    turns = rounds or (3 if quick else 7)
    done = sweep.run(cells, out, found, rounds=turns, timeout_s=timeout, retry_failed=retry_failed, say=say)
    if found.rank == 0:
        say(f"report: {report.write(done, out, project)}")


@app.command()
def recipe() -> None:
    """Print the reference page of the recipe, in Markdown."""
    typer.echo(recipes.reference(), nl=False)


def main() -> None:
    """Entry point. Exit codes: 0, 2 for what the user can mend, 130 for an interrupt; a bug keeps its traceback."""
    try:
        app()
    except MezoError as error:
        if _is_first() or not _is_shared(error):
            sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _launch(processes: int | None) -> None:
    """Says who started this process; without a launcher, starts one rank per device (or `processes`) in its place."""
    found = launcher.adopt()
    if found.name == "none":
        import torch

        devices = torch.cuda.device_count()
        if processes is not None and 0 < devices < processes:
            raise LaunchError(
                f"--processes is {processes}, but this machine has {devices} GPUs: at most one rank per GPU"
            )
        if (processes or devices) > 1:
            launcher.relaunch("mezo_scale.cli", sys.argv[1:], processes or devices)
    elif processes not in (None, found.world_size):
        raise LaunchError(f"--processes is {processes}, but {found.name} started {found.world_size}: leave it out")
    if found.rank == 0:
        typer.echo(str(found))


def _console() -> "Console":
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _is_shared(error: MezoError) -> bool:
    """Whether rank 0 has the same error to print: a recipe is the same for all, and the world says so of the rest."""
    return "mezo_scale.world" not in sys.modules or type(error).__name__ == "SharedError"


if __name__ == "__main__":
    main()
