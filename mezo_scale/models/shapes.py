"""Shapes of published models, by name and without a network: enough to plan a run, or to make random weights.

The numbers are those of the models' published configurations.
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mezo_scale.errors import ModelError, RecipeError, one_line
from mezo_scale.models import heads
from mezo_scale.recipe import means_disk


@dataclass(frozen=True)
class Shape:
    """A published model.

    Attributes:
        hub: its name on the Hugging Face hub.
        kind: the class of its configuration.
        fields: what it sets there.
    """

    hub: str
    kind: type[PretrainedConfig]
    fields: dict[str, Any]


def _opt(size: str, hidden: int, layers: int, heads: int, **rest: Any) -> Shape:
    fields = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "word_embed_proj_dim": hidden,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    }
    return Shape(f"facebook/opt-{size}", OPTConfig, fields | rest)


def _decoder(
    hub: str,
    kind: type[PretrainedConfig],
    vocabulary: int,
    hidden: int,
    layers: int,
    heads: tuple[int, int],
    inner: int,
    *,
    tied: bool = False,
    **rest: Any,
) -> Shape:
    """Llama and its kin. heads: of queries, of keys and values."""
    fields = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": inner,
        "tie_word_embeddings": tied,
    }
    return Shape(hub, kind, fields | rest)


def _roberta(size: str, hidden: int, layers: int, heads: int) -> Shape:
    fields = {
        "vocab_size": 50265,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    }
    return Shape(f"FacebookAI/roberta-{size}", RobertaConfig, fields)


_LLAMA_3: dict[str, Any] = {"max_position_embeddings": 8192, "rope_theta": 500_000.0}
_QWEN_3: dict[str, Any] = {"head_dim": 128, "max_position_embeddings": 40_960}

SHAPES: dict[str, Shape] = {
    "opt-125m": _opt("125m", 768, 12, 12),
    "opt-350m": _opt("350m", 1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt("1.3b", 2048, 24, 32),
    "opt-2.7b": _opt("2.7b", 2560, 32, 32),
    "opt-6.7b": _opt("6.7b", 4096, 32, 32),
    "opt-13b": _opt("13b", 5120, 40, 40),
    "opt-30b": _opt("30b", 7168, 48, 56),
    "opt-66b": _opt("66b", 9216, 64, 72),
    "roberta-base": _roberta("base", 768, 12, 12),
    "roberta-large": _roberta("large", 1024, 24, 16),
    "smollm2-135m": _decoder("HuggingFaceTB/SmolLM2-135M", LlamaConfig, 49152, 576, 30, (9, 3), 1536, tied=True),
    "llama-2-7b": _decoder("meta-llama/Llama-2-7b-hf", LlamaConfig, 32000, 4096, 32, (32, 32), 11008),
    "llama-2-13b": _decoder("meta-llama/Llama-2-13b-hf", LlamaConfig, 32000, 5120, 40, (40, 40), 13824),
    "llama-2-70b": _decoder("meta-llama/Llama-2-70b-hf", LlamaConfig, 32000, 8192, 80, (64, 8), 28672),
    "llama-3-8b": _decoder("meta-llama/Meta-Llama-3-8B", LlamaConfig, 128256, 4096, 32, (32, 8), 14336, **_LLAMA_3),
    "llama-3-70b": _decoder("meta-llama/Meta-Llama-3-70B", LlamaConfig, 128256, 8192, 80, (64, 8), 28672, **_LLAMA_3),
    "qwen2.5-0.5b": _decoder("Qwen/Qwen2.5-0.5B", Qwen2Config, 151936, 896, 24, (14, 2), 4864, tied=True),
    "qwen2.5-1.5b": _decoder("Qwen/Qwen2.5-1.5B", Qwen2Config, 151936, 1536, 28, (12, 2), 8960, tied=True),
    "qwen2.5-3b": _decoder("Qwen/Qwen2.5-3B", Qwen2Config, 151936, 2048, 36, (16, 2), 11008, tied=True),
    "qwen2.5-7b": _decoder("Qwen/Qwen2.5-7B", Qwen2Config, 152064, 3584, 28, (28, 4), 18944),
    "qwen2.5-14b": _decoder("Qwen/Qwen2.5-14B", Qwen2Config, 152064, 5120, 48, (40, 8), 13824),
    "qwen2.5-32b": _decoder("Qwen/Qwen2.5-32B", Qwen2Config, 152064, 5120, 64, (40, 8), 27648),
    "qwen2.5-72b": _decoder("Qwen/Qwen2.5-72B", Qwen2Config, 152064, 8192, 80, (64, 8), 29568),
    "qwen3-0.6b": _decoder("Qwen/Qwen3-0.6B", Qwen3Config, 151936, 1024, 28, (16, 8), 3072, tied=True, **_QWEN_3),
    "qwen3-1.7b": _decoder("Qwen/Qwen3-1.7B", Qwen3Config, 151936, 2048, 28, (16, 8), 6144, tied=True, **_QWEN_3),
    "qwen3-4b": _decoder("Qwen/Qwen3-4B", Qwen3Config, 151936, 2560, 36, (32, 8), 9728, tied=True, **_QWEN_3),
    "qwen3-8b": _decoder("Qwen/Qwen3-8B", Qwen3Config, 151936, 4096, 36, (32, 8), 12288, **_QWEN_3),
    "qwen3-14b": _decoder("Qwen/Qwen3-14B", Qwen3Config, 151936, 5120, 40, (40, 8), 17408, **_QWEN_3),
    "qwen3-32b": _decoder("Qwen/Qwen3-32B", Qwen3Config, 151936, 5120, 64, (64, 8), 25600, **_QWEN_3),
}


def config_of(name: str) -> PretrainedConfig:
    """The configuration of a causal or masked language model.

    Args:
        name: one of `SHAPES`, or what it is called on the hub (no network is asked for those); a folder with a
            config.json, or such a file; any other name on the hub. Before it may stand "random:", as in a recipe.

    Raises:
        RecipeError: there is no such model.
        ModelError: it is quantised, or no language model of either kind.
    """
    name = name.removeprefix("random:")
    built_in = {shape.hub.lower(): shape for shape in SHAPES.values()} | SHAPES
    shape = built_in.get(name.lower())
    config = _read(name) if shape is None else shape.kind(**shape.fields)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{name} is quantised, and quantised weights can't take small updates: give an unquantised one"
        )
    heads.check_language(name, config)
    return config


def skeleton(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model on the meta device: modules and shapes, no memory."""
    with torch.device("meta"):
        return heads.made(config, dtype=dtype).eval()


def _read(name: str) -> PretrainedConfig:
    path = Path(name)
    if means_disk(name):
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise RecipeError(f"there is no {file}: expected a model's folder, its config.json, or {_known()}")
        try:
            kind = json.loads(file.read_text(encoding="utf-8"))["model_type"]
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"{file} is no configuration of a model ({type(error).__name__}: {error}): expected Hugging Face's, "
                "with a model_type"
            ) from None
        if kind not in CONFIG_MAPPING:
            raise ModelError(f"{file} has model_type {kind!r}, which this version of transformers does not know")
    close = difflib.get_close_matches(name.lower(), SHAPES, n=1, cutoff=0.75)
    if close and "/" not in name and not path.exists():  # a slip, not worth asking the network
        raise RecipeError(f"there is no model {name}; did you mean {close[0]}? Expected {_known()}")
    try:
        return AutoConfig.from_pretrained(path if means_disk(name) else name, trust_remote_code=False)
    except Exception as error:  # the hub's client has roots of its own
        raise RecipeError(
            f"{name} is no model that is known here or that the hub gives ({one_line(error, 120)}): expected {_known()}"
        ) from None


def _known() -> str:
    return f"one of {', '.join(SHAPES)}"
