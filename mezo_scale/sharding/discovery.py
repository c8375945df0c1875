"""Looks at a model and lists its parameters, whatever they are stored in. The adapters know the kinds of storage."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from mezo_scale import noise
from mezo_scale.errors import ModelError, ShardingError
from mezo_scale.sharding import dtensor, flat_param, plain, zero3
from mezo_scale.sharding.flat_param import FlatSlice
from mezo_scale.sharding.shard import Layout, Runs, Shard, Site, is_decayed, walk
from mezo_scale.sharding.watch import Watch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def shards(model: nn.Module) -> list[Shard]:
    """What this rank stores of every trainable parameter, in the model's own order.

    Args:
        model: plain, or sharded by ``fully_shard``, FSDP1, ``deepspeed.initialize`` (stage 3), tensor parallelism,
            ``accelerate`` or ``from_pretrained(distributed_config=...)``. It is neither wrapped nor copied.

    Raises:
        ShardingError: a wrapper or a parameter type that is not known.
        ModelError: nothing trainable, or parameters that are quantised or on the meta device.
    """
    return discover(model).shards


def discover(model: nn.Module) -> Layout:
    """The model's `Layout`; puts gathered parameters back into their sharded form first. Errors as in `shards`."""
    dtensor.prepare(model)
    flat_param.prepare(model)
    listed = list(places(model))
    found: dict[object, Shard] = {}
    sites: list[Site] = []
    parameters: dict[str, nn.Parameter] = {}
    for place in listed:
        if not place.trainable:
            continue
        if place.identity not in found:
            shard = found[place.identity] = shard_of(place)
            _check_storage(place.module, shard)
            parameters[shard.name] = place.param
        shard = found[place.identity]
        sites.append(Site(place.module, place.attr, shard.name, shard.param_id))
    if not found:
        raise ModelError("the model has no trainable parameter: set requires_grad on what MeZO is to tune")
    watch = Watch(model, [(place.module, place.attr) for place in listed if place.part is None])

    def refresh() -> None:
        dtensor.refresh(model)
        flat_param.refresh(model)
        zero3.refresh(model)

    def is_current() -> bool:
        if watch.is_unchanged():
            return True
        dtensor.refresh(model)  # what a forward has gathered hides the shards
        flat_param.refresh(model)
        return watch.is_unchanged()

    return Layout(list(found.values()), sites, refresh, parameters, is_current)


def check_not_hidden(old: Layout, new: Layout) -> None:
    """Raise ShardingError for a tuned weight that is a plain attribute now, made from something out of sight."""
    seen = {(site.module, site.attr) for site in new.sites}
    for site in old.sites:
        if (site.module, site.attr) not in seen and isinstance(site.module.__dict__.get(site.attr), torch.Tensor):
            raise ShardingError(
                f"{site.name} is no longer a parameter but a tensor that something else makes (an FSDP1 unit around "
                "the given model, a parametrization): make the optimizer from the wrapped model"
            )


class Place(NamedTuple):
    """Where a module reads a parameter, under its canonical name."""

    module: nn.Module
    attr: str
    name: str
    param: nn.Parameter  # as the model lists it
    part: FlatSlice | None  # inside an FSDP1 unit's flat parameter

    @property
    def identity(self) -> object:
        """The same for all places of a tied weight."""
        return self.param if self.part is None else self.part.places[0]

    @property
    def trainable(self) -> bool:
        return self.param.requires_grad if self.part is None else self.part.trainable


