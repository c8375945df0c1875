"""The optimizer's state: all of it is saved, what does not fit is refused, torch's checkpoints carry it."""

import copy
import io
import pathlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import mezo_scale as ms
from tests.support import models
from tests.support.disk import LazyDisk

BATCH = models.batch("llama", 4)
LOSS = models.objective("llama")
ROUNDINGS = ["nearest", "stochastic", "master"]


def made(rounding: str = "master", *, mixed: bool = False, **options: Any) -> tuple[nn.Module, ms.MeZO]:
    model = models.build("llama", dtype=torch.bfloat16)
    if mixed:
        model.lm_head.float()
        model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    return model, ms.MeZO(model, **{"lr": 1e-4, "eps": 1e-2, "rounding": rounding, **options})


def steps(opt: ms.MeZO, count: int) -> None:
    for _ in range(count):
        opt.step(batch=BATCH, objective=LOSS)


def bits(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def saved(opt: ms.MeZO) -> dict[str, Any]:
    """Through a file, without pickled code."""
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_steps_of_a_saved_state_are_on_the_disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LazyDisk(monkeypatch)
    _, opt = made(trajectory=tmp_path / "t")
    steps(opt, 2)
    assert opt.trajectory is not None
    assert (len(opt.trajectory), opt.trajectory.synced) == (2, 0)
    opt.state_dict()
    assert opt.trajectory.synced == 2
    opt.trajectory.close()
    opt.state_dict()  # of a log that is closed as well


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_saved_run_goes_on_with_the_same_bits(rounding: str) -> None:
    model, opt = made(rounding)
    steps(opt, 4)
    weights, state = copy.deepcopy(model.state_dict()), saved(opt)
    steps(opt, 4)
    other, again = made(rounding)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    steps(again, 4)
    assert same(bits(other), bits(model))
    assert again.last_record == opt.last_record


def test_low_bits_are_saved_in_the_parameter_s_shape_and_are_copies_when_loaded() -> None:
    model, opt = made()
    steps(opt, 2)
    state = opt.state_dict()
    for number, param in enumerate(model.parameters()):
        remainder = state["state"][number]["remainder"]
        assert (remainder.shape, remainder.dtype) == (param.shape, torch.int16)
    assert any(entry["remainder"].any() for entry in state["state"].values())
    _, other = made()
    other.load_state_dict(state)
    steps(other, 1)
    assert same(
        [entry["remainder"] for entry in state["state"].values()],
        [entry["remainder"] for entry in opt.state_dict()["state"].values()],
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_directions": 2}, "saved with num_directions = 1, this run has 2"),
        ({"distribution": "rademacher"}, "saved with distribution = normal, this run has rademacher"),
        ({"distribution": "low_rank"}, "saved with distribution = normal, this run has low_rank of rank 1 in signs"),
        ({"rounding": "stochastic"}, "saved with rounding = master, this run has stochastic"),
    ],
)
def test_a_state_of_another_kind_of_run_is_refused_and_changes_nothing(options: dict[str, Any], message: str) -> None:
    _, opt = made(lr=5e-4)
    steps(opt, 1)
    _, other = made(**options)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(opt.state_dict())
    assert (other.step_count, other.param_groups[0]["lr"]) == (0, 1e-4)


def test_a_state_that_lacks_something_is_refused_and_changes_nothing() -> None:
    _, opt = made(lr=5e-4)
    steps(opt, 1)
    whole = opt.state_dict()
    cast = {number: {"remainder": entry["remainder"].float()} for number, entry in whole["state"].items()}
    groups = [{key: value for key, value in whole["param_groups"][0].items() if key != "mezo"}]
    fewer = [{**whole["param_groups"][0], "params": whole["param_groups"][0]["params"][:-1]}]
    model, other = made()
    for state, message in [
        ({**whole, "state": {}}, "holds no remainder of model.embed_tokens.weight"),
        ({**whole, "state": {**whole["state"], 3: {}}}, "holds no remainder of"),
        ({**whole, "state": cast}, "Tensor torch.float32"),
        ({**whole, "mezo": {"step_count": 1, "seed": 0, "eps": 1e-2}}, "was not saved by MeZO"),
        ({"state": whole["state"], "param_groups": groups}, "was not saved by MeZO"),
        ({**whole, "param_groups": fewer}, "holds no remainder of|different size|doesn't match the size"),
    ]:
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    assert (other.step_count, other.param_groups[0]["lr"]) == (0, 1e-4)
    assert not any(entry["remainder"].any() for entry in other.state_dict()["state"].values())
    before, _ = made()
    steps(other, 1)
    assert not same(bits(model), bits(before))


def test_a_state_of_another_step_than_the_open_trajectory_is_refused(tmp_path: pathlib.Path) -> None:
    _, opt = made("nearest")
    steps(opt, 2)
    _, other = made("nearest", trajectory=tmp_path / "t.mezo")
    with pytest.raises(ValueError, match="saved with step_count = 2, this run has 0"):
        other.load_state_dict(opt.state_dict())
    other.load_state_dict(other.state_dict())
    steps(other, 1)


