"""FSDP2: a model spread over the ranks by torch's `fully_shard`, from outside and for any architecture.

transformers wraps a tied embedding and its head as two units, which gathers the weight twice, and keeps some units
gathered after the forward pass. So its sharded loader reads (each rank its own part), and `shard_fsdp2` shards.
"""

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from mezo_scale.distributed.layout import Strategy
from mezo_scale.distributed.world import World
from mezo_scale.errors import ShardingError
from mezo_scale.models import checkpoints, heads
from mezo_scale.models.shapes import skeleton
from mezo_scale.models.units import Unit, units
from mezo_scale.recipe import Recipe


def load_fsdp2(recipe: Recipe, strategy: Strategy, world: World) -> nn.Module:
    """A checkpoint or random weights, sharded; every rank calls it.

    Raises:
        ModelError: as `checkpoints.read`.
        ShardingError: as `shard_fsdp2`.
    """
    name, dtype = recipe.model.name, getattr(torch, recipe.model.dtype)
    compute_dtype = getattr(torch, recipe.model.compute_dtype) if recipe.model.compute_dtype else None
    offload = strategy.offload is not None and world.device.type != "cpu"
    if name.startswith(checkpoints.RANDOM):
        return _random_fsdp2(name, strategy, dtype, compute_dtype, world, offload)
    if strategy.world_size == 1 or not _reads_in_parts():
        model = checkpoints.read(name, dtype)
        shard_fsdp2(model, strategy.mesh(world.device.type), compute_dtype, offload=offload)
        return model if offload else model.to(world.device)
    model = skeleton(checkpoints.find(name), dtype)
    source: Any = checkpoints.read(name, dtype, distributed_config=_reading_plan(model, strategy))
    if hasattr(source, "generation_config"):
        model.generation_config = source.generation_config
    shard_fsdp2(model, next(source.parameters()).device_mesh, compute_dtype, offload=offload)
    _adopt(model, source)
    return model


def shard_fsdp2(
    model: Any, mesh: DeviceMesh, compute_dtype: torch.dtype | None = None, *, offload: bool = False
) -> None:
    """Shards a language model in place, unit by unit (`units`).

    Every unit frees its gathered weights after its forward pass, so the next one sees what was written to the shards.
    `compute_dtype` is for the layers; the tables and what lies between stay as stored, for a step's gradient is the
    small difference of two losses, and logits in bfloat16 would round most of it away.

    Raises:
        ShardingError: units that share a weight, as they would each get a part of their own. Nothing is sharded then.
    """
    rest: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    if offload:
        rest["offload_policy"] = CPUOffloadPolicy()
    layer: dict[str, Any] = dict(rest)
    if compute_dtype is not None:
        layer["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=compute_dtype, output_dtype=next(model.parameters()).dtype
        )
    root, *others = _units_apart(model)
    for unit in (*others, root):
        fully_shard(unit.module, **(layer if unit.kind == "layer" else rest))


def _units_apart(model: nn.Module) -> tuple[Unit, ...]:
    """The units of a model in which no two share a weight. Raises ShardingError."""
    found = units(model)
    inner = {module for unit in found[1:] for module in unit.module.modules()}
    owners: dict[nn.Parameter, str] = {}
    for unit in found:
        for name, module in unit.module.named_modules(prefix=unit.name):
            if unit.kind == "root" and module in inner:
                continue
            for key, parameter in module.named_parameters(name, recurse=False):
                owner = owners.setdefault(parameter, unit.name)
                if owner != unit.name:
                    raise ShardingError(
                        f"{owner or 'the root'} and {unit.name} share the weight {key}, but fsdp2 and hsdp gather each "
                        "of them apart: set sharding.strategy to zero3, or to ddp if a rank can hold the model"
                    )
    return found


def _random_fsdp2(
    name: str,
    strategy: Strategy,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None,
    world: World,
    offload: bool,
) -> nn.Module:
    """Random weights, made where they stay: no rank and no host ever holds more than its shards."""
    with init_empty_weights(include_buffers=False):
        model = heads.made(checkpoints.find(name), dtype=dtype)
    model.tie_weights()  # type: ignore[operator]  # undone while it was made without memory; FSDP2 would keep a tied table twice
    shard_fsdp2(model, strategy.mesh(world.device.type), compute_dtype, offload=offload)
    buffers = {name: buffer.to(world.device) for name, buffer in model.named_buffers()}
    model.to_empty(device="cpu" if offload else world.device)
    for name, buffer in buffers.items():  # computed from the configuration, and emptied with the rest
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = buffer
    model.tie_weights()  # type: ignore[operator]
    checkpoints.randomise_(model)
    return model


def _reads_in_parts() -> bool:
    """Whether this transformers can read only a rank's part; with an older one every rank reads all and keeps its."""
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return False
    return hasattr(DistributedConfig, "fsdp_plan")


def _reading_plan(model: nn.Module, strategy: Strategy) -> Any:
    """transformers' configuration for reading only this rank's part of a model. Raises ShardingError."""
    from transformers.distributed import DistributedConfig

    names = [unit.name for unit in _units_apart(model) if unit.kind == "layer"]
    # The numbers of the layers are written as wildcards there.
    plan = {".".join("*" if part.isdecimal() else part for part in name.split(".")) for name in names}
    return DistributedConfig(
        fsdp_size=strategy.shard,
        dp_replicate_size=strategy.replicate,
        fsdp_plan=dict.fromkeys(sorted(plan), "free_full_weight"),
        fsdp_cpu_offload=strategy.offload is not None,
    )


def _adopt(model: Any, source: nn.Module) -> None:
    """Gives a sharded model without storage the shards and the tables of one that has them."""
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    for name, module in model.named_modules():
        twin = source.get_submodule(name)
        for held in (module._buffers, vars(module)):
            for key, value in held.items():
                if isinstance(value, Tensor) and value.is_meta:
                    held[key] = getattr(twin, key)
