"""What crosses between ranks in a step: each weight once, whatever the number of branches, and a few scalars."""

import pytest
import torch

import mezo_scale as ms
from mezo_scale.bench.counting import Traffic
from tests.support import layouts, models
from tests.support.pool import Ranks

Counts = dict[str, list[int]]


def traffic_of(layout: str, name: str, num_directions: int) -> tuple[Counts, Counts, int]:
    """(calls of a bare forward, calls of a step, bytes of the weights)."""
    sharded = layouts.shard(layout, models.build(name))
    batch, objective = models.batch(name, 2), models.objective(name)
    optimizer = ms.MeZO(sharded.model, num_directions=num_directions)
    for _ in range(3):  # the first step checks the pairing, and ZeRO-3 learns the order of modules from the first runs
        optimizer.step(batch=batch, objective=objective)
    with Traffic() as bare, torch.no_grad():  # after a write: FSDP1's root keeps its weights from forward to forward
        objective(sharded.model, batch)
    for _ in range(3):
        with Traffic() as step:
            optimizer.step(batch=batch, objective=objective)
    size = sum(parameter.nbytes for parameter in models.build(name).parameters())
    sharded.close()
    return bare.calls, step.calls, size


def gathers(calls: Counts) -> Counts:
    return {name: sizes for name, sizes in calls.items() if "allgather" in name}


LAYOUTS = ("fsdp2", "fsdp1", "zero3")
CELLS = [(layout, name) for layout in LAYOUTS for name in ("opt", "llama", "mixtral", "t5")]
CELLS.remove(("zero3", "t5"))


@pytest.mark.parametrize(("layout", "name"), CELLS)
def test_a_step_gathers_each_weight_once_and_reduces_a_few_bytes(ranks: Ranks, layout: str, name: str) -> None:
    for bare, step, size in ranks(2, traffic_of, layout=layout, name=name, num_directions=1):
        assert gathers(step) == gathers(bare)
        gathered = sum(map(sum, gathers(step).values()))
        assert size <= gathered <= 1.3 * size  # shards are padded
        rest = {key: value for key, value in step.items() if key not in gathers(step)}
        # 8 bytes before the forward: does any rank have to learn a new kind of call? And the losses after it.
        assert list(rest) == ["c10d::allreduce_"]
        assert rest["c10d::allreduce_"][0] == 8
        assert len(rest["c10d::allreduce_"]) == 2


def test_zero3_gathers_again_only_what_runs_branch_by_branch(ranks: Ranks) -> None:
    # T5's two attentions with position biases, which have no batch dimension: 2 of 6, and only their projections.
    for _, step, size in ranks(2, traffic_of, layout="zero3", name="t5", num_directions=1):
        assert size <= sum(map(sum, gathers(step).values())) <= 1.15 * size


@pytest.mark.parametrize("layout", ["plain", "fsdp2", "zero3"])
def test_another_direction_costs_sixteen_bytes(ranks: Ranks, layout: str) -> None:
    _, one, _ = ranks(2, traffic_of, layout=layout, name="llama", num_directions=1)[0]
    _, four, _ = ranks(2, traffic_of, layout=layout, name="llama", num_directions=4)[0]
    assert gathers(four) == gathers(one)
    assert four["c10d::allreduce_"][-1] - one["c10d::allreduce_"][-1] == 3 * 16
