"""Where a run begins, or goes on: everything is checked, then a session takes the steps."""

from mezo_scale import models
from mezo_scale.collectives import max_integer
from mezo_scale.distributed.layout import Strategy
from mezo_scale.distributed.memory import collecting_only_new_garbage, keep_memory_steady
from mezo_scale.distributed.world import process_group
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import Recipe, differences, takes_steps
from mezo_scale.runs import on_dev, trackers
from mezo_scale.runs.console import Screen
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.learning import estimator_of, noise_of, order_of, rate_of
from mezo_scale.runs.methods import session as methods
from mezo_scale.runs.splits import EncodedSplits, check_same_reward, prepare
from mezo_scale.runs.trainer import Trainer
from mezo_scale.trajectory import Trajectory


def train(recipe: Recipe, *, dry_run: bool = False) -> None:
    """Runs a recipe, or goes on with the run that its directory holds. Every rank of a launch calls it.

    - All input is checked before anything is written: recipe, layout, model, data, an earlier run.
    - Killed at any point, the same call goes on after the last step whose record was written; a baseline's run begins
      again. After a power loss it goes on from what reached the disk: at most 16 steps are taken again.
    - The base model and the trajectory are the checkpoint; a snapshot on the way only saves replaying what led to it.
    - With `dry_run` it ends before the first step, shows what it would do, and has written nothing.

    Raises:
        MezoError: for whatever the user can mend.
    """
    keep_memory_steady()
    method = recipe.method.name
    if dry_run and method != "mezo":
        raise RecipeError(f"--dry-run is for MeZO's steps, but method.name is {method}: leave one of them out")
    with process_group(always_group=Strategy(recipe.sharding.strategy).needs_group) as world:
        run = RunDirectory(recipe.directory)
        with world.raise_on_all():
            models.check(recipe, world)
            trackers.check(recipe.output.trackers)
            if recipe.optimizer.rounding == "master" and recipe.model.dtype == "float16":
                raise RecipeError(
                    "optimizer.rounding is master, but model.dtype is float16, whose numbers are not the upper half of "
                    "float32's: take model.dtype=bfloat16"
                )
            rows = recipe.train.batch_size
            if takes_steps(method) and rows < world.size:
                raise RecipeError(
                    f"train.batch_size is {rows}, but there are {world.size} processes: give each at least one row, "
                    f"train.batch_size={world.size}"
                )
            recipe, kind = prepare(recipe)
            done = _steps_done(recipe, run) if world.rank == 0 and method == "mezo" else 0
            splits = EncodedSplits.read(recipe, kind)
            on_dev.check(recipe, splits)
            if method == "mezo":
                estimator_of(recipe)
                noise_of(recipe)
                rate_of(recipe)
                order_of(recipe, kind, splits.train)
            else:
                fit = methods.plan(recipe, world, run, kind, splits)
        splits.check_same(world)
        check_same_reward(kind, world)
        world.check_shared(run.path)
        for remark in splits.remarks(kind, recipe, "train", "dev", "test"):
            Screen(world).say(remark)
        if method != "mezo":
            with collecting_only_new_garbage():
                methods.carry_out(recipe, world, run, kind, splits, fit)
            return
        trainer = Trainer(recipe, world, run, kind, splits)
        with collecting_only_new_garbage():
            if dry_run:
                trainer.rehearse(max_integer(done))
            else:
                trainer.go(max_integer(done))


def _steps_done(recipe: Recipe, run: RunDirectory) -> int:
    """How many steps the run directory holds; 0 where there is no run yet.

    Raises:
        RecipeError: its run was another one, or went further than this one is to go; or its trajectory is missing.
        TrajectoryError: its trajectory can't be continued, has lost steps, or is written by another process.
    """
    if not run.trajectory.exists():
        if run.path.exists() and not run.path.is_dir():
            raise RecipeError(f"output.dir: {run.path} is a file, expected a folder or nothing")
        run.check_unclaimed()
        return 0
    if run.recipe.is_file():
        changed = differences(run.recorded(), recipe)
        if changed:
            raise RecipeError(
                f"{run.path} holds a run with {'; '.join(changed)}: give another output.dir, or the same values"
            )
    log = Trajectory.open(run.trajectory, append=True, at_least=run.steps_said())
    log.release()
    done = len(log)
    if done > recipe.train.steps:
        raise RecipeError(
            f"train.steps is {recipe.train.steps}, but the run in {run.path} has {done} already: ask for more, or "
            f"replay it --until {recipe.train.steps}"
        )
    return done
