"""What one rank meets and the others do not: a failure, or a call that only it has to learn. None waits for an hour."""

from __future__ import annotations

import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import mezo_scale as ms
from mezo_scale.errors import RankError
from mezo_scale.optim import mezo
from tests.support import models
from tests.support.pool import Ranks


class Optional(nn.Module):
    """Takes a second input, or none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        hidden = self.first(x)
        if extra is not None:
            hidden = hidden + self.second(extra)
        return self.head(hidden)[:, 0]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch)


def different_inputs(steps: int) -> list[float]:
    """The ranks take turns in having the second input."""
    model = Optional()
    for module in (model.first, model.second, model.head, model):
        fully_shard(module)
    opt = ms.MeZO(model, lr=1e-3, eps=1e-2)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(steps):
            batch = {"x": torch.ones(2, 4) * (1 + dist.get_rank())}
            if (step // 2 + dist.get_rank()) % 2:
                batch["extra"] = torch.ones(2, 4)
            # Every rank gathers every unit, as FSDP2 asks for: a rank without the input runs the module all the same.
            losses.append(opt.step(batch=batch | {"extra": batch.get("extra", torch.zeros(2, 4))}, objective=loss))
            losses.append(opt.step(batch={"x": batch["x"]}, objective=loss))
    return losses


def test_ranks_learn_new_kinds_of_calls_together(ranks: Ranks) -> None:
    one, two = ranks(2, different_inputs, steps=4)
    assert one == two
    assert all(torch.isfinite(torch.tensor(one)))


def text_and_type(steps: int) -> tuple[list[float], bool | None]:
    """BERT with token types on rank 0 and without on rank 1, then the other way round; both gather every weight."""
    model = models.build("bert")
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    opt = ms.MeZO(model, lr=1e-3, eps=1e-2)
    losses = []
    for step in range(steps):
        batch = models.batch("bert", 2)
        if (step + dist.get_rank()) % 2:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])

        def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            types = {"token_type_ids": batch["token_type_ids"]} if "token_type_ids" in batch else {}
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **types).logits
            return logits.float().square().flatten(1).mean(1)

        losses.append(opt.step(batch=batch, objective=objective))
    return losses, opt.paired


def test_two_ranks_whose_batches_carry_different_inputs_do_not_hang(ranks: Ranks) -> None:
    one, two = ranks(2, text_and_type, steps=4)
    assert one == two
    assert one[1] is True


def fails_once(shard: bool, where: str) -> tuple[str, float, float]:
    """Rank 1 raises in its second step. What each rank got, how long that took, and the loss of a third step."""
    mezo.PATIENCE_S = 2.0
    model = Optional()
    if shard:
        for module in (model.first, model.second, model.head, model):
            fully_shard(module)
    opt = ms.MeZO(model, lr=1e-3, paired=where != "apart")
    batch = {"x": torch.ones(2, 4), "extra": torch.ones(2, 4)}
    opt.step(batch=batch, objective=loss)

    def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if dist.get_rank() == 1 and where != "after":
            raise KeyError("on purpose")
        losses = loss(model, batch)
        if dist.get_rank() == 1:
            raise KeyError("on purpose")
        return losses

    start = time.monotonic()
    try:
        opt.step(batch=batch, objective=objective)
        said = "nothing"
    except (KeyError, RankError) as error:
        said = f"{type(error).__name__}: {error}"
    return said, time.monotonic() - start, opt.step(batch=batch, objective=loss)


@pytest.mark.parametrize("where", ["before", "after", "apart"])
@pytest.mark.parametrize("shard", [False, True], ids=["plain", "fsdp2"])
def test_an_exception_that_one_rank_catches_leaves_no_rank_waiting(ranks: Ranks, shard: bool, where: str) -> None:
    one, two = ranks(2, fails_once, shard=shard, where=where)
    assert one[0] == (
        "RankError: rank 1 failed while it evaluated step 1, and says why itself: the step was taken on no rank"
    )
    assert two[0] == "KeyError: 'on purpose'"
    assert max(one[1], two[1]) < 20
    assert one[2] == two[2]  # and both go on


def loss_that_rank_1_can_not_take(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    if dist.get_rank() == 1:
        raise KeyError("on purpose")
    return loss(model, batch)


def fails_at_first() -> tuple[str, float]:
    """Rank 1 raises in the first evaluation of all; what each rank got, and the loss of the same step, taken again."""
    opt = ms.MeZO(Optional(), lr=1e-3)
    batch = {"x": torch.ones(2, 4), "extra": torch.ones(2, 4)}

    try:
        opt.step(batch=batch, objective=loss_that_rank_1_can_not_take)
        said = "nothing"
    except (KeyError, RankError) as error:
        said = f"{type(error).__name__}: {error}"
    return said, opt.step(batch=batch, objective=loss)


def test_an_exception_in_the_very_first_evaluation_leaves_no_rank_waiting(ranks: Ranks) -> None:
    one, two = ranks(2, fails_at_first)
    assert one[0] == "RankError: another rank failed while it evaluated the first losses, and says why itself"
    assert two[0] == "KeyError: 'on purpose'"
    assert one[1] == two[1]


def fails_after_the_check() -> tuple[str, float]:
    """Rank 1 of a sharded model raises in the second step: the first one's calls were many, for it had the check."""
    mezo.PATIENCE_S = 2.0
    model = Optional()
    for module in (model.first, model.second, model.head, model):
        fully_shard(module)
    opt = ms.MeZO(model, lr=1e-3)
    batch = {"x": torch.ones(2, 4), "extra": torch.ones(2, 4)}
    opt.step(batch=batch, objective=loss)

    try:
        opt.step(batch=batch, objective=loss_that_rank_1_can_not_take)
        said = "nothing"
    except (KeyError, RankError) as error:
        said = type(error).__name__
    return said, opt.step(batch=batch, objective=loss)


def test_the_calls_of_the_start_up_check_are_not_waited_for_in_the_next_step(ranks: Ranks) -> None:
    one, two = ranks(2, fails_after_the_check)
    assert (one[0], two[0]) == ("RankError", "KeyError")
    assert one[1] == two[1]


@pytest.mark.parametrize("text", ["soft prompt"])
def test_whatever_the_tall_batch_alone_raises_is_a_reason_not_to_pair(text: str) -> None:
    class Repeats(nn.Module):
        """One row of prompt, repeated over the rows of the batch by the model itself."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.prompt, self.head = nn.Embedding(3, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            prompt = self.prompt(torch.arange(3)[None]).repeat(x.shape[0], 1, 1)
            return self.head(torch.cat([prompt, x], dim=1)).mean((1, 2))

    model = Repeats()
    opt = ms.MeZO(model, lr=1e-3, eps=1e-2)
    batch = {"x": torch.randn(3, 5, 4)}
    with pytest.warns(UserWarning, match="one at a time .*RuntimeError: Sizes of tensors must match"):
        found = opt.step(batch=batch, objective=lambda model, batch: model(batch["x"]))
    assert opt.paired is False
    reference = ms.MeZO(Repeats(), lr=1e-3, eps=1e-2, paired=False)
    assert found == reference.step(batch=batch, objective=lambda model, batch: model(batch["x"]))
    assert opt.last_record == reference.last_record