def places(model: nn.Module) -> Iterator[Place]:
    """Every place of every parameter, frozen ones too, in the model's own order."""
    flat = {place: part for part in flat_param.slices(model) for place in part.places}
    for prefix, module in modules(model):
        own = {attr: param for attr, param in module._parameters.items() if param is not None}
        attrs = [attr for attr, param in own.items() if not flat_param.owns(param)]
        attrs += [attr for owner, attr in flat if owner is module and attr not in attrs]
        for attr in attrs:
            part = flat.get((module, attr))
            yield Place(module, attr, prefix + attr, own[attr] if part is None else part.param, part)


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(canonical prefix, module) of every module, wrappers left out."""
    return walk(model, _unwrap)


def shard_of(place: Place) -> Shard:
    """What this rank stores of a parameter. Raises ShardingError for a kind that is not known."""
    part, paged = place.part, None
    if part is not None:
        shape, (local, runs, replica) = part.shape, (part.local, part.runs, part.replica)
    else:
        shape, (local, runs, replica) = _stored(place.name, place.param)
        paged = zero3.paged(place.param)
    decayed = is_decayed(place.module, place.attr)
    return Shard(place.name, noise.param_id(place.name), shape, local, runs, replica, decayed, paged)


def _stored(name: str, param: nn.Parameter) -> tuple[tuple[int, ...], tuple[torch.Tensor, Runs, int]]:
    """(whole shape, (local, runs, replica)) of a parameter that is still a parameter."""
    if zero3.owns(param):
        return tuple(param.ds_shape), zero3.local(param)  # type: ignore[attr-defined]
    if isinstance(param, torch.distributed.tensor.DTensor):
        return tuple(param.shape), dtensor.local(param)
    if flat_param.is_elsewhere(param):
        raise ShardingError(
            f"{name} belongs to an FSDP1 unit around the given model: give the model that FSDP returned"
        )
    if plain.owns(param):
        if not param.is_contiguous():
            raise ShardingError(f"{name} is not contiguous in memory: call .contiguous() on it before tuning")
        return tuple(param.shape), plain.local(param)
    if type(param).__module__.startswith(("bitsandbytes", "torchao", "quanto", "hqq")):
        raise ModelError(
            f"{name} is quantised ({type(param).__name__}): tune unquantised weights, or LoRA adapters on them"
        )
    raise ShardingError(
        f"{name} is a {type(param).__module__}.{type(param).__name__} over {type(param.data).__name__}, a kind of "
        "sharding that is not known here: expected plain tensors, DTensor (FSDP2, TP), FSDP1 or DeepSpeed ZeRO-3"
    )


def _check_storage(module: nn.Module, shard: Shard) -> None:
    name, local = shard.name, shard.local
    if local.is_meta and shard.paged is None:
        if hasattr(module, "_hf_hook"):
            raise ModelError(
                f"{name} is offloaded by accelerate (device_map or cpu_offload), which copies it in for each forward "
                "and drops what is written to it: load the model without a device_map and shard it with FSDP2 or "
                "ZeRO-3 (both offload), or freeze it"
            )
        raise ModelError(f"{name} is on the meta device and has no values: load or initialise the model first")
    if local.dtype not in DTYPES:
        raise ModelError(
            f"{name} is stored as {local.dtype} (quantised?): trainable weights must be float32, bfloat16 or float16; "
            "load without quantisation, or freeze it"
        )


def _unwrap(module: nn.Module) -> nn.Module | None:
    """What a known wrapper wraps; None for an ordinary module; an error for a wrapper that is not known."""
    if isinstance(module, FullyShardedDataParallel | DistributedDataParallel):
        return module.module
    if isinstance(module, CheckpointWrapper):
        return module._checkpoint_wrapped_module  # type: ignore[no-any-return]
    compiled = sys.modules.get("torch._dynamo.eval_frame")  # there if something was compiled; importing it is slow
    if compiled is not None and isinstance(module, compiled.OptimizedModule):
        return module._orig_mod  # type: ignore[no-any-return]
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and isinstance(module, deepspeed.DeepSpeedEngine):
        if module.zero_optimization_stage() != 3:
            raise ShardingError(
                f"DeepSpeed runs at ZeRO stage {module.zero_optimization_stage()}: forward-only tuning shards "
                "parameters, "
                'which is stage 3; set "zero_optimization": {"stage": 3}'
            )
        return module.module  # type: ignore[no-any-return]
    kind = type(module).__name__
    if "DataParallel" in kind or "FullySharded" in kind or "ShardedModule" in kind:
        raise ShardingError(
            f"the model is wrapped by {type(module).__module__}.{kind}, which is not known here: expected FSDP2 "
            "(fully_shard), FSDP1, DistributedDataParallel, DeepSpeed ZeRO-3, tensor parallelism, or no wrapper"
        )
    return None
