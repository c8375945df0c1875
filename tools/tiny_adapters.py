"""Every PEFT method on a tiny Llama, or on a tiny Mixtral where it adapts packed experts.

Freshly made adapters mostly have no effect, and nothing could be seen of a wrong perturbation. So their trainable
parameters are moved off their initial values.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from peft import TaskType, get_peft_config, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from tools.tiny_models import Batch, Builder, batch_of_rows, jitter_, shrunk

PROJECTIONS = ["q_proj", "v_proj"]
_PROMPT: dict[str, Any] = {"num_virtual_tokens": 3}
_TARGETS: dict[str, Any] = {"target_modules": PROJECTIONS}
_RANK: dict[str, Any] = {**_TARGETS, "r": 4}

SETTINGS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": {**_PROMPT, "num_tasks": 2, "num_ranks": 2},
    "P_TUNING": {**_PROMPT, "encoder_hidden_size": 16},
    "PREFIX_TUNING": _PROMPT,
    "LORA": {**_RANK, "lora_alpha": 8},
    "ADALORA": {**_TARGETS, "init_r": 4, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 1},
    "ADAMSS": {**_TARGETS, "r": 8, "num_subspaces": 2},
    "BEFT": _TARGETS,
    "BOFT": {**_TARGETS, "boft_block_size": 4},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "OFT": {**_TARGETS, "r": 0, "oft_block_size": 4},
    "POLY": {**_RANK, "n_tasks": 2, "n_skills": 2},
    "LN_TUNING": {},
    "VERA": {"target_modules": PROJECTIONS[:1], "r": 4},
    "PVERA": {"target_modules": PROJECTIONS[:1], "r": 4},
    "FOURIERFT": {**_TARGETS, "n_frequency": 20},
    "VBLORA": {**_RANK, "num_vectors": 6, "vector_length": 8, "topk": 2},
    "UNILORA": {**_RANK, "theta_d_length": 64},
    "CPT": {"cpt_token_ids": [5, 6, 7], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    "TRAINABLE_TOKENS": {"token_indices": [7, 9, 12, 30], "target_modules": ["embed_tokens"]},
    "SHIRA": {**_RANK, "r": 2},
    "C3A": {**_TARGETS, "block_size": 8},
    "WAVEFT": {**_TARGETS, "n_frequency": 20},
    "GRALORA": {**_RANK, "gralora_k": 2},
    "CARTRIDGE": {**_PROMPT, "num_frozen_tokens": 1},
    "LOKR": {**_RANK, "decompose_both": True},
    "OSF": {**_TARGETS, "effective_rank": 4},
    "SUPERTUNING": {**_TARGETS, "sparsity": 0.5},
    "SHADOW": {"r": 4},
    "ROAD": {**_TARGETS, "group_size": 8},
    "FROD": _TARGETS,
    "TINYLORA": {**_RANK, "r": 2, "u": 4},
}
"""By method; the others get a rank and two projections."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "LORA with DoRA": ("LORA", {"use_dora": True}),
    "LORA with biases": ("LORA", {"bias": "all"}),
    "LORA on the table": ("LORA", {"target_modules": ["embed_tokens", "q_proj"]}),
    "LORA with new tokens": ("LORA", {"trainable_token_indices": [7, 9, 12, 30]}),
    "LORA with the head": ("LORA", {"modules_to_save": ["lm_head"]}),
    "PREFIX_TUNING projected": ("PREFIX_TUNING", {"prefix_projection": True, "encoder_hidden_size": 16}),
}
EXPERTS = {"LORA on experts": ("LORA", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]})}


def adapters() -> dict[str, Builder]:
    """Name -> a builder of a tiny model with such an adapter, in eval mode, and of its batch."""
    methods = {kind.value: (kind.value, dict[str, Any]()) for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING}
    on_llama: dict[str, Builder] = {name: partial(_build, _llama, *case) for name, case in (methods | VARIANTS).items()}
    return on_llama | {name: partial(_build, _mixtral, *case) for name, case in EXPERTS.items()}


def _build(make: Callable[[], nn.Module], method: str, changes: dict[str, Any]) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = make()
    jitter_(model, 0.1)
    batch = batch_of_rows()
    if method == "XLORA":
        return _jittered(_xlora(model)), batch
    settings = {"peft_type": method, "task_type": TaskType.CAUSAL_LM, **SETTINGS.get(method, _RANK), **changes}
    if method in ("MULTITASK_PROMPT_TUNING", "POLY"):
        batch = batch | {"task_ids": torch.zeros(len(batch["input_ids"]), dtype=torch.long)}
    return _jittered(get_peft_model(model, get_peft_config(settings))), batch


def _jittered(model: nn.Module) -> nn.Module:
    jitter_(model)
    return model.eval()


def _xlora(model: nn.Module) -> nn.Module:
    """A mixture of two LoRA adapters, which it reads from disk."""
    with tempfile.TemporaryDirectory() as folder:
        config = peft.LoraConfig(r=4, target_modules=PROJECTIONS, task_type=TaskType.CAUSAL_LM)
        saved = {name: f"{folder}/{name}" for name in ("0", "1")}
        for path in saved.values():
            one = get_peft_model(_llama(), config)
            _jittered(one)
            one.save_pretrained(path)
        mixture = peft.XLoraConfig(
            task_type=TaskType.CAUSAL_LM, hidden_size=32, adapters=saved, xlora_depth=2, xlora_size=16
        )
        mixed: nn.Module = get_peft_model(model, mixture)
        return mixed


def _llama() -> nn.Module:
    model: nn.Module = LlamaForCausalLM(shrunk(LlamaConfig, {}))
    return model


def _mixtral() -> nn.Module:
    model: nn.Module = MixtralForCausalLM(shrunk(MixtralConfig, {}))
    return model
