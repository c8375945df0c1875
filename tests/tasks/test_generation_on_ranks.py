"""Objectives that jump: MeZO on what a model writes, against a textbook that really moves the weights."""

import pytest
import torch
import torch.distributed as dist

import mezo_scale as ms
from mezo_scale.tasks import Question
from mezo_scale.tasks.encoding import Batch
from tests.support import layouts, material, textbook
from tests.support.pool import Ranks
from tests.tasks.test_generation import kind

STEPS = 3
OPTIONS = {"lr": 1e-3, "eps": 3e-2, "weight_decay": 0.0, "num_directions": 2, "seed": 5}
PROMPTS = ("the plot is", "its cast is", "a remake", "every scene that is")


def batch_of(rows: slice) -> Batch:
    """Questions that the model answers rightly as long as nobody moves its weights: some moves change some words."""
    asker, model = kind(max_new_tokens=8), material.build("opt")
    plain = asker.collate([asker.encode(Question(prompt, (" x",))) for prompt in PROMPTS])
    answers = asker.predict(model, plain)
    questions = [Question(prompt, (f" {answer}", " x")) for prompt, answer in zip(PROMPTS, answers, strict=True)]
    return asker.collate([asker.encode(question) for question in questions][rows])


def train(layout: str, objective: str) -> list[list[float]]:
    sharded = layouts.shard(layout, material.build("opt"))
    optimizer = ms.MeZO(sharded.model, **OPTIONS)
    cuts = {1: [slice(0, 4)], 2: [slice(0, 3), slice(3, 4)]}[dist.get_world_size()]
    batch = batch_of(cuts[dist.get_rank()])
    gradients = []
    for _ in range(STEPS):
        optimizer.step(batch=batch, objective=kind(max_new_tokens=8).objectives[objective])
        assert optimizer.last_record is not None
        gradients.append(list(optimizer.last_record.projected_grads))
    assert optimizer.paired
    sharded.close()
    return gradients


@pytest.fixture(scope="module", params=["f1", "exact_match"])
def expected(request: pytest.FixtureRequest) -> tuple[str, list[list[float]]]:
    batch, objective = batch_of(slice(0, 4)), kind(max_new_tokens=8).objectives[request.param]
    model = material.build("opt")
    return request.param, textbook.projected_gradients(
        model, lambda model, _: objective(model, batch), STEPS, **OPTIONS
    )


@pytest.mark.parametrize(("size", "layout"), [(1, "plain"), (2, "plain"), (1, "fsdp2"), (2, "fsdp2"), (2, "zero3")])
def test_steps_on_what_is_written_have_the_textbook_s_projected_gradients(
    ranks: Ranks, expected: tuple[str, list[list[float]]], size: int, layout: str
) -> None:
    objective, gradients = expected
    assert sum(abs(gradient) > 1 for step in gradients for gradient in step) >= 2
    for found in ranks(size, train, layout=layout, objective=objective):
        assert torch.allclose(torch.tensor(found), torch.tensor(gradients), rtol=1e-4, atol=1e-4)
