"""Weights that a module keeps when it has run, for others to read: they stay what they were in that branch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mezo_scale as ms
from mezo_scale.perturbation import View
from tests.support.moved import BRANCHES, make, moved


class Lender(nn.Module):
    """Keeps its weight, turned, as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        self.lent = self.weight.t()
        return x @ self.weight


class KeptAsAnAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Lender(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) @ self.first.lent


class Box:
    """Nothing that torch would look into."""

    def __init__(self, held: Tensor) -> None:
        self.held = held


class Boxes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Box]:
        return x @ self.weight, Box(self.weight)


class ReturnedInABox(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Boxes(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y, box = self.first(x)
        return self.second(y) @ box.held


class KeptByManyForLater(nn.Module):
    """Several modules keep theirs; all are read at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.lenders = nn.ModuleList(Lender() for _ in range(3))
        self.last = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for lender in self.lenders:
            x = torch.tanh(lender(x))
        x = self.last(x)
        for lender in self.lenders:
            x = torch.tanh(x @ lender.lent)
        return x


class InsideOneThatReadsItsOwn(KeptByManyForLater):
    """All of it while a weight of the module around them is in place."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale) * self.scale


@pytest.mark.parametrize("kind", [KeptAsAnAttribute, ReturnedInABox, KeptByManyForLater, InsideOneThatReadsItsOwn])
def test_what_a_module_keeps_of_its_weight_stays_what_it_was(kind: Callable[[], nn.Module]) -> None:
    model, x = make(kind)
    view = View(model)
    for _ in range(4):  # the first learns; the later ones use scratch
        for branch in BRANCHES:
            with view.branches([branch]):
                found = model(x)
            with torch.no_grad():
                assert torch.allclose(found, moved(model, *branch)(x), rtol=1e-5, atol=1e-6)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class OfAllSorts(nn.Module):
    """Products, normalisations, and parameters that a module without a class of torch's own reads."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.linear, self.norm = Own(), nn.Linear(6, 6), nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.convolution = nn.Conv1d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.linear(self.own(x)))[:, None]
        x = self.attention(x, x, x)[0]
        return self.convolution(x.transpose(1, 2))[:, :, 0]


@pytest.mark.parametrize("branches", [BRANCHES[:1], BRANCHES, [*BRANCHES, (12, 0.1), (12, -0.1)]])
@pytest.mark.parametrize("noise", [ms.noise.Noise(), ms.noise.Noise("low_rank", 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of the matrices; normalisations are in float32
def test_memory_is_used_again_where_nothing_is_kept(
    dtype: torch.dtype, noise: ms.noise.Noise, branches: list[tuple[int, float]]
) -> None:
    model, x = make(OfAllSorts)
    model, x = model.to(dtype), x.to(dtype)
    view = View(model, noise=noise)
    places = []
    for _ in range(5):
        with view.branches(branches):
            model(x.repeat(len(branches), 1))
        places.append(tuple(buffer.data_ptr() for buffer in view.weights.scratch._buffers.values()))
        view.weights.scratch.notes["this is gone with the buffer"] = True
    assert "this is gone with the buffer" in view.weights.scratch.notes
    assert len(set(places[2:])) == 1  # the first steps find out how much is needed


def test_where_a_weight_is_kept_the_next_buffer_is_a_new_one() -> None:
    model, x = make(KeptAsAnAttribute)
    view = View(model)
    for _ in range(3):
        with view.branches(BRANCHES[:1]):
            model(x)
        lent = model.first.lent
        assert not view.weights.scratch.holds(lent)
