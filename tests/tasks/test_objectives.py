"""Scores of candidates: the mean log-probability of their tokens, however they are batched."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import mezo_scale as ms
from mezo_scale.tasks.kinds.candidates import OBJECTIVES, Encoded, candidate_scores, collate
from tests.support import material

MODELS = ("llama", "llama-untied", "opt", "gpt2")
SHORT = [Encoded((40, 41, 42, 43, 44), ((7,), (8,), (9,)), 2), Encoded((50, 51), ((9,), (7,)), 0)]
LONG = [Encoded((40, 41, 42, 43, 44), ((7,), (8, 6, 5)), 1), Encoded((50, 51), ((9, 9), (7, 5), (4,)), 2)]


def by_hand(model: nn.Module, example: Encoded) -> list[float]:
    """One candidate at a time, without padding, from all the logits."""
    scores = []
    for candidate in example.candidates:
        tokens = torch.tensor([example.prompt + candidate])
        logs = model(input_ids=tokens).logits[0].double().log_softmax(-1)
        start = len(example.prompt)
        scores.append(sum(float(logs[start + n - 1, token]) for n, token in enumerate(candidate)) / len(candidate))
    return scores


@pytest.mark.parametrize("examples", [SHORT, LONG], ids=["one token", "several tokens"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_scores_are_mean_log_probabilities_whatever_the_padding(name: str, examples: list[Encoded]) -> None:
    model = material.build(name)
    scores = candidate_scores(model, collate(examples, pad_id=0))
    assert scores.dtype == torch.float32
    for row, example in zip(scores, examples, strict=True):
        count = len(example.candidates)
        torch.testing.assert_close(
            row[:count].double(), torch.tensor(by_hand(model, example)).double(), atol=2e-5, rtol=0
        )
        assert (row[count:] == float("-inf")).all()


@pytest.mark.parametrize("family", ["roberta", "bert", "biogpt", "xglm"])
@torch.no_grad()
def test_positions_begin_where_the_models_own_do(family: str) -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "d_model": 32}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **sizes, intermediate_size=48, max_position_embeddings=64, is_decoder=True)
    ).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    scores = candidate_scores(model, collate(LONG[:1], pad_id=1))
    torch.testing.assert_close(scores[0].double(), torch.tensor(by_hand(model, LONG[0])).double(), atol=2e-5, rtol=0)


@torch.no_grad()
def test_the_objectives_follow_from_the_scores() -> None:
    model = material.build("llama")
    for examples in (SHORT, LONG):
        batch = collate(examples, pad_id=0)
        scores = candidate_scores(model, batch)
        gold = scores[torch.arange(2), batch["label"]]
        torch.testing.assert_close(OBJECTIVES["language_modeling"](model, batch), -gold)
        torch.testing.assert_close(OBJECTIVES["candidates"](model, batch), scores.logsumexp(1) - gold)


@torch.no_grad()
def test_the_right_candidate_alone_has_the_same_loss_in_language_modeling() -> None:
    model = material.build("opt")
    loss = OBJECTIVES["language_modeling"]
    whole = loss(model, collate(LONG, pad_id=0))
    gold = loss(model, collate([example.gold for example in LONG], pad_id=0))
    torch.testing.assert_close(whole, gold)


@pytest.mark.parametrize("examples", [SHORT, LONG], ids=["one token", "several tokens"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_all_branches_in_one_forward_give_each_branch_its_own_losses(name: str, examples: list[Encoded]) -> None:
    model = material.build(name)
    batch = collate(examples, pad_id=0)
    branches = [(11, 1e-2), (11, -1e-2), (12, 1e-2)]
    with ms.perturbed(model, branches):
        together = OBJECTIVES["candidates"](
            model, {key: value.repeat(3, *[1] * (value.dim() - 1)) for key, value in batch.items()}
        )
    for number, branch in enumerate(branches):
        with ms.perturbed(model, [branch]):
            apart = OBJECTIVES["candidates"](model, batch)
        torch.testing.assert_close(together[2 * number : 2 * number + 2], apart, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[:2], together[2:4])