# -- torch.distributed.checkpoint ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("rounding", "mixed"), [*((rounding, False) for rounding in ROUNDINGS), ("master", True)])
def test_torch_s_checkpoints_carry_the_whole_state(
    tmp_path: pathlib.Path, rounding: str, mixed: bool, flat: bool
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, opt = made(rounding, mixed=mixed, seed=7)
    steps(opt, 3)
    weights = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*no process group.*|.*torch.distributed is.*|.*assuming the intent.*"
        )
        dcp.save({"optim": get_optimizer_state_dict(model, opt, options=options)}, checkpoint_id=tmp_path / "c")
        steps(opt, 3)
        other, again = made(rounding, mixed=mixed)
        other.load_state_dict(weights)
        state = {"optim": get_optimizer_state_dict(other, again, options=options)}
        dcp.load(state, checkpoint_id=tmp_path / "c")
        set_optimizer_state_dict(other, again, state["optim"], options=options)
    assert (again.step_count, again.seed) == (3, 7)
    steps(again, 3)
    assert same(bits(other), bits(model))


def test_looking_at_the_state_before_the_first_step_does_nothing(tmp_path: pathlib.Path) -> None:
    model, opt = made("nearest", trajectory=tmp_path / "t.mezo")
    before, header = bits(model), (tmp_path / "t.mezo").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_optimizer_state_dict(model, opt)
    assert same(bits(model), before)
    assert (tmp_path / "t.mezo").read_bytes() == header
    assert (opt.step_count, opt.last_record) == (0, None)


# -- measuring and stepping ----------------------------------------------------------------------------------------


def test_a_step_with_nothing_measured_does_nothing_and_says_so() -> None:
    model, opt = made()
    before = bits(model)
    with pytest.warns(UserWarning, match="nothing to apply"):
        assert opt.step() == 0.0
    assert same(bits(model), before)
    assert (opt.step_count, opt.last_record) == (0, None)


def test_measuring_and_applying_is_a_step_bit_by_bit() -> None:
    one, other = (models.build("llama") for _ in range(2))
    at_once, in_two = (ms.MeZO(model, lr=1e-3, eps=1e-2, num_directions=2, weight_decay=0.1) for model in (one, other))
    for _ in range(3):
        loss = at_once.step(batch=BATCH, objective=LOSS)
        before = bits(other)
        assert in_two.measure(batch=BATCH, objective=LOSS) == pytest.approx(loss, rel=1e-12)
        assert same(bits(other), before)
        assert in_two.step() == loss
        assert in_two.last_record == at_once.last_record
    assert same(bits(one), bits(other))


def double_losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).double().square().sum(1)


def test_several_measurements_are_one_step_on_all_their_rows() -> None:
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    grads = []
    for cuts in ([9], [2, 4, 3], [1, 8]):
        model = nn.Linear(5, 3)
        nn.init.constant_(model.weight, 0.25)
        nn.init.zeros_(model.bias)
        opt = ms.MeZO(model, lr=1e-3, eps=1e-2, num_directions=2, paired=False)
        for rows in x.split(cuts):
            opt.measure(batch={"x": rows}, objective=lambda m, b: double_losses(m, b["x"]))
        opt.step()
        assert opt.step_count == 1
        grads.append(opt.last_record.projected_grads)
    # Not bit for bit: the model is in float32, and some CPUs multiply another number of rows in another order.
    np.testing.assert_allclose(grads[1:], [grads[0]] * 2, rtol=1e-5)


def test_measuring_keeps_its_directions_whatever_is_set_meanwhile() -> None:
    model = models.build("llama")
    opt = ms.MeZO(model, lr=1e-3, eps=1e-2)
    opt.measure(batch=BATCH, objective=LOSS)
    opt.eps, opt.seed = 0.5, 9
    opt.measure(lambda: LOSS(model, BATCH))
    opt.step()
    other = ms.MeZO(models.build("llama"), lr=1e-3, eps=1e-2)
    other.step(batch=BATCH, objective=LOSS)
    assert opt.last_record.seeds == other.last_record.seeds
    assert opt.last_record.projected_grads == pytest.approx(other.last_record.projected_grads, rel=1e-4)


def test_a_measurement_that_fails_adds_nothing_to_those_before() -> None:
    opt = ms.MeZO(models.build("llama"), lr=1e-3, eps=1e-2)
    opt.measure(batch=BATCH, objective=LOSS)
    with pytest.raises(ValueError, match="one loss per row"):
        opt.measure(batch=BATCH, objective=lambda m, b: LOSS(m, b).mean())
    other = ms.MeZO(models.build("llama"), lr=1e-3, eps=1e-2)
    assert opt.step() == other.step(batch=BATCH, objective=LOSS)
    assert opt.last_record == other.last_record
