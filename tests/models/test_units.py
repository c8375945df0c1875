"""The one unit plan: what is a layer, what a table, and what is left to the root."""

from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MBartConfig,
    PretrainedConfig,
    ZambaConfig,
)

from mezo_scale.errors import ShardingError
from mezo_scale.models import shard_fsdp2
from mezo_scale.models.shapes import skeleton
from mezo_scale.models.units import units
from tests.support.pool import Ranks

SMALL: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SMALL, intermediate_size=48)
MAMBA: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
ZAMBA = ZambaConfig(
    **SMALL | {"num_hidden_layers": 4},
    intermediate_size=48,
    layers_block_type=["hybrid", "mamba", "hybrid", "mamba"],
    mamba_dt_rank=4,
    mamba_d_state=4,
    n_mamba_heads=2,
    num_key_value_heads=4,
    use_mamba_kernels=False,
)


def plan(config: PretrainedConfig) -> list[tuple[str, str]]:
    return [(unit.kind, unit.name) for unit in units(skeleton(config))]


def layers(prefix: str) -> list[tuple[str, str]]:
    return [("layer", f"{prefix}.{number}") for number in range(2)]


MBART = {"vocab_size": 99, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}

PLANS = {
    "untied": (LLAMA, [("table", "model.embed_tokens"), *layers("model.layers"), ("table", "lm_head")]),
    "tied": (LlamaConfig(**LLAMA.to_dict() | {"tie_word_embeddings": True}), layers("model.layers")),
    "gpt2": (GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4), layers("transformer.h")),
    "a block and its mixer": (MambaConfig(**MAMBA, time_step_rank=4), layers("backbone.layers")),
    "a layer and its attention": (MBartConfig(**MBART), layers("model.decoder.layers")),
    # Its embeddings, which the head is tied to, must not be split either.
    "a table not to be split": (
        BertConfig(**SMALL, intermediate_size=48, is_decoder=True),
        layers("bert.encoder.layer"),
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_layer_is_the_outermost_of_what_must_not_be_split(name: str) -> None:
    config, expected = PLANS[name]
    assert plan(config) == [("root", ""), *expected]


def planned_around_sharding(config: PretrainedConfig) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    model = AutoModelForCausalLM.from_config(config)
    before = [(unit.kind, unit.name) for unit in units(model)]
    shard_fsdp2(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return before, [(unit.kind, unit.name) for unit in units(model)]


@pytest.mark.parametrize("config", [LLAMA, MambaConfig(**MAMBA, time_step_rank=4)], ids=["llama", "mamba"])
def test_sharding_a_model_changes_no_unit(ranks: Ranks, config: PretrainedConfig) -> None:
    for before, after in ranks(2, planned_around_sharding, config=config):
        assert before == after


class FSDPBlock(nn.Linear):
    """A layer whose own name begins as those that `fully_shard` makes."""


class Stack(nn.Module):
    _no_split_modules = ("FSDPBlock", "Block")

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList(FSDPBlock(4, 4) for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def get_output_embeddings(self) -> None:
        return None


def test_only_names_that_fully_shard_gave_are_shortened() -> None:
    model = Stack()
    assert [unit.name for unit in units(model)] == ["", "blocks.0", "blocks.1"]
    model._no_split_modules = ("Block",)
    assert [unit.name for unit in units(model)] == [""]


def refused(config: PretrainedConfig, *, tie: bool) -> tuple[str, bool]:
    """What sharding says, and whether it left the model as it was."""
    model: Any = AutoModelForCausalLM.from_config(config)
    if tie:
        model.model.norm.weight = model.model.layers[1].input_layernorm.weight
    try:
        shard_fsdp2(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    except ShardingError as error:
        return str(error), not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return "", False


@pytest.mark.parametrize(
    ("config", "tie", "expected"),
    [
        (ZAMBA, False, "model.layers.0 and model.layers.2 share the weight model.layers.2.shared_transf."),
        (LLAMA, True, "the root and model.layers.1 share the weight model.layers.1.input_layernorm.weight"),
    ],
    ids=["two layers", "a layer and the root"],
)
def test_units_that_share_a_weight_are_refused_before_anything_is_sharded(
    ranks: Ranks, config: PretrainedConfig, tie: bool, expected: str
) -> None:
    for said, whole in ranks(2, refused, config=config, tie=tie):
        assert said.startswith(expected)
        assert "set sharding.strategy to zero3, or to ddp" in said
        assert whole
