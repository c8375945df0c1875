"""Rules: what the last steps measured becomes multipliers. A rule is a frozen value; this file adds one of its own."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
from mezo_scale.errors import TrajectoryError
from mezo_scale.optim.rules import Measured, Rule, Sgd
from mezo_scale.trajectory import Trajectory
from tests.support import layouts, models
from tests.support.pool import Ranks

BATCH = models.batch("llama", 4)
LOSS = models.objective("llama")
OPTIONS = {"lr": 1e-3, "eps": 1e-2, "num_directions": 2, "seed": 3}


@dataclass(frozen=True)
class Momentum:
    """m = beta m + mean over directions of g z, over the last `window` steps; theta -= lr m."""

    beta: float = 0.5
    window: int = 4
    name: ClassVar[str] = "momentum"

    def step(self, window: Sequence[Measured], group: Mapping[str, Any]) -> tuple[list[float], float]:
        rate = float(group["lr"]) / len(window[0].seeds)
        alphas = [-rate * self.beta**age * g for age, seen in enumerate(window) for g in seen.projected_grads]
        return alphas, 1.0 - float(group["lr"]) * group["weight_decay"]


USUAL = Momentum()


def made(model: nn.Module | None = None, rule: Rule = USUAL, **options: Any) -> tuple[nn.Module, ms.MeZO]:
    model = models.build("llama") if model is None else model
    return model, ms.MeZO(model, **OPTIONS, rule=rule, **options)


def steps(opt: ms.MeZO, count: int, *, bad: int | None = None) -> list[ms.StepRecord]:
    """That many steps, of which step `bad` measures losses that are not finite."""
    records = []
    for _ in range(count):
        factor = math.nan if opt.step_count == bad else 1.0
        opt.step(batch=BATCH, objective=lambda model, batch, factor=factor: LOSS(model, batch) * factor)
        assert opt.last_record is not None
        records.append(opt.last_record)
    return records


def bits(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, bits(one), bits(other)))


def own(record: ms.StepRecord) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return record.seeds[:2], record.projected_grads[:2]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_a_replay_of_momentum_has_the_bits_of_the_run(tmp_path: pathlib.Path, rounding: str, distribution: str) -> None:
    build = {"name": "llama", "dtype": torch.bfloat16}
    log = tmp_path / "t.mezo"
    model, opt = made(
        models.build(**build), trajectory=log, rounding=rounding, distribution=distribution, weight_decay=0.1
    )
    steps(opt, 6)
    again = models.build(**build)
    assert ms.replay(again, log) == 6
    assert same(again, model)
    assert not same(again, models.build(**build))


def test_momentum_through_records_is_momentum_over_z_in_float64() -> None:
    model, opt = made(rule=Momentum(beta=0.9, window=6))
    records = steps(opt, 6)
    plain = {name: param.detach().double() for name, param in models.build("llama").named_parameters()}
    for name, param in model.named_parameters():
        theta, momentum = plain[name], torch.zeros_like(plain[name])
        for seeds, grads in map(own, records):
            z = [ms.noise.normal(seed, ms.noise.param_id(name), 0, param.numel()).double() for seed in seeds]
            mean = sum(g * one for g, one in zip(grads, z, strict=True)) / 2
            momentum = 0.9 * momentum + mean.view_as(momentum)
            theta = theta - 1e-3 * momentum
        moved = (theta - plain[name]).norm()
        assert (param.double() - theta).norm() < 1e-4 * moved, name


def test_a_record_holds_the_steps_of_the_window_newest_first() -> None:
    records = steps(made()[1], 6)
    assert {len(record.seeds) for record in records} == {8}
    seen = [own(record) for record in reversed(records)][:4]
    assert records[-1].seeds == sum((seeds for seeds, _ in seen), ())
    assert records[-1].projected_grads == sum((grads for _, grads in seen), ())
    assert records[0].alphas[2:] == (0.0,) * 6  # nothing came before
    assert all(records[-1].alphas)


def test_a_rule_is_given_the_steps_that_were_and_no_padding(tmp_path: pathlib.Path) -> None:
    given: list[int] = []

    @dataclass(frozen=True)
    class Watched(Momentum):
        def step(self, window: Sequence[Measured], group: Mapping[str, Any]) -> tuple[list[float], float]:
            given.append(len(window))
            return super().step(window, group)

    steps(made(rule=Watched(), trajectory=tmp_path / "t.mezo")[1], 2)
    steps(made(rule=Watched(), trajectory=tmp_path / "t.mezo")[1], 4)
    assert given == [1, 2, 3, 4, 4, 4]


def test_a_skipped_step_is_not_in_the_window_of_those_after_it(tmp_path: pathlib.Path) -> None:
    model, opt = made(trajectory=tmp_path / "t.mezo")
    records = steps(opt, 5, bad=2)
    assert [record.skipped for record in records] == [False, False, True, False, False]
    assert records[4].seeds == sum((records[step].seeds[:2] for step in (4, 3, 1, 0)), ())
    again = models.build("llama")
    ms.replay(again, tmp_path / "t.mezo")
    assert same(again, model)


@pytest.mark.parametrize("broken", [1, 3, 5])
def test_a_run_goes_on_from_its_trajectory_with_the_window_it_had(tmp_path: pathlib.Path, broken: int) -> None:
    straight, opt = made(trajectory=tmp_path / "straight.mezo")
    steps(opt, 7, bad=2)
    _, opt = made(trajectory=tmp_path / "broken.mezo")
    steps(opt, broken, bad=2)
    opt.trajectory.release()
    model, opt = made(trajectory=tmp_path / "broken.mezo")
    steps(opt, 7 - broken, bad=2)
    assert same(model, straight)
    records = [repr(list(Trajectory.open(tmp_path / f"{name}.mezo"))) for name in ("broken", "straight")]
    assert records[0] == records[1]


@pytest.mark.parametrize("broken", [1, 3, 5])
def test_a_run_goes_on_from_its_state_with_the_window_it_had(tmp_path: pathlib.Path, broken: int) -> None:
    straight, opt = made()
    steps(opt, 7, bad=2)
    model, opt = made()
    steps(opt, broken, bad=2)
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again, opt = made()
    again.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimizer"])
    steps(opt, 7 - broken, bad=2)
    assert same(again, straight)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.filterwarnings("ignore:.*no process group.*|.*torch.distributed is.*|.*assuming the intent.*")
def test_torch_s_checkpoints_carry_the_window(tmp_path: pathlib.Path, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, opt = made()
    steps(opt, 3)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    dcp.save({"optim": get_optimizer_state_dict(model, opt, options=options)}, checkpoint_id=tmp_path / "c")
    steps(opt, 2)
    again, other = made()
    again.load_state_dict(weights)
    state = {"optim": get_optimizer_state_dict(again, other, options=options)}
    dcp.load(state, checkpoint_id=tmp_path / "c")
    set_optimizer_state_dict(again, other, state["optim"], options=options)
    steps(other, 2)
    assert same(again, model)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Sgd(), "rule = momentum over 4 steps, this run has sgd"),
        (Momentum(window=2), "rule = momentum over 4 steps, this run has momentum over 2 steps"),
    ],
)
def test_a_run_goes_on_under_its_own_rule_only(tmp_path: pathlib.Path, other: Rule, message: str) -> None:
    model, opt = made(trajectory=tmp_path / "t.mezo")
    steps(opt, 1)
    opt.trajectory.release()
    with pytest.raises(TrajectoryError, match=message):
        ms.MeZO(models.build("llama"), **OPTIONS, rule=other, trajectory=tmp_path / "t.mezo")
    with pytest.raises(ValueError, match=message):
        ms.MeZO(model, **OPTIONS, rule=other).load_state_dict(opt.state_dict())


def test_a_state_from_before_there_were_rules_is_of_the_usual_ones() -> None:
    model, opt = made(rule=Sgd())
    steps(opt, 2)
    state = opt.state_dict()
    for run in (state["mezo"], *(group["mezo"] for group in state["param_groups"])):
        for name in ("estimator", "rule", "past"):
            del run[name]
    other = ms.MeZO(model, **OPTIONS)
    other.load_state_dict(state)
    assert other.step_count == 2
    with pytest.raises(ValueError, match="rule = sgd, this run has momentum over 4 steps"):
        made(model)[1].load_state_dict(state)


def test_a_rule_that_gives_another_number_of_multipliers_is_refused() -> None:
    @dataclass(frozen=True)
    class Short(Momentum):
        def step(self, window: Sequence[Measured], group: Mapping[str, Any]) -> tuple[list[float], float]:
            return [0.0], 1.0

    model, opt = made(rule=Short())
    before = bits(model)
    with pytest.raises(ValueError, match="rule momentum gave 1 multipliers for 2 directions"):
        steps(opt, 1)
    assert all(map(torch.equal, bits(model), before))


def momentum_on_a_rank(log: str) -> list[ms.StepRecord]:
    sharded = layouts.shard("fsdp2", models.build("llama"))
    return steps(made(sharded.model, trajectory=log)[1], 5)


def test_ranks_agree_on_momentums_records_and_a_plain_model_replays_them(ranks: Ranks, tmp_path: pathlib.Path) -> None:
    one, other = ranks(2, momentum_on_a_rank, log=str(tmp_path / "t.mezo"))
    assert one == other
    again = models.build("llama")
    assert ms.replay(again, tmp_path / "t.mezo") == 5
    plain, opt = made()
    steps(opt, 5)
    for param, right in zip(again.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(param, right, atol=1e-4)
