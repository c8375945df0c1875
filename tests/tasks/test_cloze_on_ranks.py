"""Clozes on one and two ranks with unequal shares of the rows, against the textbook that sees them all."""

import pytest
import torch.distributed as dist

import mezo_scale as ms
from tests.support import layouts, masked, textbook
from tests.support.pool import Ranks
from tests.tasks.test_cloze import OPTIONS, STEPS, double_losses, kind, step_rows

NAME = "roberta"


def train(layout: str) -> list[list[float]]:
    made, sharded = kind(NAME), layouts.shard(layout, masked.build(NAME))
    optimizer = ms.MeZO(sharded.model, **OPTIONS)
    cuts = {1: [slice(0, 4)], 2: [slice(0, 3), slice(3, 4)]}[dist.get_world_size()]
    gradients = []
    for step in range(STEPS):
        batch = made.collate(step_rows(made, step)[cuts[dist.get_rank()]], "candidates")
        optimizer.step(batch=batch, objective=made.objectives["candidates"])
        assert optimizer.last_record is not None
        gradients.append(list(optimizer.last_record.projected_grads))
    assert optimizer.paired
    sharded.close()
    return gradients


@pytest.fixture(scope="module")
def expected() -> list[list[float]]:
    losses = double_losses(kind(NAME), "candidates")
    return textbook.projected_gradients(masked.build(NAME), losses, STEPS, **OPTIONS)


@pytest.mark.parametrize(("size", "layout"), [(1, "fsdp2"), (2, "plain"), (2, "fsdp2"), (2, "zero3")])
def test_steps_on_clozes_have_the_textbook_s_projected_gradients_on_ranks(
    ranks: Ranks, expected: list[list[float]], size: int, layout: str
) -> None:
    for found in ranks(size, train, layout=layout):
        for step in range(STEPS):
            assert found[step] == pytest.approx(expected[step], rel=1e-4, abs=1e-4)
