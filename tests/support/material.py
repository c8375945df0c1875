"""A model, its tokenizer and reviews, small enough to make anew: what a recipe needs."""

import csv
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

# Notices of transformers would stand among what the commands print.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

THINGS = ("the plot", "its cast", "this film", "the score", "every scene", "a remake", "the ending", "his direction")
VERDICTS = (("dull", "stale", "a bore", "a mess"), ("superb", "moving", "a joy", "a delight"))
VOCABULARY = 300
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCABULARY + 1,  # odd, so that the table's shards are uneven
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "llama-untied": LlamaConfig(
        vocab_size=VOCABULARY + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY + 1,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=80,
    ),
    "gpt2": GPT2Config(vocab_size=VOCABULARY + 1, n_embd=32, n_layer=2, n_head=4, n_positions=80),
    # A block, and the mixer inside of it, are both not to be split.
    "mamba": MambaConfig(
        vocab_size=VOCABULARY + 1, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4
    ),
    # Its checkpoint's weights have other names and shapes than the module's.
    "mixtral": MixtralConfig(
        vocab_size=VOCABULARY + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    ),
}


def reviews() -> list[tuple[str, int]]:
    """128 different sentences with their labels, half of them positive."""
    return [
        (f"{thing} is {verdict} , and {other}", label)
        for label, verdicts in enumerate(VERDICTS)
        for (thing, verdict), other in itertools.product(
            itertools.product(THINGS, verdicts), ("that is all", "i left early")
        )
    ]


def write_reviews(path: Path) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(reviews())
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, trained on the reviews; " great" is one token, " terrible" too, and nothing is added to a text."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(["It was great It was terrible"] * 99 + [text for text, _ in reviews()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """`tokenizer`, with a template: a turn is its role in angle brackets, its content, the end of the text."""
    chatting = tokenizer()
    chatting.chat_template = CHAT_TEMPLATE
    return chatting


def build(name: str, seed: int = 0) -> Any:
    return with_large_weights(lambda: AutoModelForCausalLM.from_config(CONFIGS[name]), seed)


def with_large_weights(make: Callable[[], Any], seed: int) -> Any:
    """A model with weights large enough that its answers differ from row to row."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def write_model(name: str, folder: Path, seed: int = 0) -> Path:
    build(name, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
