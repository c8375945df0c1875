"""From a name in the recipe to a model spread over the ranks in one of the strategies.

Reading is transformers' and DeepSpeed's work; sharding with FSDP2 is done in `fsdp2`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mezo_scale.distributed.world import World
from mezo_scale.errors import RecipeError
from mezo_scale.models import checkpoints
from mezo_scale.models.fsdp2 import load_fsdp2, mesh_shape
from mezo_scale.models.zero3 import deepspeed_config, load_zero3
from mezo_scale.recipe import Recipe


@dataclass(frozen=True)
class Loaded:
    """A model ready to be tuned.

    Attributes:
        model: in evaluation mode, on the world's device, sharded as the recipe says.
        tokenizer: the model's own.
        device: where its inputs belong (its shards may lie in host memory).
        compute: the context its forward pass runs in (autocast, or nothing).
        scratch_dtype: what perturbed matrices are made in under autocast; None: as the weights are.
    """

    model: nn.Module
    tokenizer: Any
    device: torch.device
    compute: Callable[[], AbstractContextManager[Any]] = nullcontext
    scratch_dtype: torch.dtype | None = None


def check(recipe: Recipe, world: World) -> None:
    """What can be said about the recipe's model and layout without loading anything.

    Raises:
        RecipeError, ShardingError: options that contradict each other or the number of processes; no such model.
        ModelError: a model that is quantised, or is no causal language model.
    """
    sharding = recipe.sharding
    if sharding.replicate is not None and sharding.strategy != "hsdp":
        raise RecipeError(
            f"sharding.replicate is {sharding.replicate}, but sharding.strategy is {sharding.strategy}: "
            "copies are what hsdp has; leave replicate out or take hsdp"
        )
    if sharding.cpu_offload and sharding.strategy not in ("fsdp2", "hsdp"):
        raise RecipeError(
            f"sharding.cpu_offload is for fsdp2 and hsdp, but sharding.strategy is {sharding.strategy}: leave it out; "
            "zero3 offloads as its ds_config says"
        )
    mesh_shape(sharding, world)
    if sharding.strategy == "zero3":
        deepspeed_config(recipe)
    checkpoints.find(recipe.model.name)


def load(recipe: Recipe, world: World) -> Loaded:
    """Loads and shards the model; every rank calls it. Raises ModelError as `check` and `checkpoints.read` do."""
    section, sharding = recipe.model, recipe.sharding
    dtype = getattr(torch, section.dtype)
    compute_dtype = getattr(torch, section.compute_dtype) if section.compute_dtype else None
    compute: Callable[[], AbstractContextManager[Any]] = nullcontext
    if sharding.strategy in ("fsdp2", "hsdp"):
        model = load_fsdp2(section, sharding, dtype, compute_dtype, world)
    else:
        model = load_zero3(recipe) if sharding.strategy == "zero3" else _load_single(section.name, dtype, world)
        if compute_dtype is not None and compute_dtype != dtype:
            # Its cache would keep a 16-bit copy of every weight that runs unperturbed, until the forward is over.
            compute = partial(torch.autocast, world.device.type, compute_dtype, cache_enabled=False)
    scratch_dtype = None if compute is nullcontext else compute_dtype
    return Loaded(model.eval(), checkpoints.load_tokenizer(section.name), world.device, compute, scratch_dtype)


def _load_single(name: str, dtype: torch.dtype, world: World) -> nn.Module:
    # Random weights are made where they stay: the host may not have room for them.
    with world.device if name.startswith(checkpoints.RANDOM) else nullcontext():
        return checkpoints.read(name, dtype).to(world.device)
