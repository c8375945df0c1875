"""Something small to launch: a Llama checkpoint with a tokenizer, a labelled CSV file, and a recipe over them.

By hand: python -m tests.support.workload FOLDER
"""

import csv
import random
import sys
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GOOD = ["fine", "lovely", "bright", "moving", "warm", "funny", "clever", "rich"]
BAD = ["dull", "flat", "noisy", "stale", "weak", "clumsy", "hollow", "cold"]
PLAIN = ["a", "the", "film", "plot", "scene", "actor", "it", "was", "is", "with", "and", "of"]
STEPS = 6


def make(folder: Path) -> Path:
    """Fills `folder` and returns the path of the recipe in it, whose own paths are absolute."""
    words = ["<unk>", "<s>", "great", "terrible", *PLAIN, *GOOD, *BAD]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<s>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=1,
        )
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    _write_reviews(folder / "reviews.csv")
    recipe = {
        "model": {"name": str(folder / "model")},
        "task": {"data": str(folder / "reviews.csv"), "train": 64, "dev": 16, "test": 32, "max_length": 32},
        "optimizer": {"lr": 1e-3, "eps": 1e-3},
        "train": {"steps": STEPS, "batch_size": 8, "eval_every": 0, "log_every": 1},
        "sharding": {"strategy": "fsdp2"},
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def _write_reviews(path: Path) -> None:
    draw = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("text", "label"))
        for number in range(300):
            label = number % 2
            sentence = [*draw.choices(PLAIN, k=6), *draw.choices(GOOD if label else BAD, k=3)]
            draw.shuffle(sentence)
            rows.writerow((" ".join(sentence), label))


if __name__ == "__main__":
    sys.stdout.write(f"{make(Path(sys.argv[1]).absolute())}\n")
