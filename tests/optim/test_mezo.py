"""`MeZO` as an optimizer on one device: its record, its arithmetic, its safety, its place among torch's optimizers."""

import gc
import math
import os
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

import mezo_scale as ms
from mezo_scale.errors import ModelError, ShardingError, TrajectoryError
from mezo_scale.sharding import discover
from tests.support import models

BATCH = models.batch("llama", 4)
LOSS = models.objective("llama")


def tuned(steps: int = 3, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, ms.MeZO]:
    model = models.build("llama") if model is None else model
    opt = ms.MeZO(model, **{"lr": 1e-3, "eps": 1e-2, **options})
    for _ in range(steps):
        opt.step(batch=BATCH, objective=LOSS)
    return model, opt


def bits(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_record_is_what_was_done() -> None:
    model, opt = tuned(1, num_directions=3, weight_decay=0.1, seed=9)
    record = opt.last_record
    assert record is not None
    assert record.step == 0
    assert record.seeds == tuple(ms.noise.direction_seed(9, 0, k) for k in range(3))
    assert record.alphas == tuple(float(np.float32(-1e-3 * g / 3)) for g in record.projected_grads)
    assert record.decay == float(np.float32(1 - 1e-4))
    plain = dict(models.build("llama").named_parameters())
    for name, param in model.named_parameters():
        theta, acc = plain[name].detach(), torch.zeros(())
        for k, (seed, alpha) in enumerate(zip(record.seeds, record.alphas, strict=True)):
            z = ms.noise.normal(seed, ms.noise.param_id(name), 0, param.numel()).view_as(param) * alpha
            acc = z if k == 0 else acc + z
        decayed = theta if "norm" in name else theta * record.decay
        assert torch.equal(param, decayed + acc), name


def test_a_batch_a_closure_of_rows_and_a_closure_of_a_scalar_measure_the_same() -> None:
    records = []
    for closure in (None, lambda m: LOSS(m, BATCH), lambda m: LOSS(m, BATCH).mean()):
        model = models.build("llama")
        opt = ms.MeZO(model, lr=1e-3, eps=1e-2)
        if closure is None:
            loss = opt.step(batch=BATCH, objective=LOSS)
        else:
            loss = opt.step(lambda closure=closure, model=model: closure(model))
        assert isinstance(loss, float)
        records.append(opt.last_record)
    for record in records[1:]:
        assert record.projected_grads[0] == pytest.approx(records[0].projected_grads[0], rel=1e-4)
        assert record.loss == pytest.approx(records[0].loss, rel=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 9])
def test_micro_batches_add_up_to_the_batch(micro_batch: int) -> None:
    whole, parts = ms.MeZO(models.build("llama"), eps=1e-2), ms.MeZO(models.build("llama"), eps=1e-2)
    whole.step(batch=BATCH, objective=LOSS)
    parts.step(batch=BATCH, objective=LOSS, micro_batch=micro_batch)
    assert parts.last_record.projected_grads[0] == pytest.approx(whole.last_record.projected_grads[0], rel=1e-4)
    assert parts.last_record.loss == pytest.approx(whole.last_record.loss, rel=1e-6)


