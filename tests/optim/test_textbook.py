"""Ours against a textbook MeZO in float64, over many steps, so that a wrong update would show in the next gradient."""

import pytest
import torch

import mezo_scale as ms
from tests.support import models, textbook

STEPS = 20
OPTIONS = {"lr": 1e-3, "eps": 1e-2, "weight_decay": 0.1, "num_directions": 2, "seed": 5}


def batch_of(name: str, step: int) -> models.Batch:
    return models.batch(name, 4, seed=step)


def double_losses(name: str, model: torch.nn.Module, step: int) -> torch.Tensor:
    """Per-row losses without the objective's rounding of logits to float32."""
    batch = batch_of(name, step)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
    return losses.sum(1) / (labels != -100).sum(1)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_twenty_steps_have_the_textbook_s_projected_gradients(name: str) -> None:
    expected = textbook.projected_gradients(
        models.build(name), lambda model, step: double_losses(name, model, step), STEPS, **OPTIONS
    )
    model = models.build(name)
    optimizer = ms.MeZO(model, **OPTIONS)
    for step in range(STEPS):
        optimizer.step(batch=batch_of(name, step), objective=models.objective(name))
        assert optimizer.last_record is not None
        assert list(optimizer.last_record.projected_grads) == pytest.approx(expected[step], rel=1e-4, abs=1e-4)
