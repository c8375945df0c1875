"""Hugging Face's Trainer on every layout that it offers: its weights, at the end and resumed, are its log's."""

from __future__ import annotations

import math
import pathlib
import re
from dataclasses import dataclass
from typing import Any

import deepspeed
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import mezo_scale as ms
from mezo_scale.errors import ShardingError
from mezo_scale.integrations.transformers import MeZOTrainer
from tests.integrations.trainers import Rows, StopAfter, config, equal, values
from tests.support import material, models
from tests.support.pool import Ranks

STAGE3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fsdp2-loaded": {"save_only_model": True},  # transformers saves no optimizer of a model that it sharded itself
    "fsdp2": {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}},
    "fsdp2-sharded": {
        "fsdp": True,
        "fsdp_config": {
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": "SHARDED_STATE_DICT",
        },
    },
    "zero3": {"deepspeed": STAGE3},
}


@dataclass
class Run:
    """What one rank saw of a run."""

    kind: str  # of the model and its parameters
    weights: list[Tensor]  # whole, at the end
    eval_loss: float


def run(
    layout: str, base: str, folder: pathlib.Path, stop: int = 4, resume: str | None = None, log: bool = True
) -> Run:
    """On every rank: a run of 4 steps from the base model, or its first ones."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trajectory = str(folder / "t.mezo") if log else None
    arguments = config(folder, trajectory=trajectory, **saving, **ARGUMENTS[layout])  # ZeRO-3 loads partitioned now
    if arguments.fsdp:  # on CPU ranks accelerate would take DDP instead
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    sharded = DistributedConfig(fsdp_size=2) if layout == "fsdp2-loaded" else None
    model = AutoModelForCausalLM.from_pretrained(base, distributed_config=sharded)
    rows = Rows(16)
    trainer = MeZOTrainer(model, arguments, train_dataset=rows, eval_dataset=Rows(4), callbacks=[StopAfter(stop)])
    trainer.train(resume_from_checkpoint=resume)
    param = next(iter(trainer.model.parameters()))
    stored = "partitions" if hasattr(param, "ds_id") else type(param.data).__name__
    kind = f"{type(trainer.model_wrapped).__name__} of {stored}"
    eval_loss = trainer.evaluate()["eval_loss"]
    return Run(kind, whole(trainer.model), eval_loss)


def runs(layout: str, base: str, folder: pathlib.Path) -> list[Run]:
    """A whole run, one that stopped after two steps, and that one resumed."""
    checkpoint = str(folder / "parts" / "checkpoint-2")
    return [
        run(layout, base, folder / "whole"),
        run(layout, base, folder / "parts", stop=2),
        run(layout, base, folder / "parts", resume=checkpoint),
    ]


def without_a_log(layout: str, base: str, folder: pathlib.Path) -> list[Run]:
    """A whole run, and one from its checkpoint after two steps."""
    checkpoint = str(folder / "checkpoint-2")
    return [run(layout, base, folder, log=False), run(layout, base, folder, resume=checkpoint, log=False)]


def whole(model: nn.Module) -> list[Tensor]:
    """All of each parameter, wherever its parts are."""
    params = list(model.parameters())
    if hasattr(params[0], "ds_id"):
        with deepspeed.zero.GatheredParameters(params):
            return values(model)
    with torch.no_grad():
        return [(param.full_tensor() if isinstance(param, DTensor) else param).clone() for param in params]


def replayed(folder: pathlib.Path, until: int | None = None) -> nn.Module:
    """What a run's log says, on the base model, in this process."""
    model = models.build("llama")
    ms.replay(model, folder / "t.mezo", until)
    return model


@pytest.fixture
def base(tmp_path: pathlib.Path) -> str:
    models.build("llama").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


LAYOUTS = [
    (2, "plain", "DistributedDataParallel of Tensor"),
    (2, "fsdp2-loaded", "FSDPLlamaForCausalLM of DTensor"),
    (2, "fsdp2", "FSDPLlamaForCausalLM of DTensor"),
    (1, "zero3", "DeepSpeedEngine of partitions"),
    (2, "zero3", "DeepSpeedEngine of partitions"),
]


