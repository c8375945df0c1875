"""What a model is worth on a split."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mezo_scale import collectives, models
from mezo_scale.distributed.layout import Strategy
from mezo_scale.distributed.memory import keep_memory_steady
from mezo_scale.distributed.world import process_group
from mezo_scale.errors import NotFiniteError, RecipeError
from mezo_scale.models import Loaded
from mezo_scale.optim.replay import Start, replay
from mezo_scale.recipe import Recipe
from mezo_scale.runs import snapshots
from mezo_scale.runs.beginning import take_up_adapter_
from mezo_scale.runs.console import Screen
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.fitness import check_model
from mezo_scale.runs.inputs import differing, inputs_of
from mezo_scale.runs.sharing import share_prompts
from mezo_scale.runs.splits import EncodedSplits, check_same_reward, prepare
from mezo_scale.tasks import Kind, Score
from mezo_scale.tasks.encoding import to_device


def evaluate(
    loaded: Loaded,
    kind: Kind[Any, Any],
    rows: Sequence[Any],
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Scores every row once; every rank calls it and gets the whole result.

    Where a model gives the same numbers so, a prompt is run once for all answers to it (`share_prompts`).
    Rows of similar cost go together, `batch_size` per rank and forward pass. All ranks run equally often (a sharded
    forward pass needs them all): one without rows left runs one again and does not count it.
    `progress` is called with (batches done, batches in all).

    Raises:
        NotFiniteError: on every rank, if no row has a finite score.
    """
    share_prompts(loaded, kind, rows)
    order = np.argsort([kind.cost(row) for row in rows], kind="stable")
    axes = loaded.strategy.axes
    per_round = batch_size * axes.rows_size
    rounds = math.ceil(len(order) / per_round)
    score = kind.score([], [])
    for number in range(rounds):
        mine = order[number * per_round : (number + 1) * per_round][
            axes.rows_rank(collectives.rank()) :: axes.rows_size
        ]
        chosen = [rows[index] for index in (mine if len(mine) else order[:1])]
        batch = to_device(kind.collate(chosen), loaded.device)
        with torch.no_grad(), loaded.compute():
            predictions = kind.predict(loaded.model, batch)
        score += kind.score(predictions[: len(mine)], chosen[: len(mine)])
        if progress is not None:
            progress(number + 1, rounds)
    score = score.over_ranks()
    if score.not_finite == len(order):
        raise NotFiniteError(
            f"all of {len(order)} examples have scores that are not finite, so there is nothing to grade: check the "
            "checkpoint for NaN, take another model.dtype (float16 overflows above 65504, float32 and bfloat16 do "
            "not), or after training begin anew with a smaller optimizer.lr"
        )
    return score


def evaluate_recipe(recipe: Recipe, split: str, until: int | None) -> tuple[Score, int]:
    """The score of a recipe's model; of a run's, after the steps in its directory. Returns it and those steps.

    Raises:
        RecipeError: its method has no steps that could be replayed.
    """
    if recipe.method.name not in ("mezo", "zero_shot"):
        raise RecipeError(
            f"method.name is {recipe.method.name}, whose result is in {recipe.directory} alone: read its report.md, or "
            "evaluate a checkpoint by model.name and method.name=zero_shot"
        )
    run = RunDirectory(recipe.directory)
    keep_memory_steady()
    with process_group(always_group=Strategy(recipe.sharding.strategy).needs_group) as world:
        with world.raise_on_all():
            models.check(recipe, world)
            recipe, kind = prepare(recipe)
            splits = EncodedSplits.read(recipe, kind)
            if world.rank == 0 and recipe.method.name == "mezo" and until != 0 and run.steps_said():
                run.read_log()  # steps that were taken and are lost must not be graded as if they had not been
        splits.check_same(world)
        check_same_reward(kind, world)
        screen = Screen(world)
        for remark in splits.remarks(kind, recipe, split):
            screen.say(remark)
        if world.rank == 0 and recipe.method.name == "mezo":
            _say_what_differs(recipe, run, kind, splits, screen)
        loaded, start = snapshots.load(recipe, world, run, screen, until)
        take_up_adapter_(loaded.model, run)
        check_model(loaded, kind, splits.test, recipe)
        steps = replay_if_begun(loaded.model, run.trajectory, until, screen, start)
        with screen.counting(f"evaluating ({split})") as progress:
            found = evaluate(loaded, kind, getattr(splits, split), recipe.train.eval_batch, progress)
    return found, steps


def _say_what_differs(
    recipe: Recipe, run: RunDirectory, kind: Kind[Any, Any], splits: EncodedSplits, screen: Screen
) -> None:
    """A line on what the run was made with and this evaluation is not. That it starts from its weights, replay sees."""
    made_with = {name: digest for name, digest in run.read_inputs().items() if name != "weights"}
    now = inputs_of(recipe, kind, splits.examples, models.checkpoints.load_processor(recipe.model.name))
    if others := differing(made_with, now):
        screen.say(f"{run.path} was made with other {others} than it is evaluated with now")


def replay_if_begun(
    model: nn.Module, trajectory: Path, until: int | None, screen: Screen, start: Start | None = None
) -> int:
    """Replays a run, if rank 0 sees its trajectory: the others may not see the folder at all.

    Every rank calls it. Returns the steps that are in the weights, on all ranks.
    """
    begun = collectives.max_integer(int(collectives.rank() == 0 and trajectory.is_file()))
    if not begun or until == 0:
        return 0
    with screen.counting("replaying", "steps") as progress:
        return replay(model, trajectory, until, progress=progress, start=start)
