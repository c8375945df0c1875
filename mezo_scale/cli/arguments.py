"""Arguments and options that several commands take, and what they do before they begin."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from mezo_scale.distributed import launcher
from mezo_scale.distributed.signals import end_with_parent
from mezo_scale.errors import LaunchError

if TYPE_CHECKING:
    from rich.console import Console

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


def launch(processes: int | None) -> None:
    """Says who started this process; without a launcher, starts one rank per device (or `processes`) in its place."""
    found = launcher.adopt()
    if found.name in launcher.PARENTS:
        end_with_parent()
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


@contextmanager
def loading() -> Iterator[None]:
    """For the imports of a command: what modules make stays, and to search it takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def console() -> "Console":
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