@pytest.mark.parametrize(("count", "layout", "kind"), LAYOUTS)
def test_the_weights_are_what_the_trajectory_says(
    ranks: Ranks, tmp_path: pathlib.Path, base: str, count: int, layout: str, kind: str
) -> None:
    found = ranks(count, runs, layout=layout, base=base, folder=tmp_path, fresh=True)
    expected = values(replayed(tmp_path / "whole"))
    assert not equal(expected, values(models.build("llama")))
    for complete, half, resumed in found:
        assert complete.kind == kind
        assert equal(complete.weights, expected)
        assert equal(half.weights, values(replayed(tmp_path / "whole", until=2)))
        assert equal(resumed.weights, expected)
        assert math.isfinite(complete.eval_loss)
        assert complete.eval_loss == resumed.eval_loss != half.eval_loss
    saved = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    half_way = dict(replayed(tmp_path / "whole", until=2).named_parameters())
    assert all(torch.equal(saved[name], half_way[name]) for name in saved.keys() & half_way.keys())
    assert saved.keys() >= half_way.keys() - {"lm_head.weight"}


@pytest.mark.parametrize("layout", ["plain", "fsdp2-sharded"])
def test_a_checkpoint_alone_goes_on_to_the_same_weights(
    ranks: Ranks, tmp_path: pathlib.Path, base: str, layout: str
) -> None:
    for complete, resumed in ranks(2, without_a_log, layout=layout, base=base, folder=tmp_path, fresh=True):
        assert not equal(complete.weights, values(models.build("llama")))
        assert equal(complete.weights, resumed.weights)


def refusals(layout: str, base: str, folder: pathlib.Path) -> str:
    with pytest.raises(ValueError, match="resume_from_checkpoint under") as refused:
        run(layout, base, folder, resume=str(folder), log=False)
    return str(refused.value)


@pytest.mark.parametrize(("layout", "remedy"), [("zero3", "set trajectory"), ("fsdp2", "'SHARDED_STATE_DICT'")])
def test_a_checkpoint_that_can_t_be_taken_up_alone_is_refused_with_the_way_out(
    ranks: Ranks, tmp_path: pathlib.Path, base: str, layout: str, remedy: str
) -> None:
    for said in ranks(2, refusals, layout=layout, base=base, folder=tmp_path, fresh=True):
        assert remedy in said


def tied_apart(base: str) -> str:
    model = AutoModelForCausalLM.from_pretrained(base, distributed_config=DistributedConfig(fsdp_size=2))
    with pytest.raises(ShardingError) as refused:
        ms.MeZO(model)
    return str(refused.value)


def test_a_tied_table_that_two_units_of_fsdp_pad_apart_is_refused(ranks: Ranks, tmp_path: pathlib.Path) -> None:
    folder = material.write_model("llama", tmp_path / "tied")  # 301 rows on two ranks
    for said in ranks(2, tied_apart, base=str(folder)):
        assert "(301, 32) is a tied weight in two units of FSDP2" in said


REFUSED = {
    "stage is 2, expected 3": {"zero_optimization": {"stage": 2}},
    "configuration has an optimizer: take it out": {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
    "configuration has a scheduler: take it out": {"scheduler": {"type": "WarmupLR", "params": {}}},
    "fp16 scales the loss": {"fp16": {"enabled": True}},
}


def refused_configurations(folder: pathlib.Path) -> list[str]:
    said = []
    for more in REFUSED.values():
        arguments = config(folder, deepspeed={**STAGE3, **more})
        with pytest.raises(ValueError, match="deepspeed's") as refused:
            MeZOTrainer(models.build("llama"), arguments, train_dataset=Rows(4))
        said.append(str(refused.value))
    best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    arguments = config(folder, deepspeed=STAGE3, **best)
    with pytest.raises(ValueError, match="load_best_model_at_end reads a checkpoint of deepspeed's engine"):
        MeZOTrainer(models.build("llama"), arguments, train_dataset=Rows(4), eval_dataset=Rows(4))
    return said


def test_a_deepspeed_configuration_that_does_more_than_shard_is_refused(ranks: Ranks, tmp_path: pathlib.Path) -> None:
    said = ranks(1, refused_configurations, folder=tmp_path, fresh=True)[0]
    for expected, found in zip(REFUSED, said, strict=True):
        assert re.search(expected, found)
