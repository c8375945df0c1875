"""A log is taken up only by the run that it belongs to: with its seed and eps, on its frozen weights."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import mezo_scale as ms
from mezo_scale.errors import TrajectoryError
from mezo_scale.optim.replay import describe
from mezo_scale.optim.update import Writer
from mezo_scale.sharding import discover
from mezo_scale.sharding.fingerprint import frozen_hash
from mezo_scale.trajectory import Header
from tests.support import models
from tests.trajectory.logs import written_in_version_1

BATCH = models.batch("llama", 4)
LOSS = models.objective("llama")


def lora(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Adapters with the same values, on a base that depends on the seed."""
    base = models.build("llama", seed=seed, dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))


def tuned(model: nn.Module, path: pathlib.Path, **options: Any) -> ms.MeZO:
    opt = ms.MeZO(model, **{"lr": 1e-3, "eps": 1e-2, "trajectory": path, **options})
    opt.step(batch=BATCH, objective=LOSS)
    return opt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.5}, r"written with eps = 0.01, this run has 0.5: set it to 0.01"),
        ({"seed": 99}, "written with seed = 3, this run has 99: set it to 3"),
        ({"seed": 0}, "written with seed = 3, this run has 0"),
    ],
)
def test_another_seed_or_eps_than_the_log_s_is_refused(
    tmp_path: pathlib.Path, options: dict[str, Any], message: str
) -> None:
    tuned(models.build("llama"), tmp_path / "t.mezo", seed=3)
    written = (tmp_path / "t.mezo").read_bytes()
    with pytest.raises(TrajectoryError, match=message):
        tuned(models.build("llama"), tmp_path / "t.mezo", **{"seed": 3, **options})
    assert (tmp_path / "t.mezo").read_bytes() == written


def spoil_parameter(model: Any) -> None:
    model.base_model.model.model.layers[1].mlp.down_proj.weight.data[1, 2] += 1e-3


def spoil_buffer(model: Any) -> None:
    model.base_model.model.model.register_buffer("extra", torch.tensor([3]))


@pytest.mark.parametrize("spoil", [spoil_parameter, spoil_buffer])
def test_other_frozen_weights_or_buffers_are_refused(
    tmp_path: pathlib.Path, spoil: Callable[[nn.Module], None]
) -> None:
    tuned(lora(), tmp_path / "t.mezo")
    assert ms.replay(lora(), tmp_path / "t.mezo") == 1
    assert tuned(lora(), tmp_path / "t.mezo").step_count == 2
    other = lora()
    spoil(other)
    for take_up in (tuned, ms.replay):
        with pytest.raises(TrajectoryError, match="made on other frozen weights"):
            take_up(other, tmp_path / "t.mezo")


def test_another_base_below_the_same_adapters_is_refused(tmp_path: pathlib.Path) -> None:
    tuned(lora(), tmp_path / "t.mezo")
    with pytest.raises(TrajectoryError, match="made on other frozen weights"):
        tuned(lora(seed=5), tmp_path / "t.mezo")


def header_of(model: nn.Module) -> Header:
    return describe(model, Writer(discover(model)), 1, 1, 0, 1e-3)


def test_a_log_of_version_1_from_before_frozen_weights_were_written_is_replayed_and_not_continued(
    tmp_path: pathlib.Path,
) -> None:
    opt = tuned(lora(), tmp_path / "t.mezo")
    log = opt.trajectory
    written_in_version_1(tmp_path / "old.mezo", log.records, dataclasses.replace(log.header, frozen=None))
    assert b"frozen" not in (tmp_path / "old.mezo").read_bytes()
    old, new = lora(), lora()
    assert ms.replay(old, tmp_path / "old.mezo") == ms.replay(new, tmp_path / "t.mezo") == 1
    assert all(torch.equal(one, other) for one, other in zip(old.parameters(), new.parameters(), strict=True))
    with pytest.raises(TrajectoryError, match="is of version 1"):
        tuned(lora(), tmp_path / "old.mezo")


def test_other_fingerprints_of_what_a_run_depends_on_are_refused(tmp_path: pathlib.Path) -> None:
    tuned(models.build("llama"), tmp_path / "t.mezo", fingerprints={"data": "12"})
    with pytest.raises(TrajectoryError, match="made with other data .data has fingerprint 12, this run.s 13."):
        tuned(models.build("llama"), tmp_path / "t.mezo", fingerprints={"data": "13"})
    assert tuned(models.build("llama"), tmp_path / "t.mezo", fingerprints={"data": "12"}).step_count == 2


def test_two_optimizers_are_two_writers_until_one_lets_go(tmp_path: pathlib.Path) -> None:
    first = tuned(models.build("llama"), tmp_path / "t.mezo")
    with pytest.raises(TrajectoryError, match="being written by process"):
        ms.MeZO(models.build("llama"), eps=1e-2, trajectory=tmp_path / "t.mezo")
    first.trajectory.close()
    assert tuned(models.build("llama"), tmp_path / "t.mezo").step_count == 2


def test_a_replay_from_an_export_gives_the_same_bits(tmp_path: pathlib.Path) -> None:
    opt = tuned(models.build("llama"), tmp_path / "t.mezo", num_directions=2, weight_decay=0.1)
    opt.step(batch=BATCH, objective=LOSS)
    opt.trajectory.export(tmp_path / "out")
    again = models.build("llama")
    assert ms.replay(again, tmp_path / "out") == 2
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), opt.model.parameters(), strict=True))


class Foreign(nn.Parameter):
    """As a quantising library has them: frozen, in a storage of its own."""


def test_frozen_storage_of_another_library_counts_by_name_and_type() -> None:
    def build(attr: str, kind: type) -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 2), nn.Module())
        nn.init.ones_(model[0].weight)
        nn.init.ones_(model[0].bias)
        setattr(model[1], attr, kind(torch.ones(4, dtype=torch.uint8), requires_grad=False))
        return model

    seen = [header_of(build(*what)).frozen for what in (("a", Foreign), ("a", Foreign), ("b", Foreign))]
    seen.append(header_of(build("a", nn.Parameter)).frozen)
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float64, torch.float8_e4m3fn])
def test_frozen_weights_of_any_dtype_count_by_value(dtype: torch.dtype) -> None:
    def build(value: float) -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer("saved", torch.full((3, 4), value).to(dtype).t())
        model.register_buffer("temporary", torch.full((3,), value), persistent=False)
        return model

    assert frozen_hash(build(0)) == frozen_hash(build(0))
    assert frozen_hash(build(0)) != frozen_hash(build(1))


def test_frozen_weights_that_are_not_in_memory_are_not_compared() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta").requires_grad_(False))
    assert header_of(model).frozen is None
