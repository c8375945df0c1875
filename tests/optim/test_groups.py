"""Parameter groups, and what is set on an optimizer when it was made: followed, or refused before anything moves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mezo_scale as ms
from mezo_scale.errors import MezoError

BATCH = {"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(0))}


def squares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).square()[:, 0]


def made(**options: Any) -> tuple[nn.Module, ms.MeZO]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    opt = ms.MeZO(model, lr=1e-2, **options)
    opt.step(batch=BATCH, objective=squares)
    return model, opt


def set_(name: str, value: float) -> Callable[[ms.MeZO], None]:
    return lambda opt: opt.param_groups[0].update({name: value})


def give_one_away_(opt: ms.MeZO) -> None:
    opt.param_groups.append({"params": [opt.param_groups[0]["params"].pop()], "lr": 0.0, "weight_decay": 0.0})


EDITS: dict[str, tuple[Callable[[ms.MeZO], Any], str]] = {
    "taken out": (lambda opt: opt.param_groups[0]["params"].pop(1), "no longer holds 0.bias, for its list was edited"),
    "emptied": (lambda opt: opt.param_groups[0]["params"].clear(), "no longer holds 0.weight"),
    "given away": (give_one_away_, "no longer holds 1.bias"),
    "without its group": (lambda opt: opt.param_groups.clear(), "no longer holds 0.weight"),
    "another's": (
        lambda opt: opt.param_groups[0]["params"].append(nn.Parameter(torch.ones(2))),
        "holds what the model does not tune",
    ),
    "lr nan": (set_("lr", float("nan")), "lr of parameter group 0 is nan: expected a finite number, 0 or above"),
    "lr below 0": (set_("lr", -1.0), "lr of parameter group 0 is -1.0"),
    "decay infinite": (set_("weight_decay", float("inf")), "weight_decay of parameter group 0 is inf"),
    "eps 0": (lambda opt: setattr(opt, "eps", 0.0), "eps is 0.0: expected a finite number above 0"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("logged", [False, True])
def test_what_no_step_can_follow_is_refused_and_nothing_moves(edit: str, logged: bool, tmp_path: Any) -> None:
    model, opt = made(trajectory=tmp_path / "log.mezo") if logged else made()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    change, said = EDITS[edit]
    change(opt)
    with pytest.raises((MezoError, ValueError), match=said):
        opt.step(batch=BATCH, objective=squares)
    assert opt.step_count == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if opt.trajectory is not None:
        assert len(opt.trajectory) == 1


def test_a_scheduler_may_set_a_rate_of_0_or_a_tensor() -> None:
    model, opt = made()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    opt.param_groups[0]["lr"] = 0.0
    opt.step(batch=BATCH, objective=squares)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    opt.param_groups[0]["lr"] = torch.tensor(0.5)
    opt.step(batch=BATCH, objective=squares)
    assert opt.last_record is not None
    assert opt.last_record.alphas[0] == pytest.approx(-0.5 * opt.last_record.projected_grads[0], rel=1e-6)


def test_the_order_of_a_list_and_a_list_of_the_same_are_no_edits() -> None:
    _, opt = made()
    opt.param_groups[0]["params"] = opt.param_groups[0]["params"][::-1]
    opt.step(batch=BATCH, objective=squares)
    assert opt.step_count == 2
