"""A direction for every group of rows: which rows meet which direction, and that nothing else does."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mezo_scale as ms
from mezo_scale.errors import TrajectoryError
from mezo_scale.optim.estimators import Grouped, Spsa
from mezo_scale.optim.pieces import Block, deal
from tests.support import models

BATCH = models.batch("llama", 8)
LOSS = models.objective("llama")
OPTIONS: dict[str, Any] = {"lr": 1e-3, "eps": 1e-2, "seed": 3}


def trained(
    estimator: Any, steps: int = 3, micro_batch: int | None = None, **options: Any
) -> tuple[nn.Module, ms.MeZO]:
    model = models.build("llama")
    opt = ms.MeZO(model, **OPTIONS, estimator=estimator, **options)
    for _ in range(steps):
        opt.step(batch=BATCH, objective=LOSS, micro_batch=micro_batch)
    return model, opt


def rows_of(batch: models.Batch, start: int, stop: int) -> models.Batch:
    return {name: rows[start:stop] for name, rows in batch.items()}


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("paired", [None, False])
def test_one_group_of_all_rows_is_the_two_sided_step_bit_for_bit(paired: bool | None, micro_batch: int | None) -> None:
    model, opt = trained(Grouped(8), micro_batch=micro_batch, paired=paired)
    usual, expected = trained(Spsa(), micro_batch=micro_batch, paired=paired)
    assert opt.last_record == expected.last_record
    assert all(map(torch.equal, model.parameters(), usual.parameters()))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_group_is_measured_as_a_model_with_its_perturbation_written_in(size: int) -> None:
    record = trained(Grouped(size), 1)[1].last_record
    assert record is not None
    assert record.seeds == tuple(ms.noise.direction_seed(3, 0, k) for k in range(8 // size))
    for k, seed in enumerate(record.seeds):
        losses = []
        for scale in (1e-2, -1e-2):
            model = models.build("llama")
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    z = ms.noise.normal(seed, ms.noise.param_id(name), 0, weight.numel()).view(weight.shape)
                    weight.add_(z, alpha=scale)
                losses.append(LOSS(model, rows_of(BATCH, k * size, (k + 1) * size)).double().mean().item())
        slope = (losses[0] - losses[1]) / 2e-2
        assert record.projected_grads[k] == pytest.approx(slope, abs=1e-5 * losses[0] / 1e-2)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 8, 100])
def test_micro_batches_change_no_group(micro_batch: int, paired: bool) -> None:
    whole = trained(Grouped(4), 1)[1].last_record
    cut = trained(Grouped(4), 1, micro_batch, paired=paired)[1].last_record
    assert whole is not None
    assert cut is not None
    assert cut.seeds == whole.seeds
    assert cut.projected_grads == pytest.approx(whole.projected_grads, rel=1e-3, abs=1e-3)


def test_a_micro_batch_bounds_the_rows_of_a_forward() -> None:
    tall: list[int] = []

    def counted(model: nn.Module, batch: models.Batch) -> Tensor:
        tall.append(len(batch["input_ids"]))
        return LOSS(model, batch)

    opt = ms.MeZO(models.build("llama"), **OPTIONS, estimator=Grouped(2), paired=True)
    opt.step(batch=BATCH, objective=counted)
    opt.step(batch=BATCH, objective=counted, micro_batch=4)
    opt.step(batch=BATCH, objective=counted, micro_batch=1)
    assert tall == [16] + 2 * [8] + 8 * [2]


def test_rows_that_are_measured_one_after_the_other_keep_their_places_in_the_step() -> None:
    whole = trained(Grouped(4), 1)[1].last_record
    opt = ms.MeZO(models.build("llama"), **OPTIONS, estimator=Grouped(4))
    for start, stop in [(0, 3), (3, 4), (4, 8)]:
        opt.measure(batch=rows_of(BATCH, start, stop), objective=LOSS)
    opt.step()
    assert whole is not None
    assert opt.last_record is not None
    assert opt.last_record.seeds == whole.seeds
    assert opt.last_record.projected_grads == pytest.approx(whole.projected_grads, rel=1e-3, abs=1e-3)


class Slopes(nn.Module):
    """One weight for each of many parameters, so that directions are cheap."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return ((x * self.weight).sum(1) + 0.1 * (x * self.weight**2).sum(1)).float()


def slopes(model: nn.Module, batch: models.Batch) -> Tensor:
    return model(batch["x"])


@pytest.mark.parametrize("size", [1, 4, 64])
def test_over_many_directions_the_update_points_along_the_gradient(size: int) -> None:
    """Every step of 4,096 rows has 4,096 / size directions; steps until there were 2^15 of them, for 64 2^13."""
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).repeat(64, 1) + 1
    model = Slopes()
    opt = ms.MeZO(model, lr=1.0, eps=1e-3, estimator=Grouped(size))
    start = model.weight.detach().clone()
    total, directions = torch.zeros(6), 0
    while directions < (2**15 if size < 64 else 2**13):
        opt.step(batch={"x": x}, objective=slopes)
        total -= model.weight.detach() - start
        with torch.no_grad():
            model.weight.copy_(start)
        directions += opt.num_directions
    estimate = total * opt.num_directions / directions
    gradient = torch.func.grad(lambda w: torch.func.functional_call(model, {"weight": w}, (x,)).mean())(start)
    assert (estimate @ gradient / gradient.norm() ** 2).item() == pytest.approx(1, abs=0.03)


