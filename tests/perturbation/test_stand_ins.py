"""What takes methods' places while a view is open: of the method that is there, and gone with the view."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mezo_scale.noise import Noise
from mezo_scale.perturbation.view import View

PAIR = [(3, 1e-2), (3, -1e-2)]
X = torch.linspace(-1, 1, 32).view(4, 8)


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("drawn", [Noise("normal"), Noise("low_rank", 1)], ids=str)
@pytest.mark.parametrize("branches", [PAIR, PAIR[:1]], ids=["all", "one"])
def test_a_forward_that_was_put_in_the_place_of_another_is_the_one_that_runs(
    model: nn.Sequential, drawn: Noise, branches: list[tuple[int, float]]
) -> None:
    """As accelerate does, and people who patch a layer. It reads the weights that the branch has."""
    view, x = View(model, noise=drawn), X.repeat(len(branches), 1)

    def run() -> Tensor:
        with view.branches(branches):
            result: Tensor = model(x)
            return result

    before, plain = run(), model[1].forward
    model[1].forward = lambda x: 2 * plain(x)
    torch.testing.assert_close(run(), 2 * before)
    del model[1].forward
    torch.testing.assert_close(run(), before)


@pytest.mark.usefixtures("no_collector")
def test_a_view_that_is_let_go_of_gives_its_scratch_back_at_once(model: nn.Sequential) -> None:
    view = View(model)
    with view.branches(PAIR):
        model(X.repeat(2, 1))
    scratch = weakref.ref(view.weights.scratch)
    assert scratch() is not None
    del view
    assert scratch() is None
