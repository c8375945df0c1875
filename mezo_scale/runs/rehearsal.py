"""A run without its steps: what it would be made of, measured as far as that goes without writing anything."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from mezo_scale import collectives, tasks
from mezo_scale.distributed.world import World
from mezo_scale.models import Loaded
from mezo_scale.planner import GIB, Workload, architecture, memory
from mezo_scale.recipe import Recipe
from mezo_scale.runs.console import Screen
from mezo_scale.runs.memory import INFERENCE, LOADING, PhaseMemory
from mezo_scale.runs.splits import EncodedSplits
from mezo_scale.tasks import Kind
from mezo_scale.tasks.encoding import Batch, common_prefix
from mezo_scale.tasks.kinds.kind import Objective

_SHOWN = 2  # examples
_FORWARDS = 3  # timed, the quickest of them counts


def rehearse(
    recipe: Recipe,
    world: World,
    loaded: Loaded,
    kind: Kind[Any, Any],
    splits: EncodedSplits,
    objective: Objective,
    batch: Batch,
    screen: Screen,
    phases: PhaseMemory,
) -> None:
    """Shows what a checked run is about to do; every rank calls it.

    Args:
        objective, batch: of the first step, on this rank's rows (one micro-batch of them).
    """
    _show_data(recipe, kind, splits, screen)
    forward_s = _time_forward(loaded, objective, batch, phases)
    rows, branches = collectives.max_integer(len(next(iter(batch.values())))), _branches(recipe)
    loading, alone = phases.most_gib(LOADING), phases.most_gib(INFERENCE)
    parts = -(-recipe.train.batch_size // (rows * loaded.strategy.axes.rows_size))
    step_s = branches * parts * forward_s
    if kind.reads_images:
        what, planned = f"{rows} images", ""
    else:
        tokens = collectives.max_integer(max(leaf.shape[-1] for leaf in batch.values() if getattr(leaf, "ndim", 0) > 1))
        what, planned = f"{rows} x {tokens} tokens", _planned(recipe, loaded, kind, rows, tokens)
    screen.say(
        f"memory per rank: {planned}measured {loading:.2f} GiB with the model loaded, {alone:.2f} GiB in one forward "
        "pass"
    )
    screen.say(
        f"time: a forward pass of {what} takes {forward_s:.2f} s: a step of {branches * parts} takes "
        f"{step_s:.2f} s or a little more, {recipe.train.steps:,} steps about "
        f"{_duration(step_s * recipe.train.steps)}, evaluations aside"
    )
    screen.say("dry run: nothing was written, and no step was taken; leave --dry-run out to train")


def _planned(recipe: Recipe, loaded: Loaded, kind: Kind[Any, Any], rows: int, tokens: int) -> str:
    """What the planner says of a step's memory."""
    positions = tokens if kind.scores_all else 1
    work = Workload(rows, tokens, _branches(recipe), recipe.model.compute_dtype or recipe.model.dtype, positions)
    planned = memory(architecture(loaded.model.config), loaded.strategy, work).peak / GIB
    plain = recipe.tune.what == "full" and recipe.optimizer.distribution != "low_rank"
    return (
        f"{planned:.2f} GiB planned for a step's weights and activations"
        f"{'' if plain else ' if all weights were tuned by dense directions, less here'}; "
    )


def _branches(recipe: Recipe) -> int:
    """Evaluations of a row in a step."""
    if recipe.optimizer.estimator == "grouped":
        return 2
    return recipe.optimizer.num_directions * (1 if recipe.optimizer.estimator == "one_sided" else 2)


def _show_data(recipe: Recipe, kind: Kind[Any, Any], splits: EncodedSplits, screen: Screen) -> None:
    for name in ("train", "dev", "test"):
        lengths = sorted(kind.length(row) for row in getattr(splits, name))
        if kind.reads_images:
            screen.say(f"{name}: {len(lengths):,} images")
            continue
        screen.say(
            f"{name}: {len(lengths):,} examples of {lengths[len(lengths) // 2]} tokens (median), {lengths[-1]} at most"
        )
    for number, example in enumerate(tasks.load(recipe.task).train[:_SHOWN], 1):
        screen.say(f"--- training example {number} ---")
        for line in _lines(example):
            screen.say(line)
    answers = kind.scored(splits.train[0]) if recipe.task.candidates is not None else []
    if len(answers) > 1 and (alike := common_prefix(answers)):
        screen.say(
            f"the answers begin alike: {alike} of the {len(answers[0])} tokens in the first one tell it from no other; "
            "let task.template end in them, which leaves less to run and to average away"
        )


def _lines(example: Any) -> Sequence[str]:
    if not hasattr(example, "as_dict"):  # of a task from outside the package
        return [repr(example)]
    shown = example.as_dict()
    right = [shown["gold"], *shown.get("also", ())] if shown["candidates"] else shown["gold"]
    answers = shown["candidates"] or shown["gold"]
    return [shown["prompt"], *(f"  {'*' if answer in right else ' '} {answer!r}" for answer in answers)]


def _time_forward(loaded: Loaded, objective: Objective, batch: Batch, phases: PhaseMemory) -> float:
    """Seconds of one forward pass of these rows with the weights as they are, on the slowest rank."""
    seconds = []
    with phases.phase(INFERENCE), torch.no_grad():
        for _ in range(_FORWARDS):
            start = time.perf_counter()
            float(objective(loaded.model, batch).sum())  # waits for the device
            seconds.append(time.perf_counter() - start)
    return collectives.max_integer(round(min(seconds) * 1e6)) / 1e6


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
