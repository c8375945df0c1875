"""A model that changes after its optimizer was made: the next step moves what the model holds now, or says why not."""

import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mezo_scale as ms
from mezo_scale.errors import MezoError, ModelError, ShardingError, TrajectoryError
from mezo_scale.sharding import discover
from tests.support import models

BATCH = models.batch("llama", 4)
LOSS = models.objective("llama")


def clone_data(model: nn.Module) -> None:
    for param in model.parameters():
        param.data = param.data.clone()


def new_parameters(model: nn.Module) -> None:
    for module in model.modules():
        for name, param in list(module._parameters.items()):
            if param is not None:
                setattr(module, name, nn.Parameter(param.detach().clone()))


def assigned(model: nn.Module) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def resized(model: Any) -> None:
    model.resize_token_embeddings(model.config.vocab_size + 3)


def another_layer(model: Any) -> None:
    model.model.layers[0] = models.build("llama", seed=3).model.layers[1]


CHANGES: dict[str, Callable[[Any], object]] = {
    "cast": lambda model: model.to(torch.bfloat16),
    "data replaced": clone_data,
    "parameters replaced": new_parameters,
    "loaded by assignment": assigned,
    "embeddings resized": resized,
    "a module replaced": another_layer,
}


def step(opt: ms.MeZO) -> float:
    return opt.step(batch=BATCH, objective=LOSS)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def unmoved(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    now = dict(model.named_parameters())
    assert now.keys() == before.keys()
    return [name for name, weight in before.items() if torch.equal(weight, now[name].detach())]


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_a_step_moves_the_weights_that_the_model_holds_now(change: str, steps_before: int) -> None:
    model = models.build("llama")
    opt = ms.MeZO(model, lr=1.0, eps=1e-2)
    for _ in range(steps_before):
        opt.step(batch=BATCH, objective=lambda m, b: LOSS(m, b) * 1e-3)
    CHANGES[change](model)
    before = weights(model)
    fresh = models.build("llama")
    CHANGES[change](fresh)
    fresh.load_state_dict(before)
    other = ms.MeZO(fresh, lr=1.0, eps=1e-2)
    other.step_count = steps_before
    step(opt)
    step(other)
    assert unmoved(model, before) == []
    assert unmoved(model, weights(fresh)) == list(before)
    held = [param for group in opt.param_groups for param in group["params"]]
    assert {id(param) for param in held} == {id(param) for param in model.parameters()}


def test_what_is_frozen_stays_and_what_is_unfrozen_moves() -> None:
    model = models.build("llama")
    first, second = (layer.mlp.up_proj.weight for layer in model.model.layers)
    first.requires_grad_(False)
    opt = ms.MeZO(model, lr=1.0, eps=1e-2)
    step(opt)
    first.requires_grad_(True)
    second.requires_grad_(False)
    before = weights(model)
    step(opt)
    assert unmoved(model, before) == ["model.layers.1.mlp.up_proj.weight"]


def test_an_unfrozen_parameter_may_join_with_a_learning_rate_of_its_own() -> None:
    model = models.build("llama")
    late = model.model.layers[0].mlp.up_proj.weight
    late.requires_grad_(False)
    opt = ms.MeZO(model, lr=1e-3, eps=1e-2)
    step(opt)
    late.requires_grad_(True)
    opt.add_param_group({"params": [late], "lr": 1e-1})
    before = late.detach().clone()
    step(opt)
    record = opt.last_record
    assert record.alphas_of(1)[0] == pytest.approx(100 * record.alphas_of(0)[0], rel=1e-6)
    z = ms.noise.normal(record.seeds[0], ms.noise.param_id("model.layers.0.mlp.up_proj.weight"), 0, late.numel())
    assert torch.equal(late, before + z.view_as(late) * record.alphas_of(1)[0])


def test_a_group_of_parameters_that_are_not_tuned_is_refused() -> None:
    model = models.build("llama")
    frozen = model.model.layers[0].mlp.up_proj.weight
    frozen.requires_grad_(False)
    opt = ms.MeZO(model, eps=1e-2)
    for params in ([nn.Parameter(torch.zeros(3))], frozen, [("a", frozen)]):
        with pytest.raises(ValueError, match="not one of the model's own trainable ones"):
            opt.add_param_group({"params": params})
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [model.model.norm.weight]})
    assert len(opt.param_groups) == 1
    step(opt)


