"""Which rows of a step a rank of a run evaluates: those that its axes give it, not its number."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mezo_scale.distributed.layout import Axes
from mezo_scale.recipe import parse
from mezo_scale.runs.trainer import Trainer
from mezo_scale.tasks.kinds.candidates import Candidates, Encoded

RECIPE = parse({"model": {"name": "m"}, "task": {"data": "d"}, "train": {"batch_size": 8}})
EXAMPLES = [Encoded((5, 6, 7 + n), ((40,), (50,)), n % 2) for n in range(16)]


def rows(rank: int, axes: Axes) -> Any:
    trainer: Any = Trainer.__new__(Trainer)
    trainer.recipe, trainer.splits = RECIPE, SimpleNamespace(train=EXAMPLES)
    trainer.kind = Candidates(SimpleNamespace(pad_token_id=0), RECIPE.task)
    trainer.world = SimpleNamespace(rank=rank, size=axes.world_size)
    trainer.loaded = SimpleNamespace(strategy=SimpleNamespace(axes=axes), device=torch.device("cpu"))
    return trainer._batch(0)["input_ids"][:, 2].tolist()


@pytest.mark.parametrize("axes", [Axes(shard=2, tensor=2), Axes(replicate=2, direction=2)], ids=["tensor", "direction"])
def test_ranks_that_share_rows_evaluate_the_same_ones_and_together_all(axes: Axes) -> None:
    by_part: dict[int, list[list[int]]] = {}
    for rank in range(4):
        by_part.setdefault(axes.rows_rank(rank), []).append(rows(rank, axes))
    assert all(first == second for first, second in by_part.values())
    assert sorted(by_part[0][0] + by_part[1][0]) == sorted(rows(0, Axes()))
