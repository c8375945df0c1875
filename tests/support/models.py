"""Tiny random models of many families, the same on every rank, each with a batch and an objective that fit it.

Sizes are odd on purpose, so that shards are uneven and, on four ranks, some are empty. Every parameter is jittered away
from its initial value: no bias is zero and no LoRA matrix is dead, so a wrong perturbation of any of them shows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

Batch = dict[str, Tensor]
Objective = Callable[[nn.Module, Batch], Tensor]

VOCABULARY = 67
LENGTH = 9
IMAGE = 6


@dataclass(frozen=True)
class Architecture:
    make: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], Batch]  # rows -> tensors whose dim 0 is rows
    objective: Objective  # -> float32 losses [rows]


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model in eval mode. Buffers keep their dtype, parameters get `dtype`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURES[name].make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
                parameter.data = parameter.data.to(dtype)
    return model


def batch(name: str, rows: int, *, seed: int = 0) -> Batch:
    return ARCHITECTURES[name].batch(rows, torch.Generator().manual_seed(seed))


def objective(name: str) -> Objective:
    return ARCHITECTURES[name].objective


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers: what one shards unit by unit."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for part in lists for block in part if type(block).__name__.endswith(("Block", "Layer"))]


def causal_loss(model: nn.Module, batch: Batch) -> Tensor:
    mask = batch["attention_mask"]
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    return _row_means(logits[:, :-1], labels[:, 1:])


def masked_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return _row_means(logits, batch["labels"])


def sequence_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=batch["decoder_input_ids"],
        use_cache=False,
    ).logits
    return _row_means(logits, batch["labels"])


def image_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(pixel_values=batch["pixel_values"]).logits
    return F.cross_entropy(logits.float(), batch["labels"], reduction="none")


def _row_means(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over each row's tokens: logits [rows, T, V], labels [rows, T] with -100 for padding -> float32 [rows]."""
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(1) / (labels != -100).sum(1)


def _tokens(rows: int, generator: torch.Generator) -> Batch:
    """Right-padded token ids; the first row is full."""
    ids = torch.randint(5, VOCABULARY, (rows, LENGTH), generator=generator)
    lengths = torch.randint(4, LENGTH + 1, (rows, 1), generator=generator)
    lengths[0] = LENGTH
    mask = (torch.arange(LENGTH) < lengths).long()
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def _masked_tokens(rows: int, generator: torch.Generator) -> Batch:
    tokens = _tokens(rows, generator)
    masked = torch.zeros(rows, LENGTH, dtype=torch.bool)
    masked[:, 1:4:2] = True
    return {
        "input_ids": tokens["input_ids"].masked_fill(masked, 3),
        "attention_mask": tokens["attention_mask"],
        "labels": tokens["input_ids"].masked_fill(~masked, -100),
    }


def _sequences(rows: int, generator: torch.Generator) -> Batch:
    answer = torch.randint(5, VOCABULARY, (rows, 4), generator=generator)
    start = torch.zeros(rows, 1, dtype=torch.long)
    return {
        **_tokens(rows, generator),
        "decoder_input_ids": torch.cat([start, answer[:, :-1]], dim=1),
        "labels": answer,
    }


def _images(rows: int, generator: torch.Generator) -> Batch:
    return {
        "pixel_values": torch.randn(rows, 3, IMAGE, IMAGE, generator=generator),
        "labels": torch.randint(0, 3, (rows,), generator=generator),
    }


def _opt() -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=20,
            word_embed_proj_dim=14,  # as in OPT-350m: projections beside the embedding
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=27,
            max_position_embeddings=33,
        )
    )


def _gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=31, n_embd=18, n_layer=2, n_head=3))


def _llama(*, tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=38,  # tensor parallelism wants it even
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=33,
            tie_word_embeddings=tied,
        )
    )


def _mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=20,
            intermediate_size=28,  # grouped matrix products want strides of 16 bytes
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
            num_experts_per_tok=2,
            max_position_embeddings=33,
        )
    )


def _qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=20,
            intermediate_size=29,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            max_position_embeddings=33,
            tie_word_embeddings=True,
        )
    )


def _gemma3() -> Gemma3ForCausalLM:
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=20,
            intermediate_size=29,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=6,
            query_pre_attn_scalar=6,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            max_position_embeddings=33,
        )
    )


def _bert() -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=18,
            intermediate_size=25,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=31,
        )
    )


def _roberta() -> RobertaForMaskedLM:
    return RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=VOCABULARY,
            hidden_size=18,
            intermediate_size=25,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=31,
        )
    )


def _t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=18,
            d_kv=5,
            d_ff=23,
            num_layers=2,
            num_heads=3,
            relative_attention_num_buckets=8,
            decoder_start_token_id=0,
        )
    )


def _vit() -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=18,
            intermediate_size=25,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=IMAGE,
            patch_size=2,
            num_labels=3,
        )
    )


def _lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]))


ARCHITECTURES: dict[str, Architecture] = {
    "opt": Architecture(_opt, _tokens, causal_loss),
    "gpt2": Architecture(_gpt2, _tokens, causal_loss),
    "llama": Architecture(lambda: _llama(tied=False), _tokens, causal_loss),
    "llama-tied": Architecture(lambda: _llama(tied=True), _tokens, causal_loss),
    "mixtral": Architecture(_mixtral, _tokens, causal_loss),
    "qwen3": Architecture(_qwen3, _tokens, causal_loss),
    "gemma3": Architecture(_gemma3, _tokens, causal_loss),
    "bert": Architecture(_bert, _masked_tokens, masked_loss),
    "roberta": Architecture(_roberta, _masked_tokens, masked_loss),
    "t5": Architecture(_t5, _sequences, sequence_loss),
    "vit": Architecture(_vit, _images, image_loss),
    "llama-lora": Architecture(lambda: _lora(_llama(tied=False)), _tokens, causal_loss),
    "opt-lora": Architecture(lambda: _lora(_opt()), _tokens, causal_loss),
}
