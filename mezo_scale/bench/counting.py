"""Counts collectives where torch dispatches them, so that what is counted is what happens, whoever asked for it."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Collective:
    """One call.

    Attributes:
        op: as torch dispatches it, "c10d::_allgather_base_".
        nbytes: of what it fills on this rank: gathered weights, reduced sums; for a reduce-scatter, of what it reads,
            which is the larger side there.
        ranks: in its group.
    """

    op: str
    nbytes: int
    ranks: int


class Traffic(TorchDispatchMode):
    """Every collective of the block, in order. Works for any backend and device; costs some time on every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    @property
    def calls(self) -> dict[str, list[int]]:
        """Bytes of each call, by operation."""
        calls: dict[str, list[int]] = defaultdict(list)
        for one in self.collectives:
            calls[one.op].append(one.nbytes)
        return dict(calls)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            side = args[1] if "reduce_scatter" in func.name() else args[0]
            tensors = [leaf for leaf in tree_leaves(side) if isinstance(leaf, torch.Tensor)]
            self.collectives.append(Collective(func.name(), sum(one.nbytes for one in tensors), _ranks(args)))
        return func(*args, **kwargs or {})


def summed(collectives: list[Collective]) -> list[dict[str, Any]]:
    """Calls and bytes per operation and size of group."""
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for one in collectives:
        groups[one.op, one.ranks].append(one.nbytes)
    return [
        {"op": op, "ranks": ranks, "calls": len(sizes), "bytes": sum(sizes)} for (op, ranks), sizes in groups.items()
    ]


def _ranks(args: Any) -> int:
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                return int(dist.ProcessGroup.unbox(argument).size())
            except RuntimeError:  # the operation of a reduction travels the same way
                continue
    return 1