def test_a_run_is_replayed_bit_by_bit_and_goes_on(tmp_path: pathlib.Path) -> None:
    straight, _ = trained(Grouped(2, 8), 4)
    model, opt = trained(Grouped(2, 8), 3, trajectory=tmp_path / "t.mezo")
    opt.trajectory.release()
    again = models.build("llama")
    assert ms.replay(again, tmp_path / "t.mezo") == 3
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    model, opt = trained(Grouped(2, 8), 1, trajectory=tmp_path / "t.mezo")
    assert opt.step_count == 4
    assert all(map(torch.equal, model.parameters(), straight.parameters()))


def test_a_run_goes_on_with_its_own_groups_only(tmp_path: pathlib.Path) -> None:
    _, opt = trained(Grouped(2, 8), 1, trajectory=tmp_path / "t.mezo")
    opt.trajectory.release()
    for other, message in [
        (Grouped(4, 16), "estimator = grouped by 2, this run has grouped by 4"),
        (Spsa(4), "estimator = grouped by 2, this run has spsa"),
        (Grouped(2, 4), "num_directions = 4, this run has 2"),
    ]:
        with pytest.raises(TrajectoryError, match=message):
            trained(other, trajectory=tmp_path / "t.mezo")


def test_a_saved_state_says_how_many_groups_a_step_has() -> None:
    _, opt = trained(Grouped(2), 1)
    other = ms.MeZO(models.build("llama"), **OPTIONS, estimator=Grouped(2))
    other.load_state_dict(opt.state_dict())
    assert (other.num_directions, other.step_count) == (4, 1)
    with pytest.raises(ValueError, match="num_directions = 4, this run has 2"):
        ms.MeZO(models.build("llama"), **OPTIONS, estimator=Grouped(2, 4)).load_state_dict(opt.state_dict())


def closure() -> Tensor:
    return torch.zeros(())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grouped(0), "group_size is 0: expected at least 1 row"),
        (lambda: Grouped(4, 6), "batch_size is 6 and group_size 4, which does not divide it"),
        (lambda: trained(Grouped(4), trajectory="t.mezo"), "give Grouped its batch_size"),
        (lambda: trained(Grouped(3)), "8 rows over all ranks, which the group_size 3 does not divide"),
        (lambda: trained(Grouped(4, 16)), "8 rows over all ranks, but the estimator's batch_size is 16"),
        (lambda: trained(Grouped(4, 4)), "8 rows over all ranks, but the estimator's batch_size is 4"),
        (lambda: trained(Grouped(4), micro_batch=0), "micro_batch is 0"),
        (
            lambda: ms.MeZO(models.build("llama"), estimator=Grouped(4)).step(closure),
            "grouped by 4, and whose rows a closure's losses are can't be told: give batch and objective",
        ),
    ],
)
def test_rows_that_make_no_groups_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_step_of_other_rows_than_the_first_is_refused_and_the_run_goes_on() -> None:
    model, opt = trained(Grouped(2), 1)
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(ValueError, match="the step has 6 rows over all ranks, but the estimator's batch_size is 8"):
        opt.step(batch=rows_of(BATCH, 0, 6), objective=LOSS)
    assert all(map(torch.equal, model.parameters(), before))
    opt.step(batch=BATCH, objective=LOSS)
    assert opt.step_count == 2


@pytest.mark.parametrize("micro_batch", [None, 1, 2, 3, 5])
@pytest.mark.parametrize("counts", [[5, 5, 6], [1, 2, 13], [16], [4, 4, 4, 4], [7, 9]])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_every_row_is_dealt_once_and_ranks_make_equally_many_blocks(
    counts: list[int], size: int, micro_batch: int | None
) -> None:
    forwards = [deal(8, counts, rank, size, micro_batch) for rank in range(len(counts))]
    assert len({tuple(map(len, mine)) for mine in forwards}) == 1
    for rank, mine in enumerate(forwards):
        start = 8 + sum(counts[:rank])
        blocks = [block for forward in mine for block in forward if block.counts]
        rows = [(row, block.group) for block in blocks for row in range(block.start, block.stop)]
        assert rows == [(row, (start + row) // size) for row in range(counts[rank])]
        for forward in mine:
            longest = max(block.stop - block.start for block in forward)
            assert micro_batch is None or len(forward) * longest <= micro_batch


def test_rows_of_a_rank_that_end_in_the_middle_of_a_group_stay_in_it() -> None:
    assert deal(0, [5, 3], 0, 4, None) == [[Block(0, 0, 4), Block(1, 4, 5)]]
    assert deal(0, [5, 3], 1, 4, None) == [[Block(1, 0, 3), Block(1, 0, 1, counts=False)]]