def test_accuracy_can_be_optimised_though_it_has_no_gradient() -> None:
    model = models.build("llama")

    def mistakes(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        return (logits[:, :-1].argmax(-1) != batch["input_ids"][:, 1:]).float().mean(1)

    opt = ms.MeZO(model, lr=1e-3, eps=0.1, num_directions=2)
    assert 0 <= opt.step(batch=BATCH, objective=mistakes) <= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_recorded_and_writes_nothing(bad: float, tmp_path: pathlib.Path) -> None:
    model = models.build("llama")
    opt = ms.MeZO(model, lr=1e-3, weight_decay=0.1, trajectory=tmp_path / "t.mezo")
    before = bits(model)
    loss = opt.step(batch=BATCH, objective=lambda m, b: LOSS(m, b) * bad)
    assert not math.isfinite(loss)
    assert same(bits(model), before)
    assert opt.last_record.skipped
    assert opt.step_count == 1
    opt.step(batch=BATCH, objective=LOSS)
    assert not same(bits(model), before)
    assert [record.skipped for record in ms.Trajectory.open(tmp_path / "t.mezo")] == [True, False]
    again = models.build("llama")
    assert ms.replay(again, tmp_path / "t.mezo") == 2
    assert same(bits(again), bits(model))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("distribution", ["normal", "rademacher", "low_rank"])
def test_a_replay_rebuilds_the_run_bit_by_bit(tmp_path: pathlib.Path, rounding: str, distribution: str) -> None:
    base = models.build("llama", dtype=torch.bfloat16)
    log = tmp_path / "t.mezo"
    options = {"rounding": rounding, "distribution": distribution, "num_directions": 2, "weight_decay": 0.01}
    model, _ = tuned(5, base, trajectory=log, **options)
    again = models.build("llama", dtype=torch.bfloat16)
    assert ms.replay(again, log) == 5
    assert same(bits(again), bits(model))


def test_a_run_goes_on_where_its_trajectory_ends(tmp_path: pathlib.Path) -> None:
    straight, _ = tuned(6, trajectory=tmp_path / "straight.mezo")
    tuned(4, trajectory=tmp_path / "broken.mezo")
    model = models.build("llama")
    seen: list[tuple[int, int]] = []
    opt = ms.MeZO(
        model, lr=1e-3, eps=1e-2, trajectory=tmp_path / "broken.mezo", progress=lambda *done: seen.append(done)
    )
    assert (opt.step_count, seen) == (4, [(4, 4)])
    for _ in range(2):
        opt.step(batch=BATCH, objective=LOSS)
    assert same(bits(model), bits(straight))
    assert (
        ms.Trajectory.open(tmp_path / "broken.mezo").records == ms.Trajectory.open(tmp_path / "straight.mezo").records
    )


def test_a_replay_can_stop_on_the_way(tmp_path: pathlib.Path) -> None:
    tuned(4, trajectory=tmp_path / "t.mezo")
    early, _ = tuned(2)
    model = models.build("llama")
    assert ms.replay(model, tmp_path / "t.mezo", until=2) == 2
    assert same(bits(model), bits(early))
    with pytest.raises(TrajectoryError, match="expected 0 to 4"):
        ms.replay(models.build("llama"), tmp_path / "t.mezo", until=5)


def test_a_trajectory_of_another_model_or_of_other_weights_is_refused(tmp_path: pathlib.Path) -> None:
    tuned(1, trajectory=tmp_path / "t.mezo")
    for other, message in [
        (models.build("opt"), "another model"),
        (models.build("llama", seed=1), "other weights"),
        (models.build("llama", dtype=torch.bfloat16), "another model"),
    ]:
        before = bits(other)
        with pytest.raises(TrajectoryError, match=message):
            ms.replay(other, tmp_path / "t.mezo")
        with pytest.raises(TrajectoryError, match=message):
            ms.MeZO(other, trajectory=tmp_path / "t.mezo")
        assert same(bits(other), before)
    with pytest.raises(TrajectoryError, match="num_directions = 1, this run has 2"):
        ms.MeZO(models.build("llama"), num_directions=2, trajectory=tmp_path / "t.mezo")


def test_parameter_groups_have_their_own_learning_rate_and_decay(tmp_path: pathlib.Path) -> None:
    model = models.build("llama")
    heads = [p for name, p in model.named_parameters() if "lm_head" in name]
    rest = [p for name, p in model.named_parameters() if "lm_head" not in name]
    opt = ms.MeZO(
        model,
        trajectory=tmp_path / "t.mezo",
        params=[{"params": heads, "lr": 1e-2, "weight_decay": 0.5}, {"params": rest, "lr": 1e-4}],
    )
    opt.step(batch=BATCH, objective=LOSS)
    record = opt.last_record
    assert record.decays == (float(np.float32(1 - 5e-3)), 1.0)
    assert record.alphas_of(0)[0] == pytest.approx(100 * record.alphas_of(1)[0], rel=1e-6)
    again = models.build("llama")
    ms.replay(again, tmp_path / "t.mezo")
    assert same(bits(again), bits(model))
    with pytest.raises(ShardingError, match="in no parameter group"):
        ms.MeZO(
            models_one := models.build("llama"), params=[{"params": [p]} for p in list(models_one.parameters())[:2]]
        )


def test_schedulers_and_state_dict_work_as_for_any_optimizer() -> None:
    model = models.build("llama")
    opt = ms.MeZO(model, lr=1e-3, seed=5)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    alphas = []
    for _ in range(3):
        opt.step(batch=BATCH, objective=LOSS)
        alphas.append(opt.last_record.alphas[0] / opt.last_record.projected_grads[0])
        schedule.step()
    assert alphas == pytest.approx([-1e-3, -1e-3 / 2, -1e-3 / 3], rel=1e-5)
    other = ms.MeZO(models.build("llama"))
    other.load_state_dict(opt.state_dict())
    assert (other.step_count, other.seed, other.param_groups[0]["lr"]) == (3, 5, 1e-3 / 4)


def test_dropout_is_off_during_a_step_and_training_mode_comes_back() -> None:
    model = models.build("bert").train()
    opt = ms.MeZO(model)
    modes: list[bool] = []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        modes.append(model.training)
        return models.objective("bert")(model, batch)

    opt.step(batch=models.batch("bert", 2), objective=loss)
    assert not any(modes)
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0: expected a finite number above 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"eps": -1e-3}, "eps is -0.001"),
        ({"eps": math.inf}, "eps is inf"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"num_directions": 0}, "num_directions is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"distribution": "cauchy"}, "distribution is 'cauchy'"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ms.MeZO(models.build("llama"), **options)


