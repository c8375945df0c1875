"""What crosses between ranks in a step: each weight once, whatever the number of branches, and a few scalars."""

import collections
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mezo_scale as ms
from tests.ranks import layouts, models
from tests.ranks.pool import Ranks

Counts = dict[str, list[int]]


class Traffic(TorchDispatchMode):
    """Every collective of the block: its operation, and the bytes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counts = collections.defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # The first argument is what is filled: gathered weights, or the sums.
            tensors = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, torch.Tensor)]
            self.calls[func.name()].append(sum(tensor.nbytes for tensor in tensors))
        return func(*args, **kwargs or {})


def traffic_of(layout: str, name: str, num_directions: int) -> tuple[Counts, Counts, int]:
    """(calls of a bare forward, calls of a step, bytes of the weights)."""
    sharded = layouts.shard(layout, models.build(name))
    batch, objective = models.batch(name, 2), models.objective(name)
    optimizer = ms.MeZO(sharded.model, num_directions=num_directions)
    for _ in range(2):  # the first checks the pairing
        optimizer.step(batch=batch, objective=objective)
    with Traffic() as bare, torch.no_grad():
        objective(sharded.model, batch)
    optimizer.step(batch=batch, objective=objective)
    with Traffic() as step:
        optimizer.step(batch=batch, objective=objective)
    size = sum(parameter.nbytes for parameter in models.build(name).parameters())
    sharded.close()
    return dict(bare.calls), dict(step.calls), size


def gathers(calls: Counts) -> Counts:
    return {name: sizes for name, sizes in calls.items() if "allgather" in name}


@pytest.mark.parametrize("name", ["opt", "llama", "mixtral", "t5"])
@pytest.mark.parametrize("layout", ["fsdp2", "fsdp1", "zero3"])
def test_a_step_gathers_each_weight_once_and_reduces_once(ranks: Ranks, layout: str, name: str) -> None:
    for bare, step, size in ranks(2, traffic_of, layout=layout, name=name, num_directions=1):
        assert gathers(step) == gathers(bare)
        gathered = sum(map(sum, gathers(step).values()))
        assert size <= gathered <= 1.1 * size  # shards are padded
        rest = {key: value for key, value in step.items() if key not in gathers(step)}
        assert [key for key, sizes in rest.items() for _ in sizes] == ["c10d::allreduce_"]


@pytest.mark.parametrize("layout", ["plain", "fsdp2", "zero3"])
def test_another_direction_costs_sixteen_bytes(ranks: Ranks, layout: str) -> None:
    _, one, _ = ranks(2, traffic_of, layout=layout, name="llama", num_directions=1)[0]
    _, four, _ = ranks(2, traffic_of, layout=layout, name="llama", num_directions=4)[0]
    assert gathers(four) == gathers(one)
    assert four["c10d::allreduce_"][0] - one["c10d::allreduce_"][0] == 3 * 16
