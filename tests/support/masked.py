"""Tiny masked language models with tokenizers like their families', and rows to ask them about."""

import itertools
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForMaskedLM, BertConfig, PreTrainedTokenizerFast, RobertaConfig

from tests.support.material import THINGS, VERDICTS, with_large_weights

WORDS = "terrible bad okay good great Yes Maybe No Expression Entity Description Human Location Number It was"
MARKS = ". , ? : -"
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}


def sentences() -> list[str]:
    both = [verdict for verdicts in VERDICTS for verdict in verdicts]
    return [f"{thing} is {verdict}" for thing, verdict in itertools.product(THINGS, both)]


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: a word with the space before it is one token, and the mask swallows that space."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([f" {WORDS}"] * 99 + sentences(), trainer)
    core.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    core.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **names, mask_token=AddedToken("<mask>", lstrip=True, special=True)
    )


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Lower case, whole words and marks."""
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    text = " ".join([WORDS, MARKS, *sentences()]).lower()
    words = [*names.values(), "[MASK]", *dict.fromkeys(text.split())]
    core = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = Lowercase()
    core.pre_tokenizer = BertPreTokenizer()
    core.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=core, **names, mask_token="[MASK]")


TOKENIZERS = {"roberta": roberta_tokenizer, "bert": bert_tokenizer}


def build(name: str, seed: int = 0) -> Any:
    """A model with weights large enough that its answers differ from row to row."""
    size = len(TOKENIZERS[name]())
    config = (
        RobertaConfig(vocab_size=size, max_position_embeddings=66, type_vocab_size=1, **SIZES)
        if name == "roberta"
        else BertConfig(vocab_size=size, max_position_embeddings=64, pad_token_id=0, **SIZES)
    )
    return with_large_weights(lambda: AutoModelForMaskedLM.from_config(config), seed)


def write_model(name: str, folder: Path, seed: int = 0) -> Path:
    build(name, seed).save_pretrained(folder)
    TOKENIZERS[name]().save_pretrained(folder)
    return folder


def write_rows(path: Path) -> Path:
    """64 sentences with their labels, as SST-2 has them."""
    good = VERDICTS[1]
    rows = [{"sentence": text, "label": int(text.endswith(good))} for text in sentences()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