def test_groups_must_hold_every_tuned_parameter_even_a_single_group() -> None:
    model = models.build("llama")
    with pytest.raises(ShardingError, match="in no parameter group"):
        ms.MeZO(model, params=[{"params": list(model.parameters())[:2]}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cast", r"it has .* float32\[.*, the model has .* bfloat16\["),
        ("embeddings resized", r"it has .*\[\d+, \d+\].*, the model has"),
        ("frozen", "parameters"),
        ("unfrozen group", "parameters"),
    ],
)
def test_a_change_that_the_open_trajectory_does_not_allow_is_refused(
    tmp_path: pathlib.Path, change: str, message: str
) -> None:
    model = models.build("llama")
    late = model.lm_head.weight
    late.requires_grad_(change != "unfrozen group")
    opt = ms.MeZO(model, lr=1e-3, eps=1e-2, trajectory=tmp_path / "t.mezo")
    step(opt)
    late.requires_grad_(change != "frozen")
    if change in CHANGES:
        CHANGES[change](model)
    before, written = weights(model), (tmp_path / "t.mezo").read_bytes()
    with pytest.raises(TrajectoryError, match=message):
        opt.add_param_group({"params": [late]}) if change == "unfrozen group" else step(opt)
    assert len(opt.param_groups) == 1
    with pytest.raises(TrajectoryError, match=message):
        step(opt)
    assert unmoved(model, before) == list(before)
    assert (tmp_path / "t.mezo").read_bytes() == written


def test_a_change_that_keeps_the_manifest_goes_on_under_the_trajectory(tmp_path: pathlib.Path) -> None:
    model = models.build("llama")
    opt = ms.MeZO(model, lr=1e-3, eps=1e-2, trajectory=tmp_path / "t.mezo")
    step(opt)
    new_parameters(model)
    step(opt)
    again = models.build("llama")
    ms.replay(again, tmp_path / "t.mezo")
    assert unmoved(again, weights(model)) == list(weights(model))


@pytest.mark.parametrize("assign", [False, True])
def test_values_that_the_trajectory_does_not_have_are_refused(tmp_path: pathlib.Path, assign: bool) -> None:
    """Loaded between two steps: a replay would give other weights than the run has."""
    batch = {"x": torch.randn(8, 4)}

    def objective(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["x"]).square().sum(1)

    model = nn.Linear(4, 3)
    opt = ms.MeZO(model, lr=1e-3, trajectory=tmp_path / "run.mezo")
    opt.step(batch=batch, objective=objective)
    opt.step(batch=batch, objective=objective)
    same = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict({name: value + 1 for name, value in same.items()}, assign=assign)
    with pytest.raises(TrajectoryError, match="weight has other values than the last step has left"):
        opt.step(batch=batch, objective=objective)
    assert opt.trajectory is not None
    assert len(opt.trajectory) == 2
    if assign:  # then the values can be compared
        model.load_state_dict(same, assign=True)
        opt.step(batch=batch, objective=objective)
    free = ms.MeZO(model, lr=1e-3)
    free.step(batch=batch, objective=objective)
    model.load_state_dict(same)
    free.step(batch=batch, objective=objective)


def test_what_another_optimizer_writes_is_not_in_the_trajectory(tmp_path: pathlib.Path) -> None:
    model = models.build("llama")
    logged, other = ms.MeZO(model, lr=1e-3, trajectory=tmp_path / "run.mezo"), ms.MeZO(model, lr=1e-3, seed=5)
    step(logged)
    step(other)
    with pytest.raises(TrajectoryError, match="has other values than the last step has left"):
        step(logged)
    step(other)


def test_masters_follow_the_same_shards_and_are_never_dropped_silently() -> None:
    straight, moved = (models.build("llama", dtype=torch.bfloat16) for _ in range(2))
    one, other = (ms.MeZO(model, lr=1e-4, eps=1e-2, rounding="master") for model in (straight, moved))
    for opt in (one, other):
        step(opt)
    new_parameters(moved)
    for _ in range(3):
        step(one)
        step(other)
    assert unmoved(moved, weights(straight)) == list(weights(straight))
    moved.to(torch.float32)
    before = weights(moved)
    with pytest.raises(ShardingError, match="sharded or cast anew after steps with rounding 'master'"):
        step(other)
    assert unmoved(moved, before) == list(before)


def test_a_model_that_changes_between_measuring_and_writing_is_measured_again() -> None:
    model = models.build("llama")
    opt = ms.MeZO(model, lr=1.0, eps=1e-2)
    opt.measure(batch=BATCH, objective=LOSS)
    clone_data(model)
    before = weights(model)
    with pytest.raises(ModelError, match="measure again"):
        opt.step()
    assert (unmoved(model, before), opt.step_count) == (list(before), 0)
    step(opt)
    assert unmoved(model, before) == []


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_weight_that_something_else_makes_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    opt = ms.MeZO(model, eps=1e-2)
    torch.nn.utils.weight_norm(model[0])
    with pytest.raises(MezoError, match="0.weight is no longer a parameter"):
        opt.step(lambda: model(torch.ones(2, 3)).sum(1))


def test_a_model_that_is_as_it_was_is_not_looked_at_again() -> None:
    model = models.build("llama")
    opt = ms.MeZO(model, eps=1e-2)
    layout = opt._writer.layout
    for _ in range(2):
        step(opt)
        with torch.no_grad():
            LOSS(model, BATCH)
        model.train()
        model.load_state_dict(model.state_dict())
        model.to(torch.float32)
    assert opt._writer.layout is layout


def test_frozen_weights_may_come_and_go() -> None:
    """As under offloading, which puts another tensor in their place at every forward."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False))
    layout = discover(model)
    model[1].weight = nn.Parameter(torch.empty(3, 3, device="meta"), requires_grad=False)
    assert layout.is_current()


def test_a_fake_model_is_watched_as_a_real_one() -> None:
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nn.Linear(3, 3)
        layout = discover(model)
        assert layout.is_current()
        model.weight.data = model.weight.data.clone()
        assert not layout.is_current()
