"""FSDP1: parameters flattened, padded and cut without regard to their borders; ``use_orig_params`` either way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import _is_fsdp_flattened
from torch.distributed.fsdp._flat_param import FlatParameter
from torch.distributed.fsdp._runtime_utils import _reshard

from mezo_scale.sharding.shard import Runs, run


class FlatSlice(NamedTuple):
    """One original parameter inside an FSDP1 unit's flat parameter."""

    places: list[tuple[nn.Module, str]]  # the owner first, then the modules that share the weight
    param: nn.Parameter  # as the model lists it: the original one, or the flat one that holds many
    shape: tuple[int, ...]
    trainable: bool
    local: torch.Tensor
    runs: Runs
    replica: int


def owns(param: torch.Tensor) -> bool:
    """Whether this is a unit's flat parameter itself, which without ``use_orig_params`` sits among the module's own."""
    return isinstance(param, FlatParameter)


def is_elsewhere(param: torch.Tensor) -> bool:
    """Whether an original parameter is a view into some unit's flat one; an outer unit's, if none in sight lists it."""
    return _is_fsdp_flattened(param)


def units(model: nn.Module) -> list[FullyShardedDataParallel]:
    """The FSDP1 units of the model that have parameters."""
    return [unit for unit in model.modules() if isinstance(unit, FullyShardedDataParallel) and unit._handle is not None]


def slices(model: nn.Module) -> Iterator[FlatSlice]:
    """Every original parameter that an FSDP1 unit of the model has flattened."""
    for unit in units(model):
        yield from _slices_of(unit, unit._handle)


def held(unit: Any) -> tuple[nn.Parameter, torch.Tensor, tuple[bool, ...]]:
    """A unit's flat parameter, what is stored of it here, and which of the original ones are trainable."""
    flat = unit._handle.flat_param
    originals = flat._params if flat._params is not None else [flat]
    stored = flat._local_shard if hasattr(flat, "_local_shard") else flat.data
    return flat, stored, tuple(bool(param.requires_grad) for param in originals)


def _slices_of(unit: FullyShardedDataParallel, handle: Any) -> Iterator[FlatSlice]:
    flat: Any
    flat, stored, _ = held(unit)
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
        yield FlatSlice(places, original, tuple(shape), bool(original.requires_grad), local, runs, replica)


def _replica(unit: FullyShardedDataParallel, handle: Any) -> int:
    """NO_SHARD replicates over its whole group; a hybrid strategy over its inter-node group; else there is one copy."""
    group = getattr(unit, "_inter_node_pg", None) if handle.uses_sharded_strategy else handle.process_group
    return dist.get_rank(group) if group is not None else 0


def prepare(model: nn.Module) -> None:
    """Put FSDP1's parameters in their sharded form."""
    refresh(model)


def refresh(model: nn.Module) -> None:
    """Drop gathered weights: FSDP1's root keeps its own after a forward that no backward follows."""
    for unit in units(model):
        if unit._is_root is not None:
            handle: Any = unit._handle
            # The root's goes back to its shard without freeing what it gathered, and would use that again.
            if handle.uses_sharded_strategy and not handle.needs_unshard():
                _reshard(unit, handle, True)
