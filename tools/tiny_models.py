"""Tiny random models of every family of language models that transformers has, made from their own configurations.

A family's default configuration is shrunk by rules that know what fields mean, not families: widths, depths and counts
by their names, a model's layers to one of each kind it has. `EXCEPTIONS` holds what some families need beside that.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
)

KINDS: dict[str, tuple[Any, Any]] = {
    "causal": (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
    "masked": (MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM),
}

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
Builder = Callable[[], tuple[nn.Module, Batch]]

VOCABULARY, ROWS, LENGTH = 67, 3, 8
LARGEST = 3_000_000
"""Parameters of a model that still counts as tiny."""
MOST_LAYERS = 6

_NAMES: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input shape_vocab_size pronunciation_vocab_size entity_vocab_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions",
    48: """intermediate_size ffn_dim ffn_hidden_size n_inner decoder_ffn_dim encoder_ffn_dim d_inner dim_ff
        hidden_dim intermediate_size_mlp dense_intermediate_size feed_forward_size""",
    32: """hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim d_embed emb_dim lru_width
        decoder_hidden_size d_latents hidden_size_global ple_embed_dim adapter_in_dim adapter_out_dim
        adapter_input_size""",
    16: """moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size expert_ffn_hidden_size
        shared_experts_intermediate_size shape_embed_dim pronunciation_embed_dim entity_emb_size
        depthwise_separable_out_channel ext_pw_out_channel nemo_conv_channels""",
    8: """head_dim d_kv v_head_dim qk_rope_head_dim qk_nope_head_dim q_lora_rank kv_lora_rank linear_key_head_dim
        linear_value_head_dim linear_head_dim hidden_size_per_layer_input global_head_dim attention_head_size
        index_head_dim""",
    4: """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads n_layer_head
        num_local_experts num_experts n_routed_experts moe_num_experts sliding_window mamba_d_state state_size
        time_step_rank rotary_dim mamba_n_heads linear_num_heads laurel_rank num_latents num_self_attention_heads
        num_cross_attention_heads index_topk""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_key_value_heads num_kv_heads
        num_experts_per_tok num_experts_per_token top_k moe_k moe_topk type_vocab_size linear_num_key_heads
        linear_num_value_heads num_decoder_layers num_encoder_layers zero_expert_num num_blocks index_n_heads
        num_self_attends_per_block""",
    1: "n_group topk_group first_k_dense_replace n_shared_experts num_shared_experts pad_token_id",
    0: "num_nextn_predict_layers num_kv_shared_layers",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}

_REFORMER = {
    "attn_layers": ["local", "lsh"],
    "axial_pos_embds": False,
    "local_attn_chunk_length": 4,
    "lsh_attn_chunk_length": 4,
    "num_buckets": 2,
    "hash_seed": 0,
}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_DOTS3 = {
    f"swa_{name}": size
    for name, size in {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 16,
    }.items()
}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "causal/blt": {
        "encoder_hash_byte_group_vocab": 64,
        "patcher_config": {"head_dim": 8},
        "decoder_config": {"head_dim": 8},
        "global_config": {"head_dim": 8},
    },
    "causal/cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "causal/deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "causal/dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "causal/dots3_note": {"text_config": _DOTS3},
    "causal/dots3_note_text": _DOTS3,
    "causal/gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "causal/gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "causal/hunyuan_v1_dense": {"head_dim": 8},
    "causal/hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "causal/lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "causal/mamba2": {"num_heads": 8},
    "causal/ministral": {"head_dim": 8},
    "causal/nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "causal/qwen4_exp": {"text_config": _QWEN4},
    "causal/qwen4_exp_text": _QWEN4,
    "causal/reformer": {**_REFORMER, "is_decoder": True},
    "causal/xmod": {"default_language": "en_XX"},
    "causal/zamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 4,
    },
    "masked/esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 4},
    "masked/esmc": {"num_key_value_heads": 4},
    "masked/neomme": {"head_dim": 16},
    "masked/reformer": _REFORMER,
    "masked/xmod": {"default_language": "en_XX"},
}
"""What a family's configuration needs beside the rules."""


def families() -> dict[str, Builder]:
    """``causal/llama``, ``masked/bert`` and so on: a builder of each tiny model, in eval mode, and of its batch."""
    found: dict[str, Builder] = {}
    for objective, (mapping, auto) in KINDS.items():
        for name, config in CONFIG_MAPPING.items():
            if config in mapping:
                found[f"{objective}/{name}"] = _builder(f"{objective}/{name}", name, auto)
    return found


def _builder(key: str, name: str, auto: Any) -> Builder:
    def build() -> tuple[nn.Module, Batch]:
        config = shrunk(CONFIG_MAPPING[name], EXCEPTIONS.get(key, {}))
        return made(lambda: auto.from_config(config)), batch_of_rows()

    return build


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in eval mode, every weight moved off its initial value: a bias of zero or a dead branch would hide a
    wrong perturbation.

    Raises:
        ValueError: it is not tiny.
    """
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in make().parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters with a shrunk configuration, expected at most {LARGEST:,}")
    torch.manual_seed(0)
    model = make().float().eval()
    jitter_(model)
    return model


def jitter_(model: nn.Module, size: float = 0.05) -> None:
    """Adds small random numbers to every trainable parameter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=size)


def batch_of_rows() -> Batch:
    ids = torch.randint(5, 60, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, -2:], mask[1, -2:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def row_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of each row's next tokens, [rows]; a masked model is asked the same, any labels will do."""
    name = str(model.main_input_name)
    given: dict[str, Any] = {**batch, name: batch["input_ids"]}
    if name != "input_ids":
        del given["input_ids"]
    if "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False
    logits = model(**given).logits.float()[:, -LENGTH:]
    mask = batch["attention_mask"][:, 1:].float()
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    return (losses * mask).sum(1) / mask.sum(1)


def shrunk(kind: type[PretrainedConfig], exceptions: dict[str, Any]) -> PretrainedConfig:
    """A family's default configuration, made small; those inside it, too."""
    base = kind()
    values = {name: value for name, value in base.to_dict().items() if name in _fields(kind)}
    given: dict[str, Any] = {}
    for name, value in values.items():
        inner = base.__dict__.get(name)
        if isinstance(inner, PretrainedConfig):
            given[name] = shrunk(type(inner), exceptions.get(name) or {}).to_dict()
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            given[name] = min(SIZES[name], value) if value >= 0 else value
    if "kv_lora_rank" in values and "num_key_value_heads" in given:  # every head has keys of its own
        given["num_key_value_heads"] = given["num_attention_heads"]
    given |= _layers(values)
    given |= {name: value for name, value in exceptions.items() if name not in given or not isinstance(value, dict)}
    config = kind(**given)
    config.use_cache = False
    return config


def _fields(kind: type[PretrainedConfig]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _layers(values: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind that the family mixes; two of the only kind."""
    depths = [name for name in values if SIZES.get(name) == 2 and name.endswith(("layers", "n_layer"))]
    for depth in depths:
        lists = {n: v for n, v in values.items() if isinstance(v, list | tuple) and len(v) == values[depth]}
        if not lists:
            continue
        kinds: dict[str, int] = {}
        for index, kind in enumerate(zip(*lists.values(), strict=True)):
            kinds.setdefault(repr(kind), index)
        chosen = sorted(kinds.values())[:MOST_LAYERS] if len(kinds) > 1 else [0, 1]
        small = {name: [SIZES.get(name, value[index]) for index in chosen] for name, value in lists.items()}
        return small | {depth: len(chosen)}
    return {}
