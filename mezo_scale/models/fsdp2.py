"""FSDP2: a model spread over the ranks by torch's `fully_shard`, from outside and for any architecture.

transformers wraps a tied embedding and its head as two units, which gathers the weight twice, and keeps some units
gathered after the forward pass. So its sharded loader reads (each rank its own part), and `shard_fsdp2` shards.
"""

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from mezo_scale.distributed.world import World
from mezo_scale.errors import ShardingError
from mezo_scale.models import checkpoints
from mezo_scale.recipe import ModelSection, ShardingSection


def mesh_shape(sharding: ShardingSection, world: World) -> tuple[int, int]:
    """How many copies of the model there are, and over how many ranks each is spread. Raises ShardingError."""
    if sharding.strategy == "single":
        return world.size, 1
    if sharding.strategy != "hsdp":
        return 1, world.size
    replicate = world.nodes if sharding.replicate is None else sharding.replicate
    if world.size % replicate:
        divisors = [str(n) for n in range(1, world.size + 1) if world.size % n == 0]
        raise ShardingError(
            f"sharding.replicate is {replicate}, but WORLD_SIZE is {world.size}, which {replicate} does not divide: "
            f"set sharding.replicate to {' or '.join(divisors)}, or start "
            f"{(world.size // replicate + 1) * replicate} processes"
        )
    return replicate, world.size // replicate


def load_fsdp2(
    section: ModelSection,
    sharding: ShardingSection,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None,
    world: World,
) -> nn.Module:
    """A checkpoint or random weights, sharded; every rank calls it. Raises ModelError as `checkpoints.read` does."""
    replicate, shard = mesh_shape(sharding, world)
    offload = sharding.cpu_offload and world.device.type != "cpu"
    if section.name.startswith(checkpoints.RANDOM):
        return _random_fsdp2(section.name, (replicate, shard), dtype, compute_dtype, world, offload)
    distributed = _sharded_loading(replicate, shard, section, sharding)
    if distributed is None:
        model = checkpoints.read(section.name, dtype)
        shard_fsdp2(model, _mesh((replicate, shard), world), compute_dtype, offload=offload)
        return model if offload else model.to(world.device)
    source = checkpoints.read(section.name, dtype, distributed_config=distributed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(section.name), dtype=dtype)
    model.generation_config = source.generation_config
    shard_fsdp2(model, next(source.parameters()).device_mesh, compute_dtype, offload=offload)
    _adopt(model, source)
    return model


def shard_fsdp2(
    model: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype | None = None, *, offload: bool = False
) -> None:
    """Shards a causal language model in place: one unit per decoder layer, untied tables apart, the rest in the root.

    Every unit frees its gathered weights after its forward pass, so the next one sees what was written to the shards.
    `compute_dtype` is for the layers; the tables and what lies between stay as stored, for a step's gradient is the
    small difference of two losses, and logits in bfloat16 would round most of it away.
    """
    rest: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    if offload:
        rest["offload_policy"] = CPUOffloadPolicy()
    layer: dict[str, Any] = dict(rest)
    if compute_dtype is not None:
        layer["mp_policy"] = MixedPrecisionPolicy(param_dtype=compute_dtype, output_dtype=model.dtype)
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in names:
            fully_shard(module, **layer)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    if all(tables) and tables[0].weight is not tables[1].weight:
        for table in tables:
            fully_shard(table, **rest)
    fully_shard(model, **rest)


def _mesh(shape: tuple[int, int], world: World) -> DeviceMesh:
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
    return mesh if shape[0] > 1 else mesh["shard"]


def _random_fsdp2(
    name: str,
    mesh_shape: tuple[int, int],
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None,
    world: World,
    offload: bool,
) -> nn.Module:
    """Random weights, made where they stay: no rank and no host ever holds more than its shards."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(checkpoints.find(name), dtype=dtype)
    shard_fsdp2(model, _mesh(mesh_shape, world), compute_dtype, offload=offload)
    buffers = {name: buffer.to(world.device) for name, buffer in model.named_buffers()}
    model.to_empty(device="cpu" if offload else world.device)
    for name, buffer in buffers.items():  # computed from the configuration, and emptied with the rest
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = buffer
    model.tie_weights()
    checkpoints.randomise_(model)
    return model


def _sharded_loading(replicate: int, shard: int, section: ModelSection, sharding: ShardingSection) -> Any:
    """transformers' configuration for reading only this rank's part, or None where that can't be had."""
    if replicate * shard == 1:
        return None
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return None
    if not hasattr(DistributedConfig, "fsdp_plan"):  # an older transformers: every rank reads all and keeps its part
        return None
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(section.name))
    layers = set(skeleton._no_split_modules or ())
    names = [name for name, module in skeleton.named_modules() if type(module).__name__ in layers]
    # The numbers of the layers are written as wildcards there.
    plan = {".".join("*" if part.isdecimal() else part for part in name.split(".")) for name in names}
    return DistributedConfig(
        fsdp_size=shard,
        dp_replicate_size=replicate,
        fsdp_plan=dict.fromkeys(sorted(plan), "free_full_weight"),
        fsdp_cpu_offload=sharding.cpu_offload,
    )


def _adopt(model: nn.Module, source: nn.Module) -> None:
    """Gives a sharded model without storage the shards and the tables of one that has them."""
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    for name, module in model.named_modules():
        twin = source.get_submodule(name)
        for held in (module._buffers, vars(module)):
            for key, value in held.items():
                if isinstance(value, Tensor) and value.is_meta:
                    held[key] = getattr(twin, key)