@pytest.mark.parametrize(
    ("batch", "objective", "message"),
    [
        ({}, LOSS, "holds no tensor"),
        ({"a": torch.ones(2, 3), "b": torch.ones(3)}, LOSS, r"batch\['b'\] has 3 rows but batch\['a'\] has 2"),
        ({"a": torch.ones(0, 3)}, LOSS, "no rows"),
        (BATCH, lambda m, b: LOSS(m, b).mean(), "expected one loss per row"),
        (BATCH, None, "either a closure, or both"),
    ],
)
def test_batches_that_can_not_be_evaluated_are_refused_and_nothing_is_written(
    batch: dict[str, Tensor], objective: Any, message: str
) -> None:
    model = models.build("llama")
    before, opt = bits(model), ms.MeZO(model)
    with pytest.raises(ValueError, match=message):
        opt.step(batch=batch, objective=objective)
    assert same(bits(model), before)
    assert opt.step_count == 0


def test_models_that_can_not_be_tuned_are_refused() -> None:
    with torch.device("meta"):
        empty = nn.Linear(3, 3)
    with pytest.raises(ModelError, match="weight is on the meta device"):
        ms.MeZO(empty)
    with pytest.raises(ModelError, match="stored as torch.float64"):
        ms.shards(nn.Linear(3, 3).double())
    with pytest.raises(ModelError, match="no trainable parameter"):
        ms.shards(nn.Linear(3, 3).requires_grad_(False))
    with pytest.warns(DeprecationWarning, match="torch.jit.trace"):
        scripted = torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3))
    with pytest.raises(ModelError, match="^1 is a TorchScript module"):
        ms.MeZO(nn.Sequential(nn.Linear(3, 3), scripted))


@pytest.mark.parametrize("frozen", [False, True])
def test_two_parameters_in_one_memory_are_refused(frozen: bool) -> None:
    """As of a head that was tied by its data. Parts of one memory that do not overlap are two parameters."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight.data = model[0].weight.data
    model[1].requires_grad_(not frozen)
    with pytest.raises(ShardingError, match=r"weight and [01]\.weight lie in the same memory, but are not one param"):
        ms.MeZO(model)
    model[1].weight = model[0].weight
    ms.MeZO(model)
    flat = torch.randn(30)
    model[0].weight, model[1].weight = nn.Parameter(flat[:15].view(5, 3)), nn.Parameter(flat[15:].view(5, 3))
    ms.MeZO(model)
    model[0].register_buffer("mirror", flat[10:20])
    with pytest.raises(ShardingError, match="0.mirror and 0.weight lie in the same memory"):
        ms.MeZO(model)


def test_a_sharding_that_is_not_known_is_never_taken_for_plain() -> None:
    class Strange(nn.Parameter):
        pass

    model = nn.Linear(3, 3)
    model.weight = Strange(model.weight.data)
    with pytest.raises(ShardingError, match=r"weight is a .*Strange"):
        ms.shards(model)

    class SomebodysDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(3, 3)

    with pytest.raises(ShardingError, match="SomebodysDataParallel, which is not known"):
        ms.shards(SomebodysDataParallel())
    with pytest.raises(ShardingError, match="DataParallel"):
        ms.shards(nn.DataParallel(nn.Linear(3, 3)))


def test_a_module_of_the_model_may_be_called_module() -> None:
    model = nn.Sequential()
    model.module = nn.Linear(2, 2, bias=False)
    assert [shard.name for shard in ms.shards(model)] == ["module.weight"]


def test_biases_and_normalisation_weights_are_exempt_from_decay_by_type() -> None:
    model = models.build("bert")
    exempt = {shard.name for shard in discover(model).shards if not shard.decayed}
    right = {n for n, p in model.named_parameters() if p.dim() == 1}
    assert exempt == right


def test_four_hundred_steps_take_no_more_memory_than_twenty() -> None:
    optimizer = ms.MeZO(models.build("llama"), lr=1e-6)

    def steps(count: int) -> tuple[int, int]:
        """After them: live tensors, and the bytes that this process holds."""
        for _ in range(count):
            optimizer.step(batch=BATCH, objective=LOSS)
        gc.collect()
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return sum(issubclass(type(it), torch.Tensor) for it in gc.get_objects()), pages * os.sysconf("SC_PAGE_SIZE")

    steps(20)
    tensors, held = steps(20)
    after = steps(400)
    assert after[0] == tensors
    assert after[1] - held < 2**22  # the heap may still settle; 10 KiB kept in each step would be seen


def test_a_model_that_accelerate_offloads_is_refused_with_the_way_out() -> None:
    model = models.build("llama")
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(ModelError, match="is offloaded by accelerate .* without a device_map"):
        ms.MeZO(model)
