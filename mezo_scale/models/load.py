"""From a name in the recipe to a model spread over the ranks in one of the strategies.

Reading is transformers' and DeepSpeed's work; sharding with FSDP2 is done in `fsdp2`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mezo_scale.distributed.layout import Strategy
from mezo_scale.distributed.world import World
from mezo_scale.models import checkpoints, tuning
from mezo_scale.models.fsdp2 import load_fsdp2
from mezo_scale.models.zero3 import deepspeed_config, load_zero3
from mezo_scale.recipe import Recipe


@dataclass(frozen=True)
class Loaded:
    """A model ready to be tuned.

    Attributes:
        model: in evaluation mode, on the world's device, sharded and frozen as the recipe says.
        processor: the model's own tokenizer, or its `ImageReader`.
        device: where its inputs belong (its shards may lie in host memory).
        strategy: how it lies on the ranks; which rows each of them evaluates follows from its axes.
        compute: the context its forward pass runs in (autocast, or nothing).
        scratch_dtype: what perturbed matrices are made in under autocast; None: as the weights are.
        precision: what its forward pass computes in.
    """

    model: nn.Module
    processor: Any
    device: torch.device
    strategy: Strategy
    compute: Callable[[], AbstractContextManager[Any]] = nullcontext
    scratch_dtype: torch.dtype | None = None
    precision: torch.dtype = torch.float32


def check(recipe: Recipe, world: World) -> None:
    """What can be said about the recipe's model and layout without loading anything.

    Raises:
        RecipeError, ShardingError: options that contradict each other or the number of processes; no such model; an
            adapter that it can't have.
        ModelError: a model that is quantised, or neither a language model nor an image classifier.
    """
    if _strategy(recipe, world).is_deepspeed:
        deepspeed_config(recipe)
    checkpoints.find(recipe.model.name)
    tuning.check(recipe)


def load(recipe: Recipe, world: World, weights: Path | None = None) -> Loaded:
    """Loads and shards the model, and frees what is to be tuned; every rank calls it.

    `weights`: a folder with the same model after some steps, which is read in the place of the recipe's; the processor
    is the recipe's.

    Raises:
        MezoError: as `check`, `checkpoints.read` and `tuning.tune_`.
    """
    section, strategy = recipe.model, _strategy(recipe, world)
    source = recipe if weights is None else _renamed(recipe, str(weights.absolute()))
    model = _LOADERS[strategy.name](source, strategy, world)
    tuning.tune_(model, recipe, world)
    compute: Callable[[], AbstractContextManager[Any]] = nullcontext
    compute_dtype = None
    if strategy.autocasts and section.compute_dtype not in (None, section.dtype):
        compute_dtype = getattr(torch, section.compute_dtype)
        # Its cache would keep a 16-bit copy of every weight that runs unperturbed, until the forward is over.
        compute = partial(torch.autocast, world.device.type, compute_dtype, cache_enabled=False)
    processor = checkpoints.load_processor(section.name)
    precision = getattr(torch, section.compute_dtype or section.dtype)
    return Loaded(model.eval(), processor, world.device, strategy, compute, compute_dtype, precision)


def _renamed(recipe: Recipe, name: str) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": name})})


def _load_whole(recipe: Recipe, strategy: Strategy, world: World) -> nn.Module:
    name = recipe.model.name
    # Random weights are made where they stay: the host may not have room for them.
    with world.device if name.startswith(checkpoints.RANDOM) else nullcontext():
        return checkpoints.read(name, getattr(torch, recipe.model.dtype)).to(world.device)


def _strategy(recipe: Recipe, world: World) -> Strategy:
    section = recipe.model
    master = section.dtype == "float32" and section.compute_dtype is not None
    return Strategy.of(recipe.sharding, world.size, world.nodes, master=master)


_LOADERS: dict[str, Callable[[Recipe, Strategy, World], nn.Module]] = {
    "single": _load_whole,
    "ddp": _load_whole,
    "fsdp2": load_fsdp2,
    "hsdp": load_fsdp2,
    "zero3": load_zero3,
}
