"""Two ranks with unequal shares of the rows, against the textbook that sees them all."""

import pytest
import torch.distributed as dist

import mezo_scale as ms
from tests.optim.test_textbook import OPTIONS, STEPS, batch_of, double_losses
from tests.support import layouts, models, textbook
from tests.support.pool import Ranks

NAME = "opt"


def train(layout: str) -> list[list[float]]:
    sharded = layouts.shard(layout, models.build(NAME))
    optimizer = ms.MeZO(sharded.model, **OPTIONS)
    rows = slice(0, 3) if dist.get_rank() == 0 else slice(3, 4)
    gradients = []
    for step in range(STEPS):
        batch = {key: value[rows] for key, value in batch_of(NAME, step).items()}
        optimizer.step(batch=batch, objective=models.objective(NAME))
        gradients.append(list(optimizer.last_record.projected_grads))
    sharded.close()
    return gradients


@pytest.fixture(scope="module")
def expected() -> list[list[float]]:
    return textbook.projected_gradients(
        models.build(NAME), lambda model, step: double_losses(NAME, model, step), STEPS, **OPTIONS
    )


@pytest.mark.parametrize("layout", ["plain", "fsdp2", "fsdp1", "zero3"])
def test_twenty_steps_on_two_ranks_have_the_textbook_s_projected_gradients(
    ranks: Ranks, expected: list[list[float]], layout: str
) -> None:
    for found in ranks(2, train, layout=layout):
        for step in range(STEPS):
            assert found[step] == pytest.approx(expected[step], rel=1e-4, abs=1e-4)
