"""Prefix tuning: keys and values that every layer attends to before the text, as PEFT saves and applies them.

The first ones are real: what the model itself computes for random tokens of its vocabulary, as MeZO's authors begin
(https://arxiv.org/abs/2305.17333, appendix E.5).
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mezo_scale.errors import SharedError

SAVED = "prompt_embeddings"  # PEFT's name of it in a file
_MODULE = "prefix_encoder"


def is_prefix(config: Any) -> bool:
    """Whether a configuration of PEFT is that of a prefix, without a network in front of it."""
    return config is not None and config.peft_type.value == "PREFIX_TUNING"


def weight(model: nn.Module) -> nn.Parameter:
    """The prefix in a model, [virtual tokens, layers * 2 * key-value heads * size of a head]."""
    found = model.get_submodule(_MODULE).weight
    assert isinstance(found, nn.Parameter)
    return found


def attach_(model: Any, config: Any, device: torch.device, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
    """Puts a prefix of zeros into a model, whose calls then begin with it.

    Args:
        config: PEFT's, complete (`config_for`).
        dtype: what it is stored in.
        compute_dtype: of the keys and values that the model itself computes.
    """
    width = config.num_layers * 2 * config.token_dim
    table = torch.zeros(config.num_virtual_tokens, width, device=device, dtype=dtype)
    model.add_module(_MODULE, nn.Embedding.from_pretrained(table, freeze=False))
    model.peft_config = {"default": config}
    length, original = config.num_virtual_tokens, model.forward

    @functools.wraps(original)  # callers look at a model's signature
    def forward(input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        rows, cache = input_ids.shape[0], options.get("past_key_values")
        if cache is None:
            options["past_key_values"] = _cache(model, config, rows, input_ids.device, compute_dtype)
        elif not cache.get_seq_length():  # as `generate` of transformers passes it
            for number, layer in enumerate(_cache(model, config, rows, input_ids.device, compute_dtype).layers):
                cache.update(layer.keys, layer.values, number)
        if options.get("position_ids") is not None:
            options["position_ids"] = options["position_ids"] + length
        if attention_mask is not None:
            if attention_mask.dim() == 4:  # what is added to attention's scores, [rows, 1, queries, keys]
                seen = attention_mask.new_zeros(*attention_mask.shape[:3], length)
            else:
                seen = attention_mask.new_ones(rows, length)
            attention_mask = torch.cat([seen, attention_mask], -1)
        return original(input_ids=input_ids, attention_mask=attention_mask, **options)

    model.forward = forward


def _cache(model: nn.Module, config: Any, rows: int, device: torch.device, dtype: torch.dtype) -> DynamicCache:
    """The prefix once per row: a row of a step's batch may have another one than its neighbour."""
    tokens = torch.arange(config.num_virtual_tokens, device=device).expand(rows, -1)
    made = model.get_submodule(_MODULE)(tokens).to(dtype)
    shape = (rows, config.num_virtual_tokens, 2 * config.num_layers, config.num_attention_heads, -1)
    states = made.view(*shape).permute(2, 0, 3, 1, 4)
    return DynamicCache([(states[2 * layer], states[2 * layer + 1]) for layer in range(config.num_layers)])


def activations(model: Any, length: int, seed: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, [1, heads, length, size] per layer, of random tokens. Every rank of a sharded model calls it.

    Raises:
        SharedError: the model keeps none in a cache, or not the same number everywhere: it can't have a prefix.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as OTHERWISE

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (1, length), generator=generator).to(device)
    try:
        with torch.no_grad():
            cache = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True).past_key_values
        layers = list(cache.layers)
    except Exception:  # a model without a cache may say so in any way
        layers = []
    shapes = {(type(layer), *(tuple(part.shape) for part in (layer.keys, layer.values))) for layer in layers}
    is_uniform = len(shapes) == 1 and next(iter(shapes))[0] is DynamicLayer and len(set(next(iter(shapes))[1:])) == 1
    if not is_uniform or model.config.model_type in OTHERWISE:
        raise SharedError(
            f"tune.what is prefix, but a {model.config.model_type} model does not keep plain keys and values of one "
            "shape in all its layers: set tune.what to lora"
        )
    return [(layer.keys, layer.values) for layer in layers]


def config_for(states: list[tuple[Tensor, Tensor]], base: str) -> Any:
    """PEFT's configuration of a prefix of that shape."""
    from peft import PrefixTuningConfig

    _, heads, length, size = states[0][0].shape
    return PrefixTuningConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        num_virtual_tokens=length,
        num_layers=len(states),
        num_attention_heads=heads,
        token_dim=heads * size,
        encoder_hidden_size=heads * size,
        num_transformer_submodules=1,
    )


def flat(states: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Keys and values as `weight` has them."""
    parts = [part[0].transpose(0, 1).flatten(1) for pair in states for part in pair]
    return torch.cat(parts, 1)
