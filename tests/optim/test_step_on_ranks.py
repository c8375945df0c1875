"""A step among ranks: what one rank sees binds all of them."""

import math
import pathlib

import pytest
import torch
import torch.distributed as dist

import mezo_scale as ms
from mezo_scale.errors import RankError
from tests.support import layouts, models
from tests.support.pool import RankFailed, Ranks

NAME = "opt"


def spoiled_step(layout: str, spoiled_rank: int, value: float) -> tuple[bool, bool, bool, float]:
    """(recorded as not finite, weights as before, next step counts on, loss of the next step)."""
    sharded = layouts.shard(layout, models.build(NAME))
    batch, objective = models.batch(NAME, 2, seed=dist.get_rank()), models.objective(NAME)
    optimizer = ms.MeZO(sharded.model, lr=1e-2, eps=1e-2)
    before = sharded.gather()

    def spoiled(model: torch.nn.Module, rows: models.Batch) -> torch.Tensor:
        losses = objective(model, rows)
        return losses * value if dist.get_rank() == spoiled_rank else losses

    loss = optimizer.step(batch=batch, objective=spoiled)
    same = all(torch.equal(before[name], weight) for name, weight in sharded.gather().items())
    following = optimizer.step(batch=batch, objective=objective)
    recorded = not math.isfinite(loss) and optimizer.last_record.step == 1
    changed = any(not torch.equal(before[name], weight) for name, weight in sharded.gather().items())
    sharded.close()
    return recorded, same, changed, following


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layout", ["plain", "fsdp2", "zero3"])
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(ranks: Ranks, layout: str, value: float) -> None:
    for recorded, same, changed, following in ranks(2, spoiled_step, layout=layout, spoiled_rank=1, value=value):
        assert recorded
        assert same
        assert changed
        assert math.isfinite(following)


def disagreeing_steps(odd_rank: int) -> None:
    model = models.build(NAME)
    optimizer = ms.MeZO(model, lr=2e-3 if dist.get_rank() == odd_rank else 1e-3)
    batch, objective = models.batch(NAME, 2), models.objective(NAME)
    for _ in range(2):
        optimizer.step(batch=batch, objective=objective)


def test_a_rank_that_records_something_else_is_named(ranks: Ranks) -> None:
    with pytest.raises(RankFailed, match="rank 2 recorded another step 0"):
        ranks(3, disagreeing_steps, odd_rank=2)


def disagreeing_last_step(odd_rank: int) -> str:
    optimizer = ms.MeZO(models.build(NAME), lr=1e-3)
    batch, objective = models.batch(NAME, 2), models.objective(NAME)
    optimizer.step(batch=batch, objective=objective)
    optimizer.check_ranks()
    optimizer.param_groups[0]["lr"] = 2e-3 if dist.get_rank() == odd_rank else 1e-3
    optimizer.step(batch=batch, objective=objective)
    try:
        optimizer.check_ranks()
    except RankError as error:
        return str(error)
    return "the ranks agree"


@pytest.mark.parametrize("odd_rank", [0, 2])
def test_a_rank_that_differs_in_the_last_step_only_is_named_by_all(ranks: Ranks, odd_rank: int) -> None:
    for said in ranks(3, disagreeing_last_step, odd_rank=odd_rank):
        assert said.startswith(f"rank {odd_rank} recorded another step 1 than the other ranks: ")


def cut_step(layout: str, micro_batch: int | None) -> tuple[float, tuple[float, ...]]:
    sharded = layouts.shard(layout, models.build(NAME))
    rows = 5 if dist.get_rank() == 0 else 2
    optimizer = ms.MeZO(sharded.model, eps=1e-2, num_directions=2)
    batch = models.batch(NAME, rows, seed=dist.get_rank())
    loss = optimizer.step(batch=batch, objective=models.objective(NAME), micro_batch=micro_batch)
    sharded.close()
    return loss, optimizer.last_record.projected_grads


@pytest.mark.parametrize("layout", ["fsdp2", "zero3"])
def test_micro_batches_of_unequal_shares_change_no_result(ranks: Ranks, layout: str) -> None:
    loss, gradients = ranks(2, cut_step, layout=layout, micro_batch=None)[0]
    for cut_loss, cut_gradients in ranks(2, cut_step, layout=layout, micro_batch=2):
        assert cut_loss == pytest.approx(loss, rel=1e-6)
        assert cut_gradients == pytest.approx(gradients, abs=1e-3)


def steps_until(folder: pathlib.Path, layout: str, steps: int) -> tuple[int, dict[str, torch.Tensor]]:
    """Start or go on from the folder's trajectory, and take steps until there are that many."""
    sharded = layouts.shard(layout, models.build(NAME))
    optimizer = ms.MeZO(sharded.model, lr=1e-2, eps=1e-2, trajectory=folder / "trajectory.mezo")
    began = optimizer.step_count
    while optimizer.step_count < steps:
        batch = models.batch(NAME, 1, seed=10 * optimizer.step_count + dist.get_rank())
        optimizer.step(batch=batch, objective=models.objective(NAME))
    weights = sharded.gather()
    sharded.close()
    return began, weights


@pytest.mark.parametrize("layout", ["plain", "fsdp2", "fsdp1", "zero3"])
def test_a_continued_run_is_the_run(ranks: Ranks, tmp_path: pathlib.Path, layout: str) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir()
    halves.mkdir()
    _, expected = ranks(2, steps_until, folder=whole, layout=layout, steps=4)[0]
    ranks(2, steps_until, folder=halves, layout=layout, steps=2)
    for began, found in ranks(2, steps_until, folder=halves, layout=layout, steps=4):
        assert began == 2
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_a_run_taken_up_by_another_layout_has_the_same_bits(ranks: Ranks, tmp_path: pathlib.Path) -> None:
    ranks(2, steps_until, folder=tmp_path, layout="fsdp2", steps=3)
    _, first = ranks(3, steps_until, folder=tmp_path, layout="zero3", steps=3)[0]
    _, second = ranks(1, steps_until, folder=tmp_path, layout="plain", steps=3)[0]
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
