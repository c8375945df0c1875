"""Accuracy of a model on a split, and how sure one can be of it."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezo_scale import collectives, models
from mezo_scale.distributed.layout import Strategy
from mezo_scale.distributed.memory import keep_memory_steady
from mezo_scale.distributed.world import process_group
from mezo_scale.errors import NotFiniteError
from mezo_scale.models import Loaded
from mezo_scale.optim.replay import replay
from mezo_scale.recipe import Recipe
from mezo_scale.runs.console import Screen
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.padding import check_padding
from mezo_scale.runs.splits import EncodedSplits
from mezo_scale.tasks.encoding import Encoded, collate
from mezo_scale.tasks.objectives import candidate_scores


@dataclass(frozen=True)
class Evaluation:
    """A model on a split.

    Attributes:
        count: examples.
        correct: how many times the right candidate had the best score.
        loss: mean cross-entropy over the candidates' scores; None where nothing was scored, or a score is not finite.
        not_finite: examples with a score that is not finite, which count as wrong.
    """

    count: int
    correct: int
    loss: float | None
    not_finite: int = 0

    @property
    def accuracy(self) -> float:
        return self.correct / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        return wilson(self.correct, self.count)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields and what follows from them."""
        return {**asdict(self), "accuracy": self.accuracy, "interval_95": list(self.interval)}

    def __str__(self) -> str:
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        wrong = f", {self.not_finite} not finite and counted as wrong" if self.not_finite else ""
        return f"{self.accuracy:.1%}{loss}, {self.count:,} examples{wrong}"


def evaluate(
    loaded: Loaded,
    examples: Sequence[Encoded],
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
    max_length: int | None = None,
) -> Evaluation:
    """Scores every example once; every rank calls it and gets the whole result.

    Examples of similar length go together, `batch_size` per rank and forward pass. All ranks run equally often (a
    sharded forward pass needs them all): one without examples left runs one again and does not count it.
    `progress` is called with (forward passes done, forward passes in all).

    Raises:
        NotFiniteError: on every rank, if no example has finite scores.
    """
    order = np.argsort([example.length for example in examples], kind="stable")
    axes = loaded.strategy.axes
    per_round = batch_size * axes.rows_size
    rounds = math.ceil(len(order) / per_round)
    sums = [0.0, 0.0, 0.0]
    for number in range(rounds):
        mine = order[number * per_round : (number + 1) * per_round][
            axes.rows_rank(collectives.rank()) :: axes.rows_size
        ]
        chosen = mine if len(mine) else order[:1]
        rows = [examples[index] for index in chosen]
        batch = collate(rows, loaded.tokenizer.pad_token_id, max_length)
        batch = {name: tensor.to(loaded.device) for name, tensor in batch.items()}
        with torch.no_grad(), loaded.compute():
            scores = candidate_scores(loaded.model, batch)
        if len(mine):
            finite = _finite(scores, rows)
            scores, label = scores[finite], batch["label"][finite]
            sums[0] += float((scores.argmax(1) == label).sum())
            sums[1] += float(F.cross_entropy(scores, label, reduction="none").double().sum())
            sums[2] += float((~finite).sum())
        if progress is not None:
            progress(number + 1, rounds)
    correct, loss, not_finite = collectives.sum_scalars(sums)
    if not_finite == len(order):
        raise NotFiniteError(
            f"all of {len(order)} examples have scores that are not finite, so there is nothing to grade: check the "
            "checkpoint for NaN, take another model.dtype (float16 overflows above 65504, float32 and bfloat16 do "
            "not), or after training begin anew with a smaller optimizer.lr"
        )
    return Evaluation(len(order), round(correct), None if not_finite else loss / len(order), round(not_finite))


def _finite(scores: Tensor, examples: Sequence[Encoded]) -> Tensor:
    """Whether all scores of a row's own candidates are finite, bool [rows]; what fills a row up is -inf by right."""
    counts = torch.tensor([len(example.candidates) for example in examples], device=scores.device)
    filling = torch.arange(scores.shape[1], device=scores.device) >= counts[:, None]
    return (scores.isfinite() | filling).all(1)


def evaluate_recipe(recipe: Recipe, split: str, until: int | None) -> tuple[Evaluation, int]:
    """The accuracy of a recipe's model; of a run's, after the steps in its directory. Returns it and those steps."""
    run = RunDirectory(recipe.directory)
    keep_memory_steady()
    with process_group(always_group=Strategy(recipe.sharding.strategy).needs_group) as world:
        with world.raise_on_all():
            models.check(recipe, world)
            splits = EncodedSplits.read(recipe)
        splits.check_same(world)
        loaded = models.load(recipe, world)
        check_padding(loaded, splits.test, recipe)
        screen = Screen(world)
        steps = replay_if_begun(loaded.model, run.trajectory, until, screen)
        with screen.counting(f"evaluating ({split})") as progress:
            examples = getattr(splits, split)
            found = evaluate(loaded, examples, recipe.train.eval_batch, progress, recipe.task.max_length)
    return found, steps


def replay_if_begun(model: nn.Module, trajectory: Path, until: int | None, screen: Screen) -> int:
    """Replays a run on its base model, if rank 0 sees its trajectory: the others may not see the folder at all.

    Every rank calls it. Returns the steps applied, on all ranks.
    """
    begun = collectives.max_integer(int(collectives.rank() == 0 and trajectory.is_file()))
    if not begun or until == 0:
        return 0
    with screen.counting("replaying") as progress:
        return replay(model, trajectory, until, progress=progress)


def majority(train: Sequence[Encoded], test: Sequence[Encoded]) -> Evaluation:
    """What always answering with the train split's most frequent label gives on the test split."""
    label, _ = Counter(example.label for example in train).most_common(1)[0]
    return Evaluation(len(test), sum(example.label == label for example in test), None)


def wilson(correct: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, 1927)."""
    share = correct / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale
