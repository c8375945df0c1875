"""The sharding schemes that are known. Whatever none of them recognises is an error, never taken for a plain tensor."""

from __future__ import annotations

import torch
from torch import nn

from mezo_scale.errors import ModelError, ShardingError
from mezo_scale.sharding.adapter import Adapter
from mezo_scale.sharding.dtensor import DTensors
from mezo_scale.sharding.flat_param import FlatParameters
from mezo_scale.sharding.plain import Plain
from mezo_scale.sharding.zero3 import Zero3

ADAPTERS: tuple[Adapter, ...] = (Zero3(), DTensors(), FlatParameters(), Plain())
"""The first that owns a parameter is its adapter."""


def find(param: torch.Tensor) -> Adapter | None:
    """The adapter of a parameter; None for a kind of storage that is not known."""
    return next((adapter for adapter in ADAPTERS if adapter.owns(param)), None)


def adapter_of(name: str, param: torch.Tensor) -> Adapter:
    """As `find`. Raises ShardingError, or ModelError for quantised weights, with the `name`."""
    adapter = find(param)
    if adapter is not None:
        return adapter
    if type(param).__module__.startswith(("bitsandbytes", "torchao", "quanto", "hqq")):
        raise ModelError(
            f"{name} is quantised ({type(param).__name__}): tune unquantised weights, or LoRA adapters on them"
        )
    raise ShardingError(
        f"{name} is a {type(param).__module__}.{type(param).__name__} over {type(param.data).__name__}, a kind of "
        "sharding that is not known here: expected plain tensors, DTensor (FSDP2, TP), FSDP1 or DeepSpeed ZeRO-3"
    )


def unwrap(module: nn.Module) -> nn.Module | None:
    """What a known wrapper wraps; None for an ordinary module; an error for a wrapper that is not known."""
    for adapter in ADAPTERS:
        wrapped = adapter.unwrap(module)
        if wrapped is not None:
            return wrapped
    kind = type(module).__name__
    if "DataParallel" in kind or "FullySharded" in kind or "ShardedModule" in kind:
        raise ShardingError(
            f"the model is wrapped by {type(module).__module__}.{kind}, which is not known here: expected FSDP2 "
            "(fully_shard), FSDP1, DistributedDataParallel, DeepSpeed ZeRO-3, tensor parallelism, or no wrapper"
        )
    return None


def share_rows(model: nn.Module) -> bool:
    """Whether several ranks compute the losses of the same rows together, as under tensor parallelism."""
    return any(adapter.shares_rows(model) for adapter in ADAPTERS)


def movers() -> tuple[str, ...]:
    """How the names of the modules begin whose code moves shards."""
    return tuple(name for adapter in ADAPTERS for name in adapter.movers)
