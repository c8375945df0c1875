"""The planner's bytes are those that the collectives of a real step carry, counted as they are called."""

import pytest
import torch
import torch.distributed as dist

import mezo_scale as ms
from mezo_scale.models import shard_fsdp2
from mezo_scale.planner import Strategy, Workload, architecture, traffic
from tests.perturbation.test_traffic import Traffic, gathers
from tests.support import layouts, models
from tests.support.pool import Ranks


def counted(strategy: Strategy, dtype: str, name: str, directions: int) -> tuple[int, int, int]:
    """(bytes that gathers filled, bytes of the all-reduce, calls of it) in a step after the first ones."""
    stored = torch.float32 if strategy.master else getattr(torch, dtype)
    model = models.build(name, dtype=stored)
    close = None
    if strategy.is_deepspeed:
        sharded = layouts.zero3(model)
        model, close = sharded.model, sharded.close
    else:
        shard_fsdp2(model, strategy.mesh("cpu"), getattr(torch, dtype) if strategy.master else None)
    optimizer = ms.MeZO(model, num_directions=directions)
    batch, objective = models.batch(name, 2, seed=dist.get_rank()), models.objective(name)
    for _ in range(3):  # the first step looks at the model, and ZeRO-3 learns the order of modules
        with Traffic() as step:
            optimizer.step(batch=batch, objective=objective)
    if close is not None:
        close()
    sums = step.calls["c10d::allreduce_"]
    return sum(map(sum, gathers(step.calls).values())), sum(sums), len(sums)


CELLS = [
    (Strategy("fsdp2", shard=2), "bfloat16"),
    (Strategy("fsdp2", shard=2, master=True), "bfloat16"),
    (Strategy("fsdp2", shard=4), "float32"),
    (Strategy("fsdp2", shard=4, master=True), "bfloat16"),
    (Strategy("hsdp", replicate=2, shard=2), "bfloat16"),
    (Strategy("hsdp", replicate=2, shard=2, master=True), "bfloat16"),
    (Strategy("zero3", shard=2), "float32"),
    (Strategy("zero3", shard=4), "float32"),
    (Strategy("zero3", shard=2), "bfloat16"),
]


NAMES = [
    f"{strategy.layout}, {strategy.world_size} ranks, {dtype}{' + master' * strategy.master}"
    for strategy, dtype in CELLS
]


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize(("strategy", "dtype"), CELLS, ids=NAMES)
def test_a_step_moves_the_bytes_of_the_plan(ranks: Ranks, strategy: Strategy, dtype: str, name: str) -> None:
    config = models.build(name).config
    expected = traffic(architecture(config), strategy, Workload(2, models.LENGTH, branches=4, dtype=dtype))
    results = ranks(strategy.world_size, counted, strategy=strategy, dtype=dtype, name=name, directions=2)
    assert results == [(expected.gathered, expected.scalars, 2)] * strategy.world_size
