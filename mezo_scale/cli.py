"""The command line. It parses, calls one function, and turns a MezoError into one line and exit code 2."""

import os
import sys
import textwrap
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mezo_scale import launcher
from mezo_scale import recipe as recipes
from mezo_scale.errors import LaunchError, MezoError

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
    from rich.console import Console

    from mezo_scale.status import status as ask
    from mezo_scale.status import table

    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table(ask(run)))


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


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _is_shared(error: MezoError) -> bool:
    """Whether rank 0 has the same error to print: a recipe is the same for all, and the world says so of the rest."""
    return "mezo_scale.world" not in sys.modules or type(error).__name__ == "SharedError"


if __name__ == "__main__":
    main()
