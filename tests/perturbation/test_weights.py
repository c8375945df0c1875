"""What is remembered of a weight and its place in scratch from step to step is let go of when it is no longer so."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mezo_scale.errors import ViewError
from mezo_scale.noise import normal, param_id
from mezo_scale.perturbation.scratch import Scratch
from mezo_scale.perturbation.view import View

WIDTH = 16
BRANCHES = [(3, 0.1), (3, -0.1)]


class Changing(nn.Module):
    """Two products; the first may spoil its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.spoils = False

    def forward(self, x: Tensor) -> Tensor:
        if self.spoils:
            self.one.mul_(2)
        return (x @ self.one) @ self.two


def expected(model: Changing, x: Tensor) -> Tensor:
    rows = []
    for seed, scale in BRANCHES:
        one, two = (
            param.detach().float()
            + torch.tensor(scale) * normal(seed, param_id(name), 0, param.numel()).view(WIDTH, WIDTH)
            for name, param in model.named_parameters()
        )
        rows.append((x.float() @ one) @ two)
    return torch.cat(rows)


def transpose_(param: nn.Parameter) -> None:
    param.data = param.data.t()  # the same memory, of the same shape


def replace_(param: nn.Parameter) -> None:
    param.data = torch.randn(WIDTH, WIDTH)


def write_(param: nn.Parameter) -> None:
    param.data.neg_()


def read_again_(param: nn.Parameter) -> None:
    """The same memory, other numbers."""
    halves = torch.randn(WIDTH, 2 * WIDTH)
    param.data = halves.view(-1)[: WIDTH * WIDTH].view(WIDTH, WIDTH)


@pytest.mark.parametrize("change", [transpose_, replace_, write_, read_again_])
def test_a_weight_that_lies_elsewhere_or_otherwise_is_looked_at_again(change: Callable[[nn.Parameter], None]) -> None:
    torch.manual_seed(0)
    model, x = Changing(), torch.randn(3, WIDTH)
    view = View(model)
    for _ in range(3):
        with view.opened(BRANCHES):
            found = model(torch.cat([x, x]))
        assert torch.allclose(found, expected(model, x), rtol=1e-5, atol=1e-5)
        change(model.one)


def test_a_weight_that_was_written_does_not_count_as_written_for_ever() -> None:
    torch.manual_seed(0)
    model, x = Changing(), torch.randn(3, WIDTH)
    view = View(model)
    with view.branches(BRANCHES):
        model(torch.cat([x, x]))
    model.spoils = True
    with pytest.raises(ViewError, match="one is written by the model's own forward"), view.branches(BRANCHES):
        model(torch.cat([x, x]))
    model.spoils = False
    with view.branches(BRANCHES):
        found = model(torch.cat([x, x]))
    assert torch.allclose(found, expected(model, x), rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_but_what_lies_in_the_buffer() -> None:
    """Of the first step, too, whose first modules do not know yet how much the largest takes."""
    model = nn.Sequential(*(nn.Linear(size, size + 16) for size in range(16, 160, 16)))
    view = View(model)
    scratch = view.weights.scratch
    x = torch.randn(2, 16)
    for _ in range(3):
        with view.branches(BRANCHES):
            model(x)
        (buffer,) = scratch._buffers.values()
        kept = [place.slot.whole for place in scratch.notes.values()]
        kept += [slot.whole for slots in scratch._slots.values() for slot in slots.values()]
        assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= {buffer.untyped_storage().data_ptr()}
    assert len(scratch.notes) == 2 * len(model)
    largest = sum(param.numel() for param in model[-1].parameters())
    assert 2 * largest <= buffer.numel() <= 2 * largest + 128


def test_a_slot_is_the_same_tensor_in_every_step_until_the_buffer_grows() -> None:
    scratch = Scratch()
    device = torch.device("cpu")

    def takes(size: int) -> Tensor:
        with scratch.frame():
            return scratch.take((2, size), torch.float32, device).whole

    first = takes(100)
    assert takes(100) is first
    scratch.notes["of the old buffer"] = first
    larger = takes(200)
    assert larger.untyped_storage()._cdata != first.untyped_storage()._cdata
    assert scratch.notes == {}
    assert takes(100) is not first
