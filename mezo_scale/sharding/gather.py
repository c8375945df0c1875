"""Whole parameters, one at a time, from what the ranks store of them: the same for every scheme.

Each rank sends its own elements to all, one rank after the other, and rank 0 alone puts them together. So a rank holds
its shards and at most one other shard of the parameter under way, and rank 0 that parameter besides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mezo_scale import collectives
from mezo_scale.errors import ShardingError
from mezo_scale.sharding.discovery import places, prepare, shard_of
from mezo_scale.sharding.frozen import buffers
from mezo_scale.sharding.shard import Runs, Shard


def stored(model: nn.Module) -> tuple[list[Shard], dict[str, str]]:
    """What this rank stores of all that a checkpoint holds: parameters, frozen ones too, and saved buffers.

    Returns:
        The shards, of any dtype, each parameter once; and every other name of a tied parameter, with the name that its
        shard has.

    Raises:
        ShardingError, ModelError: a kind of storage that is not known.
    """
    prepare(model)
    found: dict[object, Shard] = {}
    tied: dict[str, str] = {}
    for place in places(model):
        if place.identity in found:
            tied[place.name] = found[place.identity].name
        else:
            found[place.identity] = shard_of(place)
    held = list(found.values())
    for name, shard, kind in buffers(model):
        if shard is None:
            raise ShardingError(f"the buffer {name} is a {kind}, which can't be gathered: expected an ordinary tensor")
        held.append(shard)
    return held, tied


class Gather:
    """Gathers parameters that are listed alike on every rank.

    Args:
        shards: in the same order on every rank.

    Raises:
        ShardingError: the ranks do not store every element exactly once, or one has no values. On every rank alike.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        mine = np.array([_sizes(shard) for shard in shards], np.int64).reshape(-1, 3)
        self._sizes = collectives.gather_table(mine).transpose(1, 0, 2).tolist()
        for shard, sizes in zip(shards, self._sizes, strict=True):
            count = sum(held for _, _, held in sizes)
            if count != shard.numel:
                raise ShardingError(
                    f"{shard.name} can't be gathered: the ranks have values for {count} of its {shard.numel} elements"
                )

    def __call__(self, index: int) -> torch.Tensor | None:
        """The whole parameter number `index`, of its own shape and dtype on the CPU, on rank 0; None on the others.

        Every rank calls it, for the same parameter.
        """
        shard = self._shards[index]
        whole = torch.empty(shard.numel, dtype=shard.local.dtype) if collectives.rank() == 0 else None
        for source, (count, extent, held) in enumerate(self._sizes[index]):
            if held and source > 0:
                runs, part = _sent(shard, source, count, extent)
                _place(whole, runs, part)
            elif held:
                with shard.storage() as local:
                    _place(whole, shard.runs, local)
        return None if whole is None else whole.view(shard.shape)


def _place(whole: torch.Tensor | None, runs: Runs, part: torch.Tensor) -> None:
    if whole is not None:
        part = part.cpu()
        for offset, start, length in runs.tolist():
            whole[start : start + length] = part[offset : offset + length]


def _sizes(shard: Shard) -> tuple[int, int, int]:
    """(number of runs, elements up to the last one's end, elements) that this rank sends."""
    if shard.replica > 0 or (shard.local.is_meta and shard.paged is None):
        return 0, 0, 0
    return len(shard.runs), int(shard.runs[:, [0, 2]].sum(1).max(initial=0)), shard.local_numel


def _sent(shard: Shard, source: int, count: int, extent: int) -> tuple[Runs, torch.Tensor]:
    """Runs and elements that a rank other than 0 holds, on every rank."""
    kind = shard.local.device.type
    device = shard.local.device if kind not in ("cpu", "meta") else collectives.device()
    runs = torch.empty(count, 3, dtype=torch.int64, device=device)
    part = torch.empty(extent, dtype=shard.local.dtype, device=device)
    if collectives.rank() == source:
        runs.copy_(torch.from_numpy(np.ascontiguousarray(shard.runs)))
        with shard.storage() as local:
            part.copy_(local[:extent])
    dist.broadcast(runs, source)
    dist.broadcast(part.view(torch.uint8), source)  # as bytes: not every backend knows every dtype
    return runs.cpu().numpy(), part
