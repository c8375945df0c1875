"""What people do with a model besides running it: each sees the weights of the branch in force, once perturbed."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import mezo_scale as ms
from mezo_scale.perturbation.view import View

BRANCHES = [(5, 0.1), (5, -0.1)]
X = torch.linspace(-1, 1, 32).view(8, 4)
LABELS = torch.arange(8) % 3


def moved(model: nn.Module, compute: Callable[[], Tensor], seed: int, scale: float) -> float:
    """What is computed with weights that are perturbed for good."""
    params = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    before = [param.detach().clone() for _, param in params]
    with torch.no_grad():
        for name, param in params:
            z = ms.noise.normal(seed, ms.noise.param_id(name), 0, param.numel()).view_as(param)
            param.add_(scale * z)
        found = float(compute())
        for (_, param), value in zip(params, before, strict=True):
            param.copy_(value)
    return found


def check(model: nn.Module, compute: Callable[[], Tensor]) -> None:
    """In every evaluation, not only in the first ones, which learn who reads what."""
    right = [moved(model, compute, *branch) for branch in BRANCHES]
    view = View(model)
    for _ in range(3):
        for branch, expected in zip(BRANCHES, right, strict=True):
            with view.branches([branch]):
                assert float(compute()) == pytest.approx(expected, rel=1e-5)


def test_a_vector_that_a_hook_adds() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    steering = nn.Parameter(torch.linspace(-2, 1, 4))
    model.register_parameter("steering", steering)
    model[0].register_forward_hook(lambda module, args, result: result + steering)
    check(model, lambda: model(X).square().mean())


def test_an_attack_by_gradients_of_the_input() -> None:
    """Its backward pass reads the weights of all modules, after all of them have run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def attacked() -> Tensor:
        with torch.enable_grad():
            x = X.clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(model(x), LABELS), x)
        return F.cross_entropy(model(X + 0.3 * slope.sign()), LABELS).detach()

    check(model, attacked)


def test_weights_that_are_masked_by_a_functional_call() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    mask = torch.tensor([[1.0, 0, 0], [0, 1, 0]])

    def masked() -> Tensor:
        params = {name: param * mask if name == "1.weight" else param for name, param in model.named_parameters()}
        return functional_call(model, params, (X,)).square().mean()

    check(model, masked)


class TiedLate(nn.Module):
    """Keeps what it has read as its head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        if not self.head:
            self.head.append(self.table.weight)
        return self.table(ids).mean(1) @ self.head[0].t()


def test_a_weight_that_a_model_keeps_from_its_first_call() -> None:
    torch.manual_seed(0)
    ids, model = torch.arange(15).view(5, 3) % 11, TiedLate()
    right = [moved(model, lambda: model(ids).square().mean(), *branch) for branch in BRANCHES]
    fresh = TiedLate()
    fresh.load_state_dict(model.state_dict())
    view = View(fresh)
    for _ in range(3):
        for branch, expected in zip(BRANCHES, right, strict=True):
            with view.branches([branch]):
                assert float(fresh(ids).square().mean()) == pytest.approx(expected, rel=1e-5)


def test_a_closure_that_returns_losses_of_other_rows_in_each_branch_is_refused() -> None:
    model, counts = nn.Linear(4, 1), iter([8, 4])
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="returned 4 losses in one branch and 8 in another"):
        ms.MeZO(model).step(lambda: model(X[: next(counts)]).square().sum(1))
    assert torch.equal(model.weight, before)
