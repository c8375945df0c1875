"""Reads that were not there when the view learned, and writes: perturbed, or an error that names the parameter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mezo_scale as ms
from mezo_scale.errors import ViewError
from tests.support.moved import BRANCHES, make, moved


class ChangesItsMind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.always, self.later = nn.Linear(6, 6), nn.Linear(6, 6)
        self.late = False

    def forward(self, x: Tensor) -> Tensor:
        return self.always(x) @ self.later.weight if self.late else self.always(x)


class KeepsAList(nn.Module):
    """Has a weight in a plain list, where no look-up of a module's attribute sees it, and reads it from a later call
    on."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.later = nn.Linear(6, 6), nn.Linear(6, 6)
        self.kept = [self.later.weight]
        self.late = False

    def forward(self, x: Tensor) -> Tensor:
        return self.always(x) @ self.kept[0].data.t() if self.late else self.always(x)


@pytest.mark.parametrize("kind", [ChangesItsMind, KeepsAList])
def test_a_read_that_was_not_there_at_first_is_an_error_that_names_the_parameter_and_its_reader(
    kind: Callable[[], nn.Module],
) -> None:
    model, x = make(kind)
    view = ms.View(model)
    with view.branches(BRANCHES):
        model(torch.cat([x, x]))
    model.late = True
    found = rf"later\.weight is read by {type(model).__name__}"
    with pytest.raises(ViewError, match=found), view.branches(BRANCHES):
        model(torch.cat([x, x]))
    assert type(model.later.weight) is nn.Parameter


@pytest.mark.parametrize("kind", [ChangesItsMind, KeepsAList])
def test_with_one_branch_a_read_that_was_not_there_at_first_is_perturbed(kind: Callable[[], nn.Module]) -> None:
    model, x = make(kind)
    view = ms.View(model)
    with view.branches(BRANCHES[:1]):
        model(x)
    model.late = True
    for _ in range(2):
        with view.branches(BRANCHES[:1]):
            found = model(x)
        with torch.no_grad():
            assert torch.allclose(found, moved(model, *BRANCHES[0])(x), rtol=1e-5, atol=1e-6)
    assert "later.weight" in view.read
    assert type(model.later.weight) is nn.Parameter


class SetsItsData(nn.Module):
    """Projects its weight in its own forward, as some adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        self.inner.weight.data = self.inner.weight / self.inner.weight.norm()
        return self.inner(x)


class ClampsItself(nn.Module):
    """Keeps a scale in bounds, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((6,), 5.0))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.data.clamp_(max=4.6)
        return x * self.scale.exp()


class WritesASlice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        self.weight[0] = 0
        return x * self.weight


class ClampsWhatItKeeps(ClampsItself):
    """The same, by way of a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.scale]

    def forward(self, x: Tensor) -> Tensor:
        self.kept[0].data.clamp_(max=4.6)
        return x * self.kept[0].exp()


class SetsTheDataOfWhatItKeeps(ClampsWhatItKeeps):
    def forward(self, x: Tensor) -> Tensor:
        self.kept[0].data = self.kept[0].clamp(max=4.6)
        return x * self.kept[0].exp()


class WritesAViewOfAView(WritesASlice):
    """By a road on which only the memory is the parameter's."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.view(2, 3)[0].mul_(0.9)
        return x * self.weight


class WritesByAFunction(WritesASlice):
    def forward(self, x: Tensor) -> Tensor:
        torch.clamp_(self.weight, max=0.1)
        return x * self.weight


class WritesAsOutput(WritesASlice):
    def forward(self, x: Tensor) -> Tensor:
        torch.mul(self.weight, 0.9, out=self.weight.detach())
        return x * self.weight


class WritesManyAtOnce(WritesASlice):
    def forward(self, x: Tensor) -> Tensor:
        torch._foreach_mul_([self.weight], 0.9)
        return x * self.weight


class WritesAViewOfWhatItKeeps(ClampsWhatItKeeps):
    def forward(self, x: Tensor) -> Tensor:
        self.kept[0].view(-1)[1:].clamp_(max=4.6)
        return x * self.kept[0].exp()


class WritesWhatAChildReturned(nn.Module):
    class Child(WritesASlice):
        def forward(self) -> Tensor:
            return self.weight

    def __init__(self) -> None:
        super().__init__()
        self.child = self.Child()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.child()
        weight[1:].mul_(0.9)
        return x * weight


WRITERS = [
    SetsItsData,
    ClampsItself,
    WritesASlice,
    ClampsWhatItKeeps,
    SetsTheDataOfWhatItKeeps,
    WritesAViewOfAView,
    WritesByAFunction,
    WritesAsOutput,
    WritesManyAtOnce,
    WritesAViewOfWhatItKeeps,
    WritesWhatAChildReturned,
]


@pytest.mark.parametrize("make", WRITERS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_model_whose_forward_writes_a_trainable_parameter_is_refused_and_stays_as_it_was(
    make: Callable[[], nn.Module], count: int
) -> None:
    torch.manual_seed(0)
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ViewError, match="written by the model's own forward"), ms.perturbed(model, BRANCHES[:count]):
        model(torch.randn(4, 6))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class WritesLater(WritesASlice):
    """Its first calls write nothing."""

    writes = False

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.weight.view(2, 3)[0].mul_(0.9)
        return x * self.weight


@pytest.mark.parametrize("inference", [False, True])
def test_a_write_that_begins_after_the_view_has_learned_is_refused(inference: bool) -> None:
    model = WritesLater()
    view, x = ms.View(model), torch.randn(4, 6)
    with torch.inference_mode(inference):
        for _ in range(2):
            with view.branches(BRANCHES[:1]):
                model(x)
        model.writes = True
        with pytest.raises(ViewError, match="written by the model's own forward"), view.branches(BRANCHES[:1]):
            model(x)
