"""Estimators: where a step evaluates, and the slopes that follow. This file adds one of its own."""

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import mezo_scale as ms
from mezo_scale.errors import TrajectoryError
from mezo_scale.optim.estimators import Estimator, OneSided, Spsa
from mezo_scale.perturbation import Branch
from mezo_scale.trajectory import Header
from mezo_scale.trajectory.codec import pack_header
from tests.support import layouts, models
from tests.support.pool import Ranks

BATCH = models.batch("llama", 4)
LOSS = models.objective("llama")
OPTIONS = {"lr": 1e-3, "eps": 1e-2, "seed": 3}


@dataclass(frozen=True)
class FromBase:
    """Forward differences from one evaluation at theta itself: n + 1 evaluations for n directions."""

    num_directions: int = 2
    name: ClassVar[str] = "from_base"

    def branches(self, seeds: Sequence[int], eps: float) -> list[Branch]:
        return [(seeds[0], 0.0), *((seed, eps) for seed in seeds)]

    def gradients(self, losses: Sequence[float], eps: float) -> list[float]:
        base, *moved = losses
        return [(loss - base) / eps for loss in moved]


ESTIMATORS = [Spsa(2), OneSided(3), FromBase(2)]


def trained(estimator: Estimator, steps: int = 4, **options: Any) -> tuple[torch.nn.Module, ms.MeZO]:
    model = models.build("llama")
    opt = ms.MeZO(model, **OPTIONS, estimator=estimator, **options)
    for _ in range(steps):
        opt.step(batch=BATCH, objective=LOSS)
    return model, opt


def quadratic(theta: Tensor) -> Tensor:
    """Losses [...] at theta [..., 6]: far from zero, with a slope and curvature along every axis."""
    scales = torch.arange(1, 7, dtype=torch.float64)
    return 100 + (scales * theta + scales * theta**2 / 10).sum(-1)


