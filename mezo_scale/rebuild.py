"""Finished runs: their weights from the base model and the trajectory, their accuracy, and whether all of it agrees."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from mezo_scale import checkpoints, models
from mezo_scale.errors import RecipeError, TrajectoryError
from mezo_scale.evaluation import Evaluation, evaluate
from mezo_scale.recipe import Recipe
from mezo_scale.replay import replay
from mezo_scale.reporting import Screen
from mezo_scale.run_directory import RunDirectory
from mezo_scale.trainer import Material
from mezo_scale.trajectory import Trajectory
from mezo_scale.world import World, joined


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
    model = checkpoints.read(base, _dtype(records))
    screen = Screen(world)
    with screen.counting("replaying") as progress:
        steps = replay(model, records, until, progress=progress)
    checkpoints.write(model, tokenizer, out)
    return steps


def evaluate_recipe(recipe: Recipe, split: str, until: int | None) -> tuple[Evaluation, int]:
    """The accuracy of a recipe's model; of a run's, after the steps in its directory. Returns it and those steps."""
    run = RunDirectory(Path(recipe.output.dir))
    with joined(always_group=recipe.sharding.strategy != "single") as world:
        with world.together():
            models.check(recipe, world)
            material = Material.read(recipe)
        loaded = models.load(recipe, world)
        screen = Screen(world)
        steps = 0
        if run.trajectory.is_file() and until != 0:
            with screen.counting("replaying") as progress:
                steps = replay(loaded.model, run.trajectory, until, progress=progress)
        with screen.counting(f"evaluating ({split})") as progress:
            found = evaluate(loaded, getattr(material, split), recipe.train.eval_batch, progress)
    return found, steps


def verify(recipe: Recipe) -> Iterator[str]:
    """Checks a run directory against itself and its base model; yields what holds, one line each.

    Raises:
        MezoError: at the first thing that does not.
    """
    run = RunDirectory(Path(recipe.output.dir))
    records = Trajectory.open(run.trajectory)
    skipped = sum(record.skipped for record in records)
    size = os.path.getsize(run.trajectory)
    yield f"{run.trajectory}: {len(records)} steps ({skipped} skipped), {size:,} bytes, every checksum right"
    checkpoints.find(recipe.model.name)
    model = checkpoints.read(recipe.model.name, _dtype(records))
    replay(model, records, until=0)
    yield f"{recipe.model.name}: the base model that the run began with (fingerprint {records.header.fingerprint})"
    if not run.checkpoint.is_dir():
        return
    step = run.read_evaluation().get("tuned", {}).get("step", len(records))
    with Screen(World.from_environment()).counting("replaying") as progress:
        replay(model, records, step, progress=progress)
    saved = checkpoints.read(str(run.checkpoint), _dtype(records)).state_dict()
    rebuilt = model.state_dict()
    different = [name for name in rebuilt if name not in saved or not torch.equal(rebuilt[name], saved[name])]
    if different:
        raise TrajectoryError(
            f"{run.checkpoint} is not what the trajectory gives after {step} steps: {len(different)} of {len(rebuilt)} "
            f"weights differ, {different[0]} for one; replay the trajectory to have the right ones"
        )
    yield f"{run.checkpoint}: bit for bit what {step} replayed steps give"


def _dtype(records: Trajectory) -> torch.dtype:
    """What the weights of the run were stored in."""
    return getattr(torch, records.header.manifest[0][2])
