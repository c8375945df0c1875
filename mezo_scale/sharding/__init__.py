"""From a model that somebody sharded to its `Layout`. One adapter per kind of storage; kinds may be mixed in one model.

An adapter owes three things: recognise its kind, list what this rank stores, drop stale gathered copies after a write.
A kind that nobody recognises is an error, never taken for a plain tensor.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from mezo_scale import noise
from mezo_scale.errors import ModelError, ShardingError
from mezo_scale.sharding import dtensor, flat_param, plain, zero3
from mezo_scale.sharding.shard import Layout, Runs, Shard, Site, is_decayed, walk

__all__ = ["Layout", "Runs", "Shard", "Site", "discover", "shards"]

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
    prefixes = {module: prefix for prefix, module in walk(model, _unwrap)}
    flat = {place: part for part in flat_param.slices(model) for place in part.places}
    found: dict[object, Shard] = {}
    sites: list[Site] = []
    for module, prefix in prefixes.items():
        own = module._parameters.items()
        attrs = [attr for attr, param in own if param is not None and not flat_param.owns(param)]
        attrs += [attr for owner, attr in flat if owner is module and attr not in attrs]
        for attr in attrs:
            part = flat.get((module, attr))
            param = module._parameters.get(attr)
            if part is not None:
                identity: object = part.places[0]
                shape, trainable, stored = part.shape, part.trainable, (part.local, part.runs, part.replica)
            else:
                assert param is not None
                identity, trainable = param, param.requires_grad
                if not trainable:
                    continue
                shape, stored = _stored(prefix + attr, param)
            if not trainable:
                continue
            if identity not in found:
                name = prefix + attr
                local, runs, replica = stored
                paged = zero3.paged(param)
                _check_storage(name, local, paged is not None)
                found[identity] = Shard(
                    name, noise.param_id(name), shape, local, runs, replica, is_decayed(module, attr), paged
                )
            sites.append(Site(module, attr, found[identity].name, found[identity].param_id))
    if not found:
        raise ModelError("the model has no trainable parameter: set requires_grad on what MeZO is to tune")

    def refresh() -> None:
        dtensor.refresh(model)
        flat_param.refresh(model)
        zero3.refresh(model)

    return Layout(list(found.values()), sites, refresh)


def _stored(name: str, param: nn.Parameter) -> tuple[tuple[int, ...], tuple[torch.Tensor, Runs, int]]:
    """(whole shape, (local, runs, replica)) of a parameter that is still a parameter."""
    if zero3.owns(param):
        return tuple(param.ds_shape), zero3.local(param)  # type: ignore[attr-defined]
    if isinstance(param, torch.distributed.tensor.DTensor):
        return tuple(param.shape), dtensor.local(param)
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


def _check_storage(name: str, local: torch.Tensor, paged: bool) -> None:
    if local.is_meta and not paged:
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
