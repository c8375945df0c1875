"""Objectives for batches with labels: the models' own loss, row by row."""

import math
from functools import partial

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


def sequences() -> dict[str, torch.Tensor]:
    """Three rows of two sequences each, with other prompts and lengths, padded on the right."""
    ids = torch.randint(3, 50, (3, 2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 0, 5:] = mask[2, 1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def token_log_probs(net: torch.nn.Module, rows: dict[str, torch.Tensor], row: int, sequence: int) -> list[float]:
    """Of the tokens that count, one at a time, from the sequence alone and without its padding."""
    length = int(rows["attention_mask"][row, sequence].sum())
    ids, labels = rows["input_ids"][row, sequence, :length], rows["labels"][row, sequence]
    probabilities = net(input_ids=ids[None]).logits[0].softmax(-1)
    return [math.log(probabilities[at - 1, ids[at]]) for at in range(1, length) if labels[at] != -100]


@torch.no_grad()
def test_a_choice_among_candidates_is_the_textbook_s() -> None:
    net, rows = model("llama"), sequences()
    rows["label"] = torch.tensor([0, 1, 1])
    expected = []
    for row in range(3):
        means = [sum(tokens) / len(tokens) for tokens in (token_log_probs(net, rows, row, n) for n in range(2))]
        total = sum(math.exp(mean) for mean in means)
        expected.append(-math.log(math.exp(means[rows["label"][row]]) / total))
    torch.testing.assert_close(ms.objectives.candidates(net, rows), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_preferences_are_the_textbook_s() -> None:
    net, rows = model("llama"), sequences()
    rows["reference_log_probs"] = torch.randn(3, 2, generator=torch.Generator().manual_seed(3)) - 15
    expected = []
    for row in range(3):
        chosen, rejected = (
            sum(token_log_probs(net, rows, row, n)) - float(rows["reference_log_probs"][row, n]) for n in range(2)
        )
        expected.append(-math.log(1 / (1 + math.exp(-0.3 * (chosen - rejected)))))
    found = ms.objectives.preferences(net, rows, beta=0.3)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_that_is_its_own_reference_prefers_neither() -> None:
    net, rows = model("llama"), sequences()
    rows["reference_log_probs"] = ms.objectives.log_probs(net, rows)
    torch.testing.assert_close(ms.objectives.preferences(net, rows), torch.full((3,), math.log(2)))


@pytest.mark.parametrize("name", ["candidates", "preferences"])
def test_a_step_towards_a_choice_runs_in_one_forward_and_lowers_its_loss(name: str) -> None:
    net, rows = model("llama"), sequences()
    with torch.no_grad():
        rows |= {"label": torch.zeros(3, dtype=torch.long), "reference_log_probs": ms.objectives.log_probs(net, rows)}
    objective = {"candidates": ms.objectives.candidates, "preferences": partial(ms.objectives.preferences, beta=1.0)}
    opt = ms.MeZO(net, lr=1e-2, eps=1e-3, num_directions=2)
    losses = [opt.step(batch=rows, objective=objective[name]) for _ in range(30)]
    assert opt.paired is True
    assert losses[-1] < losses[0]


def test_sequences_that_can_t_be_compared_are_refused() -> None:
    net, rows = model("llama"), sequences()
    with pytest.raises(KeyError, match=r"no label, only .*objectives\.candidates needs it"):
        ms.objectives.candidates(net, rows)
    with pytest.raises(ValueError, match=r"label has shape \(3, 1\): expected one number per row, \(3,\)"):
        ms.objectives.candidates(net, {**rows, "label": torch.zeros(3, 1, dtype=torch.long)})
    one = {name: value[:, :1] for name, value in rows.items()}
    with pytest.raises(ValueError, match="1 sequences per row"):
        ms.objectives.preferences(net, {**one, "reference_log_probs": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="beta is 0: expected a number above 0"):
        ms.objectives.preferences(net, rows, beta=0)
    with pytest.raises(ValueError, match=r"expected \[rows, sequences, tokens\] of both"):
        ms.objectives.log_probs(net, {name: value[:, 0] for name, value in rows.items()})
    rows["labels"][2, 1] = -100
    with pytest.raises(ValueError, match="sequence 1 of row 2 has no label that counts"):
        ms.objectives.log_probs(net, rows)


def test_a_mean_is_refused_with_the_way_out() -> None:
    opt = ms.MeZO(model("llama"))
    with pytest.raises(ValueError, match=r"one loss per row.*mezo_scale\.objectives\.labels"):
        opt.step(batch=batch(), objective=lambda net, rows: net(**rows).loss)
