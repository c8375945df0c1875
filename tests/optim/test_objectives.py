"""Objectives for batches with labels: the models' own loss, row by row."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import mezo_scale as ms

SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def model(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    if family == "bert":
        return BertForMaskedLM(BertConfig(**SMALL)).eval()
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 50, (3, 6), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@torch.no_grad()
def test_each_row_has_the_loss_that_the_model_gives_it_alone(family: str) -> None:
    net, rows = model(family), batch()
    found = ms.objectives.labels(net, rows)
    alone = [net(**{name: value[n : n + 1] for name, value in rows.items()}).loss for n in range(3)]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_it_is_an_objective() -> None:
    opt = ms.MeZO(model("llama"), lr=1e-3, eps=1e-2)
    loss = opt.step(batch=batch(), objective=ms.objectives.labels)
    assert opt.paired is True
    with torch.no_grad():
        assert loss == pytest.approx(float(ms.objectives.labels(model("llama"), batch()).mean()), rel=1e-2)


def test_a_row_without_labels_and_a_batch_without_are_refused() -> None:
    rows = batch()
    rows["labels"][1] = -100
    with pytest.raises(ValueError, match="row 1 has no label that counts"):
        ms.objectives.labels(model("llama"), rows)
    with pytest.raises(KeyError, match="no labels, only input_ids"):
        ms.objectives.labels(model("llama"), {"input_ids": rows["input_ids"]})


def test_a_mean_is_refused_with_the_way_out() -> None:
    opt = ms.MeZO(model("llama"))
    with pytest.raises(ValueError, match=r"one loss per row.*mezo_scale\.objectives\.labels"):
        opt.step(batch=batch(), objective=lambda net, rows: net(**rows).loss)
