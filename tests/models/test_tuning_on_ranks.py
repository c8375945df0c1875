"""What is tuned, in every strategy: the adapter moves as it does in one process, and the sharded base stays."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

import mezo_scale as ms
from mezo_scale import models
from mezo_scale.distributed.world import World
from mezo_scale.errors import RecipeError
from mezo_scale.models import adapters, save
from mezo_scale.models.tuning import sizes
from mezo_scale.recipe import Recipe, parse
from mezo_scale.sharding.fingerprint import frozen_hash
from mezo_scale.tasks.kinds.candidates import Encoded, candidates_loss, collate
from tests.support import material
from tests.support.pool import Ranks

EXAMPLES = [Encoded(tuple(range(5, 9 + n)), ((40 + n,), (50,)), n % 2) for n in range(4)]
IA3 = {"what": "peft", "peft": {"peft_type": "IA3"}}
CELLS = [("ddp", 2), ("fsdp2", 2), ("hsdp", 2), ("zero3", 2)]


def recipe(folder: str, strategy: str, tune: dict[str, Any]) -> Recipe:
    sharding = {"strategy": strategy, **({"replicate": 1} if strategy == "hsdp" else {})}
    return parse({"model": {"name": folder}, "task": {"data": "none"}, "tune": tune, "sharding": sharding})


def world() -> World:
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, rank, size, size, torch.device("cpu"))


def tuned(
    folder: str, strategy: str, tune: dict[str, Any], out: str
) -> tuple[dict[str, Tensor], bool, tuple[int, int]]:
    """The adapter at first; whether three steps left the frozen weights alone; how many are tuned and frozen."""
    wanted = recipe(folder, strategy, tune)
    models.check(wanted, world())
    loaded = models.load(wanted, world())
    adapter = adapters.config_in(loaded.model) is not None
    begun = {name: tensor.clone() for name, tensor in adapters.state(loaded.model).items()} if adapter else {}
    before = frozen_hash(loaded.model)
    optimizer = ms.MeZO(loaded.model, lr=0.1, eps=1e-2, seed=3)
    rank, axes = dist.get_rank(), loaded.strategy.axes
    mine = EXAMPLES[axes.rows_rank(rank) :: axes.rows_size]
    for _ in range(3):
        optimizer.step(batch=collate(mine, pad_id=0), objective=candidates_loss)
    save.write(loaded.model, loaded.processor, Path(out))
    return begun, frozen_hash(loaded.model) == before, sizes(loaded.model)


@pytest.mark.parametrize(("strategy", "world_size"), CELLS)
def test_an_adapter_is_tuned_in_every_strategy_as_in_one_process(
    ranks: Ranks, tmp_path: Path, strategy: str, world_size: int
) -> None:
    folder = str(material.write_model("llama", tmp_path / "model"))
    for number, tune in enumerate(({"what": "lora"}, {"what": "prefix"}, IA3)):
        one, many = tmp_path / f"one{number}", tmp_path / f"many{number}"
        ((begun, _, counts),) = ranks(1, tuned, folder=folder, strategy="single", tune=tune, out=str(one))
        for first, kept, found in ranks(world_size, tuned, folder=folder, strategy=strategy, tune=tune, out=str(many)):
            assert kept
            assert found == counts
            assert first.keys() == begun.keys()
            assert all(torch.equal(first[name], begun[name]) for name in begun)
        alone, saved = (load_file(path / "adapter_model.safetensors") for path in (one, many))
        assert alone.keys() == saved.keys()
        for name in alone:
            assert not torch.equal(alone[name], begun[name])
            torch.testing.assert_close(saved[name], alone[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("strategy", "world_size"), [("fsdp2", 2), ("zero3", 2)])
def test_named_weights_are_tuned_in_a_sharded_model(
    ranks: Ranks, tmp_path: Path, strategy: str, world_size: int
) -> None:
    folder = material.write_model("llama", tmp_path / "model")
    tune = {"what": "names", "names": ["model.layers.1.mlp.*"]}
    results = ranks(world_size, tuned, folder=str(folder), strategy=strategy, tune=tune, out=str(tmp_path / "saved"))
    assert all(kept for _, kept, _ in results)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".layers.1.mlp." in name}


@pytest.mark.parametrize(
    "fields",
    [
        {"peft_type": "LORA", "use_dora": True},
        {"peft_type": "LORA", "bias": "all"},
        {"peft_type": "LORA", "modules_to_save": ["lm_head"]},
        {"peft_type": "LN_TUNING"},
        {"peft_type": "OFT", "target_modules": ["q_proj"]},
    ],
)
def test_a_method_that_may_read_sharded_weights_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = str(material.write_model("llama", tmp_path / "model"))
    two = World(0, 0, 2, 2, torch.device("cpu"))
    for strategy in ("fsdp2", "hsdp", "zero3"):
        with pytest.raises(RecipeError, match=f"tune: with sharding.strategy {strategy}, .*set sharding.strategy to"):
            models.check(recipe(folder, strategy, {"what": "peft", "peft": fields}), two)
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj"]}
    models.check(recipe(folder, "fsdp2", {"what": "peft", "peft": plain}), two)
