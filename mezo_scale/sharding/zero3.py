"""DeepSpeed ZeRO-3: a parameter is cut in equal 1-D partitions, the last ones padded; gathered by module hooks.

DeepSpeed itself is not imported: its parameters carry what is needed (``ds_tensor``, ``ds_shape``,
``ds_process_group``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mezo_scale.errors import ShardingError
from mezo_scale.sharding.adapter import Adapter, Stored
from mezo_scale.sharding.shard import run


class Zero3(Adapter):
    movers = ("deepspeed.",)

    def owns(self, param: torch.Tensor) -> bool:
        return hasattr(param, "ds_id")

    def stored(self, name: str, param: Any) -> Stored:
        stored, group = param.ds_tensor, param.ds_process_group
        if stored.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ShardingError(
                f"ZeRO-3 stores {name} as {stored.dtype} (quantised weights): switch the quantisation off"
            )
        size = int(stored.ds_numel)
        start = dist.get_rank(group) * size
        replica = dist.get_rank() // dist.get_world_size(group)
        runs = run(0, start, min(size, int(param.ds_numel) - start))
        shape = tuple(param.ds_shape)
        if _is_on_disk(param):
            nowhere = torch.empty(size, dtype=stored.dtype, device="meta")
            return Stored(shape, nowhere, runs, replica, paged=partial(_open, param, keep=True))
        return Stored(shape, stored.detach(), runs, replica)

    def storage(self, param: Any) -> torch.Tensor:
        return param.ds_tensor  # type: ignore[no-any-return]

    def unwrap(self, module: nn.Module) -> nn.Module | None:
        deepspeed = sys.modules.get("deepspeed")
        if deepspeed is None or not isinstance(module, deepspeed.DeepSpeedEngine):
            return None
        if module.zero_optimization_stage() != 3:
            raise ShardingError(
                f"DeepSpeed runs at ZeRO stage {module.zero_optimization_stage()}: forward-only tuning shards "
                'parameters, which is stage 3; set "zero_optimization": {"stage": 3}'
            )
        return module.module  # type: ignore[no-any-return]

    def refresh(self, model: nn.Module) -> None:
        """Gathered weights (small ones stay gathered) are brought up to date in place, in one all-gather a group.

        Partitioning them instead would hide the release from DeepSpeed's count of gathered elements, which ends
        prefetching.
        """
        owned: list[Any] = [param for param in model.parameters() if self.owns(param)]
        gathered = [param for param in owned if param.ds_status.name == "AVAILABLE"]
        for group in dict.fromkeys(param.ds_process_group for param in gathered):
            members = [param for param in gathered if param.ds_process_group is group]
            _gather(members, group)
        for param in owned:  # a node's secondary partition (ZeRO++): made anew from the primary at the next gather
            if getattr(param, "ds_secondary_tensor", None) is not None:
                param.ds_secondary_tensor = None


def _is_on_disk(param: Any) -> bool:
    return getattr(param.ds_tensor, "final_location", None) == "nvme"


@contextmanager
def _open(param: Any, keep: bool) -> Iterator[torch.Tensor]:
    """A partition in one of the swapper's own buffers; afterwards written back (keep), and released."""
    swapper = param.nvme_swapper
    swapper.synchronize_reads()  # what DeepSpeed fetched ahead may be this one
    if param.ds_tensor.status.name == "NOT_AVAILABLE":
        swapper.swap_in([param], async_op=False)
    yield param.ds_tensor.detach()
    if keep:
        swapper.swap_out_and_release([param])
    else:
        swapper.remove_partition_and_release_buffers([param])


def _gather(params: list[Any], group: Any) -> None:
    for dtype in dict.fromkeys(param.ds_tensor.dtype for param in params):
        members = [param for param in params if param.ds_tensor.dtype == dtype]
        mine = torch.cat([_in_memory(param) for param in members])
        everyone = mine.new_empty(dist.get_world_size(group) * mine.numel())  # flat, as gloo asks
        dist.all_gather_into_tensor(everyone, mine, group=group)
        everyone = everyone.view(-1, mine.numel())
        start = 0
        for param in members:
            size = int(param.ds_tensor.ds_numel)
            whole = everyone[:, start : start + size].reshape(-1)[: param.ds_numel]
            param.data.copy_(whole.view(param.ds_shape))
            start += size


def _in_memory(param: Any) -> torch.Tensor:
    """The partition on the device where the parameter is gathered."""
    if not _is_on_disk(param):
        return param.ds_tensor.detach().to(param.data.device).view(-1)  # type: ignore[no-any-return]
    with _open(param, keep=False) as stored:
        return stored.to(param.data.device, copy=True).view(-1)
