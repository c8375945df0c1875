"""From a base model and a trajectory to an ordinary checkpoint."""

from pathlib import Path

import torch

from mezo_scale.distributed.world import World
from mezo_scale.errors import RecipeError
from mezo_scale.models import checkpoints, save
from mezo_scale.optim.replay import replay
from mezo_scale.runs.console import Screen
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.trajectory import Trajectory


def rebuild(base: str, trajectory: Path, out: Path, until: int | None) -> int:
    """Replays a trajectory on its base model and saves an ordinary checkpoint in `out`. Returns the steps applied.

    In one process and on the CPU: the bits are the run's, whatever layout it had.

    Raises:
        RecipeError: `out` is there already, or the base model is not.
        TrajectoryError: the trajectory is damaged, or is not of this base model.
    """
    world = World.from_environment()
    if world.size > 1:
        raise RecipeError(f"replay runs in one process, but WORLD_SIZE is {world.size}: start it without a launcher")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"--out: {out} is there already: give the name of a folder that is not")
    records = Trajectory.open(trajectory)
    checkpoints.find(base)
    tokenizer = checkpoints.load_tokenizer(base)
    model = checkpoints.read(base, stored_dtype(records))
    screen = Screen(world)
    with screen.counting("replaying") as progress:
        steps = replay(model, records, until, progress=progress)
    save.write(model, tokenizer, out)
    return steps


def export(directory: Path, out: Path) -> tuple[int, int]:
    """Writes the compact form of a run's trajectory. Returns its steps and bytes.

    Raises:
        TrajectoryError: the trajectory is damaged or has fewer steps than were taken, or `out` is there already.
    """
    run = RunDirectory(directory)
    records = Trajectory.open(run.trajectory, at_least=run.steps_said())
    return len(records), records.export(out)


def stored_dtype(records: Trajectory) -> torch.dtype:
    """What the weights of the run were stored in."""
    dtype: torch.dtype = getattr(torch, records.header.manifest[0][2])
    return dtype
