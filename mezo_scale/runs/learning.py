"""What a recipe says of how a run learns: its estimator, its noise, its rate, and which examples make up which
step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import get_scheduler

from mezo_scale.errors import RecipeError
from mezo_scale.noise import Noise
from mezo_scale.optim.estimators import Estimator, Grouped, OneSided, Spsa
from mezo_scale.recipe import Recipe
from mezo_scale.tasks import Kind
from mezo_scale.tasks.order import Order, labels_of


def estimator_of(recipe: Recipe) -> Estimator:
    """Raises RecipeError for fields that contradict each other."""
    options, rows = recipe.optimizer, recipe.train.batch_size
    name, size, directions = options.estimator, options.group_size, options.num_directions
    if name != "grouped":
        if size is not None:
            raise RecipeError(
                f"optimizer.group_size is {size}, but optimizer.estimator is {name}, which has no groups: leave it "
                "out, or take estimator=grouped"
            )
        if name == "spsa":
            return Spsa(directions)
        if directions < 2:
            raise RecipeError(
                f"optimizer.num_directions is {directions}, but optimizer.estimator is one_sided, whose baseline is "
                "the mean over 2 or more: take num_directions=4, which costs as much as spsa with 2"
            )
        return OneSided(directions)
    if size is None:
        raise RecipeError("optimizer.estimator is grouped, but there is no optimizer.group_size: give one, such as 4")
    if directions != 1:
        raise RecipeError(
            f"optimizer.num_directions is {directions}, but optimizer.estimator is grouped, where they follow from the "
            "groups: leave it out"
        )
    if rows % size:
        raise RecipeError(
            f"train.batch_size is {rows}, which optimizer.group_size {size} does not divide: take a multiple, so that "
            "all groups are of one size"
        )
    return Grouped(size, rows)


def noise_of(recipe: Recipe) -> Noise:
    """Raises RecipeError for fields that contradict each other."""
    options = recipe.optimizer
    for name, value in (("rank", options.rank), ("entries", options.entries)):
        if value is not None and options.distribution != "low_rank":
            raise RecipeError(
                f"optimizer.{name} is {value}, but optimizer.distribution is {options.distribution}, which has no "
                f"{name}: leave it out, or take distribution=low_rank"
            )
    return Noise(options.distribution, options.rank, options.entries)


def rate_of(recipe: Recipe) -> Callable[[int], float]:
    """From a step to its learning rate, by transformers' schedules. Raises RecipeError if the warm-up never ends."""
    steps, warmup, options = recipe.train.steps, recipe.method.warmup, recipe.optimizer
    if warmup >= steps:
        raise RecipeError(f"method.warmup is {warmup}, but train.steps is {steps}: warm up for fewer")
    schedule = get_scheduler(
        "constant_with_warmup" if options.schedule == "constant" else options.schedule,
        torch.optim.SGD([torch.zeros(1)]),
        num_warmup_steps=warmup,
        num_training_steps=steps,
    )
    (share,) = schedule.lr_lambdas
    return lambda step: options.lr * share(step)


def order_of(recipe: Recipe, kind: Kind[Any, Any], rows: Sequence[Any]) -> Order:
    """The order of a train split's rows. Raises RecipeError if it can't be balanced as asked."""
    section = recipe.train
    return Order(
        recipe.optimizer.seed,
        section.batch_size,
        [kind.length(row) for row in rows],
        labels_of(rows) if section.balance == "labels" else None,
        recipe.optimizer.group_size,
        section.sort_window,
    )
