"""A prefix in a model computes what PEFT's does: where text begins, under padding, and while the model writes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mezo_scale.models import adapters, prefix
from mezo_scale.tasks.kinds.decoding import greedy
from mezo_scale.tasks.logits import last_logits
from tests.support import material

CPU = torch.device("cpu")
TEXT = torch.arange(20, 29)[None]


def with_prefix(name: str, folder: Path) -> tuple[Any, nn.Module]:
    """A model with a prefix, and PEFT's from what is saved of it."""
    base = material.write_model(name, folder / "model")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    states = prefix.activations(model, 5, 7, CPU)
    prefix.attach_(model, prefix.config_for(states, str(base)), CPU, torch.float32, torch.float32)
    values = prefix.flat(states)
    adapters.put_(model, {prefix.SAVED: values + 0.3 * torch.randn_like(values)}, "the prefix")
    (folder / "saved").mkdir()
    adapters.write(model, folder / "saved")
    return model, PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "saved").eval()


def padded(by: int) -> tuple[Tensor, Tensor]:
    row = torch.cat([torch.zeros(1, by, dtype=torch.long), TEXT], 1)
    return row, (torch.arange(row.shape[1])[None] >= by).long()


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "mixtral"])
@torch.no_grad()
def test_text_after_a_prefix_is_read_as_peft_has_it_with_padding_and_without(tmp_path: Path, name: str) -> None:
    model, peft = with_prefix(name, tmp_path)
    expected = peft(input_ids=TEXT, attention_mask=torch.ones_like(TEXT)).logits[:, -3:]
    for by in (0, 4):
        torch.testing.assert_close(last_logits(model, *padded(by), keep=3), expected, rtol=1e-4, atol=1e-4)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(input_ids=TEXT).logits[:, -3:]
    assert (bare - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", ["llama", "opt"])
@torch.no_grad()
def test_a_model_with_a_prefix_writes_with_its_cache_what_it_would_without(tmp_path: Path, name: str) -> None:
    model, peft = with_prefix(name, tmp_path)
    written = greedy(model, *padded(4), 6, lambda token: False).tokens[0]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    by_transformers = model.generate(input_ids=TEXT, attention_mask=torch.ones_like(TEXT), **options)
    assert by_transformers[0, TEXT.shape[1] :].tolist() == written
    text = TEXT
    for token in written:
        logits = peft(input_ids=text, attention_mask=torch.ones_like(text)).logits[0, -1]
        assert int(logits.argmax()) == token
        text = torch.cat([text, torch.tensor([[token]])], 1)
