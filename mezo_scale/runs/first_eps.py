"""What `optimizer.eps` is in a run: the recipe's number, or for `auto` what its trajectory says or a search finds."""

import math
from collections.abc import Callable

from mezo_scale.collectives import broadcast_bytes
from mezo_scale.distributed.world import World
from mezo_scale.errors import SharedError
from mezo_scale.models import Loaded
from mezo_scale.optim import eps
from mezo_scale.optim.losses import Objective
from mezo_scale.optim.mezo import MeZO
from mezo_scale.recipe import Recipe
from mezo_scale.runs.console import Screen
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.learning import estimator_of, noise_of
from mezo_scale.tasks.encoding import Batch
from mezo_scale.trajectory import Trajectory


def eps_of(
    recipe: Recipe,
    run: RunDirectory,
    world: World,
    loaded: Loaded,
    objective: Objective,
    batch: Callable[[], Batch],
    screen: Screen,
) -> float:
    """A run's eps, the same on all ranks; every one of them calls this before its optimizer is made.

    Args:
        batch: gives this rank's rows of the first step.

    Raises:
        SharedError: it is auto, and the objective has no slope to look at.
        TrajectoryError: the run's trajectory can't be read.
    """
    if recipe.optimizer.eps != "auto":
        return recipe.optimizer.eps
    begun = world.rank == 0 and run.trajectory.exists()  # the others may not see the run directory
    known = Trajectory.open(run.trajectory).header.eps if begun else 0.0
    if known := float.fromhex(broadcast_bytes(known.hex().encode()).decode()):
        return known
    if hasattr(objective, "smooth"):
        raise SharedError(
            f"optimizer.eps is auto, but a score such as train.objective={recipe.train.objective} has no slope to look "
            "at: give a number"
        )
    probe = MeZO(
        loaded.model,
        estimator=estimator_of(recipe),
        seed=recipe.optimizer.seed,
        distribution=noise_of(recipe),
        dtype=loaded.scratch_dtype,
        hang_timeout=recipe.train.hang_timeout,
    )
    found = eps.choose(probe, batch(), objective, recipe.train.micro_batch)
    for shares in found:
        screen.say(str(shares))
    best = found[-1]
    if not math.isfinite(best.total):
        raise SharedError(
            "optimizer.eps is auto, but the losses of the first rows have no slope at any eps: give a number, or look "
            "at train.objective"
        )
    screen.say(f"optimizer.eps: auto is {best.eps:g} in this run")
    return best.eps
