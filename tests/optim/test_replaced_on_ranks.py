"""A model that is sharded, wrapped or prepared after its optimizer was made; and the state of a sharded one."""

import copy
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import mezo_scale as ms
from mezo_scale.errors import MezoError
from mezo_scale.sharding import discover
from tests.optim.test_resume import header_of
from tests.support import layouts, models
from tests.support.pool import Ranks

NAME = "llama"


def whole(model: nn.Module) -> dict[str, Tensor]:
    def of(param: Any) -> Tensor:
        if hasattr(param, "ds_id"):
            return layouts._whole_partitions(param)
        return param.full_tensor() if hasattr(param, "full_tensor") else param.detach().clone()

    with torch.no_grad():
        return {name.removeprefix("module."): of(param) for name, param in model.named_parameters()}


def shard_all(model: nn.Module) -> nn.Module:
    for block in models.blocks(model):
        fully_shard(block)
    return fully_shard(model)


def zero3(model: nn.Module) -> nn.Module:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=None, config=config)
    engine.eval()
    return engine


def prepared_fsdp2(model: nn.Module, opt: ms.MeZO) -> tuple[nn.Module, Any]:
    accelerator = Accelerator(cpu=True)
    # accelerate itself shards on accelerators only; what it does to a model and its optimizer is the same.
    state = AcceleratorState._shared_state
    state["distributed_type"] = DistributedType.FSDP
    state["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    return accelerator.prepare(model, opt)


WAYS: dict[str, Callable[[nn.Module, ms.MeZO], tuple[nn.Module, Any]]] = {
    "fully_shard": lambda model, opt: (shard_all(model), opt),
    "DistributedDataParallel": lambda model, opt: (DistributedDataParallel(model), opt),
    "ZeRO-3": lambda model, opt: (zero3(model), opt),
    "accelerate": lambda model, opt: Accelerator(cpu=True).prepare(model, opt),
    "accelerate, FSDP2": prepared_fsdp2,
}


def changed_after(way: str, steps_before: int) -> tuple[list[str], list[str], int]:
    """(parameters that did not move, parameters whose bits are not those of the plain run, optimizer steps)."""
    batch, objective = models.batch(NAME, 2, seed=dist.get_rank()), models.objective(NAME)
    model, plain = models.build(NAME), models.build(NAME)
    opt = ms.MeZO(model, lr=1e-2, eps=1e-2)
    for _ in range(steps_before):
        opt.step(batch=batch, objective=objective)
    wrapped, stepped = WAYS[way](model, opt)
    before = whole(wrapped)
    losses = lambda: objective(wrapped, batch)  # noqa: E731
    for _ in range(2):
        stepped.step(losses)
    stored = {type(next(iter(wrapped.parameters())).data).__name__}
    assert stored == ({"DTensor"} if way in ("fully_shard", "accelerate, FSDP2") else {"Tensor"})
    take_steps(plain, steps_before, batch, objective)
    now, right = whole(wrapped), whole(plain)
    still = [name for name, weight in before.items() if torch.equal(weight, now[name])]
    wrong = [name for name, weight in right.items() if not torch.allclose(weight, now[name], atol=1e-5)]
    held = {id(param) for group in opt.param_groups for param in group["params"]}
    assert held == {id(param) for param in wrapped.parameters()}
    return still, wrong, opt.step_count


def take_steps(model: nn.Module, steps_before: int, batch: Any, objective: Any) -> None:
    """The same steps on a model that stays plain."""
    opt = ms.MeZO(model, lr=1e-2, eps=1e-2)
    for _ in range(steps_before):
        opt.step(batch=batch, objective=objective)
    for _ in range(2):
        opt.step(lambda: objective(model, batch))


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_is_sharded_after_its_optimizer_was_made_is_tuned(
    ranks: Ranks, way: str, steps_before: int
) -> None:
    for still, wrong, steps in ranks(2, changed_after, way=way, steps_before=steps_before, fresh="accelerate" in way):
        assert still == []
        assert wrong == []
        assert steps == steps_before + 2


def wrapped_by_fsdp1(use_orig_params: bool) -> str:
    model, batch, objective = models.build(NAME), models.batch(NAME, 2), models.objective(NAME)
    opt = ms.MeZO(model, lr=1e-2, eps=1e-2)
    wrapped = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    try:
        opt.step(lambda: objective(wrapped, batch))
    except MezoError as error:
        return str(error)
    return "stepped"


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_an_fsdp1_unit_around_the_optimizer_s_model_is_refused(ranks: Ranks, use_orig_params: bool) -> None:
    for outcome in ranks(2, wrapped_by_fsdp1, use_orig_params=use_orig_params):
        assert "FSDP1 unit around" in outcome or "no trainable parameter" in outcome


def looked_at_again(layout: str) -> bool:
    """Whether an evaluation between two steps, which leaves weights gathered, makes the optimizer look again."""
    sharded = layouts.shard(layout, models.build(NAME))
    batch, objective = models.batch(NAME, 2), models.objective(NAME)
    opt = ms.MeZO(sharded.model, lr=1e-2, eps=1e-2)
    first = opt._writer.layout
    for _ in range(2):
        opt.step(batch=batch, objective=objective)
        with torch.no_grad():
            objective(sharded.model, batch)
    current = first.is_current()
    sharded.close()
    return opt._writer.layout is not first or not current


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp2-kept", "fsdp2-offload", "fsdp1", "fsdp1-flat", "zero3-persisted"])
def test_gathered_weights_are_not_taken_for_another_model(ranks: Ranks, layout: str) -> None:
    assert ranks(2, looked_at_again, layout=layout) == [False, False]


# -- state ---------------------------------------------------------------------------------------------------------


def saved_and_loaded(layout: str, folder: pathlib.Path, through: str) -> tuple[list[str], int]:
    """(parameters that differ between the run and its saved, loaded and continued twin, low bits that are not 0)."""
    batch, objective = models.batch(NAME, 2, seed=dist.get_rank()), models.objective(NAME)

    def build() -> tuple[layouts.Sharded, ms.MeZO]:
        sharded = layouts.shard(layout, models.build(NAME, dtype=torch.bfloat16))
        return sharded, ms.MeZO(sharded.model, lr=1e-4, eps=1e-2, rounding="master", seed=3)

    def steps(opt: ms.MeZO) -> None:
        for _ in range(3):
            opt.step(batch=batch, objective=objective)

    one, opt = build()
    steps(opt)
    low = sum(int(value.count_nonzero()) for value in opt._writer.remainders.values())
    weights = [shard.local.clone() for shard in discover(one.model).shards]
    if through == "torch":
        dcp.save({"optim": get_optimizer_state_dict(one.model, opt)}, checkpoint_id=folder)
    state = copy.deepcopy(opt.state_dict())
    steps(opt)
    other, again = build()
    for shard, weight in zip(discover(other.model).shards, weights, strict=True):
        shard.local.copy_(weight)
    discover(other.model).refresh()
    if through == "torch":
        found = {"optim": get_optimizer_state_dict(other.model, again)}
        dcp.load(found, checkpoint_id=folder)
        set_optimizer_state_dict(other.model, again, found["optim"])
    else:
        again.load_state_dict(state)
    steps(again)
    expected, found_weights = one.gather(), other.gather()
    one.close()
    other.close()
    return [name for name in expected if not torch.equal(expected[name], found_weights[name])], low


@pytest.mark.parametrize(
    ("layout", "through"),
    [
        ("fsdp2", "torch"),
        ("fsdp2", "state_dict"),
        ("fsdp1", "state_dict"),
        ("fsdp1-flat", "state_dict"),
        ("zero3", "state_dict"),
    ],
)
def test_a_sharded_run_with_masters_is_saved_and_goes_on_with_the_same_bits(
    ranks: Ranks, tmp_path: pathlib.Path, layout: str, through: str
) -> None:
    for different, low in ranks(2, saved_and_loaded, layout=layout, folder=tmp_path / "c", through=through):
        assert different == []
        assert low > 0


def looked_at_state() -> tuple[bool, int]:
    sharded = layouts.shard("fsdp2", models.build(NAME))
    opt = ms.MeZO(sharded.model, lr=1e-2, eps=1e-2)
    before = sharded.gather()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_optimizer_state_dict(sharded.model, opt)
    return all(torch.equal(weight, before[name]) for name, weight in sharded.gather().items()), opt.step_count


def test_looking_at_a_sharded_state_changes_nothing(ranks: Ranks) -> None:
    assert ranks(2, looked_at_state) == [(True, 0), (True, 0)]


def measured_in_parts(layout: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Slopes of one step: rows in one measurement, and in two."""
    batch, objective, found = models.batch(NAME, 4, seed=dist.get_rank()), models.objective(NAME), []
    for cuts in ([4], [1, 3]):
        sharded = layouts.shard(layout, models.build(NAME))
        opt = ms.MeZO(sharded.model, lr=1e-2, eps=1e-2, num_directions=2)
        start = 0
        for rows in cuts:
            piece = {key: value[start : start + rows] for key, value in batch.items()}
            opt.measure(batch=piece, objective=objective)
            start += rows
        opt.step()
        found.append(opt.last_record.projected_grads)
        sharded.close()
    return found[0], found[1]


@pytest.mark.parametrize("layout", ["fsdp2", "zero3"])
def test_measurements_in_parts_are_one_step_on_ranks(ranks: Ranks, layout: str) -> None:
    outcomes = ranks(2, measured_in_parts, layout=layout)
    for at_once, in_parts in outcomes:
        assert in_parts == pytest.approx(at_once, rel=1e-3, abs=1e-3)
    assert outcomes[0] == outcomes[1]


# -- fingerprint ---------------------------------------------------------------------------------------------------


def frozen_fingerprint(layout: str) -> str | None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(models.build(NAME), LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).base_model
    model.model.register_buffer("saved", torch.arange(5.0))
    sharded = layouts.shard(layout, model.model)
    found = header_of(sharded.model).frozen
    sharded.close()
    return found


@pytest.mark.parametrize("layout", ["fsdp2", "hsdp", "fsdp2-offload", "fsdp1", "zero3", "zero3-persisted"])
def test_the_fingerprint_of_frozen_weights_is_that_of_the_plain_model(ranks: Ranks, layout: str) -> None:
    plain = ranks(1, frozen_fingerprint, layout="plain")
    assert plain[0] is not None
    assert ranks(2, frozen_fingerprint, layout="plain") == plain * 2
    assert ranks(2, frozen_fingerprint, layout=layout) == plain * 2
