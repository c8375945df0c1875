"""Low-rank directions in a model: each branch is a model with the perturbation written in, and no weight is copied."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mezo_scale as ms
from mezo_scale.errors import ModelError
from mezo_scale.noise import Noise
from mezo_scale.perturbation import View, weights
from tests.support import models
from tests.support.layouts import shard
from tests.support.pool import Ranks

BRANCHES = [(11, 1e-2), (11, -1e-2), (5, 3e-2)]
NOISES = [Noise("low_rank"), Noise("low_rank", 4), Noise("low_rank", 3, "normal")]


def physically(model: nn.Module, seed: int, scale: float, kind: Noise) -> nn.Module:
    """A copy whose weights are perturbed for good."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, param in moved.named_parameters():
            if param.requires_grad:
                z, runs = torch.zeros(param.numel()), np.array([[0, 0, param.numel()]])
                work = (ms.noise.param_id(name), [[seed]], [[1.0]], [1.0])
                ms.noise.write_(z, runs, *work, noise=kind, shape=param.shape)
                param.copy_((param.float() + torch.tensor(scale) * z.view_as(param)).to(param.dtype))
    return moved


def tall(batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    return {key: torch.cat([value] * count) for key, value in batch.items()}


def relative(one: Tensor, other: Tensor) -> float:
    return float(((one - other).abs() / other.abs().clamp_min(1e-6)).max())


@pytest.mark.parametrize("kind", NOISES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", list(models.ARCHITECTURES))
def test_a_branch_computes_what_a_physically_perturbed_copy_computes(name: str, kind: Noise) -> None:
    model, batch, loss = models.build(name), models.batch(name, 2), models.objective(name)
    smallest = min(min(param.shape) for param in model.parameters() if param.requires_grad and param.dim() == 2)
    if kind.rank > smallest:
        kind = Noise("low_rank", smallest, kind.entries)
    with ms.perturbed(model, BRANCHES, distribution=kind):
        together = loss(model, tall(batch, len(BRANCHES))).view(len(BRANCHES), 2)
    for position, (seed, scale) in enumerate(BRANCHES):
        with torch.no_grad():
            right = loss(physically(model, seed, scale, kind), batch)
        with ms.perturbed(model, [(seed, scale)], distribution=kind):
            alone = loss(model, batch)
        assert relative(alone, right) < 1e-5
        assert relative(together[position], right) < 1e-5


class Counted(nn.Module):
    """Linears with and without a bias, and a table; tied or not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.one, self.two = nn.Linear(12, 24), nn.Linear(24, 12, bias=False)
        self.head = nn.Linear(12, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.two(torch.tanh(self.one(self.embed(ids))))[:, 1:])


@pytest.mark.parametrize("branches", [BRANCHES, BRANCHES[:1]], ids=["all", "one"])
def test_no_matrix_is_made_for_a_linear_and_its_stored_weight_is_read_once(
    branches: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, ids = Counted(), torch.randint(0, 50, (2 * len(branches), 7))
    made: list[str] = []
    perturb = weights.Weights.perturb

    def seen(self: weights.Weights, site: ms.sharding.Site, *args: object, **options: object) -> list[Tensor]:
        made.append(site.name)
        return perturb(self, site, *args, **options)  # type: ignore[arg-type]

    view = View(model, noise=Noise("low_rank"))
    with view.branches(branches):
        model(ids)  # learns who reads what
    calls: list[int] = []
    linear = torch.nn.functional.linear

    def counted(x: Tensor, *args: Tensor) -> Tensor:
        assert x.is_contiguous(), "torch copies the weight for each row of an input that is not"
        calls.append(len(x))
        return linear(x, *args)

    monkeypatch.setattr(weights.Weights, "perturb", seen)
    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    with view.branches(branches):
        model(ids)
    assert made == []
    assert calls == [len(ids)] * 3


@pytest.mark.parametrize("frozen", ["one.weight", "one.bias"])
def test_of_a_linear_only_what_is_tuned_is_perturbed(frozen: str) -> None:
    torch.manual_seed(0)
    model, ids = Counted(), torch.randint(0, 50, (2, 7))
    model.get_parameter(frozen).requires_grad = False
    with ms.perturbed(model, BRANCHES, distribution="low_rank"):
        together = model(ids.repeat(3, 1)).view(3, 2, 6, 50)
    for part, (seed, scale) in zip(together, BRANCHES, strict=True):
        with torch.no_grad():
            assert (part - physically(model, seed, scale, NOISES[0])(ids)).abs().max() < 1e-5


def test_scales_of_zero_and_of_any_size_share_a_batch() -> None:
    torch.manual_seed(0)
    model, ids = Counted(), torch.randint(0, 50, (2, 7))
    for branches in ([(1, 0.0), (2, 0.0)], [(1, 0.0), (2, 0.3), (1, -1e-3)]):
        with ms.perturbed(model, branches, distribution="low_rank"):
            together = model(ids.repeat(len(branches), 1)).view(len(branches), 2, 6, 50)
        for part, (seed, scale) in zip(together, branches, strict=True):
            with torch.no_grad():
                assert (part - physically(model, seed, scale, NOISES[0])(ids)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", NOISES, ids=lambda kind: kind.name)
def test_under_autocast_and_in_16_bits_a_branch_moves_as_far_as_in_32(kind: Noise) -> None:
    torch.manual_seed(0)
    model, ids = Counted(), torch.randint(0, 50, (8, 7))
    moved = physically(model, 11, 0.05, kind)
    with torch.no_grad():
        exact = moved(ids) - model(ids)
    half = copy.deepcopy(model).bfloat16()
    with ms.perturbed(half, [(11, 0.05), (11, 0.0)], distribution=kind):
        one, other = half(ids.repeat(2, 1)).float().chunk(2)
    with (
        torch.autocast("cpu", torch.bfloat16),
        ms.perturbed(model, [(11, 0.05), (11, 0.0)], dtype=torch.bfloat16, distribution=kind),
    ):
        mixed, still = model(ids.repeat(2, 1)).float().chunk(2)
    for found in (one - other, mixed - still):
        assert math.sqrt(float((found - exact).square().mean() / exact.square().mean())) < 0.05


def test_a_rank_above_a_matrixs_smaller_side_is_refused_with_both_numbers() -> None:
    model = Counted()
    message = r"embed.weight: rank is 13, but a matrix of 50 x 12 has rank 12 at most: take a rank of at most 12"
    with pytest.raises(ModelError, match=message):
        ms.MeZO(model, distribution=Noise("low_rank", 13))
    with pytest.raises(ModelError, match=message), ms.perturbed(model, BRANCHES, distribution=Noise("low_rank", 13)):
        pass


def branch_losses(layout: str) -> list[list[float]]:
    sharded = shard(layout, models.build("llama-tied"))
    batch, loss = models.batch("llama-tied", 2), models.objective("llama-tied")
    found = []
    for kind in (NOISES[0], NOISES[2]):
        with ms.perturbed(sharded.model, BRANCHES, distribution=kind):
            found.append(loss(sharded.model, tall(batch, 3)).tolist())
    sharded.close()
    return found


@pytest.mark.parametrize("layout", ["fsdp2", "zero3", "fsdp1", "tp"])
def test_a_sharded_model_computes_the_same_branches(ranks: Ranks, layout: str) -> None:
    expected = branch_losses("plain")
    for found in ranks(2, branch_losses, layout=layout):
        assert np.allclose(found, expected, rtol=1e-5)