@pytest.mark.parametrize("estimator", [Spsa(1), Spsa(3), OneSided(2), OneSided(5), FromBase(2)])
def test_the_mean_over_directions_is_the_gradient_on_average(estimator: Estimator) -> None:
    theta, count, eps = torch.linspace(-1, 1, 6, dtype=torch.float64), estimator.num_directions, 1e-3
    random = torch.Generator().manual_seed(0)
    z = torch.randn(2**15 // count, count, 6, generator=random, dtype=torch.float64)
    moved = [theta + scale * z[:, k] for k, scale in estimator.branches(range(count), eps)]
    slopes = [estimator.gradients(losses, eps) for losses in quadratic(torch.stack(moved, 1)).tolist()]
    estimate = (torch.tensor(slopes, dtype=torch.float64)[..., None] * z).mean((0, 1))
    gradient = torch.func.grad(quadratic)(theta)
    assert (estimate @ gradient / gradient.norm() ** 2).item() == pytest.approx(1, abs=0.03)
    assert (estimate - gradient).norm() < 0.05 * gradient.norm()


def test_what_all_losses_have_in_common_does_not_move_a_one_sided_step() -> None:
    losses = [0.5, 0.25, 0.75]
    assert OneSided(3).gradients([loss + 64 for loss in losses], 0.5) == OneSided(3).gradients(losses, 0.5)
    assert OneSided(2).gradients([3.0, 3.0], 1e-3) == [0.0, 0.0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_records_what_its_estimator_makes_of_the_losses_in_its_branches(estimator: Estimator) -> None:
    record = trained(estimator, steps=1)[1].last_record
    assert record is not None
    assert record.seeds == tuple(ms.noise.direction_seed(3, 0, k) for k in range(estimator.num_directions))
    model, losses = models.build("llama"), []
    for branch in estimator.branches(record.seeds, 1e-2):
        with ms.perturbed(model, [branch]):
            losses.append(LOSS(model, BATCH).double().mean().item())
    assert record.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert record.projected_grads == pytest.approx(estimator.gradients(losses, 1e-2), rel=1e-2, abs=1e-3)


def test_a_one_sided_step_evaluates_each_direction_once() -> None:
    rows: list[int] = []

    def counted(model: torch.nn.Module, batch: models.Batch) -> Tensor:
        rows.append(len(batch["input_ids"]))
        return LOSS(model, batch)

    opt = ms.MeZO(models.build("llama"), **OPTIONS, estimator=OneSided(3), paired=True)
    opt.step(batch=BATCH, objective=counted)
    assert rows == [3 * 4]


@pytest.mark.parametrize("estimator", [OneSided(3), FromBase(2)])
def test_a_run_of_any_estimator_is_replayed_bit_by_bit_and_goes_on(
    tmp_path: pathlib.Path, estimator: Estimator
) -> None:
    straight, _ = trained(estimator)
    model, opt = trained(estimator, 3, trajectory=tmp_path / "t.mezo")
    opt.trajectory.release()
    again = models.build("llama")
    assert ms.replay(again, tmp_path / "t.mezo") == 3
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    model, opt = trained(estimator, 1, trajectory=tmp_path / "t.mezo")
    assert opt.step_count == 4
    assert all(map(torch.equal, model.parameters(), straight.parameters()))


def test_a_run_goes_on_with_its_own_estimator_only(tmp_path: pathlib.Path) -> None:
    model, opt = trained(OneSided(2), 1, trajectory=tmp_path / "t.mezo")
    opt.trajectory.release()
    message = "estimator = one_sided, this run has spsa"
    with pytest.raises(TrajectoryError, match=message):
        trained(Spsa(2), trajectory=tmp_path / "t.mezo")
    with pytest.raises(ValueError, match=message):
        ms.MeZO(model, **OPTIONS, estimator=Spsa(2)).load_state_dict(opt.state_dict())


def test_a_header_of_the_usual_estimator_and_rule_names_neither() -> None:
    header = Header(1, "0" * 16, [], 1, 1, "normal", "nearest", 0, 1e-3)
    assert b"estimator" not in pack_header(header)
    assert b"rule" not in pack_header(header)
    other = Header(1, "0" * 16, [], 1, 1, "normal", "nearest", 0, 1e-3, estimator="one_sided", rule="momentum")
    assert b'"estimator":"one_sided"' in pack_header(other)
    assert b'"rule":"momentum"' in pack_header(other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Spsa(0), "num_directions is 0: expected at least 1"),
        (lambda: OneSided(1), "num_directions is 1: expected 2 or more"),
        (lambda: trained(Spsa(2), num_directions=3), "num_directions is 3, but the estimator has 2"),
        (lambda: trained(Forgetful(2)), "the estimator gave 1 gradients for 2 directions"),
    ],
)
def test_directions_that_do_not_fit_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Forgetful(FromBase):
    def gradients(self, losses: Sequence[float], eps: float) -> list[float]:
        return super().gradients(losses, eps)[:1]


def records_on_a_rank(layout: str) -> list[ms.StepRecord]:
    sharded = layouts.shard(layout, models.build("llama"))
    opt = ms.MeZO(sharded.model, **OPTIONS, estimator=FromBase(2))
    records = []
    for _ in range(2):
        opt.step(batch=BATCH, objective=LOSS)
        records.append(opt.last_record)
    sharded.close()
    return records


@pytest.mark.parametrize("layout", ["fsdp2", "zero3"])
def test_an_estimator_of_the_user_s_own_learns_under_sharding_as_alone(ranks: Ranks, layout: str) -> None:
    one, other = ranks(2, records_on_a_rank, layout=layout)
    assert one == other
    alone = trained(FromBase(2), 2)[1].last_record
    assert alone is not None
    assert one[-1].seeds == alone.seeds
    assert one[-1].projected_grads == pytest.approx(alone.projected_grads, rel=2e-2, abs=2e-3)
