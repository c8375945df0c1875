"""A parameter is perturbed wherever it is read, by whatever road; where that can't be, the view says so."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mezo_scale as ms
from mezo_scale.errors import ViewError
from tests.support.moved import BRANCHES, make, moved


class ParentReads(nn.Module):
    """A mixer that reads its convolution's weight and never calls it, as state-space models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(6, 6, 3, groups=6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.nn.functional.conv1d(x.unsqueeze(-1), self.conv.weight, self.conv.bias, padding=1, groups=6)
        return self.out(mixed.squeeze(-1))


class GrandparentReads(nn.Module):
    """A weight that both its own module and the module around that one read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.inner.weight.t()


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.named = nn.ParameterDict({"w": torch.randn(6, 6)})
        self.listed = nn.ParameterList([torch.randn(6), torch.randn(6)])

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.named["w"] + self.listed[0] * self.listed[1]


class TableByOtherMeans(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table.weight[2] + self.table.weight.sum(0) + self.table(torch.tensor([[1]]))[0]


class NeverCalledLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 6)
        self.rows = nn.Parameter(torch.randn(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.rows) @ self.head.weight.data + self.head.bias


class InAList(nn.Module):
    """An LSTM keeps its weights in an ordinary list."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.unsqueeze(1))[0].squeeze(1)


class ByIteration(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for parameter in self.linear.parameters():
            x = x @ parameter if parameter.dim() == 2 else x + parameter
        return x


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight)


class ThroughNumpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(self.scale.detach().numpy().copy())


class HandedDown(nn.Module):
    """The outer module fetches, another one computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.apply_to = Apply()

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_to(x, self.weight)


class Apply(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight


class CalledAndReadFromOutside(nn.Module):
    """A Linear that is called by itself, and whose weight a module around it reads elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.head = Transposed(self.shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(x))


class Transposed(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight


MODELS = [
    CalledAndReadFromOutside,
    ParentReads,
    GrandparentReads,
    Containers,
    TableByOtherMeans,
    NeverCalledLinear,
    InAList,
    ByIteration,
    CustomFunction,
    ThroughNumpy,
    HandedDown,
]


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_a_parameter_is_perturbed_wherever_it_is_read(kind: Callable[[], nn.Module]) -> None:
    model, x = make(kind)
    with torch.no_grad():
        right = torch.stack([moved(model, *branch)(x) for branch in BRANCHES])
    view = ms.View(model)
    for _ in range(2):  # the first evaluation learns, the second knows
        for branch, expected in zip(BRANCHES, right, strict=True):
            with view.branches([branch]):
                assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-6)
        with view.branches(BRANCHES):
            both = model(torch.cat([x, x])).view(2, 3, 6)
        assert torch.allclose(both, right, rtol=1e-5, atol=1e-6)
    assert view.never_ran == []


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_a_tall_batch_alone_learns_it_too(kind: Callable[[], nn.Module]) -> None:
    model, x = make(kind)
    with torch.no_grad():
        right = torch.stack([moved(model, *branch)(x) for branch in BRANCHES])
    with ms.perturbed(model, BRANCHES):
        both = model(torch.cat([x, x])).view(2, 3, 6)
    assert torch.allclose(both, right, rtol=1e-5, atol=1e-6)


def test_asking_for_a_dtype_or_a_shape_is_no_read() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.asked, self.read = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.asked.weight, nn.Parameter)
            assert self.asked.weight.shape == (6, 6)
            return self.read(x.to(self.asked.weight.dtype))

    model, x = make(Asks)
    view = ms.View(model)
    with view.branches(BRANCHES):
        model(torch.cat([x, x]))
    assert view.never_ran == ["asked.weight", "asked.bias"]


def test_memory_that_another_tensor_shares_is_refused_by_name() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.transposed = self.linear.weight.detach().t()

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.transposed

    model, x = make(Shares)
    with (
        pytest.raises(ViewError, match=r"linear\.weight is read through another tensor"),
        ms.perturbed(model, BRANCHES[:1]),
    ):
        model(x)


def test_modules_find_their_own_weights_again_when_the_view_is_closed() -> None:
    model, x = make(ParentReads)
    plain = nn.Module.__getattr__
    with ms.perturbed(model, BRANCHES):
        model(torch.cat([x, x]))
        assert nn.Module.__getattr__ is not plain
    assert nn.Module.__getattr__ is plain
    assert type(model.conv.weight) is nn.Parameter


def test_a_models_signature_can_be_looked_at_inside_a_view() -> None:
    model, x = make(HandedDown)
    before = inspect.signature(model.forward), inspect.signature(model.apply_to.forward)
    with ms.perturbed(model, BRANCHES):
        model(torch.cat([x, x]))
        assert (inspect.signature(model.forward), inspect.signature(model.apply_to.forward)) == before


@pytest.mark.parametrize("how", ["block in place", "whole", "whole, first called in the view"])
def test_compiled_modules_run_eagerly_inside_a_view(how: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()), nn.Linear(8, 6))
    x = torch.randn(3, 6)
    with torch.no_grad():
        right = torch.stack([moved(model, *branch)(x) for branch in BRANCHES])
    called: nn.Module = model
    if how == "block in place":
        model[1].compile(backend="eager")
    else:
        called = torch.compile(model, backend="eager")  # type: ignore[assignment]
    if "first" not in how:
        with torch.no_grad():
            called(x)
    with pytest.warns(UserWarning, match="eagerly"), ms.perturbed(called, BRANCHES):
        both = called(torch.cat([x, x])).view(2, 3, 6)
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        for branch, expected in zip(BRANCHES, right, strict=True):
            with ms.perturbed(called, [branch]):
                assert torch.allclose(called(x), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(both, right, rtol=1e-5, atol=1e-6)
