"""A normalisation runs once for all branches where that is seen to change no bit, and branch by branch elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

import pytest
import torch
from torch import Tensor, nn

from mezo_scale.errors import ViewError
from mezo_scale.noise import normal, param_id
from mezo_scale.perturbation.view import View

WIDTH, ROWS = 48, 3
BRANCHES = [(3, 0.1), (3, -0.1), (8, 0.1), (8, -0.1), (5, 0.02)]


class RootNorm(nn.Module):
    """As most families have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.shapes: list[torch.Size] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(x.shape)
        scaled = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return self.scale(scaled.to(x.dtype))

    def scale(self, x: Tensor) -> Tensor:
        return self.weight * x + self.bias


class FlatNorm(RootNorm):
    """A kernel that takes vectors only."""

    def scale(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (WIDTH,), self.weight, self.bias)


class TotalNorm(RootNorm):
    """Takes weights of any shape, but not for each branch its own."""

    def scale(self, x: Tensor) -> Tensor:
        return x * (self.weight / self.weight.abs().max()) + self.bias


class FirstNorm(RootNorm):
    """Sees the first branch's weights only."""

    def scale(self, x: Tensor) -> Tensor:
        return x * self.weight.reshape(-1)[:WIDTH] + self.bias.reshape(-1)[:WIDTH]


class SpoiledNorm(RootNorm):
    """Writes to its weight from the second step on."""

    spoils = False

    def scale(self, x: Tensor) -> Tensor:
        if self.spoils:
            self.weight.mul_(2)
        return super().scale(x)


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(ROWS, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    return x.to(dtype).repeat(len(BRANCHES), 1, 1)


def run(model: nn.Module, x: Tensor) -> Tensor:
    view = View(model)
    with view.branches(BRANCHES):
        model(x)
    for norm in model.modules():
        if isinstance(norm, RootNorm):
            norm.shapes.clear()
    with view.branches(BRANCHES):
        result: Tensor = model(x)
    return result


def expected(norm: RootNorm, x: Tensor) -> Tensor:
    """Of copies with the perturbation written in, in float32."""
    blocks, kept, dtype = (
        x.chunk(len(BRANCHES)),
        {name: p.detach().clone() for name, p in norm.named_parameters()},
        x.dtype,
    )
    results = []
    with torch.no_grad():
        for (seed, scale), block in zip(BRANCHES, blocks, strict=True):
            for name, param in norm.named_parameters():
                z = normal(seed, param_id(name), 0, WIDTH)
                param.data = kept[name].float() + torch.tensor(scale) * z
            results.append(norm(block.float()).to(dtype))
    for name, param in norm.named_parameters():
        param.data = kept[name]
    return torch.cat(results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_takes_a_weight_for_each_branch_runs_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, x = RootNorm().to(dtype), rows(dtype)
    result = run(norm, x)
    assert norm.shapes == [(len(BRANCHES), ROWS, 4, WIDTH)]
    assert torch.equal(result, expected(norm, x))


@pytest.mark.parametrize("kind", [FlatNorm, TotalNorm, FirstNorm])
def test_what_does_not_runs_branch_by_branch(kind: type[RootNorm]) -> None:
    torch.manual_seed(0)
    norm, x = kind(), rows()
    result = run(norm, x)
    assert norm.shapes == [(ROWS, 4, WIDTH)] * len(BRANCHES)
    assert torch.equal(result, expected(norm, x))


def test_what_the_rows_hold_when_it_is_tried_does_not_matter() -> None:
    torch.manual_seed(0)
    norm = FirstNorm()
    norm.bias.data.zero_()
    view = View(norm)
    with view.branches([(seed, 0.0) for seed, _ in BRANCHES]):
        norm(torch.zeros_like(rows()))  # all branches give the same
    with view.branches(BRANCHES):
        result = norm(rows())
    assert torch.equal(result, expected(norm, rows()))


def replace_forward(norm: RootNorm) -> None:
    """As a library of kernels does."""

    def forward(self: RootNorm, x: Tensor) -> Tensor:
        return FirstNorm.scale(self, x)  # type: ignore[arg-type]

    norm.forward = MethodType(forward, norm)  # type: ignore[method-assign]


def replace_class(norm: RootNorm) -> None:
    norm.__class__ = FirstNorm


@pytest.mark.parametrize("replace", [replace_forward, replace_class])
def test_what_takes_the_place_of_a_forward_that_was_tried_is_tried_itself(replace: Callable[[RootNorm], None]) -> None:
    torch.manual_seed(0)
    norm, x = RootNorm(), rows()
    view = View(norm)
    with view.branches(BRANCHES):
        norm(x)
    replace(norm)
    with view.branches(BRANCHES):
        result = norm(x)
    assert torch.equal(result, expected(norm, x))


def test_a_frozen_weight_is_every_branches() -> None:
    torch.manual_seed(0)
    norm, x = RootNorm(), rows()
    norm.bias.requires_grad = False
    result = run(norm, x)
    assert norm.shapes == [(len(BRANCHES), ROWS, 4, WIDTH)]
    results = []
    for (seed, scale), block in zip(BRANCHES, x.chunk(len(BRANCHES)), strict=True):
        moved = RootNorm()
        moved.weight.data = norm.weight.data + torch.tensor(scale) * normal(seed, param_id("weight"), 0, WIDTH)
        moved.bias.data = norm.bias.data
        results.append(moved(block).detach())
    assert torch.equal(result, torch.cat(results))


def test_a_norm_of_a_whole_model_gets_the_rows_of_the_tall_batch_in_their_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), RootNorm(), nn.Linear(WIDTH, 2))
    x, alone = rows(), []
    together = run(model, x)
    for branch, block in zip(BRANCHES, x.chunk(len(BRANCHES)), strict=True):
        with View(model).branches([branch]):
            alone.append(model(block))
    assert (together - torch.cat(alone)).abs().max() < 1e-5


def test_one_that_writes_to_its_weight_is_found_out() -> None:
    norm, x = SpoiledNorm(), rows()
    view = View(norm)
    with view.branches(BRANCHES):
        norm(x)
    norm.spoils = True
    with view.branches(BRANCHES), pytest.raises(ViewError, match="weight is written by the model's own forward"):
        norm(x)
