"""A cut of `make sweep`: model families and adapters of every kind, against copies whose weights were really moved."""

from __future__ import annotations

import pytest

from tests.support.pool import Ranks
from tools import tiny_models
from tools.model_sweep import on_rank
from tools.view_against_copy import TOLERANCE

PAIRED = [
    "causal/bart",  # a head of its own on a decoder
    "causal/bloom",  # positions as a bias of the heads
    "causal/falcon_h1",  # a mixer reads its convolution's weight, beside attention
    "causal/gemma3n_text",  # alternating updates, tables per layer
    "causal/gpt_neox_japanese",  # a module returns its bias
    "causal/gpt_oss",  # packed experts with biases, sinks
    "causal/granitemoehybrid",
    "causal/jamba",
    "causal/lfm2",
    "causal/llama4_text",
    "causal/mamba2",  # asks a weight that it does not read for its dtype
    "causal/mixtral",
    "causal/qwen3_next",  # linear attention, its state's decay by bare parameters
    "causal/recurrent_gemma",
    "causal/rwkv",
    "masked/albert",  # one layer, called again and again
    "masked/bert",
    "masked/deberta-v2",  # a table of relative positions that layers share
    "masked/mobilebert",  # a head of two weights, one of them another module's
]
ALONE = {"causal/xlnet": "one branch at a time"}  # rows lie along dim 1 in there

ADAPTERS = [
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LORA",
    "LORA on experts",
    "LORA on the table",
    "LORA with DoRA",
    "OFT",
    "PREFIX_TUNING",
    "TRAINABLE_TOKENS",
    "VERA",
]
ADAPTERS_ALONE = {"PROMPT_TUNING": "Sizes of tensors must match"}

ON_RANKS = ["causal/mamba2", "causal/gpt_neox_japanese", "masked/deberta-v2", "adapter/IA3", "adapter/VERA"]


@pytest.mark.parametrize("name", [*PAIRED, *(f"adapter/{name}" for name in ADAPTERS)])
def test_every_branch_and_all_of_them_together_equal_a_moved_copy(name: str) -> None:
    found = on_rank("plain", name)
    assert found["one"] < TOLERANCE
    assert found["paired"] is not None, found["why_not"]
    assert found["paired"] < TOLERANCE


@pytest.mark.parametrize(
    ("name", "why"), [*ALONE.items(), *((f"adapter/{name}", why) for name, why in ADAPTERS_ALONE.items())]
)
def test_where_branches_can_not_share_a_batch_each_equals_a_moved_copy_and_the_reason_is_said(
    name: str, why: str
) -> None:
    found = on_rank("plain", name)
    assert found["one"] < TOLERANCE
    assert found["paired"] is None
    assert why in found["why_not"]


def test_an_adapter_that_writes_its_own_weights_is_refused() -> None:
    found = on_rank("plain", "adapter/CPT")
    assert found["one"] is None
    assert found["paired"] is None
    assert "delta_embedding.weight is written by the model's own forward" in found["why_not"]


@pytest.mark.parametrize("layout", ["fsdp2", "zero3"])
@pytest.mark.parametrize("name", ON_RANKS)
def test_a_sharded_model_under_the_view_equals_a_moved_copy_of_the_whole_one(
    ranks: Ranks, layout: str, name: str
) -> None:
    for found in ranks(2, on_rank, layout=layout, name=name):
        assert found["one"] < TOLERANCE
        assert found["paired"] is not None, found["why_not"]
        assert found["paired"] < TOLERANCE


def test_a_shrunk_family_keeps_one_layer_of_each_kind_that_it_mixes() -> None:
    config = tiny_models.shrunk(tiny_models.CONFIG_MAPPING["qwen3_next"], {})
    assert config.layer_types == ["linear_attention", "full_attention"]
    assert config.num_hidden_layers == 2
