"""The check of eps: rounding and curvature as shares of the slope, on functions where both are known."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import mezo_scale as ms
from mezo_scale.optim import eps
from mezo_scale.optim.estimators import Grouped, OneSided, Spsa
from tests.support import layouts, models
from tests.support.pool import Ranks

Objective = Callable[[nn.Module, Any], Tensor]


class Vector(nn.Module):
    def __init__(self, bowl: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bowl = nn.Parameter(torch.zeros(400)), bowl

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.double()
        return x.double() @ weight + self.bowl * weight.square().sum()


X = 1 + torch.randn(16, 400, generator=torch.Generator().manual_seed(0))


def of_slope(function: Callable[[Tensor], Tensor]) -> Objective:
    return lambda model, batch: function(model(batch["x"]))


def checked(objective: Objective, estimator: Any = None, scale: float = 1e-2, **options: Any) -> eps.Shares:
    opt = ms.MeZO(Vector(), eps=scale, estimator=estimator)
    return eps.check(opt, {"x": X}, objective, **options)


@pytest.mark.parametrize("estimator", [Spsa(), OneSided(4), Grouped(4)])
def test_a_straight_loss_has_neither(estimator: Any) -> None:
    found = checked(of_slope(lambda y: 5 + y), estimator)
    assert found.rounding < 1e-4
    assert found.curvature < 1e-3


@pytest.mark.parametrize(("estimator", "rows", "factor"), [(Spsa(), 16, 1), (OneSided(4), 16, 2), (Grouped(1), 1, 1)])
def test_rounding_is_its_share_of_the_slope(estimator: Any, rows: int, factor: int) -> None:
    """A loss that is off by 0.01 / sqrt(2), anew everywhere; half the difference of two by that over sqrt(2)."""
    found = checked(of_slope(lambda y: y + 0.01 * (1e6 * (y + y**2)).sin()), estimator)
    error = 0.01 / 2 / rows**0.5 * factor**0.5 / 1e-2
    assert found.rounding * found.slope == pytest.approx(error, rel=0.2)


def test_bending_of_a_higher_order_is_not_taken_for_rounding() -> None:
    """y of order 0.2, so that y^5 is a fifth of the slope, and nothing is rounded."""
    found = checked(of_slope(lambda y: y + 100 * y**5))
    assert found.rounding < 0.02
    assert found.curvature > 0.1


def test_a_two_sided_slope_is_bent_by_what_is_cubic_only() -> None:
    """L = y + y^2 + c y^3 with y of order 0.2: the error is c y^3."""
    bent = [checked(of_slope(lambda y, c=c: y + 3 * y**2 + c * y**3)).curvature for c in (0.0, 0.5, 1.0)]
    assert bent[0] < 1e-3
    assert 0.01 < bent[1] < bent[2] < 1


def test_a_one_sided_slope_is_bent_by_what_is_square_and_differs_between_directions() -> None:
    square = of_slope(lambda y: y + y**2)
    assert checked(square, OneSided(4)).curvature > 10 * checked(square, Spsa()).curvature
    # L = y + 10 |w|^2: along any direction 10 * 400 eps^2 = 0.4 within 7%, beside a slope of 0.2.
    opt = ms.MeZO(Vector(bowl=10.0), eps=1e-2, estimator=OneSided(4))
    assert eps.check(opt, {"x": X}, of_slope(lambda y: y)).curvature < 0.5


@pytest.mark.parametrize("estimator", [Spsa(), OneSided(2)])
def test_a_warning_says_which_way_eps_is_wrong(estimator: Any) -> None:
    def coarse(model: nn.Module, batch: Any) -> Tensor:
        y = model(batch["x"])
        return y + 0.1 * (1e6 * y).sin()

    opt = ms.MeZO(Vector(), eps=1e-3, estimator=estimator)
    assert "warning: it drowns in rounding: take a larger eps" in str(eps.check(opt, {"x": X}, coarse))
    bent = checked(of_slope(lambda y: y + y**2 + y**3), estimator, 0.5)
    assert "warning: it is bent by curvature: take a smaller eps" in str(bent)
    fine = str(checked(of_slope(lambda y: 5 + y), estimator, 4e-3))
    assert fine.startswith("eps 0.004: rounding 0%, curvature 0% of the slope")
    assert "warning" not in fine


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("estimator", [Spsa(), OneSided(4)])
def test_rounding_does_not_pass_for_curvature(estimator: Any, seed: int) -> None:
    def rough(model: nn.Module, batch: Any) -> Tensor:
        y = model(batch["x"])
        return y + 0.03 * (1e6 * y).sin()

    found = eps.check(ms.MeZO(Vector(), eps=1e-3, seed=seed, estimator=estimator), {"x": X}, rough)
    assert found.rounding > 0.1
    assert found.curvature < 0.2


def test_a_loss_without_a_slope_is_said_to_have_none() -> None:
    assert str(checked(of_slope(lambda y: 0 * y))) == "eps 0.01: warning: the losses of the first rows have no slope"
    assert str(checked(of_slope(lambda y: y / 0))) == "eps 0.01: warning: the losses of the first rows are not finite"


def test_it_takes_a_quarter_of_the_rows_24_times_and_changes_no_step() -> None:
    seen: list[int] = []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        seen.append(len(batch["x"]))
        return 5 + model(batch["x"])

    opt = ms.MeZO(Vector(), paired=True)
    eps.check(opt, {"x": X}, counted)
    eps.check(opt, {"x": X}, counted, micro_batch=3)
    assert seen == 24 * [8] + 24 * [6]
    other = ms.MeZO(Vector(), paired=True)
    assert opt.step(batch={"x": X}, objective=counted) == other.step(batch={"x": X}, objective=counted)
    assert opt.last_record == other.last_record


def on_ranks(layout: str) -> tuple[eps.Shares, ms.StepRecord | None]:
    sharded = layouts.shard(layout, models.build("llama"))
    opt = ms.MeZO(sharded.model, eps=1e-2, estimator=Grouped(2))
    batch = models.batch("llama", 8)
    rows = {name: leaf[4 * dist.get_rank() :][:4] for name, leaf in batch.items()}
    found = eps.check(opt, rows, models.objective("llama"))
    opt.step(batch=rows, objective=models.objective("llama"))
    sharded.close()
    return found, opt.last_record


@pytest.mark.parametrize("layout", ["plain", "fsdp2"])
def test_ranks_find_the_same(ranks: Ranks, layout: str) -> None:
    one, other = ranks(2, on_ranks, layout=layout)
    assert one == other
    assert one[0].slope > 0


def rough(size: float, bend: float) -> Objective:
    return of_slope(lambda y: y + size * (1e6 * y).sin() + bend * y**3)


@pytest.mark.parametrize(
    ("size", "bend", "expected"),
    [(0.0, 0.0, (1e-3, 1e-3)), (0.1, 1.0, (4e-3, 1.6e-2)), (1e-6, 3e4, (6e-5, 2.5e-4))],
    ids=["neither", "rounding", "curvature"],
)
def test_the_chosen_eps_has_the_least_of_both(size: float, bend: float, expected: tuple[float, float]) -> None:
    opt = ms.MeZO(Vector())
    found = eps.choose(opt, {"x": X}, rough(size, bend))
    assert expected[0] <= found[-1].eps <= expected[1]
    assert found[-1].total == min(shares.total for shares in found)
    assert opt.step_count == 0
    assert opt.eps == 1e-3


def test_where_nothing_has_a_slope_none_is_found() -> None:
    assert eps.choose(ms.MeZO(Vector()), {"x": X}, of_slope(lambda y: 0 * y))[-1].total == float("inf")
