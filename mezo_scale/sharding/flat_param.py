"""FSDP1: parameters flattened, padded and cut without regard to their borders; ``use_orig_params`` either way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import _is_fsdp_flattened
from torch.distributed.fsdp._flat_param import FlatParameter
from torch.distributed.fsdp._runtime_utils import _reshard

from mezo_scale.errors import ShardingError
from mezo_scale.sharding.adapter import Adapter, Inner, Stored
from mezo_scale.sharding.shard import memory_of, run


class FlatParameters(Adapter):
    movers = ("torch.distributed.",)

    def owns(self, param: torch.Tensor) -> bool:
        """A flat parameter, or an original one that is a view into one; either belongs to a unit."""
        return isinstance(param, FlatParameter) or _is_fsdp_flattened(param)

    def stored(self, name: str, param: torch.Tensor) -> Stored:
        """Never of a parameter whose unit is in sight: that one is `inner`."""
        raise ShardingError(
            f"{name} belongs to an FSDP1 unit around the given model: give the model that FSDP returned"
        )

    def inner(self, model: nn.Module) -> Iterator[Inner]:
        for unit in units(model):
            yield from _inner(unit, unit._handle)

    def unwrap(self, module: nn.Module) -> nn.Module | None:
        return module.module if isinstance(module, FullyShardedDataParallel) else None

    def watch(self, model: nn.Module) -> Callable[[], object]:
        found = units(model)
        return lambda: [_state(unit) for unit in found]

    def as_state(self, param: torch.Tensor, elements: torch.Tensor) -> torch.Tensor:
        return elements.view(param.shape) if param.numel() == elements.numel() else elements  # whole under NO_SHARD

    def reshard(self, model: nn.Module) -> None:
        """FSDP1's root keeps its gathered weights after a forward that no backward follows."""
        for unit in units(model):
            if unit._is_root is not None:
                handle: Any = unit._handle
                # The root's goes back to its shard without freeing what it gathered, and would use that again.
                if handle.uses_sharded_strategy and not handle.needs_unshard():
                    _reshard(unit, handle, True)


def units(model: nn.Module) -> list[FullyShardedDataParallel]:
    """The FSDP1 units of the model that have parameters."""
    return [unit for unit in model.modules() if isinstance(unit, FullyShardedDataParallel) and unit._handle is not None]


def _held(unit: Any) -> tuple[nn.Parameter, torch.Tensor, tuple[bool, ...]]:
    """A unit's flat parameter, what is stored of it here, and which of the original ones are trainable."""
    flat = unit._handle.flat_param
    originals = flat._params if flat._params is not None else [flat]
    stored = flat._local_shard if hasattr(flat, "_local_shard") else flat.data
    return flat, stored, tuple(bool(param.requires_grad) for param in originals)


def _state(unit: Any) -> tuple[object, ...]:
    flat, stored, trainable = _held(unit)
    return id(flat), *memory_of(stored), trainable


def _inner(unit: FullyShardedDataParallel, handle: Any) -> Iterator[Inner]:
    flat: Any
    flat, stored, _ = _held(unit)
    replica = _replica(unit, handle)
    originals = flat._params if flat._params is not None else [flat] * len(flat._param_infos)
    for info, shape, part, original in zip(
        flat._param_infos, flat._shapes, flat._shard_param_infos, originals, strict=True
    ):
        places = [(info.module, info.param_name)] + [
            (shared.module, shared.param_name)
            for shared in flat._shared_param_infos
            if shared.prim_module is info.module and shared.prim_param_name == info.param_name
        ]
        if part.in_shard:
            start, length = part.offset_in_shard, part.numel_in_shard
            local, runs = stored.detach()[start : start + length], run(0, part.intra_param_start_idx, length)
        else:
            local, runs = stored.detach()[:0], run(0, 0, 0)
        yield Inner(places, original, bool(original.requires_grad), Stored(tuple(shape), local, runs, replica))


def _replica(unit: FullyShardedDataParallel, handle: Any) -> int:
    """NO_SHARD replicates over its whole group; a hybrid strategy over its inter-node group; else there is one copy."""
    group = getattr(unit, "_inter_node_pg", None) if handle.uses_sharded_strategy else handle.process_group
    return dist.get_rank(group) if group is not None else 0
