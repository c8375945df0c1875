"""DeepSpeed ZeRO-3: its configuration, checked, and a model that its own loader reads partitioned."""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mezo_scale.distributed.layout import Strategy
from mezo_scale.distributed.world import World
from mezo_scale.errors import RecipeError
from mezo_scale.models import checkpoints
from mezo_scale.recipe import Recipe
from mezo_scale.recipe.paths import find_beside


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """The DeepSpeed configuration that the recipe names, looked up here and beside the package.

    Raises:
        RecipeError: there is none, it does not fit the recipe, or DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(
            "sharding.strategy is zero3, but DeepSpeed is not installed: pip install 'mezo-scale[zero3]', or take "
            "sharding.strategy=fsdp2"
        )
    named = Path(recipe.sharding.ds_config)
    path = named if named.is_file() else find_beside(str(named))
    if path is None:
        raise RecipeError(f"sharding.ds_config: there is no file {named}; expected a DeepSpeed configuration (JSON)")
    config: dict[str, Any]
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"sharding.ds_config: {path} is not JSON ({error})") from None
    stage = config.get("zero_optimization", {}).get("stage")
    if stage != 3:
        raise RecipeError(
            f"sharding.ds_config: {path} has zero_optimization.stage {stage}, expected 3: the lower stages shard "
            "gradients and optimizer state, which MeZO has none of, and leave every rank the whole model"
        )
    if "optimizer" in config:
        raise RecipeError(f"sharding.ds_config: {path} has an optimizer, but MeZO is the optimizer: take it out")
    for key, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        enabled = bool(config.get(key, {}).get("enabled", False))
        if enabled != (recipe.model.dtype == dtype):
            raise RecipeError(
                f"sharding.ds_config: {path} has {key}.enabled {str(enabled).lower()}, but model.dtype is "
                f"{recipe.model.dtype}: make them agree"
            )
    return config


def load_zero3(recipe: Recipe, strategy: Strategy, world: World) -> nn.Module:
    """A checkpoint, partitioned; every rank calls it. Raises ModelError as `checkpoints.read` does."""
    import deepspeed
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.integrations import HfDeepSpeedConfig

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its first use compiles for a minute, and gloo serves as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    config = deepspeed_config(recipe)
    alive = HfDeepSpeedConfig(config)  # while it lives, from_pretrained partitions what it reads
    model: Any = checkpoints.read(recipe.model.name, getattr(torch, recipe.model.dtype))
    del alive
    # Else the weights of every LayerNorm would be saved under the names that they had in checkpoints of old.
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=None, config=config)
    partitioned: nn.Module = engine.module
    return partitioned
